"""TRL's GRPO trainer with our head, against TRL's own on the same weights and the same batch."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from mmedx_fast.integrations._trl_head import attached
from mmedx_fast.integrations.trl import use_fused_head
from tests import _trl

MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")


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


@pytest.mark.parametrize(("options", "wanted"), list(grid()))
def test_loss_gradients_and_metrics_are_those_of_trl(
    tmp_path: Any, options: dict[str, Any], wanted: dict[str, Any]
) -> None:
    stock, fused = _trl.pair(tmp_path, **options)
    given = _trl.prepare(stock, wanted)
    for made in (stock, fused):
        made.use_vllm = "ratio" in wanted
    for _ in range(1 + ("adaptive" in str(options))):  # the controller's second step has a bonus
        want, got = _trl.measured(stock, given), _trl.measured(fused, given)
        _trl.assert_same(want, got)
    assert (stock.entropy_coef, stock._last_world_entropy) == pytest.approx(
        (fused.entropy_coef, fused._last_world_entropy)
    )
    assert want[2]["entropy"][0] > 0.1


@pytest.mark.parametrize(
    ("method", "option", "known"),
    [
        ("_compute_loss", "loss_type", LOSS_TYPES),
        ("_compute_loss", "importance_sampling_level", ("token", "sequence")),
        ("_generate_and_score_completions", "vllm_importance_sampling_mode", MODES),
        ("_generate_and_score_completions", "scale_rewards", ("group", "batch", "none")),
        (
            "_generate_and_score_completions",
            "multi_objective_aggregation",
            ("sum_then_normalize", "normalize_then_sum"),
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_the_grid_has_every_option_of_this_trl(method: str, option: str, known: Any) -> None:
    """What TRL's code compares the option with: a new value must be looked at before it counts as supported."""
    source = textwrap.dedent(inspect.getsource(getattr(_trl.GRPOTrainer, method)))
    found = {
        node.value
        for compare in ast.walk(ast.parse(source))
        if isinstance(compare, ast.Compare) and getattr(compare.left, "attr", "") == option
        for other in compare.comparators
        for node in ast.walk(other)
        if isinstance(node, ast.Constant)
    }
    assert found == set(known)


KINDS = {
    "lora": _trl.lora_model,
    "tied": lambda: _trl.text_model(tie_word_embeddings=True),
    "head_too": lambda: _trl.with_lora(_trl.text_model(), modules_to_save=["lm_head"]),
    "prompt_lora": lambda: _trl.with_prompt(_trl.text_model()),
    "moe": _trl.moe_model,
    "vlm": _trl.vlm_model,
    "vlm_lora": lambda: _trl.with_lora(_trl.vlm_model()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_tied_heads_and_images(tmp_path: Any, kind: str) -> None:
    options = {"temperature": 0.8, "beta": 0.05, "top_entropy_quantile": 0.7}
    if kind in ("tied", "vlm", "moe"):  # TRL would load a reference from a folder
        options["beta"] = 0.0
    stock, fused = _trl.pair(tmp_path, KINDS[kind], **options)
    given = _trl.prepare(stock, {"ref": True}, images=kind.startswith("vlm"))
    want, got = _trl.measured(stock, given), _trl.measured(fused, given)
    _trl.assert_same(want, got, 1e-4 if kind.startswith("vlm") else 1e-5)
    heads = [name for name in got[1] if "lm_head" in name or "embed_tokens" in name]
    assert bool(heads) != kind.endswith("lora"), "a trained head has a gradient, a frozen one none"
    assert ("aux_loss" in want[2]) == (kind == "moe")


def gappy_reward(completions: Any, **_: Any) -> list[float | None]:
    """Applies to three rollouts of four."""
    return [None if i % 4 == 3 else x for i, x in enumerate(_trl.length_reward(completions))]


def trained(folder: Any, fused: bool, resume: Any = None, **options: Any) -> Any:
    args = _trl.config(folder, max_steps=3, save_strategy="steps", save_steps=2, **options)
    rewards = [_trl.length_reward, gappy_reward]
    made = _trl.trainer(_trl.lora_model(), args, reward_funcs=rewards)
    if fused:
        use_fused_head(made)
    made.train(resume_from_checkpoint=resume)
    return made


@pytest.mark.parametrize(
    "options",
    [{}, {"num_iterations": 2, "beta": 0.1, "temperature": 1.2, "gradient_checkpointing": True}],
    ids=["plain", "reused"],
)
def test_a_training_is_that_of_trl_and_resumes(tmp_path: Any, options: dict[str, Any]) -> None:
    stock = trained(tmp_path / "stock", False, **options)
    fused = trained(tmp_path / "fused", True, **options)
    assert_same_training(stock, fused)
    if not options:  # TRL does not keep rollouts that are used twice
        again = trained(tmp_path / "again", True, tmp_path / "fused" / "checkpoint-2")
        assert_same_training(fused, again)


def assert_same_training(a: Any, b: Any) -> None:
    start = {name: p for name, p in _trl.lora_model().named_parameters()}
    for (name, p), (_, q) in zip(
        a.model.named_parameters(), b.model.named_parameters(), strict=True
    ):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-5, msg=name)
        if name in start:  # not the copy that is the reference
            assert p.requires_grad != p.equal(start[name]), name
    timed = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second"}
    for one, two in zip(a.state.log_history, b.state.log_history, strict=True):
        assert one.keys() == two.keys() and "entropy" in one or "train_loss" in one
        for name in one.keys() - timed:
            if name != "train_loss":  # after a resume, of the rest
                assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name


def test_the_second_call_and_other_calls_of_the_model(tmp_path: Any) -> None:
    made = _trl.trainer(_trl.text_model(), _trl.config(tmp_path))
    ids = torch.arange(10, 30)[None]
    before = made.model(input_ids=ids, labels=ids)
    forward = use_fused_head(made).model.forward
    assert use_fused_head(made).model.forward == forward
    after = made.model(input_ids=ids, labels=ids)
    assert torch.equal(after.logits, before.logits) and torch.equal(after.loss, before.loss)
    generated = made.model.generate(ids, max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, 23)
    one, two = (
        made.model(input_ids=ids, labels=ids, fused_lm_head=True),
        made.model(input_ids=ids, shift_labels=ids.roll(-1), fused_lm_head=True),
    )
    torch.testing.assert_close(one.loss, before.loss)
    torch.testing.assert_close(one.log_probs, two.log_probs[:, :-1])


def test_a_batch_without_a_counted_token_is_a_zero_that_backward_takes(tmp_path: Any) -> None:
    stock, fused = _trl.pair(tmp_path, mask_truncated_completions=True)
    given = _trl.prepare(stock, {})
    given["completion_mask"] = torch.zeros_like(given["completion_mask"])
    want, got = _trl.measured(stock, given), _trl.measured(fused, given)
    assert got[0] == want[0] == 0 and all(not g.any() for g in got[1].values())
    assert got[1].keys() == want[1].keys()


@pytest.mark.parametrize("adapter", ["fresh", "loaded"])
def test_the_reference_of_an_adapter(tmp_path: Any, adapter: str) -> None:
    """A new adapter's reference is the base, a loaded one's its copy; a full model has a second one."""
    options: dict[str, Any] = {"beta": 0.1}
    if adapter == "loaded":
        stock, fused = _trl.pair(tmp_path, _trl.lora_model, **options)
        assert "ref" in fused.model.peft_config
    else:
        stock, fused = _trl.pair(tmp_path, **options)
        assert attached(fused.ref_model).entropy is False
    with torch.no_grad():  # away from the reference
        for made in (stock, fused):
            for p in made.model.parameters():
                p.mul_(1.3 if p.requires_grad else 1.0)
    stock.rollout_func = fused.rollout_func = canned
    want, got = (scored(made, 4) for made in (stock, fused))
    assert want[0].keys() == got[0].keys() and "ref_per_token_logps" in got[0]
    torch.testing.assert_close(got[0], want[0], equal_nan=True)
    with torch.no_grad():
        assert not torch.allclose(got[0]["ref_per_token_logps"], _trl.own_logprobs(fused, got[0]))


def canned(prompts: list[Any], made: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(5)
    completions = [
        torch.randint(10, 200, (3 + i % 3,), generator=g).tolist() for i, _ in enumerate(prompts)
    ]
    logprobs: list[list[Any]] = [
        [-6.0 - 3 * torch.rand((), generator=g).item() for _ in c] for c in completions
    ]
    logprobs[1][0] = None  # vLLM could not say
    return {
        "prompt_ids": [[30 + i, 40] for i, _ in enumerate(prompts)],
        "completion_ids": completions,
        "logprobs": logprobs,
    }


def scored(made: Any, rows: int) -> tuple[dict[str, Any], dict[str, Any]]:
    made.model.train()
    made._metrics["train"].clear()
    output = made._generate_and_score_completions([{"prompt": "a"} for _ in range(rows)])
    return output, {name: list(x) for name, x in made._metrics["train"].items()}


@pytest.mark.parametrize("mode", MODES)
def test_corrections_for_the_rollout_engine(tmp_path: Any, mode: str) -> None:
    """Old log-probs, ratios and their metrics from the head, then the loss on them."""
    clip = {"vllm_importance_sampling_clip_max": 2.0, "vllm_importance_sampling_clip_min": 0.3}
    stock, fused = _trl.pair(tmp_path, vllm_importance_sampling_mode=mode, **clip)
    outputs = []
    for made in (stock, fused):
        made.use_vllm, made._last_loaded_step = True, 0
        made.rollout_func = canned
        outputs.append(scored(made, 4))
    (want, logged), (got, also) = outputs
    torch.testing.assert_close(got, want, equal_nan=True)
    assert logged.keys() == also.keys()
    for name, values in logged.items():
        assert also[name] == pytest.approx(values, rel=1e-4, nan_ok=True), name
    ratios = want["importance_sampling_ratio"]
    assert ratios.shape == ((4, 1) if "sequence" in mode else want["completion_ids"].shape)
    _trl.assert_same(_trl.measured(stock, want), _trl.measured(fused, want))


@pytest.mark.parametrize(
    "extra",
    [
        {"final_logit_softcapping": 5.0},
        {"logit_scale": 0.6},
        {"logits_scaling": 3.0},
        {"logit_scale": 1.7, "final_logit_softcapping": 4.0},
    ],
    ids=str,
)
def test_capped_and_scaled_logits(tmp_path: Any, extra: dict[str, float]) -> None:
    """Configurations whose models transform their logits, as TRL reads them."""

    def make() -> Any:
        model = _trl.text_model()
        for name, value in extra.items():
            setattr(model.config, name, value)
        return model

    stock, fused = _trl.pair(tmp_path, make, temperature=0.8, entropy_coef=0.1)
    given = _trl.prepare(stock, {})
    _trl.assert_same(_trl.measured(stock, given), _trl.measured(fused, given))


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 weights", "autocast"])
@pytest.mark.parametrize("fp32_head", [False, True], ids=["head as is", "head in fp32"])
def test_sixteen_bits(tmp_path: Any, autocast: bool, fp32_head: bool) -> None:
    """A head in float32 gives TRL's numbers; in 16 bits ours are nearer to the truth, since no logit is rounded."""

    def make() -> Any:
        return _trl.text_model().to(torch.float32 if autocast else torch.bfloat16)

    stock, fused = _trl.pair(tmp_path, make, cast_lm_head_to_fp32=fp32_head, bf16=autocast)
    given = _trl.prepare(stock, {})
    with torch.no_grad():
        want, got = _trl.own_logprobs(stock, given), _trl.own_logprobs(fused, given)
    mask = given["completion_mask"].bool()
    assert got.dtype == torch.float32
    if fp32_head:
        torch.testing.assert_close(got[mask], want[mask], rtol=1e-5, atol=1e-5)
    else:
        truth = exact_logprobs(fused, given, autocast)[mask]
        ours, theirs = ((x[mask].double() - truth).abs().max() for x in (got, want))
        assert ours < 1e-4 < theirs
    loss, grads, _ = _trl.measured(fused, given)
    assert loss.isfinite() and all(g.isfinite().all() for g in grads.values())


def exact_logprobs(made: Any, given: dict[str, Any], autocast: bool) -> torch.Tensor:
    """From the backbone's own hidden states and the head in 16 bits, in float64."""
    ids = torch.cat([given["prompt_ids"], given["completion_ids"]], 1)
    mask = torch.cat([given["prompt_mask"], given["completion_mask"]], 1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden = made.model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    weight = made.model.lm_head.weight.bfloat16().double()
    logits = hidden.bfloat16().double()[:, :-1] @ weight.T / made.temperature
    return logits.log_softmax(-1).gather(2, ids[:, 1:, None])[:, -_trl.COMPLETION :, 0]
