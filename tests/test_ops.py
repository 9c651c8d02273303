"""The public surface, and the choice between torch and Triton behind it."""

import inspect
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmedx_fast import ops
from mmedx_fast.kernels import _dispatch

ROOT = Path(__file__).resolve().parents[1]

ALONE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {
            "triton", "transformers", "peft", "trl", "vllm", "deepspeed", "pydantic", "yaml"
        }:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import torch
from mmedx_fast import ops

h = torch.randn(4, 3, requires_grad=True)
w = torch.randn(7, 3)
y = torch.tensor([0, 1, 2, 6])
logprob, entropy = ops.linear_logprob(h, w, y)
loss, metrics = ops.linear_policy_loss(
    h, w, y, torch.ones(4), token_weight=torch.full((4,), 0.25), spec=ops.PolicyLossSpec()
)
(loss + logprob.sum() + entropy.sum()).backward()
assert h.grad.isfinite().all() and ops.reduce_metrics([metrics])["tokens"] == 4
ops.guideline_advantages(torch.rand(4, 2), y // 2, y % 2)
factors = ops.LoraFactors(torch.randn(2, 5), torch.randn(6, 2))
ops.lora_merge_(torch.zeros(6, 5), [factors, factors], ops.MergeSpec())
ours = {"triton", "transformers", "mmedx_fast"}
print(sorted(m for m in sys.modules if m.split(".")[0] in ours and m.count(".") < 2))
"""


def test_every_op_runs_with_torch_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ALONE], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "'mmedx_fast', 'mmedx_fast.kernels', 'mmedx_fast.ops'" in done.stdout
    assert "triton" not in done.stdout and "transformers" not in done.stdout


def test_public_names_exist_and_say_what_they_do() -> None:
    assert ops.__all__ == sorted(ops.__all__)
    for name in ops.__all__:
        thing = getattr(ops, name)
        assert inspect.getdoc(thing), name


def test_the_contracts_signatures() -> None:
    def names(fn):
        parameters = inspect.signature(fn).parameters.values()
        positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        return positional, {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    positional, keywords = names(ops.guideline_advantages)
    assert positional == ["rewards", "group", "guideline"]
    assert keywords == {
        "reward_weights": None,
        "guideline_weights": None,
        "combine": "sum_then_normalize",
        "scale": "guideline",
        "within": 1.0,
        "between": 1.0,
        "baseline": "mean",
        "eps": 1e-4,
        "ddof": 1,
    }
    positional, keywords = names(ops.linear_logprob)
    assert positional == ["hidden", "weight", "targets"]
    assert (
        keywords.items()
        >= {
            "temperature": 1.0,
            "bias": None,
            "softcap": None,
            "logits_dtype": None,
            "chunk": None,
            "return_entropy": True,
            "group": None,
        }.items()
    )
    positional, keywords = names(ops.linear_policy_loss)
    assert positional == ["hidden", "weight", "targets", "advantages"]
    assert set(keywords) >= {
        "old_logprob",
        "ref_logprob",
        "rollout_logprob",
        "token_weight",
        "spec",
    }
    assert names(ops.lora_merge_)[0] == ["base_weight", "experts", "spec"]
    assert names(ops.lora_conflicts)[0] == ["experts", "spec"]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch):
    """A registry of its own with one op, ``double``."""
    monkeypatch.setattr(_dispatch, "_torch_ops", {})
    monkeypatch.setattr(_dispatch, "_triton_ops", {})
    monkeypatch.setattr(_dispatch, "_said", set())
    monkeypatch.delenv(_dispatch.ENV, raising=False)

    @_dispatch.register_torch("double")
    def torch_double(x):
        return 2 * x

    return torch_double


CPU = torch.device("cpu")


def test_auto_falls_to_torch_and_says_why_once(registry, caplog) -> None:
    with caplog.at_level(logging.INFO, logger="mmedx_fast.kernels"):
        assert _dispatch.resolve("double", CPU) is registry
        assert _dispatch.resolve("double", CPU) is registry
    assert [r.getMessage() for r in caplog.records] == [
        "double runs in plain torch: no Triton implementation is registered for it"
    ]


def test_triton_that_is_not_there_is_an_error_naming_the_op(registry, monkeypatch) -> None:
    monkeypatch.setenv(_dispatch.ENV, "triton")
    with pytest.raises(RuntimeError, match="double cannot use Triton: no Triton implementation"):
        _dispatch.resolve("double", CPU)
    with pytest.raises(RuntimeError, match="linear_logprob cannot use Triton"):
        ops.linear_logprob(torch.zeros(1, 2), torch.zeros(3, 2), torch.tensor([0]))


def test_a_registered_kernel_is_used_where_it_can_run(registry, monkeypatch) -> None:
    @_dispatch.register_triton("double", refuse=lambda device: None)
    def triton_double(x):
        return x + x

    assert _dispatch.resolve("double", CPU) is triton_double
    monkeypatch.setenv(_dispatch.ENV, "torch")
    assert _dispatch.resolve("double", CPU) is registry
    monkeypatch.setenv(_dispatch.ENV, "triton")
    _dispatch.register_triton("double")(triton_double)
    monkeypatch.setattr(_dispatch, "interpreting", lambda: False)
    with pytest.raises(RuntimeError, match="double cannot use Triton: the tensors are on cpu"):
        _dispatch.resolve("double", CPU)
    monkeypatch.setattr(_dispatch, "interpreting", lambda: True)
    assert _dispatch.resolve("double", CPU) is triton_double
    monkeypatch.setenv(_dispatch.ENV, "auto")  # the interpreter is for tests: only where asked for
    assert _dispatch.resolve("double", CPU) is registry


def test_paths_tells_what_each_op_takes_and_why(registry, monkeypatch) -> None:
    monkeypatch.setattr(_dispatch, "interpreting", lambda: False)
    path = {p.op: p for p in _dispatch.paths(CPU)}["double"]
    assert (path.implementation, path.reason) == (
        "torch",
        "no Triton implementation is registered for it",
    )
    _dispatch.register_triton("double", refuse=lambda device: None)(lambda x: x)
    path = {p.op: p for p in _dispatch.paths(CPU)}["double"]
    assert (path.implementation, path.reason) == ("triton", "")
    monkeypatch.setenv(_dispatch.ENV, "torch")
    path = {p.op: p for p in _dispatch.paths(CPU)}["double"]
    assert (path.implementation, path.reason) == ("torch", "MMEDX_KERNELS=torch")


def test_unknown_mode_is_refused(registry, monkeypatch) -> None:
    monkeypatch.setenv(_dispatch.ENV, "cuda")
    with pytest.raises(ValueError, match="MMEDX_KERNELS='cuda'"):
        _dispatch.resolve("double", CPU)
