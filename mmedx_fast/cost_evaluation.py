"""How many answers the evaluation of a run asks for, as its configuration tells it.

What ``stages.evaluate`` and ``evaluation.asking`` do, without what they import.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from mmedx_fast.config import Config, EvalSetConfig
from mmedx_fast.data.records import GUIDELINE_NAMES

TEST_QUESTIONS = 2000
"""Taken for a set of unknown size: MedXpertQA-MM's test set."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SetSize:
    """Questions of a set; ``assumed`` where the configuration does not tell."""

    questions: int
    assumed: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationCount:
    """``models`` answer every question of ``sets`` (by name), asked in ``prompts_per_question`` ways with
    ``answers_per_prompt`` each; ``guided`` where a prompt has a guideline."""

    models: int
    sets: dict[str, SetSize]
    prompts_per_question: int
    answers_per_prompt: int
    guided: bool

    @classmethod
    def of(cls, cfg: Config, test_questions: int | None = None) -> EvaluationCount:
        """What ``cfg.eval`` asks for; ``test_questions`` is the size of the run's own test set, and of every
        set of ``eval.sets`` that the configuration does not size."""
        settings = cfg.eval
        guided = settings.prompt == "train" and settings.guideline != "none"
        return cls(
            models=sum(
                len(cfg.dsa.specialties) if name == "experts" else 1 for name in settings.models
            ),
            sets={
                name: _configured_size(cfg, chosen, test_questions)
                for name, chosen in settings.sets.items()
            }
            or {"test": _own_size(cfg, test_questions)},
            prompts_per_question=len(GUIDELINE_NAMES) if settings.guideline == "each" else 1,
            answers_per_prompt=settings.num_samples,
            guided=guided,
        )

    @property
    def questions(self) -> int:
        """Questions of all sets to all models."""
        return self.models * sum(size.questions for size in self.sets.values())

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def merge_candidates(cfg: Config) -> int:
    """Merges of which CACI takes the best on the validation set; 0 where there is nothing to choose."""
    caci = cfg.caci
    count = len(caci.density) * len(caci.scale) * len(caci.rl_weight)
    return count if count > 1 else 0


def _own_size(cfg: Config, given: int | None) -> SetSize:
    if given is not None:
        return SetSize(questions=given, assumed=True)
    phantom = cfg.phantom.test if cfg.data.test == "phantom" else None
    return _size(phantom, cfg.data.limit, TEST_QUESTIONS)


def _configured_size(cfg: Config, chosen: EvalSetConfig, given: int | None) -> SetSize:
    phantom = cfg.phantom
    splits = {"train": phantom.train, "validation": phantom.validation, "test": phantom.test}
    size = splits.get(chosen.split) if chosen.path == "phantom" else None
    return _size(size, chosen.limit, given or TEST_QUESTIONS)


def _size(known: int | None, limit: int | None, otherwise: int) -> SetSize:
    bounds = [bound for bound in (known, limit) if bound is not None]
    return SetSize(questions=min(bounds, default=otherwise), assumed=not bounds)
