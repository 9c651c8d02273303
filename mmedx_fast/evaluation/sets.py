"""Data sets to evaluate on, as streams of records: read as often as needed, never held."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

from mmedx_fast.config import ConfigError, EvalSetConfig
from mmedx_fast.data.loaders import Rejected, iter_records
from mmedx_fast.data.records import Record

OnRejected = Callable[[Rejected], None]


@dataclasses.dataclass(frozen=True)
class EvalSet:
    """A named set. ``records()`` gives its questions, the same ones in the same order every time, and passes
    rows that cannot be read to the callback. ``identity`` is what its answers depend on, as text."""

    name: str
    records: Callable[[OnRejected | None], Iterator[Record]]
    identity: str

    def sized(self) -> tuple[int, int]:
        """(questions, most images of one), from reading all of it."""
        count = images = 0
        for record in self.records(None):
            count, images = count + 1, max(images, len(record.images))
        return count, images


def configured_set(
    name: str, settings: EvalSetConfig, phantom: Callable[[], Path], of_phantom: str
) -> EvalSet:
    """The set that a config names. ``phantom`` makes the phantom clinic's folder, ``of_phantom`` tells one
    phantom clinic from another.

    Raises ConfigError when there is nothing at its path.
    """
    folder = Path(settings.path)
    where = str(folder.resolve())
    if settings.path == "phantom":
        folder, where = phantom(), of_phantom
    elif not folder.exists():
        raise ConfigError(f"eval set {name}: path = {folder}: there is no such file or folder")

    def records(on_rejected: OnRejected | None) -> Iterator[Record]:
        return iter(
            iter_records(
                folder,
                split=settings.split,
                format=settings.format,
                options=settings.options,
                limit=settings.limit,
                on_rejected=on_rejected,
            )
        )

    return EvalSet(name, records, f"{where} {settings.model_dump_json()}")
