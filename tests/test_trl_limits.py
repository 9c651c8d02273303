"""What the TRL integration refuses, how it meets partitioned weights, what it takes and what it imports."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from mmedx_fast.integrations import trl as integration
from mmedx_fast.integrations._trl_head import attached
from mmedx_fast.integrations.trl import use_fused_head
from tests import _trl


def refused(message: str, made: Any, error: Any = ValueError) -> None:
    with pytest.raises(error, match=message):
        use_fused_head(made)
    model = getattr(made, "model", None)
    assert model is None or attached(model) is None


def test_what_it_cannot_help_is_refused_by_name(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fresh(model: Any = None, cls: Any = None, **options: Any) -> Any:
        return _trl.trainer(model or _trl.text_model(), _trl.config(tmp_path, **options), cls)

    refused("takes a trl.GRPOTrainer, not SimpleNamespace", SimpleNamespace(), TypeError)

    class Own(_trl.GRPOTrainer):
        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError

    refused("Own overrides _get_per_token_logps", fresh(cls=Own))
    made = fresh()
    made.args.use_liger_kernel = True
    refused("set use_liger_kernel=False", made)

    made = fresh()
    made.is_fsdp_enabled = True
    monkeypatch.setitem(
        made.accelerator.state.__dict__, "fsdp_plugin", SimpleNamespace(fsdp_version=1)
    )
    refused("set fsdp_version=2", made)

    made = fresh()
    made.model.get_output_embeddings = lambda: None
    refused(r"Qwen2ForCausalLM.get_output_embeddings\(\) gives no module", made)
    made = fresh()
    monkeypatch.setattr(type(made.model), "base_model_prefix", "absent")
    refused("Qwen2ForCausalLM has no backbone apart from its head", made)
    monkeypatch.undo()

    made = fresh()
    made.model.lm_head.weight = torch.nn.Parameter(
        torch.zeros_like(made.model.lm_head.weight).to(torch.int8), requires_grad=False
    )
    refused("head holds torch.int8 .*llm_int8_skip_modules", made)
    made = fresh()
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["lm_head"]), made.model)
    refused(r"Qwen2ForCausalLM: Linear is a head with active LoRA adapters \(default\)", made)

    for name, value in (
        ("logit_scale", -1.0),
        ("logit_scale", "inv_sqrt_d_model"),
        ("final_logit_softcapping", 0.0),
    ):
        made = fresh()
        setattr(made.model.config, name, value)
        refused(f"{name}={value!r}", made)


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("full", {}, "a trained"),
        ("lora", {"entropy_coef": 0.1}, "entropy_coef"),
        ("lora", {}, None),
    ],
    ids=["trained head", "bonus", "adapters"],
)
def test_partitioned_weights(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, kind: str, options: Any, reason: str | None
) -> None:
    """ZeRO-3: what would need the weight in backward is refused; adapters run, the head gathered for the forward."""
    import transformers.integrations.deepspeed as deepspeed

    make = _trl.text_model if kind == "full" else _trl.lora_model
    stock, made = (_trl.trainer(make(), _trl.config(tmp_path, **options)) for _ in range(2))
    with monkeypatch.context() as patch:
        patch.setattr(deepspeed, "is_deepspeed_zero3_enabled", lambda: True)
        made.is_deepspeed_enabled = True
        if reason is not None:
            refused(f"{reason}.* under ZeRO stage 3 .*use ZeRO stage 2", made)
            return
        use_fused_head(made)
    made.is_deepspeed_enabled = False
    assert attached(_trl.inner(made)).partitioned
    weight, gathered = _trl.inner(made).lm_head.weight, []
    whole, weight.data = weight.data, torch.empty(0)

    @contextmanager
    def gather(*parameters: Any) -> Any:
        """As ZeRO-3 does: the weight is there inside and nowhere else."""
        gathered.append([id(p) for p in parameters] == [id(weight)])
        weight.data = whole
        yield
        weight.data = torch.empty(0)

    given = _trl.prepare(stock, {})
    monkeypatch.setattr("trl.trainer.utils.maybe_gather_lm_head_ctx", gather)
    got = _trl.measured(made, given)
    assert gathered == [True]
    monkeypatch.undo()
    _trl.assert_same(_trl.measured(stock, given), got)


def test_without_trl_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r"pip install 'mmedx-fast\[trl\]'"):
        use_fused_head(None)
    monkeypatch.undo()
    monkeypatch.delattr("trl.trainer.utils.FusedCausalLMOutput")
    with pytest.raises(ImportError, match="needs trl 1.16"):
        integration.GuidelineGRPOTrainer  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'Guideline'"):
        integration.Guideline  # noqa: B018


def test_importing_the_integration_is_light() -> None:
    code = (
        "import sys, mmedx_fast.integrations.trl as t; t.use_fused_head; "
        "print(sorted(set(sys.modules) & {'trl', 'transformers', 'peft', 'datasets', 'torch'}))"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert made.stdout.strip() == "[]"


def test_peak_memory_against_trl() -> None:
    """512 completion tokens, the 7B's vocabulary: a quarter of what whole logits take, half of TRL's chunks."""
    from bench.trl_head import measure

    heads = ("eager", "chunked", "ours")
    found = {head: measure(head, 152_064, 4, 128, layers=1) for head in heads}
    loss, ours = found["ours"]
    for other in ("eager", "chunked"):
        assert found[other][0] == pytest.approx(loss, rel=1e-4, abs=1e-6)
    assert found["eager"][1] > 4 * ours
    assert found["chunked"][1] > 2 * ours
    assert ours > 4 * 152_064 * 128, "a tile of logits at least was seen"


def test_sharded_by_fsdp2(tmp_path: Any) -> None:
    """The head's weight is a DTensor, gathered for the product; its gradient is one again."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    trainers = _trl.pair(tmp_path)
    given, found = _trl.prepare(trainers[0], {}), []
    alone = not dist.is_initialized()  # an engine of an earlier test may have made a group
    if alone:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for made in trainers:
            fully_shard(made.model, mesh=mesh)
            loss, grads, metrics = _trl.measured(made, given)
            assert hasattr(grads["lm_head.weight"], "full_tensor")
            whole = {name: grad.full_tensor() for name, grad in grads.items()}
            found.append((loss, whole, metrics))
    finally:
        if alone:
            dist.destroy_process_group()
    _trl.assert_same(*found)
