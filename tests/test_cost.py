"""Cost accounting against published sizes, torch's own FLOP counter and brute force."""

import dataclasses
import json
import math
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from mmedx_fast.config import Config
from mmedx_fast.cost import KNOWN_MODELS, Assumptions, PhaseMeter, plan, plan_text, render_table
from mmedx_fast.cost_memory import LOGITS_TILE, Row, zero_stage
from mmedx_fast.flops import (
    Counts,
    ModelShape,
    forward_flops,
    one_level_tokens,
    plain_counts,
    segment_counts,
    train_flops,
    tree_counts,
)
from mmedx_fast.gpus import GPUS, engine_gpus, find_gpu, match_gpu
from mmedx_fast.meter import StepRates

SEVEN_B = ModelShape.from_config(KNOWN_MODELS["qwen2.5-vl-7b-instruct"])

# P, image tokens, R, n: tokens of the tree and of plain sequences, then plain / tree in tokens,
# against one-level sharing, in attention pairs, in the language model's FLOPs, and with the vision
# blocks.
# 7B, 4 guidelines of 60 tokens; computed independently of this module.
SAVINGS = [
    (400, 256, 256, 2, 2688, 5728, 2.13, 1.47, 1.48, 2.05, 2.25),
    (400, 256, 512, 3, 6784, 11664, 1.72, 1.46, 1.24, 1.66, 1.80),
    (400, 256, 1024, 4, 17024, 23744, 1.39, 1.30, 1.09, 1.36, 1.43),
    (800, 600, 256, 4, 5136, 17856, 3.48, 2.37, 2.18, 3.29, 3.80),
    (800, 600, 512, 2, 5136, 10976, 2.14, 1.46, 1.48, 2.05, 2.28),
    (800, 600, 1024, 3, 13328, 22608, 1.70, 1.44, 1.23, 1.63, 1.79),
    (1200, 1000, 256, 3, 4512, 18192, 4.03, 2.24, 2.61, 3.83, 4.42),
    (1200, 1000, 512, 4, 9632, 28352, 2.94, 2.14, 1.87, 2.78, 3.24),
    (1200, 1000, 1024, 2, 9632, 18272, 1.90, 1.38, 1.34, 1.82, 2.03),
    (1600, 1300, 256, 4, 5936, 30656, 5.16, 2.86, 3.27, 4.87, 5.66),
    (1600, 1300, 512, 3, 7984, 26064, 3.26, 2.04, 2.11, 3.08, 3.56),
    (1600, 1300, 1024, 4, 18224, 42944, 2.36, 1.87, 1.55, 2.22, 2.55),
]


@pytest.mark.parametrize("row", SAVINGS, ids=lambda row: f"P{row[0]}-R{row[2]}-n{row[3]}")
def test_savings_of_the_tree(row):
    p, image, r, n, tokens, plain_tokens, by_tokens, one_level, pairs, llm, with_vision = row
    tree = tree_counts(p, 60, r, guidelines=4, n=n)
    plain = plain_counts(p, 60, r, guidelines=4, n=n)
    assert (tree.tokens, plain.tokens) == (tokens, plain_tokens)
    vision = 4 * image * SEVEN_B.vision.block_flops()

    def flops(counts, image_flops):
        return forward_flops(SEVEN_B, counts) + counts.images * image_flops

    ratios = [
        plain.tokens / tree.tokens,
        plain.tokens / one_level_tokens(p, 60, r, guidelines=4, n=n),
        plain.pairs / tree.pairs,
        flops(plain, 0) / flops(tree, 0),
        flops(plain, vision) / flops(tree, vision),
    ]
    assert [round(x, 2) for x in ratios] == [by_tokens, one_level, pairs, llm, with_vision]


@pytest.mark.parametrize(
    ("p", "g", "r", "k", "n"), [(5, 3, 4, 2, 3), (1, 1, 1, 1, 1), (4, 0, 2, 3, 2)]
)
def test_pairs_equal_the_ones_of_a_real_mask(p, g, r, k, n):
    paths = []  # the segments on the way to every token's own segment
    for i in range(k):
        paths += [(("p",), ("g", i), ("r", i, j)) for j in range(n)]
    lengths = {("p",): p}
    for path in paths:
        lengths |= {path[1]: g, path[2]: r}
    ancestors = {segment: path[: path.index(segment)] for path in paths for segment in path}
    pairs = sum(
        size * sum(lengths[a] for a in ancestors[segment]) + sum(range(1, size + 1))
        for segment, size in lengths.items()
    )
    tree = tree_counts(p, g, r, guidelines=k, n=n)
    assert tree == Counts(tokens=sum(lengths.values()), pairs=pairs, targets=k * n * r, images=1)
    plain = plain_counts(p, g, r, guidelines=k, n=n)
    length = p + g + r
    assert plain.pairs == k * n * sum(1 for q in range(length) for _ in range(q + 1))


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("qwen2.5-vl-7b-instruct", 8_292_166_656),
        ("qwen2.5-vl-3b-instruct", 3_754_622_976),
        ("qwen2-vl-2b-instruct", 2_208_985_600),
    ],
)
def test_parameters_equal_the_published_numbers(name, published):
    assert ModelShape.from_config(KNOWN_MODELS[name]).params == pytest.approx(published, rel=1e-3)


def test_known_per_token_cost_of_the_7b():
    assert SEVEN_B.token_flops() / 1e9 == pytest.approx(13.05, abs=0.005)
    assert SEVEN_B.kv_bytes() == 57_344
    # r = 16 on all linear layers of the language model: 40,370,176 weights in PEFT's own count.
    assert SEVEN_B.lora_params(16) == 40_370_176


def _small_config():
    return {
        "model_type": "qwen2_5_vl",
        "text_config": {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 160,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 3, 3],
            },
        },
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 14,
            "out_hidden_size": 64,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        "image_token_id": 150,
        "vision_start_token_id": 151,
        "tie_word_embeddings": False,
    }


@pytest.fixture(scope="module")
def small_model():
    import torch

    from mmedx_fast._env import prepare_environment

    prepare_environment()
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(**_small_config())
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.set_attn_implementation("eager")
    return model.eval()


def test_forward_flops_equal_torchs_counter(small_model):
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    shape = ModelShape.from_config(_small_config())
    # 8 x 8 patches: four whole windows of 4 x 4 in the first block, everything in the second.
    grid, patches, image_tokens, text = torch.tensor([[1, 8, 8]]), 64, 16, 10
    ids = torch.tensor([[151] + [150] * image_tokens + [3] * text])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        small_model(
            input_ids=ids,
            pixel_values=torch.randn(patches, shape.vision.patch_values),
            image_grid_thw=grid,
            mm_token_type_ids=(ids == 150).long(),
            use_cache=False,
            logits_to_keep=text,
        )
    length = ids.shape[1]
    # Eager attention multiplies the masked half too: length^2 pairs.
    counts = Counts(tokens=length, pairs=length**2, targets=text, images=1)
    rotary = counter.get_total_flops() - forward_flops(shape, counts, image_tokens)
    # What is left is the outer product that makes the rotary angles, a few thousand FLOPs.
    assert 0 <= rotary <= 0.002 * counter.get_total_flops()


def test_training_with_a_frozen_base_costs_two_forwards_and_a_recomputation(small_model):
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    shape = ModelShape.from_config(_small_config())
    language = small_model.model.language_model
    small_model.requires_grad_(False)
    hidden = torch.randn(1, 12, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        out = language(inputs_embeds=hidden, use_cache=False).last_hidden_state
        small_model.lm_head(out[:, 4:]).sum().backward()
    counts = Counts(tokens=12, pairs=144, targets=8, images=0)
    bare = train_flops(shape, counts, lora_rank=1, checkpointing=False)
    # No adapter here, and hidden states that need a gradient where embeddings would not.
    bare += 12 * shape.first_inputs_flops() - 6.0 * shape.lora_params(1) * 12
    assert counter.get_total_flops() == pytest.approx(bare, rel=0.002)
    both = [train_flops(shape, counts, lora_rank=4, checkpointing=c) for c in (False, True)]
    again = 12 * shape.token_flops() + 144 * shape.pair_flops() + 2 * shape.lora_params(4) * 12
    assert both[1] - both[0] == again


@pytest.mark.parametrize("value", [None, 0, -1, 1.5, "8", True])
def test_unusable_model_config_names_the_key(value):
    config = KNOWN_MODELS["qwen2.5-vl-7b-instruct"] | {"num_hidden_layers": value}
    with pytest.raises(ValueError, match="num_hidden_layers"):
        ModelShape.from_config(config)


def _cfg(**changes):
    return Config.model_validate({"model": {"path": "Qwen/Qwen2.5-VL-7B-Instruct"}, **changes})


def test_plan_counts_what_the_config_asks_for():
    cfg = _cfg(
        dsa={"steps": 10, "questions_per_step": 4},
        gba={"steps": 5, "questions_per_step": 3},
        rollout={"num_generations": 2},
    )
    assume = Assumptions(image_tokens=600, text_tokens=200, response_tokens=256)
    stages = {stage["stage"]: stage for stage in plan(cfg, assume)["stages"]}
    assert stages["DSA: experts"]["rows"] == 4 * 10 * 4
    assert stages["GBA: updates"]["rows"] == 15
    assert stages["GBA: updates"]["tokens"] == 15 * 3088
    assert stages["GBA: updates"]["tokens_plain"] == 15 * 8928
    assert stages["GBA: rollouts"]["responses"] == 15 * 8
    # base, four experts, start, rl, merged
    assert stages["CACI and evaluation"]["rows"] == 8 * 400


def test_plan_scales_as_it_must():
    base = plan(_cfg())
    assert (
        plan(_cfg(), Assumptions(tflops=800.0))["total"]["gpu_hours"] < base["total"]["gpu_hours"]
    )
    twice = plan(_cfg(gba={"num_iterations": 2}))["stages"][2]
    assert twice["flops"] > 2 * base["stages"][2]["flops"]  # and the pass for the old log-probs
    with_kl = plan(_cfg(gba={"loss": {"beta": 0.1}}))["stages"][2]
    assert base["stages"][2]["flops"] < with_kl["flops"] < twice["flops"]
    assert plan(_cfg(dsa={"reuse": "x"}))["stages"][0]["flops"] == 0
    candidates = plan(_cfg(caci={"density": [0.2, 0.5]}))["stages"][3]["rows"]
    assert candidates == base["stages"][3]["rows"] + 2 * 120
    assert base["total"]["gpu_hours_plain"] > base["total"]["gpu_hours"]
    hours = math.fsum(stage["gpu_hours"] for stage in base["stages"])
    assert base["total"]["gpu_hours"] == pytest.approx(hours)
    assert json.loads(json.dumps(base)) == base


SETS = {
    "whole": {"path": "phantom"},
    "some": {"path": "phantom", "split": "validation", "limit": 50},
    "all": {"path": "phantom", "split": "train", "limit": 999},
    "unknown": {"path": "/data/slake"},
    "first": {"path": "/data/slake", "limit": 30},
}
PHANTOM = {"train": 100, "validation": 60, "test": 40}
QUESTIONS = {"whole": 40, "some": 50, "all": 100, "unknown": 2000, "first": 30}
LENGTHS = Assumptions(image_tokens=600, text_tokens=200, response_tokens=256)

# eval's settings, then the prompts of a question, the answers to one prompt, the guideline's tokens
ASKED = [
    ({}, 1, 1, 60),
    ({"num_samples": 3}, 1, 3, 60),
    ({"guideline": "bayesian", "num_samples": 3}, 1, 3, 60),
    ({"guideline": "each"}, 4, 1, 60),
    ({"guideline": "each", "num_samples": 3}, 4, 3, 60),
    ({"guideline": "none", "num_samples": 2}, 1, 2, 0),
    ({"prompt": "medevalkit"}, 1, 1, 0),
]


@pytest.mark.parametrize(("asked", "prompts", "samples", "guideline"), ASKED)
def test_evaluation_is_counted_as_it_is_asked(asked, prompts, samples, guideline):
    evaluation = {"models": ["base", "experts"], "sets": SETS} | asked
    found = plan(_cfg(phantom=PHANTOM, eval=evaluation), LENGTHS)
    row, rows = found["stages"][3], 5 * sum(QUESTIONS.values())  # the base and four experts
    answers = prompts * samples
    assert (row["rows"], row["responses"]) == (rows, rows * answers)
    assert row["prefill_tokens"] == rows * (800 + prompts * guideline)
    assert row["prefill_tokens_plain"] == rows * answers * (800 + guideline)
    assert row["tokens"] - row["prefill_tokens"] == rows * answers * 256
    assert row["tokens_plain"] - row["prefill_tokens_plain"] == rows * answers * 256
    counts = tree_counts(800, guideline, 256, guidelines=prompts, n=samples)
    assert row["flops"] == pytest.approx(rows * forward_flops(SEVEN_B, counts, 600), rel=1e-12)
    assert found["evaluation"]["sets"] == {
        name: {"questions": count, "assumed": name == "unknown"}
        for name, count in QUESTIONS.items()
    }


@pytest.mark.parametrize("settings", [asked for asked, *_ in ASKED])
def test_evaluation_is_counted_as_the_evaluation_asks(settings):
    """The plan imports no engine, so it counts by itself what :class:`Asking` does."""
    from mmedx_fast.evaluation.asking import Asking

    cfg = _cfg(eval=settings)
    asking, found = Asking.of(cfg.eval, cfg.seed), plan(cfg)["evaluation"]
    for number in range(5):
        assert found["prompts_per_question"] == len(asking.guidelines(number))
    assert found["prompts_per_question"] * found["answers_per_prompt"] == asking.answers


def test_merge_candidates_answer_once_whatever_the_evaluation_asks():
    settings = {"sets": {"one": {"path": "phantom"}}, "num_samples": 5, "guideline": "each"}
    one, two = (
        plan(_cfg(eval=settings, caci={"density": density, "selection_limit": 70}), LENGTHS)
        for density in ([0.2], [0.2, 0.5])
    )
    one, two = one["stages"][3], two["stages"][3]
    for key, more in (("rows", 140), ("responses", 140), ("tokens", 140 * 1116)):
        assert two[key] == one[key] + more
    assert two["gpu_hours"] > one["gpu_hours"] and two["seconds_per_step"] > one["seconds_per_step"]


@pytest.mark.parametrize(
    ("data", "given", "count", "assumed"),
    [
        ({}, None, 40, False),
        ({"limit": 25}, None, 25, False),
        ({"test": "/data/slake"}, None, 2000, True),
        ({"test": "/data/slake", "limit": 2500}, None, 2500, False),
        ({"test": "/data/slake"}, 120, 120, True),
    ],
)
def test_the_runs_own_test_set_is_counted_without_eval_sets(data, given, count, assumed):
    found = plan(
        _cfg(phantom=PHANTOM, data=data, eval={"models": ["rl"]}),
        Assumptions(test_questions=given),
    )
    assert found["stages"][3]["rows"] == found["assumptions"]["test_questions"] == count
    assert found["evaluation"]["sets"] == {"test": {"questions": count, "assumed": assumed}}


def test_the_plan_says_what_it_took_the_evaluation_for():
    cfg = _cfg(phantom=PHANTOM, eval={"sets": SETS, "num_samples": 3, "guideline": "each"})
    text = plan_text(plan(cfg))
    assert (
        "Evaluation: 8 models on whole 40, some 50, all 100, unknown 2,000 (assumed), first 30 "
        "questions, 4 prompts of each question, 3 answers to each prompt." in text
    )
    assert "test_questions 2000" in text
    fewer = plan(cfg, Assumptions(test_questions=7))["evaluation"]["sets"]
    assert fewer["unknown"]["questions"] == 7 and fewer["whole"]["questions"] == 40
    known = plan(_cfg(eval={"models": ["base"], "sets": {"one": {"path": "phantom"}}}))
    assert "test_questions" not in plan_text(known)
    assert (
        "Evaluation: 1 model on one 400 questions, 1 prompt of each question, 1 answer to each "
        "prompt." in plan_text(known)
    )


def test_plan_text_shows_stages_memory_and_assumptions():
    text = plan_text(plan(_cfg()))
    for part in ("DSA: experts", "GBA: rollouts", "KV cache", "tflops 400.0", "8.29 G parameters"):
        assert part in text
    assert "-" in plan_text(plan(_cfg(dsa={"reuse": "x"})))


def test_plan_of_an_unknown_model_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="no/such-model.*local copy"):
        plan(_cfg(model={"path": "no/such-model"}))
    with pytest.raises(ValueError, match="config.json"):
        plan(_cfg(model={"path": str(tmp_path)}))
    (tmp_path / "config.json").write_text(json.dumps(_small_config()))
    assert plan(_cfg(model={"path": str(tmp_path)}))["model"]["parameters"] < 1e6
    with pytest.raises(ValueError, match="tflops = 0"):
        Assumptions(tflops=0)


H200 = GPUS["h200"]


def _parts(estimate):
    return {part["name"].split(" of ")[0]: part["bytes"] for part in estimate["memory"]}


def test_memory_parts_are_those_of_the_model():
    cfg = _cfg(
        lora={"r": 64}, gba={"max_row_tokens": 8192}, rollout={"gpu_memory_utilization": 0.4}
    )
    parts = _parts(plan(cfg, gpu=H200))
    assert parts["frozen weights"] == parts["rollout engine weights"] == 2 * SEVEN_B.params
    lora = SEVEN_B.lora_params(64)
    assert parts["trained weights"] == parts["gradients, fp32"] == 4 * lora
    assert parts["master weights, fp32"] == 0  # an adapter is its own
    assert parts["optimizer: Adam's two moments"] == 8 * lora
    assert parts["KV cache"] == int(0.4 * 141e9) - 2 * SEVEN_B.params
    # inputs of 28 checkpointed layers, cos and sin
    assert parts["activations kept"] == 8192 * (3584 * 2 * 28 + 2 * 128 * 2)
    bare = _parts(plan(cfg, Assumptions(image_tokens=1024)))
    assert bare["KV cache"] == 64 * (1024 + 200 + 60 + 512) * 57_344
    # Liger's norms and MLP keep less, and are expected where a GPU is named.
    liger = {"path": "qwen2.5-vl-7b-instruct", "use_liger_kernel": True}
    blocks = [
        _parts(plan(c))["one block's backward"]
        for c in (cfg, cfg.model_copy(update={"model": type(cfg.model)(**liger)}))
    ]
    assert blocks[1] == parts["one block's backward"] < blocks[0]


def test_the_row_of_a_step_is_bounded_by_tokens_questions_and_gpus():
    lengths = (1000, 60, 256)
    small = _cfg(gba={"max_row_tokens": 8192, "questions_per_step": 4})
    assert Row.of(small, *lengths, gpus=1).tokens == 8192
    wide = _cfg(gba={"max_row_tokens": 60_000, "questions_per_step": 4})
    one = tree_counts(*lengths, guidelines=4, n=4)
    row = Row.of(wide, *lengths, gpus=4)
    # each segment's path from the root: the prompt, four guidelines, sixteen responses
    keys = 1000 + 4 * 1060 + 16 * 1316
    assert (row.tokens, row.targets, row.keys) == (one.tokens, one.targets, keys)
    assert Row.of(wide, *lengths, gpus=3).tokens == 2 * one.tokens


def test_the_logits_tile_is_the_kernels():
    from mmedx_fast.kernels import _logits

    assert LOGITS_TILE == _logits.CUDA_TILE_BYTES
    assert _parts(plan(_cfg()))["logits tile, fp32"] == LOGITS_TILE
    one = _cfg(
        gba={"questions_per_step": 1, "guidelines": ["analytic"]},
        rollout={"num_generations": 1, "max_completion_length": 7},
    )
    assert _parts(plan(one))["logits tile, fp32"] == 4 * 152064 * 7


def test_memory_is_that_of_answers_as_long_as_they_may_be():
    cfg = _cfg(gba={"max_row_tokens": 60_000, "questions_per_step": 1})
    short, usual = (plan(cfg, Assumptions(response_tokens=n)) for n in (7, None))
    assert short["memory"] == usual["memory"] and short["total"] != usual["total"]
    lengths = [usual["assumptions"][name] for name in ("prompt_tokens", "guideline_tokens")]
    tokens = tree_counts(*lengths, 512, guidelines=4, n=4).tokens
    assert f"activations kept of a row of {tokens:,} tokens" in str(usual["memory"])


# Bytes of a trained weight on one of four GPUs: the weight, its gradient, the master copy, two moments.
HELD = [
    ("lora", 0, (4, 4, 0, 8)),
    ("lora", 1, (4, 4, 1, 2)),
    ("lora", 2, (4, 1, 1, 2)),
    ("lora", 3, (1, 1, 1, 2)),
    ("full", 0, (2, 4, 1, 2)),  # bfloat16 needs masters, which stage 1 has
    ("full", 1, (2, 4, 1, 2)),
    ("full", 2, (2, 1, 1, 2)),
    ("full", 3, (0.5, 1, 1, 2)),
]


@pytest.mark.parametrize(("kind", "stage", "held"), HELD)
def test_zero_stages_shard_what_they_say(kind, stage, held):
    zero = {"stage": stage, "reduce_bucket_size": 1000, "overlap_comm": True}
    cfg = _cfg(deepspeed={"zero_optimization": zero}, gba={"finetuning_type": kind})
    parts = _parts(plan(cfg, gpu=H200, gpus=4))
    assert zero_stage(cfg) == stage
    tower = SEVEN_B.vision.linear_params
    trained = SEVEN_B.lora_params(16) if kind == "lora" else SEVEN_B.params - tower
    frozen = SEVEN_B.params if kind == "lora" else tower
    names = ("trained weights", "gradients, fp32", "master weights, fp32")
    found = [parts[name] for name in (*names, "optimizer: Adam's two moments")]
    assert found == [int(n * trained) for n in held]
    assert parts["frozen weights"] == frozen * 2 // (4 if stage == 3 else 1)
    # Two buffers of a thousand elements, ZeRO-3's one.
    buckets = {"lora": (None, 8, 8, 4), "full": (8, 8, 4, 2)}[kind][stage]
    assert parts.get("ZeRO's gradient buckets") == (buckets and 1000 * buckets)
    assert parts.get("ZeRO-3's gathered weights, at most") == (2 * 10**9 if stage == 3 else None)
    towers = _cfg(gba={"finetuning_type": kind, "freeze_vision_tower": False})
    assert plan(towers)["model"]["trained_parameters"] == trained + (tower if kind == "full" else 0)


def test_an_unreadable_deepspeed_file_is_named(tmp_path):
    path = tmp_path / "zero.json"
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"zero\.json"):
        zero_stage(_cfg(deepspeed=str(path)))


def test_a_run_fits_or_says_what_does_not():
    fits = plan(_cfg(), gpu=H200)["machine"]
    assert fits["fits"] and not fits["problems"] and fits["sequences"] == 64
    parts = plan(_cfg(), gpu=H200)["memory"]
    held = {
        p: sum(x["bytes"] for x in parts if x["phase"] == p)
        for p in ("always", "update", "layer", "head", "rollout")
    }
    update = held["update"] + max(held["layer"], held["head"])
    assert fits["peak"] == held["always"] + max(update, held["rollout"])
    awake = plan(_cfg(rollout={"sleep": False}), gpu=H200)["machine"]
    assert awake["peak"] == held["always"] + update + held["rollout"]
    small = plan(_cfg(), gpu=GPUS["rtx4090"])
    assert not small["machine"]["fits"] and len(small["machine"]["problems"]) == 2
    assert "does NOT fit" in plan_text(small) and "gpu_memory_utilization" in plan_text(small)
    wide = _cfg(gba={"max_row_tokens": 500_000, "questions_per_step": 256})
    assert "max_row_tokens" in plan(wide, gpu=H200)["machine"]["problems"][0]
    full = _cfg(gba={"finetuning_type": "full"})
    assert "zero3" in plan(full, gpu=H200)["machine"]["problems"][0]
    sharded = full.model_copy(update={"deepspeed": {"zero_optimization": {"stage": 3}}})
    assert plan(sharded, gpu=GPUS["h100"], gpus=8)["machine"]["fits"]


def test_full_training_costs_one_more_product_per_weight():
    lora, full = (
        plan(_cfg(gba={"finetuning_type": kind, "steps": 1, "questions_per_step": 1}))
        for kind in ("lora", "full")
    )
    extra = full["stages"][2]["flops"] - lora["stages"][2]["flops"]
    counts = tree_counts(712, 60, 256, guidelines=4, n=4)
    adapter = 4 * 2 * SEVEN_B.lora_params(16) * counts.tokens
    more = counts.tokens * SEVEN_B.token_flops() + counts.targets * SEVEN_B.head_flops()
    less = counts.tokens * (SEVEN_B.down_flops() - SEVEN_B.first_inputs_flops())
    assert extra == pytest.approx(more - less - adapter, rel=1e-9)


def test_money_and_time_follow_hours_and_gpus():
    cfg = _cfg(gba={"steps": 5, "questions_per_step": 4})
    one = plan(cfg, gpu=H200)
    bill, stages = one["per_1000_questions"], {s["stage"]: s for s in one["stages"]}
    gba = [stages["GBA: rollouts"], stages["GBA: updates"]]
    assert bill["responses"] == 16_000
    for kind in ("", "_plain"):
        hours = 1000 * sum(s[f"gpu_hours{kind}"] for s in gba) / 20
        assert bill[f"gpu_hours{kind}"] == pytest.approx(hours)
        assert bill[f"dollars{kind}"] == pytest.approx(hours * H200.dollars_per_hour)
    assert bill["dollars"] < bill["dollars_plain"]
    update = stages["GBA: updates"]
    assert update["steps"] == 5
    assert update["seconds_per_step"] == pytest.approx(update["gpu_hours"] * 3600 / 5)
    two = {s["stage"]: s for s in plan(cfg, gpu=H200, gpus=2)["stages"]}
    assert two["GBA: updates"]["seconds_per_step"] == pytest.approx(update["seconds_per_step"] / 2)
    # each engine reads all the weights, so rollouts gain less than twofold
    ratio = gba[0]["seconds_per_step"] / two["GBA: rollouts"]["seconds_per_step"]
    assert 1 < ratio <= 2
    text = plan_text(one)
    assert "1 x h200: fits" in text and "s/step" in text and "1,000 questions of GBA" in text
    assert json.loads(json.dumps(one)) == one
    assert plan(cfg)["machine"] is None and plan(cfg)["per_1000_questions"]["dollars"] is None


def test_plan_command_takes_gpu_and_price(capsys):
    from mmedx_fast import cli

    assert (
        cli.main(["plan", "qwen2_5_vl_7b.yaml", "--gpu", "H100", "--gpus", "4", "--price", "9"])
        == 0
    )
    said = capsys.readouterr().out
    assert "4 x h100: fits" in said and "assumed $9.00" in said
    for wrong in (["--gpu", "none"], ["--gpus", "0"]):
        assert cli.main(["plan", "qwen2_5_vl_7b.yaml", *wrong]) != 0
        assert wrong[0].strip("-") in capsys.readouterr().err


def test_gpus_are_found_by_name():
    assert find_gpu("B200").peak_tflops == 2250
    with pytest.raises(ValueError, match="h200"):
        find_gpu("x")
    for gpu in GPUS.values():
        assert 0 < gpu.tflops < gpu.peak_tflops and 0 < gpu.usable < gpu.memory


def test_plan_imports_no_torch():
    code = (
        "import sys; from mmedx_fast.config import Config; from mmedx_fast.cost import plan\n"
        "plan(Config.model_validate({'model': {'path': 'Qwen2-VL-2B-Instruct'}}))\n"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.strip() == "[]", out.stderr


def test_phases_add_up_and_inner_seconds_are_not_counted_twice():
    meter = PhaseMeter()
    start = time.perf_counter()
    with meter.phase("train"):
        time.sleep(0.03)
        with meter.phase("sync", tokens=7):
            time.sleep(0.05)
        time.sleep(0.01)
    whole = time.perf_counter() - start
    total = meter.to_dict()
    assert total["train"]["seconds"] + total["sync"]["seconds"] == pytest.approx(whole, rel=0.05)
    assert total["sync"]["seconds"] >= 0.05 and total["train"]["seconds"] >= 0.04
    assert total["sync"]["tokens"] == 7 and total["sync"]["calls"] == 1


def test_meter_resumes_and_takes_what_is_new():
    meter = PhaseMeter()
    meter.add("rollout", 2.0, 100)
    assert meter.take() == {"seconds/rollout": 2.0, "tokens/rollout": 100}
    state = json.loads(json.dumps(meter.to_dict()))
    later = PhaseMeter(state)
    later.add("rollout", 1.0, 20)
    later.add("reward", 0.5)
    assert later.take() == {"seconds/rollout": 1.0, "tokens/rollout": 20, "seconds/reward": 0.5}
    assert later.to_dict()["rollout"] == {"seconds": 3.0, "tokens": 120, "calls": 0}
    assert later.table().splitlines()[2].split() == ["rollout", "3.0", "120", "40"]
    with pytest.raises(ValueError, match="reward"):
        later.add("reward", -1.0)


def test_meter_counts_a_phase_that_raises():
    meter = PhaseMeter()
    with pytest.raises(RuntimeError), meter.phase("rollout"):
        time.sleep(0.01)
        raise RuntimeError
    assert meter.to_dict()["rollout"]["seconds"] >= 0.01
    with meter.phase("reward"):
        pass
    assert meter.to_dict()["rollout"]["calls"] == 1


def test_table_is_aligned():
    text = render_table(["name", "n"], [["a", 1], ["long name", "1,000"]])
    assert text.splitlines() == [
        "name           n",
        "---------  -----",
        "a              1",
        "long name  1,000",
    ]


@pytest.mark.parametrize("zero", ["two", 2, True, {"stage": 4}, {"stage": "2"}, {"stage": True}])
def test_a_zero_stage_that_does_not_exist_is_named(zero) -> None:
    assert zero_stage(Config(deepspeed={"zero_optimization": {"stage": 3}})) == 3
    assert zero_stage(Config(deepspeed={})) == 0
    with pytest.raises(ValueError, match="stage from 0 to 3"):
        Config(deepspeed={"zero_optimization": zero})


def _rates(**changes):
    return StepRates(SEVEN_B, rank=16, gpu=GPUS["h100"], gpus=2, **changes)


def _segments(p, g, r, k, n):
    """(start, length, parent) of a question's tree, in the row's order."""
    made, at = [(0, p, -1)], p
    for _ in range(k):
        stem = len(made)
        for length, parent in [(g, 0)] + [(r, stem)] * n:
            made.append((at, length, parent))
            at += length
    return made


def test_rates_are_useful_work_over_seconds():
    segments = _segments(700, 60, 256, 4, 4)
    row = SimpleNamespace(segments=segments, targets=range(16 * 256), pixel_values=None)
    tree = tree_counts(700, 60, 256, guidelines=4, n=4)
    counts = segment_counts(segments, 16 * 256)
    assert counts == dataclasses.replace(tree, images=0)
    rates = _rates()
    rates.add([row, row], passes=3)
    taken = {"seconds/train": 4.0, "tokens/train": 2000, "seconds/rollout": 12.0}
    found = rates.take(taken, samples=5)
    work = 6 * train_flops(SEVEN_B, counts, lora_rank=16, checkpointing=False)
    assert found == {
        "perf/share/train": 0.25,
        "perf/share/rollout": 0.75,
        "perf/train_tokens_per_second": 500.0,
        "perf/mfu": pytest.approx(work / (4 * 989e12)),
        "perf/gpu_hours_per_1000_samples": pytest.approx(16 * 2 / 3600 / 5 * 1000),
    }
    assert rates.take(taken, samples=5)["perf/mfu"] == 0  # a step's work counts once
    on_cpu = StepRates(SEVEN_B, rank=16, gpu=None, gpus=0)
    on_cpu.add([row])
    assert sorted(on_cpu.take(taken, 5)) == [
        "perf/share/rollout",
        "perf/share/train",
        "perf/train_tokens_per_second",
    ]
    assert rates.take({}, 5) == {"perf/gpu_hours_per_1000_samples": 0.0}


def test_images_count_where_they_are_in_the_row():
    grid = SimpleNamespace(tolist=lambda: [[1, 32, 32], [1, 16, 16]])
    bare = SimpleNamespace(segments=[(0, 9, -1)], targets=range(2), pixel_values=None)
    more = {"pixel_values": 1, "image_grid_thw": grid, "images": ["a", "b"]}
    image = SimpleNamespace(**vars(bare) | more)
    other = SimpleNamespace(**vars(image) | {"images": ["c", "a"]})
    work = []
    for rows, changes in (
        *(([bare], {}), ([image], {}), ([image], {"train_tower": True})),
        *(([bare, bare], {}), ([image, other], {})),
    ):
        rates = _rates(**changes)
        rates.add(rows)
        work.append(rates.take({"seconds/train": 1.0}, 1)["perf/mfu"] * 989e12)
    forward = SEVEN_B.image_flops(256) + SEVEN_B.image_flops(64)
    assert work[1] - work[0] == pytest.approx(forward)
    assert work[2] - work[0] == pytest.approx(3 * forward, rel=0.01)  # pixels have no gradient
    # "a" stands in both rows of the last: it counts once.
    assert work[4] - work[3] == pytest.approx(forward + SEVEN_B.image_flops(256))


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla T4", None),
    ],
)
def test_a_driver_s_name_finds_its_peaks(device, name):
    found = match_gpu(device)
    assert (found and found.name) == name


@pytest.mark.parametrize(
    "where", [{"server_gpus": "1"}, {"server_urls": ["http://other:8000"]}, {}]
)
def test_an_engine_elsewhere_takes_nothing_of_the_trainers_gpu(where) -> None:
    inside = plan(_cfg(), gpu=H200)
    server = plan(_cfg(rollout={"engine": "server", **where}), gpu=H200)
    parts = {part["name"]: part["bytes"] for part in server["memory"]}
    own = {part["name"]: part["bytes"] for part in inside["memory"]}
    taken = (parts.pop("rollout engine weights"), parts.pop("KV cache"))
    expected = (own.pop("rollout engine weights"), own.pop("KV cache"))
    assert parts == own
    if where:
        assert taken == (0, 0) and server["machine"]["sequences"] is None
        assert "the rollout engine is on other GPUs" in plan_text(server)
    else:
        assert taken == expected and min(taken) > 0


def test_two_gpus_of_tensor_parallel_hold_half_the_engine_each() -> None:
    whole, half = (
        next(
            p["bytes"]
            for p in plan(_cfg(rollout=r), gpus=2)["memory"]
            if p["name"].startswith("rollout")
        )
        for r in ({}, {"tensor_parallel_size": 2})
    )
    assert half == whole // 2


def test_an_engine_on_more_gpus_than_there_are_does_not_fit() -> None:
    four = {"tensor_parallel_size": 4}
    with pytest.raises(ValueError, match=r"tensor_parallel_size = 4 .*gpus = 1.*--gpus 4"):
        plan(_cfg(rollout=four), gpu=H200, gpus=1)
    elsewhere = {"engine": "server", "server_gpus": "4,5,6,7"}
    assert plan(_cfg(rollout=four | elsewhere), gpu=H200)["machine"]["gpus"] == 1
    with pytest.raises(ValueError, match="tensor_parallel_size = 4 .* server_gpus = 4,5 names 2"):
        _cfg(rollout=four | {"engine": "server", "server_gpus": "4,5"})


def test_a_model_in_the_hub_cache_is_planned_from_its_own_sizes(tmp_path, monkeypatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    cfg = _cfg(model={"path": "some/Own-Model"})
    with pytest.raises(ValueError, match="some/Own-Model.*local hub cache"):
        plan(cfg)
    model = tmp_path / "models--some--Own-Model"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("0a1b")
    (model / "snapshots" / "0a1b").mkdir(parents=True)
    (model / "snapshots" / "0a1b" / "config.json").write_text(json.dumps(_small_config()))
    assert plan(cfg)["model"]["parameters"] == ModelShape.from_config(_small_config()).params


@pytest.mark.parametrize(
    ("rollout", "ranks", "visible", "beside"),
    [
        ({}, 2, None, 0),
        ({"tensor_parallel_size": 4}, 1, None, 3),  # the trainer's GPU is one of them
        ({"engine": "server"}, 2, None, 0),
        ({"engine": "server", "server_gpus": "4,5", "tensor_parallel_size": 2}, 4, None, 2),
        ({"engine": "server", "server_gpus": "1, 2"}, 2, None, 1),
        ({"engine": "server", "server_gpus": "0"}, 1, "3,0", 1),
        ({"engine": "server", "server_urls": ["http://a:1", "http://b:1"]}, 1, None, 2),
        (
            {"engine": "server", "server_urls": ["http://a:1"], "tensor_parallel_size": 2},
            *(8, None, 2),
        ),
    ],
)
def test_gpus_of_the_engine_are_on_the_bill(rollout, ranks, visible, beside, monkeypatch) -> None:
    from mmedx_fast import ranks as launch
    from mmedx_fast.stages.common import step_rates

    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    cfg = _cfg(rollout=rollout)
    assert engine_gpus(cfg.rollout, ranks) == beside
    monkeypatch.setattr(launch, "world_size", lambda: ranks)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: "NVIDIA H100")
    config = SimpleNamespace(to_dict=_small_config)
    policy = SimpleNamespace(
        device=SimpleNamespace(type="cuda"),
        module=SimpleNamespace(base=SimpleNamespace(config=config)),
        tower_frozen=True,
    )
    assert step_rates(policy, cfg, engine=True).gpus == ranks + beside
    assert step_rates(policy, cfg).gpus == ranks  # no engine works for the experts
