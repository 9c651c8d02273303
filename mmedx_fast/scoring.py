"""Answer extraction and the two scorers: ``strict`` (reward, headline) and MedEvalKit-compatible.

``strict`` never guesses: a completion whose answer cannot be read counts as unparsed, hence wrong.
``medevalkit_score`` follows the published behaviour of MedEvalKit's judges, including the fallback
to the most similar option, so that numbers can be put beside other papers'. It must never be a
reward: the fallback pays for noise and even for the empty string.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Mapping

from mmedx_fast.scoring_denials import takes_back

_FORMAT = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_ANSWER_LINE = re.compile(r"answer(?:\s+is\b\s*:?|[\s*]*:)[ \t]*", re.IGNORECASE)
_BRACE = re.compile(r"\\boxed\s*\{|[{}]")
_WRAPPER = re.compile(r"\\(?:text|mathrm|textbf|mathbf|boxed)\s*\{|[{}]")
_LETTER_ALONE = re.compile(r"[\s*_(\[\"']*([A-Za-z])[\s*_)\]\"'.:,]*", re.DOTALL)
_LETTER_REST = re.compile(r"[\s*_(\[\"']*([A-Za-z])[*_]*[)\].:,]+[*_]*\s*(\S.*)", re.DOTALL)
_HEDGE = re.compile(
    r"(?:or|and|/|,|&)\s*[*_(\[]*[A-Za-z](?![A-Za-z])|[*_(\[]*[A-Za-z](?:[)\].:,*_]|$)",
    re.IGNORECASE,
)
_MARKED = re.compile(r"(?<![A-Za-z0-9'])([A-Z])(?:[)\].:*_]|\s*$)")
_STRIP = " \t\n.,;:!?\"'`*_\u3002\uff0c\uff1a"  # not + and -: "HER2+" and "HER2-" are two options
_TAIL = re.compile(r"[)\]\s.,;:!?\"'*_]*(?:\s-)?\s*")
_BRACKETED = re.compile(r"\(([^()]*)\)|\[([^\[\]]*)\]")
_MEDEVALKIT_MARKERS = (
    "**answer**:", "**answer**", "*answer*:", "**answer:**", "answer is", "answer:",
    "\u7b54\u6848:", "final answer", "final answer is",
)  # fmt: skip


def normalise(text: str) -> str:
    """One case and Unicode form, single blanks, no stops, quotes or brackets around the whole."""
    folded = " ".join(_fold(_fold(text)).split()).strip(_STRIP)  # once is not always the end of it
    wrapped = _BRACKETED.fullmatch(folded)
    return normalise(wrapped.group(1) or wrapped.group(2) or "") if wrapped else folded


def _fold(text: str) -> str:
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def format_ok(text: str) -> bool:
    """Whether all of it is ``<think>..</think><answer>..</answer>``, each tag once, none empty."""
    if any(text.count(tag) != 1 for tag in _TAGS):
        return False
    match = _FORMAT.fullmatch(text)
    return match is not None and all(part.strip() for part in match.groups())


def think_text(text: str) -> str:
    """The reasoning: inside the first ``<think>``, else what precedes ``<answer>``, else the whole
    text.

    An unclosed ``<think>`` (a completion cut by its length limit) runs to ``<answer>`` or the end.
    """
    head, opened, tail = text.partition("<think>")
    body = tail if opened else head
    for end in ("</think>", "<answer>"):
        body = body.partition(end)[0]
    return body.strip()


def last_boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{...}`` whose braces balance, or None."""
    opened: list[tuple[int, bool]] = []
    last: tuple[int, int] | None = None
    for match in _BRACE.finditer(text):  # one pass: a degenerate text may hold thousands
        if match.group() != "}":
            opened.append((match.end(), len(match.group()) > 1))
        elif opened:
            start, boxed = opened.pop()
            if boxed and (last is None or start > last[0]):
                last = (start, match.start())
    return None if last is None else text[last[0] : last[1]]


def _unwrap(span: str) -> str:
    boxed = last_boxed(span)
    span = span if boxed is None else boxed
    opened: list[re.Match[str]] = []
    cuts: list[tuple[int, int]] = []  # in one pass: wrappers may be nested thousands deep
    for match in _WRAPPER.finditer(span):
        if match.group() != "}":
            opened.append(match)
        elif opened and len((start := opened.pop()).group()) > 1:
            cuts += [start.span(), match.span()]
    kept, done = [], 0
    for begin, end in sorted(cuts):
        kept.append(span[done:begin])
        done = end
    return "".join([*kept, span[done:]]).strip().strip("$").strip()


def answer_span(text: str) -> str | None:
    r"""The text that states the answer, before it is matched with the options; None if there is
    none.

    In this order: the last closed ``<answer>`` block, the last balanced ``\boxed{}``, the last
    "answer is ..." or "answer: ..." line. The last two are looked for outside the thought alone:
    after the last ``</think>`` if there is one, and before a ``<think>`` that is never closed.
    """
    start = text.rfind("<answer>", 0, max(0, text.rfind("</answer>")))
    if start != -1:
        return _unwrap(text[start + len("<answer>") : text.find("</answer>", start)])
    if "</think>" in text:
        text = text.rpartition("</think>")[2]
    text = text.partition("<think>")[0]
    boxed = last_boxed(text)
    if boxed is not None:
        return _unwrap(boxed)
    cues = [match.end() for match in _ANSWER_LINE.finditer(text)]
    return _unwrap(text[cues[-1] :].partition("\n")[0]) if cues else None


def match_option(span: str, options: Mapping[str, str]) -> str | None:
    """The option letter a span states, or None if it states none or is ambiguous.

    A lone letter in range (brackets, stars and a stop allowed), else the exact normalised text of
    just one option, else a letter with its mark followed by more ("B. Pericarditis"); the article
    of "A patient ..." is no letter, a second letter or another option's text after the first is a
    hedge, and a letter that the text after it takes back ("B) is wrong", "B. The kidney") states nothing.
    """
    letters = {letter.upper(): letter for letter in options}
    alone = _LETTER_ALONE.fullmatch(span)
    if alone is not None:
        return letters.get(alone.group(1).upper())
    wanted = normalise(span)
    same = [letter for letter, text in options.items() if normalise(text) == wanted]
    if wanted and same:
        return same[0] if len(same) == 1 else None
    marked = _LETTER_REST.fullmatch(span)
    if marked is not None and marked.group(1).upper() in letters:
        letter = letters[marked.group(1).upper()]
        return letter if _stands(letter, marked.group(2), wanted, options) else None
    head, _, rest = span.strip(_STRIP).partition(" ")
    if head in letters and normalise(rest) == normalise(options[letters[head]]):
        return letters[head]
    return None


def _stands(letter: str, rest: str, span: str, options: Mapping[str, str]) -> bool:
    """Whether the marked ``letter`` is what a span states, given the text after it.

    Not if that text denies it, hedges, or is another option's; nor if the "letter" begins another
    option's name or shortens it ("E. coli", "A. fumigatus").
    """
    stated = normalise(rest)
    mine = normalise(options[letter])
    if mine and stated.startswith(mine) and _TAIL.fullmatch(stated, len(mine)):
        return True
    if _HEDGE.match(rest) or takes_back(letter, rest, options):
        return False
    if any(m.group(1) in options and m.group(1) != letter for m in _MARKED.finditer(rest)):
        return False
    words = set(re.findall(r"\w+", stated))
    own = words & set(re.findall(r"\w+", mine))
    for key, text in options.items():
        other = normalise(text)
        if key != letter and other and (stated == other or _begins(span, other)):
            return False
        if key != letter and words and not own and words <= set(re.findall(r"\w+", other)):
            return False
    return True


def _begins(text: str, start: str) -> bool:
    return text.startswith(start) and not text[len(start) : len(start) + 1].isalnum()


def extract_answer(text: str, options: Mapping[str, str] | None) -> str | None:
    """The option letter that a completion answers, or None (unparsed).

    Without ``options`` (open and yes/no questions) the normalised answer text, or None.
    """
    span = answer_span(text)
    if span is None:
        return None
    if options is None:
        return normalise(span) or None
    return match_option(span, options)


def gold_letter(options: Mapping[str, str], answer: str) -> str:
    """The letter of the gold ``answer``, itself a letter or an option's text; else ValueError."""
    letter = answer.strip() if answer.strip() in options else match_option(answer, options)
    if letter is None:
        raise ValueError(
            f"answer {answer!r} is neither a letter nor the text of exactly one of the options "
            f"{dict(options)!r}; correct the row's answer or options"
        )
    return letter


def strict_score(text: str, options: Mapping[str, str] | None, answer: str) -> float:
    """1.0 if the answer read from the completion is the gold one, else 0.0 (also when unparsed).

    ``answer`` is the gold letter or option text, or, without ``options``, the gold text (compared
    after :func:`normalise`).
    """
    predicted = extract_answer(text, options)
    gold = normalise(answer) if options is None else gold_letter(options, answer)
    return float(predicted is not None and predicted == gold)


def _tag_content(text: str) -> str:
    blocks = []
    for piece in text.split("</answer>")[:-1]:  # splitting is linear where a lazy regex is not
        _, opened, content = piece.partition("<answer>")
        if opened:
            blocks.append(content)
    return " ".join(blocks) if blocks else text


def _medevalkit_parse(response: str) -> str:
    if "boxed" in response:
        boxed = last_boxed(response)
        response = "None" if boxed is None else boxed  # the word, as MedEvalKit's parser returns
    elif "<answer>" in response:
        response = _tag_content(response)
    for marker in _MEDEVALKIT_MARKERS:
        response = response.rpartition(marker)[2]
    return response


def medevalkit_score(
    text: str,
    options: Mapping[str, str] | None,
    answer: str,
    *,
    answer_tag: bool = True,
    raw_gold: bool = False,
) -> float:
    """1.0 or 0.0 as MedEvalKit's rule-based judges would say (no LLM judge).

    ``answer_tag`` takes the ``<answer>`` contents first, as its MedXpertQA and OmniMedVQA tasks do
    (PMC-VQA does not). ``raw_gold`` takes the yes/no rule for a gold "yes" or "no" alone, as its SLAKE
    task does: "Yes" is matched as a whole there. Options are compared in the form "B. text". Without
    ``options`` the yes/no, closed and open rules apply to a text answer. MedEvalKit has no unparsed
    state: what it cannot read becomes the most similar option, the first one on a tie.
    """
    if options is None:
        return _medevalkit_text(text, answer, raw_gold)
    if answer_tag:
        text = _tag_content(text)
    letters = [letter.lower() for letter in options]
    strings = [f"{letter}. {option}".lower() for letter, option in options.items()]
    gold = gold_letter(options, answer).lower()
    response = text.lower()
    paragraphs = response.split("\n\n")
    if paragraphs[0] in letters:
        response = paragraphs[0]
    elif paragraphs[-1].partition(".")[0] in letters:
        response = paragraphs[-1].partition(".")[0]
    response = _medevalkit_parse(response).strip().lower().replace("\n", "")
    short = response.partition(".")[0].rpartition(":")[2]
    if short in letters or short in strings:
        index = letters.index(short) if short in letters else strings.index(short)
    else:
        ratios = [difflib.SequenceMatcher(None, option, response).ratio() for option in strings]
        index = ratios.index(max(ratios))
    return float(letters[index] == gold)


def _medevalkit_text(text: str, answer: str, raw_gold: bool) -> float:
    boxed = last_boxed(text)
    response = (_tag_content(text) if boxed is None else boxed).lower()
    gold = answer.strip().lower()
    if (answer if raw_gold else gold) in ("yes", "no"):  # a substring rule: "nodule" holds a "no"
        other = "no" if gold == "yes" else "yes"
        return float(gold in response and other not in response)
    return float(
        response.replace("\n", "").replace(".", "").strip() == gold.replace(".", "").strip()
    )
