"""linear_policy_loss against autograd over full float64 logits, and against TRL's own loss code."""

import ast
import importlib.metadata
import math
import os
import socket
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

from mmedx_fast.kernels import _logits, _policy_math
from mmedx_fast.kernels.policy_loss import (
    PolicyLossSpec,
    linear_policy_loss,
    merge_metrics,
    reduce_metrics,
    token_weights,
)

both = pytest.mark.usefixtures("implementation")
LENGTHS = [4, 7, 1, 6, 3]
H, V = 12, 61


def problem(dtype=torch.float64, seed=0, lengths=LENGTHS):
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    hidden, weight, bias = normal(n, H), normal(V, H) * 0.5, normal(V) * 0.1
    targets = torch.randint(V, (n,), generator=g)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)) * 3 + 1, torch.tensor(lengths))
    logp = (hidden @ weight.t() + bias).log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    advantage = normal(len(lengths))
    mask = torch.rand(n, generator=g) > 0.15
    given = {
        "old_logprob": logp + 0.3 * normal(n),
        "ref_logprob": logp + 0.4 * normal(n),
        "rollout_logprob": logp + 0.3 * normal(n),
    }
    leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight, bias)]
    index = torch.unique_consecutive(sequence, return_inverse=True)[1]
    return SimpleNamespace(
        hidden=leaves[0],
        weight=leaves[1],
        bias=leaves[2],
        targets=targets,
        sequence=sequence,
        index=index,
        advantages=advantage[index],
        mask=mask,
        given=given,
        lengths=lengths,
    )


def per_token_loss(logp, entropy, p, spec, old, ref, rollout):
    """[N] loss of each token by autograd-friendly formulas, sequence by sequence, in plain
    loops."""
    old = logp.detach() if old is None else old
    out = []
    for s in p.index.unique():
        here = p.index == s
        lp, o, a, m = logp[here], old[here], p.advantages[here], p.mask[here].double()
        log_ratio = lp - o
        if spec.loss_type == "gspo":
            log_ratio = ((log_ratio * m).sum() / m.sum().clamp(min=1)).expand_as(lp)
        ratio = log_ratio.exp()
        high = spec.epsilon if spec.epsilon_high is None else spec.epsilon_high
        if spec.loss_type == "cispo":
            loss = -ratio.clamp(max=high).detach() * a * lp
        else:
            first = ratio if spec.delta is None else ratio.clamp(max=spec.delta)
            loss = -torch.min(first * a, ratio.clamp(1 - spec.epsilon, 1 + high) * a)
        if spec.importance_sampling_correction != "none":
            gap = torch.nan_to_num((o - rollout[here]) * m, nan=0.0)
            if spec.importance_sampling_correction.startswith("sequence"):
                gap = gap.sum().expand_as(gap)
            w = gap.exp().detach()
            lo = spec.importance_sampling_clip_min or 0.0
            hi = spec.importance_sampling_clip_max or math.inf
            truncate = spec.importance_sampling_correction.endswith("truncate")
            w = w.clamp(lo, hi) if truncate else torch.where((w < lo) | (w > hi), 0.0, w)
            loss = loss * w
        if spec.beta:
            d = ref[here] - lp
            kl = {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - d - 1}[spec.kl_estimator]
            loss = loss + spec.beta * (kl * ratio if spec.use_bias_correction_kl else kl)
        out.append(loss - spec.entropy_coef * entropy[here])
    return torch.cat(out)


def distribution(p, spec, banned=None, softcap=None):
    z = p.hidden.double() @ p.weight.double().t() + p.bias.double()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / spec.temperature
    if banned is not None:
        z = z.index_fill(1, banned, -torch.inf)
    full = z.log_softmax(1)
    entropy = -(full.exp() * full.masked_fill(full == -torch.inf, 0.0)).sum(1)
    return full.gather(1, p.targets[:, None]).squeeze(1), entropy


@pytest.fixture
def exact(implementation: str):
    """(dtype, scale of the tolerances): the kernels compute in float32."""
    return (torch.float64, 1.0) if implementation == "torch" else (torch.float32, 1e4)


SPECS = [
    PolicyLossSpec(loss_type="grpo"),
    PolicyLossSpec(loss_type="bnpo", epsilon=0.1, epsilon_high=0.28, temperature=0.7),
    PolicyLossSpec(loss_type="dr_grpo", delta=1.5),
    PolicyLossSpec(loss_type="dapo", beta=0.3),
    PolicyLossSpec(loss_type="dapo", beta=0.3, use_bias_correction_kl=False, kl_estimator="k1"),
    PolicyLossSpec(loss_type="dapo", beta=0.3, kl_estimator="k2", entropy_coef=0.05),
    PolicyLossSpec(loss_type="cispo", epsilon_high=1.2, beta=0.1, entropy_coef=-0.02),
    PolicyLossSpec(loss_type="gspo", epsilon=0.05, epsilon_high=0.05),
    PolicyLossSpec(loss_type="gspo", epsilon=0.05, beta=0.2, entropy_coef=0.01, temperature=1.4),
    PolicyLossSpec(
        loss_type="dapo",
        importance_sampling_correction="token_truncate",
        importance_sampling_clip_max=1.1,
    ),
    PolicyLossSpec(
        loss_type="grpo",
        importance_sampling_correction="token_mask",
        importance_sampling_clip_max=1.4,
        importance_sampling_clip_min=0.7,
    ),
    PolicyLossSpec(
        loss_type="dapo",
        beta=0.2,
        importance_sampling_correction="sequence_truncate",
        importance_sampling_clip_max=1.3,
    ),
    PolicyLossSpec(
        loss_type="gspo",
        importance_sampling_correction="sequence_mask",
        importance_sampling_clip_max=1.3,
    ),
]


def spec_name(spec: PolicyLossSpec) -> str:
    return f"{spec.loss_type}-{spec.importance_sampling_correction}-{spec.kl_estimator}{spec.beta}"


def weights_of(p, spec):
    return token_weights(p.sequence, spec.loss_type, mask=p.mask, max_completion_length=11).double()


@pytest.mark.parametrize("on_policy", [False, True], ids=["old", "on_policy"])
@pytest.mark.parametrize("spec", SPECS, ids=spec_name)
def test_loss_and_gradients_equal_autograd(spec: PolicyLossSpec, on_policy: bool, exact) -> None:
    dtype, slack = exact
    p = problem(dtype)
    given = dict(p.given)
    if on_policy:
        given["old_logprob"] = None
    w = weights_of(p, spec)
    loss, metrics = linear_policy_loss(
        p.hidden,
        p.weight,
        p.targets,
        p.advantages,
        token_weight=w,
        spec=spec,
        sequence_id=p.sequence,
        bias=p.bias,
        softcap=5.0,
        chunk=5,
        **given,
    )
    logp, entropy = distribution(p, spec, softcap=5.0)
    old, ref, rollout = given["old_logprob"], p.given["ref_logprob"], p.given["rollout_logprob"]
    want = (w * per_token_loss(logp, entropy, p, spec, old, ref, rollout)).sum()
    torch.testing.assert_close(loss.double(), want, atol=1e-10 * slack, rtol=1e-9 * slack)
    leaves = [p.hidden, p.weight, p.bias]
    # an upstream factor, as gradient accumulation or loss scaling gives
    got_grads = torch.autograd.grad(3.0 * loss, leaves)
    for a, b in zip(got_grads, torch.autograd.grad(3.0 * want, leaves), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10 * slack, rtol=1e-8 * slack)
    logged = reduce_metrics([metrics])
    live = p.mask
    assert logged["tokens"] == int(live.sum())
    assert logged["entropy"] == pytest.approx(entropy[live].mean().item())
    assert logged["loss"] == pytest.approx(want.item(), abs=1e-10 * slack)
    if spec.loss_type not in ("gspo", "cispo"):
        ratio = torch.ones_like(logp) if on_policy else (logp - old).exp()
        high = spec.epsilon if spec.epsilon_high is None else spec.epsilon_high
        clipped = (ratio > 1 + high) & (p.advantages > 0) & live
        assert logged["clip_ratio/high_mean"] == pytest.approx((clipped.sum() / live.sum()).item())
        assert logged["ratio/max"] == pytest.approx(ratio[live].max().item())


@both
@pytest.mark.parametrize("spec", SPECS, ids=spec_name)
def test_micro_batches_add_up(spec: PolicyLossSpec) -> None:
    p = problem(torch.float32)
    w = weights_of(p, spec).float()

    def run(rows):
        given = {k: v[rows] for k, v in p.given.items()}
        return linear_policy_loss(
            p.hidden[rows],
            p.weight,
            p.targets[rows],
            p.advantages[rows],
            token_weight=w[rows],
            spec=spec,
            sequence_id=p.sequence[rows],
            bias=p.bias,
            **given,
        )

    leaves = [p.hidden, p.weight, p.bias]
    whole, raw = run(slice(None))
    whole_grads = torch.autograd.grad(whole, leaves)
    parts = [run(slice(0, 11)), run(slice(11, 12)), run(slice(12, None))]
    total = sum(loss for loss, _ in parts)
    torch.testing.assert_close(total, whole, atol=1e-6, rtol=1e-5)
    for a, b in zip(torch.autograd.grad(total, leaves), whole_grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    split, once = reduce_metrics([m for _, m in parts]), reduce_metrics([raw])
    assert split.keys() == once.keys()
    for key in once:
        assert split[key] == pytest.approx(once[key], rel=1e-4, abs=1e-6), key
    again = merge_metrics([merge_metrics([parts[0][1], parts[1][1]]), parts[2][1]])
    assert reduce_metrics([again]) == pytest.approx(split)


@pytest.mark.parametrize("chunk", [1, 4, 100, None])
@pytest.mark.parametrize("spec", [SPECS[3], SPECS[8]], ids=spec_name)
def test_chunk_does_not_matter(spec: PolicyLossSpec, chunk: int | None, exact) -> None:
    dtype, slack = exact
    p = problem(dtype)
    w = weights_of(p, spec)

    def run(chunk):
        loss, _ = linear_policy_loss(
            p.hidden,
            p.weight,
            p.targets,
            p.advantages,
            token_weight=w,
            spec=spec,
            sequence_id=p.sequence,
            chunk=chunk,
            **p.given,
        )
        return [loss, *torch.autograd.grad(loss, [p.hidden, p.weight])]

    for a, b in zip(run(chunk), run(6), strict=True):
        torch.testing.assert_close(a, b, atol=1e-11 * slack, rtol=1e-10 * slack)


@both
@pytest.mark.parametrize("spec", [SPECS[3], SPECS[6], SPECS[8], SPECS[11]], ids=spec_name)
def test_masked_rows_may_hold_anything(spec: PolicyLossSpec) -> None:
    p = problem(torch.float32)
    w = weights_of(p, spec).float()

    def run(poison):
        hole = torch.where(p.mask, 0.0, poison)
        hidden = (p.hidden.detach() + hole[:, None]).requires_grad_()
        weight = p.weight.detach().requires_grad_()
        given = {k: v + hole for k, v in p.given.items()}
        loss, metrics = linear_policy_loss(
            hidden,
            weight,
            p.targets,
            p.advantages + hole,
            token_weight=w,
            spec=spec,
            sequence_id=p.sequence,
            **given,
        )
        return [loss, *torch.autograd.grad(loss, [hidden, weight])], reduce_metrics([metrics])

    clean, clean_metrics = run(0.0)
    for poison in (torch.nan, torch.inf):
        dirty, metrics = run(poison)
        for a, b in zip(dirty, clean, strict=True):
            assert torch.equal(a, b)
        assert (dirty[1][~p.mask] == 0).all()
        assert metrics == clean_metrics


@both
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e4])  # k3 of the last overflows
@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
def test_a_reference_that_is_only_measured_changes_no_loss(loss_type: str, bad: float) -> None:
    p = problem(torch.float32)
    spec = PolicyLossSpec(loss_type=loss_type, beta=0.0)
    ref = p.given["ref_logprob"].float()
    ref[::4] = bad

    def run(ref: torch.Tensor | None):
        loss, metrics = linear_policy_loss(
            p.hidden,
            p.weight,
            p.targets,
            p.advantages,
            token_weight=weights_of(p, spec).float(),
            spec=spec,
            sequence_id=p.sequence,
            old_logprob=p.given["old_logprob"],
            ref_logprob=ref,
        )
        return [loss, *torch.autograd.grad(loss, [p.hidden, p.weight])], metrics

    (got, metrics), (want, _) = run(ref), run(None)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert metrics["sum:loss"].isfinite() and not metrics["sum:kl"].isfinite()


@both
def test_nothing_counted_is_a_differentiable_zero() -> None:
    p = problem(torch.float32)
    for rows in (slice(None), slice(0, 0)):
        loss, metrics = linear_policy_loss(
            p.hidden[rows],
            p.weight,
            p.targets[rows],
            p.advantages[rows],
            token_weight=torch.zeros_like(p.targets[rows], dtype=torch.float32),
            spec=PolicyLossSpec(entropy_coef=0.1),
        )
        assert loss.item() == 0
        grads = torch.autograd.grad(loss, [p.hidden, p.weight])
        assert all((g == 0).all() for g in grads)
        logged = reduce_metrics([metrics])
        assert logged["tokens"] == 0 and logged["loss"] == 0


@both
def test_frozen_head_and_no_grad() -> None:
    p = problem(torch.float32)
    w = weights_of(p, SPECS[0]).float()
    frozen = p.weight.detach()
    loss, _ = linear_policy_loss(
        p.hidden, frozen, p.targets, p.advantages, token_weight=w, spec=SPECS[0]
    )
    loss.backward()
    assert p.hidden.grad is not None and frozen.grad is None
    with torch.no_grad():
        loss, metrics = linear_policy_loss(
            p.hidden, p.weight, p.targets, p.advantages, token_weight=w, spec=SPECS[0]
        )
    assert not loss.requires_grad and metrics["sum:tokens"] > 0


def test_banned_ids_are_renormalised_away(exact) -> None:
    dtype, slack = exact
    p = problem(dtype)
    banned = torch.tensor([0, 7, 60])
    p.targets = torch.where(torch.isin(p.targets, banned), 5, p.targets)
    spec = PolicyLossSpec(entropy_coef=0.1)
    w = weights_of(p, spec)
    loss, _ = linear_policy_loss(
        p.hidden,
        p.weight,
        p.targets,
        p.advantages,
        token_weight=w,
        spec=spec,
        bias=p.bias,
        banned=banned,
        old_logprob=p.given["old_logprob"],
    )
    logp, entropy = distribution(p, spec, banned)
    want = (w * per_token_loss(logp, entropy, p, spec, p.given["old_logprob"], None, None)).sum()
    leaves = [p.hidden, p.weight, p.bias]
    for a, b in zip(
        [loss, *torch.autograd.grad(loss, leaves)],
        [want.to(dtype), *torch.autograd.grad(want, leaves)],
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-10 * slack, rtol=1e-8 * slack)
    with pytest.raises(ValueError, match=r"targets\[0\] = 5 is a banned id"):
        p.targets[0] = 5
        linear_policy_loss(
            p.hidden,
            p.weight,
            p.targets,
            p.advantages,
            token_weight=torch.ones_like(w),
            spec=spec,
            banned=torch.tensor([5]),
        )


def test_missing_engine_logprobs_count_as_no_gap(exact) -> None:
    p = problem(exact[0])
    spec = SPECS[9]
    rollout = p.given["rollout_logprob"].clone()
    rollout[::3] = torch.nan
    w = weights_of(p, spec)
    arguments = (p.hidden, p.weight, p.targets, p.advantages)
    loss, metrics = linear_policy_loss(
        *arguments,
        token_weight=w,
        spec=spec,
        bias=p.bias,
        old_logprob=p.given["old_logprob"],
        rollout_logprob=rollout,
    )
    logp, entropy = distribution(p, spec)
    want = (w * per_token_loss(logp, entropy, p, spec, p.given["old_logprob"], None, rollout)).sum()
    torch.testing.assert_close(loss, want.to(loss.dtype))
    known = p.mask & ~rollout.isnan()
    gap = (p.given["old_logprob"] - rollout)[known].abs()
    logged = reduce_metrics([metrics])
    assert logged["sampling/sampling_logp_difference/mean"] == pytest.approx(gap.mean().item())
    assert logged["sampling/sampling_logp_difference/max"] == pytest.approx(gap.max().item())
    assert logged["sampling/importance_sampling_ratio/max"] <= 1.1 * (1 + 1e-6)


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
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return out


@both
@pytest.mark.parametrize("spec", [SPECS[3], SPECS[8]], ids=spec_name)
def test_gemm_passes_and_memory_of_a_frozen_head(spec: PolicyLossSpec) -> None:
    p = problem(torch.float32, lengths=[8, 8, 5, 3])
    vocab = 1500
    weight = torch.randn(vocab, H)
    tile = 4 * 16 * _logits.raw_width(vocab)

    def run() -> torch.Tensor:
        return linear_policy_loss(
            p.hidden,
            weight,
            p.targets,
            p.advantages,
            token_weight=weights_of(p, spec).float(),
            spec=spec,
            sequence_id=p.sequence,
            chunk=16,
            **p.given,
        )[0]

    one = p.hidden.numel() * vocab
    with Work() as work:
        run().backward()
    assert work.macs == 2 * one and work.largest <= tile
    with Work() as work, torch.no_grad():
        run()
    assert work.macs == one and work.largest <= tile


@both
@pytest.mark.parametrize("spec", [SPECS[5], SPECS[8]], ids=spec_name)
def test_compiles_without_a_graph_break(spec: PolicyLossSpec) -> None:
    p = problem(torch.float32)
    w = weights_of(p, spec).float()

    def loss_of(hidden: torch.Tensor, weight: torch.Tensor):
        loss, metrics = linear_policy_loss(
            2 * hidden,
            weight,
            p.targets,
            p.advantages,
            token_weight=w,
            spec=spec,
            sequence_id=p.sequence,
            chunk=9,
            **p.given,
        )
        return 3 * loss, metrics["sum:entropy"]

    leaves = [p.hidden, p.weight]
    want, entropy = loss_of(*leaves)
    got, also = torch.compile(loss_of, backend="aot_eager", fullgraph=True)(*leaves)
    assert torch.equal(got, want) and torch.equal(also, entropy)
    for a, b in zip(
        torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True
    ):
        assert torch.equal(a, b)


@both
def test_bf16_gradients_are_no_worse_than_torch_in_bf16() -> None:
    spec = PolicyLossSpec(entropy_coef=0.02, beta=0.1)
    p = problem(torch.bfloat16, lengths=[6, 5])
    w = weights_of(p, spec)
    old, ref = p.given["old_logprob"], p.given["ref_logprob"]
    loss, _ = linear_policy_loss(
        p.hidden,
        p.weight,
        p.targets,
        p.advantages,
        token_weight=w,
        spec=spec,
        bias=p.bias,
        old_logprob=old,
        ref_logprob=ref,
        chunk=4,
    )
    full = (p.hidden @ p.weight.t() + p.bias).float().log_softmax(1)
    entropy = -(full.exp() * full).sum(1)
    rough = full.gather(1, p.targets[:, None]).squeeze(1), entropy
    leaves = [p.hidden, p.weight, p.bias]

    def truth(logp, entropy):
        value = (w * per_token_loss(logp, entropy, p, spec, old, ref, None)).sum()
        return value, torch.autograd.grad(value, leaves)

    (want, exact_grads), (eager, eager_grads) = truth(*distribution(p, spec)), truth(*rough)
    assert abs(loss.double() - want) <= 2 * abs(eager - want) + 1e-5
    for a, b, e in zip(torch.autograd.grad(loss, leaves), exact_grads, eager_grads, strict=True):
        error, theirs = (x.double().sub(b.double()).norm() for x in (a, e))
        assert error <= 2 * theirs + 1e-5


@both
def test_the_same_bits_twice_and_a_second_backward() -> None:
    p = problem(torch.float32)
    spec = SPECS[8]

    def run():
        loss, _ = linear_policy_loss(
            p.hidden,
            p.weight,
            p.targets,
            p.advantages,
            token_weight=weights_of(p, spec).float(),
            spec=spec,
            sequence_id=p.sequence,
            **p.given,
        )
        first = torch.autograd.grad(loss, [p.hidden, p.weight], retain_graph=True)
        again = torch.autograd.grad(loss, [p.hidden, p.weight])
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        return [loss, *first]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("spec", SPECS, ids=spec_name)
@pytest.mark.parametrize("given", [(), ("ref",), ("ref", "rollout")], ids=len)
def test_metric_names(spec: PolicyLossSpec, given: tuple[str, ...]) -> None:
    if (spec.beta and "ref" not in given) or (
        spec.importance_sampling_correction != "none" and "rollout" not in given
    ):
        pytest.skip("the spec needs more")
    x = torch.randn(3)
    sequences = _policy_math.Sequences.of(torch.tensor([4, 4, 1]))[0]
    tokens = _policy_math.Tokens(
        x, None, x if "ref" in given else None, x if "rollout" in given else None, x, x, x < 9,
        sequences,
    )  # fmt: skip
    found = _policy_math.token_loss(x, x, tokens, spec).metrics
    assert list(found) == _policy_math.metric_names(spec, "ref" in given, "rollout" in given)


def trl_compute_loss():
    """TRL's GRPOTrainer._compute_loss, taken out of its source so that nothing heavy is
    imported."""
    try:
        folder = importlib.metadata.distribution("trl").locate_file("trl/trainer/grpo_trainer.py")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("trl is not installed")
    tree = ast.parse(Path(str(folder)).read_text())
    found = [
        x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef) and x.name == "_compute_loss"
    ]
    scope = {"torch": torch, "nanmin": torch.amin, "nanmax": torch.amax}
    exec(compile(ast.Module(found, []), "trl", "exec"), scope)
    return scope["_compute_loss"]


class FakeAccelerator:
    num_processes = 1
    sync_gradients = True

    def gather(self, x):
        return x

    def reduce(self, x, reduction="sum"):
        return x


@pytest.mark.parametrize(
    "spec",
    [s for s in SPECS if s.kl_estimator == "k3" and s.importance_sampling_correction == "none"],
    ids=spec_name,
)
def test_equals_trl_own_code(spec: PolicyLossSpec, exact) -> None:
    compute_loss = trl_compute_loss()
    p = problem(exact[0])
    length = max(p.lengths)
    offset = torch.cat([torch.arange(n) for n in p.lengths])

    def padded(x, fill=0.0):
        out = torch.full((len(p.lengths), length), fill, dtype=x.dtype)
        out[p.index, offset] = x
        return out

    logp, entropy = distribution(p, spec)
    logp_2d = torch.zeros(len(p.lengths), length, dtype=torch.float64).index_put(
        (p.index, offset), logp
    )
    mask = padded(p.mask.double())
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logp_2d, padded(entropy), None),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="sequence" if spec.loss_type == "gspo" else "token",
        beta=spec.beta,
        loss_type="grpo" if spec.loss_type == "gspo" else spec.loss_type,
        epsilon_low=spec.epsilon,
        epsilon_high=spec.high,
        args=SimpleNamespace(
            delta=spec.delta,
            use_bias_correction_kl=spec.use_bias_correction_kl,
            steps_per_generation=1,
        ),
        use_vllm=False,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=11,
        accelerator=FakeAccelerator(),
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    inputs = {
        "prompt_ids": torch.zeros(len(p.lengths), 1),
        "prompt_mask": torch.ones(len(p.lengths), 1),
        "completion_ids": mask,
        "completion_mask": mask,
        "advantages": torch.stack([p.advantages[p.index == s][0] for s in range(len(p.lengths))]),
        "old_per_token_logps": padded(p.given["old_logprob"]),
        "ref_per_token_logps": padded(p.given["ref_logprob"]),
        "num_items_in_batch": mask.sum(),
    }
    want = compute_loss(trainer, None, inputs)
    w = token_weights(p.sequence, spec.loss_type, mask=p.mask, max_completion_length=11)
    # TRL's entropy bonus is a token mean: left out here, it is tested above
    plain = PolicyLossSpec(**{**vars(spec), "entropy_coef": 0.0})
    loss, metrics = linear_policy_loss(
        p.hidden,
        p.weight,
        p.targets,
        p.advantages,
        token_weight=w.double(),
        spec=plain,
        sequence_id=p.sequence,
        bias=p.bias,
        **p.given,
    )
    torch.testing.assert_close(loss.double(), want.double(), atol=1e-6, rtol=1e-5)
    leaves = [p.hidden, p.weight]
    for a, b in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(want, leaves), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    logged, theirs = reduce_metrics([metrics]), trainer._metrics["train"]
    assert logged["entropy"] == pytest.approx(theirs["entropy"][0])
    if spec.beta:
        assert logged["kl"] == pytest.approx(theirs["kl"][0])
    if spec.loss_type not in ("cispo", "gspo"):  # gspo: TRL counts sequences, this op tokens
        for key in ("low", "high", "region"):
            name = f"clip_ratio/{key}_mean"
            assert logged[name] == pytest.approx(theirs[name][0])


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "ppo"},
        {"kl_estimator": "k4"},
        {"importance_sampling_correction": "yes"},
        {"loss_type": "cispo"},
        {"delta": 0.5},
        {"epsilon": 1.5},
        {"temperature": 0.0},
        {"temperature": math.inf},
        {"temperature": math.nan},
        {"epsilon": math.nan},
        {"epsilon_high": math.nan},
        {"epsilon_high": math.inf},
        {"delta": math.nan},
        {"delta": math.inf},
        {"beta": -1.0},
        {"beta": math.nan},
        {"beta": math.inf},
        {"entropy_coef": math.nan},
        {"entropy_coef": -math.inf},
        {"importance_sampling_clip_max": math.nan},
        {"importance_sampling_clip_min": math.nan},
        {"importance_sampling_clip_min": 4.0},
        {"importance_sampling_correction": "token_truncate", "importance_sampling_clip_max": None},
    ],
)
def test_bad_spec(options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options)).split("_correction")[0]):
        PolicyLossSpec(**options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spec": PolicyLossSpec(beta=0.1)}, "ref_logprob"),
        ({"spec": PolicyLossSpec(loss_type="gspo")}, "sequence_id"),
        ({"spec": SPECS[9]}, "rollout_logprob"),
        ({"token_weight": torch.ones(3)}, "token_weight must be"),
        ({"advantages": torch.ones(3)}, "advantages must be"),
        (
            {"spec": PolicyLossSpec(loss_type="gspo"), "sequence_id": torch.arange(21) % 2},
            "adjacent",
        ),
        ({"targets": torch.full((21,), V)}, r"targets\[0\]"),
        ({"targets": torch.ones(21, dtype=torch.bool)}, "targets.* integer.*bool"),
        ({"banned": torch.zeros(V, dtype=torch.bool)}, "banned.* integer.*mask.nonzero"),
        ({"sequence_id": torch.arange(21.0)}, "sequence_id.* integer.*per sequence.*float32"),
        ({"sequence_id": torch.arange(21) > 3}, "sequence_id.* integer.*bool"),
    ],
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    p = problem()
    arguments = {
        "hidden": p.hidden,
        "weight": p.weight,
        "targets": p.targets,
        "advantages": p.advantages,
        "token_weight": torch.ones(21),
        "spec": PolicyLossSpec(),
    }
    with pytest.raises(ValueError, match=message):
        linear_policy_loss(**(arguments | change))


def test_token_weights_count_what_they_are_told() -> None:
    ids = torch.tensor([5, 5, 5, 2, 2])
    mask = torch.tensor([1, 0, 1, 1, 1])
    assert token_weights(ids, "grpo", mask=mask).tolist() == [0.25, 0, 0.25, 0.25, 0.25]
    assert token_weights(ids, "grpo", num_sequences=4)[3:].tolist() == [0.125, 0.125]
    assert token_weights(ids, "dapo", mask=mask, num_items_in_batch=8).tolist() == [
        0.125,
        0,
        0.125,
        0.125,
        0.125,
    ]
    assert token_weights(ids, "dr_grpo", max_completion_length=8)[0] == 1 / 16
    with pytest.raises(ValueError, match="max_completion_length"):
        token_weights(ids, "dr_grpo")
    with pytest.raises(ValueError, match="sequence_id.* integer"):
        token_weights(ids.float(), "grpo")


@pytest.mark.parametrize("how", ["sum", "min", "max"])
@pytest.mark.parametrize("values", [[math.nan, 0.5], [0.5, math.nan], [0.5, math.nan, 0.1]])
def test_merged_metrics_keep_a_nan_wherever_it_stands(how: str, values: list[float]) -> None:
    key = f"{how}:ratio"
    assert math.isnan(merge_metrics([{key: x} for x in values])[key])


SHARDED = [SPECS[5], SPECS[8], SPECS[9]]


def _sharded(p, spec, weight, bias, **group) -> list[torch.Tensor]:
    loss, metrics = linear_policy_loss(
        p.hidden,
        weight,
        p.targets,
        p.advantages,
        token_weight=weights_of(p, spec).float(),
        spec=spec,
        sequence_id=p.sequence,
        bias=bias,
        banned=torch.tensor([0, V - 1]),
        chunk=9,
        **p.given,
        **group,
    )
    grads = torch.autograd.grad(loss, [p.hidden, weight, bias])
    return [loss.detach(), *metrics.values(), *grads]


def _shard(rank: int, port: int, path: str, mode: str) -> None:
    import torch.distributed as dist

    os.environ["MMEDX_KERNELS"] = mode
    if mode == "triton" and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for i, spec in enumerate(SHARDED):
        p = _unbanned()
        part = slice(0, 31) if rank == 0 else slice(31, V)
        w, b = (x.detach()[part].clone().requires_grad_() for x in (p.weight, p.bias))
        group = {"group": dist.group.WORLD, "vocab_start": part.start}
        torch.save(_sharded(p, spec, w, b, **group), f"{path}/{i}-{rank}.pt")
    dist.destroy_process_group()


def _unbanned():
    p = problem(torch.float32)
    p.targets = p.targets.clamp(1, V - 2)
    return p


def test_vocabulary_in_two_processes(tmp_path, implementation: str) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_shard, (port, str(tmp_path), implementation), nprocs=2)
    for i, spec in enumerate(SHARDED):
        p = _unbanned()
        want = _sharded(p, spec, p.weight, p.bias)
        left, right = (torch.load(tmp_path / f"{i}-{r}.pt", weights_only=True) for r in range(2))
        whole = [*left[:-2], torch.cat([left[-2], right[-2]]), torch.cat([left[-1], right[-1]])]
        for a, b in zip(whole, want, strict=True):
            torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-4)
        for a, b in zip(left[:-2], right[:-2], strict=True):
            assert torch.equal(a, b)
