"""What a run really takes: seconds and tokens by phase, and the text table that shows them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


class PhaseMeter:
    """Seconds and tokens by phase (rollout, reward, forward, backward, sync, eval, ...).

    Phases may nest: the inner one's seconds are not the outer one's too, so the seconds of all
    phases add up to the time spent in any. ``state`` is an earlier :meth:`to_dict` (a resumed run).
    """

    def __init__(self, state: Mapping[str, Mapping[str, float]] | None = None):
        self._total: dict[str, dict[str, float]] = {}
        self._taken: dict[str, dict[str, float]] = {}
        self._stack: list[str] = []
        self._since = 0.0
        for name, row in (state or {}).items():
            self.add(name, float(row["seconds"]), int(row["tokens"]), int(row["calls"]))
        self._taken = self.to_dict()

    @contextlib.contextmanager
    def phase(self, name: str, tokens: int = 0) -> Iterator[None]:
        """Time the block as ``name``; it counts even when it raises."""
        self._charge()
        self._stack.append(name)
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()
            self.add(name, 0.0, tokens, calls=1)

    def add(self, name: str, seconds: float = 0.0, tokens: int = 0, calls: int = 0) -> None:
        """Add to a phase by hand, such as tokens that are known only after it."""
        if seconds < 0 or tokens < 0:
            raise ValueError(
                f"phase {name!r}: seconds = {seconds} and tokens = {tokens} must be >= 0"
            )
        row = self._total.setdefault(name, {"seconds": 0.0, "tokens": 0, "calls": 0})
        row["seconds"] += seconds
        row["tokens"] += tokens
        row["calls"] += calls

    def take(self) -> dict[str, float]:
        """What came since the last ``take``, for a metrics line: ``seconds/<phase>``,
        ``tokens/<phase>``."""
        out: dict[str, float] = {}
        for name, row in self._total.items():
            before = self._taken.get(name, {})
            out[f"seconds/{name}"] = row["seconds"] - before.get("seconds", 0.0)
            if row["tokens"]:
                out[f"tokens/{name}"] = row["tokens"] - before.get("tokens", 0)
        self._taken = self.to_dict()
        return out

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Phase -> {seconds, tokens, calls}; plain JSON."""
        return {name: dict(row) for name, row in self._total.items()}

    def table(self) -> str:
        """The phases as text, longest first."""
        rows = sorted(self._total.items(), key=lambda item: -item[1]["seconds"])
        return render_table(
            ["phase", "seconds", "tokens", "tokens/s"],
            [[n, f"{r['seconds']:.1f}", f"{int(r['tokens']):,}", _per_second(r)] for n, r in rows],
        )

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._stack:
            self.add(self._stack[-1], now - self._since)
        self._since = now


def _per_second(row: Mapping[str, float]) -> str:
    if not row["tokens"] or not row["seconds"]:
        return "-"
    return f"{row['tokens'] / row['seconds']:,.0f}"


def render_table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A text table; the first column is aligned left, the others right."""
    cells = [list(map(str, headers)), *[list(map(str, row)) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    lines = []
    for row in cells:
        first, *rest = [
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join([first, *rest]).rstrip())
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)
