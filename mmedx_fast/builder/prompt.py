"""What the teacher is told: the training prompt's layout, so that its traces answer the same question.

System (role and tag contract), then images, stem, options, answer instruction, further instruction, and
the guideline LAST: all guidelines of a question share the prefix that the server has cached.
"""

from __future__ import annotations

import string
from typing import Any

from mmedx_fast.builder.config import TeacherConfig
from mmedx_fast.data.records import Record
from mmedx_fast.guidelines import GUIDELINES
from mmedx_fast.prompts import SYSTEM_PROMPT

Part = dict[str, Any]


def teacher_messages(record: Record, guideline: str, cfg: TeacherConfig) -> list[dict[str, Any]]:
    """The chat: parts ``{"type": "text", "text"}`` and ``{"type": "image"}``, images in order."""
    content: list[Part] = []
    for letter, _ in zip(string.ascii_uppercase, record.images, strict=False):
        if len(record.images) > 1:
            content += [_text(f"Figure {letter}: "), {"type": "image"}, _text("\n")]
        else:
            content.append({"type": "image"})
    content.append(_text(_user_text(record, guideline, cfg)))
    system = SYSTEM_PROMPT if cfg.system_prompt is None else cfg.system_prompt
    return [
        {"role": "system", "content": [_text(system)]},
        {"role": "user", "content": content},
    ]


def _text(text: str) -> Part:
    return {"type": "text", "text": text}


def _user_text(record: Record, guideline: str, cfg: TeacherConfig) -> str:
    lines = [record.question.strip()]
    if record.options:
        lines.append("Options:")
        lines += [f"{label}. {text}" for label, text in record.options.items()]
    lines += ["", _answer_instruction(record, cfg)]
    if cfg.reveal_answer:
        lines += ["", _revealed(record)]
    if cfg.extra_instruction.strip():
        lines += ["", cfg.extra_instruction.strip()]
    lines += ["", GUIDELINES[guideline].instruction]
    return "\n".join(lines)


def _answer_instruction(record: Record, cfg: TeacherConfig) -> str:
    if record.options:
        what = "letter" if cfg.answer_format == "letter" else "full text"
        return f"Answer with the {what} of the one right option inside <answer> </answer>."
    if record.answer_type == "yesno":
        return "Answer yes or no inside <answer> </answer>."
    return "Answer with a short phrase inside <answer> </answer>."


def _revealed(record: Record) -> str:
    gold = f"{record.answer_label}. {record.answer}" if record.answer_label else record.answer
    return (
        f"For you alone: the right answer is {gold}. Reason towards it from the images and the history "
        "only, as if you had not been told, and never mention that you were."
    )
