"""The attention backends against float64 softmax over the brute-force mask, and against plain rows."""

import importlib.util
import random
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as torch_flex
from torch.utils.checkpoint import checkpoint

from mmedx_fast import attention, attention_flex, attention_varlen
from mmedx_fast.tree import Branch, RopeIndex, Tree, pack_row

HEADS, KV_HEADS, DIM = 4, 2, 8
BACKENDS = ("dense", "varlen", "flash", "flex")
SWITCHES = ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE")


# -- kernels in the place of those that need a GPU -------------------------------------------------


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


def flash_kernel(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """flash-attn 2's flash_attn_varlen_func: not causal unless asked, heads grouped unasked."""
    assert causal and dropout_p == softcap == 0 and tuple(window_size) == (-1, -1)
    assert alibi_slopes is None and block_table is None and not return_attn_probs
    bounds = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = {"scale": softmax_scale, "window_size": (-1, 0), "enable_gqa": True}
    return loop_kernel(q, k, v, *bounds, **options)


def block_kernel(query, key, value, score_mod=None, block_mask=None, scale=None, enable_gqa=False):
    """flex_attention's contract: full blocks whole, partial blocks under mask_mod, the rest not."""
    assert score_mod is None
    block, length = block_mask.BLOCK_SIZE[0], query.shape[2]
    mask = torch.zeros(length, length, dtype=torch.bool)

    def pairs(counts, indices):
        for i, n in enumerate(counts[0, 0].tolist()):
            for j in indices[0, 0, i, :n].tolist():
                rows, columns = (torch.arange(x * block, (x + 1) * block) for x in (i, j))
                yield rows[rows < length][:, None], columns[columns < length][None, :]

    for q, k in pairs(block_mask.full_kv_num_blocks, block_mask.full_kv_indices):
        mask[q, k] = True
    for q, k in pairs(block_mask.kv_num_blocks, block_mask.kv_indices):
        mask[q, k] = block_mask.mask_mod(0, 0, q, k)
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=enable_gqa
    )


INJECTED = {"dense": None, "varlen": loop_kernel, "flash": flash_kernel, "flex": block_kernel}


# -- one attention call ----------------------------------------------------------------------------


def forest(seed, longest=7):
    rng = random.Random(seed)
    trees = []
    for _ in range(2):
        prompts = [[1, *rng.choices([1, 2, 3], k=rng.randint(1, longest))] for _ in range(3)]
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


def attend(tensors, plan, **options):
    return attention.tree_attention(torch.nn.Module(), *tensors, None, tree_plan=plan, **options)[0]


def run(backend, tensors, row, scale):
    if backend == "dense":
        mask = attention.dense_mask(row.end)
        return torch.nn.functional.scaled_dot_product_attention(
            *tensors, attn_mask=mask, scale=scale, enable_gqa=True
        ).transpose(1, 2)
    if backend == "varlen on CPU":
        plan = attention.plan_row("varlen", row.end, row.segments)
    elif backend == "flex in small blocks":
        mask = attention_flex.tree_block_mask(row.end, block=8)
        plan = attention_flex.TreeFlex(mask, block_kernel)
    elif backend == "flex on CPU":
        plan = attention.plan_row("flex", row.end, row.segments, torch_flex.flex_attention)
    else:
        plan = attention.plan_row(backend, row.end, row.segments, INJECTED[backend])
    return attend(tensors, plan, scaling=scale, position_ids=None)


def random_tensors(row):
    shapes = [(1, heads, row.n_tokens, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [2 * torch.randn(shape, dtype=torch.float64) for shape in shapes]


def check_against_truth(backend, row):
    wide = [x.requires_grad_() for x in random_tensors(row)]
    narrow = [x.detach().float().requires_grad_() for x in wide]
    expected = truth(*wide, row.end.tolist(), 0.4)
    actual = run(backend, narrow, row, 0.4)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(expected)
    expected.backward(upstream)
    actual.backward(upstream.float())
    for ours, theirs in zip(narrow, wide, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("backend", [*BACKENDS, "varlen on CPU", "flex in small blocks"])
@pytest.mark.parametrize("seed", range(6))
def test_output_and_gradients_equal_float64_truth(backend, seed):
    check_against_truth(backend, forest(seed))


def test_varlen_computes_only_the_path_of_each_segment():
    shared = [1] * 10
    tree = Tree(tuple(Branch([*shared, k], [5] * 4) for k in (2, 2, 3)))
    row = pack_row([tree], RopeIndex(290, 2))
    for planned in (attention_varlen.plan_varlen, attention_varlen.plan_flash):
        plan = planned(row.segments, "cpu", loop_kernel)
        # trunk 10, guideline 2: 11, its responses 14 and 14, guideline 3: 11, its response 14
        assert (plan.cu_k[1:] - plan.cu_k[:-1]).tolist() == [10, 11, 14, 14, 11, 14]
        assert (plan.cu_q[1:] - plan.cu_q[:-1]).tolist() == [10, 1, 3, 3, 1, 3]
        assert (plan.max_q, plan.max_k) == (10, 14)


def saved_bytes(call):
    """What `call` keeps for backward; each storage counts once."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(storages.values())


@pytest.mark.parametrize("seed", range(3))
def test_spans_compute_each_pair_once(seed):
    row = forest(seed)
    times = torch.zeros(row.n_tokens, row.n_tokens)
    for q, k, causal in attention.plan_row("varlen", row.end, row.segments).calls():
        pairs = times[q, k]
        pairs += torch.ones_like(pairs).tril() if causal else 1
    assert torch.equal(times, attention.dense_mask(row.end)[0, 0].float())


def test_spans_keep_neither_copies_nor_masks():
    row = forest(0)
    q, k, v = (x.float().requires_grad_() for x in random_tensors(row))
    plan = attention.plan_row("varlen", row.end, row.segments)
    # the output as large as q, and a log-sum-exp per query and head
    wanted = 4 * (2 * q.numel() + k.numel() + v.numel() + HEADS * row.n_tokens)
    assert saved_bytes(lambda: attend((q, k, v), plan)) == wanted


def test_spans_join_in_float32():
    # A hundred siblings add to the gradient of one prompt.
    branches = tuple(Branch([1] * 40, [1] * 5) for _ in range(100))
    row = pack_row([Tree(branches)], RopeIndex(290, 2))
    wide = [x.requires_grad_() for x in random_tensors(row)]
    upstream = torch.randn(1, row.n_tokens, HEADS, DIM, dtype=torch.float64)
    truth(*wide, row.end.tolist(), 0.4).backward(upstream)
    errors = {}
    for backend in ("dense", "varlen on CPU"):
        half = [x.detach().bfloat16().requires_grad_() for x in wide]
        run(backend, half, row, 0.4).backward(upstream.bfloat16())
        errors[backend] = [
            float((mine.grad.double() - theirs.grad).norm() / theirs.grad.norm())
            for mine, theirs in zip(half, wide, strict=True)
        ]
    for dense, spans in zip(*errors.values(), strict=True):
        assert spans < 1.2 * dense < 0.02


def test_spans_take_an_expanded_gradient():
    row, tensors = forest(1), random_tensors(forest(1))
    grads = []
    for backend in ("dense", "varlen on CPU"):
        leaves = [x.clone().requires_grad_() for x in tensors]
        run(backend, leaves, row, 0.4).sum().backward()
        grads.append([x.grad for x in leaves])
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("wanted", [False, True])
def test_flash_follows_torchs_switch_for_determinism(wanted):
    seen = []

    def kernel(*args, deterministic, **options):
        seen.append(deterministic)
        return flash_kernel(*args, **options)

    row, before = forest(0), torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted)
    try:
        plan = attention.plan_row("flash", row.end, row.segments, kernel)
        attend([x.float() for x in random_tensors(row)], plan)
    finally:
        torch.use_deterministic_algorithms(before)
    assert seen == [wanted]


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


# -- FlexAttention itself --------------------------------------------------------------------------

TABLES = [
    f"{full}{side}_{what}"
    for full in ("", "full_")
    for side in ("kv", "q")
    for what in ("num_blocks", "indices")
]


def check_tables(end, block):
    def sees(batch, head, query, key):
        return (key <= query) & (query < end[key])

    n = len(end)
    theirs = torch_flex.create_block_mask(sees, None, None, n, n, "cpu", BLOCK_SIZE=block)
    ours = attention_flex.tree_block_mask(end, block)
    assert ours.shape == theirs.shape == (1, 1, n, n) and ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    for name in TABLES:
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        assert getattr(ours, name).dtype == torch.int32
    return ours


@pytest.mark.parametrize(("seed", "longest", "block"), [(0, 7, 4), (1, 60, 16), (2, 60, 128)])
def test_block_tables_are_those_of_create_block_mask(seed, longest, block):
    tables = check_tables(forest(seed, longest).end, block)
    if block < 128:
        assert tables.full_kv_num_blocks.sum() > 0 and tables.kv_num_blocks.sum() > 0


@pytest.mark.parametrize("length", [20, 23])
def test_block_tables_wherever_the_first_tree_ends(length):
    for stop in range(6, length + 1):
        check_tables(torch.tensor([stop] * stop + [length] * (length - stop)), 4)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_real_flex_attention_equals_float64_truth(monkeypatch):
    # Torch refuses gradients on a CPU, though its uncompiled operator has them.
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    check_against_truth("flex on CPU", forest(3, longest=100))


@pytest.fixture
def compiler(monkeypatch):
    """torch.compile at work, whatever the environment says."""
    for switch in SWITCHES:
        monkeypatch.delenv(switch, raising=False)
    with torch._dynamo.config.patch(disable=False):
        yield


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_the_first_row_compiles_for_rows_of_every_length(compiler, monkeypatch, recompute):
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    counter = CompileCounterWithBackend("aot_eager")
    kernel = attention_flex.compiled_flex(counter)
    lengths, compiled = set(), []
    for seed in range(4):
        row = forest(seed, longest=200)
        assert row.n_tokens > attention_flex.BLOCK
        lengths.add(row.n_tokens)
        tensors = [x.float().requires_grad_() for x in random_tensors(row)]
        plan = attention.plan_row("flex", row.end, row.segments, kernel)
        call = partial(attend, plan=plan, scaling=0.4)
        ours = checkpoint(call, tensors, use_reentrant=False) if recompute else call(tensors)
        theirs = run("dense", tensors, row, 0.4)
        assert (ours - theirs).abs().max() < 1e-5
        upstream = torch.randn_like(ours)
        expected = torch.autograd.grad(theirs, tensors, upstream)
        for mine, other in zip(torch.autograd.grad(ours, tensors, upstream), expected, strict=True):
            assert (mine - other).norm() <= 1e-5 * other.norm()
        compiled.append(counter.frame_count)
    assert len(lengths) == 4 and compiled[0] > 0 and set(compiled) == {compiled[0]}


# -- a model: a packed row equals its rollouts one by one ------------------------------------------


def tiny_vl():
    path = Path(__file__).with_name("_tiny_vl.py")
    spec = importlib.util.spec_from_file_location("helper_tiny_vl", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def questions():
    """An image with a question, and a text: 3 guidelines x 2 rollouts each."""
    generator = torch.Generator().manual_seed(5)
    return [tiny_vl().make_tree(generator, grids=grids) for grids in (((1, 4, 6),), ())]


def selected(logits, targets):
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


@pytest.fixture(scope="module")
def plain(questions):
    """(log-probs, gradients) of transformers' own forward, a row per rollout."""
    tiny = tiny_vl()
    model, out = tiny.build(), []
    for tree in questions:
        for branch in tree.branches:
            ids = torch.tensor([[*branch.prompt_ids, *branch.response_ids]])
            logits = model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=(ids == tiny.IMAGE).int(),
                pixel_values=tree.pixel_values,
                image_grid_thw=tree.image_grid_thw,
            ).logits
            n = len(branch.response_ids)
            out.append(selected(logits[0, -n - 1 : -1], ids[0, -n:]))
    logprob = torch.cat(out)
    (logprob * weights(len(logprob))).sum().backward()
    return logprob.detach(), {name: p.grad for name, p in model.named_parameters()}


def weights(n):
    return torch.randn(n, generator=torch.Generator().manual_seed(6)) / n


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("backend", [*BACKENDS, "varlen on CPU"])
def test_a_packed_row_equals_plain_rows(backend, checkpointing, questions, plain):
    model, kernel = tiny_vl().build(), INJECTED.get(backend)
    backend = backend.removesuffix(" on CPU")
    attention.set_backend(model, backend)
    if checkpointing:
        model.train()  # dropout is 0
        model.gradient_checkpointing_enable({"use_reentrant": False})
    row = pack_row(questions, RopeIndex.of(model.config))
    logits = model(
        input_ids=row.input_ids[None],
        position_ids=row.position_ids[:, None],
        pixel_values=row.pixel_values,
        image_grid_thw=row.image_grid_thw,
        use_cache=False,
        logits_to_keep=row.pred_index,
        **attention.forward_arguments(backend, row.end, row.segments, kernel),
    ).logits
    logprob = selected(logits[0], row.targets)
    assert (logprob - plain[0]).abs().max() < 1e-5
    (logprob * weights(len(logprob))).sum().backward()
    for name, param in model.named_parameters():
        theirs = plain[1][name]
        assert theirs is not None and theirs.norm() > 0, name
        assert (param.grad - theirs).norm() <= 1e-5 * theirs.norm(), name


# -- which backend, and refusals -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "device", "dtype", "chosen"),
    [
        ("auto", "cpu", torch.float32, "varlen"),
        ("auto", "cpu", torch.bfloat16, "varlen"),
        ("dense", "cpu", torch.float32, "dense"),
        ("auto", "cuda", torch.bfloat16, "varlen"),
        ("auto", "cuda:1", torch.float32, "dense"),
        ("dense", "cuda", torch.float32, "dense"),
        ("varlen", "cpu", torch.float32, "varlen"),
        ("varlen", "cuda", torch.float16, "varlen"),
        ("flex", "cuda", torch.float32, "flex"),
    ],
)
def test_backend_by_device_and_dtype(compiler, name, device, dtype, chosen):
    assert attention.choose_backend(name, device, dtype) == chosen


@pytest.mark.parametrize("name", ["varlen", "flash"])
def test_flash_attentions_kernels_take_no_float32(name, monkeypatch):
    monkeypatch.setattr(attention, "find_spec", lambda name: name)
    wanted = rf"'{name}' .* float32: set model.dtype: bfloat16 or model.attention: dense"
    with pytest.raises(ValueError, match=wanted):
        attention.choose_backend(name, "cuda", torch.float32)
    # Of a kernel of one's own nothing is known.
    assert attention.choose_backend(name, "cuda", torch.float32, INJECTED[name]) == name


def test_flash_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(attention, "find_spec", lambda name: name == "flash_attn" or None)
    assert attention.choose_backend("flash", "cuda", torch.bfloat16) == "flash"
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="'flash' needs flash-attn, .* pip install .*flash"):
        attention.choose_backend("flash", "cuda", torch.bfloat16)


@pytest.mark.parametrize("backend", ["flash", "flex"])
def test_a_kernel_of_ones_own_runs_anywhere(backend):
    assert attention.choose_backend(backend, "cpu", torch.float32, INJECTED[backend]) == backend
    with pytest.raises(ValueError, match=rf"'{backend}' .*cpu: use varlen, .*attention=auto"):
        attention.choose_backend(backend, "cpu", torch.float32)


@pytest.mark.parametrize("switch", SWITCHES)
def test_flex_asks_for_a_compiler(compiler, switch, monkeypatch):
    monkeypatch.setenv(switch, "1")
    with pytest.raises(ValueError, match=f"'flex' needs torch.compile, which {switch}=1"):
        attention.choose_backend("flex", "cuda", torch.bfloat16)


def test_refusals():
    with pytest.raises(ValueError, match="'eager' is unknown; .* dense, varlen, flash, flex"):
        attention.choose_backend("eager", "cpu", torch.float32)
    row = forest(0)
    with pytest.raises(ValueError, match="'dense' has no plan"):
        attention.plan_row("dense", row.end, row.segments)
    tensors = [x.float() for x in random_tensors(row)]
    plan = attention.plan_row("varlen", row.end, row.segments, loop_kernel)
    with pytest.raises(ValueError, match="packed rows only"):
        attend(tensors, None)
    with pytest.raises(ValueError, match="without mask or dropout"):
        attend(tensors, plan, dropout=0.1)
    with pytest.raises(ValueError, match="got batch 2"):
        attend([x.expand(2, -1, -1, -1) for x in tensors], plan)
