"""Routing questions to the four specialties by the ordered rules of ``specialties.yaml``."""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib.resources
import re
from collections.abc import Callable, Iterable, Set
from typing import Any

import yaml

from mmedx_fast.data.patient_age import patient_age
from mmedx_fast.data.records import SPECIALTIES, Record


def assign_specialty(record: Record) -> tuple[str, str]:
    """The specialty of a record and the name of the rule that decided.

    A specialty that the record already has stays (rule "column"). Otherwise the rules of its data
    set apply, those of
    ``default`` for one that has none of its own. Only the stem and ``meta`` are read, never options
    or answer.
    """
    if record.specialty is not None:
        return record.specialty, "column"
    rules = load_rules()
    case = _Case(record)
    for rule in rules.get(record.dataset, rules["default"]):
        specialty = rule.decide(case)
        if specialty is not None:
            return specialty, rule.name
    raise AssertionError(
        "every rule list ends with a rule that always applies"
    )  # load_rules saw to it


def count_specialties(records: Iterable[Record]) -> dict[str, int]:
    """Number of records per specialty, in the fixed order, zeros kept."""
    counts = collections.Counter(assign_specialty(record)[0] for record in records)
    return {specialty: counts[specialty] for specialty in SPECIALTIES}


@functools.lru_cache(maxsize=1)
def load_rules() -> dict[str, list[Rule]]:
    """The rules of ``specialties.yaml`` by data set name."""
    file = importlib.resources.files("mmedx_fast.data") / "specialties.yaml"
    return parse_rules(yaml.safe_load(file.read_text(encoding="utf-8")))


def parse_rules(document: dict[str, Any]) -> dict[str, list[Rule]]:
    """Compile a rules document; raises ``ValueError`` naming the data set, rule and value that are
    wrong.
    """
    vocabulary = _Vocabulary()
    rules = {
        name: [_compile(name, raw, vocabulary) for raw in entries]
        for name, entries in document["datasets"].items()
    }
    for name, entries in rules.items():
        if not entries or not entries[-1].always:
            raise ValueError(f"specialty rules of {name!r} must end with a rule without condition")
    if "default" not in rules:
        raise ValueError("specialty rules need a data set named 'default'")
    return rules


_REMEMBERED_WORDS = 1 << 17
_LONGEST_WORD = 32
_NOTHING: frozenset[int] = frozenset()
_WORD = re.compile(r"\w+")
Decision = Callable[["_Case"], "str | None"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """One compiled rule; ``decide`` gives a specialty, or ``None`` when the rule does not apply."""

    name: str
    decide: Decision
    always: bool = False


class _Case:
    """A record with what several rules need, worked out once."""

    __slots__ = ("_age", "_entries", "_meta", "_text")
    _age: float | None
    _entries: Set[int]

    def __init__(self, record: Record) -> None:
        self._text = record.question
        self._meta = record.meta

    @property
    def age(self) -> float | None:
        try:
            return self._age
        except AttributeError:
            self._age = patient_age(self._text)
            return self._age

    def entries(self, vocabulary: _Vocabulary) -> Set[int]:
        """The entries that the text holds; all rules of a case share one vocabulary."""
        try:
            return self._entries
        except AttributeError:
            self._entries = vocabulary.entries(self._text.lower())
            return self._entries

    def field(self, name: str) -> str:
        for key, value in self._meta.items():
            if key.lower() == name:
                return "" if value is None else str(value).strip().lower()
        return ""


class _Vocabulary:
    """The entries of all word rules, numbered. Texts share most of their words, so each word is matched
    once and not once a text, nor once a rule; most match nothing.
    """

    def __init__(self) -> None:
        self._patterns: list[str] = []
        self._phrases: dict[str, list[tuple[int, str]]] = {}
        self._hits: dict[str, frozenset[int]] = {}
        self._dull: set[str] = set()
        self._known: dict[tuple[str, ...], frozenset[int]] = {}

    def add(self, names: list[str]) -> frozenset[int]:
        """Numbers of the entries of a rule; a rule that several data sets share is taken once."""
        key = tuple(names)
        if key not in self._known:
            first = len(self._patterns)
            for name in names:
                self._add_entry(name)
            self._known[key] = frozenset(range(first, len(self._patterns)))
        return self._known[key]

    def _add_entry(self, name: str) -> None:
        spellings = [spelling.strip().lower() for spelling in name.split("|")]
        for spelling in spellings:
            if " " in spelling:
                phrase = f" {spelling} ".replace("* ", "")
                # The word with which it begins says when to look for the phrase.
                self._phrases.setdefault(phrase.split()[0], []).append(
                    (len(self._patterns), phrase)
                )
        self._patterns.append("|".join(re.escape(s).replace(r"\*", r"\w*") for s in spellings))

    @functools.cached_property
    def _compiled(self) -> tuple[re.Pattern[str], list[re.Pattern[str]]]:
        """One pattern of all entries, which tells that a word is none, and one for each."""
        return re.compile("|".join(self._patterns)), [re.compile(p) for p in self._patterns]

    def entries(self, lower: str) -> Set[int]:
        """Numbers of the entries that a text in lower case holds."""
        found: set[int] = set()
        phrases: list[tuple[int, str]] = []
        for token in {*lower.split()} - self._dull:
            dull = True
            for word in _WORD.findall(token):
                hits = self._entries_of(word)
                found |= hits
                if word in self._phrases:
                    phrases += self._phrases[word]
                dull = dull and not hits and word not in self._phrases
            if dull and len(token) <= _LONGEST_WORD and len(self._dull) < _REMEMBERED_WORDS:
                self._dull.add(token)
        if phrases:
            spaced = f" {' '.join(_WORD.findall(lower))} "
            found.update(entry for entry, phrase in phrases if phrase in spaced)
        return found

    def _entries_of(self, word: str) -> frozenset[int]:
        known = self._hits.get(word)
        if known is not None:
            return known
        anything, patterns = self._compiled
        if not anything.fullmatch(word):
            return _NOTHING
        hits = frozenset(i for i, pattern in enumerate(patterns) if pattern.fullmatch(word))
        if len(word) <= _LONGEST_WORD and len(self._hits) < _REMEMBERED_WORDS:
            self._hits[word] = hits
        return hits


def _compile(dataset: str, raw: dict[str, Any], vocabulary: _Vocabulary) -> Rule:
    raw = dict(raw)
    name = raw.pop("name")
    specialty = raw.pop("specialty", None)
    kinds = [kind for kind in _KINDS if kind in raw]
    targets = [specialty] if "field" not in raw else [*_map(raw).values()]
    for target in targets:
        if target not in SPECIALTIES:
            raise ValueError(
                f"specialty rule {dataset}.{name}: {target!r} is not one of "
                f"{', '.join(SPECIALTIES)}"
            )
    if not kinds and not raw:
        return Rule(name, lambda case: specialty, always=True)
    if len(kinds) != 1:
        raise ValueError(f"specialty rule {dataset}.{name}: unknown condition {sorted(raw)}")
    return Rule(name, _KINDS[kinds[0]](raw, specialty, vocabulary))


def _map(raw: dict[str, Any]) -> dict[str, str]:
    return {**raw.get("values", {}), **raw.get("prefixes", {})}


def _age_below(raw: dict[str, Any], specialty: str, vocabulary: _Vocabulary) -> Decision:
    bound = float(raw["age_below"])
    return lambda case: specialty if case.age is not None and case.age < bound else None


def _words_without_age(raw: dict[str, Any], specialty: str, vocabulary: _Vocabulary) -> Decision:
    holds = _holds(raw["words_without_age"], 1, vocabulary)
    return lambda case: specialty if holds(case) and case.age is None else None


def _words(raw: dict[str, Any], specialty: str, vocabulary: _Vocabulary) -> Decision:
    holds = _holds(raw["words"], int(raw.get("at_least", 1)), vocabulary)
    return lambda case: specialty if holds(case) else None


def _holds(names: list[str], needed: int, vocabulary: _Vocabulary) -> Callable[[_Case], bool]:
    """A test whether a text holds at least so many different entries."""
    own = vocabulary.add(names)

    def holds(case: _Case) -> bool:
        found = case.entries(vocabulary)
        return len(found & own) >= needed if found else needed <= 0

    return holds


def _by_field(raw: dict[str, Any], specialty: str | None, vocabulary: _Vocabulary) -> Decision:
    field, values = str(raw["field"]).lower(), raw.get("values", {})
    # A prefix ends where a word ends: "ear" is not the start of "early".
    prefixes = [
        (re.compile(rf"{re.escape(p)}(?![a-z])"), s) for p, s in raw.get("prefixes", {}).items()
    ]

    def decide(case: _Case) -> str | None:
        value = case.field(field)
        if value in values:
            return values[value]
        return next((target for prefix, target in prefixes if prefix.match(value)), None)

    return decide


_KINDS: dict[str, Callable[[dict[str, Any], Any, _Vocabulary], Decision]] = {
    "age_below": _age_below,
    "words_without_age": _words_without_age,
    "words": _words,
    "field": _by_field,
}
