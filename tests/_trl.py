"""Trainers and batches for tests of the TRL integration: the shipped tiny VLM and a text model of one layer."""

from __future__ import annotations

import functools
import tempfile
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from PIL import Image

from mmedx_fast.integrations._trl_head import attached
from mmedx_fast.integrations.trl import use_fused_head
from mmedx_fast.tiny import assets_folder

# No test here generates with vLLM, and importing it takes longer than all of them.
with mock.patch("trl.import_utils.is_vllm_available", lambda *_, **__: False):
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

PROMPT, COMPLETION, ROWS = 9, 6, 4
LORA = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": r"(?!.*visual).*(q_proj|v_proj|down_proj)",
    "init_lora_weights": False,
    "lora_dropout": 0.0,
}


@functools.cache
def processor() -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(assets_folder(), padding_side="left")


def text_model(**config: Any) -> Any:
    """A Qwen2 of one layer with the shipped vocabulary, peaky enough for ratios that clip. Loaded from a folder,
    from which TRL takes its reference."""
    from transformers import Qwen2ForCausalLM

    return Qwen2ForCausalLM.from_pretrained(_saved(**config).name, dtype=torch.float32)


@functools.cache
def _saved(**config: Any) -> tempfile.TemporaryDirectory:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    folder = tempfile.TemporaryDirectory()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False}
    vocab = len(processor().tokenizer)
    options = {"vocab_size": vocab, "initializer_range": 0.3, **sizes, **heads, **config}
    Qwen2ForCausalLM(Qwen2Config(**options)).save_pretrained(Path(folder.name))
    return folder


def vlm_model(seed: int = 0) -> Any:
    from transformers import Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(seed)
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(assets_folder(), dtype=torch.float32)


def with_lora(model: Any, seed: int = 1, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(**{**LORA, **options}))


def lora_model() -> Any:
    return with_lora(text_model())


def with_prompt(model: Any) -> Any:
    """Three trained virtual tokens before every prompt."""
    from peft import PromptTuningConfig, get_peft_model

    torch.manual_seed(2)
    return get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


def moe_model() -> Any:
    """Two of three experts a token, with a load-balancing loss."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"num_experts": 3, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.1}
    vocab = len(processor().tokenizer)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=vocab, **sizes, **heads, **experts))


def config(folder: Any, **options: Any) -> Any:
    given: dict[str, Any] = {
        "per_device_train_batch_size": ROWS,
        "num_generations": ROWS,
        "max_completion_length": COMPLETION,
        "learning_rate": 1e-2,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 7,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return GRPOConfig(output_dir=str(folder), **{**given, **options})


def length_reward(completions: Any, **_: Any) -> list[float]:
    """Something that differs between completions of any kind."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [len(set(text)) / 10 for text in texts]


def trainer(model: Any, args: Any, cls: Any = None, **options: Any) -> Any:
    from datasets import Dataset

    rows = {"prompt": ["a b c", "fever", "what is it", "cough"]}
    options.setdefault("train_dataset", Dataset.from_dict(rows))
    options.setdefault("reward_funcs", length_reward)
    options.setdefault("processing_class", processor().tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = (cls or GRPOTrainer)(model=model, args=args, **options)
    # What Trainer.train sets on its first step.
    made.current_gradient_accumulation_steps = args.gradient_accumulation_steps
    return made


def batch(made: Any, seed: int = 0, *, images: bool = False, **given: Any) -> dict[str, Any]:
    """What ``_generate_and_score_completions`` hands to the loss: left-padded prompts, completions of uneven
    length, one of them empty of counted tokens, and log-probs near the model's own so that some ratios clip."""
    g = torch.Generator().manual_seed(seed)
    prompt = torch.randint(10, 200, (ROWS, PROMPT), generator=g)
    prompt_mask = torch.ones_like(prompt)
    extra: dict[str, Any] = {}
    if images:
        extra = _images()
        prompt = torch.cat([extra.pop("ids"), prompt], 1)
        prompt_mask = torch.ones_like(prompt)
    else:
        prompt_mask[1, :4] = 0
    completion = torch.randint(10, 200, (ROWS, COMPLETION), generator=g)
    mask = torch.ones_like(completion)
    mask[0, 3:], mask[2, 5:] = 0, 0
    if given.pop("truncated", False):
        mask[3] = 0
    advantages = torch.tensor([1.3, -0.7, 0.4, -1.0])
    out = {
        "prompt_ids": prompt,
        "prompt_mask": prompt_mask,
        "completion_ids": completion,
        "completion_mask": mask,
        "advantages": advantages,
        "num_items_in_batch": mask.sum() + 5,
        **extra,
    }
    if images:
        types = extra["mm_token_type_ids"]
        out["mm_token_type_ids"] = torch.cat([types, types.new_zeros(completion.shape)], 1)
    logps = own_logprobs(made, out)
    for name, spread in (
        ("old_per_token_logps", 0.3),
        ("ref_per_token_logps", 0.4),
        ("sampling_per_token_logps", 0.5),
    ):
        if given.pop(name.partition("_")[0], name.startswith("old")):
            out[name] = logps + spread * torch.randn(logps.shape, generator=g)
    return {**out, **given}


def own_logprobs(made: Any, out: dict[str, Any]) -> torch.Tensor:
    """[B, C] log-probs of the completions, as this trainer scores them."""
    ids = torch.cat([out["prompt_ids"], out["completion_ids"]], 1)
    attention = torch.cat([out["prompt_mask"], out["completion_mask"]], 1)
    names = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
    given = {name: out[name] for name in names if name in out}
    with torch.no_grad():
        return made._get_per_token_logps_and_entropies(
            made.model, ids, attention, out["completion_ids"].shape[1], **given
        )[0]


@functools.cache
def pictures() -> tuple[Any, ...]:
    return tuple(Image.new("RGB", (112, 112), (40 * i, 90, 200 - 40 * i)) for i in range(ROWS))


def _images() -> dict[str, Any]:
    marks = "<|vision_start|><|image_pad|><|vision_end|>"
    made = processor()(
        images=[[image] for image in pictures()], text=[marks] * ROWS, return_tensors="pt"
    )
    types = torch.cat([made["mm_token_type_ids"], torch.zeros(ROWS, PROMPT, dtype=torch.long)], 1)
    return {
        "ids": made["input_ids"],
        "pixel_values": made["pixel_values"],
        "image_grid_thw": made["image_grid_thw"],
        "num_images": [1] * ROWS,
        "mm_token_type_ids": types,
    }


def measured(made: Any, given: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any], dict]:
    """Loss, gradients by parameter name and metrics of one ``compute_loss``; leaves none of them behind."""
    made._metrics["train"].clear()
    made.model.train()
    loss = made.compute_loss(made.model, given)
    loss.backward()
    names = made.model.named_parameters()
    grads = {name: p.grad.clone() for name, p in names if p.grad is not None}
    made.model.zero_grad(set_to_none=True)
    metrics = {name: list(values) for name, values in made._metrics["train"].items()}
    made._metrics["train"].clear()
    return loss.detach(), grads, metrics


def inner(made: Any) -> Any:
    """The model whose forward is replaced."""
    base = getattr(made.model, "get_base_model", None)
    return made.model if base is None else base()


def pair(tmp_path: Any, make: Any = text_model, **options: Any) -> tuple[Any, Any]:
    """TRL's trainer and one with our head, around models of the same weights."""
    stock = trainer(make(), config(tmp_path, **options))
    fused = use_fused_head(trainer(make(), config(tmp_path, **options)))
    for made in (stock, fused):
        made._metrics["train"].clear()
    assert attached(inner(fused)) is not None and attached(inner(stock)) is None
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


def prepare(stock: Any, wanted: dict[str, Any], **more: Any) -> dict[str, Any]:
    wanted = {**wanted, **more}
    ratio, tools = wanted.pop("ratio", None), wanted.pop("tool_mask", False)
    given = batch(stock, **wanted)
    shape = given["completion_ids"].shape
    if ratio is not None:
        weights = torch.rand(shape, generator=torch.Generator().manual_seed(3)) + 0.5
        given["importance_sampling_ratio"] = weights if ratio == "token" else weights[:, :1]
    if tools:
        given["tool_mask"] = torch.ones(shape, dtype=torch.long)
        given["tool_mask"][:, 1] = 0
    return given
