"""Numbers over steps: one JSON line per step, and the same numbers for TensorBoard.

A killed and resumed run ends with the file of an unbroken one, times aside (:func:`without_times`).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmedx_fast.atomic import disk_guard, plain, write_bytes

TIMES = ("seconds", "time", "perf")
"""First parts of the keys that hold clock readings or rates made of them, which no two runs share."""


class MetricsLogger:
    """Appends to ``<stage_dir>/metrics.jsonl`` and to TensorBoard events under ``tb_dir``.

    ``resume_step`` is the last step whose work is kept: later lines are dropped, as the run will
    write them again. ``None`` starts the file anew. ``tb_dir=None`` writes no events; the first
    event replaces those of earlier processes by the lines that were kept. Use as a context manager.
    """

    def __init__(self, stage_dir: Path, tb_dir: Path | None, *, resume_step: int | None):
        self.path = Path(stage_dir) / "metrics.jsonl"
        self._tb_dir = tb_dir
        self._writer: Any = None
        self._kept = _rows_to_keep(self.path, resume_step)
        kept = b"".join(line for _, line in self._kept)
        if self.path.exists() and self.path.read_bytes() != kept:
            write_bytes(self.path, kept)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "ab", buffering=0)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line ``{"step": step, "time": <unix seconds>, ...}`` and flush it.

        Nested mappings become ``outer/inner`` keys. Numbers (Python, numpy, 0-d tensors) and
        strings are taken; NaN and infinities are written as null and come back as NaN. Strings stay
        out of TensorBoard. Raises ValueError naming the key for anything else, ``DiskFullError``
        when the line does not fit.
        """
        row = _scalars(values)
        if "step" in row:
            raise ValueError(f"{self.path}: 'step' is an argument of its own, not a metric")
        line = json.dumps(
            {"step": step, "time": round(time.time(), 3), **plain(row)}, ensure_ascii=False
        )
        data = line.encode() + b"\n"
        size = os.fstat(self._file.fileno()).st_size
        with disk_guard(self.path, len(data)):
            # A raw file may take part of a line only; when the rest raises, that part is cut off.
            try:
                while data:
                    data = data[self._file.write(data) :]
            except OSError:
                self._file.truncate(size)
                raise
            self._write_events(step, row)

    def close(self) -> None:
        """Close the file and the event writer."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write_events(self, step: int, row: dict[str, float | str]) -> None:
        if self._tb_dir is None:
            return
        if self._writer is None:
            self._writer = self._open_events(self._tb_dir)
        _add_scalars(self._writer, step, row, None)
        self._writer.flush()

    def _open_events(self, tb_dir: Path) -> Any:
        """A writer whose one file holds the rows kept so far.

        Not ``SummaryWriter(purge_step=...)``: TensorBoard reads files in the order of their names,
        second, host, process and counter as text, so after a quick or a skewed restart it meets the
        purge before what it should purge.
        """
        from torch.utils.tensorboard import SummaryWriter

        for old in tb_dir.glob("events.out.tfevents.*"):
            old.unlink()
        writer = SummaryWriter(str(tb_dir))  # type: ignore[no-untyped-call]
        for row, _ in self._kept:
            _add_scalars(writer, row["step"], _with_nan(row), row.get("time"))
        self._kept = []
        return writer


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``, null as NaN; [] when there is no file.

    A last line without its end (the run was killed while writing it) is left out. Raises ValueError
    naming file and line for any other line that is not a JSON object with an integer ``step``.
    """
    return [_with_nan(row) for row, _ in _parse(Path(path))]


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``rows`` less clock readings: keys whose first part (before ``/``) is in :data:`TIMES`."""
    return [{k: v for k, v in row.items() if k.split("/")[0] not in TIMES} for row in rows]


def _parse(path: Path) -> list[tuple[dict[str, Any], bytes]]:
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    out = []
    for number, line in enumerate(
        lines[:-1], start=1
    ):  # what follows the last newline is empty or half
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ValueError(f"{path}, line {number}: not an object with an integer 'step'")
        out.append((row, line + b"\n"))
    return out


def _rows_to_keep(path: Path, resume_step: int | None) -> list[tuple[dict[str, Any], bytes]]:
    """Rows and lines the file should start with."""
    if resume_step is None:
        return []
    return [(row, line) for row, line in _parse(path) if row["step"] <= resume_step]


def _add_scalars(
    writer: Any, step: int, row: Mapping[str, float | str], seconds: float | None
) -> None:
    for key, value in row.items():
        if key not in ("step", "time") and not isinstance(value, str):
            writer.add_scalar(key, value, step, walltime=seconds)


def _with_nan(row: dict[str, Any]) -> dict[str, Any]:
    return {key: math.nan if value is None else value for key, value in row.items()}


def _scalars(values: Mapping[str, Any], prefix: str = "") -> dict[str, float | str]:
    out: dict[str, float | str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            out.update(_scalars(value, f"{name}/"))
            continue
        if not isinstance(value, int | float | str) and hasattr(value, "tolist"):
            value = value.tolist()
        if isinstance(value, bool):
            value = int(value)
        if value is None:
            value = math.nan
        if not isinstance(value, int | float | str):
            raise ValueError(
                f"metric {name!r} must be a number or a string, got {type(value).__name__}"
            )
        out[name] = value
    return out
