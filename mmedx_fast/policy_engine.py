"""DeepSpeed around the trained parameters: gradients in, updates out, and a state that resumes bit
for bit.

LoRA parameters are float32 whatever the base's dtype, so they are their own master copy. Of a
bfloat16 model that is trained in full ZeRO holds float32 masters, and gradients add up in float32.
What is frozen never enters the optimizer. One update may take any number of backward passes:
``step`` is the boundary.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mmedx_fast.checkpoint import SavedTensors
from mmedx_fast.config import OptimizerConfig
from mmedx_fast.config_deepspeed import check_deepspeed
from mmedx_fast.policy_zero import (
    ClippedAdamW,
    Verdict,
    forget_backward,
    judge_norms,
    release_partitions,
)

logger = logging.getLogger(__name__)

_MOMENTS = ("exp_avg", "exp_avg_sq")
_BLOCK = re.compile(r".*?\.(layers|blocks)\.\d+\.")


def lr_factor(config: OptimizerConfig, total_steps: int) -> Callable[[int], float]:
    """Factor on the learning rate at update `step` (from 0): linear warm-up, then the chosen decay
    to 0."""
    warmup = math.ceil(config.warmup_ratio * total_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        if config.lr_scheduler_type == "linear":
            return 1.0 - progress
        if config.lr_scheduler_type == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        return 1.0

    return factor


def ensure_distributed(device: torch.device) -> None:
    """Join the launcher's process group, reuse one that exists, or make one of a single process.

    The single-process group lives in memory: no port, no file.
    """
    import deepspeed
    import torch.distributed as dist
    from deepspeed.comm import comm as ds_comm

    # Its shared-memory all-reduce is compiled on first use; gloo does the same without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not dist.is_initialized():
        if ds_comm.cdb is not None:
            # Something else (vLLM's shutdown) destroyed the group DeepSpeed had cached.
            from deepspeed.utils import groups

            ds_comm.cdb = None
            groups._release_process_group_references()
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(backend, verbose=False)


_borrowers = 0
"""Open engines that read a LOCAL_RANK of ours."""


def _lend_local_rank() -> None:
    """ZeRO-3 reads LOCAL_RANK in every forward. Without a launcher it is ours to set, and to take back:
    accelerate takes it for a launch of several processes."""
    global _borrowers
    if _borrowers or "LOCAL_RANK" not in os.environ:
        os.environ["LOCAL_RANK"] = "0"
        _borrowers += 1


def _take_local_rank_back() -> None:
    global _borrowers
    if _borrowers:
        _borrowers -= 1
        if not _borrowers:
            os.environ.pop("LOCAL_RANK", None)


def gathered(params: Sequence[nn.Parameter]) -> Any:
    """A context in which ZeRO-3 partitions of `params` are whole (all ranks enter it); else
    nothing."""
    partitioned = [p for p in params if hasattr(p, "ds_id")]
    if not partitioned:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned)


def by_block(params: Mapping[str, nn.Parameter]) -> Iterator[dict[str, nn.Parameter]]:
    """`params` in runs of one transformer block, or of one module outside the blocks: what may be whole
    at a time."""

    def block(name: str) -> str:
        found = _BLOCK.match(name)
        return found[0] if found else name.rpartition(".")[0]

    for _, run in itertools.groupby(params, key=block):
        yield {name: params[name] for name in run}


class Engine:
    """One DeepSpeed engine over `module`, stepping `params` (name -> parameter, all of one dtype)."""

    def __init__(
        self,
        module: nn.Module,
        params: Mapping[str, nn.Parameter],
        optimizer: OptimizerConfig,
        deepspeed_config: Mapping[str, Any],
        total_steps: int,
        device: torch.device,
    ) -> None:
        check_deepspeed(deepspeed_config)
        settings = dict(deepspeed_config)
        self.params = dict(params)
        self._mastered = any(p.dtype != torch.float32 for p in self.params.values())
        self.stage: int = settings.get("zero_optimization", {}).get("stage", 0)
        if self._mastered and self.stage == 0:
            # Stage 0 has no float32 masters; stage 1 is the same update, its optimizer state sharded.
            self.stage = 1
            settings["zero_optimization"] = {**settings.get("zero_optimization", {}), "stage": 1}
        self._factor = lr_factor(optimizer, total_steps)
        self._backwards = 0
        self._verdict = Verdict(optimizer.max_step_grad_norm)
        kwargs: dict[str, Any] = {
            "lr": optimizer.learning_rate,
            "weight_decay": optimizer.weight_decay,
        }
        trainable = list(self.params.values())
        basic: torch.optim.Optimizer
        if self.stage == 0:
            basic = ClippedAdamW(trainable, optimizer.max_grad_norm, self._verdict, **kwargs)
        else:
            basic = torch.optim.AdamW(trainable, **kwargs)
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(basic, self._factor)
        settings |= {
            "train_micro_batch_size_per_gpu": 1,
            "managed_gradient_accumulation": False,
            "gradient_clipping": 0.0 if self.stage == 0 else optimizer.max_grad_norm,
        }
        settings.setdefault("steps_per_print", 1 << 30)
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        ensure_distributed(device)
        self._basic = basic
        _lend_local_rank()
        try:
            self.engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=basic,
                model_parameters=trainable,
                lr_scheduler=self._scheduler,
                config=settings,
            )
            if self.stage > 0:
                judge_norms(self.engine.optimizer, self.stage, self._verdict)
            self._start_moments()
        except BaseException:
            _take_local_rank_back()
            raise

    def _start_moments(self) -> None:
        """Create Adam's state now (the first step would), so that it can be read and written any
        time."""
        zero = self.engine.optimizer
        stepped = [param for group in self._basic.param_groups for param in group["params"]]
        if self.stage == 3:
            # It hands the partitions to Adam one by one, in the step.
            stepped = list(zero.fp32_partitioned_groups_flat)
        for param in stepped:
            self._basic.state[param] = {
                "step": torch.tensor(0.0),
                **{moment: torch.zeros_like(param) for moment in _MOMENTS},
            }
        if self.stage in (1, 2):
            from deepspeed.utils import lazy_init_hp_params_optimizer_state

            for low, flat in zip(
                zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True
            ):
                lazy_init_hp_params_optimizer_state(low, flat, self._basic.state)

    @property
    def learning_rate(self) -> float:
        return float(self._basic.param_groups[0]["lr"])

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of a loss whose weights add up over rows and ranks."""
        # DeepSpeed averages over ranks; the weights are already shares of the global sum.
        self.backward_on(loss * self.engine.dp_world_size)

    def backward_on(self, loss: Tensor) -> None:
        """The rest of a backward that ended at a leaf, whose gradient is scaled already."""
        self.engine.backward(loss)
        self._backwards += 1

    @property
    def gathers_in_forward(self) -> bool:
        """Whether every rank must enter the same modules in a forward pass."""
        return self.stage == 3 and self.engine.dp_world_size > 1

    @property
    def reduces_in_backward(self) -> bool:
        """Whether every rank must make the same backward passes: below stage 2 gradients meet in the
        step."""
        return self.stage > 1 and self.engine.dp_world_size > 1

    def step(self, refuse: bool = False) -> dict[str, float]:
        """One update. A gradient norm that is not finite or above `max_step_grad_norm` leaves
        parameters and moments as they were, and so does `refuse` (on all ranks or none); the
        schedule counts the step all the same.

        Returns:
            grad_norm (before clipping; NaN where it is not finite or was refused), learning_rate,
            skipped (0 or 1).

        Raises:
            RuntimeError: no backward since the last step.
        """
        if not self._backwards:
            raise RuntimeError("step() without a backward: the step has no rows; skip it instead")
        rate = self.learning_rate
        applied = self._step(refuse)
        if not applied:
            self.skip()
        norm = self._verdict.norm if math.isfinite(self._verdict.norm) else math.nan
        return {"grad_norm": norm, "learning_rate": rate, "skipped": float(not applied)}

    def named_values(self) -> Iterator[tuple[str, Tensor]]:
        """Whole float32 parameters on the CPU, copied, gathered block by block. Every rank must go
        through all of them."""
        for block in by_block(self.params):
            yield from self._values(block)

    def _step(self, refuse: bool) -> bool:
        """Let DeepSpeed step or drop the gradients; whether it stepped."""
        self._verdict.refused, self._verdict.norm = refuse, math.nan
        try:
            self.engine.step()
        finally:
            self._verdict.refused = False
        if self.stage == 3:
            # Else a parameter that the first row of the next update does not use (the vision tower, for
            # a text row) keeps this update's gradient.
            self.engine.optimizer.grad_partitions_flat_buffer.zero_()
        self._backwards = 0
        return bool(self.engine.was_step_applied())

    def skip(self, steps: int = 1) -> None:
        """Let the schedule count steps that change nothing."""
        self._seek(self._scheduler.last_epoch + steps)

    def discard(self) -> None:
        """Drop the gradients so far, also those of a backward that was cut short by an error.

        For one process only: ranks that were cut short elsewhere wait in other collectives.
        """
        for param in self.params.values():
            param.grad = None
        self._backwards = 0
        if self.stage > 0:
            forget_backward(self.engine.optimizer, self.stage)
        if self.stage == 3:  # its step also takes the gathered parameters apart again
            self._step(refuse=True)

    def values(self) -> dict[str, Tensor]:
        """:meth:`named_values`, all at once."""
        return dict(self.named_values())

    def named_state(self) -> tuple[Iterator[tuple[str, Tensor]], dict[str, Any]]:
        """Parameters with Adam's moments (float32, on the CPU, block by block), and counters.

        Independent of the ZeRO stage. Every rank must go through all tensors.
        """
        steps = int(next(iter(self._basic.state.values()))["step"])
        meta = {"optimizer_step": steps, "scheduler_step": int(self._scheduler.last_epoch)}
        return self._state_tensors(), meta

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """:meth:`named_state`, all at once."""
        tensors, meta = self.named_state()
        return dict(tensors), meta

    def _state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for block in by_block(self.params):
            for name, value in self._values(block):
                yield f"param/{name}", value
            for name, param in block.items():
                for moment in _MOMENTS:
                    value = self._moment(param, moment)
                    yield f"{moment}/{name}", value.to("cpu", torch.float32, copy=True)

    def _values(self, block: Mapping[str, nn.Parameter]) -> list[tuple[str, Tensor]]:
        if self._mastered:
            return [(name, self._master(param)) for name, param in block.items()]
        with gathered(list(block.values())):
            return [
                (name, param.detach().to("cpu", torch.float32, copy=True))
                for name, param in block.items()
            ]

    def _master(self, param: nn.Parameter) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        whole = safe_get_full_fp32_param(param).detach().reshape(self._shape(param))
        return whole.to("cpu", torch.float32, copy=True)

    def _moment(self, param: nn.Parameter, moment: str) -> Tensor:
        if self.stage == 0:
            return self._basic.state[param][moment].detach()
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(param, moment).detach().reshape(self._shape(param))

    @staticmethod
    def _shape(param: nn.Parameter) -> torch.Size:
        return getattr(param, "ds_shape", param.shape)

    def load_state(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state` returned, on any ZeRO stage and number of ranks.

        Reads one tensor at a time.

        Raises:
            ValueError: a tensor or counter is missing, unknown or of another shape.
        """
        self._check_state(tensors, meta)
        for name, param in self.params.items():
            self._write(param, tensors[f"param/{name}"], None)
            for moment in _MOMENTS:
                self._write(param, tensors[f"{moment}/{name}"], moment)
        for entry in self._basic.state.values():
            entry["step"].fill_(float(meta["optimizer_step"]))
        self._seek(int(meta["scheduler_step"]))

    def _check_state(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        expected = {
            f"{kind}/{name}": self._shape(param)
            for name, param in self.params.items()
            for kind in ("param", *_MOMENTS)
        }
        wrong = sorted(expected.keys() ^ tensors.keys())
        if wrong:
            raise ValueError(
                f"the checkpoint's tensors do not fit what is trained: {len(wrong)} keys differ, such "
                f"as {wrong[0]!r}; it was made with other settings (lora, gba.finetuning_type or "
                "gba.freeze_vision_tower)"
            )
        for key, shape in expected.items():
            found = tensors.shape(key) if isinstance(tensors, SavedTensors) else tensors[key].shape
            if found != shape:
                raise ValueError(f"checkpoint tensor {key} is {tuple(found)}, need {tuple(shape)}")
        for key in ("optimizer_step", "scheduler_step"):
            if not isinstance(meta.get(key), int):
                raise ValueError(
                    f"the checkpoint's {key} must be an integer, got {meta.get(key)!r}"
                )

    def _write(self, param: nn.Parameter, value: Tensor, moment: str | None) -> None:
        value = value.to(param.device, torch.float32).contiguous()
        if self.stage == 0:
            target = param.data if moment is None else self._basic.state[param][moment]
            target.copy_(value)
            return
        if self.stage == 3:
            self._write_partition(param, value, moment)
        else:
            from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

            if moment is None:
                safe_set_full_fp32_param(param, value)
            else:
                safe_set_full_optimizer_state(param, value, moment)
        if moment is None:
            self.write_live(param, value)

    def _write_partition(self, param: nn.Parameter, value: Tensor, moment: str | None) -> None:
        """This rank's share of a master or moment; the last share may be padded, which DeepSpeed's own
        setter does not expect."""
        import torch.distributed as dist

        zero = self.engine.optimizer
        own, _ = zero._get_fp32_opt_state_partition(
            param, release_swap_buffers=False, optim_state_key=moment
        )
        size = own.numel()
        padded = nn.functional.pad(
            value.flatten(), (0, size * dist.get_world_size() - value.numel())
        )
        own.data.copy_(padded.narrow(0, size * dist.get_rank(), size))

    @staticmethod
    def write_live(param: nn.Parameter, value: Tensor) -> None:
        """Set the copy of a parameter that the forward reads."""
        if not hasattr(param, "ds_id"):
            param.data.copy_(value)
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([param], modifier_rank=0):
            param.data.copy_(value)

    def _seek(self, step: int) -> None:
        """Put the schedule where `step` updates leave it."""
        self._scheduler.last_epoch = step
        rates = [base * self._factor(step) for base in self._scheduler.base_lrs]
        for group, rate in zip(self._basic.param_groups, rates, strict=True):
            group["lr"] = rate
        self._scheduler._last_lr = rates

    def close(self) -> None:
        """Give back what the engine holds; another one can be made in this process."""
        self.engine.destroy()
        if self.stage == 3:
            release_partitions(self.engine)
        self._basic.state.clear()
        del self.engine, self._basic, self._scheduler
        self.params.clear()
        _take_local_rank_back()
