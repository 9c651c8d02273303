"""The forward that ``model(..., labels=, fused_lm_head=True)`` takes: TRL's backbone and labels, our head.

TRL's GRPO trainers (1.16) score completions by that call. It runs inside every wrapper of the model (DDP, ZeRO,
FSDP, PEFT, autocast), so replacing the innermost forward is all that is needed.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmedx_fast.ops import head_weight, linear_logprob

MARK = "_mmedx_fused_head"


@dataclass(frozen=True)
class HeadSpec:
    """How hidden states become log-probs: logits = cap(hidden @ weight.T + bias) / temperature."""

    temperature: float
    softcap: float | None
    in_fp32: bool
    """Cast the hidden states to float32 and leave autocast (``cast_lm_head_to_fp32``)."""
    entropy: bool
    """False: entropies are not asked for (a reference model)."""
    entropy_grad: bool
    """True: an entropy bonus needs their gradient."""
    keep_bytes: int | None
    partitioned: bool
    """The parameters live under ZeRO-3."""


def logit_scale(text_config: Any) -> float:
    """What a configuration multiplies the logits by, before the cap; TRL's reading of it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        value = getattr(text_config, name, None)
        if value is not None:
            return value
    divisor = getattr(text_config, "logits_scaling", None)
    if divisor is None:
        return 1.0
    return divisor if text_config.model_type == "hyperclovax" else 1 / divisor


def attach(model: nn.Module, spec: HeadSpec) -> None:
    """Make our head answer ``fused_lm_head=True``; every other call goes to the forward found there."""
    stock: Any = model.forward
    if hasattr(stock, MARK):
        return

    # `generate` checks its arguments against the signature
    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return stock(*args, **kwargs)
        return _score(self, spec, args, kwargs)

    setattr(forward, MARK, spec)
    model.forward = types.MethodType(forward, model)


def attached(model: nn.Module) -> HeadSpec | None:
    """The specification our forward was attached with, or None."""
    return getattr(model.forward, MARK, None)


def _score(model: Any, spec: HeadSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from trl.trainer.utils import FusedCausalLMOutput

    labels, shifted = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
    count = kwargs.pop("num_items_in_batch", None)
    text_config = model.config.get_text_config()
    if getattr(text_config, "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    out = model.base_model(*args, **{**kwargs, "use_cache": False})
    hidden = out.last_hidden_state
    if shifted is None:
        hidden, shifted = hidden[:, :-1], labels[:, 1:]
    head = model.get_output_embeddings()
    device = next(head.parameters()).device
    hidden, shifted = hidden.to(device), shifted.to(device)
    mask = shifted != -100
    log_probs, entropy = _head(head, spec, hidden[mask], shifted[mask])
    log_probs, entropy = _spread(log_probs, mask), _spread(entropy, mask)
    loss = -log_probs.sum() / (mask.sum().clamp(min=1) if count is None else count)
    aux = _load_balance(model, out, text_config, kwargs)
    if aux is not None:
        loss = loss + getattr(text_config, "router_aux_loss_coef", 0.0) * aux
    return FusedCausalLMOutput(
        loss=loss, log_probs=log_probs, entropy=entropy, label_mask=mask, aux_loss=aux
    )


def _spread(values: Any, mask: Tensor) -> Any:
    """[N] values to where ``mask`` is True, zeros elsewhere; connected to the graph even for N = 0."""
    return None if values is None else values.new_zeros(mask.shape).masked_scatter(mask, values)


def _head(
    head: nn.Module, spec: HeadSpec, hidden: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Log-probs and entropies [N] of ``targets`` [N] after ``hidden`` [N, H]."""
    kind = hidden.device.type
    dtype = hidden.dtype
    if spec.in_fp32:
        dtype = torch.float32
    elif torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    with _gathered(head, spec):
        weight, bias = head_weight(head)
        return linear_logprob(
            hidden.to(dtype),
            _whole(weight).to(dtype),
            targets,
            bias=None if bias is None else _whole(bias).to(dtype),
            temperature=spec.temperature,
            softcap=spec.softcap,
            return_entropy=spec.entropy,
            entropy_grad=spec.entropy_grad,
            # what backward needs must not be the weight, which is gone by then
            keep_bytes=0 if spec.partitioned else spec.keep_bytes,
        )


@contextmanager
def _gathered(head: nn.Module, spec: HeadSpec) -> Iterator[None]:
    if not spec.partitioned:
        yield
        return
    from trl.trainer.utils import maybe_gather_lm_head_ctx

    with maybe_gather_lm_head_ctx(*head.parameters()):
        yield


def _whole(parameter: Tensor) -> Tensor:
    """FSDP2 shards parameters as DTensors; the gradient finds its way back."""
    from torch.distributed.tensor import DTensor

    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _load_balance(model: Any, out: Any, text_config: Any, kwargs: dict[str, Any]) -> Any:
    """A mixture of experts' auxiliary loss, where router logits were asked for."""
    if not kwargs.get("output_router_logits"):
        return None
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    return load_balancing_loss_func(
        out.router_logits,
        text_config.num_experts,
        text_config.num_experts_per_tok,
        kwargs.get("attention_mask"),
    )
