"""Routing questions to the four specialties by the ordered rules of ``specialties.yaml``."""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib.resources
import re
from collections.abc import Callable, Iterable
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
    rules = {
        name: [_compile(name, raw) for raw in entries]
        for name, entries in document["datasets"].items()
    }
    for name, entries in rules.items():
        if not entries or not entries[-1].always:
            raise ValueError(f"specialty rules of {name!r} must end with a rule without condition")
    if "default" not in rules:
        raise ValueError("specialty rules need a data set named 'default'")
    return rules


_REMEMBERED_WORDS = 1 << 17
_WORD = re.compile(r"\w+")


@dataclasses.dataclass(frozen=True)
class Rule:
    """One compiled rule; ``decide`` gives a specialty, or ``None`` when the rule does not apply."""

    name: str
    decide: Callable[[_Case], str | None]
    always: bool = False


class _Case:
    """A record with what several rules need, worked out once."""

    def __init__(self, record: Record) -> None:
        self._text = record.question
        self._meta = record.meta

    @functools.cached_property
    def age(self) -> float | None:
        return patient_age(self._text)

    @functools.cached_property
    def spaced(self) -> str:
        """The words in lower case with one blank before, between and after them."""
        return f" {' '.join(re.findall(_WORD, self._text.lower()))} "

    @functools.cached_property
    def words(self) -> frozenset[str]:
        return frozenset(self.spaced.split())

    def field(self, name: str) -> str:
        value = next((v for k, v in self._meta.items() if k.lower() == name), None)
        return "" if value is None else str(value).strip().lower()


def _compile(dataset: str, raw: dict[str, Any]) -> Rule:
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
    return Rule(name, _KINDS[kinds[0]](raw, specialty))


def _map(raw: dict[str, Any]) -> dict[str, str]:
    return {**raw.get("values", {}), **raw.get("prefixes", {})}


def _age_below(raw: dict[str, Any], specialty: str) -> Callable[[_Case], str | None]:
    bound = float(raw["age_below"])
    return lambda case: specialty if case.age is not None and case.age < bound else None


def _words_without_age(raw: dict[str, Any], specialty: str) -> Callable[[_Case], str | None]:
    count = _counter(raw["words_without_age"])
    return lambda case: specialty if case.age is None and count(case, 1) else None


def _words(raw: dict[str, Any], specialty: str) -> Callable[[_Case], str | None]:
    count, needed = _counter(raw["words"]), int(raw.get("at_least", 1))
    return lambda case: specialty if count(case, needed) else None


def _by_field(raw: dict[str, Any], specialty: str | None) -> Callable[[_Case], str | None]:
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


_KINDS: dict[str, Callable[[dict[str, Any], Any], Callable[[_Case], str | None]]] = {
    "age_below": _age_below,
    "words_without_age": _words_without_age,
    "words": _words,
    "field": _by_field,
}


def _counter(names: list[str]) -> Callable[[_Case, int], bool]:
    """A test whether a text holds at least so many different entries."""
    spellings = [(i, w.strip().lower()) for i, e in enumerate(names) for w in e.split("|")]
    phrases = [(i, f" {w} ".replace("* ", "")) for i, w in spellings if " " in w]
    patterns = [
        re.compile("|".join(re.escape(w).replace(r"\*", r"\w*") for j, w in spellings if j == i))
        for i in range(len(names))
    ]

    # Texts share most of their words, so each word is matched once and not once a text; most match
    # nothing, which one pattern of all entries tells.
    any_entry = re.compile("|".join(pattern.pattern for pattern in patterns))
    hits: dict[str, frozenset[int]] = {}
    misses: set[str] = set()

    def holds(case: _Case, needed: int) -> bool:
        found: set[int] = set()
        for word in case.words - misses:
            if word in hits:
                found |= hits[word]
            elif any_entry.fullmatch(word):
                hits[word] = frozenset(i for i, p in enumerate(patterns) if p.fullmatch(word))
                found |= hits[word]
            elif len(misses) < _REMEMBERED_WORDS:
                misses.add(word)
        if len(found) < needed:
            spaced = case.spaced
            for i, phrase in phrases:
                if phrase in spaced:
                    found.add(i)
        return len(found) >= needed

    return holds
