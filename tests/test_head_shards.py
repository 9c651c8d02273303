"""The head ops over a vocabulary in shards that are unequal, wholly banned, or not the vocabulary."""

import os
import socket

import pytest
import torch
import torch.multiprocessing as mp

from mmedx_fast.kernels import _logits as lg
from mmedx_fast.kernels.linear_logprob import linear_logprob
from mmedx_fast.kernels.policy_loss import PolicyLossSpec, linear_policy_loss

pytestmark = pytest.mark.usefixtures("nan_empty")
SIZES = (6, 8)
VOCAB = sum(SIZES)
STARTS = (0, SIZES[0])
NO_BIAS = torch.zeros(VOCAB)
# Nothing of the second shard can occur.
IMPOSSIBLE = torch.where(torch.arange(VOCAB) < SIZES[0], 0.0, -torch.inf)
CASES = {
    "plain": {"bias": NO_BIAS, "banned": None},
    "banned": {"bias": NO_BIAS, "banned": torch.arange(SIZES[0], VOCAB)},
    "bias": {"bias": IMPOSSIBLE, "banned": None},
}


def operands(case: str):
    g = torch.Generator().manual_seed(5)
    hidden = torch.randn(7, 3, generator=g).requires_grad_()
    weight = torch.randn(VOCAB, 3, generator=g)
    targets = torch.randint(VOCAB if case == "plain" else SIZES[0], (7,), generator=g)
    return hidden, weight, targets


def outputs(hidden, weight, targets, bias, banned, **group) -> list[torch.Tensor]:
    """Values and gradients of both ops; the log-prob's with the logits kept, and made again."""
    out = []
    weight = weight.clone().requires_grad_()
    common = {"bias": bias, "banned": banned, "chunk": 4} | group
    for keep in (0, None):
        logprob, entropy = linear_logprob(hidden, weight, targets, keep_bytes=keep, **common)
        value = logprob.sum() - 2 * entropy.sum()
        out += [logprob, entropy, *torch.autograd.grad(value, [hidden, weight])]
    spec = PolicyLossSpec(entropy_coef=0.1)
    one = torch.ones(len(targets))
    loss, _ = linear_policy_loss(
        hidden, weight, targets, one, token_weight=one, spec=spec, **common
    )
    return [x.detach() for x in (*out, loss, *torch.autograd.grad(loss, [hidden, weight]))]


def refusal(*arguments, **group) -> str:
    try:
        outputs(*arguments, **group)
    except ValueError as error:
        return str(error)
    return "accepted"


def _rank(rank: int, port: int, path: str, mode: str) -> None:
    import torch.distributed as dist

    os.environ["MMEDX_KERNELS"] = mode
    if mode == "triton" and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    part = slice(STARTS[rank], STARTS[rank] + SIZES[rank])
    group = {"group": dist.group.WORLD}
    found: dict[str, list[torch.Tensor] | str] = {}
    for case, options in CASES.items():
        hidden, weight, targets = operands(case)
        mine = (hidden, weight[part], targets, options["bias"][part], options["banned"])
        found[case] = outputs(*mine, vocab_start=part.start, **group)
    hidden, weight, targets = operands("plain")
    mine = (hidden, weight[part], targets, None, None)
    found["gap"] = refusal(*mine, **group)
    found["overlap"] = refusal(*mine, vocab_start=(0, 4)[rank], **group)
    found["late"] = refusal(*mine, vocab_start=part.start + 1, **group)
    torch.save(found, f"{path}/{rank}.pt")
    dist.destroy_process_group()


def test_unequal_and_wholly_banned_shards_in_two_processes(tmp_path, implementation: str) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_rank, (port, str(tmp_path), implementation), nprocs=2)
    left, right = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2))
    for case, options in CASES.items():
        want = outputs(*operands(case), **options)
        for i, (a, b, whole) in enumerate(zip(left[case], right[case], want, strict=True)):
            assert whole.isfinite().all()
            got = torch.cat([a, b]) if i in (3, 7, 10) else a  # the head's gradients are shards
            torch.testing.assert_close(got, whole, atol=2e-6, rtol=1e-5)
    for found in (left, right):
        assert "0 to 6, 8 to 16" in found["gap"] and "vocab_start" in found["gap"]
        assert "overlap" in found["overlap"] and "0 to 6, 4 to 12" in found["overlap"]
        assert "1 to 7, 7 to 15" in found["late"]


@pytest.mark.parametrize(
    ("bounds", "owned", "message"),
    [
        ([[0, 6], [6, 14]], [[1, 0], [0, 0]], r"targets\[1\] is in no rank"),
        ([[6, 14], [0, 6]], [[1, 0], [0, 0]], r"targets\[1\] is in no rank"),
        ([[0, 6], [4, 14]], [[1, 1], [0, 1]], "overlap or leave a gap: .* 0 to 6, 4 to 14"),
        ([[0, 6], [8, 14]], [[1, 1], [0, 0]], "overlap or leave a gap: .* 0 to 6, 8 to 14"),
    ],
)
def test_what_is_an_error_on_a_cpu_is_nan_elsewhere(
    bounds: list, owned: list, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = torch.zeros(2, 5, 2)
    slots[:, lg.OTHERS] = 3.0
    slots[:, lg.OWNED] = torch.tensor(owned, dtype=torch.float32)
    slots[:, lg.TARGET] = torch.where(slots[:, lg.OWNED] > 0, -1.0, torch.nan)
    with pytest.raises(ValueError, match=message):
        lg.combine_shards(slots, torch.tensor(bounds, dtype=torch.float32))
    monkeypatch.setattr(lg, "_check_shards", lambda *_: None)  # as on CUDA, which would wait
    merged = lg.combine_shards(slots, torch.tensor(bounds, dtype=torch.float32))
    logprob, entropy = lg.outcome(merged, True)
    wrong = torch.tensor([not message.startswith("targets"), True])
    assert torch.equal(logprob.isnan(), wrong) and torch.equal(entropy.isnan(), wrong)
