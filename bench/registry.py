"""What is measured: ops, their inputs, formulas, floors and providers. Files in ``bench/ops`` fill it.

An op names the function under test; a provider is one way to compute it (ours, a peer, the floor);
a shape is one size of its inputs. FLOP and byte formulas count what no implementation can leave out:
every GEMM once, every input read once, every output written once.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Literal

import torch
from torch import Tensor

Sizes = Mapping[str, int]
Outputs = dict[str, Tensor]
Call = Callable[[], Outputs]
Metric = Literal["absolute", "relative"]
FLOOR, OURS, PEER = "floor", "ours", "peer"


@dataclass(frozen=True)
class Shape:
    """One size of an op's inputs. ``tokens`` is the x coordinate of its plots."""

    name: str
    sizes: Sizes
    tokens: int


@dataclass(frozen=True)
class Case:
    """One shape on one device: what an input factory gets."""

    sizes: Sizes
    device: torch.device
    dtype: torch.dtype
    seed: int = 0


@dataclass(frozen=True)
class Bound:
    """How an output is compared with the reference, and how far off it may be.

    ``absolute`` is max |x - reference|; ``relative`` is ||x - reference|| / ||reference||. With
    ``against`` the denominator is the norm of that reference tensor instead.
    """

    metric: Metric
    limit: float
    against: str = ""
    exact: float | None = None
    """The limit in place of ``limit`` where the reference is float64."""

    def limit_for(self, expected: Tensor) -> float:
        double = expected.dtype == torch.float64
        return self.exact if double and self.exact is not None else self.limit


def little(sizes: Sizes, itemsize: int) -> float:
    """The memory of a provider that fits wherever its inputs do."""
    return 0.0


@dataclass(frozen=True)
class Provider:
    """One way to compute an op."""

    name: str
    make: Callable[[Any], Call]
    """Inputs -> a call without arguments that returns the op's outputs (or some of them). Imports
    what it needs; what it does itself is not timed."""
    kind: str = PEER
    needs: tuple[str, ...] = ()
    """Distributions it cannot run without."""
    cuda: bool = False
    """It runs on a CUDA device only."""
    lacking: Callable[[Sizes], str | None] = lambda sizes: None
    """Anything else that is missing here, or does not suit the size, in words."""
    limits: Mapping[str, float] | None = field(default_factory=dict)
    """Bounds of its own by output (a peer that rounds logits to bf16 cannot hold ours). None: its
    error is reported and not judged, because it computes something else; ``note`` says what."""
    memory: Callable[[Sizes, int], float] = little
    """Rough bytes beyond the inputs from sizes and bytes per element; it is left out where they are not free."""
    note: str = ""
    computes: bool = True
    """It does the op's arithmetic, so that FLOP/s mean something (a copy does not)."""
    last: bool = False
    """Tried after the other peers, because its first call takes long."""

    def unavailable(self, device: torch.device, sizes: Sizes) -> str | None:
        """Why it cannot run here, as a status, or None."""
        missing = [name for name in self.needs if installed(name) is None]
        if missing:
            return f"not installed: {', '.join(missing)}"
        if self.cuda and device.type != "cuda":
            return "skipped: needs CUDA"
        reason = self.lacking(sizes)
        return None if reason is None else f"skipped: {reason}"


@dataclass(frozen=True)
class Op:
    """An op, how to feed it and what to hold it against."""

    name: str
    title: str
    inputs: Callable[[Case], Any]
    reference: Callable[[Any], Outputs]
    """Outputs in float64 (float32 where the device is slow at float64), by another algorithm."""
    bounds: Mapping[str, Bound]
    flops: Callable[[Sizes], float]
    bytes: Callable[[Sizes, int], float]
    """From the sizes and the bytes per element of the main operands."""
    shapes: Mapping[str, tuple[Shape, ...]]
    providers: tuple[Provider, ...]
    dispatch: str
    """The op's name in ``kernels/_dispatch.py``: which path ours took."""
    axis: str = "tokens"
    """What ``Shape.tokens`` counts, for the plots."""
    saving: Callable[[Any], Iterable[Tensor]] | None = None
    """Inputs -> their weights. Where given, what autograd saves beside them is measured too."""
    process_time: bool = False
    """On a CPU count the process's seconds on all its threads, which others' load does not stretch."""

    @property
    def floor(self) -> Provider:
        return next(p for p in self.providers if p.kind == FLOOR)

    def ordered(self) -> list[Provider]:
        """Ours, the floor, then the peers: who goes first if time runs out."""
        rank = {OURS: 0, FLOOR: 1, PEER: 2}
        return sorted(self.providers, key=lambda p: (rank[p.kind], p.last))


def installed(distribution: str) -> str | None:
    """Version of a distribution, None where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def load() -> dict[str, Op]:
    """Every op of ``bench/ops``, by name, in the order of the files' names."""
    import bench.ops

    found: dict[str, Op] = {}
    for module in sorted(m.name for m in pkgutil.iter_modules(bench.ops.__path__)):
        for op in getattr(importlib.import_module(f"bench.ops.{module}"), "OPS", ()):
            if op.name in found:
                raise ValueError(f"two ops are called {op.name!r}")
            found[op.name] = op
    return found


def compare(
    got: Outputs,
    reference: Outputs,
    bounds: Mapping[str, Bound],
    limits: Mapping[str, float] | None,
) -> tuple[dict[str, float], list[str]]:
    """Error of each output that has a reference, and what is wrong.

    Raises ValueError if no output can be compared: such a check could not fail.
    """
    errors, wrong = {}, []
    for name, value in got.items():
        if name not in bounds:
            continue
        bound = bounds[name]
        errors[name] = error = distance(value, reference, name, bound)
        limit = None if limits is None else limits.get(name, bound.limit_for(reference[name]))
        if limit is not None and not error <= limit:
            wrong.append(f"{name} is off by {error:.3g} ({bound.metric}), more than {limit:.3g}")
    if not errors:
        raise ValueError(f"none of the outputs {sorted(got)} has a reference")
    return errors, wrong


def distance(value: Tensor, reference: Outputs, name: str, bound: Bound) -> float:
    """The error as ``bound`` measures it; NaN where either side has NaN that the other has not."""
    expected = reference[name]
    if value.shape != expected.shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {tuple(expected.shape)}")
    difference = value.detach().to(expected) - expected
    if bound.metric == "absolute":
        return float(difference.abs().max()) if difference.numel() else 0.0
    size = reference[bound.against] if bound.against else expected
    return float(difference.norm() / size.norm().clamp(min=1e-30))
