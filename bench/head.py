"""The head's inputs, reference and floor, and its peers as functions of (hidden, weight, targets).

Logits are like a model's: a peak of ln V - 3 to ln V + 12 above a background of standard deviation 1,
a second candidate 0.5 to 4 nats below it. Under a flat softmax a filter that drops small gradients
(cut-cross-entropy's default) would drop nearly all of them and look fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.registry import Bound, Case, Outputs, Shape, Sizes

Pair = tuple[Tensor, Tensor | None]
LogProb = Callable[[Tensor, Tensor, Tensor], Pair]
"""(hidden [N, H], weight [V, H], targets [N]) -> log-prob [N], entropy [N] or None; differentiable."""

TRL_VOCAB_TILE = 32768  # trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE
EPSILON, EPSILON_HIGH = 0.2, 0.28
# Chips whose float64 is at least half their float32 rate; elsewhere the reference is float32.
FAST_FP64 = ((8, 0), (9, 0), (10, 0))

BOUNDS = {
    "logprob": Bound("absolute", 5e-4),
    "entropy": Bound("absolute", 2e-3),
    "loss": Bound("absolute", 1e-4),
    "d_hidden": Bound("relative", 1e-2),
}
# Logits rounded to bf16 are off by up to 2^-4 between 16 and 32, and so are target and log-sum-exp.
ROUNDED_LOGITS = {"logprob": 0.3, "entropy": 0.3, "loss": 0.05, "d_hidden": 0.15}


@dataclass(frozen=True)
class HeadInputs:
    """N tokens in sequences of ``length``, before a frozen head; one optimizer step off policy."""

    hidden: Tensor  # [N, H], requires a gradient
    weight: Tensor  # [V, H]
    targets: Tensor  # [N] int64
    d_logprob: Tensor  # [N] f32, an upstream gradient
    advantages: Tensor  # [N] f32, equal within a sequence
    token_weight: Tensor  # [N] f32, 1 / N
    old_logprob: Tensor  # [N] f32, within 0.05 of the present one: no ratio reaches the clip
    logprob: Tensor  # [N] f64, the reference
    entropy: Tensor  # [N] f64
    length: int

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]


def shapes(hidden: int, vocab: int, tokens: tuple[int, ...], length: int) -> tuple[Shape, ...]:
    return tuple(
        Shape(f"N={n} H={hidden} V={vocab}", {"N": n, "H": hidden, "V": vocab, "T": length}, n)
        for n in tokens
    )


SHAPES = {
    "tiny": shapes(32, 1000, (24, 96), 6),
    # a real vocabulary on a CPU: minutes a shape, and several GB for whole logits
    "cpu_large": shapes(512, 152064, (1024, 4096), 512),
    "qwen2_5_vl_7b": shapes(3584, 152064, (8192, 1024, 4096, 16384), 512),
    "qwen2_vl_2b": shapes(1536, 151936, (8192, 1024, 4096, 16384), 512),
}


def inputs(case: Case) -> HeadInputs:
    """The same inputs for every op at one size; the last size stays in memory."""
    s = case.sizes
    return _inputs(s["N"], s["H"], s["V"], s["T"], case.device, case.dtype, case.seed)


@lru_cache(maxsize=1)
def _inputs(
    n: int, width: int, vocab: int, length: int, device: torch.device, dtype: torch.dtype, seed: int
) -> HeadInputs:
    random = torch.Generator(device).manual_seed(seed)
    uniform = partial(torch.rand, n, generator=random, device=device)
    weight = torch.randn(vocab, width, generator=random, device=device) / math.sqrt(width)
    first, second, other = (
        torch.randint(vocab, (n,), generator=random, device=device) for _ in range(3)
    )
    peak = math.log(vocab) - 3 + 15 * uniform()
    hidden = torch.randn(n, width, generator=random, device=device)
    hidden += _towards(weight, first, peak) + _towards(weight, second, peak - 0.5 - 3.5 * uniform())
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    choice = uniform()
    targets = torch.where(choice < 0.7, first, torch.where(choice < 0.95, second, other))
    logprob, entropy = reference_logprob(hidden, weight, targets)
    advantages = torch.randn(n // length, generator=random, device=device).repeat_interleave(length)
    return HeadInputs(
        hidden=hidden.requires_grad_(),
        weight=weight,
        targets=targets,
        d_logprob=torch.randn(n, generator=random, device=device) / n,
        advantages=advantages,
        token_weight=torch.full((n,), 1 / n, device=device),
        old_logprob=(logprob + 0.1 * (uniform() - 0.5)).float(),
        logprob=logprob,
        entropy=entropy,
        length=length,
    )


def _towards(weight: Tensor, rows: Tensor, logit: Tensor) -> Tensor:
    """[N, H] states whose logit at each row of the weight is the given one."""
    chosen = weight[rows]
    return chosen * (logit / chosen.square().sum(1))[:, None]


def _wide(x: Tensor) -> torch.dtype:
    if x.is_cuda and torch.cuda.get_device_capability(x.device) not in FAST_FP64:
        return torch.float32
    return torch.float64


def _tiles(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, logits, weight) in the reference's dtype, at most 1 GiB of logits at a time."""
    wide = weight.to(_wide(weight))
    step = max(1, (1 << 27) // weight.shape[0])
    for start in range(0, len(hidden), step):
        rows = slice(start, min(start + step, len(hidden)))
        yield rows, hidden[rows].detach().to(wide.dtype) @ wide.t(), wide


@torch.no_grad()
def reference_logprob(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy [N] by log_softmax, in float64 where that is quick."""
    logprob, entropy = hidden.new_empty((2, len(hidden)), dtype=_wide(weight))
    for rows, z, _ in _tiles(hidden, weight):
        log_p = torch.log_softmax(z, 1)
        logprob[rows] = log_p.gather(1, targets[rows, None])[:, 0]
        entropy[rows] = torch.special.entr(log_p.exp_()).sum(1)
    return logprob, entropy


@torch.no_grad()
def reference_gradient(x: HeadInputs, d_logprob: Tensor) -> Tensor:
    """[N, H] gradient of sum(d_logprob * logprob) with respect to the hidden states."""
    out = torch.empty_like(x.hidden, dtype=_wide(x.weight), requires_grad=False)
    for rows, z, wide in _tiles(x.hidden, x.weight):
        dz = torch.softmax(z, 1).neg_()
        at = x.targets[rows, None]
        dz.scatter_add_(1, at, torch.ones_like(at, dtype=dz.dtype))
        out[rows] = dz.mul_(d_logprob[rows, None].to(dz.dtype)) @ wide
    return out


def dapo(logprob: Tensor, x: HeadInputs) -> Tensor:
    """The clipped objective of every trainer measured here, on log-probs."""
    ratio = (logprob - x.old_logprob).exp()
    clipped = ratio.clamp(1 - EPSILON, 1 + EPSILON_HIGH)
    gain = torch.minimum(ratio * x.advantages, clipped * x.advantages)
    return -(gain * x.token_weight).sum()


def gemm_floor(x: HeadInputs, passes: int) -> Callable[[], Outputs]:
    """The GEMMs alone at our tile shapes: logits (1), and the gradient of hidden from them (2)."""
    from mmedx_fast.kernels import _logits

    n, width = x.hidden.shape
    rows = list(_logits.spans(n, x.vocab, width, x.hidden.device, None))
    tallest = max(r.stop - r.start for r in rows)
    hidden = x.hidden.detach()
    tile = hidden.new_empty((tallest, x.vocab))
    gradient = torch.empty_like(hidden)

    def call() -> Outputs:
        for r in rows:
            logits = tile[: r.stop - r.start]
            torch.mm(hidden[r], x.weight.t(), out=logits)
            if passes == 2:
                torch.mm(logits, x.weight, out=gradient[r])
        return {}

    return call


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Pair:
    """What trainers without a fused head do: whole logits, float32 log_softmax."""
    log_p = torch.log_softmax((hidden @ weight.t()).float(), -1)
    entropy = -(log_p.detach().exp() * log_p.detach()).sum(-1)
    return log_p.gather(1, targets[:, None])[:, 0], entropy


def compiled() -> LogProb:
    """A fresh compilation: over all shapes and ops one function would pass Dynamo's limit and run eagerly."""
    torch._dynamo.reset()
    function: LogProb = torch.compile(eager, dynamic=False)
    return function


def trl() -> LogProb:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    # Its backward imports this, which takes seconds; where it cannot, the backward says so.
    with suppress(ImportError):
        import trl.trainer.utils  # noqa: F401

    def call(hidden: Tensor, weight: Tensor, targets: Tensor) -> Pair:
        found: Any = ChunkedLogProbFunction.apply(
            hidden, weight, None, targets, 1.0, TRL_VOCAB_TILE, None, 1.0, ("entropy",)
        )
        return found[0], found[1]

    return call


def liger_scaled() -> LogProb:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction as Function,
    )

    def call(hidden: Tensor, weight: Tensor, targets: Tensor) -> Pair:
        nll, entropy = Function.apply(hidden, weight, targets, 1.0, -100, 1, True)[:2]
        return -nll, entropy

    return call


def liger_flce(reduction: str) -> LogProb:
    from liger_kernel.ops.fused_linear_cross_entropy import (
        LigerFusedLinearCrossEntropyFunction as Function,
    )

    def call(hidden: Tensor, weight: Tensor, targets: Tensor) -> Pair:
        args = (hidden, weight, targets, None, None, -100, 0.0, 0.0, reduction)
        return -Function.apply(*args)[0], None

    return call


def cce(filter_eps: str | None) -> LogProb:
    from cut_cross_entropy import linear_cross_entropy

    def call(hidden: Tensor, weight: Tensor, targets: Tensor) -> Pair:
        found = linear_cross_entropy(
            hidden, weight, targets, reduction="none", filter_eps=filter_eps
        )
        return -found, None

    return call


def torch_lce(reduction: str) -> LogProb:
    from torch.nn import LinearCrossEntropyOptions

    options = LinearCrossEntropyOptions()

    def call(hidden: Tensor, weight: Tensor, targets: Tensor) -> Pair:
        found = F.linear_cross_entropy(
            hidden, weight, targets, reduction=reduction, options=options
        )
        return -found, None

    return call


def no_torch_lce(sizes: Sizes) -> str | None:
    if hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    return f"torch {torch.__version__} has no chunked F.linear_cross_entropy (2.13 has)"


def verl() -> LogProb:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    def call(hidden: Tensor, weight: Tensor, targets: Tensor) -> Pair:
        logprob, entropy = linear_cross_entropy(hidden, weight, targets, 1.0, "none", None)
        return logprob, entropy

    return call


def eager_bytes(sizes: Sizes, itemsize: int, passes: int) -> float:
    """Whole logits, their float32 copy, log_softmax, entropy's temporaries; gradients of the first three.

    float32 logits need no copy: 12 bytes a logit were measured, forward and backward.
    """
    wide = itemsize + 16 if passes == 1 else 2 * itemsize + 24
    if itemsize == 4:
        wide = 14
    return float(sizes["N"] * sizes["V"] * wide)
