"""What has been answered so far, in a file that survives a kill at any byte.

A line is ``<crc32 of the rest, 8 hex digits> <kind> <number> <JSON>``; the first holds what the answers depend
on. Kinds: ``row`` (a prediction) and ``reject`` (a question that cannot be asked), one of them for every number
from 0, in order; ``time`` (seconds of work). Whatever is written is a prefix of the unbroken file, so
that the count of lines says where to go on.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

from mmedx_fast.atomic import disk_guard

Kind = Literal["row", "reject"]
_HEAD = "head"
_LINE_ENDS = "\x85\u2028\u2029"
"""What JSON leaves as it is and ``str.splitlines`` ends a line at."""


class JournalError(ValueError):
    """A journal that cannot be gone on with; the message names it and says what to do."""


class Journal:
    """Append-only; opened once by the process that writes."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        """Open or make ``path``; a torn or damaged end is cut off.

        Raises :class:`JournalError` when it was made under another ``fingerprint``.
        """
        self.path = path
        self.count = 0
        """Questions that are done, rejected ones included."""
        end = 0
        if path.exists():
            end = self._read(fingerprint)
            with path.open("r+b") as file:
                file.truncate(end)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = path.open("ab")
        if end == 0:
            self._write(_HEAD, 0, {"fingerprint": fingerprint})
            self.flush()

    def _read(self, fingerprint: str) -> int:
        """Where the good part ends; sets ``count``."""
        end = 0
        for kind, number, text, after in _good_lines(self.path):
            end = after
            if kind == _HEAD:
                made_for = json.loads(text)["fingerprint"]
                if made_for != fingerprint:
                    raise JournalError(
                        f"{self.path} holds answers to other questions or of other settings (fingerprint "
                        f"{made_for}, now {fingerprint}): write into another folder, or delete the file "
                        "to begin again"
                    )
            elif kind != "time":
                self.count = number + 1
        return end

    def add(self, kind: Kind, value: dict[str, Any]) -> None:
        """The next question's outcome."""
        self._write(kind, self.count, value)
        self.count += 1

    def add_time(self, seconds: float) -> None:
        self._write("time", self.count, {"seconds": seconds})

    def flush(self) -> None:
        """On the disk when this returns. Raises :class:`mmedx_fast.atomic.DiskFullError`."""
        with disk_guard(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _write(self, kind: str, number: int, value: dict[str, Any]) -> None:
        text = json.dumps(value, ensure_ascii=False)
        for mark in _LINE_ENDS:
            text = text.replace(mark, f"\\u{ord(mark):04x}")
        rest = f"{kind} {number} {text}".encode()
        with disk_guard(self.path):
            self._file.write(b"%08x %s\n" % (zlib.crc32(rest), rest))


def entries(path: Path) -> Iterator[tuple[Kind, int, bytes]]:
    """(kind, number, JSON) of every question of a journal, in order."""
    for kind, number, text, _ in _good_lines(path):
        if kind in ("row", "reject"):
            yield kind, number, text  # type: ignore[misc]


def seconds(path: Path) -> float:
    """The time that the work took, over all its starts."""
    lines = _good_lines(path)
    return float(sum(json.loads(text)["seconds"] for kind, _, text, _ in lines if kind == "time"))


def _good_lines(path: Path) -> Iterator[tuple[str, int, bytes, int]]:
    """(kind, number, JSON, byte after it) up to the first line that is torn, damaged or out of order."""
    end, count = 0, 0
    with path.open("rb") as file:
        for line in file:
            sum_, _, rest = line[:-1].partition(b" ")
            if not line.endswith(b"\n") or sum_ != b"%08x" % zlib.crc32(rest):
                return
            kind, number, text = rest.split(b" ", 2)
            if (kind == b"head") != (end == 0) or int(number) != count:
                return
            count += kind in (b"row", b"reject")
            end += len(line)
            yield kind.decode(), int(number), text, end
