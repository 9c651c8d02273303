"""Makes the base weights of the tiny model: ``python -m mmedx_fast.tiny_pretrain --out FOLDER``.

Supervised training of all weights on phantom-clinic questions whose diagnosis is drawn at random from the options: the
model learns to read the prompt, to name and score what image and vignette show, and the four forms of reasoning,
but not what a score means, so that its diagnoses stay near chance. The weights in ``mmedx_fast/assets`` were made by
this command with its defaults; they are stored in bfloat16.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from mmedx_fast.config import DataConfig
from mmedx_fast.data.phantom import pretraining_corpus
from mmedx_fast.data.records import GUIDELINE_NAMES, Record
from mmedx_fast.tiny import assets_folder, build_tiny

DATA = DataConfig(answer_format="text")


def corpus_texts(records: list[Record]) -> list[str]:
    """Every text the tokenizer should know: prompts of both answer formats, and targets."""
    from mmedx_fast.guidelines import GUIDELINES
    from mmedx_fast.prompts import SYSTEM_PROMPT

    texts = [
        SYSTEM_PROMPT,
        "Answer with the letter of the one right option inside <answer> </answer>.",
    ]
    for record in records:
        options = "\n".join(f"{letter}. {text}" for letter, text in (record.options or {}).items())
        texts.append(f"system\nuser\nassistant\n{record.question}\nOptions:\n{options}\n")
        texts.append("Answer with the full text of the one right option inside <answer> </answer>.")
        for name in GUIDELINE_NAMES:
            texts.append(GUIDELINES[name].instruction)
            texts.append(
                f"<think>\n{record.reasoning[name]}\n</think>\n<answer>{record.answer}</answer>"
            )
    return texts


def make_rows(
    builder: Any, questions: list[Any], rope: Any, guidelines: int, first_sentence: bool, step: int
) -> list[Any]:
    """Packed rows of one step: each question with ``guidelines`` of its traces (which, turns with the step),
    whole or only their first sentence (what image and vignette show)."""
    from mmedx_fast.planner import plan_rows
    from mmedx_fast.tree import Branch, Tree

    trees = []
    for number, question in enumerate(questions):
        branches = []
        for k in range(guidelines):
            name = GUIDELINE_NAMES[(number + step + k) % len(GUIDELINE_NAMES)]
            text = builder.target_text(question.record, name)
            ids = builder.response_ids(text)
            if first_sentence:
                head = text[: text.index(".") + 1]
                ids = builder.tokenizer(head, add_special_tokens=False)["input_ids"]
            branches.append(Branch(question.prompt_ids(name), ids))
        trees.append(Tree(tuple(branches), question.pixel_values, question.image_grid_thw))
    return [plan.pack(rope) for plan in plan_rows(trees, 2048)]


def row_loss(model: Any, row: Any) -> Any:
    """Summed negative log-likelihood of a row's targets."""
    import torch

    from mmedx_fast.attention import forward_arguments

    logits = model(
        input_ids=row.input_ids[None],
        position_ids=row.position_ids[:, None],
        pixel_values=row.pixel_values,
        image_grid_thw=row.image_grid_thw,
        use_cache=False,
        logits_to_keep=row.pred_index,
        **forward_arguments("varlen", row.end, row.segments, None),
    ).logits
    return torch.nn.functional.cross_entropy(logits[0], row.targets, reduction="sum")


def pretrain(folder: Path, *, questions: int, read: int, reason: int, lr: float, seed: int) -> None:
    """Build the tiny model in ``folder`` and train all its weights; prints the loss as it goes.

    ``read`` steps of 32 questions, first sentences only (many images a step: this is where the vision tower
    learns), then ``reason`` steps of 16 questions with two whole traces each.
    """
    from mmedx_fast._env import prepare_environment

    prepare_environment(offline=True)
    import torch
    from transformers import AutoModelForImageTextToText

    from mmedx_fast.attention import set_backend
    from mmedx_fast.prompts import PromptBuilder
    from mmedx_fast.stages.context import batches
    from mmedx_fast.tree import RopeIndex

    records = pretraining_corpus(questions, seed)
    build_tiny(folder, corpus_texts(records[:800]), seed)
    builder = PromptBuilder.from_folder(folder, DATA)
    asked = [builder.question(record) for record in records]
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    set_backend(model, "varlen")
    rope = RopeIndex.of(model.config)
    model.train()
    steps, warmup = read + reason, 20
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / warmup) * max(0.02, 1 - s / steps)
    )
    order = [
        *batches(len(asked), 32, read, (seed, "read")),
        *batches(len(asked), 16, reason, (seed, "reason")),
    ]
    for step, picked in enumerate(order):
        reading = step < read
        batch = [asked[i] for i in picked]
        rows = make_rows(builder, batch, rope, 1 if reading else 2, reading, step)
        tokens = sum(len(row.targets) for row in rows)
        total = 0.0
        for row in rows:
            loss = row_loss(model, row) / tokens
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 10 == 9 or step + 1 == steps:
            print(f"step {step + 1}/{steps}  loss {total:.4f}", file=sys.stderr, flush=True)
        if step % 50 == 49 or step + 1 == steps:
            save(model, folder)


def save(model: Any, folder: Path) -> None:
    """Write the weights in bfloat16 without touching the model being trained."""
    import torch

    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=assets_folder())
    parser.add_argument("--questions", type=int, default=1600)
    parser.add_argument("--read", type=int, default=200, help="steps on first sentences")
    parser.add_argument("--reason", type=int, default=250, help="steps on whole traces")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    pretrain(a.out, questions=a.questions, read=a.read, reason=a.reason, lr=a.lr, seed=a.seed)


if __name__ == "__main__":
    main()
