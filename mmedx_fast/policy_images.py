"""Rows that show the same image (parts of a question that is split) share one run of the vision tower."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from mmedx_fast.policy_model import attach_gradient
from mmedx_fast.tree import ImageKey, PackedRow

Run = Callable[[PackedRow], Tensor]
"""The vision tower over a row's images (or its blank one): features [image tokens, H]."""
Found = TypeVar("Found")


class Sharing(Protocol):
    """Where the rows of a pass get their image features from."""

    def give(self, row: PackedRow) -> PackedRow:
        """The row, with the features of its images where they are shared."""

    def drop(self, images: Iterable[ImageKey]) -> None:
        """No row to come shows these."""


def over_rows(
    rows: Sequence[PackedRow], work: Callable[[int, PackedRow], Found], sharing: Sharing
) -> list[Found]:
    """``work(index, row)`` for every row, its images given and dropped as soon as can be."""
    last = {image: index for index, row in enumerate(rows) for image in row.images}
    found = []
    for index, row in enumerate(rows):
        found.append(work(index, sharing.give(row)))
        sharing.drop(image for image in set(row.images) if last[image] == index)
    return found


class SharedFeatures:
    """Features without gradient."""

    def __init__(self, run: Run, merge: int, lockstep: bool) -> None:
        """``merge``: patches along a side of an image token. ``lockstep``: ranks enter the tower together, so a
        row of images that are known runs it on a blank one."""
        self._run, self._merge, self._lockstep = run, merge, lockstep
        self._known: dict[ImageKey, Tensor] = {}

    def give(self, row: PackedRow) -> PackedRow:
        if row.pixel_values is None and not row.blank_image:
            return row
        new = _new_images(row, self._known)
        if new or row.blank_image or self._lockstep:
            features = self._run(_only(row, new))
            if new:
                spans = _spans(row, new, self._merge)
                self._known |= {image: features[span] for image, span in spans.items()}
        return _with_features(row, [self._known[image] for image in row.images])

    def drop(self, images: Iterable[ImageKey]) -> None:
        for image in images:
            self._known.pop(image, None)


@dataclass
class _TowerRun:
    """A run of a trained tower whose backward waits for the rows that read it."""

    features: Tensor
    leaf: Tensor
    """float32, so that the rows' gradients add up in float32."""
    images: set[ImageKey]
    """Those that rows to come show."""


class LeafFeatures:
    """Features of a trained tower, for the rows that have an image in common with another row.

    The tower's graph is kept from the first of these rows to the last.
    """

    def __init__(
        self,
        run: Run,
        merge: int,
        backward: Callable[[Tensor], None],
        rows: Sequence[PackedRow],
    ) -> None:
        self._run, self._merge, self._backward = run, merge, backward
        shown = Counter(image for row in rows for image in set(row.images))
        self._several = {image for image, count in shown.items() if count > 1}
        self._at: dict[ImageKey, tuple[_TowerRun, slice]] = {}

    def give(self, row: PackedRow) -> PackedRow:
        if self._several.isdisjoint(row.images):
            return row
        if new := _new_images(row, self._at):
            features, spans = self._run(_only(row, new)), _spans(row, new, self._merge)
            leaf = features.detach().float().requires_grad_()
            run = _TowerRun(features, leaf, set(spans))
            self._at |= {image: (run, span) for image, span in spans.items()}
        at = [self._at[image] for image in row.images]
        return _with_features(row, [run.leaf[span].to(run.features.dtype) for run, span in at])

    def drop(self, images: Iterable[ImageKey]) -> None:
        for image in images:
            if image not in self._at:
                continue
            run, _ = self._at.pop(image)
            run.images.remove(image)
            if not run.images:
                assert run.leaf.grad is not None, "a row went by without a backward"
                known = run.leaf.grad.to(run.features.dtype)
                self._backward(attach_gradient(run.leaf.new_zeros(()), (known,), run.features))


def _new_images(row: PackedRow, known: Iterable[ImageKey]) -> list[int]:
    """Which of the row's images are not known, each once: an image stands twice where prompts fork before
    it."""
    first = {image: index for index, image in reversed(list(enumerate(row.images)))}
    return sorted(index for image, index in first.items() if image not in known)


def _only(row: PackedRow, images: Sequence[int]) -> PackedRow:
    """The row as the tower sees it, with some of its images; without any a blank one."""
    if not images:
        return replace(row, pixel_values=None, image_grid_thw=None, images=(), blank_image=True)
    if len(images) == len(row.images):
        return row
    assert row.pixel_values is not None and row.image_grid_thw is not None
    patches = row.pixel_values.split(row.image_grid_thw.prod(-1).tolist())
    return replace(
        row,
        pixel_values=torch.cat([patches[i] for i in images]),
        image_grid_thw=row.image_grid_thw[list(images)],
        images=tuple(row.images[i] for i in images),
    )


def _spans(row: PackedRow, images: Sequence[int], merge: int) -> dict[ImageKey, slice]:
    """Where in the tower's output each of these images of the row stands."""
    assert row.image_grid_thw is not None
    tokens = (row.image_grid_thw.prod(-1) // merge**2).tolist()
    spans, start = {}, 0
    for index in images:
        spans[row.images[index]] = slice(start, start + tokens[index])
        start += tokens[index]
    return spans


def _with_features(row: PackedRow, parts: Sequence[Tensor]) -> PackedRow:
    # One image is not copied, so that the parts of a question hold its features once.
    features = None if not parts else parts[0] if len(parts) == 1 else torch.cat(tuple(parts))
    return replace(row, image_features=features, pixel_values=None, blank_image=False)
