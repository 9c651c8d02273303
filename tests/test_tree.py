"""The packed row against brute force and against the model's own positions."""

import importlib.util
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmedx_fast.attention import dense_mask
from mmedx_fast.tree import (
    Branch,
    RopeIndex,
    Tree,
    count_tokens,
    pack_row,
    rope_positions,
)

_spec = importlib.util.spec_from_file_location("tiny_vl", Path(__file__).with_name("_tiny_vl.py"))
tiny_vl = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny_vl)

ROPE = RopeIndex(tiny_vl.IMAGE, 2, tiny_vl.VIDEO)


def random_tree(rng: random.Random, name: str = "q") -> Tree:
    """Prompts that fork at any depth, repeat, or end where another goes on; 0 to 2 images."""
    grids = [(1, 2 * rng.randint(1, 3), 2 * rng.randint(1, 4)) for _ in range(rng.randint(0, 2))]
    stem = [rng.randint(1, 5)] + tiny_vl.image_tokens(grids)
    # Four different ids only: prefixes coincide often.
    prompts = [[*stem, *rng.choices([1, 2, 3, 4], k=rng.randint(1, 6))] for _ in range(4)]
    prompts.append(prompts[0] + [1])
    branches = tuple(
        Branch(rng.choice(prompts), rng.choices([1, 2, 3, 4], k=rng.randint(1, 5)))
        for _ in range(rng.randint(1, 8))
    )
    patches = sum(t * h * w for t, h, w in grids)
    return Tree(
        branches,
        torch.randn(patches, tiny_vl.PATCH_FEATURES) if grids else None,
        torch.tensor(grids) if grids else None,
        name,
    )


def path_of(row, target):
    """Row indices that the predictor of a target sees, by the mask."""
    return dense_mask(row.end)[0, 0, row.pred_index[target]].nonzero().flatten()


@pytest.mark.parametrize("seed", range(40))
def test_each_target_sees_exactly_its_own_branch(seed):
    rng = random.Random(seed)
    trees = [random_tree(rng, str(i)) for i in range(rng.randint(1, 3))]
    row = pack_row(trees, ROPE)
    branches = [branch for tree in trees for branch in tree.branches]
    expected = [
        (index, step, list(branch.prompt_ids) + list(branch.response_ids[:step]), token)
        for index, branch in enumerate(branches)
        for step, token in enumerate(branch.response_ids)
    ]
    assert len(row.targets) == len(expected)
    for target, (index, step, seen, token) in enumerate(expected):
        assert row.input_ids[path_of(row, target)].tolist() == seen
        assert row.targets[target] == token
        assert row.branch_index[target] == index
        assert row.token_index_in_response[target] == step


@pytest.mark.parametrize("seed", range(40))
def test_end_is_the_ancestor_relation_of_the_segments(seed):
    rng = random.Random(1000 + seed)
    row = pack_row([random_tree(rng) for _ in range(2)], ROPE)
    owner = {}
    for segment, (start, length, _) in enumerate(row.segments):
        for token in range(start, start + length):
            assert token not in owner
            owner[token] = segment
    assert sorted(owner) == list(range(row.n_tokens)) == list(range(len(row.end)))

    def is_ancestor(above, below):
        while below >= 0:
            if above == below:
                return True
            below = row.segments[below][2]
        return False

    mask = dense_mask(row.end)[0, 0]
    for query in range(row.n_tokens):
        for key in range(row.n_tokens):
            wanted = key <= query and is_ancestor(owner[key], owner[query])
            assert bool(mask[query, key]) == wanted


@pytest.mark.parametrize("seed", range(20))
def test_no_prompt_token_stands_twice(seed):
    rng = random.Random(2000 + seed)
    tree = random_tree(rng)
    row = pack_row([tree], ROPE)
    prefixes = {
        tuple(branch.prompt_ids[:n])
        for branch in tree.branches
        for n in range(1, len(branch.prompt_ids) + 1)
    }
    fed = sum(len(branch.response_ids) - 1 for branch in tree.branches)
    assert row.n_tokens == len(prefixes) + fed == count_tokens(tree)
    assert row.n_tokens_plain == fed + sum(len(b.prompt_ids) for b in tree.branches)


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen2_vl"])
def model(request):
    return tiny_vl.build(request.param).model


@pytest.mark.parametrize("seed", range(15))
def test_positions_equal_get_rope_index_of_every_branch(model, seed):
    rng = random.Random(3000 + seed)
    trees = [random_tree(rng) for _ in range(2)]
    row = pack_row(trees, ROPE)
    target = 0
    for tree in trees:
        for branch in tree.branches:
            ids = torch.tensor([[*branch.prompt_ids, *branch.response_ids]])
            positions, _ = model.get_rope_index(
                ids,
                mm_token_type_ids=(ids == tiny_vl.IMAGE).int(),
                image_grid_thw=tree.image_grid_thw,
            )
            last = target + len(branch.response_ids) - 1
            path = path_of(row, last)
            assert torch.equal(row.position_ids[:, path], positions[:, 0, :-1])
            target = last + 1


def test_images_follow_the_row_order_and_repeat_only_where_prompts_fork_before_them():
    image = tiny_vl.image_tokens([(1, 2, 2)])
    pixels = torch.arange(4.0)[:, None].expand(4, 5)
    shared = Tree((Branch([1, *image, 2], [3]), Branch([1, *image, 4], [3])), pixels, _grid(2, 2))
    forked = Tree(
        (Branch([1, *image, 2], [3]), Branch([2, *image, 2], [3])), pixels + 10, _grid(2, 2)
    )
    row = pack_row([shared, forked], ROPE)
    assert row.image_grid_thw.tolist() == [[1, 2, 2]] * 3
    assert torch.equal(row.pixel_values, torch.cat([pixels, pixels + 10, pixels + 10]))
    assert pack_row([Tree((Branch([1], [2]),))], ROPE).pixel_values is None


def _grid(h, w):
    return torch.tensor([[1, h, w]])


def test_to_moves_every_tensor():
    row = pack_row([random_tree(random.Random(5))], ROPE).to("meta")
    assert {getattr(row, name).device.type for name in ("input_ids", "end", "targets")} == {"meta"}


def _bad(**changes):
    image = tiny_vl.image_tokens([(1, 2, 2)])
    tree = Tree((Branch([1, *image, 2], [3, 4]),), torch.zeros(4, 5), _grid(2, 2), "case-17")
    return replace(tree, **changes)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (_bad(branches=()), "no branches"),
        (_bad(branches=(Branch([], [1]),)), "branch 0: the prompt has no tokens"),
        (_bad(branches=(Branch([1], []),)), "branch 0: the response has no tokens"),
        (_bad(image_grid_thw=_grid(2, 4)), "1 x 1 x 2 = 2 merged patches but 1 image tokens"),
        (_bad(image_grid_thw=_grid(2, 2).repeat(2, 1)), "2 images were given but the prompt has 1"),
        (_bad(image_grid_thw=None, pixel_values=None), "1 runs of image tokens but 0 images"),
        (_bad(image_grid_thw=None), "come together or not at all"),
        (_bad(pixel_values=torch.zeros(5, 5)), "counts 4 patches but pixel_values has 5"),
        (
            _bad(branches=(Branch(_bad().branches[0].prompt_ids, [5, tiny_vl.IMAGE]),)),
            "branch 0: the response holds the vision token 290 at index 1",
        ),
    ],
)
def test_bad_trees_are_refused_with_their_name(tree, message):
    with pytest.raises(ValueError, match=message) as caught:
        pack_row([_bad(), tree], ROPE)
    assert "case-17" in str(caught.value)


def test_a_row_needs_a_tree():
    with pytest.raises(ValueError, match="at least one tree"):
        pack_row([], ROPE)


def test_text_positions_count_up():
    assert rope_positions([5, 6, 7], [], ROPE).tolist() == [[0, 1, 2]] * 3
