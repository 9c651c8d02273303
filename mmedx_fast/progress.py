"""Progress of everything that takes longer than two seconds.

A bar with rate and time left on a terminal, a plain line every few seconds elsewhere (log files,
CI), nothing for what is over before that. Bars nest: they share one display.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TextIO

MIN_SECONDS = 2.0
EVERY_SECONDS = 10.0


class progress:  # noqa: N801 - reads as a verb where it is used, like ``open``
    """``with progress(total, "GBA", unit="step") as bar: ... bar.update(1, loss=0.3)``, or
    ``for item in progress(items, "Reading")``.

    ``work`` is a number of units, None when unknown, or an iterable (its length is used if it has
    one). ``start`` units are already done (a resumed run): they count in the bar, not in the rate.
    ``every`` is the seconds between plain lines, ``min_seconds`` how long nothing is shown.
    ``file`` defaults to stderr.
    """

    def __init__(
        self,
        work: int | Iterable[Any] | None,
        description: str,
        *,
        unit: str = "it",
        start: int = 0,
        every: float = EVERY_SECONDS,
        min_seconds: float = MIN_SECONDS,
        file: TextIO | None = None,
    ):
        self._items = None if work is None or isinstance(work, int) else work
        sized = len(work) if isinstance(work, Sized) else None
        self.total = work if isinstance(work, int) else sized
        self.description, self.unit = description, unit
        self.done = self._start = start
        self.fields: dict[str, Any] = {}
        self._every, self._min_seconds = every, min_seconds
        self._file = sys.stderr if file is None else file
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._task: int | None = None
        self._shown = False
        self._began = 0.0

    def update(self, n: int = 1, **fields: Any) -> None:
        """``n`` more units are done; ``fields`` (loss=0.31, ...) replace those of the same name."""
        self.done += n
        self.fields.update(fields)
        if self._task is not None:
            _DISPLAY.update(self._task, self.done, self._rate_text(), self._field_text())

    def __enter__(self) -> progress:
        self._began = time.monotonic()
        if int(os.environ.get("RANK", "0")) > 0:  # rank 0 shows what all do
            return self
        self._thread = threading.Thread(target=self._show, name="progress", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        if self._task is not None:
            _DISPLAY.remove(self._task, self._line(final=kind is None))
            self._task = None
        elif self._shown:
            self._print(self._line(final=kind is None))

    def __iter__(self) -> Iterator[Any]:
        if self._items is None:
            raise TypeError("only a progress over an iterable can be iterated")
        if self._thread is not None:
            yield from self._walk()
            return
        with self:
            yield from self._walk()

    def _walk(self) -> Iterator[Any]:
        for item in self._items or ():
            yield item
            self.update(1)

    def _show(self) -> None:
        """Runs in a thread of its own, so that a first unit of a minute does not look like a
        hang."""
        if self._over.wait(self._min_seconds):
            return
        self._shown = True
        if self._file is sys.stderr and self._file.isatty():
            task = _DISPLAY.add(self.description, self.total, self._start)
            _DISPLAY.update(task, self.done, self._rate_text(), self._field_text())
            self._task = task
            return
        self._print(self._line())
        while not self._over.wait(self._every):
            self._print(self._line())

    def _line(self, final: bool = False) -> str:
        seconds = time.monotonic() - self._began
        count = f"{self.done}" if self.total is None else f"{self.done}/{self.total}"
        parts = [f"{self.description}: {count} {self.unit}", self._rate_text()]
        left = self._seconds_left()
        if final:
            parts.append(f"done in {duration(seconds)}")
        elif left is not None:
            parts.append(f"{duration(left)} left")
        parts.append(self._field_text())
        return ", ".join(part for part in parts if part)

    def _rate(self) -> float:
        seconds = time.monotonic() - self._began
        return (self.done - self._start) / seconds if seconds > 0 else 0.0

    def _seconds_left(self) -> float | None:
        rate = self._rate()
        return None if self.total is None or rate <= 0 else max(0, self.total - self.done) / rate

    def _rate_text(self) -> str:
        rate = self._rate()
        if rate <= 0:
            return ""
        return f"{rate:.1f} {self.unit}/s" if rate >= 1 else f"{1 / rate:.1f} s/{self.unit}"

    def _field_text(self) -> str:
        items = list(self.fields.items())
        return " ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in items)

    def _print(self, line: str) -> None:
        print(line, file=self._file, flush=True)


def duration(seconds: float) -> str:
    """``7 s``, ``3 min 05 s`` or ``2 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class _Display:
    """One rich display for all bars: rich draws only one at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rich: Any = None
        self._open: set[int] = set()

    def add(self, description: str, total: int | None, start: int) -> int:
        with self._lock:
            if self._rich is None:
                self._rich = _rich_progress()
                self._rich.start()
            task: int = self._rich.add_task(
                description, total=total, completed=start, rate="", fields=""
            )
            self._open.add(task)
            return task

    def update(self, task: int, done: int, rate: str, fields: str) -> None:
        with self._lock:
            if self._rich is not None:
                self._rich.update(task, completed=done, rate=rate, fields=fields)

    def remove(self, task: int, line: str) -> None:
        """Take the bar away and leave ``line`` where it was."""
        with self._lock:
            self._rich.remove_task(task)
            self._rich.console.print(line, markup=False, highlight=False)
            self._open.discard(task)
            if not self._open:
                self._rich.stop()
                self._rich = None


_DISPLAY = _Display()


def _rich_progress() -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[fields]}", markup=False, style="dim"),
        console=Console(stderr=True),
        transient=True,
    )
