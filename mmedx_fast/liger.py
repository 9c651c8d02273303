"""Liger's fused RMSNorm, SwiGLU and RoPE in the language model of a Qwen2-VL / Qwen2.5-VL.

Liger's own ``apply_liger_kernel_to_qwen2_5_vl`` replaces a multimodal RoPE function that transformers
5.19 no longer has: there the rotary embedding mixes the three position axes into one cos and sin, and
attention applies them as to any text model, so Liger's ordinary RoPE takes its place. Positions of a
packed row restart along its branches, which cos and sin [1, T, D] carry token by token.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn


def choose_liger(setting: bool | Literal["auto"], device: torch.device | str) -> bool:
    """Whether to use Liger: ``auto`` on CUDA where it is installed.

    Raises:
        ValueError: it is asked for and cannot run here; the message says what to do.
    """
    cuda, installed = torch.device(device).type == "cuda", find_spec("liger_kernel") is not None
    if setting == "auto":
        return cuda and installed
    if setting and not cuda:
        raise ValueError(
            "model.use_liger_kernel = true needs a CUDA device; set model.use_liger_kernel=auto"
        )
    if setting and not installed:
        raise ValueError(
            "model.use_liger_kernel = true needs liger-kernel, which is not installed: "
            "pip install 'mmedx-fast[cuda]', or set model.use_liger_kernel=auto"
        )
    return setting


def apply_liger(base: Any) -> None:
    """Patch the language model of ``base`` (a transformers model), and RoPE of its architecture.

    The vision tower stays as it is: frozen, it runs once a question and step.
    """
    text = base.model.language_model
    for layer in text.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            _patch(norm, _rms_norm)
        _patch(layer.mlp, _swiglu)
    _patch(text.norm, _rms_norm)
    _patch_rotary(sys.modules[type(text).__module__])


def _patch(module: nn.Module, forward: Any) -> None:
    module.forward = MethodType(forward, module)


def _rms_norm(self: Any, hidden: Tensor) -> Tensor:
    from liger_kernel.ops import LigerRMSNormFunction

    # offset 0, statistics in float32 as transformers does, the gradient written over the incoming one.
    return LigerRMSNormFunction.apply(
        hidden, self.weight, self.variance_epsilon, 0.0, "llama", True, None
    )


def _swiglu(self: Any, hidden: Tensor) -> Tensor:
    from liger_kernel.ops import LigerSiLUMulFunction

    return self.down_proj(LigerSiLUMulFunction.apply(self.gate_proj(hidden), self.up_proj(hidden)))


def _patch_rotary(modeling: Any) -> None:
    original = modeling.apply_rotary_pos_emb
    if getattr(original, "is_liger", False):
        return

    def rotary(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        # The name is the architecture's: a model on the CPU of this process reaches it too.
        if not q.is_cuda:
            return original(q, k, cos, sin, unsqueeze_dim)
        from liger_kernel.transformers.rope import liger_rotary_pos_emb

        return liger_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)

    rotary.is_liger = True  # type: ignore[attr-defined]
    modeling.apply_rotary_pos_emb = rotary
