"""The teacher's answers on disk, one fsynced line each: what was paid for is never asked again."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmedx_fast.atomic import disk_guard

_LOG = logging.getLogger(__name__)


class JournalError(ValueError):
    """A journal that cannot be used; the message names it and says what to do."""


class Journal:
    """An append-only JSONL file with a unique ``key`` on every line, locked for this process.

    A line that a kill cut short is taken off on opening; a damaged line elsewhere is passed over with
    a warning, and its question is asked again. Only keys and places are held in memory.
    """

    def __init__(self, path: Path) -> None:
        """Open or make ``path``. Raises :class:`JournalError` when another process has it."""
        self.path = path
        self.totals = {"replies": 0, "tokens_in": 0, "tokens_out": 0, "estimated": 0}
        """Sums over all lines; ``estimated`` counts those whose tokens the server did not report."""
        self._places: dict[str, tuple[int, int]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read()
        except BlockingIOError:
            os.close(self._fd)
            raise JournalError(
                f"{path} is in use by another process: wait for that build to end or stop it, or give "
                "this one another output=<folder>"
            ) from None
        except BaseException:
            os.close(self._fd)
            raise

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: str) -> dict[str, Any]:
        """The entry of ``key``; KeyError when there is none."""
        start, size = self._places[key]
        entry: dict[str, Any] = json.loads(os.pread(self._fd, size, start))
        return entry

    def append(self, entry: dict[str, Any]) -> None:
        """Write an entry and see it on disk. Raises ``DiskFullError``; the file then ends as before."""
        line = json.dumps(entry, ensure_ascii=True, allow_nan=False).encode() + b"\n"
        end = os.fstat(self._fd).st_size
        try:
            with disk_guard(self.path, len(line)):
                written = os.write(self._fd, line)
                if written != len(line):
                    os.write(self._fd, line[written:])
                os.fsync(self._fd)
        except OSError:
            os.ftruncate(self._fd, end)
            raise
        self._note(entry, end, len(line))

    def close(self) -> None:
        """Give the file back; calling it twice is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> None:
        end = 0
        for number, start, line in self._lines():
            if not line.endswith(b"\n"):
                _LOG.warning("%s: its last line was cut short by a kill and is left out", self.path)
                break
            end = start + len(line)
            entry = _entry(line)
            if entry is None:
                _LOG.warning("%s:%d is damaged; what it held is asked again", self.path, number)
                continue
            self._note(entry, start, len(line))
        if end < os.fstat(self._fd).st_size:
            os.ftruncate(self._fd, end)

    def _lines(self) -> Iterator[tuple[int, int, bytes]]:
        """(number from 1, offset, line) of the file."""
        start = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield number, start, line
                start += len(line)

    def _note(self, entry: dict[str, Any], start: int, size: int) -> None:
        if entry["key"] in self._places:  # two files put together by hand
            return
        self._places[entry["key"]] = (start, size)
        self.totals["replies"] += 1
        self.totals["tokens_in"] += entry["tokens_in"]
        self.totals["tokens_out"] += entry["tokens_out"]
        self.totals["estimated"] += bool(entry["estimated"])


def _entry(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    wanted = {"key": str, "text": str, "tokens_in": int, "tokens_out": int, "estimated": bool}
    if not isinstance(entry, dict):
        return None
    return entry if all(isinstance(entry.get(k), kind) for k, kind in wanted.items()) else None
