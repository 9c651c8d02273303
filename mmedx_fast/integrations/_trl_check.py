"""What must hold for our head to give what TRL's gives; every refusal names its reason and the remedy."""

from __future__ import annotations

from typing import Any

from torch import nn

from mmedx_fast.integrations._trl_head import HeadSpec, logit_scale
from mmedx_fast.ops import head_weight

KEEP = "or keep TRL's own head (do not call use_fused_head; GuidelineGRPOTrainer(fused_head=False))"


def check_trainer(trainer: Any) -> None:
    """Refuse trainers and settings with which our forward would be wrong or never called."""
    from trl import GRPOTrainer

    if not isinstance(trainer, GRPOTrainer):
        raise TypeError(f"use_fused_head takes a trl.GRPOTrainer, not {type(trainer).__name__}")
    hook = "_get_per_token_logps_and_entropies"
    if getattr(type(trainer), hook) is not getattr(GRPOTrainer, hook):
        raise ValueError(
            f"{type(trainer).__name__} overrides {hook}, so that its model may never be called with "
            f"fused_lm_head=True and our head would have no effect: remove the override, {KEEP}"
        )
    if trainer.args.use_liger_kernel:
        raise ValueError(
            "use_liger_kernel=True replaces forwards of the model when training begins, this head's among "
            f"them: set use_liger_kernel=False, {KEEP}"
        )
    if trainer.is_fsdp_enabled and _fsdp_version(trainer) != 2:
        raise ValueError(
            "fsdp_version=1 flattens the head's weight into a parameter that this head cannot read: set "
            f"fsdp_version=2 in the FSDP configuration, {KEEP}"
        )


def _fsdp_version(trainer: Any) -> int:
    return int(getattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", 1))


def language_model(model: Any) -> Any:
    """The model whose forward TRL calls with ``fused_lm_head=True``: what a PEFT wrapper is around."""
    from accelerate.utils import is_peft_model

    inner = model.get_base_model() if is_peft_model(model) else model
    name = type(inner).__name__
    if getattr(inner, "base_model", inner) is inner:
        raise ValueError(
            f"{name} has no backbone apart from its head (base_model is the model itself): give a model "
            f"of the transformers library with a language-model head, {KEEP}"
        )
    head = getattr(inner, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Module):
        raise ValueError(
            f"{name}.get_output_embeddings() gives no module: it has no language-model head to fuse; give a "
            f"causal language model, {KEEP}"
        )
    return inner


def head_spec(trainer: Any, model: Any, policy: bool, keep_bytes: int | None) -> HeadSpec:
    """The head of ``model``, the trained one (``policy``) or the reference."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    args, head = trainer.args, model.get_output_embeddings()
    bonus = bool(trainer._entropy_bonus_enabled)
    partitioned = bool(trainer.is_deepspeed_enabled and is_deepspeed_zero3_enabled())
    _check_weight(type(model).__name__, head, partitioned)
    trained = any(p.requires_grad for p in head.parameters())
    if partitioned and policy and (trained or bonus):
        reason = (
            "entropy_coef or use_adaptive_entropy" if bonus else "a trained (not frozen) lm_head"
        )
        raise ValueError(
            f"{reason} under ZeRO stage 3 needs the head's weight again in backward, where it is partitioned: "
            f"use ZeRO stage 2, train LoRA adapters without an entropy bonus, {KEEP}"
        )
    scale, softcap = _scale_and_cap(model)
    return HeadSpec(
        # cap(scale z) / T = cap'(z) / T' with cap' = cap / scale and T' = T / scale
        temperature=trainer.temperature / scale,
        softcap=None if softcap is None else softcap / scale,
        in_fp32=bool(args.cast_lm_head_to_fp32),
        entropy=policy,
        entropy_grad=bonus,
        keep_bytes=keep_bytes,
        partitioned=partitioned,
    )


def _check_weight(name: str, head: nn.Module, partitioned: bool) -> None:
    if partitioned:
        return
    try:
        weight, _ = head_weight(head)
    except ValueError as error:
        raise ValueError(f"{name}: {error}, {KEEP}") from error
    if not weight.is_floating_point():
        raise ValueError(
            f"{name}'s head holds {weight.dtype} (it is quantised): leave it out of the quantisation "
            f"(llm_int8_skip_modules=['lm_head']), {KEEP}"
        )


def _scale_and_cap(model: Any) -> tuple[float, float | None]:
    config = model.config.get_text_config()
    scale, softcap = logit_scale(config), getattr(config, "final_logit_softcapping", None)
    for option, value in (("logit_scale", scale), ("final_logit_softcapping", softcap)):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and value > 0):
            raise ValueError(
                f"{type(model).__name__}'s configuration has {option}={value!r}, and this head takes positive "
                f"numbers only: {KEEP}"
            )
    return float(scale), None if softcap is None else float(softcap)
