"""The row kernels of the head ops, one by one, against float64; and how a call is cut into tiles."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmedx_fast.kernels import _logits as lg
from mmedx_fast.kernels._policy_math import PolicyLossSpec, Tokens, token_loss

pytest.importorskip("triton", reason="the row kernels need triton")
from mmedx_fast.kernels import _logits_triton as lt  # noqa: E402
from mmedx_fast.kernels import _policy_triton as pt  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL_BLOCK = 64
NAN = float("nan")


@pytest.fixture(autouse=True)
def _many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a few hundred logits take several blocks."""
    monkeypatch.setattr(lt, "BLOCK", SMALL_BLOCK)
    monkeypatch.setattr(lt, "BLOCK_CAPPED", SMALL_BLOCK)


def tile(n: int, vocab: int, dtype: torch.dtype = torch.float32, scale: float = 4.0):
    """[n, V] logits inside NaN."""
    z = torch.full((n, lg.raw_width(vocab)), NAN, dtype=dtype, device=DEVICE)[:, :vocab]
    return z.copy_(scale * torch.randn(n, vocab))


def head(vocab: int, **options) -> lg.Head:
    values = {"bias": None, "temperature": 1.0, "softcap": None, "banned": None} | options
    return lg.Head(torch.zeros(vocab, 2, device=DEVICE), acc=torch.float32, **values)


def distribution(z: torch.Tensor, head: lg.Head) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, log-probs) in float64 of what the tile holds."""
    x = z.double()
    if head.bias is not None:
        x = (x + head.bias.double()).to(z.dtype).double()
    if head.softcap is not None:
        x = torch.where(x == -torch.inf, x, head.softcap * torch.tanh(x / head.softcap))
    x = x / head.temperature
    return x, x.log_softmax(1)


def gradient(z, head, targets, g, ge) -> torch.Tensor:
    x, logp = distribution(z, head)
    p = logp.exp()
    entropy = -torch.where(p > 0, p * logp, 0.0).sum(1)
    hot = torch.nn.functional.one_hot(targets, z.shape[1])
    slope = torch.where(p > 0, logp + entropy[:, None], 0.0)
    d = (g[:, None] * (hot - p) - ge[:, None] * p * slope) / head.temperature
    if head.softcap is not None:
        d = d * (1 - (x * head.temperature / head.softcap).clamp(-1, 1).square())
    return d


def outcome(z, head, targets):
    stats = torch.full((5, len(z)), NAN, device=DEVICE)
    lt.row_stats(lt.Rows.of(head), z, targets, stats, 0, True)
    return stats, *lg.outcome(stats, True)


OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.1},
    "cap": {"softcap": 3.0, "temperature": 2.0},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("vocab", [1, 63, 64, 65, 129, 300])
def test_statistics_and_gradient(vocab: int, options: dict, dtype: torch.dtype) -> None:
    z = tile(4, vocab, dtype)
    bias = torch.randn(vocab, device=DEVICE) if options else None
    targets = torch.randint(vocab, (4,), device=DEVICE)
    z[2, targets[2]] = z[2].max() + 3
    if vocab > 1:
        z[:, (targets[0] + 1) % vocab] = -torch.inf
        z[3, targets[3]] = 0.5
    made = head(vocab, bias=bias, **options)
    stats, logprob, entropy = outcome(z, made, targets)
    logp = distribution(z, made)[1]
    want = logp.gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(logprob.double(), want, atol=2e-5, rtol=1e-6)
    entropies = -torch.where(logp > -torch.inf, logp.exp() * logp, 0.0).sum(1)
    torch.testing.assert_close(entropy.double(), entropies, atol=2e-5, rtol=1e-5)

    g, ge = torch.randn(2, 4, device=DEVICE)
    g[1] = ge[1] = 0.0
    out = torch.full((4, z.shape[1] + 3), NAN, device=DEVICE)
    lt.row_dlogits(lt.Rows.of(made), z, out[:, : z.shape[1]], targets, stats, g, ge, 0)
    want = gradient(z, made, targets, g, ge)
    torch.testing.assert_close(out[:, : z.shape[1]].double(), want, atol=3e-5, rtol=1e-4)
    assert out[:, z.shape[1] :].isnan().all()


@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("vocab", [1, 64, 65, 300])
def test_in_place_gives_the_same_bits_rounded_once(vocab: int, entropy: bool) -> None:
    z, targets = tile(5, vocab), torch.randint(vocab, (5,), device=DEVICE)
    made = head(vocab)
    stats = outcome(z, made, targets)[0]
    g, ge = torch.randn(2, 5, device=DEVICE)
    ge = ge if entropy else None
    apart = torch.full_like(z, NAN)
    lt.row_dlogits(lt.Rows.of(made), z, apart, targets, stats, g, ge, 0)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        fresh = torch.full((5, lg.raw_width(vocab)), NAN, device=DEVICE)[:, :vocab].copy_(z)
        over = lt.in_place(fresh, dtype)
        assert over.data_ptr() == fresh.data_ptr() and over.shape == z.shape
        lt.row_dlogits(lt.Rows.of(made), fresh, over, targets, stats, g, ge, 0)
        assert torch.equal(over, apart.to(dtype))


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_common_offset_costs_no_digits(offset: float) -> None:
    z = torch.randint(-8, 9, (4, 200), device=DEVICE).float()
    targets = torch.randint(200, (4,), device=DEVICE)
    stats, logprob, entropy = outcome(z, head(200), targets)
    moved = outcome(z + offset, head(200), targets)
    assert torch.equal(stats[1:], moved[0][1:])
    assert torch.equal(logprob, moved[1]) and torch.equal(entropy, moved[2])


@pytest.mark.parametrize("rest", [1e-6, 1e-3, 0.2])
def test_a_certain_token_keeps_its_digits(rest: float) -> None:
    """1 - p = ``rest``: log p and the gradient at the target to float32's relative precision."""
    vocab = 129
    z = torch.zeros(1, vocab, device=DEVICE)
    z[0, 70] = math.log((1 - rest) / rest * (vocab - 1))
    targets = torch.tensor([70], device=DEVICE)
    stats, logprob, _ = outcome(z, head(vocab), targets)
    want = distribution(z, head(vocab))[1][:, 70]
    torch.testing.assert_close(logprob.double(), want, atol=0, rtol=2e-6)
    out = torch.empty_like(z)
    one = torch.ones(1, device=DEVICE)
    lt.row_dlogits(lt.Rows.of(head(vocab)), z, out, targets, stats, one, None, 0)
    torch.testing.assert_close(out[0, 70].double(), -torch.expm1(want[0]), atol=0, rtol=2e-6)


def test_nan_reaches_the_log_prob_of_its_row_alone() -> None:
    z, targets = tile(3, 130), torch.tensor([5, 6, 7], device=DEVICE)
    z[1, 100] = NAN
    _, logprob, entropy = outcome(z, head(130), targets)
    assert logprob.isnan().tolist() == entropy.isnan().tolist() == [False, True, False]


def test_a_target_outside_reads_nothing_and_is_nan() -> None:
    z, targets = tile(2, 70), torch.tensor([70, -100], device=DEVICE)
    stats, logprob, _ = outcome(z, head(70), targets)
    assert logprob.isnan().all() and (stats[lg.OWNED] == 0).all()


def test_shards_put_together_are_the_whole() -> None:
    z, targets = tile(4, 150), torch.tensor([3, 80, 149, 99], device=DEVICE)
    whole, logprob, _ = outcome(z, head(150), targets)
    parts = []
    for start, stop in ((0, 64), (64, 100), (100, 150)):
        made = head(stop - start, start=start, sharded=True)
        parts.append(outcome(z[:, start:stop].contiguous(), made, targets)[0])
    slots = torch.stack(parts)
    assert slots[:, lg.OWNED].sum(0).tolist() == [1.0] * 4
    top = slots[:, lg.TOP].amax(0)
    torch.testing.assert_close(top, whole[lg.TOP])
    others = (slots[:, lg.OTHERS] * (slots[:, lg.TOP] - top).exp()).sum(0)
    torch.testing.assert_close(others, whole[lg.OTHERS])


def far_apart(vocab: int) -> torch.Tensor:
    """[4, V] bfloat16, the last row 3 * 2^30 elements after the first; only touched pages take memory on a CPU."""
    stride = 1 << 30
    z = torch.empty(3 * stride + lg.raw_width(vocab), dtype=torch.bfloat16, device=DEVICE)
    z = z.as_strided((4, lg.raw_width(vocab)), (stride, 1)).fill_(NAN)
    z[:, :vocab] = torch.randn(4, vocab)
    return z


def test_rows_beyond_two_to_the_31_elements() -> None:
    vocab = 70
    z = far_apart(vocab)[:, :vocab]
    targets = torch.randint(vocab, (4,), device=DEVICE)
    stats, logprob, _ = outcome(z, head(vocab), targets)
    want = distribution(z, head(vocab))[1].gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(logprob.double(), want, atol=1e-5, rtol=1e-6)
    g, ge = torch.randn(2, 4, device=DEVICE)
    ge[2] = g[2] = 0.0
    truth = gradient(z, head(vocab), targets, g, ge)
    lt.row_dlogits(lt.Rows.of(head(vocab)), z, z, targets, stats, g, ge, 0)  # out is as far
    torch.testing.assert_close(z.double(), truth, atol=1e-5, rtol=1e-2)


def test_policy_rows_beyond_two_to_the_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    vocab, n = 70, 4
    kept = far_apart(vocab)
    z, made = kept[:, :vocab], head(vocab)
    made = lg.Head(made.weight.bfloat16(), None, 1.0, None, None, torch.float32, torch.bfloat16)
    targets = torch.randint(vocab, (n,), device=DEVICE)
    hidden = torch.zeros(n, 2, dtype=torch.bfloat16, device=DEVICE)
    tiles = pt.TritonPolicyTiles(hidden, made, targets, n, kept=kept, filled=True)
    monkeypatch.setattr(tiles, "gradient_of", lambda z: z)
    logp = distribution(z, made)[1].gather(1, targets[:, None]).squeeze(1)
    advantage, one = torch.randn(n, device=DEVICE), torch.ones(n, device=DEVICE)
    live = torch.arange(n, device=DEVICE) != 2
    tokens = Tokens(advantage, None, None, None, one, one, live)
    result = torch.full((4, n), NAN, device=DEVICE)
    slope = torch.where(live, -advantage, 0.0)  # on policy the ratio is 1
    truth = gradient(z, made, targets, slope, torch.zeros_like(slope))
    out = tiles.policy(slice(0, n), tokens, PolicyLossSpec(), result)
    torch.testing.assert_close(
        result[pt.LOGPROB].double(), logp.where(live, 0.0), atol=1e-5, rtol=1e-6
    )
    torch.testing.assert_close(out.double(), truth, atol=1e-5, rtol=1e-2)


TOKEN_SPECS = [
    PolicyLossSpec(),
    PolicyLossSpec(delta=1.5, epsilon=0.1, epsilon_high=0.3),
    PolicyLossSpec(beta=0.3, kl_estimator="k1", entropy_coef=0.1),
    PolicyLossSpec(beta=0.3, kl_estimator="k2", use_bias_correction_kl=False),
    PolicyLossSpec(beta=0.3, importance_sampling_correction="token_truncate"),
    PolicyLossSpec(
        beta=0.2,
        importance_sampling_correction="token_mask",
        importance_sampling_clip_max=1.4,
        importance_sampling_clip_min=0.7,
    ),
    PolicyLossSpec(loss_type="cispo", epsilon_high=1.2, beta=0.1, use_bias_correction_kl=False),
]


@pytest.mark.parametrize("spec", TOKEN_SPECS, ids=lambda s: f"{s.loss_type}-{s.kl_estimator}")
@pytest.mark.parametrize("on_policy", [True, False])
def test_the_policy_kernels_derivative_is_token_loss_s(
    spec: PolicyLossSpec, on_policy: bool
) -> None:
    n, vocab = 24, 100
    hidden, weight = torch.randn(n, 8, device=DEVICE), torch.randn(vocab, 8, device=DEVICE)
    made = lg.Head(weight, None, 0.8, None, None, torch.float32)
    targets = torch.randint(vocab, (n,), device=DEVICE)
    tiles = pt.TritonPolicyTiles(hidden, made, targets, n)
    logp = distribution(hidden @ weight.t(), made)[1].gather(1, targets[:, None]).squeeze(1).float()
    gap = torch.linspace(-1.2, 1.2, n, device=DEVICE)
    rollout = logp + gap.flip(0) / 2
    rollout[::5] = NAN
    tokens = Tokens(
        torch.randn(n, device=DEVICE),
        None if on_policy else logp + gap,
        logp + gap.roll(5),
        rollout,
        torch.rand(n, device=DEVICE),
        torch.rand(n, device=DEVICE),
        torch.arange(n, device=DEVICE) % 7 != 3,
    )
    result = torch.full((4, n), NAN, device=DEVICE)
    dz = tiles.policy(slice(0, n), tokens, spec, result)
    found = token_loss(result[pt.LOGPROB], result[pt.ENTROPY], tokens, spec)
    torch.testing.assert_close(result[pt.D_LOGPROB], found.d_logprob, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(
        result[pt.LOGPROB][tokens.live], logp[tokens.live], atol=1e-5, rtol=1e-5
    )
    ge = torch.zeros(n, device=DEVICE) if found.d_entropy is None else found.d_entropy
    want = gradient(hidden @ weight.t(), made, targets, found.d_logprob, ge)
    torch.testing.assert_close(dz.double(), want, atol=1e-5, rtol=1e-4)
    assert (dz[~tokens.live] == 0).all()


H200 = {"vocab": 152_064, "width": 3584, "itemsize": 4, "multiprocessors": 132}


@pytest.mark.parametrize(
    ("n", "pieces"),
    # 1,024 rows are 8 x 14 tiles of the gradient's GEMM: one wave; nine pieces would take nine
    [(1, 1), (128, 1), (1152, 1), (2304, 2), (8192, 8), (16_384, 15)],
)
def test_tiles_of_the_7b_on_an_h200(n: int, pieces: int) -> None:
    assert lg.cuda_pieces(n, **H200) == pieces


@given(
    n=st.integers(1, 100_000),
    vocab=st.sampled_from([127, 32_000, 152_064, 1_000_000]),
    width=st.sampled_from([64, 1536, 3584, 8192]),
    multiprocessors=st.sampled_from([1, 108, 132, 148]),
)
def test_tiles_fit_the_budget(n: int, vocab: int, width: int, multiprocessors: int) -> None:
    pieces = lg.cuda_pieces(n, vocab, width, 4, multiprocessors)
    rows = math.ceil(n / pieces)
    assert rows <= lg.TILE_M or rows * lg.raw_width(vocab) * 4 <= lg.CUDA_TILE_BYTES
    assert pieces <= 2 * math.ceil(n / max(lg.TILE_M, lg.CUDA_TILE_BYTES // (vocab * 4 + 128)))


@given(n=st.integers(0, 5000), chunk=st.integers(1, 700))
def test_spans_cover_every_row_in_equal_parts(n: int, chunk: int) -> None:
    cut = lg.spans(n, 100, 8, torch.device("cpu"), chunk)
    assert [i for s in cut for i in range(s.start, s.stop)] == list(range(n))
    sizes = {s.stop - s.start for s in cut}
    assert not sizes or (max(sizes) <= chunk and max(sizes) - min(sizes) <= 1)
