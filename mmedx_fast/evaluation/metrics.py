"""Figures of a set's predictions, counted row by row."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mmedx_fast.evaluation.votes import ks, of_row, pass_at_k
from mmedx_fast.stats import macro_average, wilson_interval

_COUNTED = ("correct", "correct_medevalkit")
_OF_ANSWERS = ("format_rate", "unparsed_rate", "truncated_rate")


class Tally:
    """Counts of the rows it was given; of every question only whether it was right is kept, a byte."""

    def __init__(self) -> None:
        self.questions = self.answers = self.tokens = self.right_answers = self.ties = 0
        self._hits: dict[str, bytearray] = {}
        self._right = dict.fromkeys(_COUNTED, 0)
        self._rates = dict.fromkeys(_OF_ANSWERS, 0)
        self._adherence: dict[str, list[float]] = {}
        self._by_guideline: dict[str, list[int]] = {}
        self._pass: dict[int, float] = {}
        self._each = 0

    def add(self, row: dict[str, Any]) -> None:
        answers = of_row(row)
        self.questions += 1
        self.tokens += row["tokens"]
        self._hits.setdefault(str(row["specialty"]), bytearray()).append(bool(row["correct"]))
        for name in _COUNTED:
            self._right[name] += bool(row[name])
        self.ties += bool((row.get("vote") or {}).get("tie"))
        for answer in answers:
            self._add_answer(answer)
        right = sum(bool(answer["correct"]) for answer in answers)
        self._each = max(self._each, len(answers))
        if len(answers) > 1:
            for k in ks(len(answers)):
                self._pass[k] = self._pass.get(k, 0.0) + pass_at_k(len(answers), right, k)

    def _add_answer(self, answer: dict[str, Any]) -> None:
        self.answers += 1
        self.right_answers += bool(answer["correct"])
        self._rates["format_rate"] += bool(answer["format_ok"])
        self._rates["unparsed_rate"] += answer["predicted"] is None
        self._rates["truncated_rate"] += answer["finish_reason"] == "length"
        guideline = answer["guideline"]
        if guideline is None:
            return
        counts = self._by_guideline.setdefault(guideline, [0, 0])
        counts[0] += bool(answer["correct"])
        counts[1] += 1
        if answer["adherence"] is not None:
            total = self._adherence.setdefault(guideline, [0.0, 0])
            total[0] += answer["adherence"]
            total[1] += 1

    def result(self) -> dict[str, Any]:
        """Accuracy with 95 % intervals by specialty and as macro-average, and the rates beside it.

        With one answer a question the accuracies are that answer's (``decision`` greedy), with more the vote's
        (``decision`` vote), and ``mean_accuracy`` is that of the single answers, ``pass_at`` pass@k. Rates and
        adherence are of all answers. Raises ValueError when there was no row.
        """
        if not self.questions:
            raise ValueError("no question was answered, so there is nothing to count")
        macro = macro_average({name: list(map(float, hits)) for name, hits in self._hits.items()})
        several = self._each > 1
        found = {
            "questions": self.questions,
            "macro_accuracy": macro.value,
            "macro_interval": [macro.low, macro.high],
            "accuracy": {name: sum(hits) / len(hits) for name, hits in self._hits.items()},
            "intervals": {
                name: list(wilson_interval(sum(hits), len(hits)))
                for name, hits in self._hits.items()
            },
            "micro_accuracy": self._right["correct"] / self.questions,
            "micro_interval": list(wilson_interval(self._right["correct"], self.questions)),
            "medevalkit_accuracy": self._right["correct_medevalkit"] / self.questions,
            **{name: count / self.answers for name, count in self._rates.items()},
            "adherence": {name: total / n for name, (total, n) in self._adherence.items()},
            "accuracy_by_guideline": {
                n: right / of for n, (right, of) in self._by_guideline.items()
            },
            "tokens": self.tokens,
            "answers": self.answers,
            "decision": "vote" if several else "greedy",
        }
        if several:
            found |= {
                "vote_accuracy": found["micro_accuracy"],
                "vote_tie_rate": self.ties / self.questions,
                "mean_accuracy": self.right_answers / self.answers,
                "pass_at": {
                    str(k): total / self.questions for k, total in sorted(self._pass.items())
                },
            }
        return found


def summarise(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """:meth:`Tally.result` of these rows."""
    tally = Tally()
    for row in rows:
        tally.add(row)
    return tally.result()


def metrics_of(predictions: Path) -> dict[str, Any]:
    """Everything that is counted of a predictions file, which is read line by line."""
    return summarise(read_rows(predictions)) | breakdowns(predictions)


def breakdowns(predictions: Path) -> dict[str, Any]:
    """``breakdown``: accuracies by the columns that the rows have."""
    if importlib.util.find_spec("mmedx_fast.eval_breakdown") is None:
        return {}
    breakdown = importlib.import_module("mmedx_fast.eval_breakdown").breakdown
    return {"breakdown": breakdown(read_rows(predictions))}


def read_rows(predictions: Path) -> Iterator[dict[str, Any]]:
    """The rows of ``predictions.jsonl``, one in memory at a time."""
    with predictions.open("rb") as lines:
        for line in lines:
            yield json.loads(line)
