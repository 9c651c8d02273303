"""Both rollout engines against each other and against plain teacher-forced forwards of the HF
model."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import random
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mmedx_fast.config import DataConfig, ModelConfig, RolloutConfig
from mmedx_fast.data.records import GUIDELINE_NAMES, ImageRef, Record
from mmedx_fast.guidelines import GUIDELINES
from mmedx_fast.model_files import canonical, tensor_files
from mmedx_fast.prompts import PromptBuilder, PromptError, PromptTooLong, Question
from mmedx_fast.rollout import (
    BASE_VERSION,
    Rollout,
    RolloutError,
    Sampling,
    create_engine,
)
from mmedx_fast.rollout.base import EngineError, Interrupted, request_seeds
from mmedx_fast.rollout.restart import RestartingEngine, Weights
from mmedx_fast.tiny import build_tiny

MAX_TOKENS = 12


def record(name: str, images: int = 1) -> Record:
    from PIL import Image

    refs = []
    for index in range(images):
        rng = np.random.default_rng([*name.encode(), index])
        size = (112, 112) if index == 0 else (130, 70)
        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        refs.append(ImageRef(data=buffer.getvalue()))
    return Record(
        id=name,
        dataset="test",
        split="train",
        images=tuple(refs),
        question=f"Patient {name} has had a cough and fever for three days. Which diagnosis?",
        options={"A": "pneumonia", "B": "fracture", "C": "scurvy", "D": "asthma"},
        answer_label="A",
        answer="pneumonia",
    )


def peaky(model: torch.nn.Module, builder: PromptBuilder, seed: int) -> None:
    """Random weights whose next-token distribution is far from flat and depends on the prompt."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:
                scale = 0.35 if "lm_head" in name else 0.12
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
        head = model.lm_head.weight
        # Placeholders would be sampled often if they could be, and responses do end.
        for id in (*builder.banned_token_ids, builder.end_id):
            head[id] *= 2.0


def save_weights(model: torch.nn.Module, source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(folder)
    return folder


@dataclasses.dataclass
class World:
    folder: Path
    builder: PromptBuilder
    hf: torch.nn.Module
    questions: list[Question]
    adapters: dict[str, Path]


def load_hf(folder: Path) -> torch.nn.Module:
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def make_adapter(folder: Path, out: Path, seed: int, **options: object) -> Path:
    from peft import LoraConfig, get_peft_model

    targets = options.pop(
        "target_modules", r".*language_model\..*\.(q_proj|v_proj|o_proj|gate_proj|down_proj)"
    )
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, **options)
    model = get_peft_model(load_hf(folder), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    model.save_pretrained(out)
    return out


def make_world(root: Path) -> World:
    """A tiny model whose answers depend on its prompt, questions with 0 to 2 images, two adapters."""
    corpus = [record("p1").question, *(g.instruction for g in GUIDELINES.values())] * 2
    plain = build_tiny(root / "plain", corpus, vocab_size=700)
    builder = PromptBuilder.from_folder(plain, DataConfig(max_prompt_length=400))
    hf = load_hf(plain)
    peaky(hf, builder, seed=1)
    folder = save_weights(hf, plain, root / "model")
    questions = [
        builder.question(record(name, images))
        for name, images in (("p1", 1), ("p22", 1), ("two", 2), ("none", 0))
    ]
    adapters = {
        name: make_adapter(folder, root / name, seed) for name, seed in (("a", 5), ("b", 6))
    }
    return World(folder, builder, hf, questions, adapters)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("rollout"))


def engine(world: World, kind: str, **changes: object):
    overrides = {k: changes.pop(k) for k in list(changes) if k not in RolloutConfig.model_fields}
    rollout = RolloutConfig(
        engine=kind,
        max_num_seqs=32,
        kv_cache_memory_bytes=64 << 20,
        block_size=32,
        max_lora_rank=16,
    ).model_copy(update=changes)
    model = ModelConfig(path=str(world.folder), dtype="float32")
    return create_engine(
        model, rollout, world.builder, max_model_len=480, max_images=2, **overrides
    )


@pytest.fixture(scope="module")
def vllm_engine(world: World) -> Iterator[object]:
    pytest.importorskip("vllm")
    # Room for less than two prompts per step: those that do not fit must wait whole.
    made = engine(world, "vllm", max_num_batched_tokens=480)
    yield made
    made.close()


@pytest.fixture(scope="module")
def hf_engine(world: World) -> Iterator[object]:
    made = engine(world, "transformers")
    yield made
    made.close()


@pytest.fixture(params=["vllm_engine", "hf_engine"])
def either(request: pytest.FixtureRequest):
    return request.getfixturevalue(request.param)


@contextlib.contextmanager
def adapted(rollout_engine, folder: Path | None, version: int) -> Iterator[None]:
    rollout_engine.load_adapter(folder, version)
    try:
        yield
    finally:
        rollout_engine.load_adapter(None, BASE_VERSION)


@torch.no_grad()
def teacher_logits(model: torch.nn.Module, question: Question, rollout: Rollout) -> torch.Tensor:
    """Raw logits [tokens, V] of an unpadded, uncached forward over prompt and response."""
    inner = model.get_base_model().model if hasattr(model, "get_base_model") else model.model
    prompt = torch.tensor([rollout.prompt_ids])
    vision = {}
    if question.images:
        vision = {"pixel_values": question.pixel_values, "image_grid_thw": question.image_grid_thw}
    positions, _ = inner.get_rope_index(
        prompt,
        mm_token_type_ids=(prompt == question.builder.image_token_id).int(),
        image_grid_thw=question.image_grid_thw,
    )
    after = positions.max() + 1 + torch.arange(len(rollout.token_ids))
    out = model(
        input_ids=torch.tensor([rollout.prompt_ids + rollout.token_ids]),
        position_ids=torch.cat([positions, after.expand(3, 1, -1)], dim=2),
        use_cache=False,
        **vision,
    )
    return out.logits[0, len(rollout.prompt_ids) - 1 : -1]


def expected_logprobs(
    model: torch.nn.Module, question: Question, rollout: Rollout, temperature: float
) -> torch.Tensor:
    logits = teacher_logits(model, question, rollout)
    logits[:, question.builder.banned_token_ids] = -torch.inf
    logprobs = (logits / temperature).log_softmax(-1)
    return logprobs.gather(1, torch.tensor(rollout.token_ids)[:, None])[:, 0]


def tokens(rollouts: list[Rollout]) -> list[list[int]]:
    return [rollout.token_ids for rollout in rollouts]


def test_greedy_engines_agree_on_no_one_and_two_images(world, vllm_engine, hf_engine):
    sampling = Sampling(greedy=True, max_tokens=24)
    ours = vllm_engine.generate(world.questions, ["bayesian", None], sampling)
    theirs = hf_engine.generate(world.questions, ["bayesian", None], sampling)
    assert tokens(ours) == tokens(theirs)
    assert [r.prompt_ids for r in ours] == [r.prompt_ids for r in theirs]
    assert [(r.question, r.guideline) for r in ours] == [
        (i, g) for i in range(4) for g in ("bayesian", None)
    ]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-4, rtol=0
        )
        assert (a.text, a.finish_reason) == (b.text, b.finish_reason)
    # The prompt matters to this model: otherwise equality above would say little.
    assert len({tuple(ids) for ids in tokens(ours)}) == len(ours)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_a_teacher_forced_forward(world, either, temperature):
    sampling = Sampling(n=2, temperature=temperature, max_tokens=MAX_TOKENS, seed=3)
    rollouts = either.generate(world.questions, ["analytic"], sampling)
    assert len(rollouts) == 8
    banned_mass = 0.0
    for rollout in rollouts:
        question = world.questions[rollout.question]
        want = expected_logprobs(world.hf, question, rollout, temperature)
        torch.testing.assert_close(torch.tensor(rollout.logprobs), want, atol=1e-4, rtol=0)
        probabilities = (teacher_logits(world.hf, question, rollout) / temperature).softmax(-1)
        banned_mass += probabilities[:, world.builder.banned_token_ids].sum().item()
    # Renormalisation is really tested: the banned ids would have held a visible share.
    assert banned_mass > 0.5


def test_banned_tokens_are_never_sampled_and_endings_are_marked(world, either):
    sampling = Sampling(n=8, temperature=2.0, max_tokens=32, seed=11)
    rollouts = either.generate(world.questions[:2], ["differential", "intuitive"], sampling)
    assert len(rollouts) == 32
    for rollout in rollouts:
        assert not set(rollout.token_ids) & set(world.builder.banned_token_ids)
        ended = [id in world.builder.stop_token_ids for id in rollout.token_ids]
        assert not any(ended[:-1])
        assert ended[-1] == (rollout.finish_reason == "stop")
        assert rollout.finish_reason == "stop" or len(rollout.token_ids) == 32
        assert rollout.text == world.builder.tokenizer.decode(
            rollout.token_ids, skip_special_tokens=True
        )
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}


def test_order_is_question_guideline_sample(world, either):
    calls = []
    rollouts = either.generate(
        world.questions[:2],
        ["bayesian", "analytic"],
        Sampling(n=3, max_tokens=4, seed=1),
        progress=lambda done, total: calls.append((done, total)),
    )
    assert [(r.question, r.guideline, r.sample) for r in rollouts] == [
        (q, g, s) for q in range(2) for g in ("bayesian", "analytic") for s in range(3)
    ]
    assert calls[-1] == (12, 12) and calls == sorted(calls)
    assert either.generate([], ["analytic"], Sampling()) == []


def test_samples_depend_on_seed_question_guideline_only(world, either):
    guidelines = ["bayesian", "analytic"]
    sampling = Sampling(n=2, max_tokens=MAX_TOKENS, seed=4)
    together = either.generate(world.questions, guidelines, sampling)
    again = either.generate(world.questions, guidelines, sampling)
    assert tokens(together) == tokens(again)
    alone = either.generate_requests([(world.questions[1], "analytic")], sampling)
    inside = [r for r in together if r.question == 1 and r.guideline == "analytic"]
    assert tokens(alone) == tokens(inside)
    backwards = either.generate(world.questions[::-1], guidelines[::-1], sampling)
    key = {(r.question, r.guideline, r.sample): r.token_ids for r in together}
    assert all(key[3 - r.question, r.guideline, r.sample] == r.token_ids for r in backwards)
    other = either.generate_requests(
        [(world.questions[1], "analytic")], dataclasses.replace(sampling, seed=5)
    )
    assert all(a != b for a, b in zip(tokens(alone), tokens(other), strict=True))
    # Siblings, and repetitions of one request in one call, are different draws.
    twice = either.generate_requests([(world.questions[1], "analytic")] * 2, sampling)
    assert len({tuple(ids) for ids in tokens(twice)}) == 4 and tokens(twice)[:2] == tokens(alone)


def test_request_seeds_do_not_collide_with_siblings(world):
    requests = [(q, g) for q in world.questions for g in GUIDELINE_NAMES] * 8
    seeds = sorted(seed for step in range(50) for seed in request_seeds(requests, step))
    assert 0 <= seeds[0] and seeds[-1] < 2**62
    assert min(b - a for a, b in zip(seeds, seeds[1:], strict=False)) > 1024


def test_generation_leaves_the_global_random_state_alone(world, either):
    torch.manual_seed(7)
    before = torch.get_rng_state(), random.getstate()
    either.generate(world.questions[:1], [None], Sampling(n=2, max_tokens=4))
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()


def test_adapter_swaps_change_outputs_and_swap_back(world, either):
    from peft import PeftModel

    sampling = Sampling(n=2, max_tokens=MAX_TOKENS, seed=2)
    ask = [(world.questions[0], "bayesian"), (world.questions[2], None)]
    seen = {}
    for version, name in enumerate([None, "a", "b", "a", None]):
        either.load_adapter(world.adapters.get(name), version)
        assert either.version == (BASE_VERSION if name is None else version)
        rollouts = either.generate_requests(ask, sampling)
        assert seen.setdefault(name, tokens(rollouts)) == tokens(rollouts)
        if name is not None:
            model = PeftModel.from_pretrained(load_hf(world.folder), world.adapters[name])
            for rollout in rollouts:
                want = expected_logprobs(model, ask[rollout.question][0], rollout, 1.0)
                torch.testing.assert_close(torch.tensor(rollout.logprobs), want, atol=1e-4, rtol=0)
    assert seen[None] != seen["a"] != seen["b"] != seen[None]


def test_same_folder_with_new_content_is_really_reloaded(world, either, tmp_path):
    ask, sampling = [(world.questions[0], "bayesian")], Sampling(greedy=True, max_tokens=MAX_TOKENS)
    latest = tmp_path / "latest"
    got = {}
    for version, name in enumerate(["a", "b"]):
        shutil.rmtree(latest, ignore_errors=True)
        shutil.copytree(world.adapters[name], latest)
        either.load_adapter(latest, version)
        got[name] = tokens(either.generate_requests(ask, sampling))
    with adapted(either, world.adapters["b"], 9):
        assert got["b"] == tokens(either.generate_requests(ask, sampling)) != got["a"]


def test_bad_adapters_are_refused_and_the_old_one_stays(world, either, tmp_path):
    ask, sampling = [(world.questions[0], None)], Sampling(greedy=True, max_tokens=MAX_TOKENS)
    truncated = shutil.copytree(world.adapters["b"], tmp_path / "truncated")
    data = (truncated / "adapter_model.safetensors").read_bytes()
    (truncated / "adapter_model.safetensors").write_bytes(data[: len(data) // 2])
    big = shutil.copytree(world.adapters["b"], tmp_path / "big")
    config = json.loads((big / "adapter_config.json").read_text())
    (big / "adapter_config.json").write_text(json.dumps(config | {"r": 512}))
    vision = make_adapter(world.folder, tmp_path / "vision", 1, target_modules=r".*visual.*qkv")
    with adapted(either, world.adapters["a"], 3):
        want = tokens(either.generate_requests(ask, sampling))
        for folder, message in (
            (tmp_path / "nowhere", "adapter_config.json"),
            (truncated, "safetensors"),
            (big, "rank 512 exceeds rollout.max_lora_rank = 16"),
            (vision, "adapts the vision tower"),
        ):
            with pytest.raises(RolloutError, match=message) as caught:
                either.load_adapter(folder, 4)
            assert str(folder) in str(caught.value)
            assert either.version == 3
            assert tokens(either.generate_requests(ask, sampling)) == want


def test_adapter_for_another_model_leaves_the_engine_healthy(world, either, tmp_path):
    from safetensors.torch import load_file, save_file

    ask, sampling = [(world.questions[0], None)], Sampling(greedy=True, max_tokens=MAX_TOKENS)
    wrong = shutil.copytree(world.adapters["b"], tmp_path / "wrong")
    weights = load_file(wrong / "adapter_model.safetensors")
    weights = {k: torch.cat([v, v], dim=1 if "lora_A" in k else 0) for k, v in weights.items()}
    save_file(weights, wrong / "adapter_model.safetensors", metadata={"format": "pt"})
    want = tokens(either.generate_requests(ask, sampling))
    with pytest.raises(RolloutError, match="wrong"):
        either.load_adapter(wrong, 1)
    assert tokens(either.generate_requests(ask, sampling)) == want
    with adapted(either, world.adapters["a"], 1):
        want = tokens(either.generate_requests(ask, sampling))
        with pytest.raises(RolloutError, match="wrong"):
            either.load_adapter(wrong, 2)
        assert tokens(either.generate_requests(ask, sampling)) == want


def renamed(folder: Path) -> Path:
    """Rewrite the weights, saved under the names of published checkpoints, under module names."""
    from safetensors.torch import load_file, save_file

    modules = {"model": "model.language_model", "visual": "model.visual", "lm_head": "lm_head"}
    weights = {}
    for key, value in load_file(folder / "model.safetensors").items():
        first, _, rest = key.partition(".")
        weights[f"{modules[first]}.{rest}"] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_full_weights_equal_hf_with_these_weights(world, either, tmp_path):
    merged = load_hf(world.folder)
    peaky(merged, world.builder, seed=99)
    folder = save_weights(merged, world.folder, tmp_path / "merged")
    sampling = Sampling(n=1, max_tokens=MAX_TOKENS, seed=2)
    before = either.generate(world.questions, ["analytic"], sampling)
    either.load_weights(folder)
    try:
        rollouts = either.generate(world.questions, ["analytic"], sampling)
        for rollout in rollouts:
            want = expected_logprobs(merged, world.questions[rollout.question], rollout, 1.0)
            torch.testing.assert_close(torch.tensor(rollout.logprobs), want, atol=1e-4, rtol=0)
        assert all(a != b for a, b in zip(tokens(before), tokens(rollouts), strict=True))
        # The same model under other tensor names.
        either.load_weights(world.folder)
        either.load_weights(renamed(folder))
        again = either.generate(world.questions, ["analytic"], sampling)
        assert tokens(again) == tokens(rollouts)
    finally:
        either.load_weights(world.folder)
    assert tokens(either.generate(world.questions, ["analytic"], sampling)) == tokens(before)


def test_trained_weights_are_served_from_memory(world, either):
    trained = load_hf(world.folder)
    peaky(trained, world.builder, seed=98)
    names = {canonical(name): name for name in tensor_files(world.folder)}
    live = {names[canonical(n)]: p.detach() for n, p in trained.named_parameters()}

    def weights():
        for name, tensor in live.items():
            lent = tensor.clone()
            yield name, lent
            lent.fill_(torch.nan)  # ZeRO-3 takes a gathered weight back

    sampling = Sampling(n=1, max_tokens=MAX_TOKENS, seed=2)
    before = either.generate(world.questions, ["analytic"], sampling)
    either.load_adapter(world.adapters["a"], 5)
    try:
        either.update_weights(weights(), 7)
        assert either.version == 7
        rollouts = either.generate(world.questions, ["analytic"], sampling)
        for rollout in rollouts:
            want = expected_logprobs(trained, world.questions[rollout.question], rollout, 1.0)
            torch.testing.assert_close(torch.tensor(rollout.logprobs), want, atol=1e-4, rtol=0)
        assert all(a != b for a, b in zip(tokens(before), tokens(rollouts), strict=True))
        part = [(name, tensor) for name, tensor in live.items() if "layers.0.mlp.up" not in name]
        with pytest.raises(RolloutError, match="version 8: 1 of the model's tensors.*up_proj"):
            either.update_weights(iter(part), 8)
    finally:
        either.load_weights(world.folder)
    assert either.version == BASE_VERSION
    assert tokens(either.generate(world.questions, ["analytic"], sampling)) == tokens(before)


def test_incomplete_weights_are_refused(world, either, tmp_path):
    from safetensors.torch import load_file, save_file

    part = shutil.copytree(world.folder, tmp_path / "part")
    weights = load_file(part / "model.safetensors")
    weights.pop(next(key for key in weights if "k_proj.weight" in key))
    save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
    ask, sampling = [(world.questions[0], None)], Sampling(greedy=True, max_tokens=8)
    want = tokens(either.generate_requests(ask, sampling))
    for folder, message in (
        (part, "1 of the model's tensors.*k_proj"),
        (tmp_path / "no", "no model folder"),
    ):
        with pytest.raises(RolloutError, match=message):
            either.load_weights(folder)
    assert tokens(either.generate_requests(ask, sampling)) == want


def test_prompts_that_do_not_fit_are_named_before_anything_runs(world, either):
    good = (world.questions[0], None)
    sampling = Sampling(greedy=True, max_tokens=8)
    want = tokens(either.generate_requests([good], sampling))
    tight = PromptBuilder(world.builder.processor, DataConfig(max_prompt_length=50))
    for bad, limits, error in (
        (tight.question(record("long")), sampling, PromptTooLong),
        (world.builder.question(record("crowd", images=3)), sampling, PromptError),
        (world.questions[0], dataclasses.replace(sampling, max_tokens=470), PromptError),
    ):
        with pytest.raises(error, match=repr(bad.id)):
            either.generate_requests([good, (bad, None)], limits)
        assert tokens(either.generate_requests([good], sampling)) == want


def test_a_refusal_inside_vllm_names_the_question_and_leaves_no_request(world, vllm_engine):
    good, sampling = (world.questions[0], None), Sampling(greedy=True, max_tokens=8)
    want = tokens(vllm_engine.generate_requests([good], sampling))
    bad = dataclasses.replace(world.builder.question(record("odd")), _ids={None: [10**6, 5]})
    start = time.monotonic()
    with pytest.raises(RolloutError, match="'odd'"):
        vllm_engine.generate_requests([good, good, (bad, None)], sampling)
    assert tokens(vllm_engine.generate_requests([good], sampling)) == want
    assert time.monotonic() - start < 30


def test_an_interrupt_leaves_no_request(world, vllm_engine):
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    ask = [(question, None) for question in world.questions]
    want = tokens(vllm_engine.generate_requests(ask, Sampling(greedy=True, max_tokens=8)))
    with pytest.raises(KeyboardInterrupt):
        vllm_engine.generate_requests(ask, Sampling(n=4, max_tokens=MAX_TOKENS), progress=stop)
    assert tokens(vllm_engine.generate_requests(ask, Sampling(greedy=True, max_tokens=8))) == want


@pytest.mark.parametrize("kind", ["vllm", "transformers"])
def test_generate_ends_between_two_tokens_when_it_is_interrupted(world, request, monkeypatch, kind):
    found = request.getfixturevalue("vllm_engine" if kind == "vllm" else "hf_engine")
    ask = [(question, None) for question in world.questions]
    found.interrupt()  # nothing runs
    want = tokens(found.generate_requests(ask, Sampling(greedy=True, max_tokens=8)))
    name = "_step" if kind == "vllm" else "_sample"
    made, calls = getattr(type(found), name), []

    def step(self, *given):
        calls.append(1)
        if len(calls) == 3:
            found.interrupt()
        return made(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(type(found), name, step)
        with pytest.raises(Interrupted):
            found.generate_requests(ask, Sampling(n=4, max_tokens=MAX_TOKENS))
    assert len(calls) == 3
    assert tokens(found.generate_requests(ask, Sampling(greedy=True, max_tokens=8))) == want


def test_prefix_cache_hits_are_reported(world, vllm_engine, hf_engine):
    vllm_engine.reset_caches()
    vllm_engine.stats()
    rollouts = vllm_engine.generate(
        world.questions[:1], list(GUIDELINE_NAMES), Sampling(n=2, max_tokens=4, seed=1)
    )
    stats = vllm_engine.stats()
    # Even if only siblings shared their prompt, half of the prompt tokens could be hits at most.
    assert stats.prefix_cache_hit_rate > 0.5
    assert (stats.requests, stats.sequences) == (4, 8)
    assert stats.generated_tokens == sum(map(len, tokens(rollouts)))
    assert stats.tokens_per_second > 0
    assert vllm_engine.stats().prefix_cache_hit_rate is None
    hf_engine.stats()
    hf_engine.generate(world.questions[:1], [None], Sampling(max_tokens=2))
    assert hf_engine.stats().prefix_cache_hit_rate is None


def test_vllm_builds_the_same_prompt_ids(world, vllm_engine):
    for question in world.questions:
        for guideline in (None, "bayesian"):
            from vllm import SamplingParams

            (out,) = vllm_engine._llm.generate(
                question.vllm_prompt(guideline), SamplingParams(max_tokens=1), use_tqdm=False
            )
            assert out.prompt_token_ids == question.prompt_ids(guideline)


@pytest.mark.parametrize("slots", [[1] * 7, [0, 1, 1, 0, 1, 0, 0]], ids=["one", "several"])
@pytest.mark.parametrize("ndim", [3, 4])
def test_cpu_lora_products_equal_a_loop_over_tokens(slots, ndim):
    pytest.importorskip("vllm")
    from vllm.lora.ops.torch_ops import lora_ops

    from mmedx_fast.rollout import vllm_cpu_lora

    vllm_cpu_lora.install()
    shape = (2, 1, 4, 5) if ndim == 4 else (2, 4, 5)
    inputs, weights = torch.randn(7, 5), torch.randn(shape)
    index = torch.tensor(slots)
    want = torch.stack([weights.view(2, 4, 5)[i] @ x for i, x in zip(slots, inputs, strict=True)])
    start = torch.randn(7, 12)

    out = start.clone()
    lora_ops.bgmv_shrink(inputs, weights, out, index, 0.5)
    torch.testing.assert_close(out[:, :4], want * 0.5)
    assert torch.equal(out[:, 4:], start[:, 4:])
    out = start.clone()
    lora_ops.bgmv_expand(inputs, weights, out, index)
    torch.testing.assert_close(out[:, :4], start[:, :4] + want)
    out = start.clone()
    lora_ops.bgmv_expand_slice(inputs, weights, out, index, 6, 4, True)
    torch.testing.assert_close(out[:, 6:10], start[:, 6:10] + want)
    assert torch.equal(out[:, :6], start[:, :6]) and torch.equal(out[:, 10:], start[:, 10:])
    lora_ops.bgmv_expand_slice(inputs, weights, out, index, 0, 4, False)
    torch.testing.assert_close(out[:, :4], want)


def test_threads_can_be_set_after_the_engine_has_started(vllm_engine):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        assert torch.get_num_threads() == (2 if threads == 1 else 1)
    finally:
        torch.set_num_threads(threads)


def test_sleep_and_wake_keep_the_engine_working(world, either):
    ask, sampling = [(world.questions[0], None)], Sampling(greedy=True, max_tokens=8)
    want = tokens(either.generate_requests(ask, sampling))
    either.sleep()
    either.wake()
    assert tokens(either.generate_requests(ask, sampling)) == want


def test_missing_vllm_names_the_extra_and_the_alternative(world, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(RolloutError, match=r"mmedx-fast\[c.*rollout.engine=transformers"):
        engine(world, "vllm")


def test_missing_model_is_named(world, tmp_path):
    lost = dataclasses.replace(world, folder=tmp_path / "lost")
    with pytest.raises(RolloutError, match="lost"):
        engine(lost, "transformers")


def test_sampling_is_checked():
    for bad in ({"n": 0}, {"max_tokens": 0}, {"greedy": True, "n": 2}, {"temperature": 2.5}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Sampling(**bad)


def test_an_engine_that_is_started_anew_gets_the_trained_weights_again(world, monkeypatch):
    trained = load_hf(world.folder)
    peaky(trained, world.builder, seed=98)
    names = {canonical(name): name for name in tensor_files(world.folder)}
    live = {names[canonical(n)]: p.detach() for n, p in trained.named_parameters()}
    made = []

    def make():
        made.append(engine(world, "transformers"))
        return made[-1]

    either = RestartingEngine(make, max_restarts=1)
    either.update_weights(Weights(lambda: iter(live.items())), 7)
    sampling = Sampling(n=1, max_tokens=MAX_TOKENS, seed=2)
    want = either.generate(world.questions, ["analytic"], sampling)
    monkeypatch.setattr(
        made[0], "generate_requests", lambda *_: (_ for _ in ()).throw(EngineError("broken"))
    )
    got = either.generate(world.questions, ["analytic"], sampling)
    assert len(made) == 2 and either.version == 7 and not either.shared and either.takes_tensors
    assert tokens(got) == tokens(want)
    either.close()
