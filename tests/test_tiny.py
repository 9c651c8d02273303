"""The model that ships: a real Qwen2.5-VL, small enough, and made by the script that claims it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmedx_fast._env import prepare_environment

prepare_environment(offline=True)

import torch  # noqa: E402

from mmedx_fast.tiny import assets_folder  # noqa: E402


def test_the_shipped_model_is_a_real_small_qwen2_5_vl() -> None:
    from transformers import AutoModelForImageTextToText, Qwen2_5_VLForConditionalGeneration

    folder = assets_folder()
    assert (folder / "model.safetensors").stat().st_size < 10_000_000
    assert not list(folder.glob("*.py")) and not list(folder.glob("*.bin"))
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    assert type(model) is Qwen2_5_VLForConditionalGeneration
    text = model.config.text_config
    assert 1_000_000 < sum(p.numel() for p in model.parameters()) < 5_000_000
    assert text.num_key_value_heads < text.num_attention_heads
    assert text.hidden_size // text.num_attention_heads == 32
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    assert sum(text.rope_parameters["mrope_section"]) == 16


@pytest.mark.parametrize("side", [112, 224, 448])
def test_the_processor_makes_sixteen_tokens_of_a_square_image(side: int) -> None:
    from PIL import Image
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(assets_folder())
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Well?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    made = processor(text=[text], images=[Image.new("RGB", (side, side))], return_tensors="pt")
    image_token = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert int((made["input_ids"] == image_token).sum()) == 16


def test_any_text_survives_the_tokenizer() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets_folder())
    for text in ("Fever, 38.5 °C; naïve 肺炎\n\ttabs", "plain", "  two  spaces "):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text


@pytest.mark.slow
def test_pretraining_is_deterministic_and_learns(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from mmedx_fast.tiny_pretrain import pretrain

    for name in ("a", "b"):
        pretrain(tmp_path / name, questions=24, read=2, reason=2, lr=2e-3, seed=3)
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert {tensor.dtype for tensor in first.values()} == {torch.bfloat16}
