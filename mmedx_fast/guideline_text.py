"""Reading a reasoning trace: sentences, stems, findings of the question, and which option is named.

Everything here is lexical and fast (compiled once, per-question parts cached), because it scores
every rollout of a training step. The criteria built on it are in :mod:`mmedx_fast.guidelines`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable

WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\bvs\.)(?<!e\.g\.)(?<!i\.e\.)\s+|\n+")
_LIST_MARK = re.compile(r"(?m)^\s*(?:\d{1,2}[.)]|[-*\u2022])\s+")
_NUMBERED = re.compile(r"(?m)^\s*\d{1,2}[.)]\s+(.+)$")
_BULLETS = re.compile(r"(?m)^\s*[-*\u2022]\s+(.+)$")
# A part of the stem with one of these says that something is missing, whatever it names.
_STEM_ABSENCE = re.compile(
    r"\b(?:no|not|without|absent|absence|lost|loss|missing|negative|denies|normal|never|nor|neither)\b"
)
_SAYS_ABSENT = re.compile(
    r"\b(?:no|without|absence of|lack of|lacks|lacking)\s+(?:an?\s+|any\s+|the\s+)?([a-z0-9' -]+)"
)
_NARROWS = frozenset("on in at during with of over to from after before by under when".split())
_MARKUP = re.compile(r"[*_`#]{1,4}(?=\S)|(?<=\S)[*_`]{1,3}")
_ACRONYM = re.compile(r"\b[A-Z]{2,6}\b")
_CHUNK_END = re.compile(r"[.,;:!?()\[\]\"\n/]| - ")
_LETTER_NAMED = re.compile(
    r"\b(?:[Oo]ption|[Cc]hoice|[Aa]nswer(?:\s+is)?:?)\s*[*(\[]*([A-J])\b(?![A-Za-z'])"
    r"|[(\[*]([A-J])[)\]*]|\bis\s+([A-J])(?=\s*(?:[.,;:]|$))|^\s*([A-J])[.)](?=\s|$)"
)

FUNCTION_WORDS = frozenset(
    """a about after again all also although an and another any are as at be because been before
    being between both but by can could did do does for from further had has have he her here
    hers him his how however i if in into is it its itself less more most much must my no nor
    not of off on once only or other our out over own rather she should since so some still such
    than that the their them then there these they this those though through thus to together
    too under unlike until up upon very was we were what when where whereas which while who whom
    whose why will with within without would yet you your therefore hence likely""".split()
)
# Words of any vignette: naming one of them is not yet naming a finding.
_GENERIC = frozenset(
    """year years old month months week weeks day days hour hours man woman boy girl male female
    infant child patient patients adult present presents presented presenting presentation
    history come comes came report reports reported complain complains complaint following
    figure figures image images picture radiograph photograph xray scan film mri ct show shows
    showed shown showing see seen reveal reveals finding findings feature features likely
    probable diagnosis diagnose cause answer best next step management treatment option options
    choice question case clinical exam examination note noted left right mild moderate severe
    acute chronic sudden new onset worsening persistent recent ago since normal sign signs
    symptom symptoms disease condition one two three four five several many time first
    probability prior posterior percent evidence choose select name
    given support supports""".split()
)
# Words of any question about a picture: no finding either, but they break none up ("pleuritic chest pain").
_OF_PICTURES = frozenset(
    """abnormal abnormality abnormalities technique techniques organ organs part parts body chest modality
    modalities system systems use used uses using obtain obtained obtaining acquire acquired acquisition
    taken performed captured ray rays visible visualized visualised located location localized lesion
    lesions area areas region regions structure structures anatomy anatomical anatomic type types kind plane
    view views slice section pathology pathological process object objects arrow arrows indicated pointed
    labeled labelled marked highlighted identify identified identifiable depict depicts depicted represent
    represents represented represent describe described describes demonstrate demonstrates demonstrated
    display displayed appear appears appearance contain contains observe observed detect detected major main
    primary principal specific correct true false statement following scanner weighted contrast
    suggest suggests suggested explain explains fits""".split()
)
_SUFFIX = re.compile(r"(?:ations?|ings?|edly|ed|es|s|ly|ically|ical|ic|al|ous|ity|y|e)$")


@functools.lru_cache(maxsize=65536)
def stem(word: str) -> str:
    """A crude stem, enough to join plurals, nouns and verbs ("obstructs", "obstruction")."""
    word = word.removesuffix("'s")
    if len(word) > 5 and word.endswith("ion"):
        word = word[:-3]
    cut = _SUFFIX.sub("", word)
    return cut if len(cut) >= 3 else word


_GENERIC_STEMS = frozenset(stem(word) for word in _GENERIC)
_PICTURE_STEMS = frozenset(stem(word) for word in _OF_PICTURES)


@functools.lru_cache(maxsize=65536)
def content_stem(word: str) -> str:
    """The stem of a content word; "" for function words, numbers and words of any vignette."""
    if word in FUNCTION_WORDS or word.isdigit() or len(word) < 3:
        return ""
    found = stem(word)
    return "" if found in _GENERIC_STEMS or found in _PICTURE_STEMS else found


def content_stems(text: str) -> set[str]:
    """The content stems of a lower-case text."""
    return {found for word in WORD.findall(text) if (found := content_stem(word))}


@dataclasses.dataclass(frozen=True)
class Mention:
    """One naming of option ``letter`` at characters ``start`` to ``end`` of a sentence."""

    letter: str
    start: int
    end: int


class Case:
    """What a question offers to a trace: its findings and its options. Cached by :func:`read_case`.

    A finding is a run of content words between function words, vignette words and punctuation
    ("productive cough", "tracheal deviation"), or one of the caller's ``findings`` phrases.
    """

    def __init__(
        self, question: str, options: tuple[tuple[str, str], ...], findings: tuple[str, ...]
    ) -> None:
        self.letters = tuple(letter for letter, _ in options)
        self.question_words = WORD.findall(question.lower())
        chunks: dict[frozenset[str], None] = {}
        present: set[frozenset[str]] = set()
        for part in (*_CHUNK_END.split(question.lower()), *(f"{f.lower()}" for f in findings)):
            for run in _content_runs(part):
                chunks.setdefault(frozenset(run))
                if not _STEM_ABSENCE.search(part):
                    present.add(frozenset(run))
        self._present = present
        named = [frozenset(content_stems(text.lower())) for _, text in options]
        self.own_findings = sum(chunk not in named for chunk in chunks)
        self.findings: tuple[frozenset[str], ...] = tuple(chunks)
        self.finding_stems = frozenset().union(*self.findings) if self.findings else frozenset()
        texts = {letter: WORD.findall(text.lower()) for letter, text in options}
        self._patterns, self._lettered = _option_patterns(texts)
        self._acronyms = _acronyms(texts)
        self._letter_of = {" ".join(words): letter for letter, words in reversed(texts.items())}
        stems = {letter: {stem(w) for w in words} - {""} for letter, words in texts.items()}
        self._long = {
            letter: (
                {s for s in own if len(s) > 2},
                own.difference(*(other for key, other in stems.items() if key != letter)),
            )
            for letter, own in stems.items()
            if len(own) >= 3
        }

    def mentions(self, sentence: str) -> list[Mention]:
        """Options named in a sentence, in order: by text, letter or initials ("PE"), or, for a long
        option text, by three fifths of its words with one that no other option has."""
        lower = sentence.lower()
        found = []
        if self._patterns is not None:
            for match in self._patterns.finditer(lower):
                key = " ".join(WORD.findall(match.group(1)))
                found.append(Mention(self._letter_of[key], match.start(), match.end()))
        for match in _LETTER_NAMED.finditer(sentence):
            letter = next(group for group in match.groups() if group)
            if letter in self.letters and not any(m.start < match.end() <= m.end for m in found):
                found.append(Mention(letter, match.start(), match.end()))
        for match in _ACRONYM.finditer(sentence) if self._acronyms else ():
            if match.group() in self._acronyms:
                letter = self._acronyms[match.group()]
                found.append(Mention(letter, match.start(), match.end()))
        if not found and self._long:
            found = self._loose_mentions(lower)
        return sorted(found, key=lambda mention: mention.start)

    def join_letters(self, text: str) -> str:
        """``text`` with "B. Pneumonia" as "B Pneumonia": that stop ends no sentence."""
        return text if self._lettered is None else self._lettered.sub(r"\1 ", text)

    def _loose_mentions(self, lower: str) -> list[Mention]:
        words = [(stem(match.group()), match) for match in WORD.finditer(lower)]
        present = {word for word, _ in words}
        found = []
        for letter, (own, unique) in self._long.items():
            shared = own & present
            if len(shared) * 5 >= len(own) * 3 and unique & shared:
                places = [match for word, match in words if word in shared]
                found.append(Mention(letter, places[0].start(), places[-1].end()))
        return found

    def denies(self, lower: str) -> bool:
        """Whether a sentence says that something the stem reports is missing: "without fever"."""
        for match in _SAYS_ABSENT.finditer(lower):
            said: set[str] = set()
            for word in WORD.findall(match.group(1)):
                found = content_stem(word)
                if not found:
                    if word in _NARROWS:  # "no pain on walking" may well be so
                        said.clear()
                    break
                said.add(found)
            if said and any(said <= chunk for chunk in self._present):
                return True
        return False

    def findings_in(self, stems: set[str]) -> set[int]:
        """Indices of the findings a set of content stems names: two fifths of the words of the
        finding, each word counting for one finding only."""
        named: set[int] = set()
        free = stems & self.finding_stems
        for index, chunk in enumerate(self.findings):
            hit = chunk & free
            if hit and len(hit) * 5 >= len(chunk) * 2:
                named.add(index)
                free = free - hit
        return named


def _content_runs(part: str) -> Iterable[list[str]]:
    run: list[str] = []
    for word in WORD.findall(part):
        found = content_stem(word)
        if found:
            run.append(found)
        elif run and stem(word) not in _PICTURE_STEMS:
            yield run
            run = []
    if run:
        yield run


def _acronyms(texts: dict[str, list[str]]) -> dict[str, str]:
    """Initials of options of several words that stand for one option alone."""
    initials: dict[str, list[str]] = {}
    for letter, words in texts.items():
        firsts = [word[0].upper() for word in words if word not in FUNCTION_WORDS]
        if len(firsts) >= 2:
            initials.setdefault("".join(firsts), []).append(letter)
    return {name: letters[0] for name, letters in initials.items() if len(letters) == 1}


def _option_patterns(
    texts: dict[str, list[str]],
) -> tuple[re.Pattern[str] | None, re.Pattern[str] | None]:
    """(an option's text, longest first; a letter with its stop before an option's text)."""
    names = sorted(
        {tuple(words) for words in texts.values() if words}, key=lambda w: -sum(map(len, w))
    )
    if not names:
        return None, None
    joined = "|".join(r"[\W_]+".join(map(re.escape, words)) for words in names)
    return (
        re.compile(rf"(?<![a-z0-9])({joined})(?:s|es)?(?![a-z0-9])"),
        re.compile(rf"\b([A-J])\.\s+(?=(?i:{joined})\b)"),
    )


@functools.lru_cache(maxsize=4096)
def read_case(
    question: str, options: tuple[tuple[str, str], ...], findings: tuple[str, ...]
) -> Case:
    """The cached :class:`Case` of a question; ``options`` as (letter, text) pairs."""
    return Case(question, options, findings)


@dataclasses.dataclass
class Sentence:
    """One sentence of a trace with what it names; findings exclude the words of named options.

    A sentence that ``denies`` what the stem reports names no finding.
    """

    text: str
    lower: str
    start: int
    mentions: list[Mention]
    stems: set[str]
    findings: set[int]
    denies: bool

    @functools.cached_property
    def words(self) -> list[str]:
        return WORD.findall(self.lower)

    @functools.cached_property
    def letters(self) -> set[str]:
        return {mention.letter for mention in self.mentions}


def masked(text: str, mentions: list[Mention]) -> str:
    """``text`` with named options blanked: a disease's name must not pass for a finding."""
    for mention in mentions:
        text = text[: mention.start] + " " * (mention.end - mention.start) + text[mention.end :]
    return text


@functools.lru_cache(maxsize=16)
def _unmarked(think: str) -> str:
    return _MARKUP.sub("", think) if any(mark in think for mark in "*_`#") else think


def read_sentences(think: str, case: Case) -> list[Sentence]:
    """The sentences of a trace in order, without list markers and wordless fragments."""
    sentences, position = [], 0
    text = case.join_letters(_LIST_MARK.sub("", _unmarked(think)))
    pieces = _SENTENCE_END.split(text)
    for piece in pieces:
        start = text.find(piece, position)
        position = start + len(piece)
        lower = piece.lower()
        if not WORD.search(lower):
            continue
        mentions = case.mentions(piece)
        stems = content_stems(masked(lower, mentions))
        denies = case.denies(lower)
        findings = set() if denies else case.findings_in(stems)
        sentences.append(Sentence(piece, lower, start, mentions, stems, findings, denies))
    return sentences


def numbered_items(think: str) -> list[str]:
    """The items of a numbered list in a trace ("1. ...", "2) ..."), without their numbers."""
    return _NUMBERED.findall(_unmarked(think))


def bullet_items(think: str) -> list[str]:
    """The items of a list with bullets, without their marks."""
    return _BULLETS.findall(_unmarked(think)) if "\n" in think else []


def copied_share(words: list[str], source: list[str], size: int = 4) -> float:
    """The share of a trace's runs of ``size`` words that stand in the question just so."""
    runs = list(zip(*(words[shift:] for shift in range(size)), strict=False))
    if not runs:
        return 0.0
    known = set(zip(*(source[shift:] for shift in range(size)), strict=False))
    return sum(run in known for run in runs) / len(runs)
