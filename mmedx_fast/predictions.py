"""Reading the prediction rows that an evaluation wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

NAME = "predictions.jsonl"


def prediction_files(path: Path | str) -> list[Path]:
    """The file itself, or a folder's ``predictions.jsonl``, else those of its subfolders (a model
    asked on several sets); FileNotFoundError if there is none."""
    path = Path(path)
    if path.is_file():
        return [path]
    found = [path / NAME] if (path / NAME).is_file() else sorted(path.glob(f"*/{NAME}"))
    if not found:
        raise FileNotFoundError(
            f"{path}: neither a file of predictions nor a folder with {NAME}; give what "
            "`mmedx eval` wrote, such as runs/demo/eval/rl"
        )
    return found


def read_predictions(path: Path | str) -> Iterator[dict[str, Any]]:
    """The rows under ``path`` (see :func:`prediction_files`), one at a time.

    ValueError, naming file and line, for a line that is no JSON object, has no ``id``, no ``correct``
    that is true or false (or 1 or 0), or a ``meta`` that is no object.
    """
    for file in prediction_files(path):
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _row(line, f"{file}, line {number}")


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error}); copy the file again") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: not JSON ({error}); if the evaluation was cut short, start it again"
        ) from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a {type(row).__name__}, not an object with a prediction's keys")
    for key in ("id", "correct"):
        if key not in row:
            raise ValueError(f"{where}: no key {key!r}; give predictions that `mmedx eval` wrote")
    if not isinstance(row["correct"], int) or row["correct"] not in (0, 1):  # a bool is an int
        raise ValueError(f"{where}: correct is {row['correct']!r}; it must be true or false")
    if not isinstance(row.get("meta"), dict | None):
        raise ValueError(f"{where}: meta is {row['meta']!r}; it must be an object or null")
    return row


def set_of(row: Mapping[str, Any]) -> str:
    """The name of the set a row belongs to: ``set``, else ``dataset``, else ""."""
    return str(row.get("set") or row.get("dataset") or "")
