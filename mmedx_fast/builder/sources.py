"""Where the questions come from, and which of them are worth asking: everything before the teacher.

In this order, each dropped question counted by its reason: the answer's type, an image that cannot be read,
contamination with an evaluation set, a near-duplicate of an earlier question.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from mmedx_fast.builder.config import BuildConfig, DataSetConfig, EvaluationConfig, SourceConfig
from mmedx_fast.builder.features import ImageFeatures, ImageHasher, text_features
from mmedx_fast.builder.matching import Item, Matcher
from mmedx_fast.config import load_config
from mmedx_fast.data.images import ImageError
from mmedx_fast.data.loaders import LoadResult, Rejected, load_records
from mmedx_fast.data.records import Record
from mmedx_fast.progress import progress

_LOG = logging.getLogger(__name__)

QUESTION_FILTERS = ("answer_type", "image", "contaminated", "duplicate")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A question that passed the question filters, with what they measured of its images."""

    record: Record
    source: str
    images: tuple[ImageFeatures, ...]


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A question or trace that is left out: ``reason`` is a filter's name."""

    record: Record
    source: str
    reason: str
    evidence: dict[str, Any]
    guideline: str | None = None
    attempt: int | None = None
    text: str | None = None

    def row(self) -> dict[str, Any]:
        """As it is written to dropped.jsonl."""
        row: dict[str, Any] = {
            "id": self.record.id,
            "source": self.source,
            "reason": self.reason,
            "evidence": self.evidence,
        }
        if self.guideline is not None:
            return row | {
                "guideline": self.guideline,
                "attempt": self.attempt,
                "completion": self.text,
            }
        return row | {
            "specialty": self.record.specialty,
            "images": [str(ref) for ref in self.record.images],
            "question": self.record.question,
            "options": self.record.options,
            "answer_label": self.record.answer_label,
            "answer": self.record.answer,
        }


@dataclasses.dataclass
class Screened:
    """What became of all questions that were read. ``files``: data file -> SHA-256 of its bytes."""

    candidates: list[Candidate] = dataclasses.field(default_factory=list)
    dropped: list[Dropped] = dataclasses.field(default_factory=list)
    rejected: list[Rejected] = dataclasses.field(default_factory=list)
    read: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    """Rows by source, those that the loader rejected included."""
    sources: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    evaluation: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def read_questions(data: DataSetConfig) -> LoadResult:
    """All questions of a data set; the one place that says how they are loaded."""
    return load_records(
        data.path,
        split=data.split,
        format=data.format,
        check_images=data.check_images,
        limit=data.limit,
        options=data.options,
        # Test questions whose answers are secret are to be kept out of the training data all the same.
        allow_unanswered=isinstance(data, EvaluationConfig),
    )


def screen(cfg: BuildConfig, hasher: ImageHasher) -> Screened:
    """Read all sources and leave out what must not, or need not, be asked."""
    found = Screened()
    evaluation = _evaluation(cfg, hasher, found)
    earlier = Matcher(cfg.duplicates, every_image=True) if cfg.duplicates.enabled else None
    for source, record, features in _questions(cfg, hasher, found):
        if isinstance(features, ImageError):
            found.dropped.append(Dropped(record, source, "image", {"problem": str(features)}))
            continue
        item = Item(record.id, source, text_features(record), features)
        if evaluation is not None and (match := evaluation.find(item)):
            found.dropped.append(Dropped(record, source, "contaminated", match))
        elif earlier is not None and (match := earlier.find(item)):
            found.dropped.append(Dropped(record, source, "duplicate", match))
        else:
            if earlier is not None:
                earlier.add(item)
            found.candidates.append(Candidate(record, source, features))
    return found


def _questions(
    cfg: BuildConfig, hasher: ImageHasher, found: Screened
) -> Iterator[tuple[str, Record, tuple[ImageFeatures, ...] | ImageError]]:
    """Every usable question of every source in order, with its images' features."""
    ids: set[str] = set()
    for source in cfg.sources:
        loaded = read_questions(source)
        _LOG.info("%s: %s", source.name, loaded.summary())
        found.rejected += loaded.rejected
        found.read[source.name] = len(loaded.records) + len(loaded.rejected)
        found.sources.append(_described(source, loaded) | {"license": source.license})
        asked = []
        for record in loaded.records:
            record = _own(record, source, ids)
            if record.answer_type in source.answer_types:
                asked.append(record)
            else:
                reason = {"answer_type": record.answer_type}
                found.dropped.append(Dropped(record, source.name, "answer_type", reason))
        with progress(len(asked), f"Checking {source.name}", unit="question") as bar:
            for record, features in hasher.all_of(asked):
                yield source.name, record, features
                bar.update(1)


def _own(record: Record, source: SourceConfig, ids: set[str]) -> Record:
    """The record as a row of the new data: traces of its own left behind, an id that no other has."""
    name = record.id if record.id not in ids else f"{source.name}:{record.id}"
    number = 2
    while name in ids:
        name = f"{source.name}-{number}:{record.id}"
        number += 1
    ids.add(name)
    meta = dict(record.meta)
    meta.setdefault("source", source.name)
    if not isinstance(meta.get("license"), str) and source.license is not None:
        meta["license"] = source.license
    return replace(record, id=name, meta=meta, reasoning={})


def _evaluation(cfg: BuildConfig, hasher: ImageHasher, found: Screened) -> Matcher | None:
    """The questions of all evaluation sets, to compare with."""
    rules = cfg.decontamination
    if not rules.enabled:
        return None
    matcher = Matcher(rules, every_image=False)
    for name, described, records in _evaluation_sets(cfg):
        unchecked = 0
        with progress(len(records), f"Reading {name}", unit="question") as bar:
            for record, features in hasher.all_of(records):
                if isinstance(features, ImageError):
                    _LOG.warning("evaluation set %s: %s; compared by its text only", name, features)
                    unchecked += 1
                    features = ()
                matcher.add(Item(record.id, name, text_features(record), features))
                bar.update(1)
        found.evaluation.append(described | {"images_unreadable": unchecked})
    return matcher


def _evaluation_sets(
    cfg: BuildConfig,
) -> Iterator[tuple[str, dict[str, Any], list[Record]]]:
    """(name, description, questions) of each set, those of the training configs after the others."""
    sets: list[DataSetConfig] = list(cfg.decontamination.evaluation)
    for path in cfg.decontamination.run_configs:
        run = load_config(path)
        name = f"{Path(path).stem}.test"
        if run.data.test == "phantom":
            records = _phantom_test(run.phantom)
            recipe = run.phantom.model_dump()
            yield name, {"name": name, "questions": len(records), "phantom": recipe}, records
        else:
            sets.append(
                EvaluationConfig(
                    name=name, path=run.data.test, split="test", format=run.data.format
                )
            )
        for extra, where in getattr(run.eval, "sets", {}).items():
            sets.append(
                EvaluationConfig(
                    name=f"{Path(path).stem}.{extra}",
                    path=where.path,
                    split=where.split,
                    format=where.format,
                )
            )
    for data in sets:
        loaded = read_questions(data)
        yield data.name, _described(data, loaded), loaded.records


def _phantom_test(recipe: Any) -> list[Record]:
    from mmedx_fast.data.phantom import SPLITS, make_split

    used: set[str] = set()
    counts = (recipe.train, recipe.validation, recipe.test)
    return [make_split(s, n, recipe.seed, used) for s, n in zip(SPLITS, counts, strict=True)][-1]


def _described(data: DataSetConfig, loaded: LoadResult) -> dict[str, Any]:
    return {
        "name": data.name,
        "path": data.path,
        "split": data.split,
        "format": loaded.format,
        "questions": len(loaded.records),
        "rejected": len(loaded.rejected),
        "files": {str(file): file_digest(file) for file in loaded.files},
    }


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes, a block in memory at a time."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def count_by(items: Iterable[Any], name: Callable[[Any], str | None]) -> dict[str, int]:
    """Number of items by name, most frequent first; None counts as "unknown"."""
    counts = collections.Counter(name(item) or "unknown" for item in items)
    return dict(counts.most_common())
