"""What is changed inside DeepSpeed's ZeRO optimizers, whose own ways step on NaN, cannot forget a backward that
was cut short, and keep memory after their end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


class Verdict:
    """Whether an update may be taken, given its gradient norm; all ranks see the same norm."""

    def __init__(self, limit: float | None) -> None:
        self.limit = math.inf if limit is None else limit
        self.refused = False
        """The caller has refused the update whatever its norm."""
        self.norm = math.nan
        """Of the update that was judged last, before clipping."""

    def accepts(self, norm: float) -> bool:
        self.norm = math.nan if self.refused else norm
        return not self.refused and math.isfinite(norm) and 0 <= norm <= self.limit


class ClippedAdamW(torch.optim.AdamW):
    """AdamW for ZeRO stage 0 that clips, reports the norm and skips a step that is not accepted.

    DeepSpeed's own clipping in float32 at stage 0 reports no norm and steps on NaN. The two
    attributes are those its engine reads from an optimizer.
    """

    overflow = False
    _global_grad_norm = 0.0

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        max_grad_norm: float,
        verdict: Verdict,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, **kwargs)
        self.max_grad_norm = max_grad_norm
        self._verdict = verdict

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        params = [p for group in self.param_groups for p in group["params"]]
        for param in params:
            if param.grad is None:  # no row used it: moments and decay go on, as under ZeRO
                param.grad = torch.zeros_like(param)
        norm = nn.utils.clip_grad_norm_(params, self.max_grad_norm).item()
        self._global_grad_norm, self.overflow = norm, not self._verdict.accepts(norm)
        if not self.overflow:
            super().step(closure)


def judge_norms(zero: Any, stage: int, verdict: Verdict) -> None:
    """Let `verdict` see the norm that a ZeRO optimizer is about to clip with.

    An infinite norm in its place makes the optimizer skip the step as for an overflow of its own:
    gradients dropped, parameters and moments as they were.
    """
    from deepspeed.runtime.utils import combine_grad_norm_groups

    name = "_get_norm_groups" if stage == 3 else "scaled_global_norm"
    measure = getattr(zero, name)

    def judged(*args: Any, **kwargs: Any) -> Any:
        if not verdict.refused:
            found = measure(*args, **kwargs)
            groups = found if stage == 3 else [found]
            if verdict.accepts(float(combine_grad_norm_groups(groups))):
                return found
        endless = torch.tensor(math.inf)
        return [endless] if stage == 3 else endless

    setattr(zero, name, judged)


def forget_backward(zero: Any, stage: int) -> None:
    """Put a ZeRO optimizer back to where it is after a step, from anywhere inside a backward.

    Its own step does so only for backward passes that came to their end.
    """
    hooks = zero._backward_hook_state
    hooks.backward_active_depth = 0
    hooks.reset_for_new_step()
    if stage == 3:
        for bucket in zero.ipg_buckets.values():
            bucket.clear_params()
        zero.params_already_reduced.update(dict.fromkeys(zero.params_already_reduced, False))
        zero.parameter_offload.release_backward_leftovers()
        return
    from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID

    for bucket in zero.ipg_buckets.values():
        bucket.clear()
    zero.params_already_reduced[:] = [False] * len(zero.params_already_reduced)
    zero.extra_large_param_to_reduce.clear()
    zero._release_ipg_buffers()
    zero.zero_grad(set_to_none=True)
    for gradients in (zero.averaged_gradients, zero.all_grad_tensors):
        gradients.update(dict.fromkeys(gradients))
    zero.micro_step_id = INITIAL_MICRO_STEP_ID


def release_partitions(engine: Any) -> None:
    """Free what ZeRO-3 keeps alive after `destroy` through contexts that refer to it, and give torch
    back its own `linear`, which ZeRO-3 replaces for the whole process."""
    from deepspeed.runtime.zero import parameter_offload, partition_parameters

    nn.functional.linear = partition_parameters.InsertPostInitMethodToModuleSubClasses.linear_bk
    module = engine.module
    vars(engine.optimizer).clear()
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [entry for entry in stack if entry is not module]
    for param in module.parameters():
        param.data = torch.empty(0, dtype=param.dtype, device=param.device)
        param.ds_tensor.data = torch.empty(0, dtype=param.dtype, device=param.device)
