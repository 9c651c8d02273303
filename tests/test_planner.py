"""Rows within bounds, every branch once, and ranks that stay in step."""

import importlib.util
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmedx_fast.planner import plan_ranks, plan_rows
from mmedx_fast.tree import Branch, RopeIndex, Tree, count_tokens


def _helper(name):
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"helper_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny_vl = _helper("_tiny_vl")
random_tree = _helper("test_tree").random_tree
ROPE = RopeIndex(tiny_vl.IMAGE, 2, tiny_vl.VIDEO)


@pytest.mark.parametrize("bound", [60, 90, 200])
@pytest.mark.parametrize("target", [None, 64])
def test_plan_puts_every_branch_in_one_row_within_the_bound(bound, target):
    rng = random.Random(7)
    trees = [random_tree(rng, f"q{i}") for i in range(9)]
    everything = [branch for tree in trees for branch in tree.branches]
    plan = plan_rows(trees, bound, target_tokens=target)
    assert plan == plan_rows(trees, bound, target_tokens=target)
    seen = []
    for planned in plan:
        row = planned.pack(ROPE)
        assert row.n_tokens == planned.n_tokens <= bound
        assert len(planned.trees) == 1 or planned.n_tokens <= (target or bound)
        inside = [branch for tree in planned.trees for branch in tree.branches]
        assert inside == [everything[index] for index in planned.branches]
        seen.extend(planned.branches)
    assert sorted(seen) == list(range(len(everything)))


def test_a_large_tree_is_split_between_guidelines_before_responses():
    generator = torch.Generator().manual_seed(0)
    tree = tiny_vl.make_tree(generator, guidelines=4, generations=3)
    prompts = [tuple(branch.prompt_ids) for branch in tree.branches]
    bound = count_tokens(replace(tree, branches=tree.branches[:6]))
    for planned in plan_rows([tree], bound):
        for prompt in {prompts[index] for index in planned.branches}:
            group = [i for i, other in enumerate(prompts) if other == prompt]
            assert set(group) <= set(planned.branches)
    # One guideline no longer fits: now responses part too.
    bound = count_tokens(replace(tree, branches=tree.branches[4:6]))
    rows = plan_rows([tree], bound)
    assert max(row.n_tokens for row in rows) <= bound
    assert sorted(index for row in rows for index in row.branches) == list(range(12))


def test_fewer_rows_than_trees_when_they_fit():
    trees = [Tree((Branch([1, 2], [3] * 9),), name=str(i)) for i in range(10)]
    assert [len(row.trees) for row in plan_rows(trees, 50)] == [5, 5]


def with_images(count, response=2):
    image = tiny_vl.image_tokens([(1, 2, 2)])
    return Tree(
        (Branch([1, *image * count, 2], [3] * response),),
        torch.zeros(4 * count, 5),
        torch.tensor([[1, 2, 2]] * count),
        "case-17",
    )


def test_a_rollout_beyond_a_bound_names_its_question_and_the_setting():
    fitting = Tree((Branch([1], [2]),), name="short")
    with pytest.raises(ValueError, match="'case-17': one rollout takes 6 tokens but a row holds 5"):
        plan_rows([fitting, with_images(1)], 5)
    short, long = with_images(1).branches[0], with_images(1, 30).branches[0]
    with pytest.raises(ValueError, match="one rollout takes 34 tokens but a row holds 20"):
        plan_rows([replace(with_images(1), branches=(short, long))], 20)
    with pytest.raises(
        ValueError, match=r"'case-17': it has 3 images .* holds 2; raise max_images"
    ):
        plan_rows([fitting, with_images(3)], 99, max_images=2)
    with pytest.raises(ValueError, match=r"'case-17': one response has 30 .* holds 9 of them"):
        plan_ranks([fitting, with_images(1, 30)], 2, 99, max_response_tokens=9)
    with pytest.raises(ValueError, match="ranks must be at least 1, got 0"):
        plan_ranks([fitting], 0, 99)
    with pytest.raises(ValueError, match="no trees"):
        plan_ranks([], 2, 99)


# -- ranks -----------------------------------------------------------------------------------------

# A random tree's longest rollout: two images of 12 tokens, their marks, 8 words, 5 response tokens.
LONGEST = 64

planned = given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 9),
    ranks=st.integers(1, 5),
    bound=st.integers(LONGEST, 4 * LONGEST),
    target=st.none() | st.integers(20, 2 * LONGEST),
    responses=st.none() | st.integers(5, 40),
    images=st.none() | st.integers(2, 4),
)


@planned
def test_ranks_share_every_branch_within_the_bounds(
    seed, count, ranks, bound, target, responses, images
):
    rng = random.Random(seed)
    trees = [random_tree(rng, f"q{i}") for i in range(count)]
    everything = [branch for tree in trees for branch in tree.branches]
    limits = {"target_tokens": target, "max_response_tokens": responses, "max_images": images}
    plan = plan_ranks(trees, ranks, bound, **limits)
    assert plan == plan_ranks(trees, ranks, bound, **limits)
    assert len(plan) == ranks and len({len(rows) for rows in plan}) == 1
    seen = []
    for row in (row for rows in plan for row in rows):
        packed = row.pack(ROPE)
        assert 1 <= packed.n_tokens == row.n_tokens <= bound
        assert len(row.trees) == 1 or target is None or row.n_tokens <= target
        held = sum(0 if t.image_grid_thw is None else len(t.image_grid_thw) for t in row.trees)
        assert images is None or held <= images
        if row.branches:
            assert responses is None or len(packed.targets) <= responses
            inside = [branch for tree in row.trees for branch in tree.branches]
            assert inside == [everything[index] for index in row.branches]
        else:
            assert len(packed.targets) == packed.n_tokens == 1
        seen.extend(row.branches)
    assert sorted(seen) == list(range(len(everything)))


@planned
def test_every_rank_of_a_round_enters_the_vision_tower_or_none(
    seed, count, ranks, bound, target, responses, images
):
    rng = random.Random(seed)
    trees = [random_tree(rng, f"q{i}") for i in range(count)]
    plan = plan_ranks(trees, ranks, bound, target_tokens=target)
    mixed = 0
    for rows in zip(*plan, strict=True):
        packed = [row.pack(ROPE) for row in rows]
        towers = {row.pixel_values is not None or row.blank_image for row in packed}
        assert len(towers) == 1
        assert not any(row.pixel_values is not None and row.blank_image for row in packed)
        mixed += any(row.blank_image for row in packed)
    assert mixed <= 1


@planned
def test_idle_rows_only_where_the_branches_run_out(
    seed, count, ranks, bound, target, responses, images
):
    rng = random.Random(seed)
    trees = [random_tree(rng, f"q{i}") for i in range(count)]
    plan = plan_ranks(trees, ranks, bound, target_tokens=target, max_response_tokens=responses)
    idle = sum(not row.branches for rows in plan for row in rows)
    assert idle < ranks
    if ranks == 1 or sum(len(tree.branches) for tree in trees) < ranks:
        assert idle == (0 if ranks == 1 else ranks - sum(len(t.branches) for t in trees))
    elif len(plan[0]) == 1:
        assert idle == 0


def test_one_rank_gets_the_plan_of_one_process():
    rng = random.Random(3)
    trees = [random_tree(rng, f"q{i}") for i in range(9)]
    assert plan_ranks(trees, 1, 90, target_tokens=70) == [plan_rows(trees, 90, target_tokens=70)]


def test_a_single_question_is_shared_by_guideline():
    tree = tiny_vl.make_tree(torch.Generator().manual_seed(0), guidelines=4, generations=2)
    plan = plan_ranks([tree], 2, 10_000)
    shares = sorted(row.branches for rows in plan for row in rows)
    assert shares == [(0, 1, 2, 3), (4, 5, 6, 7)]


@given(st.lists(st.integers(20, 400), min_size=2, max_size=40), st.integers(2, 4))
def test_ranks_are_balanced(lengths, ranks):
    """Greedy scheduling's guarantee, over the rows of a round and so over the ranks: no rank does more
    than its share plus one question."""
    trees = [Tree((Branch([1], [2] * n),), name=str(i)) for i, n in enumerate(lengths)]
    plan = plan_ranks(trees, ranks, 400)
    sums = [sum(row.cost for row in rows) for rows in plan]
    largest = max(row.cost for rows in plan for row in rows)
    assert max(sums) - min(sums) <= largest
    assert max(sums) <= sum(sums) / ranks + largest
