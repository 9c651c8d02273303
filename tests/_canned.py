"""A rollout engine with canned answers, and an evaluation of many questions with it: ``python tests/_canned.py``.
Loaded by path."""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmedx_fast.config import DataConfig
from mmedx_fast.data.records import ImageRef, Record
from mmedx_fast.evaluation.asking import Asking
from mmedx_fast.evaluation.chunks import Questioner
from mmedx_fast.evaluation.results import conclude
from mmedx_fast.evaluation.rows import gold_answer
from mmedx_fast.prompts import PromptBuilder
from mmedx_fast.rollout.base import (
    BASE_VERSION,
    AsksByQuestion,
    EngineError,
    EngineStats,
    Progress,
    Request,
    Rollout,
    Sampling,
    request_seeds,
)
from mmedx_fast.tiny import assets_folder

OPTIONS = {"A": "pneumonia", "B": "stroke", "C": "scurvy", "D": "melanoma"}


class CannedEngine(AsksByQuestion):
    """:class:`mmedx_fast.rollout.base.RolloutEngine` without a model. What it answers depends on the request's seed
    and the sample's number, as with a real one; about half is right and a tenth cannot be read. ``asked`` notes
    every request; ``fail_at`` lets a call fail, ``bare`` leaves out the tags, ``pause`` is slept through per call.
    ``told`` notes the other calls; the one that ``dies_in`` names breaks the engine."""

    name, shared, takes_tensors, version = "canned", False, False, BASE_VERSION

    def __init__(
        self,
        *,
        fail_at: int | None = None,
        bare: bool = False,
        pause: float = 0.0,
        note: bool = True,
        dies_in: str | None = None,
    ) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.dies_in = dies_in
        self.asked: list[tuple[str, str | None]] = []
        self.calls, self.fail_at, self.bare, self.pause, self.note = 0, fail_at, bare, pause, note

    def generate_requests(
        self, requests: Sequence[Request], sampling: Sampling, progress: Progress | None = None
    ) -> list[Rollout]:
        if self.calls == self.fail_at:
            raise RuntimeError("canned failure")
        self.calls += 1
        time.sleep(self.pause)
        if self.note:
            self.asked += [(question.id, guideline) for question, guideline in requests]
        seeds = request_seeds(requests, sampling.seed)
        made = []
        for index, (question, guideline) in enumerate(requests):
            for sample in range(sampling.n):
                digest = hashlib.sha256(f"{seeds[index] + sample}".encode()).digest()
                text = self._text(question.record, digest[0])
                made.append(
                    Rollout(
                        question=index,
                        guideline=guideline,
                        sample=sample,
                        prompt_ids=question.prompt_ids(guideline),
                        token_ids=[5] * (1 + digest[1] % 7),
                        logprobs=[-digest[2] / 64] * (1 + digest[1] % 7),
                        finish_reason="length" if digest[0] < 25 else "stop",
                        text=text,
                    )
                )
                if progress:
                    progress(len(made), len(requests) * sampling.n)
        return made

    def _text(self, record: Record, draw: int) -> str:
        right = gold_answer(record)
        wrong = [letter for letter in record.options or {"lungs": ""} if letter != right]
        said = right if draw % 2 else wrong[draw // 2 % len(wrong)]
        if draw < 25:
            return "<think>The cough is"
        return said if self.bare else f"<think>The cough decides.</think><answer>{said}</answer>"

    def _tell(self, name: str, *given: Any) -> None:
        self.told.append((name, *given))
        if self.dies_in == name:
            raise EngineError(f"broken in {name}")

    def load_adapter(self, folder: Any, version: int) -> None:
        self._tell("load_adapter", folder, version)
        self.version = BASE_VERSION if folder is None else version

    def load_weights(self, folder: Any, version: int = BASE_VERSION) -> None:
        self._tell("load_weights", folder, version)
        self.version = version

    def update_weights(self, weights: Any, version: int) -> None:
        self._tell("update_weights", list(weights), version)
        self.version = version

    def interrupt(self) -> None: ...

    def sleep(self) -> None:
        self._tell("sleep")

    def wake(self) -> None:
        self._tell("wake")

    def reset_caches(self) -> None:
        self._tell("reset_caches")

    def stats(self) -> EngineStats:
        self._tell("stats")
        return EngineStats(
            requests=0, sequences=0, generated_tokens=0, seconds=0.0, prefix_cache_hit_rate=None
        )

    def close(self) -> None:
        self._tell("close")


class CannedPrompts(PromptBuilder):
    """Prompts of three tokens and the images, where tokenising 100,000 questions would say nothing."""

    def encode(self, record: Record, guideline: str | None) -> list[int]:
        return [1, 2, 3] + [self.image_token_id] * len(record.images)


def records(count: int, image: Path | None = None) -> Iterator[Record]:
    """Made-up questions, one at a time."""
    specialties = ("adult_medicine", "pediatrics", "brain_senses", "oncology_surgery")
    for number in range(count):
        letter = "ABCD"[number % 4]
        yield Record(
            id=f"q{number:06d}",
            dataset="canned",
            split="test",
            images=() if image is None else (ImageRef(path=image),),
            question=f"Patient {number} has had cough and fever for {number % 9} days. Which diagnosis?",
            options=OPTIONS,
            answer_label=letter,
            answer=OPTIONS[letter],
            specialty=specialties[number % 3],
            meta={"body_system": "Respiratory" if number % 2 else "Skeletal", "nested": {"a": 1}},
        )


def main() -> None:
    """Ask ``--count`` questions into ``--folder`` (going on where a killed start stopped); prints JSON with the
    figures and this process's peak memory in MiB."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--image", type=Path)
    parser.add_argument("--pause", type=float, default=0.0)
    options = parser.parse_args()
    builder = CannedPrompts.from_folder(assets_folder(), DataConfig(), 40_000)
    engine = CannedEngine(pause=options.pause, note=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    Questioner(
        engine=engine,
        builder=builder,
        asking=Asking(guideline="none"),
        chunk_size=options.chunk,
    ).answer(
        records(options.count, options.image), "canned", options.folder / "predictions.journal", "f"
    )
    found = conclude(options.folder, "canned")
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"before": before, "after": after, "calls": engine.calls} | found))


if __name__ == "__main__":
    main()
