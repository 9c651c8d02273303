"""What the stages of one run share: the folder, the data, the prompts, and one rollout engine."""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mmedx_fast import ranks
from mmedx_fast.config import Config, ConfigError, SplitName
from mmedx_fast.data.images import ImageError
from mmedx_fast.data.loaders import Rejected, assert_disjoint, load_records
from mmedx_fast.data.phantom import write_phantom
from mmedx_fast.data.records import Record
from mmedx_fast.evaluation.chunks import unusable
from mmedx_fast.evaluation.medevalkit import MedEvalKitPrompts
from mmedx_fast.evaluation.sets import EvalSet, configured_set
from mmedx_fast.progress import progress
from mmedx_fast.prompts import PromptBuilder, PromptError, Question
from mmedx_fast.rollout import BASE_VERSION, RolloutEngine, create_engine
from mmedx_fast.rollout.restart import RestartingEngine
from mmedx_fast.run_folder import RunFolder, write_text

LOG = logging.getLogger(__name__)


class StageError(RuntimeError):
    """A stage that cannot run; the message says what is missing and which command makes it."""


@contextmanager
def open_context(cfg: Config, reads: bool = False) -> Iterator[Context]:
    """The run's folder and what its stages share.

    Under a launcher every rank calls it: rank 0 locks the folder and writes in it, the others read. With
    ``reads`` rank 0 too leaves it as it is, and a run may be at work there.

    Raises:
        RunFolderError: the folder is in use or cannot be made (on the other ranks
            :class:`mmedx_fast.ranks.OtherRankError`).
    """
    ranks.join()
    writes = ranks.is_main() and not reads
    run = ranks.main_first(lambda: RunFolder.open(cfg, exclusive=writes))
    with run, Context(cfg, run, reads=reads) as ctx:
        if ranks.world_size() > 1:
            ranks.main_first(lambda: ctx.records("train"))  # the phantom's files, once
        yield ctx
    ranks.leave()


class Context:
    """Opened once per command (:func:`open_context`); use as a context manager. One that ``reads`` writes
    nothing into the run's folder."""

    def __init__(self, cfg: Config, run: RunFolder, reads: bool = False) -> None:
        self.cfg = cfg
        self.run = run
        self.reads = reads
        self._records: dict[str, list[Record]] = {}
        self._questions: dict[str, list[Question]] = {}
        self._engine: RolloutEngine | None = None
        self._weights: Path | None = None
        self._scratch: TemporaryDirectory[str] | None = None

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None

    # -- model -----------------------------------------------------------------------------------

    @cached_property
    def model_path(self) -> Path:
        """The model's folder (a hub name is resolved by transformers when not offline)."""
        return resolve_model(self.cfg)

    @cached_property
    def model(self) -> Any:
        """``cfg.model`` with its path resolved."""
        return self.cfg.model.model_copy(update={"path": str(self.model_path)})

    @cached_property
    def builder(self) -> PromptBuilder:
        """Prompts to train on."""
        return self._prompts(PromptBuilder)

    @cached_property
    def asking_builder(self) -> PromptBuilder:
        """Prompts to evaluate with, by ``eval.prompt``."""
        if self.cfg.eval.prompt == "medevalkit":
            return self._prompts(MedEvalKitPrompts)
        return self.builder

    def _prompts(self, kind: type[PromptBuilder]) -> PromptBuilder:
        return kind.from_folder(
            self.model_path,
            self.cfg.data,
            self.cfg.model.max_pixels,
            offline=self.cfg.model.offline,
            trust_remote_code=self.cfg.model.trust_remote_code,
        )

    @property
    def engine(self) -> RolloutEngine:
        """The run's rollout engine, started on first use and kept: starting one takes seconds."""
        if self._engine is None:
            restarts = self.cfg.rollout.max_restarts
            self._engine = RestartingEngine(self._start_engine, restarts, StageError)
            self._weights = self.model_path
        return self._engine

    def _start_engine(self) -> RolloutEngine:
        longest = max(self.cfg.rollout.max_completion_length, self.cfg.eval.max_completion_length)
        return create_engine(
            self.model,
            self.cfg.rollout,
            self.builder,
            max_model_len=self.cfg.data.max_prompt_length + longest,
            max_images=self.max_images,
            seed=self.cfg.seed,
            log=self.run.path / "server.log",
        )

    def serve_weights(self, folder: Path, version: int = BASE_VERSION) -> RolloutEngine:
        """The engine with a model folder's full weights; they are read only when others were loaded.

        Each folder is taken as unchanged while the engine has it.
        """
        engine = self.engine
        if self._weights != folder:
            self._weights = None
            engine.load_weights(folder, version)
            self._weights = folder
        return engine

    def serve_trained(self, weights: Iterable[tuple[str, Any]], version: int) -> None:
        """The engine with a trainer's weights; no folder counts as loaded afterwards."""
        self._weights = None
        self.engine.update_weights(weights, version)

    @contextmanager
    def engine_asleep(self) -> Iterator[None]:
        """The engine, if it was started, lends its GPU memory to the block."""
        if self._engine is None:
            yield
            return
        self._engine.sleep()
        try:
            yield
        finally:
            self._engine.wake()

    @cached_property
    def max_images(self) -> int:
        splits = [self.records(name) for name in ("train", "validation", "test")]
        own = max((len(r.images) for records in splits for r in records), default=1)
        return max(1, own, *(images for _, images in self.eval_sizes.values()))

    # -- data ------------------------------------------------------------------------------------

    @cached_property
    def eval_sets(self) -> dict[str, EvalSet]:
        """The data sets of ``eval.sets``."""
        sets, of_phantom = self.cfg.eval.sets, self.cfg.fingerprint("phantom")
        return {name: configured_set(name, sets[name], self._phantom, of_phantom) for name in sets}

    @cached_property
    def eval_sizes(self) -> dict[str, tuple[int, int]]:
        """(questions, most images of one) of each evaluation set; all of them are read for it.

        Raises ValueError when one of their questions is trained on.
        """
        sizes = {}
        for name, chosen in self.eval_sets.items():
            seen = [0, 0]

            def counted(chosen: EvalSet = chosen, seen: list[int] = seen) -> Iterator[Record]:
                for record in chosen.records(None):
                    seen[:] = [seen[0] + 1, max(seen[1], len(record.images))]
                    yield record

            assert_disjoint(self.records("train"), counted())
            sizes[name] = (seen[0], seen[1])
        return sizes

    def records(self, split: str) -> list[Record]:
        """The rows of ``train``, ``validation`` or ``test`` that their loader accepts."""
        if not self._records:
            self._records = self._load_all()
        return self._records[split]

    def questions(self, split: str) -> list[Question]:
        """The rows of a split whose images open and whose longest prompt fits.

        The others are counted and written, with their reasons, to ``data/rejected-<split>.jsonl``.
        """
        if split not in self._questions:
            records = self.records(split)
            self._questions[split] = [
                question
                for record in progress(records, f"Reading {split}", unit="row")
                if (question := self._usable(record, split)) is not None
            ]
            if not self._questions[split]:
                raise StageError(
                    f"{split}: none of {len(records)} rows can be used; the reasons are in "
                    f"{self._rejected_file(split)}"
                )
        return self._questions[split]

    def _load_all(self) -> dict[str, list[Record]]:
        data = self.cfg.data
        found = {"train": self._load(data.train, "train"), "test": self._load(data.test, "test")}
        if data.validation is not None or data.train == "phantom":
            source = data.validation or "phantom"
            found["validation"] = self._load(source, "validation")
        else:
            found["train"], found["validation"] = _hold_out(
                found["train"], data.validation_fraction, self.cfg.seed
            )
        assert_disjoint(found["train"], found["test"])
        return found

    def _load(self, source: str, split: SplitName) -> list[Record]:
        folder = Path(source)
        if source == "phantom":
            folder = self._phantom()
        elif not folder.exists():
            raise ConfigError(f"data.{split} = {source}: there is no such file or folder")
        data = self.cfg.data
        named = data.format.get(split) if isinstance(data.format, dict) else data.format
        result = load_records(
            folder,
            split=split,
            format=None if source == "phantom" else named,
            options=data.options.get(split),
            limit=data.limit,
        )
        LOG.info("%s: %s", split, result.summary())
        LOG.info("%s: specialties %s", split, dict(Counter(r.specialty for r in result.records)))
        self._note_rejected(split, result.rejected)
        return result.records

    def _phantom(self) -> Path:
        phantom = self.cfg.phantom
        folder = self.run.path / "data" / "phantom"
        if self.reads:
            # What is there may be missing, or another configuration's.
            self._scratch = self._scratch or TemporaryDirectory(prefix="mmedx-")
            folder = Path(self._scratch.name)
        return write_phantom(
            folder,
            train=phantom.train,
            validation=phantom.validation,
            test=phantom.test,
            seed=phantom.seed,
        )

    def _usable(self, record: Record, split: str) -> Question | None:
        try:
            question = self.builder.question(record)
            for guideline in (None, *self.cfg.gba.guidelines):
                question.prompt_ids(guideline)
        except (PromptError, ImageError) as error:
            self._note_rejected(split, [unusable(record, error)])
            return None
        return question

    def _rejected_file(self, split: str) -> Path:
        return self.run.path / "data" / f"rejected-{split}.jsonl"

    def _note_rejected(self, split: str, rejected: Sequence[Rejected]) -> None:
        if not rejected or self.reads or not ranks.is_main():
            return
        path = self._rejected_file(split)
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = dict.fromkeys(path.read_text().splitlines()) if path.exists() else {}
        rows.update(dict.fromkeys(json.dumps(vars(row)) for row in rejected))
        write_text(path, "".join(line + "\n" for line in rows))
        LOG.warning("%s: %d rows cannot be used, see %s", split, len(rejected), path)


def resolve_model(cfg: Config) -> Path:
    """The folder of ``model.path``; raises ConfigError naming the remedy when it is not there."""
    if cfg.model.path == "tiny":
        from mmedx_fast.tiny import assets_folder

        folder = assets_folder()
        if not (folder / "model.safetensors").is_file():
            raise ConfigError(
                f"the tiny model is missing from {folder}; make it with "
                "python -m mmedx_fast.tiny_pretrain"
            )
        return folder
    folder = Path(cfg.model.path)
    if folder.is_dir():
        return folder
    if cfg.model.offline:
        raise ConfigError(
            f"model.path = {cfg.model.path}: no such folder; give a local folder, or set "
            "model.offline=false to let transformers look it up on its hub"
        )
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(cfg.model.path))


def _hold_out(
    records: list[Record], fraction: float, seed: int
) -> tuple[list[Record], list[Record]]:
    """Split off a validation share, the same for the same ids and seed."""
    count = max(1, round(len(records) * fraction))
    if len(records) < 2:
        raise ConfigError("data.validation is not given and one training row cannot be split")
    order = random.Random(f"{seed}-validation").sample(range(len(records)), count)
    held = set(order)
    train = [r for i, r in enumerate(records) if i not in held]
    return train, [r for i, r in enumerate(records) if i in held]


def batches(count: int, size: int, steps: int, seed: object) -> Iterable[list[int]]:
    """``steps`` lists of ``size`` indices below ``count``: epoch after epoch, each shuffled anew.

    No list has an index twice, unless it is longer than an epoch: at the border of two epochs a repeat
    waits for the next list (on two ranks it would be sampled with the same seeds, and every rollout
    counted twice). A pure function of its arguments, so that the data position of a resumed run is its step
    number.
    """
    rng = random.Random(f"{seed}")
    queue: list[int] = []
    for _ in range(steps):
        while len(queue) < size:
            queue.extend(rng.sample(range(count), count))
        batch, waiting = queue[:size], queue[size:]
        if size <= count:
            # Enough of them differ: the rest of an epoch does, and where it is short a whole one follows.
            batch = list(dict.fromkeys(queue))[:size]
            waiting = _without(queue, batch)
        yield batch
        queue = waiting


def _without(queue: Sequence[int], taken: Iterable[int]) -> list[int]:
    """``queue`` less the first occurrence of each index that was ``taken``."""
    left = set(taken)
    rest = []
    for index in queue:
        if index in left:
            left.remove(index)
        else:
            rest.append(index)
    return rest
