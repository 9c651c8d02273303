"""The builtin reward functions, in TRL's signature (see :mod:`mmedx_fast.rewards`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmedx_fast.guidelines import adherence
from mmedx_fast.scoring import extract_answer, format_ok, strict_score, think_text

Completion = str | Sequence[Mapping[str, Any]]


def completion_text(completion: Completion) -> str:
    """The text of a plain or conversational completion (its last assistant message)."""
    if isinstance(completion, str):
        return completion
    for message in reversed(completion):
        if message.get("role") == "assistant":
            content = message.get("content")
            if isinstance(content, str):
                return content
            if isinstance(content, Sequence):  # [{"type": "text", "text": ...}]
                return "".join(part.get("text", "") for part in content)
    raise ValueError(
        f"completion {completion!r} is neither a string nor messages with an assistant's text"
    )


def _column(name: str, values: Any, size: int, needed_by: str) -> list[Any]:
    if values is None:
        raise ValueError(f"{needed_by} needs the column {name!r}; add it to the dataset")
    if len(values) != size:
        raise ValueError(f"column {name!r} has {len(values)} rows for {size} completions")
    return list(values)


def _golds(
    size: int, answer_label: Sequence[str | None] | None, answer: Sequence[str | None] | None
) -> list[str]:
    """The gold of every row: its letter if there is one, else its text."""
    labels = list(answer_label) if answer_label is not None else [None] * size
    texts = list(answer) if answer is not None else [None] * size
    golds = []
    for row, (label, text) in enumerate(zip(labels, texts, strict=True)):
        gold = label if label is not None else text
        if gold is None:
            raise ValueError(
                f"row {row} has no gold answer: give the column 'answer_label' or 'answer'"
            )
        golds.append(gold)
    return golds


def accuracy_reward(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]] | None = None,
    *,
    options: Sequence[Mapping[str, str] | None] | None = None,
    answer_label: Sequence[str | None] | None = None,
    answer: Sequence[str | None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """1.0 for the right answer by strict extraction, else 0.0; never by similarity.

    Columns: ``answer_label`` (letter) or ``answer`` (text), and ``options`` unless the question is
    open.
    """
    size = len(completions)
    choices = [None] * size if options is None else _column("options", options, size, "accuracy")
    golds = _golds(size, answer_label, answer)
    return [
        strict_score(completion_text(completion), choice, gold)
        for completion, choice, gold in zip(completions, choices, golds, strict=True)
    ]


def format_reward(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """1.0 if the whole completion is ``<think>..</think><answer>..</answer>``, else 0.0."""
    return [float(format_ok(completion_text(completion))) for completion in completions]


def share_if_wrong(gate: str, on_wrong: float) -> float:
    """What a wrong answer leaves of :func:`guideline_reward`, by its arguments."""
    shares = {"correct": 0.0, "weighted": on_wrong, "none": 1.0}
    if gate not in shares:
        raise ValueError(f"gate is {gate!r}; choose one of {', '.join(shares)}")
    return shares[gate]


def guideline_reward(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]] | None = None,
    *,
    guideline: Sequence[str | None] | None = None,
    question: Sequence[str] | None = None,
    options: Sequence[Mapping[str, str] | None] | None = None,
    answer_label: Sequence[str | None] | None = None,
    answer: Sequence[str | None] | None = None,
    findings: Sequence[Sequence[str] | None] | None = None,
    require_format: bool = True,
    on_wrong: float = 0.25,
    gate: str = "weighted",
    **kwargs: Any,
) -> list[float | None]:
    """Adherence in [0, 1] to the row's guideline; None for a row without one, or whose question
    (with ``findings``) has fewer than two findings to argue from.

    Judged against the answer the completion itself gives. ``gate`` says what a wrong answer leaves
    of it: "weighted" the share ``on_wrong``, "correct" nothing, "none" all of it. With
    ``require_format`` a malformed completion gets 0. Columns: ``guideline``, ``question`` (the
    stem), the columns of :func:`accuracy_reward`, and optionally ``findings`` (phrases per row,
    such as the image's).
    """
    if not 0.0 <= on_wrong <= 1.0:
        raise ValueError(f"on_wrong is {on_wrong}; give a factor between 0 and 1")
    on_wrong = share_if_wrong(gate, on_wrong)
    size = len(completions)
    names = _column("guideline", guideline, size, "guideline_reward")
    stems = _column("question", question, size, "guideline_reward")
    choices = [None] * size if options is None else _column("options", options, size, "guideline")
    phrases = (
        [None] * size if findings is None else _column("findings", findings, size, "guideline")
    )
    golds = [""] * size if on_wrong == 1.0 else _golds(size, answer_label, answer)
    rewards: list[float | None] = []
    for row, name in enumerate(names):
        if not name:
            rewards.append(None)
            continue
        text = completion_text(completions[row])
        found = adherence(
            think_text(text),
            name,
            question=stems[row],
            options=choices[row],
            answer=extract_answer(text, choices[row]),
            findings=tuple(phrases[row] or ()),
        )
        if not found.applies:  # for no completion of the row, so that none is paid beside another
            rewards.append(None)
            continue
        if require_format and not format_ok(text):
            rewards.append(0.0)
            continue
        right = on_wrong == 1.0 or strict_score(text, choices[row], golds[row]) == 1.0
        rewards.append(found.score if right else found.score * on_wrong)
    return rewards


def soft_overlong_reward(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]] | None = None,
    *,
    max_len: int,
    cache: int,
    **kwargs: Any,
) -> list[float | None]:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), from the completions' token
    counts.

    0 up to ``max_len - cache`` tokens, then falling linearly to -1 at ``max_len``, and -1 beyond.
    """
    if not 0 < cache <= max_len:
        raise ValueError(f"cache is {cache} tokens; it must lie within 1 and max_len ({max_len})")
    if completion_ids is None:
        raise ValueError(
            "soft_overlong_reward needs completion_ids: it counts tokens, not characters"
        )
    return [
        0.0 if len(ids) <= max_len - cache else max(-1.0, (max_len - cache - len(ids)) / cache)
        for ids in completion_ids
    ]


def get_soft_overlong_reward(max_len: int, cache: int) -> Callable[..., list[float | None]]:
    """:func:`soft_overlong_reward` with its lengths (in tokens) bound, under the same name."""
    soft_overlong_reward([], [], [], max_len=max_len, cache=cache)  # refuse bad lengths at once

    def bound(
        prompts: Sequence[Any],
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        return soft_overlong_reward(
            prompts, completions, completion_ids, max_len=max_len, cache=cache
        )

    bound.__name__ = bound.__qualname__ = "soft_overlong_reward"
    return bound
