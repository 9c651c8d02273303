"""The attention backends against float64 softmax over the brute-force mask."""

import random

import pytest
import torch

from mmedx_fast import attention
from mmedx_fast.tree import Branch, RopeIndex, Tree, pack_row

HEADS, KV_HEADS, DIM = 4, 2, 8


def loop_kernel(
    query,
    key,
    value,
    cu_q,
    cu_k,
    max_q,
    max_k,
    *,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
):
    """varlen_attn's contract, one sequence after the other: causal, aligned at the bottom right."""
    assert tuple(window_size) == (-1, 0)
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert int((cu_q[1:] - cu_q[:-1]).max()) == max_q and int((cu_k[1:] - cu_k[:-1]).max()) == max_k
    out = []
    for i in range(len(cu_q) - 1):
        q = query[cu_q[i] : cu_q[i + 1]].transpose(0, 1)
        k = key[cu_k[i] : cu_k[i + 1]].transpose(0, 1)
        v = value[cu_k[i] : cu_k[i + 1]].transpose(0, 1)
        n_q, n_k = q.shape[1], k.shape[1]
        mask = torch.ones(n_q, n_k, dtype=torch.bool).tril(n_k - n_q)
        attend = torch.nn.functional.scaled_dot_product_attention
        out.append(attend(q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa))
    return torch.cat(out, dim=1).transpose(0, 1)


def forest(seed):
    rng = random.Random(seed)
    trees = []
    for _ in range(2):
        prompts = [[1, *rng.choices([1, 2, 3], k=rng.randint(1, 7))] for _ in range(3)]
        branches = [Branch(rng.choice(prompts), [1] * rng.randint(1, 6)) for _ in range(6)]
        trees.append(Tree(tuple(branches)))
    return pack_row(trees, RopeIndex(290, 2))


def truth(query, key, value, end, scale):
    """Dense float64 attention with the mask written out pair by pair."""
    n = len(end)
    mask = torch.tensor([[k <= q < end[k] for k in range(n)] for q in range(n)])
    key, value = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (key, value))
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def run(backend, tensors, row, scale):
    module = torch.nn.Module()
    if backend != "dense":
        kernel = loop_kernel if backend == "varlen" else None
        plan = attention.plan_varlen(row.segments, "cpu", kernel)
        return attention.tree_varlen_attention(
            module, *tensors, None, tree_varlen=plan, scaling=scale, position_ids=None
        )[0]
    mask = attention.dense_mask(row.end)
    out = torch.nn.functional.scaled_dot_product_attention(
        *tensors, attn_mask=mask, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2)


@pytest.mark.parametrize("backend", ["dense", "varlen", "varlen on CPU"])
@pytest.mark.parametrize("seed", range(6))
def test_output_and_gradients_equal_float64_truth(backend, seed):
    row = forest(seed)
    shapes = [(1, heads, row.n_tokens, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    wide = [(2 * torch.randn(s, dtype=torch.float64)).requires_grad_() for s in shapes]
    narrow = [x.detach().float().requires_grad_() for x in wide]
    expected = truth(*wide, row.end.tolist(), 0.4)
    actual = run(backend, narrow, row, 0.4)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(expected)
    expected.backward(upstream)
    actual.backward(upstream.float())
    for ours, theirs in zip(narrow, wide, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=2e-5)


def test_varlen_computes_only_the_path_of_each_segment():
    shared = [1] * 10
    tree = Tree(tuple(Branch([*shared, k], [5] * 4) for k in (2, 2, 3)))
    row = pack_row([tree], RopeIndex(290, 2))
    plan = attention.plan_varlen(row.segments, "cpu", loop_kernel)
    # trunk 10, guideline 2: 11, its responses 14 and 14, guideline 3: 11, its response 14
    assert (plan.cu_k[1:] - plan.cu_k[:-1]).tolist() == [10, 11, 14, 14, 11, 14]
    assert (plan.cu_q[1:] - plan.cu_q[:-1]).tolist() == [10, 1, 3, 3, 1, 3]
    assert (plan.max_q, plan.max_k) == (10, 14)


def test_gradient_of_repeated_rows_adds_up_in_float32():
    source = torch.zeros(1, 3, dtype=torch.bfloat16, requires_grad=True)
    index = torch.zeros(1000, dtype=torch.long)
    attention.gather_rows(source, index).backward(torch.ones(1000, 3, dtype=torch.bfloat16))
    # Adding ones in bfloat16 stops at 256.
    assert source.grad.tolist() == [[1000.0] * 3]
    assert torch.autograd.gradcheck(
        lambda x: attention.gather_rows(x, torch.tensor([2, 0, 2])),
        torch.randn(3, 2, dtype=torch.float64, requires_grad=True),
    )


@pytest.mark.parametrize(
    ("name", "device", "chosen"),
    [
        ("auto", "cpu", "dense"),
        ("auto", "cuda", "varlen"),
        ("dense", "cuda", "dense"),
        ("varlen", "cpu", "varlen"),
    ],
)
def test_backend_by_device(name, device, chosen):
    assert attention.choose_backend(name, device) == chosen


def test_refusals():
    with pytest.raises(ValueError, match="'flex' is not available"):
        attention.choose_backend("flex", "cuda")
    with pytest.raises(ValueError, match="'eager' is unknown"):
        attention.choose_backend("eager", "cpu")
    row = forest(0)
    tensors = [torch.randn(1, h, row.n_tokens, DIM) for h in (HEADS, KV_HEADS, KV_HEADS)]
    module, plan = torch.nn.Module(), attention.plan_varlen(row.segments, "cpu", loop_kernel)
    with pytest.raises(ValueError, match="packed rows only"):
        attention.tree_varlen_attention(module, *tensors, None)
    with pytest.raises(ValueError, match="without mask or dropout"):
        attention.tree_varlen_attention(module, *tensors, None, tree_varlen=plan, dropout=0.1)
    doubled = [x.expand(2, -1, -1, -1) for x in tensors]
    with pytest.raises(ValueError, match="got batch 2"):
        attention.tree_varlen_attention(module, *doubled, None, tree_varlen=plan)
