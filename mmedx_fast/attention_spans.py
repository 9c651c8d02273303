"""Tree attention on a CPU: nothing is gathered, and no pair that does not count is computed.

In depth-first order the descendants of a segment are one contiguous span. So a segment takes part in
two calls: its queries on its own keys, causal, and its descendants' queries on its keys, all of
them. The parts of a query's output are joined with their log-sum-exps, and in the backward each call gets
the joined output and log-sum-exp, which makes its share of the gradient the exact one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# What sdpa itself runs on a CPU; the public function keeps the log-sum-exp to itself.
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class TreeSpans:
    """The segments of a row: (start, one past the last token, one past the last descendant)."""

    segments: tuple[tuple[int, int, int], ...]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """[1, heads, T, D] and twice [1, key heads, T, D] -> [1, T, heads, D].

        Any float dtype; parts are joined in float32 at least. Kept for backward: the three inputs,
        the output, and a log-sum-exp per query and head.
        """
        return _SpanAttention.apply(query, key, value, self, scale)

    def calls(self) -> Iterator[tuple[slice, slice, bool]]:
        """(queries, keys, causal) of every call. A query's causal call comes before its others."""
        for start, stop, _ in self.segments:
            yield slice(start, stop), slice(start, stop), True
        for start, stop, end in self.segments:
            if end > stop:
                yield slice(stop, end), slice(start, stop), False


def plan_spans(segments: Sequence[tuple[int, int, int]]) -> TreeSpans:
    """From (start, length, parent) of every segment in row order."""
    ends = [start + length for start, length, _ in segments]
    for index in reversed(range(len(segments))):
        parent = segments[index][2]
        if parent >= 0:
            ends[parent] = max(ends[parent], ends[index])
    bounds = zip(segments, ends, strict=True)
    return TreeSpans(tuple((start, start + length, end) for (start, length, _), end in bounds))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _SpanAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, tree: TreeSpans, scale: float | None
    ) -> Tensor:
        _, heads, tokens, width = query.shape
        wide = _wide(query.dtype)
        joined = query.new_empty((1, tokens, heads, width), dtype=wide)
        out, lse = joined.transpose(1, 2), query.new_empty((1, heads, tokens), dtype=wide)
        for q, k, causal in tree.calls():
            part, part_lse = _forward(
                *(query[:, :, q], key[:, :, k], value[:, :, k], 0.0, causal), scale=scale
            )
            if causal:
                out[:, :, q], lse[:, :, q] = part, part_lse
                continue
            share = torch.sigmoid(part_lse - lse[:, :, q])
            out[:, :, q].lerp_(part.to(wide), share[..., None])
            torch.logaddexp(lse[:, :, q], part_lse, out=lse[:, :, q])
        joined = joined.to(query.dtype)
        ctx.save_for_backward(query, key, value, joined, lse)
        ctx.tree, ctx.scale = tree, scale
        return joined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, joined, lse = ctx.saved_tensors
        # The kernel takes no expanded gradient, as that of a sum is.
        grad, out = grad.contiguous().transpose(1, 2), joined.transpose(1, 2)
        wide = _wide(query.dtype)
        totals = [_like(x, wide) for x in (query, key, value)]
        for q, k, causal in ctx.tree.calls():
            parts = _backward(
                *(grad[:, :, q], query[:, :, q], key[:, :, k], value[:, :, k]),
                *(out[:, :, q], lse[:, :, q], 0.0, causal),
                scale=ctx.scale,
            )
            for total, part, where in zip(totals, parts, (q, k, k), strict=True):
                # A token's causal call is the first that reaches it, as query and as key.
                _ = total[:, :, where].copy_(part) if causal else total[:, :, where].add_(part)
        return *(total.to(query.dtype) for total in totals), None, None


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Empty [1, heads, T, D] with the tokens outermost in memory, as projections lay them out."""
    return x.new_empty((1, x.shape[2], x.shape[1], x.shape[3]), dtype=dtype).transpose(1, 2)
