"""train_step: the update of one question's rollouts, packed as a tree, as plain rows, and TRL's."""

from __future__ import annotations

from functools import partial

import torch

from bench import step
from bench.registry import FLOOR, OURS, Bound, Call, Op, Provider, Sizes
from bench.step import StepInputs
from bench.step_trl import trl_call


def _ours(x: StepInputs) -> Call:
    """Attention over the pairs that count; a GPU's kernel for it takes no float32."""
    half = x.base.lm_head.weight.dtype != torch.float32
    return step.tree_call(x, "varlen" if half or x.ids.device.type == "cpu" else "dense")


def _plain(x: StepInputs, micro: int, ours: bool = False) -> Call:
    return step.plain_call(x, micro or len(x.ids), ours)


def _no_fours(sizes: Sizes) -> str | None:
    return "the rollouts are no multiple of 4" if sizes["K"] * sizes["n"] % 4 else None


TRL = ("trl", "datasets")
# A bfloat16 model is compared with its own plain rows: both round, in different orders.
BOUNDS = {
    "loss": Bound("absolute", 2e-2, exact=1e-5),
    "d_adapter": Bound("relative", 0.15, exact=1e-4),
}
OPS = (
    Op(
        name="train_step",
        title="forward and backward of one question's rollouts, LoRA, policy loss",
        inputs=step.inputs,
        reference=step.reference,
        bounds=BOUNDS,
        flops=step.flops,
        bytes=step.moved,
        shapes=step.SHAPES,
        providers=(
            Provider("ours", _ours, OURS, note="one packed row, only the pairs that count"),
            Provider("torch.mm", step.gemm_call, FLOOR, note="the tree's GEMMs only"),
            Provider(
                "ours, dense mask", partial(step.tree_call, backend="dense"), note="one packed row"
            ),
            Provider("plain rows", partial(_plain, micro=0), note="all rollouts in a batch"),
            Provider(
                "plain rows, our layers",
                partial(_plain, micro=0, ours=True),
                note="all rollouts in a batch; the tree alone is what sets ours apart",
            ),
            Provider("plain rows by 4", partial(_plain, micro=4), lacking=_no_fours),
            Provider("plain rows by 1", partial(_plain, micro=1)),
            Provider("TRL GRPO", trl_call, needs=TRL, note="all rollouts in a batch"),
            Provider("TRL GRPO by 4", partial(trl_call, micro=4), needs=TRL, lacking=_no_fours),
            Provider(
                "TRL GRPO, vLLM",
                partial(trl_call, old_pass=True),
                needs=TRL,
                note="with the old log-prob pass it makes when vLLM samples",
            ),
        ),
        dispatch="linear_policy_loss",
        saving=lambda x: x.model.parameters(),
        process_time=True,
    ),
)
