"""Linears of a language model with E LoRA experts on each, and the TIES merge of whole deltas in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from bench.registry import Case, Outputs, Shape, Sizes
from mmedx_fast.ops import LoraFactors, MergeSpec

SPEC = MergeSpec(method="ties", density=0.3)
# Typical of a trained model: weights of sd 0.02, an expert's change a twentieth of that.
WEIGHT_SD, DELTA_SD = 0.02, 0.001
# Elements up to which the slow providers run: a 3584 x 3584 linear.
SMALL = 3584 * 3584


@dataclass(frozen=True)
class LoraInputs:
    weights: dict[str, Tensor]  # [out, in] each
    experts: dict[str, list[LoraFactors]]  # E each
    checked: tuple[str, ...]
    """The linears whose results are compared: those of the first layer."""


def linears(s: Sizes) -> dict[str, tuple[int, int]]:
    """(out, in) by name: one linear, or the seven of each of L layers."""
    if "L" not in s:
        return {"linear": (s["out"], s["in"])}
    h, i, kv = s["H"], s["I"], s["kv"]
    block = {
        "q": (h, h), "k": (kv, h), "v": (kv, h), "o": (h, h),
        "gate": (i, h), "up": (i, h), "down": (h, i),
    }  # fmt: skip
    return {f"{layer}.{name}": shape for layer in range(s["L"]) for name, shape in block.items()}


def elements(s: Sizes) -> float:
    return float(sum(out * width for out, width in linears(s).values()))


def factor_elements(s: Sizes) -> float:
    """Of all experts together."""
    return float(s["E"] * s["r"] * sum(out + width for out, width in linears(s).values()))


def delta_flops(s: Sizes) -> float:
    """Every expert's B @ A once."""
    return 2.0 * s["E"] * s["r"] * elements(s)


def one(name: str, out: int, width: int, r: int, experts: int = 5) -> Shape:
    sizes = {"out": out, "in": width, "r": r, "E": experts}
    return Shape(f"{name} {out}x{width} r={r} E={experts}", sizes, out * width)


def model(name: str, layers: int, h: int, i: int, kv: int, r: int, experts: int = 5) -> Shape:
    sizes = {"L": layers, "H": h, "I": i, "kv": kv, "r": r, "E": experts}
    count = layers * (2 * h * h + 2 * h * kv + 3 * h * i)
    return Shape(f"{name} {layers} layer{'s' * (layers > 1)} r={r} E={experts}", sizes, count)


TINY = (one("linear", 48, 64, 4, 3), model("model", 1, 32, 48, 16, 4, 3))
SINGLE_7B = (
    one("gate", 18944, 3584, 64),
    one("q", 3584, 3584, 64),
    one("k", 512, 3584, 64),
    one("q", 3584, 3584, 16),
    one("q", 3584, 3584, 128),
    one("gate", 18944, 3584, 128),
)
MODEL_7B = (model("7B", 28, 3584, 18944, 512, 64), model("7B", 1, 3584, 18944, 512, 64))
SINGLE_2B = (one("gate", 8960, 1536, 64), one("q", 1536, 1536, 64), one("k", 256, 1536, 64))
MODEL_2B = (model("2B", 28, 1536, 8960, 256, 64), model("2B", 1, 1536, 8960, 256, 64))


def inputs(case: Case) -> LoraInputs:
    """The same inputs for every op at one size; the last size stays in memory."""
    return _inputs(tuple(case.sizes.items()), case.device, case.dtype, case.seed)


@lru_cache(maxsize=1)
def _inputs(
    items: tuple[tuple[str, int], ...], device: torch.device, dtype: torch.dtype, seed: int
) -> LoraInputs:
    s = dict(items)
    random = torch.Generator(device).manual_seed(seed)

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=random, device=device)

    weights: dict[str, Tensor] = {}
    experts: dict[str, list[LoraFactors]] = {}
    for name, (out, width) in linears(s).items():
        weights[name] = (WEIGHT_SD * normal(out, width)).to(dtype)
        # a third of every expert's variance is common to all: experts of one base agree somewhat
        common = normal(s["r"], width), normal(out, s["r"])
        sd = math.sqrt(DELTA_SD / math.sqrt(s["r"]))
        experts[name] = []
        for _ in range(s["E"]):
            a, b = (sd * _blend(x, normal(*x.shape)).to(dtype) for x in common)
            experts[name].append(LoraFactors(a, b))
    return LoraInputs(weights, experts, tuple(n for n in weights if n.startswith(("0.", "linear"))))


def _blend(common: Tensor, own: Tensor) -> Tensor:
    return math.sqrt(1 / 3) * common + math.sqrt(2 / 3) * own


def deltas(experts: list[LoraFactors], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Each [out, in], from float64 products, rounded once."""
    return [((f.B.double() @ f.A.double()) * f.scale).to(dtype) for f in experts]


def trimmed(experts: list[LoraFactors]) -> Tensor:
    """[E, out, in] float64: the largest 30 % of each float32 delta, what equals the last one too."""
    kept = []
    for delta in deltas(experts):
        count = int(SPEC.density * delta.numel())
        size = delta.abs()
        threshold = size.flatten().topk(count, sorted=False).values.min()
        kept.append(torch.where(size >= threshold, delta, 0.0).double())
    return torch.stack(kept)


@torch.no_grad()
def reference_merge(x: LoraInputs) -> Outputs:
    """The merged weight of each checked linear, rounded once, and the update that went in."""
    found: Outputs = {}
    for name in x.checked:
        stack = trimmed(x.experts[name])
        elected = torch.where(stack.sum(0) >= 0, 1.0, -1.0)
        agree = stack.sign() == elected
        update = (stack * agree).sum(0) / agree.sum(0).clamp(min=1)
        found[name] = (x.weights[name].double() + update).to(x.weights[name].dtype).double()
        found[f"update:{name}"] = update
    return found


def small(sizes: Sizes) -> str | None:
    """Why a size is left to quicker providers, or None."""
    return "takes long; see the smaller linears" if elements(sizes) > SMALL else None


def copies(x: LoraInputs) -> dict[str, Tensor]:
    """Weights to merge into; they are merged into again and again while time is taken."""
    return {name: weight.clone() for name, weight in x.weights.items()}


def merging(x: LoraInputs, update: Callable[[list[LoraFactors]], Tensor]) -> Callable[[], Outputs]:
    """The call of a peer that makes each linear's whole update and adds it."""
    weights = copies(x)

    @torch.no_grad()
    def call() -> Outputs:
        for name, weight in weights.items():
            weight += update(x.experts[name])
        return {name: weights[name] for name in x.checked}

    return call
