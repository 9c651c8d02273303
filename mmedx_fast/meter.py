"""What a run really takes: seconds and tokens by phase, and the text table that shows them."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, Protocol

from mmedx_fast.flops import ModelShape, segment_counts, train_flops
from mmedx_fast.gpus import Gpu


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


class Row(Protocol):
    """What a rate needs of a :class:`mmedx_fast.tree.PackedRow`."""

    @property
    def segments(self) -> Sequence[tuple[int, int, int]]: ...
    @property
    def targets(self) -> Sized: ...
    @property
    def pixel_values(self) -> Any: ...
    @property
    def image_grid_thw(self) -> Any: ...
    @property
    def images(self) -> Sequence[Hashable]: ...


@dataclasses.dataclass
class StepRates:
    """The rates of a training step, from its rows and its seconds by phase."""

    shape: ModelShape
    rank: int
    """Of the LoRA."""
    gpu: Gpu | None
    """Whose peak the MFU is a share of; null (a CPU, a GPU without an entry) leaves it out."""
    gpus: int
    """GPUs at work; 0 on a CPU, which has no GPU hours."""
    full: bool = False
    train_tower: bool = False
    _flops: float = 0.0

    def add(self, rows: Iterable[Row], passes: int = 1) -> None:
        """Count ``passes`` forward and backward passes over this rank's ``rows``.

        Useful work only: what a checkpoint computes again does not count, as in every MFU, and an image
        that several rows show counts once.
        """
        seen: set[Hashable] = set()
        for row in rows:
            counts = segment_counts(row.segments, len(row.targets))
            each = train_flops(
                *(self.shape, counts),
                lora_rank=self.rank,
                checkpointing=False,
                full=self.full,
            )
            if row.pixel_values is not None:
                shown = dict(zip(row.images, row.image_grid_thw.tolist(), strict=True))
                each += sum(self._image(grid) for key, grid in shown.items() if key not in seen)
                seen |= shown.keys()
            self._flops += passes * each

    def _image(self, grid: Sequence[int]) -> float:
        assert self.shape.vision is not None
        tokens = math.prod(grid) // self.shape.vision.merge**2
        backward = self.shape.image_backward_flops(tokens, False) if self.train_tower else 0.0
        return self.shape.image_flops(tokens) + backward

    def take(self, taken: Mapping[str, float], samples: int) -> dict[str, float]:
        """Rates of a step that took ``taken`` (:meth:`PhaseMeter.take`) for ``samples`` questions.

        ``perf/share/<phase>`` of the seconds, ``perf/<phase>_tokens_per_second`` of all ranks,
        ``perf/mfu`` of this rank's GPU while it trains, ``perf/gpu_hours_per_1000_samples``, a sample
        being a question with all its responses; on CUDA ``perf/peak_memory_bytes`` of this process.
        """
        flops, self._flops = self._flops, 0.0
        split = [key.split("/", 1) for key in taken]
        seconds = {name: taken[f"seconds/{name}"] for kind, name in split if kind == "seconds"}
        whole = sum(seconds.values())
        out = {f"perf/share/{n}": value / whole for n, value in seconds.items() if whole}
        for kind, name in split:
            if kind == "tokens" and seconds[name] > 0:
                out[f"perf/{name}_tokens_per_second"] = taken[f"tokens/{name}"] / seconds[name]
        train = seconds.get("train", 0.0)
        if self.gpu is not None and train > 0:
            out["perf/mfu"] = flops / (train * self.gpu.peak_tflops * 1e12)
        if self.gpus and samples:
            out["perf/gpu_hours_per_1000_samples"] = 1000 * whole * self.gpus / 3600 / samples
        return out | (_peak_memory() if self.gpus else {})


def _peak_memory() -> dict[str, float]:
    """The most bytes of tensors that this process held on its GPU since it was asked last."""
    import torch

    if not torch.cuda.is_available():
        return {}
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return {"perf/peak_memory_bytes": float(peak)}


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
