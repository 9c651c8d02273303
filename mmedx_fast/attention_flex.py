"""Tree attention with FlexAttention: blocks of pairs, those that no pair needs left out.

It gathers nothing, so its memory does not grow with the number of segments; pairs are computed in
blocks of 128 x 128, so short segments cost more than their pairs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

FlexKernel = Callable[..., Any]
"""Signature of ``torch.nn.attention.flex_attention.flex_attention``."""
BLOCK = 128  # FlexAttention's own default
_SWITCHES = ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE")


@dataclass(frozen=True)
class TreeFlex:
    """What one FlexAttention call over a row needs."""

    block_mask: BlockMask
    kernel: FlexKernel

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """[1, heads, T, D] and twice [1, key heads, T, D] -> [1, T, heads, D]."""
        out = self.kernel(
            *(query, key, value),
            block_mask=self.block_mask,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out.transpose(1, 2)


def plan_flex(end: Tensor, kernel: FlexKernel | None = None) -> TreeFlex:
    """A row's plan from `end` [T].

    Args:
        kernel: null is torch's ``flex_attention``, compiled.
    """
    return TreeFlex(tree_block_mask(end), kernel or compiled_flex())


def tree_block_mask(end: Tensor, block: int = BLOCK) -> BlockMask:
    """What ``create_block_mask`` makes of ``k <= q < end[k]``, without its [T, T] mask.

    Of a block of keys the largest `end` tells whether any of the queries sees it, the smallest
    whether all of them do: (T / block)^2 comparisons and no transfer to the host.

    Args:
        end: [T] integers, one past the last descendant of each token.
        block: queries and keys in a block.
    """
    from torch.nn.attention.flex_attention import BlockMask

    length = len(end)
    end = end.to(torch.int32)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < end[key])

    blocks = -(-length // block)
    # Keys beyond the row are seen by nobody: their block is never full.
    ends = torch.nn.functional.pad(end, (0, blocks * block - length)).view(blocks, block)
    first = torch.arange(0, blocks * block, block, device=end.device)
    query, key = first[:, None], first[None, :]
    full = (key < query) & (ends.amin(1) >= query + block)
    partial = (key <= query) & (ends.amax(1) > query) & ~full
    return BlockMask.from_kv_blocks(
        *(*_table(partial), *_table(full)),
        BLOCK_SIZE=block,
        mask_mod=sees,
        seq_lengths=(length, length),
    )


def _table(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """[blocks, blocks] bool -> per row how many are chosen and which, these first; int32."""
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]


@cache
def compiled_flex(backend: str | Callable[..., Any] = "inductor") -> FlexKernel:
    """``flex_attention`` compiled once for rows of every length.

    With ``fullgraph`` a row that cannot be compiled is an error; without it torch would go over to
    an implementation that holds all [T, T] scores, and say nothing.
    """
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True, fullgraph=True, backend=backend)


def compile_switched_off() -> str | None:
    """The environment variable that turns ``torch.compile`` off, None where none does."""
    return next((name for name in _SWITCHES if os.environ.get(name) == "1"), None)
