"""What lets a training stage survive bad steps and full memory.

A step whose loss or gradient norm cannot be used is skipped and written down; a row that does not fit into
memory is cut into shorter ones and done again.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from mmedx_fast import ranks
from mmedx_fast.config import GbaConfig, OptimizerConfig
from mmedx_fast.run_folder import Stage, write_folder, write_json, write_text
from mmedx_fast.stages.common import own_rows
from mmedx_fast.stages.context import StageError

if TYPE_CHECKING:
    from mmedx_fast.planner import RowPlan
    from mmedx_fast.policy import Policy
    from mmedx_fast.tree import Tree

LOG = logging.getLogger(__name__)
Packed = TypeVar("Packed")
Found = TypeVar("Found")

_MEMORY_ERRORS = (
    "out of memory",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


# -- steps that cannot be taken --------------------------------------------------------------------


def finite_loss(raw: Sequence[Mapping[str, float]]) -> bool:
    """Whether a step's loss is a number; ``raw`` are the metrics of its rows, all ranks together."""
    return math.isfinite(sum(part["sum:loss"] for part in raw))


class BadSteps:
    """Writes down the steps that were skipped, and stops the stage when they do not end.

    Every rank calls it with the same numbers, rank 0 writes.
    """

    def __init__(
        self, stage: Stage, optimizer: OptimizerConfig, section: str, in_a_row: int = 0
    ) -> None:
        """``section``: where ``optimizer`` stands in the config. ``in_a_row``: from a checkpoint."""
        self._stage = stage
        self._optimizer = optimizer
        self._section = section
        self.in_a_row = in_a_row

    def check(
        self,
        step: int,
        report: Mapping[str, float],
        raw: Sequence[Mapping[str, float]],
        records: Callable[[], Sequence[Mapping[str, Any]]],
    ) -> None:
        """Take note of an update: ``report`` is :meth:`mmedx_fast.policy.Policy.step`'s, ``raw`` the
        metrics of its rows, ``records`` what the step was made of, a mapping per rollout or trace.

        A skipped one is written to ``bad_steps/step-000012/``: ``step.json`` and ``records.jsonl``.

        Raises StageError after ``max_bad_steps`` skipped ones in a row.
        """
        if not report["skipped"]:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        reason = self._reason(report, raw)
        folder = self._stage.dir / "bad_steps" / f"step-{step:06d}"
        LOG.warning("step %d is skipped: %s; see %s", step, reason, folder)
        if ranks.is_main():
            found = {"step": step, "reason": reason, **report, "rows": list(raw)}
            with write_folder(folder) as partial:
                write_text(partial / "step.json", json.dumps(_readable(found), indent=1) + "\n")
                lines = [json.dumps(_readable(row), ensure_ascii=False) for row in records()]
                write_text(partial / "records.jsonl", "".join(line + "\n" for line in lines))
        if self.in_a_row >= self._optimizer.max_bad_steps:
            raise StageError(
                f"{self._stage.name}: {self.in_a_row} steps in a row could not be taken (the last, "
                f"step {step}: {reason}); what they were made of is in {folder.parent}. Lower "
                f"{self._section}.learning_rate, look there for broken rewards or data, or raise "
                f"{self._section}.max_bad_steps"
            )

    def _reason(self, report: Mapping[str, float], raw: Sequence[Mapping[str, float]]) -> str:
        if not finite_loss(raw):
            return "the loss is not finite"
        norm = report["grad_norm"]
        if not math.isfinite(norm):
            return "the gradient norm is not finite"
        limit = self._optimizer.max_step_grad_norm
        return f"the gradient norm {norm:.4g} exceeds {self._section}.max_step_grad_norm = {limit}"


def _readable(value: Any) -> Any:
    """``value`` for JSON, with NaN and infinities as strings: which of them it was is the question."""
    if isinstance(value, Mapping):
        return {key: _readable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_readable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


# -- rows that do not fit into memory --------------------------------------------------------------


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed, on a GPU or in main memory."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        text.lower() in str(error).lower() for text in _MEMORY_ERRORS
    )


class RowBound:
    """The bound on a row's unique tokens: ``gba.max_row_tokens``, lower once memory has run out."""

    def __init__(
        self,
        bounds: GbaConfig,
        saved: Mapping[str, int] | None = None,
        folder: Path | None = None,
    ) -> None:
        """What a run goes on with: ``saved``, :attr:`state` in its checkpoint, and what its ranks have
        noted in the stage's ``folder``. Either counts while the setting is the one that memory ran out
        under; another is tried. Every rank calls it."""
        self._bounds = bounds
        self._folder = None if folder is None else folder / "row_bounds"
        setting = bounds.max_row_tokens
        # Rank 0's look, since the ranks must plan the same rows.
        noted = ranks.from_main(_notes(self._folder) if self._folder and ranks.is_main() else [])
        known = [*noted, *([] if saved is None else [saved])]
        lowered = [note["tokens"] for note in known if note["setting"] == setting]
        self.tokens = min([setting, *lowered])
        if self.tokens < setting:
            LOG.warning(
                "memory has run out before: until gba.max_row_tokens is changed, rows are bounded by "
                "%d tokens instead of %d",
                self.tokens,
                setting,
            )

    @property
    def state(self) -> dict[str, int] | None:
        """The bound and the setting that it was lowered from, for a checkpoint; null while it is the
        setting."""
        if self.tokens == self._bounds.max_row_tokens:
            return None
        return {"tokens": self.tokens, "setting": self._bounds.max_row_tokens}

    def note(self) -> None:
        """Write a lowered bound down for the next start, outside any checkpoint."""
        if self._folder is not None and self.state is not None:
            # A file for each rank: those that run out at the same time do not meet.
            write_json(self._folder / f"rank-{ranks.rank():05d}.json", self.state)

    def of(self, trees: Sequence[Tree]) -> GbaConfig:
        """The bounds for rows of these trees: a lowered one still gives a single rollout a row."""
        setting = self._bounds.max_row_tokens
        if self.tokens == setting:
            return self._bounds
        tokens = min(setting, max(self.tokens, _longest_rollout(trees)))
        return self._bounds.model_copy(update={"max_row_tokens": tokens})

    def lower(self, trees: Sequence[Tree], plans: Sequence[RowPlan], reason: str) -> None:
        """Halve it, from the longest row on. Raises StageError when that row holds one rollout."""
        longest = max(plan.n_tokens for plan in plans)
        lower = max(longest // 2, _longest_rollout(trees))
        if lower >= longest:
            raise StageError(
                f"out of memory on a row of {longest} tokens, which holds one rollout only: lower "
                "rollout.max_completion_length, data.max_prompt_length or model.max_pixels, set "
                "model.gradient_checkpointing=true, or on a GPU lower "
                f"rollout.gpu_memory_utilization ({reason})"
            )
        LOG.warning(
            "out of memory on a row of %d tokens: until gba.max_row_tokens is changed, rows are bounded "
            "by %d tokens instead of %d, and the step is done again",
            longest,
            lower,
            self.tokens,
        )
        self.tokens = lower


class StepRows(Generic[Packed]):
    """The rows of one step: packed on first use, and anew, shorter, whenever memory runs out."""

    def __init__(
        self,
        policy: Policy,
        trees: Sequence[Tree],
        bound: RowBound,
        pack: Callable[[list[RowPlan]], Packed],
    ) -> None:
        self._policy, self._trees, self._bound, self._pack = policy, trees, bound, pack
        self._plans = own_rows(policy, trees, bound.of(trees))
        self._packed: Packed | None = None

    @property
    def packed(self) -> Packed:
        """What ``pack`` made."""
        if self._packed is None:
            self._packed = self._pack(self._plans)
        return self._packed

    def run(self, work: Callable[[Packed], Found]) -> Found:
        """``work(packed)``, which accumulates gradients; all of it again after memory ran out.

        Raises StageError when a row of one rollout does not fit. With several ranks any row can be in the
        middle of a collective, which the others would wait in for ever: there, it is an error at once, and
        the next start has the lower bound.
        """
        while True:
            try:
                return work(self.packed)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0] if str(error) else "MemoryError"
                if ranks.world_size() > 1:
                    self._bound.lower(self._trees, self._plans, reason)
                    self._bound.note()
                    raise StageError(
                        f"rank {ranks.rank()} is out of memory on rows of up to "
                        f"{max(plan.n_tokens for plan in self._plans)} tokens; the same command goes on "
                        f"from the last checkpoint with rows of up to {self._bound.tokens}, until "
                        f"gba.max_row_tokens is changed ({reason})"
                    ) from error
            # Outside the handler, because the error's traceback holds the tensors of the failed row.
            self._packed = None
            self._policy.discard()
            self._bound.lower(self._trees, self._plans, reason)
            self._plans = own_rows(self._policy, self._trees, self._bound.of(self._trees))


def _notes(folder: Path) -> list[dict[str, int]]:
    """What the ranks have written down with :meth:`RowBound.note`."""
    files = sorted(folder.glob("rank-*.json"))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def _longest_rollout(trees: Sequence[Tree]) -> int:
    """Tokens of the longest row with a single rollout."""
    from mmedx_fast.tree import count_tokens

    return max(
        count_tokens(replace(tree, branches=(branch,)))
        for tree in trees
        for branch in tree.branches
    )
