"""GBA: each question is answered under four clinical reasoning guidelines; rewards become advantages
relative to the question and to the guideline, and the policy is updated on packed trees of rollouts.

One step: rollouts -> rewards -> advantages -> one update (or ``num_iterations``) -> the new adapter, or with
``finetuning_type: full`` all weights, go to the engine. Frozen weights are never written; their checksum is
compared at the end.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mmedx_fast import ranks
from mmedx_fast.checkpoint import rng_state, set_rng_state
from mmedx_fast.config import deepspeed_settings
from mmedx_fast.progress import progress
from mmedx_fast.prompts import Question
from mmedx_fast.rollout import Interrupted, Rollout, RolloutEngine, Sampling
from mmedx_fast.rollout.restart import Weights
from mmedx_fast.run_folder import Stage, write_folder, write_text
from mmedx_fast.stages.ahead import Ahead, Batch
from mmedx_fast.stages.common import (
    Stopped,
    StopSignal,
    check_tree,
    data_note,
    finish,
    is_done,
    load_progress,
    metrics_log,
    save_progress,
    seed_everything,
    step_rates,
    take_over,
)
from mmedx_fast.stages.context import Context, StageError, batches
from mmedx_fast.stages.dsa import expert_adapter
from mmedx_fast.stages.gba_update import Learner, rollout_advantages
from mmedx_fast.stages.guard import BadSteps, RowBound
from mmedx_fast.stages.rollouts import (
    gather_rollouts,
    own_share,
    reward_columns,
    rollout_metrics,
    rollout_records,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mmedx_fast.cost import PhaseMeter

LOG = logging.getLogger(__name__)
SAMPLES_KEPT = 16


def gba_stage(ctx: Context) -> Stage:
    """The stage's place in the run folder, under the settings its result depends on."""
    sections: tuple[str, ...] = ("seed", "model", "data", "phantom", "lora", "rollout", "gba")
    if ctx.cfg.gba.start != "base":
        sections = (*sections, "dsa")
    return ctx.run.stage("gba", ctx.cfg.fingerprint(*sections))


def rl_model(ctx: Context) -> Path:
    """The RL model's folder: an adapter, or a whole model where ``gba.finetuning_type`` is full.

    Raises StageError when GBA has not finished.
    """
    stage = gba_stage(ctx)
    if not stage.done():
        raise StageError(f"there is no finished RL model in {stage.dir}; run mmedx gba first")
    return stage.dir / _made(ctx)


def _made(ctx: Context) -> str:
    """The name of the folder that the stage's result is in."""
    return "model" if ctx.cfg.gba.finetuning_type == "full" else "adapter"


def start_adapter(ctx: Context, stage: Stage) -> Path | None:
    """The adapter that RL starts from, made on first use; null for ``base``."""
    start = ctx.cfg.gba.start
    if start == "base":
        return None
    if start != "experts_mean":
        return expert_adapter(ctx, start)
    folder = stage.dir / "start"

    def make() -> None:
        from mmedx_fast.stages.adapters import write_mean_adapter

        sources = {name: expert_adapter(ctx, name) for name in ctx.cfg.dsa.specialties}
        with write_folder(folder) as partial:
            write_mean_adapter(partial, sources, ctx.cfg.lora, ctx.cfg.gba.start_scale)

    if not ranks.from_main(folder.exists()):
        ranks.main_only(make)
    return folder


def run_gba(ctx: Context) -> dict[str, Any]:
    """Train the RL model if it is not done yet; returns the stage's result."""
    stage = gba_stage(ctx)
    if not is_done(stage):
        if ctx.cfg.gba.reuse is not None:
            take_over(stage, Path(ctx.cfg.gba.reuse), _made(ctx))
        else:
            _Trainer(ctx, stage).run()
    return stage.result()


class _Trainer:
    """State of one GBA run; ``run`` reads as the algorithm."""

    def __init__(self, ctx: Context, stage: Stage) -> None:
        from mmedx_fast.policy import Policy
        from mmedx_fast.rewards import RewardRunner

        self.began = time.perf_counter()
        self.ctx, self.stage, self.cfg = ctx, stage, ctx.cfg
        self.gba = ctx.cfg.gba
        self.full = self.gba.finetuning_type == "full"
        self.questions = ctx.questions("train")
        self.rewards = RewardRunner([(r.name, r.weight, dict(r.kwargs)) for r in self.gba.rewards])
        self.async_steps = ctx.cfg.rollout.async_steps
        self.ahead = Ahead(self.make, lambda: ctx.engine.interrupt())
        self.order = list(
            batches(
                len(self.questions),
                self.gba.questions_per_step,
                self.gba.steps,
                (self.cfg.seed, "gba"),
            )
        )
        seed_everything(self.cfg.seed)
        start = start_adapter(ctx, stage)
        self.policy = Policy.load(
            ctx.model_path,
            model=ctx.model,
            lora=self.cfg.lora,
            finetuning_type=self.gba.finetuning_type,
            freeze_vision_tower=self.gba.freeze_vision_tower,
            adapter=start,
            reference=self.gba.loss.beta > 0,
            optimizer=self.gba.optimizer,
            total_steps=self.gba.steps * self.gba.num_iterations,
            deepspeed=deepspeed_settings(self.cfg),
            seed=self.cfg.seed,
            banned_token_ids=ctx.builder.banned_token_ids,
        )

    def run(self) -> None:
        from mmedx_fast.cost import PhaseMeter

        try:
            check_tree(self.policy, self.questions, lambda _: self.gba.guidelines)
            checksum = self.policy.base_checksum()
            done, meter_state, extra = load_progress(
                self.stage, self.policy, self.questions, self.cfg.data.train
            )
            self.meter: PhaseMeter = PhaseMeter(meter_state)
            self.meter.add("start", time.perf_counter() - self.began, calls=1)
            self.rates = step_rates(self.policy, self.cfg, full=self.full, engine=True)
            self.restore_ahead(done, extra)
            bound = RowBound(self.gba, extra.get("row_bound"), self.stage.dir)
            self.learner = Learner(self.cfg, self.policy, self.meter, self.rates, bound)
            self.bad_steps = BadSteps(
                self.stage, self.gba.optimizer, "gba.optimizer", extra.get("bad_steps", 0)
            )
            tb = self.ctx.run.path / "tb" / self.stage.name
            with (
                metrics_log(self.stage, tb, done) as log,
                progress(self.gba.steps, "GBA", unit="step", start=done) as bar,
                StopSignal() as stop,
            ):
                with self.meter.phase("engine start"):
                    self.ctx.serve_weights(self.ctx.model_path)
                self.sync(done)
                self.stop, self.saved = stop, done
                for step in range(done + 1, self.gba.steps + 1):
                    questions = self.questions_of(step)
                    self.rng = rng_state()
                    metrics = self.step(step, questions)
                    taken = self.meter.take()
                    log.log(step, metrics | taken | self.rates.take(taken, len(questions)))
                    stopping = stop.agreed()
                    due = step % self.gba.save_steps == 0 or stopping
                    if due and step < self.gba.steps:
                        self.save(step)
                        if stopping:
                            self.stopped(f"GBA stopped after step {step}; it is saved")
                    bar.update(1, reward=metrics["reward"])
            self._finish(checksum)
            if stop.agreed():
                raise Stopped("GBA is finished")
        finally:
            self.ahead.close()
            self.policy.close()

    def step(self, step: int, questions: list[Question]) -> dict[str, float]:
        """Rollouts, rewards, advantages, update, sync."""
        rollouts, made = self.generate(step, questions)
        with self.meter.phase("reward"):
            columns = reward_columns(questions, rollouts)
            scores = self.scores(columns)
            advantages, use, metrics = self.advantages(rollouts, scores)
        self.go_on(step)
        if ranks.is_main():
            self.keep_samples(step, columns, scores, advantages)
        learnt, raw = self.learner.update(questions, rollouts, advantages, use)
        metrics |= learnt
        if raw:
            records = partial(rollout_records, columns, rollouts, scores, advantages, use)
            self.bad_steps.check(step, learnt, raw, partial(records, self.rewards.names))
        self.sync(step)
        metrics["rollout/version_lag"] = float(step - 1 - made.version)
        if made.hit_rate is not None:
            metrics["prefix_cache_hit_rate"] = made.hit_rate
        return metrics | rollout_metrics(rollouts)

    # -- checkpoints -----------------------------------------------------------------------------

    def save(self, step: int) -> None:
        """The state after ``step``, while it is the trainer's."""
        extra = {
            "data": data_note(self.questions),
            "row_bound": self.learner.bound.state,
            "bad_steps": self.bad_steps.in_a_row,
        }
        if self.async_steps:
            extra["ahead"] = self.ahead.state(step + 1)
        with self.meter.phase("checkpoint"):
            save_progress(self.stage, step, self.policy, self.meter, self.cfg, extra)
        self.saved = step

    def go_on(self, step: int) -> None:
        """Until the update of ``step`` the trainer's state is that of the step before: where a rank was
        asked to stop, that one is saved and the run ends. Every rank calls it."""
        if not self.stop.agreed():
            return
        self.ahead.drop()
        set_rng_state(*self.rng)  # rewards may have drawn
        if step - 1 > self.saved:
            self.save(step - 1)
        kept = f"step {step - 1} is saved" if step > 1 else "there is nothing to save yet"
        self.stopped(f"GBA stopped before the update of step {step}; {kept}")

    def stopped(self, message: str) -> NoReturn:
        """End the run. Every rank calls it: one that ends makes launchers end those that still write."""
        ranks.barrier()
        raise Stopped(message)

    # -- rollouts --------------------------------------------------------------------------------

    def questions_of(self, step: int) -> list[Question]:
        """The questions of ``step``, which is counted from 1."""
        return [self.questions[i] for i in self.order[step - 1]]

    def generate(self, step: int, questions: list[Question]) -> tuple[list[Rollout], Batch]:
        """The rollouts of all questions, and how this rank made its share of them."""
        with self.meter.phase("rollout"):
            made = self.take(step)
            self.go_on(step)
            assert made is not None
            if self.async_steps and step < self.gba.steps:
                self.ahead.start(step + 1)
            rollouts = gather_rollouts(made.rollouts, own_share(self.ctx.engine, len(questions)))
        self.meter.add("rollout", tokens=sum(len(r.token_ids) for r in rollouts))
        if not self.async_steps:
            self.ctx.engine.sleep()
        return rollouts, made

    def take(self, step: int) -> Batch | None:
        """This rank's rollouts of ``step``; null where they were cut short because it is to stop."""
        try:
            with self.stop.cutting(self.ctx.engine.interrupt):
                return self.ahead.take(step)
        except Interrupted:
            if not self.stop.requested:
                raise
            return None

    def restore_ahead(self, done: int, extra: Mapping[str, Any]) -> None:
        """Put back the rollouts that waited in the checkpoint of step ``done``.

        Rank 0 saves and gets them; the other ranks, for which its engine makes them too, must not make
        theirs either: the version they come from is gone.
        """
        if self.async_steps and 0 < done < self.gba.steps:
            questions = self.questions_of(done + 1)
            self.ahead.restore(extra.get("ahead"), done + 1, questions, own=ranks.is_main())

    def make(self, step: int) -> Batch:
        """This rank's rollouts of ``step``, with the adapter that the engine serves; may run in a
        thread beside the training."""
        engine, settings = self.ctx.engine, self.cfg.rollout
        expected = max(0, step - 1 - self.async_steps)
        if engine.version != expected:
            raise StageError(
                f"the rollouts of step {step} come from adapter version {expected}, and the engine "
                f"serves {engine.version}; start the run again to go on from its last checkpoint"
            )
        sampling = Sampling(
            n=settings.num_generations,
            temperature=settings.temperature,
            max_tokens=settings.max_completion_length,
            seed=_step_seed(self.cfg.seed, step),
        )
        questions = self.questions_of(step)
        asked = [questions[i] for i in own_share(engine, len(questions))]
        rollouts = []
        if asked:
            rollouts = engine.generate(asked, self.gba.guidelines, sampling, self.stop.heed)
        return Batch(rollouts, engine.version, engine.stats().prefix_cache_hit_rate)

    def sync(self, step: int) -> None:
        """Serve the current adapter, or the current weights, from now on."""
        if self.async_steps:
            with self.meter.phase("rollout"):
                self.ahead.wait()  # the adapter before this one is in use until then
        with self.meter.phase("sync"):
            engine = self.ctx.engine
            if self.full and engine.takes_tensors:
                engine.wake()
                self.ctx.serve_trained(Weights(self.policy.weights), version=step)
            else:
                self._sync_folder(engine, step)

    def _sync_folder(self, engine: RolloutEngine, step: int) -> None:
        """Through a folder that the engine reads; the one before is deleted. A start writes it anew, so
        that no step waits for a disk to have it."""
        folder = self.stage.dir / "sync" / f"step-{step:06d}"
        if self.full:
            self.policy.save_model(folder, self.gba.max_shard_size, durable=False)
        else:
            self.policy.save_adapter(folder, durable=False)
        ranks.barrier()
        engine.wake()
        if self.full:
            self.ctx.serve_weights(folder, version=step)
        else:
            engine.load_adapter(folder, version=step)
        ranks.barrier()
        for old in folder.parent.iterdir() if ranks.is_main() else ():
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)

    # -- rewards ---------------------------------------------------------------------------------

    def scores(self, columns: dict[str, list[Any]]) -> np.ndarray:
        """Rewards [B, M] float32. Rank 0's: the ranks must agree on what trains."""
        import numpy as np

        scores = self.rewards.score(columns)
        if ranks.world_size() == 1:
            return scores
        return np.asarray(ranks.from_main(scores.tolist()), dtype=scores.dtype)

    def advantages(
        self, rollouts: list[Rollout], scores: np.ndarray
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """See :func:`mmedx_fast.stages.gba_update.rollout_advantages`."""
        return rollout_advantages(self.gba, self.rewards, rollouts, scores)

    # -- records ---------------------------------------------------------------------------------

    def keep_samples(
        self, step: int, columns: dict[str, list[Any]], scores: np.ndarray, advantages: Tensor
    ) -> None:
        """A few rollouts of the step, readable: ``samples/step-000010.jsonl``."""
        lines = []
        stride = max(1, len(columns["id"]) // SAMPLES_KEPT)
        for i in range(0, len(columns["id"]), stride):
            row = {key: columns[key][i] for key in ("id", "guideline", "completions", "answer")}
            row |= {"advantage": round(float(advantages[i]), 4)}
            row |= {
                name: None if math.isnan(value) else round(float(value), 4)
                for name, value in zip(self.rewards.names, scores[i], strict=True)
            }
            lines.append(json.dumps(row, ensure_ascii=False))
        write_text(self.stage.dir / "samples" / f"step-{step:06d}.jsonl", "\n".join(lines) + "\n")

    def _finish(self, checksum: str) -> None:
        from mmedx_fast.metrics import read_metrics

        if self.policy.base_checksum() != checksum:
            raise StageError(
                "the trainer's frozen weights changed during RL; its model is not valid"
            )
        if self.full:
            self.policy.save_model(self.stage.dir / "model", self.gba.max_shard_size)
        else:
            self.policy.save_adapter(self.stage.dir / "adapter")
        if ranks.is_main():
            shutil.rmtree(self.stage.dir / "sync", ignore_errors=True)
        rows = read_metrics(self.stage.dir / "metrics.jsonl")
        phases = self.meter.to_dict()
        start = self.stage.dir / "start" / "mean.json"
        finish(
            self.stage,
            {
                "steps": self.gba.steps,
                "start": self.gba.start,
                "start_energy_kept": json.loads(start.read_text())["energy_kept"]
                if start.exists()
                else None,
                "reward": rows[-1]["reward"],
                "base_fingerprint": self.policy.fingerprint,
                "seconds": sum(phase["seconds"] for phase in phases.values()),
                "phases": phases,
            },
        )


def _step_seed(seed: int, step: int) -> int:
    digest = hashlib.sha256(f"{seed}:{step}".encode()).digest()
    return int.from_bytes(digest[:6], "big")
