"""How questions are asked: under which guidelines, how many answers of each, with which sampling."""

from __future__ import annotations

import dataclasses
from typing import Literal

from mmedx_fast.config import EvalConfig
from mmedx_fast.data.records import GUIDELINE_NAMES
from mmedx_fast.rollout.base import Sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asking:
    """``guideline``: one's name, ``each``, ``none``, or None for all in turn by question."""

    guideline: str | None = None
    prompt: Literal["train", "medevalkit"] = "train"
    sampling: Sampling = Sampling(greedy=True)

    @classmethod
    def of(cls, settings: EvalConfig, seed: int) -> Asking:
        """What ``eval`` of a config asks for. Samples depend on ``seed``, question, guideline and number."""
        sampling = Sampling(
            n=settings.num_samples,
            greedy=settings.num_samples == 1,
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_tokens=settings.max_completion_length,
            seed=seed,
        )
        return cls(guideline=settings.guideline, prompt=settings.prompt, sampling=sampling)

    @classmethod
    def greedy(cls, settings: EvalConfig) -> Asking:
        """One greedy answer a question in the training prompt, for choosing between models."""
        guideline = None if settings.guideline == "each" else settings.guideline
        sampling = Sampling(greedy=True, max_tokens=settings.max_completion_length)
        return cls(guideline=guideline, sampling=sampling)

    def guidelines(self, number: int) -> tuple[str | None, ...]:
        """The guidelines under which question ``number`` of a set (from 0) is asked."""
        if self.prompt == "medevalkit" or self.guideline == "none":
            return (None,)
        if self.guideline == "each":
            return GUIDELINE_NAMES
        return (self.guideline or GUIDELINE_NAMES[number % len(GUIDELINE_NAMES)],)

    @property
    def answers(self) -> int:
        """Answers to one question."""
        return len(self.guidelines(0)) * self.sampling.n
