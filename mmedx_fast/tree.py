"""Rollouts of a question -> one packed row in which every shared token stands once.

A tree has the prompts of one question (K guidelines) as its trunk and the rollouts as its leaves.
The row holds the trie of the prompts, found on token ids, in depth-first order. One integer per
token describes
the attention: ``end[k]`` is one past the last descendant of token k, and query q sees key k exactly
when ``k <= q < end[k]``. M-RoPE positions restart behind the parent in every child, so each
root-to-leaf path
reads as if it stood alone.

Letters: T tokens of the row, R response tokens (targets), S segments (runs of tokens of one trie
    node).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Branch:
    """One rollout: the whole prompt it was asked with, and the tokens that were sampled."""

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]


@dataclass(frozen=True)
class Tree:
    """The rollouts of one question; all of them share its images."""

    branches: tuple[Branch, ...]
    pixel_values: Tensor | None = None
    """[patches, patch features] of all images, in the order they stand in the prompt."""
    image_grid_thw: Tensor | None = None
    """[images, 3] int: patches in time, height and width."""
    name: str = ""
    """What error messages call this question."""
    key: object = field(default_factory=object, repr=False, compare=False)
    """The same object in all parts of a question that is split (``replace`` hands it on)."""


ImageKey = tuple[object, int]
"""A question's key, and which of its images."""


@dataclass(frozen=True)
class RopeIndex:
    """What M-RoPE positions and the image check need to know of a model."""

    image_token_id: int
    spatial_merge_size: int
    video_token_id: int | None = None

    @classmethod
    def of(cls, config: object) -> RopeIndex:
        """Read it from a Qwen2-VL / Qwen2.5-VL configuration."""
        return cls(
            image_token_id=config.image_token_id,  # type: ignore[attr-defined]
            spatial_merge_size=config.vision_config.spatial_merge_size,  # type: ignore[attr-defined]
            video_token_id=getattr(config, "video_token_id", None),
        )


@dataclass(frozen=True)
class PackedRow:
    """One forward pass. Targets stand branch after branch, in the order the branches were given."""

    input_ids: Tensor  # [T] int64
    end: Tensor  # [T] int64, one past the last descendant
    position_ids: Tensor  # [3, T] int64: time, height, width
    pred_index: Tensor  # [R] int64, the row index whose hidden state predicts the target
    targets: Tensor  # [R] int64 token ids
    branch_index: Tensor  # [R] int64, branch counted over the trees in the order given
    token_index_in_response: Tensor  # [R] int64
    segments: tuple[tuple[int, int, int], ...]
    """(start, length, parent segment or -1) of every run of tokens, in row order; none is empty."""
    n_tokens: int
    """T, what is computed."""
    n_tokens_plain: int
    """What one row per rollout would compute."""
    n_branches: int
    pixel_values: Tensor | None = None  # [patches, features]
    image_grid_thw: Tensor | None = None  # [images, 3]
    images: tuple[ImageKey, ...] = ()
    """One key per image, in the order of image_grid_thw; rows that show the same image have the same key."""
    image_features: Tensor | None = None
    """[image tokens, H]: the vision tower's output where it has been computed already; replaces
    pixel_values."""
    blank_image: bool = False
    """Run the vision tower on a blank image that nothing reads: another rank's row of the same round
    has images, and collectives inside the tower must match."""

    def to(self, device: torch.device | str) -> PackedRow:
        """The same row with every tensor on `device`."""
        moved = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)  # type: ignore[arg-type]


@dataclass
class _Node:
    """A run of prompt tokens shared by the branches below it."""

    tokens: Sequence[int]
    children: list[_Node] = field(default_factory=list)
    branches: list[int] = field(default_factory=list)
    """Branches whose prompt ends with this node's last token."""


def _common_prefix(first: Sequence[int], second: Sequence[int], start: int) -> int:
    stop = min(len(first), len(second))
    for index in range(start, stop):
        if first[index] != second[index]:
            return index
    return stop


def _build(prompts: dict[tuple[int, ...], list[int]], start: int) -> _Node:
    """The trie node of prompts (with their branches) that agree up to `start`, and at `start`."""
    # The lexicographic extremes differ no later than any other pair.
    shared = _common_prefix(min(prompts), max(prompts), start)
    node = _Node(tokens=next(iter(prompts))[start:shared])
    below: dict[int, dict[tuple[int, ...], list[int]]] = {}
    for prompt, branches in prompts.items():
        if len(prompt) == shared:
            node.branches.extend(branches)
        else:
            below.setdefault(prompt[shared], {})[prompt] = branches
    node.children = [_build(group, shared) for group in below.values()]
    return node


def _trie(tree: Tree) -> list[_Node]:
    """The roots of a tree's prompt trie: one, unless prompts differ in their very first token."""
    _check_tree(tree)
    prompts: dict[tuple[int, ...], list[int]] = {}
    for index, branch in enumerate(tree.branches):
        prompts.setdefault(tuple(branch.prompt_ids), []).append(index)
    by_first: dict[int, dict[tuple[int, ...], list[int]]] = {}
    for prompt, branches in prompts.items():
        by_first.setdefault(prompt[0], {})[prompt] = branches
    return [_build(group, 0) for group in by_first.values()]


def label(tree: Tree) -> str:
    """What error messages call a tree."""
    return f"question {tree.name!r}" if tree.name else "a question"


def _check_tree(tree: Tree) -> None:
    if not tree.branches:
        raise ValueError(f"{label(tree)} has no branches; a row needs at least one rollout")
    for index, branch in enumerate(tree.branches):
        for name, ids in (("prompt", branch.prompt_ids), ("response", branch.response_ids)):
            if len(ids) == 0:
                raise ValueError(f"{label(tree)}, branch {index}: the {name} has no tokens")
    if (tree.pixel_values is None) != (tree.image_grid_thw is None):
        raise ValueError(
            f"{label(tree)}: pixel_values and image_grid_thw come together or not at all"
        )


def count_tokens(tree: Tree) -> int:
    """Tokens a tree takes in a row. The last token of a response predicts nothing and is not
    fed."""
    trunk = 0
    nodes = _trie(tree)
    while nodes:
        node = nodes.pop()
        trunk += len(node.tokens)
        nodes.extend(node.children)
    return trunk + sum(len(branch.response_ids) - 1 for branch in tree.branches)


def rope_positions(ids: Sequence[int], grids: Sequence[Sequence[int]], rope: RopeIndex) -> Tensor:
    """M-RoPE positions [3, len(ids)] of a prompt, as `get_rope_index` of the model gives them.

    Text advances all three axes together. An image of t x h x w merged patches takes its grid's
    coordinates on the three axes, and the text behind it goes on at the largest of them plus one.

    Raises:
        ValueError: the runs of image tokens do not match `grids` (t, h, w in patches per image).
    """
    merge = rope.spatial_merge_size
    parts: list[Tensor] = []
    position = index = image = 0
    while index < len(ids):
        start = index
        is_image = ids[start] == rope.image_token_id
        while index < len(ids) and (ids[index] == rope.image_token_id) == is_image:
            index += 1
        length = index - start
        if not is_image:
            parts.append(torch.arange(position, position + length).expand(3, -1))
            position += length
            continue
        if image >= len(grids):
            raise ValueError(
                f"the prompt has {image + 1} runs of image tokens but {len(grids)} images"
            )
        t, h, w = (int(n) for n in grids[image])
        h, w = h // merge, w // merge
        if length != t * h * w:
            raise ValueError(
                f"image {image} has a grid of {t} x {h} x {w} = {t * h * w} merged patches but "
                f"{length} image tokens stand in the prompt"
            )
        grid = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
        parts.append(torch.stack(grid).reshape(3, -1) + position)
        position += max(h, w)
        image += 1
    if image != len(grids):
        raise ValueError(
            f"{len(grids)} images were given but the prompt has {image} runs of image tokens"
        )
    return torch.cat(parts, dim=1)


class _RowBuilder:
    """Collects the tokens of a row in depth-first order."""

    def __init__(self, rope: RopeIndex) -> None:
        self.rope = rope
        self.ids: list[int] = []
        self.end: list[int] = []
        self.positions: list[Tensor] = []
        self.segments: list[tuple[int, int, int]] = []
        self.images: list[tuple[int, int]] = []
        """(tree, image) in row order."""
        self.targets: list[tuple[list[int], list[int]]] = []
        """Per branch: the predictors' row indices, and the tokens they predict."""

    def add_tree(self, tree_index: int, tree: Tree) -> None:
        _check_tree(tree)
        grids = [] if tree.image_grid_thw is None else tree.image_grid_thw.tolist()
        prompts = {tuple(branch.prompt_ids) for branch in tree.branches}
        try:
            positions = {prompt: rope_positions(prompt, grids, self.rope) for prompt in prompts}
        except ValueError as error:
            raise ValueError(f"{label(tree)}: {error}") from None
        first_branch = len(self.targets)
        self.targets.extend(([], []) for _ in tree.branches)

        def add(node: _Node, parent: int, depth: int) -> None:
            start, stop, segment = len(self.ids), depth + len(node.tokens), len(self.segments)
            prompt = tuple(tree.branches[_first_branch_below(node)].prompt_ids)
            self._add_segment(node.tokens, positions[prompt][:, depth:stop], parent)
            self._note_images(tree_index, prompt, depth, stop)
            after = int(positions[prompt][:, :stop].max()) + 1
            for branch in node.branches:
                self._check_response(tree, branch)
                response = list(tree.branches[branch].response_ids)
                self.targets[first_branch + branch] = self._add_response(response, segment, after)
            for child in node.children:
                add(child, segment, stop)
            self.end[start : start + len(node.tokens)] = [len(self.ids)] * len(node.tokens)

        for root in _trie(tree):
            add(root, -1, 0)

    def _add_segment(self, tokens: Sequence[int], positions: Tensor, parent: int) -> None:
        start = len(self.ids)
        self.ids.extend(tokens)
        self.end.extend([len(self.ids)] * len(tokens))
        self.positions.append(positions)
        self.segments.append((start, len(tokens), parent))

    def _note_images(self, tree_index: int, prompt: Sequence[int], depth: int, stop: int) -> None:
        image = -1
        for index in range(stop):
            if prompt[index] != self.rope.image_token_id:
                continue
            if index == 0 or prompt[index - 1] != self.rope.image_token_id:
                image += 1
                if index >= depth:
                    self.images.append((tree_index, image))

    def _check_response(self, tree: Tree, branch: int) -> None:
        ids = list(tree.branches[branch].response_ids)
        for forbidden in (self.rope.image_token_id, self.rope.video_token_id):
            if forbidden in ids:
                raise ValueError(
                    f"{label(tree)}, branch {branch}: the response holds the vision token "
                    f"{forbidden} at index {ids.index(forbidden)}; forbid it in the sampling"
                )

    def _add_response(
        self, ids: list[int], parent: int, position: int
    ) -> tuple[list[int], list[int]]:
        """Add all but the last token, which predicts nothing; returns (predictors, tokens)."""
        # The parent's last token predicts the first token of every response that hangs off it.
        predictor = self.segments[parent][0] + self.segments[parent][1] - 1
        start, fed = len(self.ids), ids[:-1]
        if fed:
            positions = torch.arange(position, position + len(fed)).expand(3, -1)
            self._add_segment(fed, positions, parent)
        return [predictor, *range(start, start + len(fed))], ids


def _first_branch_below(node: _Node) -> int:
    while not node.branches:
        node = node.children[0]
    return node.branches[0]


def _gather_images(
    trees: Sequence[Tree], order: list[tuple[int, int]]
) -> tuple[Tensor, Tensor] | None:
    """Patches and grids of the images in the order their tokens stand in the row.

    An image appears twice only where prompts fork before it.
    """
    if not order:
        return None
    patches: list[Tensor] = []
    grids: list[Tensor] = []
    for tree_index, image in order:
        tree = trees[tree_index]
        assert tree.pixel_values is not None and tree.image_grid_thw is not None
        sizes = tree.image_grid_thw.prod(-1).tolist()
        if sum(sizes) != len(tree.pixel_values):
            raise ValueError(
                f"{label(tree)}: image_grid_thw counts {sum(sizes)} patches but pixel_values has "
                f"{len(tree.pixel_values)}"
            )
        first = sum(sizes[:image])
        patches.append(tree.pixel_values[first : first + sizes[image]])
        grids.append(tree.image_grid_thw[image : image + 1])
    return torch.cat(patches), torch.cat(grids)


def pack_row(trees: Sequence[Tree], rope_index: RopeIndex) -> PackedRow:
    """Pack trees into one row.

    Raises:
        ValueError: no trees; a branch without tokens; image tokens that do not match the images; a
            vision token inside a response. The message names the question.
    """
    if not trees:
        raise ValueError("a row needs at least one tree")
    builder = _RowBuilder(rope_index)
    for index, tree in enumerate(trees):
        builder.add_tree(index, tree)
    images = _gather_images(trees, builder.images)
    ordered = builder.targets
    lengths = torch.tensor([len(tokens) for _, tokens in ordered])
    return PackedRow(
        input_ids=torch.tensor(builder.ids),
        end=torch.tensor(builder.end),
        position_ids=torch.cat(builder.positions, dim=1).contiguous(),
        pred_index=torch.tensor([i for predictors, _ in ordered for i in predictors]),
        targets=torch.tensor([i for _, tokens in ordered for i in tokens]),
        branch_index=torch.repeat_interleave(torch.arange(len(ordered)), lengths),
        token_index_in_response=torch.cat([torch.arange(n) for n in lengths.tolist()]),
        segments=tuple(builder.segments),
        n_tokens=len(builder.ids),
        n_tokens_plain=sum(
            len(b.prompt_ids) + len(b.response_ids) - 1 for tree in trees for b in tree.branches
        ),
        n_branches=len(ordered),
        pixel_values=None if images is None else images[0],
        image_grid_thw=None if images is None else images[1],
        images=tuple((trees[tree].key, image) for tree, image in builder.images),
    )
