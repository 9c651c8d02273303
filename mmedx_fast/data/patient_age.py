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
_YEARS_PER = {"y": 1.0, "m": 1 / 12, "w": 7 / 365.25, "d": 1 / 365.25, "h": 1 / 8766}
_UNIT = r"(?P<u{0}>years?|yrs?|y|months?|mos?|weeks?|wks?|days?|hours?|hrs?)"

# "old" is what tells an age from "2-year history" and "4 years ago".
_AGE = re.compile(
    "|".join(
        (
            (_NUMBER + r"[-\s]*" + _UNIT + r"\.?[-\s]*(?:old\b|o\b(?!['’]))").format(1),
            (_NUMBER + r"[-\s]*y(?:/|\.\s?)o\b\.?").format(2),
            (r"\baged:?\s+" + _NUMBER + rf"(?:[-\s]*{_UNIT}\b)?").format(3),
        )
    ),
    re.IGNORECASE,
)
# In every spelling above; saves the slow search in texts without an age.
_CUE = re.compile(r"old|aged|(?:\b|\d)y[-\s./]*o\b", re.IGNORECASE)
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
    if not _CUE.search(text):
        return None
    lower = text.lower()
    brought = (
        {match.end() for match in _BROUGHT_CHILD.finditer(text)}
        if "bring" in lower or "brought" in lower
        else set()
    )
    first: float | None = None
    for match in _AGE.finditer(text):
        if _NOT_A_PERSON.match(text, match.end()) or _PARENT.match(text, match.end()):
            continue
        years = _years(match)
        if years > 120:
            continue
        if match.start() in brought:
            return years
        if first is None:
            first = years
        if not brought:
            break
    return first


def _years(match: re.Match[str]) -> float:
    groups = match.groupdict()
    number = next(groups[f"n{i}"] for i in (1, 2, 3) if groups[f"n{i}"])
    unit = (groups["u1"] or groups["u3"] or "y")[0].lower()
    if number[0].isdigit():
        return float(number) * _YEARS_PER[unit]
    return sum(_WORDS[part] for part in re.split(r"[-\s]+", number.lower())) * _YEARS_PER[unit]
