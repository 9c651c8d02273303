"""Merging from factors against peft's functions and plain float64 on materialised deltas."""

import importlib.metadata
import importlib.util
import json
import math
import warnings
from pathlib import Path

import pytest
import torch

from mmedx_fast.kernels import _lora_gram, _lora_trim
from mmedx_fast.kernels.lora_merge import (
    LoraFactors,
    MergeOverflowError,
    MergeSpec,
    lora_conflicts,
    lora_mean,
    lora_merge_,
    lora_merge_as_lora,
    merge_model_,
    model_conflicts,
    sum_reports,
)

_file = Path(__file__).with_name("_peak_memory.py")
_spec = importlib.util.spec_from_file_location("peak_memory", _file)
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
PeakMemory = _module.PeakMemory

# torch.sum over dim 0 adds in order only where the rest is a multiple of its vector width (else the
# tail is added in another order), and equality with peft is asked bit for bit: 24 * 32 = 12 * 64
OUT, IN = 24, 32


def factors(ranks=(4, 2, 8, 4, 1), out=OUT, width=IN, seed=0, dtype=torch.float32, missing=()):
    g = torch.Generator().manual_seed(seed)
    experts = []
    for e, r in enumerate(ranks):
        a = torch.randn(r, width, generator=g).to(dtype)
        b = torch.randn(out, r, generator=g).to(dtype)
        experts.append(None if e in missing else LoraFactors(a, b, 0.5 + e / 4))
    return experts


def dense(experts, dtype=torch.float32):
    return [torch.zeros(OUT, IN) if f is None else f.delta(dtype=dtype).float() for f in experts]


def whole_delta(left):
    """Factors of full rank; the left or the right one is the identity."""
    delta = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(4))
    return LoraFactors(delta, torch.eye(OUT)) if left else LoraFactors(torch.eye(IN), delta)


def merged(experts, spec, **options):
    base = torch.zeros(OUT, IN)
    lora_merge_(base, experts, spec, **options)
    return base


@pytest.fixture(scope="module")
def peft_merge():
    """peft/utils/merge_utils.py loaded by itself: peft's package imports all of transformers."""
    try:
        file = importlib.metadata.distribution("peft").locate_file("peft/utils/merge_utils.py")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("peft is not installed")
    spec = importlib.util.spec_from_file_location("peft_merge_utils", str(file))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_delta_is_scale_times_product() -> None:
    for f in factors():
        want = f.scale * (f.B.double() @ f.A.double())
        torch.testing.assert_close(f.delta(), want.float(), atol=0, rtol=0)
        torch.testing.assert_close(f.rescaled(3.0).delta(), f.delta(), atol=1e-5, rtol=1e-5)
        assert f.rescaled(3.0).scale == 3.0


@pytest.mark.parametrize("density", [0.0, 0.01, 0.2, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("election", ["total", "frequency"])
def test_ties_equals_peft(peft_merge, election: str, density: float) -> None:
    experts = factors()
    weights = (1.0, 0.5, 2.0, 0.1, 1.0)
    spec = MergeSpec(density=density, election=election, weights=weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = peft_merge.ties(dense(experts), torch.tensor(weights), density, election)
    for tile in (1, 3 * IN * 5, None):
        assert torch.equal(merged(experts, spec, tile=tile), want)
    assert bool(want.any()) == (density > 0)


@pytest.mark.parametrize("density", [0.0, 0.3])
def test_linears_one_by_one_with_the_models_thresholds_are_the_model(
    implementation, density: float
) -> None:
    """A model whose weights are not all in memory: its thresholds first, then linear by linear."""
    experts = {"a": factors(seed=1), "b": factors(seed=2, missing=(0, 3)), "c": factors(seed=3)}
    spec = MergeSpec(density=density, trim_scope="global", weights=(1.0, 0.5, 2.0, 0.1, 1.0))
    weights = {name: torch.randn(OUT, IN) for name in experts}
    want = {name: weight.clone() for name, weight in weights.items()}
    report = merge_model_(want, experts, spec)
    said = model_conflicts(experts, spec)["total"]["threshold"]
    assert said == report["total"]["threshold"]
    thresholds = torch.tensor([math.inf if x is None else x for x in said], dtype=torch.float64)
    for name, weight in weights.items():
        one = lora_merge_(weight, experts[name], spec, layer=name, thresholds=thresholds)
        assert torch.equal(weight, want[name])
        assert one.to_dict() == report["linears"][name]
    with pytest.raises(ValueError, match="trim_scope='tensor'"):
        lora_merge_(weights["a"], experts["a"], MergeSpec(), thresholds=thresholds)
    with pytest.raises(ValueError, match=r"one per expert \(5\).*\(3,\)"):
        lora_merge_(weights["a"], experts["a"], spec, thresholds=thresholds[:3])


@pytest.mark.parametrize("method", ["linear", "dare_linear", "dare_ties"])
def test_other_methods_equal_peft(peft_merge, method: str, monkeypatch) -> None:
    experts = factors()
    weights = (1.0, 0.5, 2.0, 0.1, 1.0)
    spec = MergeSpec(method=method, density=0.4, weights=weights, seed=7)
    keeps = iter(
        _lora_trim.random_keep(slice(0, OUT), IN, 0.4, 7, "q", e, torch.device("cpu")).float()
        for e in range(5)
    )
    monkeypatch.setattr(peft_merge.torch, "bernoulli", lambda x: next(keeps))
    deltas, w = dense(experts), torch.tensor(weights)
    if method == "linear":
        want = peft_merge.task_arithmetic(deltas, w)
    else:
        want = getattr(peft_merge, method)(deltas, w, 0.4)
    assert torch.equal(merged(experts, spec, layer="q"), want)


@pytest.mark.parametrize("density", [0.0, 0.2, 0.999, 1.0])
@pytest.mark.parametrize("election", ["total", "frequency"])
def test_exact_products_make_ties_equal_peft(
    peft_merge, implementation, election: str, density: float
) -> None:
    g = torch.Generator().manual_seed(2)
    experts = [
        # whole numbers, an expert by scale; magnitudes all differ, as topk keeps any of equal ones
        LoraFactors(
            torch.cat([torch.randperm(IN, generator=g)[None].float(), torch.ones(1, IN)]),
            torch.stack([torch.ones(OUT), torch.randperm(OUT, generator=g) * float(IN)], 1),
            sign * 0.5,
        )
        for sign in (1, -1, 1, -1)
    ]
    weights = (1.0, 0.5, 2.0, 0.1)
    spec = MergeSpec(density=density, election=election, weights=weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = peft_merge.ties(dense(experts), torch.tensor(weights), density, election)
    assert torch.equal(merged(experts, spec), want)
    report = lora_conflicts(experts, spec)
    assert report.tied.tolist() == [0] * 4
    k = int(density * OUT * IN)
    assert all(k - 1 <= kept <= k for kept in report.kept.tolist())  # one element is 0


def brute_ties(experts, spec, thresholds=None):
    """The definition in loops over elements, float64."""
    deltas = [d.double() for d in dense(experts, spec.delta_dtype)]
    kept = []
    for e, d in enumerate(deltas):
        k = int(spec.density * d.numel())
        t = d.abs().flatten().sort(descending=True)[0][k - 1] if k else math.inf
        t = t if thresholds is None else thresholds[e]
        kept.append(torch.where(d.abs() >= t, d, 0.0))
    weights = spec.weights or (1.0,) * len(kept)
    out = torch.zeros(OUT, IN, dtype=torch.float64)
    for i in range(OUT):
        for j in range(IN):
            values = [float(d[i, j]) for d in kept]
            vote = {
                "total": sum(values),
                "weighted": sum(w * v for w, v in zip(weights, values, strict=True)),
                "frequency": sum((v > 0) - (v < 0) for v in values),
            }[spec.election]
            sign = 1 if vote >= 0 else -1
            side = [(w, v) for w, v in zip(weights, values, strict=True) if v * sign > 0]
            n = len(side) if spec.divisor == "count" else sum(w for w, _ in side)
            out[i, j] = spec.lam * sum(w * v for w, v in side) / n if side else 0.0
    return out


@pytest.mark.parametrize("divisor", ["count", "weight"])
@pytest.mark.parametrize("election", ["total", "weighted", "frequency"])
@pytest.mark.parametrize("delta_dtype", [torch.float32, torch.bfloat16])
def test_every_option_equals_the_definition(election, divisor, delta_dtype) -> None:
    experts = factors(missing=(1,))
    spec = MergeSpec(
        density=0.35,
        election=election,
        divisor=divisor,
        lam=0.7,
        weights=(0.5, 1.0, 2.0, 1.5, 0.25),
        delta_dtype=delta_dtype,
    )
    torch.testing.assert_close(
        merged(experts, spec).double(), brute_ties(experts, spec), atol=1e-5, rtol=1e-5
    )


def test_elements_at_the_threshold_are_kept_and_counted() -> None:
    # integer factors make many equal magnitudes
    g = torch.Generator().manual_seed(0)
    f = LoraFactors(
        torch.randint(-2, 3, (3, IN), generator=g).float(),
        torch.randint(-2, 3, (OUT, 3), generator=g).float(),
    )
    report = lora_conflicts([f], MergeSpec(density=0.25))
    k = int(0.25 * OUT * IN)
    magnitudes = f.delta().abs().flatten()
    threshold = magnitudes.sort(descending=True)[0][k - 1]
    assert report.threshold.item() == threshold
    assert int(report.kept) == int((magnitudes >= threshold).sum())
    assert int(report.tied) == int(report.kept) - k > 0


def test_threshold_is_exact_for_any_k() -> None:
    f = factors((3,))[0]
    ordered = f.delta().abs().flatten().sort(descending=True)[0]
    for k in (1, 2, 100, OUT * IN - 1, OUT * IN):
        value, tied = _lora_trim.kth_magnitude([f], k, MergeSpec(), tile=100)
        assert value == ordered[k - 1] and tied == 0
    zero = LoraFactors(torch.zeros(2, IN), torch.ones(OUT, 2))
    assert _lora_trim.kth_magnitude([zero], 5, MergeSpec(), None)[0] == 0.0


@pytest.mark.parametrize("method", ["ties", "dare_ties", "dare_linear", "linear"])
def test_tiling_changes_nothing(method: str) -> None:
    experts = factors()
    spec = MergeSpec(method=method, density=0.3)
    base, report = torch.zeros(OUT, IN), None
    report = lora_merge_(base, experts, spec, layer="x")
    for tile in (1, 500, 10**9):
        other = torch.zeros(OUT, IN)
        again = lora_merge_(other, experts, spec, layer="x", tile=tile)
        assert torch.equal(other, base)
        for key in ("overlap", "conflicts", "kept", "pair_conflicts", "threshold", "lost_updates"):
            assert torch.equal(
                getattr(again, key).nan_to_num(), getattr(report, key).nan_to_num()
            ), key


def test_random_dropping_is_keyed_and_fair() -> None:
    def keep(rows=slice(0, 200), seed=0, layer="a", expert=0, density=0.3):
        return _lora_trim.random_keep(rows, 500, density, seed, layer, expert, torch.device("cpu"))

    base = keep()
    assert torch.equal(base[37:51], keep(slice(37, 51)))
    n = base.numel()
    sigma = math.sqrt(0.3 * 0.7 / n)
    assert abs(base.double().mean() - 0.3) < 5 * sigma
    for other in (keep(seed=1), keep(layer="b"), keep(expert=1), base.roll(1, 1), base.roll(1, 0)):
        both = (base & other).double().mean()
        assert abs(both - 0.09) < 5 * math.sqrt(0.09 * 0.91 / n)
    assert abs(base.double().mean(1).std() - math.sqrt(0.21 / 500)) < 5e-3
    # rows far beyond 2^32 elements draw from other streams
    assert not torch.equal(keep(slice(0, 1)), keep(slice(1 << 40, (1 << 40) + 1)))
    spec = MergeSpec(method="dare_linear", density=0.5)
    experts = factors()
    mean = sum(
        merged(experts, MergeSpec(method="dare_linear", density=0.5, seed=s)) for s in range(80)
    )
    plain = merged(experts, MergeSpec(method="linear"))
    assert (mean / 80 - plain).norm() < 0.2 * plain.norm()
    assert not torch.equal(merged(experts, spec, layer="a"), merged(experts, spec, layer="b"))


@pytest.mark.parametrize("kind", ["low rank", "pair by pair", "whole B = I", "whole A = I"])
def test_report_equals_dense_statistics(implementation, monkeypatch, kind) -> None:
    experts = factors(missing=(3,))
    if kind != "low rank":
        monkeypatch.setattr(_lora_gram, "_PADDED", 0)
    if kind.startswith("whole"):
        experts[2] = whole_delta(kind == "whole B = I")
    density = 0.4
    report = lora_conflicts(experts, MergeSpec(density=density), tile=700)
    full = torch.stack(dense(experts)).double()
    trimmed = []
    for f, d in zip(experts, full, strict=True):
        k = int(density * d.numel())
        t = d.abs().flatten().sort(descending=True)[0][k - 1]
        trimmed.append(torch.where(d.abs() >= t, d, 0.0) if f is not None else d)
    kept = torch.stack(trimmed)
    dot = torch.einsum("eij,fij->ef", full, full)
    torch.testing.assert_close(report.dot, dot, rtol=1e-5, atol=1e-4)
    norm = full.flatten(1).norm(dim=1)
    torch.testing.assert_close(report.norm, norm, rtol=1e-6, atol=1e-6)
    cosine = dot / (norm[:, None] * norm).clamp(min=1e-12)
    torch.testing.assert_close(report.cosine, cosine, rtol=1e-5, atol=1e-6)
    sign = kept.sign()
    several = (sign != 0).sum(0) >= 2
    apart = (sign == 1).any(0) & (sign == -1).any(0)
    assert int(report.overlap) == int(several.sum())
    assert int(report.conflicts) == int(apart.sum())
    assert report.sign_conflict_rate == pytest.approx(float(apart.sum() / several.sum()))
    magnitude = kept.abs().sum(0)
    assert report.weighted_sign_conflict_rate == pytest.approx(
        float(magnitude[apart].sum() / magnitude[several].sum())
    )
    assert report.cancelled_energy == pytest.approx(
        float(1 - kept.sum(0).square().sum() / magnitude.square().sum())
    )
    assert report.kept_fraction.tolist() == pytest.approx(
        [0.0 if f is None else int(density * OUT * IN) / (OUT * IN) for f in experts]
    )
    for i in range(5):
        for j in range(5):
            both = (sign[i] != 0) & (sign[j] != 0)
            opposed = both & (sign[i] != sign[j])
            rate = float(opposed.sum() / both.sum()) if both.any() else 0.0
            assert report.pair_conflict_rate[i, j].item() == pytest.approx(rate)
    for side, of in (("output", full), ("input", full.transpose(1, 2))):
        for i, j in ((0, 1), (0, 0), (2, 4)):
            ranks = [min(experts[e].rank, OUT) for e in (i, j)]
            u, v = (torch.linalg.svd(of[e])[0][:, :r] for e, r in zip((i, j), ranks, strict=True))
            want = float((u.t() @ v).square().sum()) / min(ranks)
            assert report.subspace_overlap(side)[i, j].item() == pytest.approx(want, abs=1e-5)
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["threshold"][3] is None and len(plain["cosine"]) == 5


def test_written_update_is_reported(implementation) -> None:
    experts = factors()
    spec = MergeSpec(lam=1e-3)
    update = merged(experts, spec)
    base = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1)).bfloat16()
    before = base.clone()
    report = lora_merge_(base, experts, spec)
    assert torch.equal(base, (before.float() + update).bfloat16())
    lost = (update != 0) & (base == before)
    assert int(report.lost_updates) == int(lost.sum()) > 0
    assert int(report.updates) == int((update != 0).sum())
    assert report.to_dict()["update_norm"] == pytest.approx(float(update.norm()), rel=1e-5)
    wide = torch.zeros(OUT, IN, dtype=torch.float64)
    lora_merge_(wide, experts, spec)
    assert torch.equal(wide.float(), update)


def model():
    names = ("a", "b", "c")
    experts = {
        name: factors((3, 2), seed=i, missing=(1,) if i == 2 else ())
        for i, name in enumerate(names)
    }
    for f in experts["b"]:
        f.B.mul_(5.0)  # global trimming must prefer this linear
    weights = {name: torch.zeros(OUT, IN) for name in (*names, "untouched")}
    return weights, experts


def test_model_with_one_threshold_per_expert() -> None:
    weights, experts = model()
    spec = MergeSpec(density=0.2, trim_scope="global")
    seen: list[str] = []
    report = merge_model_(weights, experts, spec, on_linear=lambda name, r: seen.append(name))
    assert seen == ["a", "b", "c"]
    for e, linears in ((0, "abc"), (1, "ab")):
        every = torch.cat([experts[n][e].delta().abs().flatten() for n in linears])
        t = every.sort(descending=True)[0][int(0.2 * every.numel()) - 1]
        assert report["total"]["threshold"][e] == t
        for n in linears:
            assert report["linears"][n]["threshold"][e] == t
    thresholds = report["total"]["threshold"]
    for n in "abc":
        want = brute_ties(experts[n], spec, thresholds)
        torch.testing.assert_close(weights[n].double(), want, atol=1e-5, rtol=1e-5)
    assert not weights["untouched"].any()
    kept = [report["linears"][n]["kept_fraction"][0] for n in "abc"]
    assert kept[1] > 2 * kept[0]
    assert report["total"]["kept_fraction"][0] == pytest.approx(0.2, abs=1e-3)
    look = model_conflicts(experts, spec)
    written = ("update_norm", "lost_update_fraction")
    drop = lambda d: {k: v for k, v in d.items() if k not in written}  # noqa: E731
    assert drop(look["total"]) == drop(report["total"])


def test_model_by_tensor_equals_one_by_one_and_reports_add_up() -> None:
    weights, experts = model()
    spec = MergeSpec(density=0.3)
    report = merge_model_(weights, experts, spec)
    singles = []
    for name in experts:
        base = torch.zeros(OUT, IN)
        singles.append(lora_merge_(base, experts[name], spec, layer=name))
        assert torch.equal(base, weights[name])
    total = sum_reports(singles)
    assert total.to_dict() == report["total"]
    assert total.elements == 3 * OUT * IN and total.linears == 3
    assert total.pair_linears.tolist() == [[3, 2], [2, 2]]
    assert total.conflicts == sum(s.conflicts for s in singles)


def test_one_expert_kept_whole_is_its_delta(implementation) -> None:
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 9, s, generator=g).float() for s in ((5, IN), (OUT, 5)))
    f = LoraFactors(a, b, 0.25)
    assert torch.equal(merged([f], MergeSpec(density=1.0)), f.delta())
    assert torch.equal(merged([None, f, None], MergeSpec(method="linear")), f.delta())


def test_dare_linear_in_expectation_is_the_weighted_sum(implementation) -> None:
    experts, weights = factors((4, 2)), (0.5, 2.0)
    mean = MergeSpec(method="dare_linear", density=0.1, dare_mode="expectation", weights=weights)
    plain = MergeSpec(method="linear", weights=weights)
    assert torch.equal(merged(experts, mean), merged(experts, plain))
    with pytest.raises(ValueError, match="dare_linear only"):
        MergeSpec(method="dare_ties", dare_mode="expectation")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("start", [1.0, -1.0])
def test_stochastic_rounding_is_right_on_average(implementation, dtype, start: float) -> None:
    out, width = 64, 128
    step = torch.finfo(dtype).eps * 0.3  # of the gap above 1; the gap towards 0 is half of that
    f = LoraFactors(torch.full((1, width), step), torch.ones(out, 1))
    results = {}
    for rounding in ("nearest", "stochastic"):
        base = torch.full((out, width), start, dtype=dtype)
        report = lora_merge_(base, [f], MergeSpec(method="linear", rounding=rounding, seed=1))
        results[rounding] = base.double()
        lost = int((base == start).sum())
        assert int(report.updates) == out * width and int(report.lost_updates) == lost
    nearest, stochastic = results["nearest"], results["stochastic"]
    gap = torch.finfo(dtype).eps * (1 if start > 0 else 0.5)
    share = step / gap
    n = out * width
    assert set(stochastic.unique().tolist()) == {start, start + gap}
    sigma = gap * math.sqrt(share * (1 - share) / n)
    assert abs(float(stochastic.mean()) - (start + step)) < 5 * sigma
    assert nearest.unique().numel() == 1
    other = torch.full((out, width), start, dtype=dtype)
    lora_merge_(other, [f], MergeSpec(method="linear", rounding="stochastic", seed=2))
    assert not torch.equal(other.double(), stochastic)


def test_nothing_is_written_when_one_linear_does_not_fit() -> None:
    weights, experts = model()
    weights["c"] = torch.zeros(OUT, IN + 1)
    with pytest.raises(ValueError, match="linear 'c': expert 0 changes a"):
        merge_model_(weights, experts, MergeSpec())
    assert not any(w.any() for w in weights.values())
    with pytest.raises(ValueError, match="no linear 'b'.*another base"):
        merge_model_({"a": weights["a"], "c": torch.zeros(OUT, IN)}, experts, MergeSpec())


@pytest.mark.parametrize("rank", [3, 6, 19, 40])
def test_mean_is_the_best_of_its_rank(rank: int) -> None:
    experts = factors(missing=(4,))
    weights = [0.3, 0.1, 0.4, 0.1, 0.1]
    got, energy = lora_mean(experts, weights, rank)
    mean = sum(w * d.double() for w, d in zip(weights, dense(experts), strict=True))
    u, s, vh = torch.linalg.svd(mean, full_matrices=False)
    k = min(rank, len(s))
    best = (u[:, :k] * s[:k]) @ vh[:k]
    assert got.rank == rank and got.A.dtype == torch.float32
    torch.testing.assert_close(got.delta().double(), best, atol=1e-4, rtol=1e-4)
    assert energy == pytest.approx(float(s[:k].square().sum() / s.square().sum()))
    uniform, _ = lora_mean(experts, rank=19)
    want = sum(dense(experts)) / 5
    torch.testing.assert_close(uniform.delta(), want, atol=1e-4, rtol=1e-4)


def test_core_space_merge(implementation) -> None:
    experts = factors()
    whole, energy = lora_merge_as_lora(experts, MergeSpec(method="linear", lam=0.5), rank=19)
    # without trimming or election the core's merge is the merge of the deltas
    torch.testing.assert_close(whole.delta(), 0.5 * sum(dense(experts)), atol=1e-3, rtol=1e-4)
    assert energy == pytest.approx(1.0)
    one, _ = lora_merge_as_lora([experts[2]], MergeSpec(density=1.0), rank=8)
    torch.testing.assert_close(one.delta(), experts[2].delta(), atol=1e-4, rtol=1e-4)

    spec = MergeSpec(density=0.3)
    full, _ = lora_merge_as_lora(experts, spec, rank=19)
    b = torch.cat([f.scale * f.B.double() for f in experts], 1)
    a = torch.cat([f.A.double() for f in experts])
    left = torch.linalg.svd(b, full_matrices=False)[0][:, :19]
    right = torch.linalg.svd(a, full_matrices=False)[2][:19]
    cores = [
        LoraFactors(left.t() @ d.double() @ right.t(), torch.eye(19, dtype=torch.float64))
        for d in dense(experts)
    ]
    core = torch.zeros(19, 19)
    lora_merge_(core, cores, spec)
    want = left @ core.double() @ right
    torch.testing.assert_close(full.delta().double(), want, atol=2e-3, rtol=1e-3)
    cut, energy = lora_merge_as_lora(experts, spec, rank=4)
    s = torch.linalg.svdvals(core.double())
    assert cut.rank == 4 and energy == pytest.approx(
        float(s[:4].square().sum() / s.square().sum()), abs=1e-4
    )
    with pytest.raises(ValueError, match="trim_scope='tensor'"):
        lora_merge_as_lora(experts, MergeSpec(trim_scope="global"), rank=4)


def test_experts_that_touch_nothing() -> None:
    base = torch.ones(OUT, IN)
    report = lora_merge_(base, [None, None], MergeSpec())
    assert report.linears == 0 and (base == 1).all()
    with pytest.raises(ValueError, match="no expert"):
        lora_mean([None, None], rank=2)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "slerp"},
        {"trim_scope": "layer"},
        {"election": "vote"},
        {"divisor": "mean"},
        {"density": 1.5},
        {"method": "dare_ties", "density": 0.0},
        {"lam": math.nan},
        {"dare_mode": "mean"},
        {"rounding": "up"},
        {"delta_dtype": torch.float64},
    ],
)
def test_bad_spec(options: dict) -> None:
    with pytest.raises(ValueError, match=list(options)[-1]):
        MergeSpec(**options)


def test_bad_factors_are_named() -> None:
    with pytest.raises(ValueError, match="must be A"):
        LoraFactors(torch.zeros(3, 4), torch.zeros(5, 2))
    with pytest.raises(ValueError, match="rank 0 change nothing"):
        LoraFactors(torch.zeros(0, 4), torch.zeros(5, 0))
    with pytest.raises(ValueError, match="factor B holds NaN"):
        LoraFactors(torch.zeros(2, 4), torch.full((5, 2), torch.nan))
    odd = [factors((2,))[0], factors((2,), width=IN + 1)[0]]
    with pytest.raises(ValueError, match="linear 'q': expert 1 changes a"):
        lora_conflicts(odd, MergeSpec(), layer="q")
    with pytest.raises(ValueError, match="2 weights for 5 experts"):
        lora_conflicts(factors(), MergeSpec(weights=(1.0, 2.0)))


BAD_BASES = (torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64)


@pytest.mark.parametrize("dtype", BAD_BASES, ids=str)
def test_a_base_that_holds_no_plain_floats_is_refused(implementation, dtype) -> None:
    base = torch.ones(OUT, IN).to(dtype)
    with pytest.raises(ValueError, match=f"linear 'q': the base weight is {dtype}.*bfloat16"):
        lora_merge_(base, factors(), MergeSpec(), layer="q")
    weights = {"a": torch.zeros(OUT, IN), "q": base}
    with pytest.raises(ValueError, match="linear 'q': the base weight is"):
        merge_model_(weights, dict.fromkeys(weights, factors()), MergeSpec())
    assert torch.equal(base.to(torch.complex64).real, torch.ones(OUT, IN))
    assert not weights["a"].any()


@pytest.mark.parametrize("bad", [math.nan, -1.0, -math.inf])
def test_a_threshold_that_is_no_magnitude_is_refused(implementation, bad: float) -> None:
    spec, experts = MergeSpec(density=0.2, trim_scope="global"), factors(missing=(1,))
    thresholds = torch.tensor([0.5, bad, 0.0, 0.5, math.inf], dtype=torch.float64)
    report = lora_merge_(torch.zeros(OUT, IN), experts, spec, thresholds=thresholds)
    # the second expert does not touch this linear
    assert report.kept[[0, 2, 3]].min() > 0 == report.kept[4]
    thresholds[3] = bad
    base = torch.ones(OUT, IN)
    with pytest.raises(
        ValueError, match="linear 'q': the threshold of expert 3 is -?(nan|1.0|inf)"
    ):
        lora_merge_(base, experts, spec, layer="q", thresholds=thresholds)
    assert (base == 1).all()


def constant(value: float, scale: float = 1.0) -> list[LoraFactors]:
    """One expert whose delta is ``scale * value`` everywhere."""
    return [LoraFactors(torch.full((1, IN), value), torch.ones(OUT, 1), scale)]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("density", [1.0, 0.5])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_linears_that_do_not_stay_finite_are_named(implementation, rounding, density) -> None:
    spec = MergeSpec(density=density, rounding=rounding)
    names = ("good", "q", "v")
    weights = {name: torch.full((OUT, IN), 6e4, dtype=torch.float16) for name in names}
    weights["v"] = weights["v"].double() * 1e303  # 6e307: the largest is 1.8e308
    experts = {"good": constant(1e3), "q": constant(1e4), "v": constant(1e4)}
    seen: list[str] = []
    with pytest.raises(MergeOverflowError, match="1 of 3 linears did not stay finite: 'q'"):
        merge_model_(weights, experts, spec, on_linear=lambda name, _: seen.append(name))
    assert seen == list(names) and weights["good"].isfinite().all() and weights["q"].isinf().any()
    with pytest.raises(MergeOverflowError, match="'q'"):
        lora_merge_(torch.full((OUT, IN), 6e4).half(), constant(1e4), spec, layer="q")
    # just below the largest, and elements that were not finite before
    base = torch.full((OUT, IN), 6e4).half()
    base[0, 0], base[1, 1] = math.inf, math.nan
    report = lora_merge_(base, constant(5e3), MergeSpec(density=1.0, rounding=rounding))
    assert int((~base.isfinite()).sum()) == 2 and report.update_energy.isfinite()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("density", [1.0, 0.5])
def test_deltas_beyond_their_dtype_are_named(implementation, density: float) -> None:
    spec = MergeSpec(delta_dtype=torch.float16, density=density)
    experts = {"good": constant(6e4), "q": constant(7e4)}
    with pytest.raises(MergeOverflowError, match="1 of 2 linears did not stay finite: 'q'"):
        model_conflicts(experts, spec)
    with pytest.raises(MergeOverflowError, match="'q'"):
        lora_merge_(torch.zeros(OUT, IN), experts["q"], spec, layer="q")
    opposed = [LoraFactors(torch.full((2, IN), 3e38), torch.tensor([[3e38, -3e38]] * OUT))]
    with pytest.raises(MergeOverflowError, match="'q'"):
        lora_conflicts([*opposed, *constant(1e30, 1e30)], MergeSpec(density=density), layer="q")


def test_counts_are_exact_whatever_the_tile() -> None:
    """Float32 counts to 2^24: an odd number beyond it is lost in one block of all elements."""
    out, width = (1 << 16) + 771, 256
    a, b = torch.ones(1, width), torch.ones(out, 1)
    a[0, 7] = 0.0
    report = lora_conflicts([LoraFactors(a, b)], MergeSpec(density=1.0), tile=1 << 30)
    assert int(report.kept) == out * (width - 1) > 1 << 24


@pytest.mark.parametrize("tile", [0, -1])
def test_a_tile_of_nothing_is_refused(implementation, tile: int) -> None:
    base = torch.ones(OUT, IN)
    for work in (
        lambda: lora_merge_(base, factors(), MergeSpec(), tile=tile),
        lambda: model_conflicts({"q": factors()}, MergeSpec(), tile=tile),
    ):
        with pytest.raises(ValueError, match=f"tile must be at least 1 element, got {tile}"):
            work()
    assert (base == 1).all()


SAME = {
    "one tensor": lambda w: (w[:OUT, :IN], w[:OUT, :IN]),
    "a Parameter": lambda w: (w[:OUT, :IN], torch.nn.Parameter(w, requires_grad=False)[:OUT, :IN]),
    "shifted by a row": lambda w: (w[:OUT, :IN], w[1 : OUT + 1, :IN]),
    "shifted by a column": lambda w: (w[:OUT, 1 : IN + 1], w[:OUT, :IN]),
    "a corner": lambda w: (w[:OUT, :IN], w[OUT - 1 :, IN - 1 :][:OUT, :IN]),
    "other strides": lambda w: (w[:OUT, :IN], w.view(-1)[7 : 7 + OUT * IN].view(OUT, IN)),
    "transposed": lambda w: (w.t()[:OUT, :IN], w.t()[1 : OUT + 1, 2 : IN + 2]),
}
PARTS = {
    "rows": lambda w: (w[:OUT, :IN], w[OUT : 2 * OUT, :IN]),
    "columns": lambda w: (w[:OUT, IN : 2 * IN], w[:OUT, :IN]),
    "diagonal": lambda w: (w[OUT : 2 * OUT, :IN], w[:OUT, IN : 2 * IN]),
    "every other": lambda w: (w[:OUT, 0 : 2 * IN : 2], w[:OUT, 1 : 2 * IN : 2]),
    "transposed": lambda w: (w.t()[:OUT, IN : 2 * IN], w.t()[:OUT, :IN]),
    "of a flat buffer": lambda w: (
        w.view(-1)[: OUT * IN].view(OUT, IN),
        w.view(-1)[OUT * IN : 2 * OUT * IN].view(OUT, IN),
    ),
}


@pytest.mark.parametrize("views", SAME.values(), ids=SAME)
def test_tied_weights_are_not_merged_twice(implementation, views) -> None:
    store = torch.zeros(3 * IN, 3 * IN)
    head, embed = views(store)
    experts = {"head": factors(seed=1), "embed": factors(seed=2)}
    with pytest.raises(ValueError, match="'(head|embed)' and '(head|embed)' share memory"):
        merge_model_({"head": head, "embed": embed}, experts, MergeSpec())
    assert not store.any()
    untouched = experts | {"embed": [None] * 5}
    merge_model_({"head": head, "embed": embed}, untouched, MergeSpec())
    assert torch.equal(head, merged(experts["head"], MergeSpec()))


@pytest.mark.parametrize("views", PARTS.values(), ids=PARTS)
def test_parts_of_one_tensor_are_merged(implementation, views) -> None:
    parts = dict(zip("qk", views(torch.zeros(3 * IN, 3 * IN)), strict=True))
    experts = {"q": factors(seed=1), "k": factors(seed=2)}
    merge_model_(parts, experts, MergeSpec())
    for name, part in parts.items():
        assert torch.equal(part, merged(experts[name], MergeSpec()))


@pytest.fixture
def bf16_default():
    """torch's default dtype as a trainer may leave it."""
    before = torch.get_default_dtype()
    yield lambda: torch.set_default_dtype(torch.bfloat16)
    torch.set_default_dtype(before)


@pytest.mark.parametrize(
    "spec",
    [
        MergeSpec(weights=(1.0, 0.5, 2.0, 0.1, 1.0), election="weighted", divisor="weight"),
        MergeSpec(method="dare_linear", density=0.5),
        MergeSpec(rounding="stochastic", trim_scope="global"),
    ],
    ids=("ties", "dare", "global"),
)
def test_torchs_default_dtype_changes_nothing(implementation, bf16_default, spec) -> None:
    experts = factors(missing=(1,))

    def work():
        base = torch.ones(OUT, IN, dtype=torch.float32)
        return base, lora_merge_(base, experts, spec, layer="q").to_dict()

    want, wanted = work()
    bf16_default()
    got, report = work()
    assert torch.equal(got, want) and report == wanted


def test_torchs_default_dtype_changes_no_core_space_merge(implementation, bf16_default) -> None:
    experts = factors()
    want, energy = lora_merge_as_lora(experts, MergeSpec(), rank=19)
    bf16_default()
    got, kept = lora_merge_as_lora(experts, MergeSpec(), rank=19)
    assert torch.equal(got.A, want.A) and torch.equal(got.B, want.B) and kept == energy


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_memory_stays_within_five_percent_of_the_matrix(method: str) -> None:
    g = torch.Generator().manual_seed(0)
    out, width, rank = 4096, 3584, 16
    base = torch.zeros(out, width, dtype=torch.bfloat16)
    experts = [
        LoraFactors(
            torch.randn(rank, width, generator=g).bfloat16(),
            torch.randn(out, rank, generator=g).bfloat16(),
        )
        for _ in range(5)
    ]
    known = [t for f in experts for t in (f.A, f.B)]
    with PeakMemory(base, *known) as memory:
        report = lora_merge_(
            base, experts, MergeSpec(method=method, density=0.3, rounding="stochastic")
        )
    assert 0 < memory.peak <= 0.05 * base.numel() * base.element_size()
    if method == "ties":
        assert (report.kept - report.tied).tolist() == [int(0.3 * out * width)] * 5
