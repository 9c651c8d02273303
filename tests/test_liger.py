"""Where Liger's kernels go: the language model, with the values transformers has there. The kernels
themselves need a GPU; torch's formulas stand in for them here, with Liger's arguments."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from mmedx_fast.config import LoraConfig, ModelConfig
from mmedx_fast.liger import apply_liger, choose_liger
from mmedx_fast.policy import Policy
from mmedx_fast.tree import pack_row

pytest.importorskip("liger_kernel")


def _tiny_vl():
    path = Path(__file__).with_name("_tiny_vl.py")
    spec = importlib.util.spec_from_file_location("liger_tiny_vl", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny_vl = _tiny_vl()


def test_auto_needs_cuda_and_true_says_what_is_missing(monkeypatch):
    assert choose_liger("auto", "cuda") and choose_liger(True, "cuda")
    assert not choose_liger("auto", "cpu") and not choose_liger(False, "cuda")
    with pytest.raises(ValueError, match=r"CUDA.*use_liger_kernel=auto"):
        choose_liger(True, "cpu")
    monkeypatch.setattr("mmedx_fast.liger.find_spec", lambda name: None)
    assert not choose_liger("auto", "cuda")
    with pytest.raises(ValueError, match="pip install"):
        choose_liger(True, "cuda")


@pytest.fixture
def kernels(monkeypatch):
    """Counted stand-ins with Liger's signatures."""
    import liger_kernel.ops as ops

    calls = {"norm": 0, "swiglu": 0}

    class Norm:
        @staticmethod
        def apply(x, weight, eps, offset, casting, in_place, row_mode):
            assert (offset, casting, row_mode) == (0.0, "llama", None)
            calls["norm"] += 1
            return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)

    class Swiglu:
        @staticmethod
        def apply(gate, up):
            calls["swiglu"] += 1
            return torch.nn.functional.silu(gate) * up

    monkeypatch.setattr(ops, "LigerRMSNormFunction", Norm)
    monkeypatch.setattr(ops, "LigerSiLUMulFunction", Swiglu)
    return calls


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen2_vl"])
def test_every_norm_and_mlp_of_the_language_model_is_liger_s(kind, tmp_path, kernels, monkeypatch):
    import sys

    policy = Policy.load(
        tiny_vl.save(tmp_path / "model", kind),
        model=ModelConfig(dtype="float32", gradient_checkpointing=False),
        lora=LoraConfig(r=4),
    )
    modeling = sys.modules[type(policy.module.base).__module__]
    monkeypatch.setattr(modeling, "apply_rotary_pos_emb", modeling.apply_rotary_pos_emb)
    row = pack_row([tiny_vl.make_tree(torch.Generator().manual_seed(0))], policy.rope_index)
    before, _ = policy.logprobs(row, temperature=1.0)
    apply_liger(policy.module.base)
    apply_liger(policy.module.base)  # no rotary around a rotary
    after, _ = policy.logprobs(row, temperature=1.0)
    layers = len(policy.module.base.model.language_model.layers)
    assert kernels == {"norm": 2 * layers + 1, "swiglu": layers}
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    assert modeling.apply_rotary_pos_emb.is_liger


def test_transformers_rope_is_the_ordinary_one_on_mixed_angles():
    """What lets Liger's ordinary RoPE serve M-RoPE: one cos and sin [1, T, D], halves alike."""
    base = tiny_vl.build()
    positions = torch.randint(0, 50, (3, 1, 7))
    cos, sin = base.model.language_model.rotary_emb(torch.zeros(1, 7, 64), positions)
    assert cos.shape == sin.shape == (1, 7, 32)
    assert torch.equal(cos[..., :16], cos[..., 16:]) and torch.equal(sin[..., :16], sin[..., 16:])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen2_vl"])
def test_the_kernels_compute_what_transformers_does(kind, tmp_path):
    folder = tiny_vl.save(tmp_path / "model", kind)
    found = []
    for liger in (False, True):
        policy = Policy.load(
            folder,
            model=ModelConfig(
                dtype="float32",
                use_liger_kernel=liger,
                gradient_checkpointing=False,
                attention="dense",
            ),
            lora=LoraConfig(r=4),
            device="cuda",
        )
        row = pack_row([tiny_vl.make_tree(torch.Generator().manual_seed(0))], policy.rope_index)
        found.append(policy.logprobs(row, temperature=1.0)[0])
        policy.close()
    torch.testing.assert_close(*found, rtol=0, atol=2e-4)


def test_ligers_own_patches_and_ours_are_told_apart():
    """``mmedx doctor`` reads off transformers who has patched it."""
    from liger_kernel.transformers.monkey_patch import apply_liger_kernel_to_qwen2
    from transformers.models.qwen2 import modeling_qwen2 as modeling

    from mmedx_fast.rivals import active_patches

    assert not [p for p in active_patches() if p.where.startswith(modeling.__name__)]
    before = dict(vars(modeling))
    try:
        apply_liger_kernel_to_qwen2(fused_linear_cross_entropy=False)
        found = {p.where: p for p in active_patches()}
        patch = found[f"{modeling.__name__}.Qwen2RMSNorm"]
        assert patch.by.startswith("liger_kernel.") and not patch.ours
    finally:
        vars(modeling).update(before)
    model = tiny_vl.build()
    rotary = sys.modules[type(model).__module__].apply_rotary_pos_emb
    try:
        apply_liger(model)
        ours = [p for p in active_patches(model) if p.ours]
    finally:
        sys.modules[type(model).__module__].apply_rotary_pos_emb = rotary
    assert {p.by for p in ours} == {"mmedx_fast.liger"}
    assert any(p.where.endswith("layers.1.mlp.forward") for p in ours)
    assert any(p.where.endswith("apply_rotary_pos_emb") for p in ours)
