"""Memory of the head ops at the vocabulary of the 7B, beside what whole logits take."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmedx_fast.kernels import _logits as lg
from mmedx_fast.kernels.linear_logprob import linear_logprob
from mmedx_fast.kernels.policy_loss import PolicyLossSpec, linear_policy_loss

_file = Path(__file__).with_name("_peak_memory.py")
_spec = importlib.util.spec_from_file_location("_peak_memory", _file)
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
PeakMemory = _module.PeakMemory

VOCAB, WIDTH = 152_064, 512


def operands(n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = torch.randn(n, WIDTH, dtype=dtype), torch.randn(VOCAB, WIDTH, dtype=dtype) / 20
    return hidden, weight, torch.randint(VOCAB, (n,))


@pytest.mark.parametrize("n", [64])
def test_a_16_bit_head_is_not_copied_whole(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 tokens on a CPU: two tiles of logits (the row kernels' interpreter takes one) and a slab of the head."""
    monkeypatch.setenv("MMEDX_KERNELS", "torch")
    hidden, weight, targets = operands(n, torch.bfloat16)
    with PeakMemory(hidden, weight, targets) as memory, torch.no_grad():
        logprob, _ = linear_logprob(hidden, weight, targets)
    tile = 4 * n * lg.raw_width(VOCAB)
    assert tile < memory.peak < 2 * tile + lg.CAST_BYTES + (1 << 20)
    assert memory.peak < 4 * weight.numel(), "a float32 copy of the head alone is more"
    with torch.no_grad():
        monkeypatch.setattr(lg, "CAST_BYTES", 1 << 40)
        torch.testing.assert_close(linear_logprob(hidden, weight, targets)[0], logprob)


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
)
@pytest.mark.parametrize("rows", [1, 7, 64, 126])
def test_slabs_of_the_head_change_no_result(
    rows: int, dtypes: tuple, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients are as near to float64 as those with a head that is cast whole."""
    hidden, weight = torch.randn(9, 16), torch.randn(127, 16)
    targets = torch.randint(127, (9,))

    def run(h: Tensor, w: Tensor) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in (h, w)]
        logprob, entropy = linear_logprob(leaves[0], leaves[1], targets, chunk=4, keep_bytes=0)
        value = logprob.sum() - entropy.sum()
        return [
            x.detach().double() for x in (logprob, entropy, *torch.autograd.grad(value, leaves))
        ]

    h, w = hidden.to(dtypes[0]), weight.to(dtypes[1])
    whole = run(h, w)
    monkeypatch.setattr(lg, "CAST_BYTES", rows * 16 * 4)
    slabs = run(h, w)
    monkeypatch.setenv("MMEDX_KERNELS", "torch")
    truth = run(h.double(), w.double())
    for a, b, exact in zip(slabs, whole, truth, strict=True):
        assert (a - exact).norm() <= 1.5 * (b - exact).norm() + 1e-6


def loss_of(hidden: Tensor, weight: Tensor, targets: Tensor, ours: bool) -> Tensor:
    """On-policy dapo with an entropy bonus."""
    n = len(targets)
    advantages, token_weight = torch.ones(n), torch.full((n,), 1 / n)
    if ours:
        spec = PolicyLossSpec(entropy_coef=0.01)
        return linear_policy_loss(
            hidden, weight, targets, advantages, token_weight=token_weight, spec=spec
        )[0]
    logp = (hidden @ weight.t()).log_softmax(1)
    entropy = -(logp.exp() * logp).sum(1)
    mine = logp.gather(1, targets[:, None]).squeeze(1)
    ratio = (mine - mine.detach()).exp()
    return (token_weight * (-ratio * advantages - 0.01 * entropy)).sum()


def peak_of(n: int, ours: bool) -> tuple[float, int]:
    """(loss, peak bytes) of forward and backward beside the operands, at the 7B's vocabulary."""
    torch.manual_seed(0)
    hidden, weight, targets = operands(n, torch.float32)
    hidden.requires_grad_()
    with PeakMemory(hidden, weight, targets) as memory:
        loss = loss_of(hidden, weight, targets, ours)
        loss.backward()
    return loss.item(), memory.peak


@pytest.mark.slow
def test_policy_loss_of_4096_tokens_takes_an_eighth_of_eager(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Eager's bytes grow by k * 4 * V a token, measured at 16, 32 and 64 and carried on to 4,096."""
    monkeypatch.setenv("MMEDX_KERNELS", "torch")
    n, logits = 4096, 4 * VOCAB
    small = {tokens: peak_of(tokens, ours=False) for tokens in (16, 32, 64)}
    k = (small[64][1] - small[32][1]) / (32 * logits)
    assert small[32][1] - small[16][1] == pytest.approx(k * 16 * logits, rel=1e-3)
    assert k >= 2
    assert peak_of(32, ours=True)[0] == pytest.approx(small[32][0], rel=1e-4)
    assert peak_of(n, ours=True)[1] <= k * n * logits / 8
