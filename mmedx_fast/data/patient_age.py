"""The patient's age as a question states it."""

from __future__ import annotations

import re

_ONES = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_WORDS = {word: value for value, word in enumerate(_ONES, 1)} | {
    word: 10 * value for value, word in enumerate(_TENS, 2)
}
_SPELLED = rf"(?:(?:{'|'.join(_TENS)})(?:[-\s](?:{'|'.join(_ONES[:9])}))?|{'|'.join(_ONES)})"
_NUMBER = rf"(?<![\w.])(?P<n{{0}}>\d{{{{1,3}}}}(?:\.\d+)?|{_SPELLED})"
_NUMBER_WORDS = tuple(_WORDS)
# Letters that a pattern takes for i and s where case is ignored.
_LATIN = str.maketrans("\u0130\u0131\u017f", "iis")
_YEARS_PER = {"y": 1.0, "m": 1 / 12, "w": 7 / 365.25, "d": 1 / 365.25, "h": 1 / 8766}
_UNIT = r"(?P<u{0}>years?|yrs?|y|months?|mos?|weeks?|wks?|days?|hours?|hrs?)"

_PERSON = r"\b(?:boy|girl|man|woman|male|female|infant|child|patient|gentleman|lady)"

# "old" is what tells an age from "2-year history" and "4 years ago".
_AGE = re.compile(
    "|".join(
        (
            (_NUMBER + r"[-\s]*" + _UNIT + r"\.?[-\s]*(?:old\b|o\b(?!['’]))").format(1),
            (_NUMBER + r"[-\s]*y(?:/|\.\s?)o\b\.?").format(2),
            (r"\baged:?\s+" + _NUMBER + rf"(?:[-\s]*{_UNIT}\b)?").format(3),
            (r"\bage ?[:=]\s*" + _NUMBER + rf"(?:[-\s]*{_UNIT}\b)?").format(4),
            (_NUMBER + r"[-\s]*" + _UNIT + r"\s+of age\b").format(5),
            (_PERSON + r", (?P<n{0}>[0-9]{{1,3}})\s*" + _UNIT + r"\b(?=\s*(?:[,.;)]|$))").format(6),
        )
    ),
    re.IGNORECASE,
)
# "since 5 years of age" and "over 40 years of age" tell of another time or of others.
_NOT_NOW = re.compile(
    r"\b(?:at|by|since|until|from|before|after|over|under|above|below|than|between|to)\s+$",
    re.IGNORECASE,
)
# What stands before the months of "12-year-and-3-month-old".
_AND_YEARS = re.compile(
    r"(?<![\w.])([0-9]{1,3})[-\s]*(?:years?|yrs?|y)[-,\s]*(?:and[-\s]*)?$", re.IGNORECASE
)
# The same for numbers in digits alone, in ASCII and lower case. It begins with the digit and not with what
# must not stand before it, so that the search skips from digit to digit.
_DIGITS = r"(?P<n{0}>[0-9](?<![\w.].)[0-9]{{0,2}}(?:\.[0-9]+)?)"
_DIGIT_AGE = re.compile(
    (_DIGITS + r"[-\s]*" + _UNIT + r"\.?[-\s]*(?:old\b|o\b(?!'))").format(1)
    + "|"
    + (_DIGITS + r"[-\s]*y(?:/|\.\s?)o\b\.?").format(2)
)
# How every age ends that is not introduced by "aged".
_UNIT_O = re.compile(_UNIT.format(1) + r"[-\s./]*o")
_BLANKS = "- \t\n\r\f\v\x1c\x1d\x1e\x1f"
_WINDOW_CHARS = 64
_Y_O = re.compile(r"y[-\s./]*o\b")
# In every spelling above; saves the slow search in texts without an age.
_CUE = re.compile(r"old|aged|(?:\b|\d)y[-\s./]*o\b|of age|age ?[:=]|, [0-9]", re.IGNORECASE)
_OTHER_CUES = ("aged", "of age", "age:", "age :", "age=", "age =")
_COMMA_NUMBER = re.compile(r", [0-9]")
# What else has an age: a "3-week-old fracture" says nothing about its owner.
_NOT_A_PERSON = re.compile(
    r"[\s-]*(?:(?:surgical|open|closed|heal\w+|untreated|left|right)[\s-]+)*(?:wound|fracture|injur\w+|scar|lesion|radiograph|image|film|x-ray|scan|graft|implant|"
    r"prosthesis|rash|burn|ulcer|infarct\w*|h(?:a)?ematoma|thromb\w+|bruise|pregnancy|fetus|device|catheter)\b",
    re.IGNORECASE,
)
_PARENT = re.compile(
    r"[\s-]*(?:mother|father|parents?|grandmother|grandfather|caregiver)\b", re.IGNORECASE
)
_BROUGHT_CHILD = re.compile(
    r"\b(?:brings?|bringing|brought)(?:\s+in)?\s+(?:her|his|their)\s+", re.IGNORECASE
)


def patient_age(text: str) -> float | None:
    """Age in years of the patient in a case description, or ``None`` when none is stated.

    The first stated age counts, except that of a thing ("a 3-week-old fracture") or a parent, and
    except that a child whom somebody brings comes before the one who brings it. Durations ("2-year
    history", "4 years ago", "20 weeks' gestation") are no ages.
    """
    lower = text.lower()
    if not _has_cue(text, lower):
        return None
    brought = (
        {match.end() for match in _BROUGHT_CHILD.finditer(text)}
        if "bring" in lower or "brought" in lower
        else set()
    )
    first: float | None = None
    digits_only = text.isascii() and not _other_cue(lower) and not _spelled(lower)
    for match in _DIGIT_AGE.finditer(lower) if digits_only else _AGE.finditer(text):
        if _NOT_A_PERSON.match(text, match.end()) or _PARENT.match(text, match.end()):
            continue
        start, years = _years(match)
        if years > 120 or _of_another_time(match):
            continue
        if start in brought:
            return years
        if first is None:
            first = years
        if not brought:
            break
    return first


def _has_cue(text: str, lower: str) -> bool:
    """``_CUE.search(text)``; looks for plain text first, which is ten times as fast."""
    if text.isascii():
        if "old" in lower or _other_cue(lower):
            return True
        if not _Y_O.search(lower):
            return False
    return _CUE.search(text) is not None


def _other_cue(lower: str) -> bool:
    """Whether an age may be given other than by what follows its number."""
    return any(cue in lower for cue in _OTHER_CUES) or bool(_COMMA_NUMBER.search(lower))


def _spelled(lower: str) -> bool:
    """Whether an age may be given in words; looks from the unit back, as numbers and what begins like one
    are everywhere.
    """
    for unit in _UNIT_O.finditer(lower):
        before = lower[max(0, unit.start() - _WINDOW_CHARS) : unit.start()].rstrip(_BLANKS)
        if before.endswith(_NUMBER_WORDS) or (not before and unit.start() >= _WINDOW_CHARS):
            return True
    return False


def _years(match: re.Match[str]) -> tuple[int, float]:
    """Where an age begins, and the years; "12-year-and-3-month-old" is 12.25."""
    groups = {key: text for key, text in match.groupdict().items() if text}
    place = next(key[1:] for key in groups if key.startswith("n"))
    number, unit = groups["n" + place], groups.get("u" + place, "y")[0].lower()
    if not number[0].isdigit():
        spelled = number.translate(_LATIN).lower()
        return match.start(), _YEARS_PER[unit] * sum(
            _WORDS[part] for part in re.split(r"[-\s]+", spelled)
        )
    years = float(number) * _YEARS_PER[unit]
    if unit != "y" and (more := _AND_YEARS.search(_before(match))):
        return match.start() - len(more[0]), years + float(more[1])
    return match.start(), years


def _of_another_time(match: re.Match[str]) -> bool:
    return bool(match.groupdict().get("n5") and _NOT_NOW.search(_before(match)))


def _before(match: re.Match[str]) -> str:
    return match.string[max(0, match.start() - _WINDOW_CHARS) : match.start()]
