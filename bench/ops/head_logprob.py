"""linear_logprob: without a gradient (scoring), and forward with backward (training on log-probs)."""

from __future__ import annotations

from functools import partial

import torch

from bench import head, head_peers
from bench.head import HeadInputs
from bench.ours import plain_torch
from bench.registry import FLOOR, OURS, Call, Op, Outputs, Provider, Sizes
from mmedx_fast.ops import linear_logprob


def _scored(function: head.LogProb, x: HeadInputs) -> Call:
    def call() -> Outputs:
        with torch.no_grad():
            logprob, entropy = function(x.hidden, x.weight, x.targets)
        return {"logprob": logprob} | ({} if entropy is None else {"entropy": entropy})

    return call


def _trained(function: head.LogProb, x: HeadInputs) -> Call:
    def call() -> Outputs:
        logprob, _ = function(x.hidden, x.weight, x.targets)
        (gradient,) = torch.autograd.grad(logprob, x.hidden, x.d_logprob.to(logprob.dtype))
        return {"logprob": logprob.detach(), "d_hidden": gradient}

    return call


def _ours_trained(x: HeadInputs) -> Call:
    """Peers differentiate the log-prob alone, and so does this: entropy is for the log."""
    return _trained(partial(linear_logprob, return_entropy=False), x)


def _reference(x: HeadInputs) -> Outputs:
    return {"logprob": x.logprob, "entropy": x.entropy}


def _reference_trained(x: HeadInputs) -> Outputs:
    return {"logprob": x.logprob, "d_hidden": head.reference_gradient(x, x.d_logprob)}


def forward_bytes(s: Sizes, itemsize: int) -> float:
    """Hidden, weight and targets read; log-prob and entropy written."""
    return float(itemsize * (s["N"] + s["V"]) * s["H"] + s["N"] * (8 + 4 + 4))


def backward_bytes(s: Sizes, itemsize: int) -> float:
    """As forward, without the entropy, with d_logprob read and the gradient of hidden written."""
    return float(itemsize * (2 * s["N"] + s["V"]) * s["H"] + s["N"] * (8 + 4 + 4))


OPS = (
    Op(
        name="linear_logprob",
        title="log-prob and entropy of chosen tokens, no gradient",
        inputs=head.inputs,
        reference=_reference,
        bounds=head.BOUNDS,
        flops=lambda s: 2.0 * s["N"] * s["H"] * s["V"],
        bytes=forward_bytes,
        shapes=head.SHAPES,
        providers=(
            Provider("ours", partial(_scored, linear_logprob), OURS),
            plain_torch(partial(_scored, linear_logprob), "linear_logprob"),
            Provider(
                "torch.mm", partial(head.gemm_floor, passes=1), FLOOR, note="logits GEMM only"
            ),
            *head_peers.providers(_scored, passes=1),
        ),
        dispatch="linear_logprob",
    ),
    Op(
        name="linear_logprob_backward",
        title="log-prob of chosen tokens, forward and backward, frozen head",
        inputs=head.inputs,
        reference=_reference_trained,
        bounds=head.BOUNDS,
        flops=lambda s: 4.0 * s["N"] * s["H"] * s["V"],
        bytes=backward_bytes,
        shapes=head.SHAPES,
        providers=(
            Provider("ours", _ours_trained, OURS),
            plain_torch(_ours_trained, "linear_logprob"),
            Provider("torch.mm", partial(head.gemm_floor, passes=2), FLOOR, note="two GEMMs only"),
            *head_peers.providers(_trained, passes=2),
        ),
        dispatch="linear_logprob",
    ),
)
