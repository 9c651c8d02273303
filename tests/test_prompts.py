"""Prompts: equal to the HF processor's, guideline last, placeholders safe, targets well formed."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from msgspec.structs import replace

from mmedx_fast.config import DataConfig
from mmedx_fast.data.records import GUIDELINE_NAMES, ImageRef, Record
from mmedx_fast.guidelines import GUIDELINES
from mmedx_fast.prompts import (
    PromptBuilder,
    PromptError,
    PromptTooLong,
    banned_token_ids,
    stop_token_ids,
)
from mmedx_fast.tiny import save_processor, train_tokenizer

CORPUS = [
    "A child limps since two weeks. Which diagnosis fits?\nOptions:\nA. rickets\nB. fracture",
    "Answer with the letter of the one right option inside <answer> </answer>.",
    *(guideline.instruction for guideline in GUIDELINES.values()),
]


def picture(seed: int = 0, size: tuple[int, int] = (90, 130)) -> ImageRef:
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return ImageRef(data=buffer.getvalue())


def record(pictures: int = 1, **changes: object) -> Record:
    made = Record(
        id="q1",
        dataset="test",
        split="train",
        images=tuple(picture(seed) for seed in range(pictures)),
        question="A child limps since two weeks. Which diagnosis fits?",
        options={"A": "rickets", "B": "fracture", "C": "scurvy"},
        answer_label="B",
        answer="fracture",
        reasoning={name: f"The {name} way leads to a fracture." for name in GUIDELINE_NAMES},
    )
    return replace(made, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("processor")
    train_tokenizer(CORPUS, path)
    save_processor(path)
    return path


@pytest.fixture(scope="module")
def varying(folder, tmp_path_factory):
    """The same processor, with room for images of several sizes."""
    import shutil

    path = tmp_path_factory.mktemp("varying")
    shutil.copytree(folder, path, dirs_exist_ok=True)
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (path / name).exists():
            text = json.loads((path / name).read_text())
            part = text.get("image_processor", text)
            part["size"] = {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 64}
            (path / name).write_text(json.dumps(text))
    return path


def builder(folder, max_pixels: int | None = None, **data: object) -> PromptBuilder:
    return PromptBuilder.from_folder(folder, DataConfig(**data), max_pixels)


def common_prefix(a: list[int], b: list[int]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


@pytest.mark.parametrize("images", [0, 1, 2, 3])
@pytest.mark.parametrize("guideline", [None, "bayesian"])
def test_ids_and_pixels_equal_the_hf_processor(varying, images, guideline):
    import torch

    made = builder(varying)
    sizes = [(90, 130), (300, 57), (112, 112)]
    refs = tuple(picture(i, sizes[i]) for i in range(images))
    question = made.question(record(images=refs))
    text = made.processor.apply_chat_template(
        made.messages(question.record, guideline), tokenize=False, add_generation_prompt=True
    )
    want = made.processor(text=[text], images=list(question.images) or None, return_tensors="pt")
    assert question.prompt_ids(guideline) == want["input_ids"][0].tolist()
    if images:
        torch.testing.assert_close(question.pixel_values, want["pixel_values"], rtol=0, atol=0)
        assert torch.equal(question.image_grid_thw, want["image_grid_thw"])
        assert len(set(question.image_tokens)) == images
    else:
        assert question.pixel_values is None and question.image_grid_thw is None
        assert made.image_token_id not in question.prompt_ids(guideline)


def test_max_pixels_scales_down_before_the_processor(varying):
    big = record(images=(picture(0, (400, 400)),))
    free, bounded = builder(varying).question(big), builder(varying, 28 * 28 * 9).question(big)
    assert bounded.image_tokens[0] <= 9 < free.image_tokens[0]
    assert (
        len(free.prompt_ids()) - len(bounded.prompt_ids())
        == free.image_tokens[0] - bounded.image_tokens[0]
    )


def test_guidelines_share_image_and_question_and_differ_after(folder):
    made = builder(folder)
    question = made.question(record(2))
    prompts = {name: question.prompt_ids(name) for name in GUIDELINE_NAMES}
    tail = {name: len(made.response_ids("\n\n" + GUIDELINES[name].instruction)) for name in prompts}
    end_of_turn = len(made.tokenizer("<|im_end|>\n<|im_start|>assistant\n")["input_ids"])
    for name, ids in prompts.items():
        for other, other_ids in prompts.items():
            if name != other:
                shared = common_prefix(ids, other_ids)
                # All but the instruction itself (+2: merges across the border) is shared.
                assert shared >= len(ids) - tail[name] - end_of_turn - 2
                assert shared > 16 * 2
                last_image = len(ids) - 1 - ids[::-1].index(made.image_token_id)
                assert shared > last_image


def test_layout_reads_in_order(folder):
    made = builder(folder)
    text = made.tokenizer.decode(made.question(record(2)).unexpanded_ids("analytic"))
    pieces = [
        "<|im_start|>system",
        "<think>",
        "<|im_start|>user",
        "Figure A: <|vision_start|><|image_pad|><|vision_end|>",
        "Figure B: <|vision_start|><|image_pad|><|vision_end|>",
        "A child limps",
        "Options:\nA. rickets\nB. fracture\nC. scurvy",
        "Answer with the letter",
        GUIDELINES["analytic"].instruction + "<|im_end|>",
    ]
    places = [text.index(piece) for piece in pieces]
    assert places == sorted(places)
    assert text.endswith("<|im_start|>assistant\n")
    assert "Figure A" not in made.tokenizer.decode(made.question(record(1)).unexpanded_ids(None))


@pytest.mark.parametrize(
    ("changes", "answer_format", "words"),
    [
        ({}, "letter", "Answer with the letter"),
        ({}, "text", "Answer with the full text"),
        ({"options": None, "answer_type": "yesno"}, "letter", "Answer yes or no"),
        ({"options": None, "answer_type": "open"}, "letter", "short phrase"),
    ],
)
def test_answer_instruction_fits_the_question(folder, changes, answer_format, words):
    made = builder(folder, answer_format=answer_format)
    assert words in made.tokenizer.decode(made.question(record(**changes)).prompt_ids())


def test_system_prompt_can_be_replaced(folder):
    made = builder(folder, system_prompt="Be brief.")
    text = made.tokenizer.decode(made.question(record()).prompt_ids())
    assert "Be brief." in text and "careful physician" not in text
    with pytest.raises(ValueError, match="data.system_prompt.*image_pad"):
        builder(folder, system_prompt="look: <|image_pad|>")


def test_vllm_prompt_has_one_placeholder_per_image(folder):
    made = builder(folder)
    question = made.question(record(2))
    prompt = question.vllm_prompt("bayesian")
    assert prompt["prompt_token_ids"].count(made.image_token_id) == 2
    assert [image.size for image in prompt["multi_modal_data"]["image"]] == [(90, 130)] * 2
    again = made.question(record(2)).vllm_prompt(None)["multi_modal_uuids"]["image"]
    assert prompt["multi_modal_uuids"]["image"] == again and len(set(again)) == 2
    assert set(made.question(record(0)).vllm_prompt(None)) == {"prompt_token_ids"}


@pytest.mark.parametrize(("answer_format", "answer"), [("letter", "B"), ("text", "fracture")])
def test_target_text_follows_the_tag_contract(folder, answer_format, answer):
    made = builder(folder, answer_format=answer_format)
    target = made.target_text(record(), "analytic")
    assert target == (
        f"<think>\nThe analytic way leads to a fracture.\n</think>\n<answer>{answer}</answer>"
    )
    ids = made.response_ids(target)
    assert ids[-1] == made.end_id and ids[-1] in made.stop_token_ids
    assert made.tokenizer.decode(ids[:-1]) == target


def test_target_without_a_guideline_takes_the_general_trace(folder):
    made = builder(folder)
    general = record(reasoning={"": "Seen at once."})
    assert "Seen at once." in made.target_text(general)
    with pytest.raises(PromptError, match="'q1'.*no reasoning for guideline 'bayesian'"):
        made.target_text(general, "bayesian")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reasoning": {"": "done </think> no"}}, "reasoning holds the tag </think>"),
        ({"reasoning": {"": "see <|image_pad|>"}}, "reasoning holds the special token"),
        ({"reasoning": {"": "fine"}, "answer_label": None}, "answer label None.*answer_format"),
        ({"reasoning": {"": "fine"}, "answer_label": "Z"}, "answer label 'Z' is none of"),
    ],
)
def test_bad_targets_are_refused_by_name(folder, changes, message):
    with pytest.raises(PromptError, match=f"'q1'.*{message}"):
        builder(folder).target_text(record(**changes))


@pytest.mark.parametrize(
    "token", ["<|image_pad|>", "<|vision_start|>", "<|im_end|>", "<|video_pad|>"]
)
@pytest.mark.parametrize("where", ["question", "options"])
def test_special_tokens_in_the_text_are_refused(folder, token, where):
    text = f"before {token} after"
    bad = record(**({"question": text} if where == "question" else {"options": {"A": text}}))
    with pytest.raises(PromptError, match=r"'q1'.*special token <\|") as caught:
        builder(folder).question(bad).prompt_ids()
    assert caught.value.record_id == "q1"


def test_response_with_a_special_token_is_refused(folder):
    with pytest.raises(ValueError, match="special token"):
        builder(folder).response_ids("a <|im_end|> b")


def test_too_long_prompt_names_id_length_and_key(folder):
    question = builder(folder).question(record(2))
    length = len(question.prompt_ids("bayesian"))
    builder(folder, max_prompt_length=length).question(record(2)).prompt_ids("bayesian")
    short = builder(folder, max_prompt_length=length - 1).question(record(2))
    for ask in (short.prompt_ids, short.vllm_prompt):
        with pytest.raises(
            PromptTooLong,
            match=rf"'q1'.*{length} tokens \({sum(short.image_tokens)} .*data.max_prompt_length",
        ) as caught:
            ask("bayesian")
        assert caught.value.length == length and caught.value.record_id == "q1"


def test_unknown_guideline_and_missing_image(folder, tmp_path):
    made = builder(folder)
    with pytest.raises(ValueError, match="unknown guideline 'astrology'.*bayesian"):
        made.question(record()).prompt_ids("astrology")
    with pytest.raises(ValueError, match="gone.png"):
        made.question(record(images=(ImageRef(path=tmp_path / "gone.png"),)))


def test_banned_and_stop_ids(folder):
    tokenizer = builder(folder).tokenizer
    names = [
        "<|vision_start|>",
        "<|vision_end|>",
        "<|vision_pad|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ]
    assert banned_token_ids(tokenizer) == sorted(tokenizer.convert_tokens_to_ids(names))
    stops = stop_token_ids(tokenizer)
    assert stops == sorted(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    assert not set(stops) & set(banned_token_ids(tokenizer))


def test_folder_without_a_processor_is_named(tmp_path):
    with pytest.raises(ValueError, match=str(tmp_path)):
        builder(tmp_path)
