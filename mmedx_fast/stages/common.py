"""Parts that the training stages share: loading a policy, checkpoints with every generator's state."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmedx_fast.config import Config, ConfigError, GbaConfig
from mmedx_fast.prompts import Question
from mmedx_fast.run_folder import Stage, write_folder

if TYPE_CHECKING:
    from mmedx_fast.cost import PhaseMeter
    from mmedx_fast.meter import StepRates
    from mmedx_fast.planner import RowPlan
    from mmedx_fast.policy import Policy
    from mmedx_fast.tree import PackedRow, Tree


def save_progress(
    stage: Stage,
    step: int,
    policy: Policy,
    meter: PhaseMeter,
    cfg: Config,
    extra: Mapping[str, Any],
) -> None:
    """Checkpoint after ``step`` updates: trained parameters, optimizer, schedule, generators, phase
    meter.

    Every rank calls it, rank 0 writes.
    """
    from mmedx_fast import ranks
    from mmedx_fast.checkpoint import rng_state, save_checkpoint

    tensors, meta = policy.named_state()
    if not ranks.is_main():
        for _ in tensors:  # each is gathered from all ranks
            pass
        return
    rng_tensors, rng_meta = rng_state()
    state = itertools.chain(
        ((f"policy/{name}", tensor) for name, tensor in tensors), rng_tensors.items()
    )
    info = {"policy": meta, "rng": rng_meta, "meter": meter.to_dict(), "extra": dict(extra)}
    save_checkpoint(
        stage.dir, step, state, info, cfg.keep_checkpoints, max_shard_size=cfg.gba.max_shard_size
    )


def data_note(questions: Sequence[Question]) -> dict[str, Any]:
    """What tells one list of training questions from another, for a checkpoint's ``extra["data"]``: their
    number, and a hash of their ids and texts in order. An id alone may be a row's number."""
    rows = ([q.id, q.record.question, q.record.answer] for q in questions)
    lines = "\n".join(json.dumps(row) for row in rows)
    return {"count": len(questions), "sha256": hashlib.sha256(lines.encode()).hexdigest()}


def load_progress(
    stage: Stage, policy: Policy, questions: Sequence[Question], source: str
) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """(updates done, phase meter state, extra) of the newest good checkpoint; (0, {}, {}) without one.

    Every rank calls it. Raises ConfigError when the ranks find different steps, and when that was trained
    on others than ``questions``, which come from ``source`` (``data.train``): a step's questions follow from
    its number, so all later ones would be others too.
    """
    from mmedx_fast import ranks
    from mmedx_fast.checkpoint import load_latest, set_rng_state

    found = load_latest(stage.dir)
    steps = ranks.all_gather(found[0] if found else 0)
    if len(set(steps)) > 1:
        listed = ", ".join(f"rank {rank} step {step}" for rank, step in enumerate(steps))
        raise ConfigError(
            f"the ranks find different checkpoints in {stage.dir} ({listed}): run_dir must be one folder "
            f"that all machines share"
        )
    if found is None:
        return 0, {}, {}
    step, tensors, meta = found
    before, now = meta["extra"].get("data"), data_note(questions)
    if before not in (None, now):  # earlier checkpoints do not say
        raise ConfigError(
            f"data.train = {source}: it has changed since {stage.name} was saved after step {step}, "
            f"which was training on {before['count']:,} questions (now {now['count']:,}): put the data "
            f"back as it was, or delete {stage.dir} to begin this stage anew"
        )
    policy.load_state(tensors.under("policy/"), meta["policy"])
    set_rng_state(tensors, meta["rng"])
    return step, meta["meter"], meta["extra"]


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch."""
    import random

    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def row_target(backend: str, device: str) -> int | None:
    """How long a row should get. A dense mask grows with its square, and on a CPU longer rows only take more
    memory; on a GPU a row is as long as ``gba.max_row_tokens`` lets it."""
    from mmedx_fast.planner import CPU_TARGET_TOKENS, DENSE_TARGET_TOKENS

    if backend == "dense":
        return DENSE_TARGET_TOKENS
    return CPU_TARGET_TOKENS if device == "cpu" else None


def own_rows(policy: Policy, trees: Sequence[Tree], bounds: GbaConfig) -> list[RowPlan]:
    """This rank's rows of a step; every rank plans the same trees, and all get equally many rows."""
    from mmedx_fast import ranks

    target = row_target(policy.module.backend, policy.device.type)
    return rank_rows(trees, ranks.world_size(), bounds, target)[ranks.rank()]


def rank_rows(
    trees: Sequence[Tree], world: int, bounds: GbaConfig, target: int | None
) -> list[list[RowPlan]]:
    """The rows of every one of ``world`` ranks, within the configured bounds."""
    from mmedx_fast.planner import plan_ranks

    return plan_ranks(
        trees,
        world,
        bounds.max_row_tokens,
        target_tokens=target,
        max_response_tokens=bounds.max_response_tokens,
        max_images=bounds.max_images,
    )


def all_parts(raw: list[dict[str, float]]) -> list[dict[str, float]]:
    """The raw metrics of all ranks' rows, for ``merge_metrics`` and ``reduce_metrics``."""
    from mmedx_fast import ranks

    return [part for own in ranks.all_gather(raw) for part in own]


def row_tokens(rows: Iterable[PackedRow]) -> tuple[int, int]:
    """Tokens of the step's rows, all ranks together: (as plain rows, as computed)."""
    from mmedx_fast import ranks

    counts = ranks.all_gather([[row.n_tokens_plain, row.n_tokens] for row in rows])
    plain, computed = (sum(column) for column in zip(*sum(counts, []), strict=True))
    return plain, computed


def step_rates(
    policy: Policy, cfg: Config, *, full: bool = False, engine: bool = False
) -> StepRates:
    """What turns this policy's steps into rates: tokens a second, MFU, GPU hours (with those of the rollout
    ``engine`` where the stage has one)."""
    import torch

    from mmedx_fast import ranks
    from mmedx_fast.flops import ModelShape
    from mmedx_fast.gpus import engine_gpus, match_gpu
    from mmedx_fast.meter import StepRates

    cuda = policy.device.type == "cuda"
    world = ranks.world_size()
    beside = engine_gpus(cfg.rollout, world) if engine else 0
    return StepRates(
        ModelShape.from_config(policy.module.base.config.to_dict()),
        cfg.lora.r,
        match_gpu(torch.cuda.get_device_name(policy.device)) if cuda else None,
        world + beside if cuda else 0,
        full,
        not policy.tower_frozen,
    )


class _NoLog:
    """Takes metrics and writes nothing."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        pass


def metrics_log(stage: Stage, tb_dir: Path, done: int) -> AbstractContextManager[Any]:
    """The stage's MetricsLogger on rank 0; on the others one that writes nothing."""
    from mmedx_fast import ranks
    from mmedx_fast.metrics import MetricsLogger

    if not ranks.is_main():
        return nullcontext(_NoLog())
    return MetricsLogger(stage.dir, tb_dir, resume_step=done)


def is_done(stage: Stage) -> bool:
    """Whether the stage is done, as rank 0 sees it: the ranks must all skip it or all work on it."""
    from mmedx_fast import ranks

    done: bool = ranks.from_main(stage.done())
    return done


def finish(stage: Stage, result: dict[str, Any]) -> None:
    """Rank 0 marks the stage as done; the other ranks see it when this returns."""
    from mmedx_fast import ranks

    if ranks.is_main():
        stage.finish(result)
    ranks.barrier()


def check_tree(
    policy: Policy,
    questions: Sequence[Question],
    guidelines: Callable[[Question], Sequence[str | None]],
) -> None:
    """Before training: one packed tree must give the log-probs of plain rows, or training stops here.

    The tree is the first question's that has an image and several prompts (``guidelines`` names them); where none
    has both, the first with an image, or with several prompts. Its first prompt has two responses.

    Raises TreeMismatchError with the difference.
    """
    from mmedx_fast.tree import Branch, Tree

    question = max(questions, key=lambda q: (bool(q.images), len(guidelines(q)) > 1))
    first, second = (
        question.builder.response_ids(f"<think>\nA check.\n</think>\n<answer>{letter}</answer>")
        for letter in "AB"
    )
    prompts = [question.prompt_ids(name) for name in guidelines(question)]
    branches = (Branch(prompts[0], second), *(Branch(prompt, first) for prompt in prompts))
    policy.verify_tree(Tree(branches, question.pixel_values, question.image_grid_thw, question.id))


def take_over(stage: Stage, source: Path, made: str = "adapter") -> None:
    """Copy a finished stage from another run folder: what it ``made``, its start, its metrics; rank 0
    does it."""
    from mmedx_fast import ranks

    ranks.main_only(lambda: _copy_stage(stage, source, made))


def _copy_stage(stage: Stage, source: Path, made: str) -> None:
    theirs = source / stage.name
    try:
        result = json.loads((theirs / "done.json").read_text(encoding="utf-8"))["result"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"reuse = {source}: {theirs} holds no finished stage ({error}); finish that run first"
        ) from None
    if not (theirs / made).is_dir():
        raise ConfigError(
            f"reuse = {source}: {theirs} holds no {made}; that run had another gba.finetuning_type"
        )
    for name in ("start", made):
        if (theirs / name).is_dir():
            with write_folder(stage.dir / name) as folder:
                shutil.copytree(theirs / name, folder, dirs_exist_ok=True)
    shutil.copyfile(theirs / "metrics.jsonl", stage.dir / "metrics.jsonl")
    stage.finish({**result, "seconds": 0.0, "phases": {}, "reused": str(source)})


ONE_STOP_SECONDS = 1.0
"""Signals that follow each other within this time are one wish to stop."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after the work so far was saved."""


class StopSignal:
    """While open, SIGINT and SIGTERM are remembered, so that what is finished can be saved.

    Another SIGINT interrupts at once when it comes more than :data:`ONE_STOP_SECONDS` after the signal
    before: launchers pass one Ctrl-C on as two signals in a moment. Another SIGTERM changes nothing; whoever
    means it has SIGKILL.
    """

    def __init__(self) -> None:
        self.requested = False
        self._last = -math.inf
        self._cut: Callable[[], None] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        import signal
        import threading

        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        import signal

        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; every rank calls it at the same place."""
        from mmedx_fast import ranks

        return any(ranks.all_gather(self.requested))

    @contextmanager
    def cutting(self, cut: Callable[[], None]) -> Iterator[None]:
        """In the block a signal calls ``cut``, which ends what the block does; where one has come
        before, the block is not begun: Interrupted is raised."""
        self._cut = cut
        try:
            self.heed()
            yield
        finally:
            self._cut = None

    def heed(self, *_: object) -> None:
        """Raise Interrupted in a block of :meth:`cutting`, once a signal has come. An engine's
        ``progress``, for a ``cut`` that came too early to find the engine at work."""
        from mmedx_fast.rollout import Interrupted

        if self.requested and self._cut is not None:
            raise Interrupted("the run was asked to stop")

    def _handle(self, number: int, _frame: object) -> None:
        import signal

        before, self._last = self._last, time.monotonic()
        if self.requested:
            if number == signal.SIGINT and self._last - before > ONE_STOP_SECONDS:
                raise KeyboardInterrupt
            return
        self.requested = True
        said = "stopping, and saving what is finished; Ctrl-C once more to stop at once"
        print(f"\n{said}", file=sys.stderr, flush=True)
        if self._cut is not None:
            self._cut()
