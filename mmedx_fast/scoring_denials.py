"""Whether the words after an answer's letter take it back: "C) can be excluded", "B. The kidney"."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Mapping

# Named options are put as these, so that the patterns below can speak of them.
_OWN, _OTHER = "@own", "@other"
_THIS = rf"(?:it|this|that|which|{_OWN}|(?:this|that|the) (?:one|option|choice|answer|letter))"
_ADVERBS = (
    r"(?:(?:\w{1,12}ly|very|so|also|now|then|quite|most|far|much|almost|here|just|thus) ){0,3}"
)
_AUXILIARY = (
    r"(?:(?:is|was|are|were|be|been|being|has|have|had|can|could|may|might|must|should|would|will|to|seems?"
    r"|looks?|appears?|gets?|am) ){0,4}"
)
_REJECTED = (
    r"(?:wrong|incorrect|false|unlikely|improbable|implausible|impossible|untenable|inconsistent|incompatible"
    r"|unsupported|contradicted|refuted|disproved|ruled out|rules? out|excluded?|eliminated?|rejected"
    r"|discarded|dismissed|discounted|out|(?:less|least) (?:likely|probable|plausible|fitting))\b"
)
_NEGATION = (
    r"(?:not|never|no(?! (?:doubt|question))|none|neither|nor|hardly|scarcely|barely|cannot|fails?|lacks?"
    r"|(?:is|was|are|ca|could|wo|would|does|do|did|has|should|might|must)n't)\b"
)
_DENIAL = (
    rf"{_AUXILIARY}{_ADVERBS}(?:(?:does|do|did) )?"
    rf"(?:{_REJECTED}|{_NEGATION}|(?:an? )?(?:mistake|error|distractor)\b|(?:what i |my |the )?(?:first|initial)"
    r" (?:thought|idea|guess|impression)|what i first)"
)
_OPENS_DENIED = re.compile(_ADVERBS + _DENIAL)
_DENIED = re.compile(
    rf"(?<![\w@]){_THIS} {_ADVERBS}{_DENIAL}|{_OWN}[ ,;:(-]{{1,3}}{_AUXILIARY}{_ADVERBS}{_REJECTED}"
    r"|\b(?:do not|don't|cannot|can't) (?:think|believe|agree)"
    rf"|(?:[,;:.!?()-] ?|\bbut |\bnow ){_AUXILIARY}{_ADVERBS}(?:no|not|{_REJECTED})(?= ?(?:[,;:.!?)]|$))"
    r"|\b(?:reject|exclud|eliminat|discard|dismiss|discount|doubt|against|not|never|rul(?:e[sd]?|ing) out"
    rf"|n't)(?:e[sd]?|ed|s|ing)? (?:the |an? )?(?:{_THIS}|[.,;]|$)"
    rf"|\b(?:is|be|it's|was|prefer|choose|pick|say|answer:?) (?:rather |actually |really )?(?:the |an? )?{_OTHER}"
    rf"|{_OTHER} (?:is|was|fits|seems|looks|would be) (?:\w+ )?(?:right|correct|better|best|more|most|likelier"
    r"|the answer)\b"
)
_TURN = re.compile(r"\b(?:but|however|although|though|yet|instead|whereas|except)\b")
# Where a capital is part of a name.
_BEFORE_A_NAME = re.compile(
    r"\b(?:vitamin|hepatitis|type|grade|group|stage|class|factor|protein|figure|panel|image|influenza|zone"
    r"|point|phase|level|lead|coenzyme)s? $",
    re.IGNORECASE,
)
_CAPITAL = re.compile(r"(?<![\w'.-])([A-Z])(?![\w'-]|\.\w)")
_SUBJECT = re.compile(
    r"(?<![\w'.-])([A-Za-z]) (?:is|fits?|seems|looks|remains|explains|would be|was)\b",
    re.IGNORECASE,
)


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).replace("\u2019", "'").split())


@functools.lru_cache(maxsize=1024)
def _reader(
    options: tuple[tuple[str, str], ...],
) -> tuple[re.Pattern[str] | None, dict[str, set[str]]]:
    """The pattern of the options' texts, longest first, and whose each is."""
    owners: dict[str, set[str]] = {}
    for letter, text in options:
        if name := _plain(text).strip(" .,;:!?\"'`*_").casefold():
            owners.setdefault(name, set()).add(letter)
    names = "|".join(re.escape(name) for name in sorted(owners, key=len, reverse=True))
    pattern = rf"(?<![\w@])({names})(?:'s|e?s)?(?![\w@])"
    return (re.compile(pattern, re.IGNORECASE) if names else None), owners


def takes_back(letter: str, rest: str, options: Mapping[str, str]) -> bool:
    """Whether ``rest``, the text after the marked ``letter``, denies it or states another option.

    It does if it names another option's whole text and not the letter's own, says that the letter
    or its text is wrong, or turns ("but", "although") to another option. Words of the letter's own
    text ("No abnormality") deny nothing.
    """
    pattern, owners = _reader(tuple(options.items()))
    named: set[str] = set()

    def put(match: re.Match[str]) -> str:
        whose = owners.get(match.group(1).casefold(), set())
        named.add(letter if letter in whose else next(iter(whose), ""))
        return _OWN if letter in whose else _OTHER

    flat = _plain(rest.replace("*", " "))
    said = flat if pattern is None else pattern.sub(put, flat)
    if named and letter not in named:
        return True
    lower = said.lower()
    opens = _OPENS_DENIED.match(lower)
    if opens is not None and not _own_denial(opens.group(), lower, options[letter]):
        return True
    if _DENIED.search(lower) or _names_letter(letter, said, options):
        return True
    turn = _TURN.search(lower)
    return turn is not None and _OTHER in lower[turn.end() :]


def _own_denial(denial: str, said: str, own: str) -> bool:
    """Whether a denial is the beginning of the letter's own text, in other words than its own:
    "No abnormalities seen" for "No abnormality"."""
    text = _plain(own).casefold()
    if not text.startswith(denial):
        return False
    heads = {word[:5] for word in re.findall(r"\w{4,}", text[len(denial) :])}
    return any(word[:5] in heads for word in re.findall(r"\w{4,}", said[len(denial) :]))


def _names_letter(letter: str, said: str, options: Mapping[str, str]) -> bool:
    """Whether another option's letter stands in the text as a word; "a" and "I" only as a subject or
    after a turn."""
    turn = _TURN.search(said)
    for match in _CAPITAL.finditer(said):
        found = match.group(1)
        if found == letter or found not in options:
            continue
        if _BEFORE_A_NAME.search(said, max(0, match.start() - 12), match.start()):
            continue
        if found not in "AI" or (turn and match.start() > turn.end() and found == "A"):
            return True
    subjects = (
        match.group(1).upper()
        for match in _SUBJECT.finditer(said)
        if not _BEFORE_A_NAME.search(said, max(0, match.start() - 12), match.start())
    )
    return any(found != letter and found in options for found in subjects)
