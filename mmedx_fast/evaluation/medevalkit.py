"""Prompts in MedEvalKit's words, for results that stand beside those of other papers.

After ``utils/question_formats.py`` and ``models/Qwen2_5_VL`` of github.com/alibaba-damo-academy/MedEvalKit (without
its reasoning variant): no system prompt of its own (the chat template adds the model's), no guideline, no tags.
One difference stays: MedXpertQA's stems repeat their options there, here the loader has cut that off.
"""

from __future__ import annotations

from typing import Any

from mmedx_fast.data.records import Record
from mmedx_fast.prompts import PromptBuilder

_CHOICE = {
    "en": "Answer with the option's letter from the given choices directly.",
    "zh": "请直接使用给定选项中的选项字母来回答该问题。",
}
_LABELS = {"en": ("Question: ", "Options: "), "zh": ("问题： ", "选项： ")}
_TEXT = {
    "yesno": {
        "en": "Please output 'yes' or 'no'(no extra output).",
        "zh": "请输出'是'或'否'(不要有任何其它输出)。",
    },
    "closed": {
        "en": "Answer the question using a single word or phrase.",
        "zh": "请用一个单词或者短语回答该问题。",
    },
    "open": {"en": "Please answer the question concisely.", "zh": "请简要回答该问题。"},
}


class MedEvalKitPrompts(PromptBuilder):
    """A :class:`mmedx_fast.prompts.PromptBuilder` for asking only, never for training."""

    def messages(self, record: Record, guideline: str | None = None) -> list[dict[str, Any]]:
        """The chat as the HF template takes it. Raises ValueError for a guideline, which it has no place for."""
        if guideline is not None:
            raise ValueError(f"MedEvalKit's prompt has no guideline, asked for {guideline!r}")
        content: list[dict[str, str]] = []
        # Its MedXpertQA task passes lists of images, which are numbered even when there is one.
        numbered = len(record.images) > 1 or record.dataset == "medxpertqa"
        for number in range(1, len(record.images) + 1):
            if numbered:
                content.append({"type": "text", "text": f"<image_{number}>: "})
            content.append({"type": "image"})
        content.append({"type": "text", "text": self._user_text(record, None)})
        return [{"role": "user", "content": content}]

    def _user_text(self, record: Record, guideline: str | None) -> str:
        language = "zh" if record.meta.get("q_lang") == "zh" else "en"
        if record.options:
            options = [f"{label}. {text}" for label, text in record.options.items()]
            question, heading = _LABELS[language]
            lines = [f"\n{question}{record.question}", heading, *options, _CHOICE[language]]
        else:
            lines = [record.question, _TEXT[_kind(record)][language]]
        for line in lines:
            self._refuse_special(record, "question or options", line)
        return "\n".join(lines)


def _kind(record: Record) -> str:
    if record.dataset == "slake" and record.answer_type == "yesno":
        return "closed"  # its SLAKE task tells open from closed only
    return record.answer_type if record.answer_type in _TEXT else "open"
