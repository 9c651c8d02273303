"""The Triton merge against the plain torch one and definitions on whole deltas.

Factors of small integers make every product exact, so that both implementations must agree bit for bit.
"""

import dataclasses
import importlib.util
import logging
from pathlib import Path

import pytest
import torch

from mmedx_fast.kernels import _dispatch, _lora_thresholds, _lora_trim, _lora_triton
from mmedx_fast.kernels._lora_search import Search
from mmedx_fast.kernels._lora_types import Linear
from mmedx_fast.kernels.lora_merge import (
    LoraFactors,
    MergeSpec,
    lora_conflicts,
    lora_merge_,
    merge_model_,
    model_conflicts,
)

_file = Path(__file__).with_name("_peak_memory.py")
_spec = importlib.util.spec_from_file_location("peak_memory", _file)
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
PeakMemory = _module.PeakMemory

pytestmark = pytest.mark.usefixtures("nan_empty")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OUT, IN = 20, 72  # neither a multiple of a tile nor below one


def integers(ranks=(4, 1, 20), out=OUT, width=IN, dtype=torch.bfloat16, seed=0, missing=()):
    """Factors whose products are whole numbers below 2^24."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randint(-4, 5, shape, generator=g).to(dtype).to(DEVICE)

    made = [LoraFactors(draw(r, width), draw(out, r), 0.5 * 2**e) for e, r in enumerate(ranks)]
    return [None if e in missing else f for e, f in enumerate(made)]


def both(monkeypatch, work):
    """The work's result under each implementation."""
    results = []
    for mode in ("torch", "triton"):
        monkeypatch.setenv("MMEDX_KERNELS", mode)
        results.append(work())
    return results


def merged(experts, spec, base_dtype=torch.float32, layer="q"):
    g = torch.Generator().manual_seed(1)
    shape = next(f.shape for f in experts if f is not None)
    base = torch.randn(shape, generator=g).to(base_dtype).to(DEVICE)
    return base, lora_merge_(base, experts, spec, layer=layer)


def assert_same_report(got, want) -> None:
    for field in dataclasses.fields(want):
        a, b = getattr(got, field.name), getattr(want, field.name)
        if isinstance(b, torch.Tensor):
            exact = field.name in EXACT
            torch.testing.assert_close(
                a, b, equal_nan=True, atol=0, rtol=0 if exact else 1e-6, msg=field.name
            )
        else:
            assert a == b, field.name


EXACT = {
    *("threshold", "size", "kept", "tied", "overlap", "conflicts", "pair_overlap"),
    *("pair_conflicts", "pair_linears", "dot", "updates", "lost_updates"),
}
UNEQUAL = (1.0, 0.5, -2.0)
SPECS = [
    MergeSpec(),
    MergeSpec(density=0.0),
    MergeSpec(density=1.0, lam=0.7),
    MergeSpec(weights=UNEQUAL),
    MergeSpec(weights=UNEQUAL, election="weighted", divisor="weight", lam=0.3),
    MergeSpec(weights=(1.0, 0.0, -1.0), election="weighted"),
    MergeSpec(election="frequency", weights=UNEQUAL, divisor="weight"),
    MergeSpec(delta_dtype=torch.bfloat16),
    MergeSpec(delta_dtype=torch.float16, density=0.05),
    MergeSpec(method="dare_ties", density=0.4, seed=3),
    MergeSpec(method="dare_linear", density=0.9, weights=UNEQUAL),
    MergeSpec(method="dare_linear", density=0.5, dare_mode="expectation"),
    MergeSpec(method="linear", weights=UNEQUAL),
    MergeSpec(rounding="stochastic", lam=1e-3, seed=5),
]


@pytest.mark.parametrize("spec", SPECS, ids=range(len(SPECS)))
@pytest.mark.parametrize("base", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_every_option_equals_plain_torch_bit_for_bit(monkeypatch, spec, base) -> None:
    experts = integers()
    (want, wanted), (got, report) = both(monkeypatch, lambda: merged(experts, spec, base))
    assert torch.equal(got, want)
    assert_same_report(report, wanted)


@pytest.mark.parametrize("base", [torch.float16, torch.float64], ids=["fp16", "fp64"])
@pytest.mark.parametrize("factor", [torch.float16, torch.float32, torch.float64])
def test_other_dtypes_equal_plain_torch(monkeypatch, base, factor) -> None:
    experts = integers(dtype=factor, missing=(1,))
    spec = MergeSpec(rounding="stochastic", lam=0.01)
    (want, wanted), (got, report) = both(monkeypatch, lambda: merged(experts, spec, base))
    assert torch.equal(got, want)
    assert_same_report(report, wanted)


@pytest.mark.parametrize("ranks", [(128, 1, 64), (256, 20)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 130), (129, 5), (64, 64)], ids=str)
def test_ranks_and_shapes_that_do_not_fill_tiles(monkeypatch, ranks, shape) -> None:
    experts = integers(ranks, *shape)
    spec = MergeSpec(density=0.5)
    (want, wanted), (got, report) = both(monkeypatch, lambda: merged(experts, spec))
    assert torch.equal(got, want)
    assert_same_report(report, wanted)


def padded(x: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same values inside a larger buffer of NaN, every step-th column; and the buffer."""
    shape = (x.shape[0] + 2, x.shape[1] * step + 8)
    buffer = torch.full(shape, torch.nan, dtype=x.dtype, device=x.device)
    inside = buffer[1:-1, 4 : 4 + x.shape[1] * step : step]
    inside.copy_(x)
    return inside, buffer


@pytest.mark.parametrize("step", [1, 2])
def test_nothing_outside_factors_and_base_is_read_or_written(triton_kernels, step: int) -> None:
    experts = integers()
    base, report = merged(experts, MergeSpec())
    strided = [LoraFactors(padded(f.A, step)[0], padded(f.B, step)[0], f.scale) for f in experts]
    g = torch.Generator().manual_seed(1)
    inside, buffer = padded(torch.randn((OUT, IN), generator=g).to(DEVICE), step)
    again = lora_merge_(inside, strided, MergeSpec(), layer="q")
    assert torch.equal(inside, base)
    assert_same_report(again, report)
    assert int(buffer.isnan().sum()) == buffer.numel() - OUT * IN


def test_runs_repeat_bit_for_bit(triton_kernels) -> None:
    g = torch.Generator().manual_seed(0)
    experts = [
        LoraFactors(torch.randn(8, IN, generator=g), torch.randn(OUT, 8, generator=g))
        for _ in range(3)
    ]
    first, report = merged(experts, MergeSpec())
    second, again = merged(experts, MergeSpec())
    assert torch.equal(first, second)
    assert again.to_dict() == report.to_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_factors_against_float64(triton_kernels, dtype) -> None:
    """Kept set as of exact deltas but for elements within rounding of the threshold; error of the merge
    at most one bf16 ulp."""
    g = torch.Generator().manual_seed(0)
    experts = [
        LoraFactors(
            torch.randn(r, IN, generator=g).to(dtype), torch.randn(OUT, r, generator=g).to(dtype)
        )
        for r in (16, 64, 8)
    ]
    base = torch.zeros(OUT, IN)
    report = lora_merge_(base, experts, MergeSpec(density=0.3))
    deltas = torch.stack([f.B.double() @ f.A.double() for f in experts])
    k = int(0.3 * OUT * IN)
    cut = deltas.abs().flatten(1).sort(descending=True)[0][:, k - 1, None, None]
    near = (deltas.abs() / cut - 1).abs() < 1e-5
    assert near.sum() < 20
    kept = torch.where(deltas.abs() >= cut, deltas, 0.0)
    sign = torch.where(kept.sum(0) >= 0, 1.0, -1.0)
    agree = kept.sign() == sign
    want = (kept * agree).sum(0) / agree.sum(0).clamp(min=1)
    # where the sum all but vanishes its sign is a matter of rounding
    clear = ~near.any(0) & ((kept.sum(0).abs() > 1e-5) | (kept == 0).all(0))
    error = (base.double() - want).abs() / want.abs().clamp(min=1e-30)
    assert error[clear & (want != 0)].max() < 2**-8
    assert (base[clear & (want == 0)] == 0).all()
    torch.testing.assert_close(report.threshold, cut.flatten(), rtol=1e-6, atol=0)
    assert (report.kept - report.tied).tolist() == [k] * 3


def model():
    """Linears of several shapes, ranks and dtypes; an expert that touches some, a linear without any."""
    experts = {
        "a": integers((4, 8), 70, 40, seed=1),
        "b": integers((4, 1), 33, 150, seed=2, missing=(1,)),
        "none": [None, None],
        "c": integers((2, 2), 40, 40, seed=3, dtype=torch.float32),
        "d": integers((16, 3), 70, 40, seed=4),
    }
    g = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn((70, 40) if f[0] is None else f[0].shape, generator=g).to(DEVICE)
        for name, f in experts.items()
    }
    weights["d"] = weights["d"].bfloat16()
    return weights, experts


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("sampled", [False, True])
def test_a_model_in_grouped_launches(monkeypatch, scope: str, sampled: bool) -> None:
    if sampled:
        force_samples(monkeypatch)
    _, experts = model()
    spec = MergeSpec(density=0.2, trim_scope=scope)

    def work():
        weights, _ = model()
        seen: list[str] = []
        report = merge_model_(weights, experts, spec, on_linear=lambda name, _: seen.append(name))
        assert seen == list(experts)
        return weights, report, model_conflicts(experts, spec)

    (want, wanted, looked), (got, report, look) = both(monkeypatch, work)
    for name in want:
        assert torch.equal(got[name], want[name]), name
    for found, expected in ((report, wanted), (look, looked)):
        assert list(found["linears"]) == list(expected["linears"])
        for name in ("threshold", "tied", "kept_fraction", "overlap", "conflicts", "elements"):
            assert found["total"][name] == expected["total"][name]
            for linear in expected["linears"]:
                assert found["linears"][linear][name] == expected["linears"][linear][name]
    for linear in experts:
        key = "sign_conflict_rate"
        assert look["linears"][linear][key] == report["linears"][linear][key]


def force_samples(monkeypatch) -> None:
    monkeypatch.setattr(_lora_thresholds, "SAMPLED_FROM", 1)
    monkeypatch.setattr(_lora_thresholds, "SAMPLE_BLOCKS", 8)
    monkeypatch.setattr(_lora_thresholds, "PER_UNIT", 2)
    monkeypatch.setattr(_lora_trim, "SAMPLED_FROM", 1)
    monkeypatch.setattr(_lora_trim, "SAMPLE", 1 << 11)


# A and B of rank 1 or 2 whose product is the distribution named
ADVERSARIAL = {
    "zero": lambda: (torch.zeros(1, IN), torch.ones(OUT, 1)),
    "constant": lambda: (torch.full((1, IN), 0.5), torch.full((OUT, 1), -3.0)),
    "two values": lambda: (torch.tensor([[1.0, 2.0] * (IN // 2)]), torch.ones(OUT, 1)),
    "mostly zero": lambda: (
        (torch.arange(IN) % 17 == 0).float()[None],
        (torch.arange(OUT) % 5 == 0).float()[:, None],
    ),
    "one outlier": lambda: (
        torch.eye(2, IN) * 2.0**20 + 2.0**-20,
        torch.eye(OUT, 2) * 2.0**20 + 2.0**-20,
    ),
    "wide range": lambda: (
        2.0 ** (torch.arange(IN) - IN // 2).float()[None] / 4,
        torch.ones(OUT, 1),
    ),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.parametrize("density", [1e-6, 2e-4, 0.3, 0.999999])
def test_thresholds_are_exact_for_hard_distributions(
    monkeypatch, implementation, name: str, density: float
) -> None:
    force_samples(monkeypatch)
    a, b = (x.to(DEVICE) for x in ADVERSARIAL[name]())
    f = LoraFactors(a, b)
    report = lora_conflicts([f], MergeSpec(density=density))
    k = int(density * OUT * IN)
    magnitudes = f.delta().abs().flatten()
    want = magnitudes.topk(k)[0][-1].item() if k else torch.inf
    assert report.threshold.item() == want
    kept = int((magnitudes >= want).sum()) if want > 0 else int((magnitudes > 0).sum())
    assert int(report.kept) == kept
    assert int(report.tied) == (kept - k if want > 0 else 0)


@pytest.mark.parametrize("bins", [1 << 10, 1 << 12])
@pytest.mark.parametrize("lie", [None, "low", "high"])
def test_a_search_recovers_from_any_first_interval(bins: int, lie) -> None:
    """A sample that misses costs passes, not exactness."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(20000, generator=g).abs()
    patterns = x.view(torch.int32).long()
    ranks = torch.tensor([0, 1, 2, 700, 6000, 19999, 20000])
    search = Search(ranks, bins)

    def count(of):
        key = ((of - search.low[:, None]) >> search.shift[:, None]).clamp(-1, bins) + 1
        counts = torch.stack([torch.bincount(row, minlength=bins + 2) for row in key])
        return counts[:, 1:-1], counts[:, -1]

    if lie:
        false = torch.full((1 << 14,), 1e-30 if lie == "low" else 1e30).view(torch.int32).long()
        for _ in range(2):
            counts, above = count(false)
            search.aim(counts, above, len(false), torch.full_like(ranks, len(x)))
    passes = 0
    while not search.found.all():
        search.narrow(*count(patterns))
        passes += 1
    ordered = x.sort(descending=True)[0]
    want = torch.cat([torch.tensor([torch.inf]), ordered[ranks[1:] - 1]]).double()
    assert torch.equal(search.threshold, want)
    assert passes <= 6


def test_too_many_experts_are_refused(triton_kernels) -> None:
    with pytest.raises(RuntimeError, match="=triton, but .*at most 16 experts, got 17"):
        lora_conflicts(integers((1,) * 17, 4, 4), MergeSpec())


def test_too_many_experts_fall_to_torch(monkeypatch, caplog) -> None:
    monkeypatch.setattr(_dispatch, "_said", set())
    experts = integers((1,) * 17, 4, 8)
    monkeypatch.setenv(_dispatch.ENV, "torch")
    want, wanted = merged(experts, MergeSpec())
    monkeypatch.setenv(_dispatch.ENV, "auto")
    usable = dataclasses.replace(_dispatch._triton_ops["lora_merge"], refuse=lambda device: None)
    monkeypatch.setitem(_dispatch._triton_ops, "lora_merge", usable)
    with caplog.at_level(logging.INFO, logger="mmedx_fast.kernels"):
        for _ in range(2):
            got, report = merged(experts, MergeSpec())
            assert torch.equal(got, want)
            assert_same_report(report, wanted)
    assert [r.getMessage() for r in caplog.records] == [
        "lora_merge runs in plain torch: at most 16 experts, got 17"
    ]


def test_sixteen_experts(monkeypatch) -> None:
    experts = integers((1, 2) * 8, 8, 16)
    (want, wanted), (got, report) = both(monkeypatch, lambda: merged(experts, MergeSpec()))
    assert torch.equal(got, want)
    assert_same_report(report, wanted)


def test_all_ranks_of_a_model_in_one_launch(monkeypatch) -> None:
    """Ranks are padded to the largest; a factor is read to its own."""
    ranks = (1, 8, 20, 64, 128)
    experts = {
        "q": integers(ranks, seed=1),
        "k": integers(ranks[::-1], 8, 40, seed=2, missing=(2,)),
        "v": integers((8,) * 5, 66, 7, seed=3),
        "o": integers((1, 8, 1, 8, 1), seed=4, missing=(0, 2)),
    }

    def work():
        g = torch.Generator().manual_seed(0)
        shapes = {n: next(f.shape for f in row if f is not None) for n, row in experts.items()}
        weights = {n: torch.randn(s, generator=g).bfloat16().to(DEVICE) for n, s in shapes.items()}
        return weights, merge_model_(weights, experts, MergeSpec(density=0.4))

    (want, wanted), (got, report) = both(monkeypatch, work)
    for name in experts:
        assert torch.equal(got[name], want[name]), name
        for key in ("threshold", "tied", "kept_fraction", "overlap", "conflicts"):
            assert report["linears"][name][key] == wanted["linears"][name][key], (name, key)


class NoKernel:
    """A kernel that does nothing, for the sake of the host's share of the memory."""

    def __getitem__(self, grid):
        return lambda *args, **options: None


@pytest.mark.slow
def test_memory_stays_within_five_percent_of_the_largest_matrix(
    triton_kernels, monkeypatch
) -> None:
    for name in ("_lora_sample_kernel", "_lora_count_kernel"):
        monkeypatch.setattr(_lora_thresholds, name, NoKernel())
    monkeypatch.setattr(_lora_triton, "_lora_apply_kernel", NoKernel())
    monkeypatch.setattr(_lora_thresholds, "_finish", lambda *_: None)
    monkeypatch.setattr(_lora_triton, "_check_kept", lambda *_: None)
    out, width, rank = 18944, 3584, 64
    known, linears = [], []
    for layer in range(12):
        shape = (out, width) if layer == 0 else (512, width)
        base = torch.zeros(shape, dtype=torch.bfloat16)
        experts = [
            LoraFactors(
                torch.ones(rank, width, dtype=torch.bfloat16),
                torch.ones(shape[0], rank, dtype=torch.bfloat16),
            )
            for _ in range(5)
        ]
        linears.append(Linear(str(layer), base, experts))
        known += [base, *(t for f in experts for t in (f.A, f.B))]
    with PeakMemory(*known) as memory:
        _lora_triton.merge_triton(linears, MergeSpec(), None, None)
    assert 0 < memory.peak <= 0.05 * 2 * out * width
