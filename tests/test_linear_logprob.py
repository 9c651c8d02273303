"""linear_logprob against autograd over the full float64 logits."""

import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmedx_fast.kernels import _logits
from mmedx_fast.kernels.linear_logprob import head_weight, linear_logprob
from mmedx_fast.kernels.policy_loss import PolicyLossSpec, linear_policy_loss

both = pytest.mark.usefixtures("implementation")


def reference(hidden, weight, targets, *, temperature=1.0, bias=None, softcap=None, banned=None):
    """Full logits in float64, nothing clever."""
    z = hidden.double() @ weight.double().t()
    if bias is not None:
        z = z + bias.double()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature
    if banned is not None:
        z = z.index_fill(1, banned, -torch.inf)
    logp = z.log_softmax(1)
    entropy = -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(1)
    return logp.gather(1, targets[:, None]).squeeze(1), entropy


def problem(n=13, h=24, v=127, dtype=torch.float32, seed=0, scale=1.0, bias=False):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=g, dtype=torch.float64)
    weight = torch.randn(v, h, generator=g, dtype=torch.float64) * scale
    targets = torch.randint(v, (n,), generator=g)
    leaves = [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
    b = (
        torch.randn(v, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
        if bias
        else None
    )
    return leaves[0], leaves[1], targets, b


def grads(outputs, leaves, seed=1):
    g = torch.Generator().manual_seed(seed)
    loss = sum(
        (o.double() * torch.randn(o.shape, generator=g, dtype=torch.float64)).sum() for o in outputs
    )
    return torch.autograd.grad(loss, [x for x in leaves if x is not None], retain_graph=True)


@both
@pytest.mark.parametrize("v", [1, 5, 127, 50257])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"softcap": 3.0, "temperature": 1.3},
        {"banned": torch.tensor([0, 3])},
    ],
    ids=["plain", "temperature", "softcap", "banned"],
)
def test_values_and_gradients_equal_full_logits(v: int, options: dict) -> None:
    if "banned" in options and v < 5:  # banning nothing is allowed too
        options = {"banned": torch.zeros(0, dtype=torch.long)}
    n = 5 if v > 10_000 else 13
    hidden, weight, targets, bias = problem(n=n, v=v, bias=True)
    if len(options.get("banned", ())):
        targets = targets.clamp(min=4)
    got = linear_logprob(hidden, weight, targets, bias=bias, chunk=7, **options)
    want = reference(hidden, weight, targets, bias=bias, **options)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, atol=2e-5, rtol=1e-5)
    leaves = [hidden, weight, bias]
    for a, b in zip(grads(got, leaves), grads(want, leaves), strict=True):
        torch.testing.assert_close(a, b, atol=5e-5, rtol=1e-4)


@both
@pytest.mark.parametrize("v", [129_920, 151_936, 152_064])
def test_vocabularies_of_real_models(v: int) -> None:
    """Rows of more than thirty blocks, the last of them cut off elsewhere in each."""
    hidden, weight, targets, _ = problem(n=2, h=4, v=v)
    targets[1] = v - 1
    got = linear_logprob(hidden, weight, targets)
    want = reference(hidden, weight, targets)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-5, rtol=1e-5)
    for a, b in zip(grads(got, [hidden, weight]), grads(want, [hidden, weight]), strict=True):
        torch.testing.assert_close(a, b, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("chunk", [None, 2])  # a kept tile, and a recomputed one
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck_in_float64(chunk: int | None, softcap: float | None) -> None:
    hidden, weight, targets, bias = problem(n=5, h=3, v=7, dtype=torch.float64, bias=True)

    def op(h: Tensor, w: Tensor, b: Tensor):
        return linear_logprob(h, w, targets, bias=b, temperature=0.8, softcap=softcap, chunk=chunk)

    assert torch.autograd.gradcheck(op, (hidden, weight, bias))


@both
@pytest.mark.parametrize("chunk", [1, 3, 12, 13, 10_000, None])
def test_result_does_not_depend_on_chunk(chunk: int | None) -> None:
    hidden, weight, targets, _ = problem()
    base = linear_logprob(hidden, weight, targets, chunk=6)
    got = linear_logprob(hidden, weight, targets, chunk=chunk)
    for a, b in zip(got, base, strict=True):
        torch.testing.assert_close(a, b, atol=4e-6, rtol=1e-6)
    for a, b in zip(grads(got, [hidden, weight]), grads(base, [hidden, weight]), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@both
def test_only_what_requires_a_gradient_gets_one() -> None:
    hidden, weight, targets, bias = problem(bias=True)
    for mask in [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)]:
        leaves = [
            x.detach().requires_grad_(bool(m))
            for x, m in zip((hidden, weight, bias), mask, strict=True)
        ]
        logprob, entropy = linear_logprob(leaves[0], leaves[1], targets, bias=leaves[2])
        (logprob.sum() + entropy.sum()).backward()
        assert [x.grad is not None for x in leaves] == [bool(m) for m in mask]


@both
def test_second_backward_gives_the_same_gradient() -> None:
    hidden, weight, targets, _ = problem()
    logprob, entropy = linear_logprob(hidden, weight, targets)
    loss = logprob.sum() - entropy.sum()
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0].clone()
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], first, atol=1e-6, rtol=1e-6)


@both
def test_without_entropy_and_without_grad() -> None:
    hidden, weight, targets, _ = problem()
    logprob, entropy = linear_logprob(hidden, weight, targets, return_entropy=False)
    assert entropy is None
    want = reference(hidden, weight, targets)[0]
    torch.testing.assert_close(
        torch.autograd.grad(logprob.sum(), hidden)[0],
        torch.autograd.grad(want.sum(), hidden)[0],
        atol=1e-5,
        rtol=1e-4,
    )
    with torch.no_grad():
        assert not linear_logprob(hidden, weight, targets)[0].requires_grad


@both
def test_no_tokens() -> None:
    hidden, weight, _, _ = problem(n=3)
    empty = hidden[:0]
    logprob, entropy = linear_logprob(empty, weight, torch.zeros(0, dtype=torch.long))
    assert logprob.shape == entropy.shape == (0,)
    grad = torch.autograd.grad(logprob.sum() + entropy.sum(), [hidden, weight])
    assert all((x == 0).all() for x in grad)


@both
def test_strided_hidden_in_a_poisoned_buffer() -> None:
    hidden, weight, targets, _ = problem()
    wide = torch.full((hidden.shape[0] * 2, hidden.shape[1] + 5), torch.nan)
    wide[::2, 2:-3] = hidden.detach()
    view = wide[::2, 2:-3].requires_grad_()
    transposed = hidden.detach().t().contiguous().t().requires_grad_()
    want = linear_logprob(hidden, weight, targets)
    for other in (view, transposed):
        got = linear_logprob(other, weight, targets)
        torch.testing.assert_close(got[0], want[0], atol=4e-6, rtol=1e-6)
        torch.testing.assert_close(
            grads(got, [other])[0], grads(want, [hidden])[0], atol=1e-5, rtol=1e-5
        )


@both
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_infinite_bias_rows_are_impossible_tokens(softcap: float | None) -> None:
    hidden, weight, targets, _ = problem()
    bias = torch.zeros(127)
    bias[[1, 50, 126]] = -torch.inf
    targets = torch.where(torch.isin(targets, torch.tensor([1, 50, 126])), 2, targets)
    got = linear_logprob(hidden, weight, targets, bias=bias, softcap=softcap)
    keep = bias.isfinite()
    index = keep.cumsum(0) - 1
    want = linear_logprob(hidden, weight[keep], index[targets], softcap=softcap)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=4e-6, rtol=1e-6)
    torch.testing.assert_close(
        grads(got, [hidden, weight])[1], grads(want, [hidden, weight])[1], atol=1e-5, rtol=1e-5
    )


@both
def test_banned_target_has_no_probability() -> None:
    hidden, weight, targets, _ = problem(n=4)
    logprob, entropy = linear_logprob(hidden, weight, targets, banned=targets[:1])
    assert logprob[0] == -torch.inf and entropy.isfinite().all()


@both
@pytest.mark.parametrize("how", ["banned", "bias"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_row_without_a_possible_id_is_nan(how: str, softcap: float | None) -> None:
    hidden, weight, targets, _ = problem(n=2, v=300)
    weight = weight.detach()
    options = {"banned": torch.arange(300)} if how == "banned" else {}
    options |= {"bias": torch.full((300,), -torch.inf)} if how == "bias" else {}
    out = linear_logprob(hidden, weight, targets, softcap=softcap, **options)
    assert all(x.isnan().all() for x in (*out, *grads(out, [hidden])))
    if how == "bias":  # a banned target is an error of its own there
        one = torch.ones(2)
        loss, _ = linear_policy_loss(
            hidden, weight, targets, one, token_weight=one, spec=PolicyLossSpec(), softcap=softcap,
            **options,
        )  # fmt: skip
        assert loss.isnan() and torch.autograd.grad(loss, hidden)[0].isnan().all()


@both
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_large_common_offset(offset: float) -> None:
    # integer logits: exact in float32 also beside the offset, so nothing may be lost
    g = torch.Generator().manual_seed(3)
    hidden = torch.randint(-2, 3, (9, 6), generator=g).float().requires_grad_()
    weight = torch.randint(-2, 3, (33, 6), generator=g).float()
    targets = torch.randint(33, (9,), generator=g)
    got = linear_logprob(hidden, weight, targets, bias=torch.full((33,), offset))
    want = reference(hidden, weight, targets)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(
        grads(got, [hidden])[0], grads(want, [hidden])[0], atol=1e-5, rtol=1e-5
    )


@both
def test_gradient_of_a_nearly_certain_token_keeps_its_digits() -> None:
    hidden = torch.tensor([[18.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [0.0]])
    got = linear_logprob(hidden, weight, torch.tensor([0]), return_entropy=False)[0]
    want = reference(hidden, weight, torch.tensor([0]))[0]
    a, b = (torch.autograd.grad(x.sum(), hidden)[0] for x in (got, want))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=0.0)  # 1 - p is 3e-8


@both
def test_bf16_operands_keep_float32_logits() -> None:
    hidden, weight, targets, _ = problem(h=64, v=500, scale=0.5, dtype=torch.bfloat16)
    want = reference(hidden, weight, targets)
    got = linear_logprob(hidden, weight, targets)
    rounded = linear_logprob(hidden, weight, targets, logits_dtype=torch.bfloat16)
    assert got[0].dtype == torch.float32
    fine = (got[0].double() - want[0]).abs().max()
    coarse = (rounded[0].double() - want[0]).abs().max()
    assert fine < 1e-5 < 1e-3 < coarse < 0.2
    mine, truth = grads(got, [hidden, weight]), grads(want, [hidden, weight])
    eager = (hidden @ weight.t()).float().log_softmax(1)
    eager_out = (
        eager.gather(1, targets[:, None]).squeeze(1),
        -(eager.exp() * eager).sum(1),
    )
    for a, b, e in zip(mine, truth, grads(eager_out, [hidden, weight]), strict=True):
        assert a.dtype == torch.bfloat16
        # no worse than torch itself in the same dtype
        assert (a.double() - b).norm() <= 1.5 * (e.double() - b).norm() + 1e-6


@both
def test_autocast_does_not_lower_the_precision() -> None:
    hidden, weight, targets, _ = problem()
    want = linear_logprob(hidden, weight, targets)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear_logprob(hidden, weight, targets)[0]
    assert torch.equal(got, want)


class Work(TorchDispatchMode):
    """Multiply-adds of every GEMM, and the bytes of the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.macs, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            a, b = args[-2:]
            self.macs += a.shape[0] * a.shape[1] * b.shape[1]
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return out


@both
@pytest.mark.parametrize(
    ("keep_bytes", "passes"), [(0, 3), (1 << 30, 2)], ids=["recompute", "keep"]
)
def test_gemm_passes_and_memory_of_a_frozen_head(keep_bytes: int, passes: int) -> None:
    hidden, weight, targets, _ = problem(n=24, v=2999, h=4)
    weight = weight.detach()
    one = hidden.numel() * weight.shape[0]
    tile = 4 * 8 * _logits.raw_width(weight.shape[0])
    with torch.no_grad(), Work() as work:
        linear_logprob(hidden, weight, targets, chunk=8)
    assert work.macs == one and work.largest == tile
    with Work() as work:
        out = linear_logprob(hidden, weight, targets, chunk=8, keep_bytes=keep_bytes)
        (out[0].sum() + out[1].sum()).backward()
    assert work.macs == passes * one
    assert work.largest == (tile if passes == 3 else 3 * tile)


# Ways to do without the entropy's gradient.
LOOSE = ({"return_entropy": False}, {"entropy_grad": False})


@both
@pytest.mark.parametrize("loose", LOOSE, ids=["no entropy", "constant entropy"])
def test_without_entropy_a_frozen_head_takes_two_passes_and_keeps_no_logits(loose) -> None:
    hidden, weight, targets, _ = problem(n=24, v=2999, h=4)
    weight = weight.detach()
    with Work() as work:
        logprob, _ = linear_logprob(hidden, weight, targets, chunk=8, keep_bytes=0, **loose)
        logprob.sum().backward()
    assert work.macs == 2 * hidden.numel() * weight.shape[0]
    assert work.largest == 4 * 8 * _logits.raw_width(weight.shape[0])


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_made_in_the_forward_is_that_of_recomputing(dtype: torch.dtype) -> None:
    """Any upstream gradient, a masked row that holds NaN, and a second backward."""
    hidden, weight, targets, _ = problem(dtype=dtype)
    dirty, head = hidden.detach().clone(), weight.detach()
    dirty[::3] = torch.nan
    upstream = torch.randn(len(targets)) * (torch.arange(len(targets)) % 3 != 0)

    def gradient(h: Tensor, w: Tensor, entropy: bool) -> Tensor:
        options = {"chunk": 8, "keep_bytes": 0, "temperature": 0.7, "softcap": 5.0}
        logprob, _ = linear_logprob(h, w, targets, return_entropy=entropy, **options)
        first = torch.autograd.grad(logprob, h, upstream.to(logprob.dtype), retain_graph=True)[0]
        again = torch.autograd.grad(logprob, h, upstream.to(logprob.dtype))[0]
        assert torch.equal(first, again)
        return first.double()

    got = gradient(dirty.requires_grad_(), head, entropy=False)
    recomputed = gradient(dirty, head, entropy=True)
    wide = hidden.detach().double().requires_grad_()
    logprob, _ = reference(wide, head.double(), targets, temperature=0.7, softcap=5.0)
    truth = torch.autograd.grad(logprob, wide, upstream.double())[0]
    theirs = (recomputed - truth).norm() / truth.norm()
    assert (got - truth).norm() / truth.norm() <= 1.5 * theirs + 1e-6


@both
@pytest.mark.parametrize("keep_bytes", [0, None], ids=["gradient", "logits"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_a_constant_entropy_is_the_same_and_has_no_gradient(
    keep_bytes: int | None, frozen: bool
) -> None:
    hidden, weight, targets, _ = problem()
    weight = weight.detach().requires_grad_(not frozen)
    want, options = linear_logprob(hidden, weight, targets), {"keep_bytes": keep_bytes}
    logprob, entropy = linear_logprob(hidden, weight, targets, entropy_grad=False, **options)
    assert torch.equal(entropy, want[1]) and not entropy.requires_grad
    leaves = [hidden] if frozen else [hidden, weight]
    for a, b in zip(
        torch.autograd.grad((2 * logprob * entropy).sum(), leaves),
        torch.autograd.grad((2 * want[0] * want[1].detach()).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@both
@pytest.mark.parametrize("loose", LOOSE, ids=["no entropy", "constant entropy"])
def test_compiles_without_entropy_too(loose) -> None:
    hidden, weight, targets, _ = problem(n=6, v=40)
    weight = weight.detach()

    def loss_of(h: Tensor) -> Tensor:
        options = {"temperature": 0.8, "chunk": 4, "keep_bytes": 0}
        logprob, entropy = linear_logprob(h, weight, targets, **loose, **options)
        return logprob.sum() if entropy is None else (logprob * entropy).sum()

    want = torch.autograd.grad(loss_of(hidden), hidden)[0]
    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
    assert torch.equal(torch.autograd.grad(compiled(hidden), hidden)[0], want)


@both
def test_compiles_without_a_graph_break() -> None:
    hidden, weight, targets, bias = problem(n=6, v=40, bias=True)

    def loss_of(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        logprob, entropy = linear_logprob(h, w, targets, bias=b, temperature=0.8, chunk=4)
        return (2 * logprob).sum() - entropy.sum()

    want = torch.autograd.grad(loss_of(hidden, weight, bias), [hidden, weight, bias])
    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(hidden, weight, bias), [hidden, weight, bias])
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@both
def test_a_row_without_upstream_gradient_may_hold_anything() -> None:
    hidden, weight, targets, _ = problem()
    dirty = hidden.detach().clone()
    dirty[::3] = torch.nan
    used = torch.arange(len(targets)) % 3 != 0

    def gradients(h: Tensor):
        h = h.clone().detach().requires_grad_()
        logprob, entropy = linear_logprob(h, weight, targets, chunk=8)
        assert torch.equal(logprob.isfinite(), h.detach().isfinite().all(1))
        loss = torch.where(used, logprob + entropy, 0.0).sum()
        return torch.autograd.grad(loss, [h, weight])

    for a, b in zip(gradients(dirty), gradients(hidden), strict=True):
        assert torch.equal(a, b)


@both
def test_the_same_bits_twice() -> None:
    hidden, weight, targets, _ = problem(dtype=torch.bfloat16)
    first, second = (
        (*out, *grads(out, [hidden, weight]))
        for out in (linear_logprob(hidden, weight, targets, chunk=8) for _ in range(2))
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@both
@pytest.mark.parametrize("temperature", [0.1, 1.0, 2.0])
def test_all_negative_logits_with_two_maxima(temperature: float) -> None:
    hidden, weight, targets, _ = problem(v=130)
    bias = torch.full((130,), -60.0)
    weight = weight.detach().clone()
    weight[129] = weight[5]
    bias[[5, 129]] += 30
    got = linear_logprob(hidden, weight, targets, bias=bias, temperature=temperature)
    want = reference(hidden, weight, targets, bias=bias, temperature=temperature)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-4, rtol=1e-6)
    torch.testing.assert_close(
        grads(got, [hidden])[0], grads(want, [hidden])[0], atol=2e-4, rtol=1e-4
    )


def test_float64_asks_for_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets, _ = problem(dtype=torch.float64)
    monkeypatch.setenv("MMEDX_KERNELS", "triton")
    with pytest.raises(RuntimeError, match="linear_logprob cannot use Triton: .* float64"):
        linear_logprob(hidden, weight, targets)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.tensor([0, 1, 127])}, r"targets\[2\] = 127"),
        ({"targets": torch.tensor([0, -100, 1])}, r"targets\[1\] = -100"),
        ({"targets": torch.tensor([0.0, 1.0, 2.0])}, "targets.* integer.*token ids.*float32"),
        ({"targets": torch.tensor([False, True, True])}, "targets.* integer.*bool"),
        ({"targets": torch.tensor([0, 1])}, r"targets must be \[3\] token ids"),
        ({"banned": torch.arange(127) > 120}, r"banned.* integer.*mask\.nonzero.*bool"),
        ({"banned": torch.tensor([3.0])}, "banned.* integer.*float32"),
        ({"banned": torch.tensor([[3]])}, r"banned must be \[n\]"),
        ({"weight": torch.zeros(127, 5)}, "hidden must be"),
        ({"bias": torch.zeros(3)}, "bias"),
        ({"temperature": 0.0}, "temperature"),
        ({"softcap": -1.0}, "softcap"),
        ({"softcap": torch.inf}, "softcap"),
        ({"softcap": torch.nan}, "softcap"),
        ({"chunk": 0}, "chunk"),
        ({"logits_dtype": torch.int32}, "logits_dtype"),
    ],
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    hidden, weight, targets, _ = problem(n=3)
    arguments = {"hidden": hidden, "weight": weight, "targets": targets} | change
    with pytest.raises(ValueError, match=message):
        linear_logprob(**arguments)


def test_partitioned_weight_is_refused() -> None:
    weight = torch.zeros(0)
    weight.ds_id = 7  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="GatheredParameters"):
        linear_logprob(torch.zeros(2, 3), weight, torch.tensor([0, 1]))


@both
@pytest.mark.parametrize("keep_bytes", [0, None], ids=["recompute", "keep"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_a_weight_freed_before_backward_is_named(keep_bytes: int | None, frozen: bool) -> None:
    hidden, weight, targets, _ = problem()
    weight = weight.detach().requires_grad_(not frozen)
    logprob, _ = linear_logprob(hidden, weight, targets, keep_bytes=keep_bytes)
    weight.data = torch.empty(0)  # as ZeRO-3 does
    with pytest.raises(ValueError, match="keep GatheredParameters open until backward"):
        logprob.sum().backward()


@both
def test_a_frozen_weight_may_go_where_forward_made_the_gradient() -> None:
    hidden, weight, targets, _ = problem()
    weight = weight.detach()
    options = {"keep_bytes": 0, "return_entropy": False}
    want = torch.autograd.grad(linear_logprob(hidden, weight, targets, **options)[0].sum(), hidden)
    logprob, _ = linear_logprob(hidden, weight, targets, **options)
    weight.data = torch.empty(0)
    assert torch.equal(torch.autograd.grad(logprob.sum(), hidden)[0], want[0])


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lm_head = torch.nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(x)


def test_head_weight_is_what_the_model_computes() -> None:
    from peft import LoraConfig, get_peft_model

    model = Model()
    x = torch.randn(3, 4)

    def logits() -> Tensor:
        weight, bias = head_weight(model.lm_head)
        return torch.nn.functional.linear(x, weight, bias)

    assert torch.equal(logits(), model(x))
    config = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    wrapped = get_peft_model(model, config)
    with pytest.raises(ValueError, match=r"active LoRA adapters \(default\).*target_modules"):
        head_weight(model.lm_head)
    with wrapped.disable_adapter():
        torch.testing.assert_close(logits(), wrapped(x))
    wrapped.merge_adapter()
    torch.testing.assert_close(logits(), wrapped(x))


TUNERS = {
    "IA3": {"feedforward_modules": [], "init_ia3_weights": False},
    "LoHa": {"r": 2, "init_weights": False},
    "LoKr": {"r": 2, "init_weights": False},
    "Vera": {"r": 2, "init_weights": False},
    "OFT": {"oft_block_size": 2, "init_weights": False},
    "BOFT": {"boft_block_size": 2, "init_weights": False},
    "HRA": {"r": 2, "init_weights": False},
    "TrainableTokens": {"token_indices": [1, 2], "init_weights": False},
    "Lora": {"r": 2, "init_lora_weights": False},
    "AdaLora": {"init_r": 2, "total_step": 10, "init_lora_weights": False},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tuner", TUNERS)
def test_head_weight_under_any_tuner_is_what_the_model_computes_or_refused(tuner: str) -> None:
    import peft

    model, x = Model(), torch.randn(3, 4)
    config = getattr(peft, f"{tuner}Config")(target_modules=["lm_head"], **TUNERS[tuner])
    wrapped = peft.get_peft_model(model, config)

    def logits() -> Tensor:
        weight, bias = head_weight(model.lm_head)
        return torch.nn.functional.linear(x, weight, bias)

    with pytest.raises(ValueError, match=r"active (LoRA )?adapters \(default\).*target_modules"):
        logits()
    with wrapped.disable_adapter():
        torch.testing.assert_close(logits(), wrapped(x))
    wrapped.merge_adapter()
    torch.testing.assert_close(logits(), wrapped(x))
    with wrapped.disable_adapter(), pytest.raises(ValueError, match="unmerge"):
        logits()


def test_head_weight_ignores_a_lora_adapter_of_other_layers() -> None:
    from peft import LoraConfig, get_peft_model

    model, config = Model(), LoraConfig(r=2, target_modules=["lm_head"])
    model.body = torch.nn.Linear(4, 4)
    wrapped = get_peft_model(model, config)
    wrapped.add_adapter("other", LoraConfig(r=2, target_modules=["body"]))
    wrapped.set_adapter("other")
    assert head_weight(model.lm_head)[0] is model.lm_head.base_layer.weight


def test_head_weight_of_a_head_trained_in_full() -> None:
    from peft import LoraConfig, get_peft_model

    model = torch.nn.Sequential()
    model.body = torch.nn.Linear(4, 4)
    model.lm_head = torch.nn.Linear(4, 6)
    config = LoraConfig(r=2, target_modules=["body"], modules_to_save=["lm_head"])
    wrapped = get_peft_model(model, config)
    head = model.lm_head
    with torch.no_grad():
        head.modules_to_save["default"].weight.add_(1.0)
    assert head_weight(head)[0] is head.modules_to_save["default"].weight
    with wrapped.disable_adapter():
        assert head_weight(head)[0] is head.original_module.weight
    with pytest.raises(ValueError, match="ReLU has no"):
        head_weight(torch.nn.ReLU())


def _shard(rank: int, port: int, path: str, mode: str) -> None:
    os.environ["MMEDX_KERNELS"] = mode
    if mode == "triton" and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    hidden, weight, targets, bias = problem(v=46, bias=True)
    banned = torch.tensor([2, 40])
    targets = torch.where(torch.isin(targets, banned), 3, targets)
    part = slice(23 * rank, 23 * rank + 23)
    w, b = (x.detach()[part].clone().requires_grad_() for x in (weight, bias))
    out = linear_logprob(
        hidden,
        w,
        targets,
        bias=b,
        softcap=4.0,
        temperature=0.9,
        banned=banned,
        chunk=10,
        group=dist.group.WORLD,
    )
    torch.save([*[x.detach() for x in out], *grads(out, [hidden, w, b])], f"{path}/{rank}.pt")
    try:
        linear_logprob(hidden, w, targets + 40, group=dist.group.WORLD)
    except ValueError as error:
        assert "no rank" in str(error)
    else:
        raise AssertionError("a target outside every shard was accepted")
    dist.destroy_process_group()


def test_vocabulary_in_two_processes(tmp_path, implementation: str) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_shard, (port, str(tmp_path), implementation), nprocs=2)
    shards = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2)]
    hidden, weight, targets, bias = problem(v=46, bias=True)
    banned = torch.tensor([2, 40])
    targets = torch.where(torch.isin(targets, banned), 3, targets)
    want = reference(
        hidden, weight, targets, bias=bias, softcap=4.0, temperature=0.9, banned=banned
    )
    gh, gw, gb = grads(want, [hidden, weight, bias])
    for logprob, entropy, h, _, _ in shards:
        torch.testing.assert_close(logprob.double(), want[0].detach(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(entropy.double(), want[1].detach(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(h, gh, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(torch.cat([s[3] for s in shards]), gw, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(torch.cat([s[4] for s in shards]), gb, atol=2e-5, rtol=1e-4)
