"""Valid rows changed at random, for the row parser of any loader."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from mmedx_fast.data.image_finder import ImageFinder
from mmedx_fast.data.records import Record
from mmedx_fast.data.rows import Loader, RowContext, RowError

JUNK: tuple[Any, ...] = (
    None, "", " ", "\xa0", "\u200a", "nan", "N/A", "None", "null", "A", "b", "Z", "AB", "E", "'", '"',
    "A:", "B: x", "(C) y", "A) x, B) y", "yes", "No", "<image>", "<answer> C </answer>", "</think>", "[]", "{}",
    "['a', 'b']", '{"A": "x"}', "[", "../../etc/passwd", "/", "a\x00b", "x" * 5000, "\ud800", "是", "\r\n", "\t",
    0, 1, -1, 3.5, 1e308, math.inf, math.nan, 10**40, True, False, b"A", b"\xff\x00", [], [None], ["A"], ["x", "x"],
    [[]], {}, {"A": "x"}, {"A": None, "B": "y"}, {1: 2}, [{"letter": "A", "content": "x"}], [{"image_path": 3}],
    [{"from": "human", "value": "q"}], {"bytes": b"", "path": None}, (), object,
)  # fmt: skip
"""Values that occur in damaged or foreign data sets."""

_LETTERS = "ABCDEFabz019 .:,()'\"\\\n\t\xa0\u00e9"


def mutate(row: Mapping[str, Any], rng: random.Random) -> dict[str, Any]:
    """A copy of a row, changed in one to three places; the row itself stays as it is."""
    changed = copy.copy(dict(row))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        rng.choice((_replace, _replace, _replace, _remove, _swap, _edit, _edit, _rename))(
            changed, rng
        )
    return changed


def _replace(row: dict[str, Any], rng: random.Random) -> None:
    if row:
        row[rng.choice(list(row))] = copy.copy(rng.choice(JUNK))


def _remove(row: dict[str, Any], rng: random.Random) -> None:
    if row:
        del row[rng.choice(list(row))]


def _swap(row: dict[str, Any], rng: random.Random) -> None:
    if row:
        one, two = rng.choice(list(row)), rng.choice(list(row))
        row[one], row[two] = row[two], row[one]


def _edit(row: dict[str, Any], rng: random.Random) -> None:
    """Change a character of one text, or one item of a list or an object."""
    if not row:
        return
    name = rng.choice(list(row))
    value = row[name]
    if isinstance(value, str) and value:
        at = rng.randrange(len(value))
        row[name] = (
            value[:at] + rng.choice(("", rng.choice(_LETTERS))) + value[at + rng.randrange(2) :]
        )
    elif isinstance(value, list) and value:
        items = list(value)
        items[rng.randrange(len(items))] = rng.choice(JUNK)
        row[name] = items
    elif isinstance(value, dict) and value:
        inner = dict(value)
        _replace(inner, rng) if rng.random() < 0.6 else _edit(inner, rng)
        row[name] = inner


def _rename(row: dict[str, Any], rng: random.Random) -> None:
    if row:
        name = rng.choice(list(row))
        value = row.pop(name)
        row[rng.choice((name.upper(), name.lower(), f" {name} ", name + "s"))] = value


class MemoryFile:
    """What readers need of a ``Path``, without a disk: 10,000 files are quick."""

    def __init__(self, content: bytes, name: str = "memory.file") -> None:
        self.content = content
        self.name = name

    def open(self, mode: str = "rb") -> io.BytesIO:
        assert mode == "rb"
        return io.BytesIO(self.content)

    def __str__(self) -> str:
        return self.name


def context_for(file: Path, loader: Loader, **changes: Any) -> RowContext:
    """What ``load_records`` would give the loader for a file, images unchecked."""
    images = ImageFinder(file, check=False, levels=loader.image_levels)
    context = RowContext("test", False, images, file, files=(file,), options=loader.chosen({}))
    return dataclasses.replace(context, **changes)


def fuzz_parser(
    loader: Loader,
    rows: Sequence[Mapping[str, Any]],
    context: RowContext,
    check: Callable[[dict[str, Any], Record], None],
    *,
    cases: int = 10_000,
    batch: int = 50,
) -> int:
    """Parse ``cases`` changed rows; returns how many were accepted.

    The parser may raise ``RowError`` and nothing else. Of a record that it makes, gold letter and gold
    text agree, and ``check(changed row, record)`` asserts what else must hold: above all that the
    gold text is still the row's own. Fails when no case, or every case, was accepted: a fuzz that
    never sees both says nothing.
    """
    accepted = 0

    @settings(max_examples=cases // batch, deadline=None, derandomize=True, database=None)
    @given(seed=st.integers(0, 2**63))
    def run(seed: int) -> None:
        nonlocal accepted
        rng = random.Random(seed)
        for _ in range(batch):
            row = mutate(rng.choice(rows), rng)
            try:
                record = loader.parse(row, rng.randrange(1, 1000), context)
            except RowError:
                continue
            accepted += 1
            check_record(record)
            check(row, record)

    run()
    assert 0 < accepted < cases, f"{accepted} of {cases} cases accepted"
    return accepted


def check_record(record: Record) -> None:
    """What holds for every record, whatever its format."""
    assert record.id.strip() and record.question.strip()
    if record.options is None:
        assert record.answer_label is None
        return
    assert len(record.options) >= 2
    assert all(len(k) == 1 and "A" <= k <= "Z" and v.strip() for k, v in record.options.items())
    if record.answer_label is not None:
        assert record.options[record.answer_label] == record.answer
