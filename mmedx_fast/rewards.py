"""Reward functions in TRL's signature, and the runner that calls them and checks what they return.

A reward is ``f(prompts, completions, completion_ids=None, **kwargs) -> list[float | None]`` (or an
``async def``): one number per completion, None where it does not apply; ``kwargs`` holds the other
dataset columns, one list entry per completion. Completions are strings, or conversational
``[{"role": "assistant", "content": str}]``. A user's own function is named by a dotted path
(``package.module.function``) or a file (``path/to/file.py:function``).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
import importlib
import importlib.util
import inspect
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mmedx_fast.reward_functions import (
    accuracy_reward,
    completion_text,
    format_reward,
    get_soft_overlong_reward,
    guideline_reward,
    soft_overlong_reward,
)

__all__ = [
    "BUILTIN",
    "RewardError",
    "RewardRunner",
    "accuracy_reward",
    "completion_text",
    "format_reward",
    "get_soft_overlong_reward",
    "guideline_reward",
    "load_reward",
    "reward_name",
    "soft_overlong_reward",
]

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_log = logging.getLogger(__name__)

RewardFunction = Callable[..., Any]


class RewardError(ValueError):
    """A reward function is missing, fails, or returns what is no reward; says which and where."""


BUILTIN: dict[str, RewardFunction] = {
    "accuracy": accuracy_reward,
    "format": format_reward,
    "guideline": guideline_reward,
    "soft_overlong": soft_overlong_reward,
}


def load_reward(spec: str | RewardFunction) -> RewardFunction:
    """A reward function by builtin name, ``package.module.function`` or
    ``path/to/file.py:function``.

    A callable is returned as it is. :class:`RewardError` says what could not be found or imported.
    """
    if callable(spec):
        return spec
    for name, function in BUILTIN.items():
        if spec in (name, function.__name__):
            return function
    path, colon, attribute = spec.rpartition(":")
    if colon and path.endswith(".py"):
        module: Any = _module_from_file(Path(path).expanduser(), spec)
        where = path
    else:
        where, _, attribute = spec.rpartition(".")
        if not where:
            raise RewardError(
                f"unknown reward {spec!r}: give one of {', '.join(BUILTIN)}, a dotted path "
                "(package.module.function) or a file (path/to/file.py:function)"
            )
        try:
            module = importlib.import_module(where)
        except Exception as error:
            raise RewardError(
                f"reward {spec!r}: importing {where!r} failed with {type(error).__name__}: {error}"
            ) from error
    found: Any = getattr(module, attribute, None)
    if not callable(found):
        fault = "is not a function" if hasattr(module, attribute) else "does not exist"
        raise RewardError(f"reward {spec!r}: {attribute!r} in {where} {fault}")
    return found


def _module_from_file(path: Path, spec: str) -> Any:
    if not path.is_file():
        raise RewardError(f"reward {spec!r}: there is no file {path} (relative to {Path.cwd()})")
    # A name of its own per file: two files called rewards.py must not replace one another.
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    name = f"mmedx_reward_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    loader = importlib.util.spec_from_file_location(name, path)
    if loader is None or loader.loader is None:
        raise RewardError(f"reward {spec!r}: {path} is not a Python file")
    module = importlib.util.module_from_spec(loader)
    sys.modules[name] = module
    try:
        loader.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise RewardError(
            f"reward {spec!r}: importing {path} failed with {type(error).__name__}: {error}"
        ) from error
    return module


def reward_name(function: RewardFunction) -> str:
    """The name a reward has in logs: ``__name__``, that of the inner function for a partial."""
    inner = getattr(function, "func", function)
    return getattr(inner, "__name__", type(inner).__name__)


def _is_async(function: RewardFunction) -> bool:
    inner = getattr(function, "func", function)
    call = getattr(inner, "__call__", None)  # noqa: B004 - an object with an async __call__
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(call)


class RewardRunner:
    """Calls several reward functions on a batch and returns their checked values.

    ``specs`` lists (name or path, weight, keyword arguments); ``names``, ``weights`` [M] float32
    and ``functions`` keep that order.
    """

    def __init__(self, specs: Sequence[tuple[str | RewardFunction, float, Mapping[str, Any]]]):
        if not specs:
            raise RewardError("no reward is configured; give at least one, such as 'accuracy'")
        self.functions = [load_reward(spec) for spec, _, _ in specs]
        self.names = [reward_name(function) for function in self.functions]
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        if twice:
            raise RewardError(f"reward {twice[0]!r} is given twice; names must differ in the logs")
        for name, (_, weight, _) in zip(self.names, specs, strict=True):
            if not isinstance(weight, int | float) or not math.isfinite(weight):
                raise RewardError(f"reward {name!r} has weight {weight!r}; give a finite number")
        self.weights: npt.NDArray[np.float32] = np.array([w for _, w, _ in specs], np.float32)
        self._arguments = [dict(arguments) for _, _, arguments in specs]
        self._warned: set[str] = set()

    def score(self, batch: Mapping[str, Any], **extras: Any) -> npt.NDArray[np.float32]:
        """Rewards [B, M] float32 of a batch, NaN where a reward does not apply.

        ``batch`` maps column names to lists of B values: ``completions``, and as far as the
        functions want them ``prompts``, ``completion_ids``, ``options``, ``id`` ... ``extras`` are
        passed to every function as they are (TRL's ``trainer_state``). A function's NaN counts as
        None, with one warning. :class:`RewardError` (function, row, id, what to do) if a function
        raises, or returns the wrong number of values, a value that is no number, an infinity, or
        nothing but NaN.
        """
        if "completions" not in batch:
            raise RewardError("the batch has no column 'completions'")
        size = len(batch["completions"])
        for column, values in batch.items():
            if not hasattr(values, "__len__") or isinstance(values, str) or len(values) != size:
                raise RewardError(
                    f"column {column!r} of the batch is not a list of {size} values, one per "
                    f"completion"
                )
        columns = {"prompts": [None] * size, "completion_ids": None} | dict(batch)
        answers = self._call_all(columns, extras)
        rewards = np.full((size, len(self.functions)), np.nan, np.float32)
        for m, answer in enumerate(answers):
            rewards[:, m] = self._checked(self.names[m], answer, columns, size)
        return rewards

    def _call_all(self, columns: dict[str, Any], extras: dict[str, Any]) -> list[Any]:
        answers: list[Any] = []
        waiting: list[int] = []
        for m, function in enumerate(self.functions):
            if _is_async(function):
                waiting.append(m)
                answers.append(None)
            else:
                try:
                    answers.append(function(**columns, **extras, **self._arguments[m]))
                except Exception as error:
                    raise self._failed(m, error, columns, extras) from error
        if waiting:
            for m, result in zip(waiting, self._gather(waiting, columns, extras), strict=True):
                if isinstance(result, BaseException):
                    raise self._failed(m, result, columns, extras) from result
                answers[m] = result
        return answers

    def _gather(
        self, which: list[int], columns: dict[str, Any], extras: dict[str, Any]
    ) -> list[Any]:
        async def call(m: int) -> Any:
            return await self.functions[m](**columns, **extras, **self._arguments[m])

        async def gather() -> list[Any]:
            return await asyncio.gather(*(call(m) for m in which), return_exceptions=True)

        # In a thread of its own, since the caller may already be inside an event loop (a notebook).
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            return pool.submit(lambda: asyncio.run(gather())).result()

    def _failed(
        self, m: int, error: BaseException, columns: dict[str, Any], extras: dict[str, Any]
    ) -> RewardError:
        where = "on the batch as a whole"
        if not _is_async(self.functions[m]):
            for row in range(len(columns["completions"])):
                one = {k: v if v is None else v[row : row + 1] for k, v in columns.items()}
                try:
                    self.functions[m](**one, **extras, **self._arguments[m])
                except Exception as again:
                    if type(again) is type(error):
                        where = f"on {_row(columns, row)}"
                        error = again
                        break
        return RewardError(
            f"reward function {self.names[m]!r} raised {type(error).__name__} {where}: {error}. "
            "Correct the function or the row; return None where the reward does not apply"
        )

    def _checked(
        self, name: str, answer: Any, columns: dict[str, Any], size: int
    ) -> npt.NDArray[np.float64]:
        try:
            values = list(answer)
        except TypeError:
            raise RewardError(
                f"reward function {name!r} returned {type(answer).__name__}; return a list of "
                f"{size} "
                "numbers or None, one per completion"
            ) from None
        if len(values) != size:
            raise RewardError(
                f"reward function {name!r} returned {len(values)} values for {size} completions; "
                "return one per completion, None where the reward does not apply"
            )
        checked = np.full(size, np.nan)
        undefined = []
        for row, value in enumerate(values):
            if value is None:
                continue
            number = _number(value)
            if number is None or abs(number) > _FLOAT32_MAX:
                raise RewardError(
                    f"reward function {name!r} returned {value!r} on {_row(columns, row)}; "
                    "return a finite number, or None where the reward does not apply"
                )
            checked[row] = number
            if math.isnan(number):
                undefined.append(row)
        if undefined:
            self._report_nan(name, undefined, bool(np.isnan(checked).all()), columns)
        return checked

    def _report_nan(
        self, name: str, rows: list[int], nothing_else: bool, columns: dict[str, Any]
    ) -> None:
        size = len(columns["completions"])
        if nothing_else:
            raise RewardError(
                f"reward function {name!r} returned NaN for {len(rows)} of {size} completions and "
                f"no "
                f"number at all, first on {_row(columns, rows[0])}; return a finite number, or "
                f"None "
                "where the reward does not apply"
            )
        if name not in self._warned:
            self._warned.add(name)
            _log.warning(
                "reward function %r returned NaN for %d of %d completions, first on %s; NaN counts "
                "as "
                "'does not apply'. Return None if that is meant (this is said once)",
                name, len(rows), size, _row(columns, rows[0]),
            )  # fmt: skip


def _row(columns: Mapping[str, Any], row: int) -> str:
    ids = columns.get("id", columns.get("ids"))
    return f"row {row}" if ids is None else f"row {row} (id {ids[row]!r})"


def _number(value: Any) -> float | None:
    """A Python, numpy or 0-d tensor number as float; None for anything else (text, lists)."""
    if isinstance(value, str | bytes):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
