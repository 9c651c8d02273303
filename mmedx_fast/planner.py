"""Which question goes into which packed row, and which row to which rank.

Rows are bounded in unique tokens (activations), response tokens (logits) and images. Ranks get equally
many rows of similar cost, because every row is a round of collectives that the slowest rank ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mmedx_fast.tree import (
    Branch,
    PackedRow,
    RopeIndex,
    Tree,
    count_tokens,
    label,
    pack_row,
)

DENSE_TARGET_TOKENS = 1024
"""A dense mask costs T^2: on a CPU at width 192 one row of 4,176 tokens took 2.5 times as long as
four rows of 1,044."""
CPU_TARGET_TOKENS = 2048
"""Where the segments' own pairs are computed and no mask: a token of a tree of 480, at width 192 on one core,
takes 343 us in rows of 480, 319 of 960, 273 of 1,920, 283 of 3,840 and 315 of 7,680."""

_RESPONSE_COST, _PATCH_COST = 0.084, 0.097
"""FLOPs of a response token at the head, and of a patch in the vision tower, as a share of those of a
token in the layers of Qwen2.5-VL-7B (13.05 GFLOP forward). Attention, 1.5-5.5 % there, is left out."""


@dataclass(frozen=True)
class RowPlan:
    """What goes into one row."""

    trees: tuple[Tree, ...]
    branches: tuple[int, ...]
    """For each branch of the row, in the row's order: its flat index over all trees that were
    planned. Empty for a row without work: its one target takes weight 0 and only keeps the ranks in
    step."""
    n_tokens: int
    cost: float = 0.0
    """Estimated work, in tokens of the language model."""
    blank_image: bool = False
    """See :attr:`mmedx_fast.tree.PackedRow.blank_image`."""

    def pack(self, rope_index: RopeIndex) -> PackedRow:
        return replace(pack_row(self.trees, rope_index), blank_image=self.blank_image)


@dataclass(frozen=True)
class _Load:
    """What trees take of a row."""

    tokens: int = 0
    responses: int = 0
    images: int = 0
    patches: int = 0

    @classmethod
    def of(cls, tree: Tree) -> _Load:
        grid = tree.image_grid_thw
        return cls(
            count_tokens(tree),
            sum(len(branch.response_ids) for branch in tree.branches),
            0 if grid is None else len(grid),
            0 if grid is None else int(grid.prod(-1).sum()),
        )

    @property
    def cost(self) -> float:
        return self.tokens + _RESPONSE_COST * self.responses + _PATCH_COST * self.patches

    def __add__(self, other: _Load) -> _Load:
        return _Load(
            self.tokens + other.tokens,
            self.responses + other.responses,
            self.images + other.images,
            self.patches + other.patches,
        )


@dataclass(frozen=True)
class _Bounds:
    """The most that a row may hold; None: any number."""

    tokens: int
    responses: int | None
    images: int | None

    def admits(self, load: _Load) -> bool:
        return (
            load.tokens <= self.tokens
            and (self.responses is None or load.responses <= self.responses)
            and (self.images is None or load.images <= self.images)
        )

    def refuse(self, tree: Tree, load: _Load) -> ValueError:
        """The error for a rollout that does not fit into a row of its own."""
        if load.tokens > self.tokens:
            took, holds = f"one rollout takes {load.tokens} tokens", f"{self.tokens}"
            remedy = "raise max_row_tokens or lower max_prompt_length / max_completion_length"
        elif self.images is not None and load.images > self.images:
            took, holds = f"it has {load.images} images", f"{self.images}"
            remedy = "raise max_images"
        else:
            took, holds = f"one response has {load.responses} tokens", f"{self.responses} of them"
            remedy = "raise max_response_tokens or lower max_completion_length"
        return ValueError(f"{label(tree)}: {took} but a row holds {holds}; {remedy}")


@dataclass(frozen=True)
class _Part:
    """A tree, or those of its branches that share a row."""

    tree: Tree
    branches: tuple[int, ...]
    """Flat indices over all trees."""
    load: _Load

    def pick(self, local: Sequence[int]) -> _Part:
        tree = _subtree(self.tree, local)
        return _Part(tree, tuple(self.branches[i] for i in local), _Load.of(tree))


class _Row:
    """Parts that were put together."""

    def __init__(self) -> None:
        self.parts: list[_Part] = []
        self.load = _Load()

    def takes(self, part: _Part, bounds: _Bounds, target_tokens: int) -> bool:
        together = self.load + part.load
        wanted = not self.parts or together.tokens <= target_tokens
        return wanted and bounds.admits(together)

    def add(self, part: _Part) -> None:
        self.parts.append(part)
        self.load += part.load

    def plan(self) -> RowPlan:
        return RowPlan(
            trees=tuple(part.tree for part in self.parts),
            branches=tuple(branch for part in self.parts for branch in part.branches),
            n_tokens=self.load.tokens,
            cost=self.load.cost,
        )


def plan_rows(
    trees: Sequence[Tree],
    max_row_tokens: int,
    *,
    target_tokens: int | None = None,
    max_response_tokens: int | None = None,
    max_images: int | None = None,
) -> list[RowPlan]:
    """Spread trees over as few rows as first-fit decreasing finds; deterministic.

    Args:
        trees: the questions of one step; every branch lands in exactly one row.
        max_row_tokens: bound on the unique tokens of a row. A tree above it is split between
            guidelines, then between responses; the parts repeat what they share.
        target_tokens: stop adding trees to a row that would pass this (a dense mask grows with the
            square of the row, so :data:`DENSE_TARGET_TOKENS` there); null means max_row_tokens.
        max_response_tokens: bound on the response tokens of a row, split like tokens.
        max_images: bound on the images of a row's questions.

    Raises:
        ValueError: a single rollout does not fit; the message names its question and the bound.
    """
    bounds = _Bounds(max_row_tokens, max_response_tokens, max_images)
    rows = _first_fit(_parts(trees, bounds), bounds, target_tokens or max_row_tokens)
    return [row.plan() for row in rows]


def plan_ranks(
    trees: Sequence[Tree],
    ranks: int,
    max_row_tokens: int,
    *,
    target_tokens: int | None = None,
    max_response_tokens: int | None = None,
    max_images: int | None = None,
) -> list[list[RowPlan]]:
    """Spread trees over `ranks` lists of rows, all of one length; deterministic.

    The i-th rows of all ranks make a round: they have similar cost, and at most one round mixes rows
    with and without images; there, the rows without run the vision tower on a blank image. Where there
    are fewer trees than ranks, trees are split; a rank that still has no work in a round gets a row of
    one token without branches. With one rank this is :func:`plan_rows`, whose arguments it takes.

    Raises:
        ValueError: as :func:`plan_rows`; no trees; no ranks.
    """
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    if not trees:
        raise ValueError("there are no trees to spread over ranks")
    bounds = _Bounds(max_row_tokens, max_response_tokens, max_images)
    target = target_tokens or max_row_tokens
    parts = _spread(_parts(trees, bounds), ranks)
    rows = _first_fit(parts, bounds, target)
    if ranks == 1:
        return [[row.plan() for row in rows]]
    rows = _level(parts, -(-len(rows) // ranks) * ranks, ranks, bounds, target)
    return _deal([row.plan() if row.parts else _idle(trees[0]) for row in rows], ranks)


def _parts(trees: Sequence[Tree], bounds: _Bounds) -> list[_Part]:
    parts: list[_Part] = []
    first = 0
    for tree in trees:
        flat = tuple(range(first, first + len(tree.branches)))
        first += len(flat)
        whole = _Part(tree, flat, _Load.of(tree))
        if bounds.admits(whole.load):
            parts.append(whole)
        else:
            parts.extend(whole.pick(local) for local in _fit(tree, bounds))
    return parts


def _subtree(tree: Tree, branches: Sequence[int]) -> Tree:
    return replace(tree, branches=tuple(tree.branches[i] for i in branches))


def _guideline_groups(tree: Tree) -> list[list[int]]:
    """Branches by prompt."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, branch in enumerate(tree.branches):
        groups.setdefault(tuple(branch.prompt_ids), []).append(index)
    return list(groups.values())


def _fit(tree: Tree, bounds: _Bounds) -> Iterator[list[int]]:
    """The branches of parts of a tree, each within `bounds`."""

    def fits(branches: list[int]) -> bool:
        return bounds.admits(_Load.of(_subtree(tree, branches)))

    pieces: list[list[int]] = []
    for group in _guideline_groups(tree):
        pieces.extend([group] if fits(group) else [[index] for index in group])
    part: list[int] = []
    for piece in pieces:
        if fits(part + piece):
            part = part + piece
            continue
        if not fits(piece):
            raise bounds.refuse(tree, _Load.of(_subtree(tree, piece)))
        yield part
        part = piece
    yield part


def _spread(parts: list[_Part], ranks: int) -> list[_Part]:
    """Halve the costliest parts, between guidelines where there are several, until every rank has
    one."""
    parts = list(parts)
    while len(parts) < ranks:
        index = max(
            range(len(parts)), key=lambda i: (len(parts[i].branches) > 1, parts[i].load.cost)
        )
        part = parts[index]
        if len(part.branches) == 1:
            break
        groups = _guideline_groups(part.tree)
        if len(groups) == 1:
            groups = [[i] for i in groups[0]]
        cut = len(groups) // 2
        parts[index : index + 1] = [
            part.pick(sorted(i for group in half for i in group))
            for half in (groups[:cut], groups[cut:])
        ]
    return parts


def _first_fit(parts: Sequence[_Part], bounds: _Bounds, target_tokens: int) -> list[_Row]:
    rows: list[_Row] = []
    for part in sorted(parts, key=lambda part: -part.load.tokens):
        row = next((row for row in rows if row.takes(part, bounds, target_tokens)), None)
        if row is None:
            rows.append(row := _Row())
        row.add(part)
    return rows


def _level(
    parts: Sequence[_Part], count: int, ranks: int, bounds: _Bounds, target_tokens: int
) -> list[_Row]:
    """Rows of similar cost: `count`, or more by multiples of `ranks` where that is too few.

    Costliest part first, each into the cheapest row that takes it. Every part fits a row of its own, so
    the search ends; rows stay empty only where there are fewer parts than rows.
    """
    ordered = sorted(parts, key=lambda part: -part.load.cost)
    while True:
        rows = [_Row() for _ in range(count)]
        for part in ordered:
            fitting = [row for row in rows if row.takes(part, bounds, target_tokens)]
            if not fitting:
                break
            min(fitting, key=lambda row: row.load.cost).add(part)
        else:
            return rows
        count += ranks


def _deal(plans: Sequence[RowPlan], ranks: int) -> list[list[RowPlan]]:
    """Deal rows out in rounds: rows with images first, then by cost; odd rounds in reverse, which
    evens out the ranks' sums."""
    ordered = sorted(plans, key=lambda plan: (not _has_images(plan), -plan.cost))
    dealt: list[list[RowPlan]] = [[] for _ in range(ranks)]
    for start in range(0, len(ordered), ranks):
        rows = ordered[start : start + ranks]
        images = any(map(_has_images, rows))
        rows = [replace(p, blank_image=images and not _has_images(p)) for p in rows]
        if start // ranks % 2:
            rows.reverse()
        for rank, plan in enumerate(rows):
            dealt[rank].append(plan)
    return dealt


def _has_images(plan: RowPlan) -> bool:
    return any(tree.image_grid_thw is not None for tree in plan.trees)


def _idle(tree: Tree) -> RowPlan:
    """The shortest row there is: one token that predicts itself."""
    token = tree.branches[0].response_ids[:1]  # a response holds no vision token
    return RowPlan((Tree((Branch(token, token),), name="idle"),), (), n_tokens=1)
