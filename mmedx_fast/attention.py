"""How a packed row attends: ``dense`` (a boolean mask, sdpa) or ``varlen`` (gathered keys, one
flash call).

Both compute the same thing: query q sees key k exactly when ``k <= q < end[k]``. ``dense`` runs
anywhere and costs T^2; ``varlen`` copies the keys of each segment's path from the root next to each
other and needs one
variable-length causal attention call, so it computes only the pairs that count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Backend = Literal["dense", "varlen"]
VarlenKernel = Callable[..., Any]
"""Signature of ``torch.nn.attention.varlen.varlen_attn``."""

# No "flash" in the name: transformers would take it for flash-attention and change the inputs.
VARLEN_NAME = "mmedx_tree_varlen"
IMPLEMENTATION = {"dense": "sdpa", "varlen": VARLEN_NAME}


def choose_backend(name: str, device: torch.device | str) -> Backend:
    """`auto` is dense on CPU and varlen on CUDA.

    Raises:
        ValueError: `flex` (not available), or a name that is no backend.
    """
    kind = torch.device(device).type
    if name == "auto":
        return "varlen" if kind == "cuda" else "dense"
    if name == "flex":
        raise ValueError(
            "model.attention = 'flex' is not available in this version: FlexAttention has no "
            "backward on CPU, and on CUDA 'varlen' computes exactly the pairs needed. Use 'auto', "
            "'dense' or 'varlen'"
        )
    if name not in IMPLEMENTATION:
        raise ValueError(f"model.attention = {name!r} is unknown; choose auto, dense or varlen")
    return name  # type: ignore[return-value]


def dense_mask(end: Tensor) -> Tensor:
    """Boolean mask [1, 1, T, T] from `end` [T]: True where the query (row) sees the key
    (column)."""
    position = torch.arange(len(end), device=end.device)
    query, key = position[:, None], position[None, :]
    return ((key <= query) & (query < end[None, :]))[None, None]


@dataclass(frozen=True)
class TreeVarlen:
    """What one varlen call over a row needs. Sequences are the row's segments."""

    kv_index: Tensor
    """[gathered keys] int64: for each segment its path from the root, itself last."""
    cu_q: Tensor  # [S + 1] int32
    cu_k: Tensor  # [S + 1] int32
    max_q: int
    max_k: int
    kernel: VarlenKernel


def plan_varlen(
    segments: Sequence[tuple[int, int, int]],
    device: torch.device | str,
    kernel: VarlenKernel | None = None,
) -> TreeVarlen:
    """Gather indices and sequence bounds from (start, length, parent) of every segment in row
    order.

    Args:
        kernel: null is torch's ``varlen_attn`` on CUDA and :func:`segment_attention` on CPU.
    """
    paths: list[list[range]] = []
    for start, length, parent in segments:
        above = paths[parent] if parent >= 0 else []
        paths.append([*above, range(start, start + length)])
    lengths_q = torch.tensor([length for _, length, _ in segments], dtype=torch.int32)
    lengths_k = torch.tensor([sum(map(len, path)) for path in paths], dtype=torch.int32)
    pieces = [torch.arange(run.start, run.stop) for path in paths for run in path]
    return TreeVarlen(
        kv_index=torch.cat(pieces).to(device),
        cu_q=_cumulative(lengths_q).to(device),
        cu_k=_cumulative(lengths_k).to(device),
        max_q=int(lengths_q.max()),
        max_k=int(lengths_k.max()),
        kernel=kernel or _kernel_for(torch.device(device)),
    )


def _cumulative(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _kernel_for(device: torch.device) -> VarlenKernel:
    if device.type == "cpu":
        return segment_attention  # torch's varlen_attn is CUDA only
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


def segment_attention(
    query: Tensor,  # [Q, heads, D]
    key: Tensor,  # [K, key heads, D]
    value: Tensor,  # [K, key heads, D]
    cu_q: Tensor,  # [S + 1]
    cu_k: Tensor,  # [S + 1]
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, 0),
    enable_gqa: bool = False,
) -> Tensor:
    """``varlen_attn`` with a causal window on a CPU: one sdpa call per segment; [Q, heads, D]."""
    if window_size != (-1, 0):
        raise ValueError(f"segment_attention is causal; window_size {window_size} is not (-1, 0)")
    out = []
    ends_q, ends_k = cu_q.tolist(), cu_k.tolist()
    for q0, q1, k0, k1 in zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False):
        q, k, v = (x.transpose(0, 1)[None] for x in (query[q0:q1], key[k0:k1], value[k0:k1]))
        n_q, n_k = q1 - q0, k1 - k0
        square = n_q == n_k
        # sdpa's own causal flag aligns at the top left, so it serves square blocks only.
        mask = None
        if not square:
            mask = torch.ones(n_q, n_k, dtype=torch.bool, device=q.device).tril(n_k - n_q)
        attended = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=square, scale=scale, enable_gqa=enable_gqa
        )
        out.append(attended[0].transpose(0, 1))
    return torch.cat(out)


class _GatherRows(torch.autograd.Function):
    """``source[index]`` along dim 0 whose backward adds up in float32.

    A shared key is gathered once per segment below it; adding those gradients in bfloat16 would
    double the rounding error of the prefix.
    """

    @staticmethod
    def forward(ctx: Any, source: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = source.shape[0]
        return source.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (index,) = ctx.saved_tensors
        wide = grad.dtype if grad.dtype == torch.float64 else torch.float32
        total = torch.zeros((ctx.rows, *grad.shape[1:]), dtype=wide, device=grad.device)
        total.index_add_(0, index, grad.to(wide))
        return total.to(grad.dtype), None


def gather_rows(source: Tensor, index: Tensor) -> Tensor:
    """``source[index]`` [n, ...] along dim 0; gradients of repeated rows are summed in float32."""
    return _GatherRows.apply(source, index)


def tree_varlen_attention(
    module: torch.nn.Module,
    query: Tensor,  # [1, query heads, T, D]
    key: Tensor,  # [1, key heads, T, D]
    value: Tensor,  # [1, key heads, T, D]
    attention_mask: Tensor | None,
    *,
    tree_varlen: TreeVarlen | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function transformers calls under :data:`VARLEN_NAME`; returns [1, T, heads,
    D].

    Raises:
        ValueError: called without a plan (an ordinary batch under this implementation), with a
            mask, with dropout, or with more than one row.
    """
    if tree_varlen is None:
        raise ValueError(
            f"attention {VARLEN_NAME!r} serves packed rows only; set sdpa for other batches"
        )
    if attention_mask is not None or dropout or query.shape[0] != 1:
        raise ValueError(
            f"attention {VARLEN_NAME!r} takes one packed row without mask or dropout, got "
            f"batch {query.shape[0]}, mask {attention_mask is not None}, dropout {dropout}"
        )
    plan = tree_varlen
    out = plan.kernel(
        query[0].transpose(0, 1),
        gather_rows(key[0].transpose(0, 1), plan.kv_index),
        gather_rows(value[0].transpose(0, 1), plan.kv_index),
        plan.cu_q,
        plan.cu_k,
        plan.max_q,
        plan.max_k,
        window_size=(-1, 0),  # causal, aligned at the bottom right: the last query sees every key
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.unsqueeze(0), None


def register() -> None:
    """Make :data:`VARLEN_NAME` known to transformers; safe to call again."""
    from transformers import AttentionInterface

    AttentionInterface.register(VARLEN_NAME, tree_varlen_attention)


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
    kernel: VarlenKernel | None,
) -> dict[str, Any]:
    """Keyword arguments with which the text model's forward attends as the row's tree says."""
    if backend == "dense":
        return {"attention_mask": dense_mask(end)}
    return {"attention_mask": None, "tree_varlen": plan_varlen(segments, end.device, kernel)}
