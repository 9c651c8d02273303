"""Tree attention as one variable-length call: a sequence per segment, its keys gathered along the
path from the root, so that only the pairs that count are computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

VarlenKernel = Callable[..., Any]
"""Signature of ``torch.nn.attention.varlen.varlen_attn``."""
FlashKernel = Callable[..., Any]
"""Signature of ``flash_attn.flash_attn_varlen_func``."""


@dataclass(frozen=True)
class TreeVarlen:
    """What one varlen call over a row needs. Sequences are the row's segments."""

    kv_index: Tensor
    """[gathered keys] int64: for each segment its path from the root, itself last."""
    cu_q: Tensor  # [S + 1] int32
    cu_k: Tensor  # [S + 1] int32
    max_q: int
    max_k: int
    kernel: VarlenKernel | FlashKernel

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """[1, heads, T, D] and twice [1, key heads, T, D] -> [1, T, heads, D]."""
        q = query[0].transpose(0, 1)
        k, v = (gather_rows(x[0].transpose(0, 1), self.kv_index) for x in (key, value))
        return self._call(q, k, v, scale).unsqueeze(0)

    def _call(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        return self.kernel(
            *(q, k, v, self.cu_q, self.cu_k, self.max_q, self.max_k),
            # Causal, aligned at the bottom right: the last query sees every key.
            window_size=(-1, 0),
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )


class TreeFlash(TreeVarlen):
    """The same with a kernel of flash-attn's signature: its causal mask (2.1 and later) is aligned at
    the bottom right, its heads are grouped unasked."""

    def _call(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        return self.kernel(
            *(q, k, v, self.cu_q, self.cu_k, self.max_q, self.max_k),
            softmax_scale=scale,
            causal=True,
            # torch's own kernels follow this switch unasked.
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )


def plan_varlen(
    segments: Sequence[tuple[int, int, int]],
    device: torch.device | str,
    kernel: VarlenKernel | None = None,
) -> TreeVarlen:
    """Gather indices and sequence bounds from (start, length, parent) of every segment in row
    order.

    Args:
        kernel: null is torch's ``varlen_attn``, which is for CUDA only.
    """
    return TreeVarlen(
        **_geometry(segments, torch.device(device)), kernel=kernel or _varlen_kernel()
    )


def plan_flash(
    segments: Sequence[tuple[int, int, int]],
    device: torch.device | str,
    kernel: FlashKernel | None = None,
) -> TreeFlash:
    """As :func:`plan_varlen` for flash-attn's kernel, which takes float16 and bfloat16 on CUDA."""
    return TreeFlash(**_geometry(segments, torch.device(device)), kernel=kernel or _flash_kernel())


def _geometry(segments: Sequence[tuple[int, int, int]], device: torch.device) -> dict[str, Any]:
    paths: list[list[range]] = []
    for start, length, parent in segments:
        above = paths[parent] if parent >= 0 else []
        paths.append([*above, range(start, start + length)])
    lengths_q = torch.tensor([length for _, length, _ in segments], dtype=torch.int32)
    lengths_k = torch.tensor([sum(map(len, path)) for path in paths], dtype=torch.int32)
    pieces = [torch.arange(run.start, run.stop) for path in paths for run in path]
    return {
        "kv_index": torch.cat(pieces).to(device),
        "cu_q": _cumulative(lengths_q).to(device),
        "cu_k": _cumulative(lengths_k).to(device),
        "max_q": int(lengths_q.max()),
        "max_k": int(lengths_k.max()),
    }


def _cumulative(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _varlen_kernel() -> VarlenKernel:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


def _flash_kernel() -> FlashKernel:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func


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
