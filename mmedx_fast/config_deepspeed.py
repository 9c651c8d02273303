"""What the ``deepspeed`` settings may hold. DeepSpeed itself reads no key that it does not know, and says nothing."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

OWNED = {
    "optimizer": "the optimizer section of the stage",
    "scheduler": "the optimizer section of the stage",
    "gradient_clipping": "optimizer.max_grad_norm",
    "bf16": "model.dtype",
    "bfloat16": "model.dtype",
    "fp16": "model.dtype",
    "train_batch_size": "questions_per_step",
    "train_micro_batch_size_per_gpu": "questions_per_step",
    "gradient_accumulation_steps": "questions_per_step",
    "managed_gradient_accumulation": "questions_per_step",
}
"""Keys that another part of the configuration decides."""

REFUSED = {
    "sequence_parallel_size": "a row's tokens stay on one rank here",
    "tensor_parallel": "the model's layers are split by ZeRO alone here",
}
"""Keys that DeepSpeed reads and that would change what a rank holds, with what is so instead."""

KNOWN = frozenset(
    """activation_checkpointing aio amp autotuning checkpoint comet comms_logger communication_data_type
    compile compression_training csv_monitor curriculum_learning data_efficiency data_types
    dataloader_drop_last datastates_ckpt disable_allgather disable_python_gc dump_state eigenvalue
    elasticity expert_parallel flops_profiler gradient_allreduce_op gradient_predivide_factor
    graph_harvesting hybrid_engine log_level memory_breakdown nebula pipeline prescale_gradients
    progressive_layer_drop quantize_training seq_parallel_communication_data_type sparse_attention
    sparse_gradients steps_per_print tensorboard timers torch_autocast
    use_data_before_expert_parallelism vocabulary_size wall_clock_breakdown wandb weight_quantization
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization""".split()
)
"""The other top-level keys that DeepSpeed reads."""

_ZERO_FLAGS = ("contiguous_gradients", "overlap_comm")
_ZERO_COUNTS = ("reduce_bucket_size", "stage3_max_live_parameters")


def check_deepspeed(settings: Mapping[str, Any]) -> None:
    """Raises ValueError for a key that is unknown or decided elsewhere, and for a ZeRO setting of ours to
    read that has another type."""
    for key in settings:
        if key in OWNED:
            raise ValueError(
                f"deepspeed.{key} is decided by {OWNED[key]}; remove it from the DeepSpeed settings"
            )
        if key in REFUSED:
            raise ValueError(
                f"deepspeed.{key} is not supported: {REFUSED[key]}; remove it from the DeepSpeed settings"
            )
        if key not in KNOWN:
            close = difflib.get_close_matches(str(key), KNOWN, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {sorted(KNOWN)}"
            raise ValueError(f"deepspeed.{key}: unknown key, which DeepSpeed would ignore; {hint}")
    _check_zero(settings.get("zero_optimization", {}))


def _check_zero(zero: Any) -> None:
    """DeepSpeed refuses unknown keys in here by itself."""
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    if type(stage) is not int or not 0 <= stage <= 3:
        raise ValueError(
            "deepspeed.zero_optimization needs a stage from 0 to 3, such as {stage: 2}; got "
            f"{zero!r}"
        )
    for key in _ZERO_FLAGS:
        if not isinstance(zero.get(key, False), bool | None):
            raise ValueError(
                f"deepspeed.zero_optimization.{key} must be true or false, got {zero[key]!r}"
            )
    for key in _ZERO_COUNTS:
        value = zero.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise ValueError(
                f"deepspeed.zero_optimization.{key} must be a number of elements, got {value!r}"
            )
