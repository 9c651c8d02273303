"""The measured whole step: its model is what it says, and its numbers come from the run."""

import json
from pathlib import Path

import pytest
import torch

from bench import end_to_end

SIZES = dict(H=64, I=96, L=1, A=4, KV=2, V=1700, VD=2, VH=32, VI=48, VA=2, rank=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    end_to_end.write_model(folder, torch.device("cpu"), SIZES)
    return folder


def test_the_vocabulary_is_full_and_encodes_as_before(model: Path) -> None:
    from transformers import AutoTokenizer

    from mmedx_fast.tiny import assets_folder

    filled = AutoTokenizer.from_pretrained(model)
    tiny = AutoTokenizer.from_pretrained(assets_folder())
    assert len(filled) == SIZES["V"] > len(tiny)
    text = "<|vision_start|><|image_pad|><|vision_end|>A 45-year-old man ~1600 has a cough."
    assert filled(text).input_ids == tiny(text).input_ids
    assert all(filled.decode([i]) for i in range(len(tiny), SIZES["V"]))


def test_the_model_knows_the_tokenizer_s_image_token(model: Path) -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

    config = AutoConfig.from_pretrained(model)
    assert config.text_config.vocab_size == SIZES["V"]
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    loaded = AutoModelForImageTextToText.from_pretrained(model)
    assert loaded.lm_head.weight.shape == (SIZES["V"], SIZES["H"])


def test_images_are_enlarged_in_place(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "images").mkdir()
    Image.new("L", (10, 12)).save(tmp_path / "images" / "a.png")
    end_to_end.enlarge(tmp_path, 56)
    with Image.open(tmp_path / "images" / "a.png") as image:
        assert image.size == (56, 56) and image.mode == "RGB"


def test_the_document_holds_means_of_all_but_the_first_step(tmp_path: Path) -> None:
    options = end_to_end.parser().parse_args(["--model", "tiny"])
    folder = tmp_path / "gba"
    folder.mkdir()
    steps = [
        {"step": i, "time": 0.0, "seconds/rollout": s, "seconds/train": 2 * s, "tokens_saved": 3.0,
         "completions/mean_length": 20.0}
        for i, s in ((1, 100.0), (2, 3.0), (3, 5.0))
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    (folder / "done.json").write_text('{"result": {"reward": 0.5}}')
    data = end_to_end._document(options, ["gba.questions_per_step=2"], tmp_path)
    assert data["steps"] == 2 and data["measured"]["seconds/rollout"] == 4.0
    assert data["measured"]["gpu_hours_per_1000_samples"] == pytest.approx(12 / 2 * 1000 / 3600)
    assert data["planned"]["seconds/train"] > 0
    ratio = data["measured_over_planned"]["seconds/train"]
    assert ratio == pytest.approx(8.0 / data["planned"]["seconds/train"])
    assert "12" in end_to_end.text(data) or "8" in end_to_end.text(data)


@pytest.mark.parametrize("wrong", [["--steps", "1"], ["steps"], ["--nonsense"]])
def test_bad_arguments_end_before_anything_is_made(wrong: list[str], capsys) -> None:
    assert end_to_end.main(wrong) == 2
    assert capsys.readouterr().err
