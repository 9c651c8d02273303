"""From a finished journal to the files that stay: predictions, what was left out, figures."""

from __future__ import annotations

import json
import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mmedx_fast.atomic import plain, write_stream
from mmedx_fast.data.loaders import Rejected
from mmedx_fast.evaluation.journal import entries, seconds
from mmedx_fast.evaluation.metrics import metrics_of

LOG = logging.getLogger(__name__)
JOURNAL = "predictions.journal"
PREDICTIONS = "predictions.jsonl"
METRICS = "metrics.json"
REJECTED = "rejected.jsonl"


class NothingAnsweredError(ValueError):
    """Not one question of a set could be asked."""


class RejectedRows:
    """Rows that a loader refuses, written as they come; those of an earlier pass over the data are replaced."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.count = path, 0
        self._file = path.open("wb")

    def __call__(self, row: Rejected) -> None:
        self._file.write(json.dumps(vars(row)).encode() + b"\n")
        self.count += 1

    def close(self) -> None:
        self._file.close()


def conclude(folder: Path, set_name: str, refused: Path | None = None) -> dict[str, Any]:
    """Write ``predictions.jsonl`` and, where questions could not be used, ``rejected.jsonl`` from the folder's
    journal; returns the figures.

    ``refused``: JSONL of the rows that the loader did not accept; it is moved into ``rejected.jsonl``.
    Raises NothingAnsweredError, naming the file with the reasons, when no question was answered.
    """
    journal = folder / JOURNAL
    counts = {"row": 0, "reject": 0}
    with ExitStack() as stack:
        rows = stack.enter_context(write_stream(folder / PREDICTIONS))
        rejected = stack.enter_context(write_stream(folder / REJECTED))
        if refused is not None and refused.exists():
            with refused.open("rb") as lines:
                for line in lines:
                    rejected.write(line)
                    counts["reject"] += 1
        for kind, _, text in entries(journal):
            (rows if kind == "row" else rejected).write(text + b"\n")
            counts[kind] += 1
    if not counts["reject"]:
        (folder / REJECTED).unlink()
    else:
        LOG.warning(
            "%s: %d questions left out, see %s", set_name, counts["reject"], folder / REJECTED
        )
    if not counts["row"]:
        raise NothingAnsweredError(
            f"{set_name}: none of {counts['reject']} questions can be used; the reasons are in "
            f"{folder / REJECTED}"
        )
    if refused is not None:
        refused.unlink(missing_ok=True)
    found = plain(metrics_of(folder / PREDICTIONS))
    result: dict[str, Any] = found | {"rejected": counts["reject"], "seconds": seconds(journal)}
    return result
