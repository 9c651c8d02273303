"""TRL's GRPO trainer with our head, against TRL's own on the same weights and the same batch."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from mmedx_fast.integrations._trl_head import attached
from mmedx_fast.integrations.trl import use_fused_head
from tests import _trl

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")


def pair(tmp_path: Any, make: Any = _trl.text_model, **options: Any) -> tuple[Any, Any]:
    """TRL's trainer and one with our head, around models of the same weights."""
    stock = _trl.trainer(make(), _trl.config(tmp_path, **options))
    fused = use_fused_head(_trl.trainer(make(), _trl.config(tmp_path, **options)))
    for made in (stock, fused):
        made._metrics["train"].clear()
    assert attached(_trl.inner(fused)) is not None and attached(_trl.inner(stock)) is None
    return stock, fused


def assert_same(a: Any, b: Any, tolerance: float = 1e-5) -> None:
    """Loss, gradients and logged metrics of two ``measured`` calls."""
    torch.testing.assert_close(a[0], b[0], rtol=tolerance, atol=tolerance)
    assert a[1].keys() == b[1].keys() and len(a[1]) > 0
    for name in a[1]:
        bound = tolerance * max(1.0, a[1][name].abs().max().item())
        torch.testing.assert_close(b[1][name], a[1][name], rtol=0, atol=bound, msg=name)
    assert list(a[2]) == list(b[2])
    for name, values in a[2].items():
        assert b[2][name] == pytest.approx(values, rel=tolerance, abs=tolerance, nan_ok=True), name


def grid() -> Any:
    """Every loss type at both levels, then every option of the loss on the types it can meet."""
    for loss_type, level in itertools.product(LOSS_TYPES, ("token", "sequence")):
        base = {"loss_type": loss_type, "importance_sampling_level": level, "temperature": 0.7}
        if loss_type == "cispo":
            base["epsilon_high"] = 1.1
        yield pytest.param(base, {}, id=f"{loss_type}-{level}")
    options: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "on_policy": ({}, {"old": False}),
        "kl": ({"beta": 0.1, "use_bias_correction_kl": False}, {"ref": True}),
        "kl_corrected": ({"beta": 0.1, "use_bias_correction_kl": True}, {"ref": True}),
        "clip": ({"epsilon": 0.1, "epsilon_high": 0.3, "delta": 1.4}, {}),
        "quantile": ({"top_entropy_quantile": 0.4}, {}),
        "bonus": ({"entropy_coef": 0.05}, {}),
        "bonus_quantile": ({"entropy_coef": 0.05, "top_entropy_quantile": 0.4}, {}),
        "adaptive": ({"use_adaptive_entropy": True, "entropy_coef": 0.01}, {}),
        "off_policy": ({"off_policy_mask_threshold": 0.02}, {"sampling": True}),
        "accumulate": ({"gradient_accumulation_steps": 2, "steps_per_generation": 4}, {}),
        "iterations": ({"num_iterations": 3}, {}),
        "tools": ({}, {"tool_mask": True}),
        "truncated": ({"mask_truncated_completions": True}, {"truncated": True}),
    }
    for name, (given, wanted) in options.items():
        for loss_type in ("dapo", "grpo", "vespo") if name != "clip" else ("dapo", "luspo"):
            yield pytest.param({"loss_type": loss_type, **given}, wanted, id=f"{loss_type}-{name}")
    for shape, loss_type in itertools.product(("token", "sequence"), ("dapo", "cispo", "vespo")):
        if (shape, loss_type) != ("sequence", "vespo"):  # TRL refuses it
            yield pytest.param(
                {"loss_type": loss_type, "epsilon_high": 0.3},
                {"ratio": shape},
                id=f"{loss_type}-engine-{shape}",
            )


def prepare(stock: Any, wanted: dict[str, Any], **more: Any) -> dict[str, Any]:
    wanted = {**wanted, **more}
    ratio, tools = wanted.pop("ratio", None), wanted.pop("tool_mask", False)
    given = _trl.batch(stock, **wanted)
    shape = given["completion_ids"].shape
    if ratio is not None:
        weights = torch.rand(shape, generator=torch.Generator().manual_seed(3)) + 0.5
        given["importance_sampling_ratio"] = weights if ratio == "token" else weights[:, :1]
    if tools:
        given["tool_mask"] = torch.ones(shape, dtype=torch.long)
        given["tool_mask"][:, 1] = 0
    return given


@pytest.mark.parametrize(("options", "wanted"), list(grid()))
def test_loss_gradients_and_metrics_are_those_of_trl(
    tmp_path: Any, options: dict[str, Any], wanted: dict[str, Any]
) -> None:
    stock, fused = pair(tmp_path, **options)
    given = prepare(stock, wanted)
    for made in (stock, fused):
        made.use_vllm = "ratio" in wanted
    for _ in range(1 + ("adaptive" in str(options))):  # the controller's second step has a bonus
        want, got = _trl.measured(stock, given), _trl.measured(fused, given)
        assert_same(want, got)
    assert (stock.entropy_coef, stock._last_world_entropy) == pytest.approx(
        (fused.entropy_coef, fused._last_world_entropy)
    )
    assert want[2]["entropy"][0] > 0.1


def test_the_grid_has_every_option_of_this_trl() -> None:
    """A new loss type or mode of TRL must be looked at before it counts as supported."""
    import dataclasses

    from trl import GRPOConfig

    text = {f.name: f.metadata["help"] for f in dataclasses.fields(GRPOConfig) if f.metadata}
    for name, known in {
        "loss_type": LOSS_TYPES,
        "importance_sampling_level": ("token", "sequence"),
        "scale_rewards": ("group", "batch", "none"),
        "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
        "vllm_importance_sampling_mode": MODES,
    }.items():
        assert all(option in text[name] for option in known), name


MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
KINDS = {
    "lora": lambda: _trl.with_lora(_trl.text_model()),
    "tied": lambda: _trl.text_model(tie_word_embeddings=True),
    "vlm": _trl.vlm_model,
    "vlm_lora": lambda: _trl.with_lora(_trl.vlm_model()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_tied_heads_and_images(tmp_path: Any, kind: str) -> None:
    options = {"temperature": 0.8, "beta": 0.05, "top_entropy_quantile": 0.7}
    if kind in ("tied", "vlm"):  # TRL would load a reference from a folder
        options["beta"] = 0.0
    stock, fused = pair(tmp_path, KINDS[kind], **options)
    given = prepare(stock, {"ref": True}, images=kind.startswith("vlm"))
    want, got = _trl.measured(stock, given), _trl.measured(fused, given)
    assert_same(want, got, 1e-4 if kind.startswith("vlm") else 1e-5)
    heads = [name for name in got[1] if "lm_head" in name or "embed_tokens" in name]
    assert bool(heads) != kind.endswith("lora"), "a trained head has a gradient, a frozen one none"
