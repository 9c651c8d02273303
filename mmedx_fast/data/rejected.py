"""Rows that gave no record, and the file they are written to."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from mmedx_fast.data.rows import Row, RowError

_ID_COLUMNS = ("id", "question_id", "index", "qid")


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A row that could not be used: ``row`` is the line number from 1, ``value`` at most 200
    characters.
    """

    file: str
    row: int
    id: str | None
    field: str
    value: str
    reason: str

    def __str__(self) -> str:
        name = f" ({self.id})" if self.id else ""
        return f"{self.file}:{self.row}{name}: {self.field}={self.value}: {self.reason}"


class RejectedFile:
    """Writes rejected rows as JSONL while they come; the file appears, whole, when the block ends without
    an error (empty when no row was rejected).

        with RejectedFile(path) as rejected:
            for record in iter_records(data, split="test", on_rejected=rejected): ...
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._part = path.with_name(f"{path.name}.part{os.getpid()}")

    def __enter__(self) -> RejectedFile:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._out = self._part.open("w", encoding="utf-8")
        return self

    def __call__(self, row: Rejected) -> None:
        self._out.write(json.dumps(dataclasses.asdict(row)) + "\n")

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._out.close()
        if kind is None:
            os.replace(self._part, self._path)
        else:
            self._part.unlink(missing_ok=True)


def rejected_row(file: Path, number: int, row: Row | RowError, error: RowError) -> Rejected:
    """What is kept of a row that gave no record."""
    known = row if isinstance(row, dict) else {}
    native = next((known[name] for name in _ID_COLUMNS if known.get(name) is not None), None)
    return Rejected(
        file=str(file),
        row=number,
        id=None if native is None else str(native)[:200],
        field=error.field,
        value=repr(error.value)[:200],
        reason=error.reason,
    )
