"""Our loss in Liger's signature against Liger's own class, whose chunked torch path runs on a CPU."""

import inspect
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from mmedx_fast.integrations.liger import LOSS_TYPES, TOKEN_LEVEL, FusedLinearGRPOLoss

B, T, H, V = 4, 7, 16, 53


@pytest.fixture(scope="module")
def liger():
    """Liger's class, its loss not compiled."""
    module = pytest.importorskip(
        "liger_kernel.chunked_loss", reason="liger-kernel is not installed"
    )
    return module.LigerFusedLinearGRPOLoss


def operands(seed=0, gap=1.0):
    """Keyword arguments of a call at temperature 0.8: ratios within and beyond every clip, a completion
    without a token. ``gap`` scales the log-ratios."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, T, H, generator=g)
    weight = torch.randn(V, H, generator=g) * 0.4
    bias = torch.randn(V, generator=g)
    ids = torch.randint(0, V, (B, T), generator=g)
    logits = hidden @ weight.T + bias
    logp = (logits / 0.8).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    shift = torch.tensor([-0.5, 0.6, 0.05, 0.0])[:, None]
    old = logp + gap * (shift + 0.4 * torch.randn(B, T, generator=g))
    old[0, 0] = logp[0, 0] - 1.5 * gap
    old[1, 0] = logp[1, 0] - 1.0 * gap
    lengths = torch.tensor([T, 3, 5, 0])
    return {
        "_input": hidden,
        "lin_weight": weight,
        "bias": bias,
        "selected_token_ids": ids,
        "attention_mask": (torch.arange(T) < lengths[:, None]).long(),
        "advantages": torch.tensor([1.2, -0.7, 0.4, 2.0]),
        "old_per_token_logps": old,
        "ref_per_token_logps": logp + 0.5 * torch.randn(B, T, generator=g),
    }


def outcome(module, given, leaves=("_input", "lin_weight", "bias")):
    """(loss, metrics, gradients of 3 * loss)."""
    given = dict(given)
    for name in leaves:
        given[name] = given[name].detach().clone().requires_grad_()
    loss, metrics = module(**given)
    grads = torch.autograd.grad(3 * loss, [given[name] for name in leaves])
    return loss.detach(), metrics, grads


def same(theirs, ours, given, **leaves):
    want, got = outcome(theirs, given, **leaves), outcome(ours, given, **leaves)
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)
    assert isinstance(got[1], tuple) and len(got[1]) == len(want[1])
    for a, b in zip(got[1], want[1], strict=True):
        assert a.shape == b.shape == ()
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(got[2], want[2], strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    return got


CASES = [
    (loss_type, level)
    for loss_type, level in product(LOSS_TYPES, ("token", "sequence"))
    if level == "token" or loss_type not in TOKEN_LEVEL
]


@pytest.mark.parametrize("ratio", [None, "token", "completion", "flat"])
@pytest.mark.parametrize(("loss_type", "level"), CASES)
def test_it_is_ligers_loss(liger, loss_type, level, ratio):
    g = torch.Generator().manual_seed(1)
    given = operands()
    shape = {"token": (B, T), "completion": (B, 1), "flat": (B,)}.get(ratio)
    if shape is not None:
        given["vllm_is_ratio"] = torch.rand(shape, generator=g) * 2
        given["vllm_is_ratio"].view(-1)[1] = (
            0.0  # a masked completion: out of the loss, not of the metric
        )
    for beta, old, options in (
        (0.04, True, {}),
        (0.3, True, {"use_bias_correction_kl": True, "delta": 1.4}),
        (0.0, False, {"epsilon_low": 0.1, "epsilon_high": 0.4}),
    ):
        call = given if old else {**given, "old_per_token_logps": None}
        settings = {
            "beta": beta, "loss_type": loss_type, "importance_sampling_level": level,
            "max_completion_length": 11, "temperature": 0.8, **options,
        }  # fmt: skip
        theirs = liger(compiled=False, **settings)
        _, metrics, _ = same(theirs, FusedLinearGRPOLoss(**settings), call)
        assert len(metrics) == (2 if beta else 1)
        if old and loss_type not in ("sapo", "vespo", "cispo"):
            assert metrics[-1] > 0, "no token is clipped: the metric is not tested"


@pytest.mark.parametrize(
    ("name", "value", "loss_type"),
    [
        ("sapo_temperature_pos", 2.5, "sapo"),
        ("sapo_temperature_neg", 0.3, "sapo"),
        ("vespo_k_pos", 0.7, "vespo"),
        ("vespo_lambda_pos", 1.1, "vespo"),
        ("vespo_k_neg", 1.2, "vespo"),
        ("vespo_lambda_neg", 0.6, "vespo"),
        ("epsilon_high", 1.3, "cispo"),
        ("max_completion_length", 5, "dr_grpo"),
        ("temperature", 1.7, "grpo"),
        ("delta", 1.25, "luspo"),
    ],
)
def test_each_option_is_read(liger, name, value, loss_type):
    base = {"loss_type": loss_type, "max_completion_length": 11, "temperature": 0.8}
    given = operands(gap=0.1 if loss_type == "vespo" else 1.0)  # beyond, its weights are all but 0
    changed = same(
        liger(compiled=False, **base | {name: value}),
        FusedLinearGRPOLoss(**base | {name: value}),
        given,
    )
    plain = outcome(FusedLinearGRPOLoss(**base), given)
    assert changed[0] != plain[0] or not torch.equal(changed[2][0], plain[2][0])


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "vespo"])
@pytest.mark.parametrize("items", [23, 23.5, torch.tensor(40), 0])
def test_tokens_of_the_whole_batch_divide(liger, loss_type, items):
    settings = {"loss_type": loss_type, "epsilon_high": 2.0}
    given = {**operands(), "num_items_in_batch": items}
    same(liger(compiled=False, **settings), FusedLinearGRPOLoss(**settings), given)


@pytest.mark.parametrize("loss_type", ["dapo", "luspo", "sapo"])
def test_the_reference_is_given_computed_or_the_policy_itself(liger, loss_type):
    given = operands()
    ref = given.pop("ref_per_token_logps")
    g = torch.Generator().manual_seed(2)
    head = {
        "ref_input": torch.randn(B, T, H, generator=g),
        "ref_weight": torch.randn(V, H, generator=g) * 0.3,
        "ref_bias": torch.randn(V, generator=g),
    }
    settings = {"loss_type": loss_type, "beta": 0.2, "temperature": 0.8}
    _, computed, _ = same(
        liger(compiled=False, **settings), FusedLinearGRPOLoss(**settings), given | head
    )
    assert computed[0] > 0
    settings["use_ref_model"] = False
    for more in ({}, {"ref_per_token_logps": ref}):
        theirs = liger(compiled=False, **settings)
        _, itself, _ = same(theirs, FusedLinearGRPOLoss(**settings), given | more)
        assert itself[0] == 0
    with pytest.raises(
        ValueError, match="use_ref_model=True needs ref_per_token_logps, or ref_input"
    ):
        FusedLinearGRPOLoss()(**given)


@pytest.mark.parametrize("loss_type", ["grpo", "vespo"])
@pytest.mark.parametrize("leaves", [("_input",), ("_input", "lin_weight"), ("_input", "bias")])
def test_only_what_requires_a_gradient_gets_one(liger, loss_type, leaves):
    given = operands()
    got = same(
        liger(compiled=False, loss_type=loss_type), FusedLinearGRPOLoss(loss_type=loss_type),
        given, leaves=leaves,
    )  # fmt: skip
    assert len(got[2]) == len(leaves)
    without = {**given, "bias": None}
    same(
        liger(compiled=False, loss_type=loss_type), FusedLinearGRPOLoss(loss_type=loss_type),
        without, leaves=("_input",),
    )  # fmt: skip


@pytest.mark.parametrize("loss_type", ["dapo", "luspo", "sapo"])
def test_bfloat16_is_a_rounding_of_the_logits_gradient_from_ligers(liger, loss_type):
    """Liger multiplies it in float32, ours in the weight's dtype, as torch's own GEMMs would."""
    given = operands()
    names = ("_input", "lin_weight", "bias")
    rounded = given | {name: given[name].bfloat16() for name in names}
    module = FusedLinearGRPOLoss(loss_type=loss_type)
    exact = outcome(module, given | {name: rounded[name].float() for name in names})
    theirs = outcome(liger(compiled=False, loss_type=loss_type), rounded)
    ours = outcome(module, rounded)
    assert ours[0].dtype == torch.float32 and ours[2][0].dtype == torch.bfloat16
    assert (ours[0] - exact[0]).abs() <= (theirs[0] - exact[0]).abs() + 1e-5
    for a, b, want in zip(ours[2], theirs[2], exact[2], strict=True):
        error, allowed = ((x.float() - want).abs().max() for x in (a, b))
        assert error <= allowed + 2**-8 * want.abs().max()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_padding_reaches_nothing_and_no_token_is_no_loss(loss_type):
    given = operands()
    mask = given["attention_mask"]
    if loss_type != "luspo":  # whose mean runs over the padding, in Liger as here
        rubbish = dict(given)
        for name in ("_input", "old_per_token_logps", "ref_per_token_logps"):
            x = given[name].clone()
            x[mask == 0] = float("nan")
            rubbish[name] = x
        module = FusedLinearGRPOLoss(loss_type=loss_type, max_completion_length=9)
        clean, dirty = outcome(module, given), outcome(module, rubbish)
        assert clean[0] == dirty[0] and clean[1] == dirty[1]
        assert all(torch.equal(a, b) for a, b in zip(clean[2], dirty[2], strict=True))
    empty = given | {"attention_mask": torch.zeros_like(mask)}
    loss, metrics, grads = outcome(
        FusedLinearGRPOLoss(loss_type=loss_type, max_completion_length=9), empty
    )
    assert loss == 0 and metrics == (0, 0) and not any(x.any() for x in grads)


def test_signatures_are_ligers(liger):
    for name in ("__init__", "forward"):
        theirs, ours = (
            inspect.signature(getattr(x, name)).parameters for x in (liger, FusedLinearGRPOLoss)
        )
        assert [(p.name, p.default) for p in ours.values()] == [
            (p.name, p.default) for p in theirs.values()
        ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "ppo"}, "loss_type='ppo' is not known: use grpo"),
        ({"importance_sampling_level": "turn"}, "importance_sampling_level='turn'"),
        (
            {"loss_type": "vespo", "importance_sampling_level": "sequence"},
            "not for loss_type='vespo'",
        ),
        ({"loss_type": "dr_grpo"}, "max_completion_length"),
        ({"sapo_temperature_neg": 0.0}, "sapo_temperature_neg must be positive"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"delta": -1.0}, "delta must be positive"),
        ({"delta": 0.9}, "delta must exceed 1"),
        ({"epsilon_low": 1.0}, r"epsilon must lie in \[0, 1\)"),
    ],
)
def test_settings_that_no_loss_has_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        FusedLinearGRPOLoss(**settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_input": torch.zeros(B * T, H)}, r"_input must be \[B, T, H\]"),
        ({"advantages": torch.zeros(B, T)}, "advantages"),
        ({"attention_mask": torch.full((B, T), 0.5)}, "attention_mask must hold 0 and 1 only"),
        ({"vllm_is_ratio": torch.ones(T)}, "vllm_is_ratio must be"),
        ({"vllm_is_ratio": torch.full((B, 1), -0.5)}, "vllm_is_ratio must be at least 0, got -0.5"),
    ],
)
def test_operands_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        FusedLinearGRPOLoss()(**operands() | changes)


ALONE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {
            "triton", "transformers", "liger_kernel", "verl", "ray", "tensordict", "omegaconf", "trl"
        }:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import torch
from mmedx_fast.integrations import liger, verl

ids, mask = torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3)
module = liger.FusedLinearGRPOLoss(beta=0.0, use_ref_model=False)
h = torch.randn(2, 3, 4, requires_grad=True)
w = torch.randn(7, 4)
loss, metrics = module(h, w, ids, mask, torch.ones(2))
logprob, entropy = verl.FusedLinearForPPO()(h, w, ids)
(loss + verl.linear_cross_entropy(h, w, ids)[0].sum() + logprob.sum() + entropy.sum()).backward()
assert h.grad.isfinite().all()
print(verl.gba_advantage(torch.rand(2, 3), mask, ["q::a", "q::b"])[0].shape)
try:
    verl.register()
except ModuleNotFoundError as error:
    print("refused:", error)
"""


def test_our_side_of_verl_and_liger_runs_with_torch_alone():
    done = subprocess.run(
        [sys.executable, "-c", ALONE],
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["torch.Size([2, 3])", "refused: verl"]
