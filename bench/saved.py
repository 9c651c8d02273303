"""Bytes that autograd keeps for the backward pass of a call, from its saved-tensor hooks."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor


class _Kept:
    """A saved tensor, and something that can be watched while autograd holds it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        # Without its graph: a node that saves its own output would keep itself alive.
        self.tensor = tensor.detach()


@dataclass
class Saved:
    """What was saved: each storage counts once, however many nodes and views hold it."""

    live: int = 0
    """Bytes held now."""
    peak: int = 0
    """The most bytes held at once."""
    _holders: dict[int, int] = field(default_factory=dict)

    def add(self, tensor: Tensor) -> _Kept:
        kept, storage = _Kept(tensor), tensor.untyped_storage()
        at, size = storage.data_ptr(), storage.nbytes()
        if at not in self._holders:
            self.live += size
            self.peak = max(self.peak, self.live)
        self._holders[at] = self._holders.get(at, 0) + 1
        weakref.finalize(kept, self._drop, at, size)
        return kept

    def _drop(self, at: int, size: int) -> None:
        self._holders[at] -= 1
        if not self._holders[at]:
            del self._holders[at]
            self.live -= size


@contextmanager
def saved_for_backward(present: Iterable[Tensor] = ()) -> Iterator[Saved]:
    """Measure what is saved for backward inside; storages of ``present`` (weights) do not count.

    Activations that a checkpoint recomputes do not count either; its inputs do.
    """
    there = {tensor.untyped_storage().data_ptr() for tensor in present}
    saved = Saved()

    def pack(tensor: Tensor) -> Tensor | _Kept:
        skip = tensor.untyped_storage().data_ptr() in there
        return tensor if skip or tensor.layout != torch.strided else saved.add(tensor)

    def unpack(kept: Tensor | _Kept) -> Tensor:
        return kept.tensor if isinstance(kept, _Kept) else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield saved
