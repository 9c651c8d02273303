"""linear_policy_loss: the DAPO / GRPO objective, loss and gradient of the hidden states, frozen head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from bench import head, head_peers
from bench.head import HeadInputs
from bench.ours import plain_torch
from bench.registry import FLOOR, OURS, Call, Op, Outputs, Provider, Sizes
from mmedx_fast.ops import PolicyLossSpec, linear_policy_loss

SPEC = PolicyLossSpec(
    loss_type="dapo", epsilon=head.EPSILON, epsilon_high=head.EPSILON_HIGH, beta=0.0
)


def _gradient(loss: torch.Tensor, x: HeadInputs) -> Outputs:
    (gradient,) = torch.autograd.grad(loss, x.hidden)
    return {"loss": loss.detach(), "d_hidden": gradient}


def _ours(x: HeadInputs) -> Call:
    def call() -> Outputs:
        loss, _ = linear_policy_loss(
            x.hidden,
            x.weight,
            x.targets,
            x.advantages,
            old_logprob=x.old_logprob,
            token_weight=x.token_weight,
            spec=SPEC,
        )
        return _gradient(loss, x)

    return call


def _from_logprob(function: head.LogProb, x: HeadInputs) -> Call:
    def call() -> Outputs:
        logprob, _ = function(x.hidden, x.weight, x.targets)
        return _gradient(head.dapo(logprob, x), x)

    return call


def _cross_entropy(build: partial[head.LogProb], x: HeadInputs) -> Call:
    """Plain cross-entropy with its gradient made in the forward: the same GEMMs, another loss."""
    function = build()

    def call() -> Outputs:
        total, _ = function(x.hidden, x.weight, x.targets)
        return _gradient(-total / len(x.targets), x)

    return call


@contextmanager
def _tf32(on: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _liger_grpo(x: HeadInputs, tf32: bool) -> Call:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    module = LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=x.hidden.is_cuda,
        use_ref_model=False,
        epsilon_low=head.EPSILON,
        epsilon_high=head.EPSILON_HIGH,
        loss_type="dapo",
    )
    by_sequence = (-1, x.length)
    targets, old = x.targets.view(by_sequence), x.old_logprob.view(by_sequence)
    mask, advantages = torch.ones_like(targets), x.advantages.view(by_sequence)[:, 0].contiguous()

    def call() -> Outputs:
        hidden = x.hidden.view(*targets.shape, -1)
        with _tf32(tf32):
            loss, _ = module(hidden, x.weight, targets, mask, advantages, old_per_token_logps=old)
            return _gradient(loss, x)

    return call


def _reference(x: HeadInputs) -> Outputs:
    logprob = x.logprob.clone().requires_grad_()
    loss = head.dapo(logprob, x)
    (slope,) = torch.autograd.grad(loss, logprob)
    return {"loss": loss.detach(), "d_hidden": head.reference_gradient(x, slope)}


def _bytes(s: Sizes, itemsize: int) -> float:
    """Hidden, weight, targets and three numbers a token read; loss and gradient of hidden written."""
    return float(itemsize * (2 * s["N"] + s["V"]) * s["H"] + s["N"] * (8 + 3 * 4) + 4)


CROSS_ENTROPY = "plain cross-entropy, summed: the gradient is made in the forward, no policy loss"
OPS = (
    Op(
        name="policy_loss",
        title="DAPO loss and the gradient of the hidden states, frozen head",
        inputs=head.inputs,
        reference=_reference,
        bounds=head.BOUNDS,
        flops=lambda s: 4.0 * s["N"] * s["H"] * s["V"],
        bytes=_bytes,
        shapes=head.SHAPES,
        providers=(
            Provider("ours", _ours, OURS),
            plain_torch(_ours, "linear_policy_loss"),
            Provider("torch.mm", partial(head.gemm_floor, passes=2), FLOOR, note="two GEMMs only"),
            *head_peers.providers(_from_logprob, passes=2),
            Provider(
                "Liger GRPO",
                partial(_liger_grpo, tf32=False),
                needs=("liger-kernel",),
                limits=head.ROUNDED_LOGITS,
                note="its gradient GEMM is float32",
            ),
            Provider(
                "Liger GRPO, TF32",
                partial(_liger_grpo, tf32=True),
                needs=("liger-kernel",),
                cuda=True,
                limits=head.ROUNDED_LOGITS,
                note="float32 GEMMs in TF32",
            ),
            Provider(
                "Liger FLCE, sum",
                partial(_cross_entropy, partial(head.liger_flce, "sum")),
                needs=("liger-kernel",),
                cuda=True,
                limits=None,
                note=CROSS_ENTROPY,
            ),
            Provider(
                "F.linear_cross_entropy, sum",
                partial(_cross_entropy, partial(head.torch_lce, "sum")),
                lacking=head.no_torch_lce,
                limits=None,
                note=CROSS_ENTROPY,
            ),
        ),
        dispatch="linear_policy_loss",
    ),
)
