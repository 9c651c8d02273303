"""How a question becomes tokens: chat layout, image placeholders, and the supervised target.

Layout: system (role and tag contract), user = images + stem + options + answer instruction +
guideline instruction, assistant. The guideline comes LAST, so that [images + question] is a prefix
that all guidelines of a question share, in the engine's prefix cache and in the trainer's packed
row.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
import string
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmedx_fast.config import DataConfig
from mmedx_fast.data.images import load_image
from mmedx_fast.data.records import Record
from mmedx_fast.guidelines import GUIDELINES

if TYPE_CHECKING:
    import torch
    from PIL import Image

SYSTEM_PROMPT = (
    "You are a careful physician. First reason between <think> and </think>, then give the final "
    "answer between <answer> and </answer>. Write nothing else."
)
END_OF_TURN = "<|im_end|>"
IMAGE_TOKEN = "<|image_pad|>"
VISION_TOKENS = (
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    IMAGE_TOKEN,
    "<|video_pad|>",
)
_TAGS = re.compile(r"</?(?:think|answer)>", re.IGNORECASE)


class PromptError(ValueError):
    """A record that cannot be asked or trained on; ``record_id`` names it."""

    def __init__(self, record_id: str, problem: str) -> None:
        super().__init__(f"question {record_id!r}: {problem}")
        self.record_id = record_id


class PromptTooLong(PromptError):
    """A prompt over ``data.max_prompt_length``; ``length`` is its length in tokens, images
    included."""

    def __init__(self, record_id: str, length: int, image_tokens: int, limit: int) -> None:
        super().__init__(
            record_id,
            f"its prompt has {length} tokens ({image_tokens} of them image tokens), more than "
            f"data.max_prompt_length = {limit}; raise that or lower model.max_pixels",
        )
        self.length = length


def banned_token_ids(tokenizer: Any, model_config: Any = None) -> list[int]:
    """Ids that must never be sampled, ascending: image, video and vision-boundary placeholders.

    One of them in a response breaks the model's count of image tokens against image features. Ids
    named by ``model_config`` (an HF Qwen-VL configuration) are added to those of the tokenizer.
    """
    ids = {id for token, id in tokenizer.added_tokens_encoder.items() if token in VISION_TOKENS}
    for name in (
        "image_token_id",
        "video_token_id",
        "vision_start_token_id",
        "vision_end_token_id",
    ):
        value = getattr(model_config, name, None)
        if value is not None:
            ids.add(int(value))
    return sorted(ids)


def stop_token_ids(tokenizer: Any) -> list[int]:
    """Ids that end a response, ascending: ``<|im_end|>``, the tokenizer's EOS and
    ``<|endoftext|>``."""
    ids = {tokenizer.eos_token_id}
    ids |= {tokenizer.added_tokens_encoder.get(token) for token in (END_OF_TURN, "<|endoftext|>")}
    return sorted(id for id in ids if id is not None)


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
    """One record with its images decoded; tokens and pixels are made on first use and kept.

    Made by :meth:`PromptBuilder.question`. ``images`` are RGB; ``image_tokens[i]`` is how many
    tokens image ``i`` takes; ``image_hashes[i]`` identifies its pixels (SHA-256 of size and RGB
    bytes, hex).
    """

    record: Record
    images: tuple[Image.Image, ...]
    image_tokens: tuple[int, ...]
    builder: PromptBuilder = dataclasses.field(repr=False)
    _ids: dict[str | None, list[int]] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def id(self) -> str:
        return self.record.id

    @functools.cached_property
    def image_hashes(self) -> tuple[str, ...]:
        return tuple(
            hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
            for image in self.images
        )

    @functools.cached_property
    def _vision(self) -> dict[str, Any]:
        if not self.images:
            return {"pixel_values": None, "image_grid_thw": None}
        made = self.builder.processor.image_processor(images=list(self.images), return_tensors="pt")
        counts = made["image_grid_thw"].prod(dim=1) // self.builder.merge_length
        if tuple(counts.tolist()) != self.image_tokens:
            raise PromptError(
                self.id,
                f"the image processor made {counts.tolist()} tokens, not {self.image_tokens} as "
                "it announced; the processor files do not belong to this transformers version",
            )
        return {"pixel_values": made["pixel_values"], "image_grid_thw": made["image_grid_thw"]}

    @property
    def pixel_values(self) -> torch.Tensor | None:
        """Patches of all images in order, [patches, channels * temporal * patch * patch] f32."""
        return self._vision["pixel_values"]

    @property
    def image_grid_thw(self) -> torch.Tensor | None:
        """Patches along time, height and width of each image, [images, 3] int64."""
        return self._vision["image_grid_thw"]

    def unexpanded_ids(self, guideline: str | None) -> list[int]:
        """Prompt ids with ONE placeholder per image (what an engine that expands them itself
        takes)."""
        if guideline not in self._ids:
            self._ids[guideline] = self.builder.encode(self.record, guideline)
        return list(self._ids[guideline])

    def prompt_ids(self, guideline: str | None = None) -> list[int]:
        """Prompt ids, every image placeholder expanded as the HF processor does.

        Raises ``PromptTooLong`` over ``data.max_prompt_length``.
        """
        ids: list[int] = []
        counts = iter(self.image_tokens)
        image_token = self.builder.image_token_id
        for id in self.unexpanded_ids(guideline):
            ids.extend([id] * next(counts) if id == image_token else (id,))
        if len(ids) > self.builder.data.max_prompt_length:
            raise PromptTooLong(
                self.id, len(ids), sum(self.image_tokens), self.builder.data.max_prompt_length
            )
        return ids

    def vllm_prompt(self, guideline: str | None = None) -> dict[str, Any]:
        """The same prompt as vLLM takes it (a ``TokensPrompt``); raises as :meth:`prompt_ids`."""
        self.prompt_ids(guideline)
        prompt: dict[str, Any] = {"prompt_token_ids": self.unexpanded_ids(guideline)}
        if self.images:
            prompt["multi_modal_data"] = {"image": list(self.images)}
            # Spares vLLM hashing the pixels again for each guideline.
            prompt["multi_modal_uuids"] = {"image": list(self.image_hashes)}
        return prompt


class PromptBuilder:
    """Turns records into questions, prompts and targets for one processor and data configuration.

    ``processor``: an HF Qwen2-VL or Qwen2.5-VL processor (chat template, tokenizer, image
    processor). ``max_pixels``: larger images are scaled down when loaded; the processor's own
    bounds apply on top.
    """

    def __init__(self, processor: Any, data: DataConfig, max_pixels: int | None = None) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.data = data
        self.max_pixels = max_pixels
        added = self.tokenizer.added_tokens_encoder
        missing = [token for token in (IMAGE_TOKEN, END_OF_TURN) if token not in added]
        if missing:
            raise ValueError(f"the tokenizer has no {missing}: not a Qwen-VL model's tokenizer")
        self.image_token_id: int = added[IMAGE_TOKEN]
        self.end_id: int = added[END_OF_TURN]
        self.merge_length: int = processor.image_processor.merge_size**2
        self.banned_token_ids = banned_token_ids(self.tokenizer)
        self.stop_token_ids = stop_token_ids(self.tokenizer)
        special = {t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special}
        self._special = re.compile("|".join(map(re.escape, sorted(special | set(VISION_TOKENS)))))
        self._system = SYSTEM_PROMPT if data.system_prompt is None else data.system_prompt
        if found := self._special.search(self._system):
            raise ValueError(
                f"data.system_prompt holds the special token {found.group()}; remove it"
            )

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        data: DataConfig,
        max_pixels: int | None = None,
        *,
        offline: bool = True,
        trust_remote_code: bool = False,
    ) -> PromptBuilder:
        """Load the processor that lies in a model folder (or, online, a hub name)."""
        from mmedx_fast._env import prepare_environment

        prepare_environment(offline=offline)
        from transformers import AutoProcessor

        try:
            processor = AutoProcessor.from_pretrained(
                str(folder), local_files_only=offline, trust_remote_code=trust_remote_code
            )
        except OSError as error:
            raise ValueError(f"{folder}: no usable processor there ({error})") from error
        return cls(processor, data, max_pixels)

    def question(self, record: Record) -> Question:
        """Open the record's images. Raises ``ImageError`` or ``PromptError``, naming image or
        record."""
        if len(record.images) > len(string.ascii_uppercase):
            raise PromptError(record.id, f"{len(record.images)} images; at most 26 can be labelled")
        images = tuple(load_image(ref, max_pixels=self.max_pixels) for ref in record.images)
        count = self.processor.image_processor.get_number_of_image_patches
        tokens = tuple(count(image.height, image.width) // self.merge_length for image in images)
        return Question(record, images, tokens, self)

    def messages(self, record: Record, guideline: str | None = None) -> list[dict[str, Any]]:
        """The chat as the HF template takes it."""
        content: list[dict[str, str]] = []
        for letter, _ in zip(string.ascii_uppercase, record.images, strict=False):
            if len(record.images) > 1:
                content += [{"type": "text", "text": f"Figure {letter}: "}, {"type": "image"}]
                content.append({"type": "text", "text": "\n"})
            else:
                content.append({"type": "image"})
        content.append({"type": "text", "text": self._user_text(record, guideline)})
        return [
            {"role": "system", "content": [{"type": "text", "text": self._system}]},
            {"role": "user", "content": content},
        ]

    def encode(self, record: Record, guideline: str | None) -> list[int]:
        """Prompt ids with one placeholder per image. Raises ``PromptError`` on special tokens in
        the text."""
        text = self.processor.apply_chat_template(
            self.messages(record, guideline), tokenize=False, add_generation_prompt=True
        )
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids.count(self.image_token_id) != len(record.images):
            raise PromptError(
                record.id,
                f"the chat template made {ids.count(self.image_token_id)} image placeholders for "
                f"{len(record.images)} images; the model folder's chat template must place images",
            )
        return ids

    def target_text(self, record: Record, guideline: str | None = None) -> str:
        """``<think>`` trace ``</think>`` and ``<answer>``: what the model is trained to say.

        ``guideline`` None takes the trace of no particular guideline (key ``""``). Raises
        ``PromptError`` when the record has no such trace, holds the tags itself, or lacks a label
        for letter answers.
        """
        trace = record.reasoning.get(guideline or "", "").strip()
        if not trace:
            raise PromptError(
                record.id,
                f"no reasoning for guideline {guideline!r}; it has {sorted(record.reasoning)}",
            )
        answer = record.answer
        if self.data.answer_format == "letter" and record.options:
            if record.answer_label not in record.options:
                raise PromptError(
                    record.id,
                    f"its answer label {record.answer_label!r} is none of {list(record.options)}, "
                    "which letter answers need; set data.answer_format=text or repair the row",
                )
            answer = record.answer_label
        for name, text in (("reasoning", trace), ("answer", answer)):
            if found := _TAGS.search(text):
                raise PromptError(record.id, f"its {name} holds the tag {found.group()}; remove it")
            self._refuse_special(record, name, text)
        return f"<think>\n{trace}\n</think>\n<answer>{answer}</answer>"

    def response_ids(self, text: str) -> list[int]:
        """Tokens of a response, ending with ``<|im_end|>``. Raises ValueError on special tokens in
        it."""
        if found := self._special.search(text):
            raise ValueError(f"the response holds the special token {found.group()}; remove it")
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.end_id]

    def _user_text(self, record: Record, guideline: str | None) -> str:
        lines = [record.question.strip()]
        if record.options:
            lines.append("Options:")
            lines += [f"{label}. {text}" for label, text in record.options.items()]
        for line in lines:
            self._refuse_special(record, "question or options", line)
        lines += ["", self._answer_instruction(record)]
        if guideline is not None:
            if guideline not in GUIDELINES:
                raise ValueError(f"unknown guideline {guideline!r}; choose from {list(GUIDELINES)}")
            lines += ["", GUIDELINES[guideline].instruction]
        return "\n".join(lines)

    def _answer_instruction(self, record: Record) -> str:
        if record.options:
            what = "letter" if self.data.answer_format == "letter" else "full text"
            return f"Answer with the {what} of the one right option inside <answer> </answer>."
        if record.answer_type == "yesno":
            return "Answer yes or no inside <answer> </answer>."
        return "Answer with a short phrase inside <answer> </answer>."

    def _refuse_special(self, record: Record, where: str, text: str) -> None:
        if found := self._special.search(text):
            raise PromptError(
                record.id,
                f"its {where} holds the special token {found.group()}, which the model would take "
                "for a control token; remove it from the text",
            )
