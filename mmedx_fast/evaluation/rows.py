"""One line of ``predictions.jsonl``: a question, what was answered, and how it was scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmedx_fast.data.fields import image_findings
from mmedx_fast.data.records import Record
from mmedx_fast.evaluation.votes import majority_vote
from mmedx_fast.guidelines import adherence
from mmedx_fast.rollout.base import Rollout
from mmedx_fast.scoring import (
    extract_answer,
    format_ok,
    gold_letter,
    match_option,
    medevalkit_score,
    normalise,
    strict_score,
    think_text,
)

# Where MedEvalKit's task for a data set departs from its others.
_MEDEVALKIT_RULES: dict[str, dict[str, bool]] = {
    "pmc_vqa": {"answer_tag": False},
    "slake": {"raw_gold": True},
}
_LONGEST_META = 200
_OF_A_SAMPLE = (
    "guideline",
    "completion",
    "finish_reason",
    "tokens",
    "predicted",
    "correct",
    "correct_medevalkit",
    "format_ok",
    "adherence",
    "logprob",
)


def prediction_row(
    record: Record, set_name: str, rollouts: Sequence[Rollout], *, bare: bool = False
) -> dict[str, Any]:
    """The JSON-ready row of one question with all its answers, in the order asked.

    ``bare``: the prompt asked for the answer alone, without tags, so that a response in which no answer is
    marked is itself the answer.

    With one answer the row is that answer's. With more, ``samples`` holds them all, ``vote`` how they voted
    (:func:`mmedx_fast.evaluation.votes.majority_vote`), and the row's own ``predicted``, ``correct`` and
    ``completion`` are the vote's; ``tokens`` counts all.
    """
    answers = [_answer(record, rollout, bare) for rollout in rollouts]
    chosen, vote = answers[0], None
    if len(answers) > 1:
        found = majority_vote([a["predicted"] for a in answers], [a["logprob"] for a in answers])
        chosen = answers[found.chosen]
        vote = {
            "predicted": found.predicted,
            "votes": found.votes,
            "tie": found.tie,
            "correct": chosen["correct"],
        }
    guidelines = dict.fromkeys(answer["guideline"] for answer in answers)
    return {
        "id": record.id,
        "set": set_name,
        "dataset": record.dataset,
        "split": record.split,
        "specialty": record.specialty,
        "guideline": chosen["guideline"] if len(guidelines) == 1 else "each",
        "question": record.question,
        "options": record.options,
        "answer": record.answer,
        "answer_label": record.answer_label,
        "answer_type": record.answer_type,
        "images": [str(image) for image in record.images],
        "meta": meta_columns(record.meta),
        "completion": chosen["completion"],
        "finish_reason": chosen["finish_reason"],
        "tokens": sum(answer["tokens"] for answer in answers),
        "predicted": chosen["predicted"],
        "correct": chosen["correct"],
        "correct_medevalkit": chosen["correct_medevalkit"],
        "format_ok": chosen["format_ok"],
        "adherence": chosen["adherence"],
        "vote": vote,
        "samples": [{k: a[k] for k in _OF_A_SAMPLE} for a in answers] if vote else None,
    }


def _answer(record: Record, rollout: Rollout, bare: bool) -> dict[str, Any]:
    text, gold = rollout.text, gold_answer(record)
    predicted = extract_answer(text, record.options)
    if bare and predicted is None:
        predicted = (
            match_option(text, record.options) if record.options else normalise(text) or None
        )
        wanted = gold_letter(record.options, gold) if record.options else normalise(gold)
        correct = predicted is not None and predicted == wanted
    else:
        correct = bool(strict_score(text, record.options, gold))
    return {
        "guideline": rollout.guideline,
        "completion": text,
        "finish_reason": rollout.finish_reason,
        "tokens": len(rollout.token_ids),
        "predicted": predicted,
        "correct": correct,
        "correct_medevalkit": bool(
            medevalkit_score(
                text, record.options, gold, **_MEDEVALKIT_RULES.get(record.dataset, {})
            )
        ),
        "format_ok": format_ok(text),
        "adherence": _followed(record, rollout, predicted),
        "logprob": sum(rollout.logprobs) / max(1, len(rollout.logprobs)),
    }


def _followed(record: Record, rollout: Rollout, predicted: str | None) -> float | None:
    """Adherence to the guideline that the question was asked under; None where it was asked without one, or
    has too few findings for any.
    """
    if rollout.guideline is None:
        return None
    found = adherence(
        think_text(rollout.text),
        rollout.guideline,
        question=record.question,
        options=record.options,
        answer=predicted,
        findings=image_findings(record.meta),
    )
    return found.score if found.applies else None


def gold_answer(record: Record) -> str:
    """What the scorers compare with: the label where there are options, else the text."""
    return record.answer_label if record.options and record.answer_label else record.answer


def meta_columns(meta: dict[str, Any]) -> dict[str, Any]:
    """The short single values and lists of strings among a record's further columns: what results are
    broken down by.
    """
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in meta.items()
        if (isinstance(value, str | int | float | bool) or _is_strings(value))
        and len(str(value)) <= _LONGEST_META
    }


def _is_strings(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
