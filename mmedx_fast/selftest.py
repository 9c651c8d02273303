"""A tiny case of every public op against float64, on this machine and on each path that the op can take here.

The references are written from the formulas, in plain float64 torch, and share no code with the ops.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mmedx_fast import ops
from mmedx_fast.kernels import _dispatch

Case = Callable[[torch.device], dict[str, tuple[Tensor, Tensor, float]]]


@dataclass(frozen=True)
class Outcome:
    """One op on one path."""

    op: str
    path: str
    """torch or triton."""
    error: float
    """The largest of the errors relative to their bounds: above 1 (or NaN) is a failure."""
    seconds: float
    message: str = ""
    """What is wrong; empty where nothing is."""

    @property
    def ok(self) -> bool:
        return not self.message


def run_selftests(device: torch.device | str | None = None) -> list[Outcome]:
    """Every registered op on its paths on `device` (default: CUDA where torch can use it)."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    return [
        _run(op, path, device) for op in sorted(_dispatch._torch_ops) for path in _paths(op, device)
    ]


def _paths(op: str, device: torch.device) -> Iterator[str]:
    yield "torch"
    if _dispatch.mode() == "torch":
        return
    with _mode("triton"):
        usable = {path.op for path in _dispatch.paths(device) if path.implementation == "triton"}
    interpreted = device.type != "cuda" and _dispatch.mode() != "triton"
    if op in usable and not interpreted:
        yield "triton"


@contextlib.contextmanager
def _mode(value: str) -> Iterator[None]:
    before = os.environ.get(_dispatch.ENV)
    os.environ[_dispatch.ENV] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[_dispatch.ENV]
        else:
            os.environ[_dispatch.ENV] = before


def _run(op: str, path: str, device: torch.device) -> Outcome:
    began = time.perf_counter()
    case = CASES.get(op)
    if case is None:
        return Outcome(op, path, float("nan"), 0.0, f"{op} has no self-test")
    try:
        with _mode(path), torch.random.fork_rng(devices=[]):
            torch.manual_seed(20260110)
            compared = case(device)
    except Exception as error:  # whatever an op raises here is what the report is for
        said = f"{op} on {path} raised {type(error).__name__}: {error}"
        return Outcome(op, path, float("nan"), time.perf_counter() - began, said)
    worst, message = 0.0, ""
    for what, (got, want, bound) in compared.items():
        size = float((got.detach().cpu().double() - want).abs().max()) / bound
        if not size <= 1:
            message = (
                message
                or f"{op} on {path}: {what} is {size * bound:.2e} off float64, allowed are {bound:.0e}"
            )
        worst = size if not size <= worst else worst
    return Outcome(op, path, worst, time.perf_counter() - began, message)


def _advantages(device: torch.device) -> dict[str, tuple[Tensor, Tensor, float]]:
    rewards = torch.rand(18, 3)
    rewards[torch.rand(18, 3) < 0.2] = torch.nan
    rewards[4] = torch.nan
    question, guideline = torch.arange(18) % 2, torch.arange(18) // 6
    got, _ = ops.guideline_advantages(
        rewards.to(device), question.to(device), guideline.to(device), eps=1e-4
    )
    total = rewards.double().nansum(1)
    applies = ~rewards.isnan().all(1)
    want = torch.zeros(18, dtype=torch.float64)
    for i in applies.nonzero().flatten().tolist():
        asked = total[applies & (question == question[i])]
        same = total[applies & (question == question[i]) & (guideline == guideline[i])]
        want[i] = (total[i] - same.mean()) / (same.std() + 1e-4)
        want[i] += (same.mean() - asked.mean()) / (asked.std() + 1e-4)
    return {"advantage": (got, want, 2e-5)}


def _head(device: torch.device) -> tuple[Tensor, Tensor, Tensor, float]:
    """hidden [N, H], weight [V, H], targets [N] in the dtype that is trained in, and its error's scale."""
    wide = device.type == "cpu"
    dtype = torch.float32 if wide else torch.bfloat16
    hidden = torch.randn(23, 64).to(device, dtype).requires_grad_()
    weight = torch.randn(301, 64).mul_(0.2).to(device, dtype)
    return hidden, weight, torch.randint(301, (23,), device=device), 1e-5 if wide else 2e-3


def _exact_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Leaf hidden, log-prob and entropy in float64."""
    leaf = hidden.detach().cpu().double().requires_grad_()
    logp = torch.log_softmax(leaf @ weight.detach().cpu().double().t(), -1)
    chosen = logp.gather(1, targets.cpu()[:, None]).squeeze(1)
    return leaf, chosen, -(logp.exp() * logp).sum(-1)


def _logprob(device: torch.device) -> dict[str, tuple[Tensor, Tensor, float]]:
    hidden, weight, targets, scale = _head(device)
    logprob, entropy = ops.linear_logprob(hidden, weight, targets, logits_dtype=torch.float32)
    assert entropy is not None
    logprob.sum().backward()
    leaf, want, want_entropy = _exact_head(hidden, weight, targets)
    want.sum().backward()
    assert hidden.grad is not None and leaf.grad is not None
    return {
        "log-probability": (logprob, want.detach(), scale),
        "entropy": (entropy, want_entropy.detach(), 2 * scale),
        "gradient": (hidden.grad, leaf.grad, 10 * scale * float(leaf.grad.abs().max())),
    }


def _policy_loss(device: torch.device) -> dict[str, tuple[Tensor, Tensor, float]]:
    hidden, weight, targets, scale = _head(device)
    leaf, now, _ = _exact_head(hidden, weight, targets)
    advantage, share = torch.randn(23), torch.rand(23) / 23
    # no ratio lies so near to a clip that rounding decides on which side
    old = now.detach() - torch.tensor([-0.5, -0.1, 0.0, 0.1, 0.5]).repeat(5)[:23]
    spec = ops.PolicyLossSpec(loss_type="grpo", epsilon=0.2)
    loss, _ = ops.linear_policy_loss(
        hidden,
        weight,
        targets,
        advantage.to(device),
        old_logprob=old.float().to(device),
        token_weight=share.to(device),
        spec=spec,
    )
    loss.backward()
    ratio, gain = (now - old).exp(), advantage.double()
    want = -(torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain) * share.double()).sum()
    want.backward()
    assert hidden.grad is not None and leaf.grad is not None
    return {
        "loss": (loss, want.detach(), 2 * scale),
        "gradient": (hidden.grad, leaf.grad, 10 * scale * float(leaf.grad.abs().max())),
    }


def _merge(device: torch.device) -> dict[str, tuple[Tensor, Tensor, float]]:
    experts = [
        ops.LoraFactors(
            torch.randn(r, 40, device=device), torch.randn(24, r, device=device), 0.5 / r
        )
        for r in (4, 2, 3)
    ]
    base = torch.randn(24, 40, device=device)
    want = base.cpu().double()
    report = ops.lora_merge_(base, experts, ops.MergeSpec(density=0.4))
    kept = []
    for f in experts:
        delta = f.scale * f.B.cpu().double() @ f.A.cpu().double()
        least = delta.abs().flatten().topk(int(0.4 * 24 * 40)).values[-1]
        kept.append(delta * (delta.abs() >= least))
    stack = torch.stack(kept)
    elected = torch.where(stack.sum(0) >= 0, 1.0, -1.0)
    agrees = stack * elected > 0
    want += (stack * agrees).sum(0) / agrees.sum(0).clamp(min=1)
    apart = ((stack > 0).any(0) & (stack < 0).any(0)).sum()
    return {
        "merged weight": (base, want, 1e-5),
        "sign conflicts": (report.conflicts, apart.double(), 0.5),
    }


CASES: dict[str, Case] = {
    "guideline_advantages": _advantages,
    "linear_logprob": _logprob,
    "linear_policy_loss": _policy_loss,
    "lora_merge": _merge,
}
"""Name of a registered op -> {what: (result, float64 reference, largest allowed difference)}."""
