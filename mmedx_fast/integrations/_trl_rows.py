"""Dataset rows of questions under guidelines: instructions, order, and what must hold of a column."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import Sampler

from mmedx_fast.guidelines import GUIDELINES

COLUMN = "guideline"
QUESTION = "question_id"


def instructions(guidelines: Sequence[str] | Mapping[str, str] | None) -> dict[str, str]:
    """The instruction of each guideline, in the order asked for."""
    if guidelines is None:
        guidelines = list(GUIDELINES)
    if isinstance(guidelines, str) or not guidelines:
        raise ValueError(
            f"guidelines={guidelines!r}: give a list of names, or a mapping of names to instructions"
        )
    if isinstance(guidelines, Mapping):
        for name, text in guidelines.items():
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"guidelines[{name!r}] is {text!r}: give the instruction's text")
        return dict(guidelines)
    unknown = [name for name in guidelines if name not in GUIDELINES]
    if unknown:
        raise ValueError(
            f"guidelines: {unknown[0]!r} is not one of {', '.join(GUIDELINES)}; for guidelines of your own "
            "give a mapping of names to instructions"
        )
    if len(set(guidelines)) != len(guidelines):
        raise ValueError(f"guidelines={list(guidelines)!r} names one twice")
    return {name: GUIDELINES[name].instruction for name in guidelines}


def ask(row: dict[str, Any], name: str, instruction: str) -> dict[str, Any]:
    """The row with the instruction at the end of its prompt; the given row stays as it is."""
    return {**row, "prompt": _asked(row["prompt"], instruction), COLUMN: name}


def _asked(prompt: Any, instruction: str) -> Any:
    if isinstance(prompt, str):
        return f"{prompt}\n\n{instruction}"
    users = [i for i, message in enumerate(prompt) if message["role"] == "user"]
    if not users:
        roles = [message["role"] for message in prompt]
        raise ValueError(
            f"a prompt has the roles {roles} and no 'user': the guideline's instruction closes the last user "
            "message; add one"
        )
    last = prompt[users[-1]]
    message = {**last, "content": _closed(last["content"], instruction)}
    return [*prompt[: users[-1]], message, *prompt[users[-1] + 1 :]]


def _closed(content: Any, instruction: str) -> Any:
    if isinstance(content, str):
        return f"{content}\n\n{instruction}"
    if content and content[-1]["type"] == "text":
        block = {**content[-1], "text": f"{content[-1]['text']}\n\n{instruction}"}
        return [*content[:-1], block]
    return [*content, {"type": "text", "text": f"\n\n{instruction}"}]


def datasets_in(dataset: Any, name: str) -> Iterator[tuple[str, Any]]:
    """A dataset, or each of a dictionary of them, with a name for messages."""
    if not isinstance(dataset, Mapping):
        yield name, dataset
        return
    for key, part in dataset.items():
        yield f"{name}[{key!r}]", part


def has_column(dataset: Any) -> bool:
    """Whether its rows name their guideline; a stream without column names is looked into."""
    columns = getattr(dataset, "column_names", None)
    if columns is None and dataset is not None:
        columns = next(iter(dataset), {})
    return COLUMN in (columns or ())


def check_blocks(dataset: Any, name: str) -> list[str]:
    """The K guidelines of a dataset whose rows come in blocks of K, one question under each of them.

    Raises ValueError naming the first row that breaks the order.
    """
    if not hasattr(dataset, "__len__"):
        raise ValueError(
            f"{name} is a stream with a column {COLUMN!r}: the rows of a question cannot be brought together. "
            "Load it as a dataset, or leave the column out and give guidelines="
        )
    column = list(dataset[COLUMN])
    for row, value in enumerate(column):
        if not isinstance(value, str) or not value:
            raise ValueError(f"{name}: row {row} has {COLUMN}={value!r}, not a name")
    names = list(dict.fromkeys(column))
    ids = list(dataset[QUESTION]) if QUESTION in dataset.column_names else None
    for start in range(0, len(column), len(names)):
        block = column[start : start + len(names)]
        missing = [guideline for guideline in names if guideline not in block]
        if missing:
            raise ValueError(
                f"{name}: rows {start} to {start + len(block) - 1} should be one question under each of "
                f"{names}, but {missing[0]!r} is missing (they have {block}): sort the rows by question"
            )
        if ids is not None and len(set(ids[start : start + len(names)])) > 1:
            raise ValueError(
                f"{name}: rows {start} to {start + len(block) - 1} should be one question, but their "
                f"{QUESTION} are {ids[start : start + len(names)]}: sort the rows by question"
            )
    return names


def check_share(generations: int, guidelines: int, option: str) -> None:
    """Refuse a number of rollouts that cannot be split equally."""
    if generations % guidelines:
        raise ValueError(
            f"{option}={generations} cannot be split equally among {guidelines} guidelines: "
            f"set it to a multiple of {guidelines}"
        )


class GuidelineSampler(Sampler[int]):
    """TRL's order of questions, for rows in blocks of K: a question's repetitions go over its rows in turn."""

    def __init__(self, sampler: Any, guidelines: int) -> None:
        sampler.num_samples = len(sampler.data_source) // guidelines
        self._sampler, self._guidelines = sampler, guidelines

    def __iter__(self) -> Iterator[int]:
        size = self._sampler.mini_repeat_count
        share = size // self._guidelines
        for i, question in enumerate(self._sampler):
            yield question * self._guidelines + i % size // share

    def __len__(self) -> int:
        return len(self._sampler)
