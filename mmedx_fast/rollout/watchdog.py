"""Ends a process that hangs where no exception can reach it, so that a launcher's restart goes on from the
checkpoint."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
from typing import NoReturn

EXIT_HUNG = 75
"""Exit code of a process that the watchdog ended (EX_TEMPFAIL: starting it again may help)."""

_TICKS = 20
"""How many times a thread looks within the timeout. Ticks are counted, not seconds, so that a process that
was stopped and continued is not taken for one that hangs."""


class Watchdog:
    """While open, :meth:`beat` must be called at least every ``seconds``; use as a context manager.

    Otherwise the stacks of all threads go to stderr and the process ends with :data:`EXIT_HUNG`. Native
    code that hangs with Python's lock held cannot be seen from here.
    """

    def __init__(self, seconds: float, what: str) -> None:
        """``what``: the thing that is waited for, in words."""
        self._seconds, self._what = seconds, what
        self._missed = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        """Something has happened."""
        self._missed = 0

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(self._seconds / _TICKS):
            self._missed += 1
            if self._missed > _TICKS:
                self._end()

    def _end(self) -> NoReturn:
        stream = sys.__stderr__
        if stream is not None:
            print(
                f"\n{self._what} has not returned for {self._seconds:g} s (rollout.timeout). The "
                f"process ends with code {EXIT_HUNG}; the same command goes on from the last "
                "checkpoint. Where every thread was:",
                file=stream,
                flush=True,
            )
            faulthandler.dump_traceback(file=stream, all_threads=True)
            stream.flush()
        os._exit(EXIT_HUNG)
