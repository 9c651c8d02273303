"""How a packed row attends, behind one interface. Every backend computes the same thing: query q
sees key k exactly when ``k <= q < end[k]``.

- ``dense``: a boolean mask and sdpa; runs anywhere, costs T^2.
- ``varlen``: the keys of each segment's path from the root are copied next to each other, then one
  causal variable-length call (torch's, on CUDA) computes only the pairs that count. On a CPU, where torch has
  no such call, two calls a segment compute them and copy nothing.
- ``flash``: the same with flash-attn's kernel.
- ``flex``: FlexAttention over blocks of pairs; copies nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from mmedx_fast.attention_flex import compile_switched_off, plan_flex
from mmedx_fast.attention_spans import plan_spans
from mmedx_fast.attention_varlen import gather_rows, plan_flash, plan_varlen

__all__ = [
    "IMPLEMENTATION",
    "TREE_NAME",
    "Backend",
    "Kernel",
    "TreePlan",
    "choose_backend",
    "dense_mask",
    "forward_arguments",
    "gather_rows",
    "plan_row",
    "register",
    "set_backend",
    "tree_attention",
]

Backend = Literal["dense", "varlen", "flash", "flex"]
Kernel = Callable[..., Any]
"""Takes the place of a backend's kernel and has its signature: ``varlen_attn``,
``flash_attn_varlen_func`` or ``flex_attention``."""

# No "flash" in the name: transformers would take it for flash-attention and change the inputs.
TREE_NAME = "mmedx_tree"
IMPLEMENTATION = {"dense": "sdpa", "varlen": TREE_NAME, "flash": TREE_NAME, "flex": TREE_NAME}


class TreePlan(Protocol):
    """How the tokens of one row attend, for every layer alike."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """[1, heads, T, D] and twice [1, key heads, T, D] -> [1, T, heads, D]."""


def choose_backend(
    name: str, device: torch.device | str, dtype: torch.dtype, kernel: Kernel | None = None
) -> Backend:
    """`auto` is varlen: on CUDA, and on a CPU too, where dense is as fast in rows of 500 tokens and falls
    behind from there (at 4,000 it takes over three times as long). A float32 model on CUDA gets dense, since
    varlen's kernel takes 16 bits only; flex compiles, and in float32 its backward may ask for more
    shared memory than a GPU has.

    Args:
        dtype: the model's.
        kernel: what will take the place of the backend's own kernel; what that one needs is then
            not asked for.

    Raises:
        ValueError: the backend cannot run here, or the name is no backend.
    """
    kind = torch.device(device).type
    if name == "auto":
        return "dense" if kernel is None and _too_wide(kind, dtype) else "varlen"
    if name not in get_args(Backend):
        choices = ", ".join(("auto", *get_args(Backend)))
        raise ValueError(f"model.attention = {name!r} is unknown; choose one of {choices}")
    missing = _missing(name, kind, dtype) if kernel is None else None
    if missing:
        raise ValueError(f"model.attention = {name!r} {missing}, or set model.attention=auto")
    return name  # type: ignore[return-value]


def _too_wide(device: str, dtype: torch.dtype) -> bool:
    """Whether flash attention's kernels, torch's own copy too, refuse the dtype."""
    return device == "cuda" and dtype not in (torch.float16, torch.bfloat16)


def _missing(name: str, device: str, dtype: torch.dtype) -> str | None:
    """Why a backend's own kernel cannot run on that kind of device, with the remedy."""
    if name in ("varlen", "flash") and _too_wide(device, dtype):
        found = str(dtype).removeprefix("torch.")
        return (
            f"takes float16 and bfloat16 on CUDA and the model is {found}: set model.dtype: bfloat16 or "
            "model.attention: dense"
        )
    if name == "flash":
        if device != "cuda":
            return f"needs a CUDA device and this is {device}: use varlen"
        if find_spec("flash_attn") is None:
            install = "pip install --no-build-isolation 'mmedx-fast[flash]'"
            return f"needs flash-attn, which is not installed: {install}"
    if name == "flex":
        if device != "cuda":
            return f"has no backward on {device}: use varlen"
        if switch := compile_switched_off():
            return f"needs torch.compile, which {switch}=1 turns off: unset it"
    return None


def dense_mask(end: Tensor) -> Tensor:
    """Boolean mask [1, 1, T, T] from `end` [T]: True where the query (row) sees the key
    (column)."""
    position = torch.arange(len(end), device=end.device)
    query, key = position[:, None], position[None, :]
    return ((key <= query) & (query < end[None, :]))[None, None]


def plan_row(
    backend: Backend,
    end: Tensor,
    segments: Sequence[tuple[int, int, int]],
    kernel: Kernel | None = None,
) -> TreePlan:
    """The plan of a row for a backend other than ``dense``, which needs only its mask."""
    if backend == "varlen" and kernel is None and end.device.type == "cpu":
        return plan_spans(segments)
    if backend == "varlen":
        return plan_varlen(segments, end.device, kernel)
    if backend == "flash":
        return plan_flash(segments, end.device, kernel)
    if backend == "flex":
        return plan_flex(end, kernel)
    raise ValueError(f"attention {backend!r} has no plan")


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,  # [1, query heads, T, D]
    key: Tensor,  # [1, key heads, T, D]
    value: Tensor,  # [1, key heads, T, D]
    attention_mask: Tensor | None,
    *,
    tree_plan: TreePlan | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function transformers calls under :data:`TREE_NAME`; returns [1, T, heads, D].

    Raises:
        ValueError: called without a plan (an ordinary batch under this implementation), with a
            mask, with dropout, or with more than one row.
    """
    if tree_plan is None:
        raise ValueError(
            f"attention {TREE_NAME!r} serves packed rows only; set sdpa for other batches"
        )
    if attention_mask is not None or dropout or query.shape[0] != 1:
        raise ValueError(
            f"attention {TREE_NAME!r} takes one packed row without mask or dropout, got "
            f"batch {query.shape[0]}, mask {attention_mask is not None}, dropout {dropout}"
        )
    return tree_plan.attend(query, key, value, scaling), None


def register() -> None:
    """Make :data:`TREE_NAME` known to transformers; safe to call again."""
    from transformers import AttentionInterface

    AttentionInterface.register(TREE_NAME, tree_attention)


def set_backend(model: Any, backend: Backend) -> None:
    """Set the text model's attention; the vision tower always runs sdpa.

    One name for both would hand the tree's arguments to the vision tower, which is silently wrong.
    """
    register()
    model.set_attn_implementation({"text_config": IMPLEMENTATION[backend], "vision_config": "sdpa"})


def forward_arguments(
    backend: Backend,
    end: Tensor,
    segments: Sequence[tuple[int, int, int]],
    kernel: Kernel | None,
) -> dict[str, Any]:
    """Keyword arguments with which the text model's forward attends as the row's tree says."""
    if backend == "dense":
        return {"attention_mask": dense_mask(end)}
    return {"attention_mask": None, "tree_plan": plan_row(backend, end, segments, kernel)}
