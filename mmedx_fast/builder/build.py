"""``mmedx data build`` from the config to the folder: screen, ask, filter, write."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import logging
import platform
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from mmedx_fast import __version__
from mmedx_fast.atomic import clean, write_json, write_text
from mmedx_fast.builder.collect import Collected, Collector, Outcome, ask_of, shuffled
from mmedx_fast.builder.config import BuildConfig, DataSetConfig
from mmedx_fast.builder.datasheet import render_datasheet
from mmedx_fast.builder.features import ImageHasher
from mmedx_fast.builder.journal import Journal
from mmedx_fast.builder.sources import (
    QUESTION_FILTERS,
    Candidate,
    Dropped,
    Screened,
    count_by,
    file_digest,
    read_questions,
    screen,
)
from mmedx_fast.builder.teacher import Ledger, Teacher, answer_settings
from mmedx_fast.builder.trace_filters import TRACE_FILTERS
from mmedx_fast.data.mmedexpert import write_mmedexpert
from mmedx_fast.data.records import SPECIALTIES, Record

_LOG = logging.getLogger(__name__)

Sheet = dict[str, Any]


def build(cfg: BuildConfig, *, limit: int | None = None, from_journal: bool = False) -> Sheet:
    """Make the data set in ``cfg.folder`` and return its datasheet.

    ``limit``: take up at most so many questions, chosen as a whole build would begin.
    ``from_journal``: ask nothing, use the answers that are there.

    Writes ``<split>.jsonl`` with ``images/``, ``dropped.jsonl``, ``rejected.jsonl``, ``datasheet.json``,
    ``datasheet.md`` and ``build.yaml``. Started again after a kill it goes on from ``journal.jsonl``. Raises
    ``ValueError`` (its subclasses name what failed) and, with what is saved, ``KeyboardInterrupt``.
    """
    with _opened(cfg) as (journal, hasher):
        found = screen(cfg, hasher)
        ledger = Ledger(cfg.teacher, journal.totals)
        teacher = None if from_journal else _teacher(cfg, ledger, found)
        with contextlib.ExitStack() as stack:
            if teacher is not None:
                stack.callback(teacher.close)
            collector = Collector(cfg, journal, ledger, teacher)
            try:
                collected = collector.collect(found.candidates, limit)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(
                    f"Interrupted; {len(journal)} answers are kept in {journal.path}"
                ) from None
        return _write(cfg, found, collected, collector, ledger, teacher)


def estimate(cfg: BuildConfig, *, limit: int | None = None) -> Sheet:
    """What a build would ask and cost, without asking: counts, tokens and money."""
    with _opened(cfg) as (journal, hasher):
        found = screen(cfg, hasher)
        ledger = Ledger(cfg.teacher, journal.totals)
        taken = _likely_taken(cfg, found.candidates, limit)
        asks = [ask_of(c, g, 0, cfg) for c in taken for g in cfg.guidelines]
        open_asks = [ask for ask in asks if ask.key not in journal]
        tokens_in = sum(ask.tokens_in for ask in open_asks)
        attempts = cfg.teacher.attempts
        return {
            "funnel": _question_funnel(found, len(taken)),
            "questions": len(taken),
            "answered_before": len(journal),
            "spent_before": ledger.spent,
            "requests": {"least": len(open_asks), "most": len(open_asks) * attempts},
            "tokens_in": {"least": tokens_in, "most": tokens_in * attempts},
            "tokens_out": {
                "least": round(len(open_asks) * ledger.mean_output),
                "most": len(open_asks) * attempts * cfg.teacher.max_tokens,
            },
            "mean_output_tokens": round(ledger.mean_output, 1),
            "cost": {
                "least": ledger.cost(tokens_in, len(open_asks) * ledger.mean_output),
                "expected_all_attempts": attempts
                * ledger.cost(tokens_in, len(open_asks) * ledger.mean_output),
                "most": attempts * ledger.cost(tokens_in, len(open_asks) * cfg.teacher.max_tokens),
            },
            "currency": cfg.teacher.currency,
        }


@contextlib.contextmanager
def _opened(cfg: BuildConfig) -> Iterator[tuple[Journal, ImageHasher]]:
    """The output folder, for this process alone."""
    folder = cfg.folder
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output = {folder} is a file; give a folder")
    with Journal(folder / "journal.jsonl") as journal:
        for leftover in clean(folder):
            _LOG.info("removed %s, half-written by a build that was killed", leftover)
        with contextlib.closing(ImageHasher(folder / "image_hashes.jsonl", cfg.workers)) as hasher:
            yield journal, hasher


def _teacher(cfg: BuildConfig, ledger: Ledger, found: Screened) -> Teacher:
    if cfg.teacher.kind == "vllm":
        from mmedx_fast.builder.vllm_teacher import VllmTeacher

        most = max((len(c.record.images) for c in found.candidates), default=1)
        return VllmTeacher(cfg.teacher, ledger, max(1, most))
    from mmedx_fast.builder.http_teacher import OpenAITeacher

    return OpenAITeacher(cfg.teacher, ledger)


def _likely_taken(
    cfg: BuildConfig, candidates: list[Candidate], limit: int | None
) -> list[Candidate]:
    """The questions that would be taken up if every trace passed at once."""
    taken: list[Candidate] = []
    counts: collections.Counter[str | None] = collections.Counter()
    for candidate in shuffled(candidates, cfg.seed):
        specialty = candidate.record.specialty
        if limit is not None and len(taken) == limit:
            break
        if counts[specialty] < cfg.balance.questions.get(specialty or "", len(candidates)):
            counts[specialty] += 1
            taken.append(candidate)
    if cfg.balance.traces and set(cfg.balance.traces) >= set(cfg.guidelines):
        taken = taken[: max(cfg.balance.traces.values())]
    return taken


# -- what is written -------------------------------------------------------------------------------


def _write(
    cfg: BuildConfig,
    found: Screened,
    collected: Collected,
    collector: Collector,
    ledger: Ledger,
    teacher: Teacher | None,
) -> Sheet:
    kept = [outcome for outcome in collected.outcomes if collector.kept(outcome)]
    records = [_record(outcome) for outcome in kept]
    if not records:
        raise ValueError(_nothing_kept(found, collected))
    folder = cfg.folder
    path = write_mmedexpert(records, folder, cfg.split)
    _check_written(cfg, path, records)
    dropped = found.dropped + _dropped_later(collected, collector)
    _write_lines(folder / "dropped.jsonl", (item.row() for item in dropped))
    _write_lines(folder / "rejected.jsonl", (dataclasses.asdict(row) for row in found.rejected))
    write_text(folder / "build.yaml", cfg.to_yaml())
    sheet = {
        "data": {"file": path.name, "sha256": file_digest(path), "questions": len(records)},
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "made_with": {"mmedx_fast": __version__, "python": platform.python_version()},
        "funnel": _question_funnel(found, len(collected.outcomes))
        + [["no trace passed", len(collected.outcomes) - len(kept)], ["kept", len(kept)]],
        "traces": _trace_counts(collected, kept),
        "counts": _counts(records, [outcome.candidate.source for outcome in kept]),
        "dropped_by_source": _by_source(dropped),
        "teacher": _teacher_sheet(cfg, ledger, teacher),
        "settings": _settings(cfg),
        "sources": found.sources,
        "evaluation_sets": found.evaluation,
        "files": {
            name: file_digest(folder / name)
            for name in (path.name, "dropped.jsonl", "rejected.jsonl", "build.yaml")
        },
    }
    write_json(folder / "datasheet.json", sheet)
    write_text(folder / "datasheet.md", render_datasheet(sheet))
    return sheet


def _record(outcome: Outcome) -> Record:
    record = outcome.candidate.record
    made = {
        name: {
            "attempt": trace.attempt,
            "adherence": round(trace.adherence, 4),
            "teacher": trace.model,
        }
        for name, trace in outcome.traces.items()
    }
    reasoning = {name: trace.text for name, trace in outcome.traces.items()}
    return replace(record, reasoning=reasoning, meta=record.meta | {"traces": made})


def _dropped_later(collected: Collected, collector: Collector) -> list[Dropped]:
    """Traces that failed, then questions that came to none, and questions that were not needed."""
    dropped = [item for outcome in collected.outcomes for item in outcome.dropped]
    for outcome in collected.outcomes:
        if not collector.kept(outcome):
            reasons = collections.Counter(item.reason for item in outcome.dropped)
            evidence = {"traces": len(outcome.traces), "attempts": dict(reasons)}
            dropped.append(
                Dropped(outcome.candidate.record, outcome.candidate.source, "no_trace", evidence)
            )
    return dropped + [Dropped(c.record, c.source, "not_taken", {}) for c in collected.left]


def _check_written(cfg: BuildConfig, path: Path, records: list[Record]) -> None:
    """Read the data set back as a training stage would; a defect must not be found out there."""
    data = DataSetConfig(name="output", path=str(path), split=cfg.split, format="mmedexpert")
    loaded = read_questions(data)
    if loaded.rejected or [r.id for r in loaded.records] != [r.id for r in records]:
        first = f"; the first: {loaded.rejected[0]}" if loaded.rejected else ""
        raise ValueError(
            f"{path}: {len(loaded.records)} of {len(records)} questions come back from it{first}; the "
            "source's rows cannot be held by this format, leave them out"
        )


def _nothing_kept(found: Screened, collected: Collected) -> str:
    reasons = collections.Counter(
        item.reason for outcome in collected.outcomes for item in outcome.dropped
    )
    rows = ", ".join(f"{name} {count}" for name, count in _question_funnel(found, 0)[:-2])
    traces = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common())
    return (
        f"no question is left for the data set ({rows}; answers that failed: {traces or 'none'}); look at "
        "the teacher's answers in the journal, and at filters, decontamination and sources in the config"
    )


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


# -- what is counted -------------------------------------------------------------------------------


def _question_funnel(found: Screened, taken: int) -> list[list[Any]]:
    """[what, number of questions] from the first row read to those taken up by the teacher."""
    reasons = collections.Counter(item.reason for item in found.dropped)
    return [
        ["read", sum(found.read.values())],
        ["rejected", len(found.rejected)],
        *([name, reasons[name]] for name in QUESTION_FILTERS),
        ["not taken", len(found.candidates) - taken],
        ["taken up", taken],
    ]


def _trace_counts(collected: Collected, kept: list[Outcome]) -> dict[str, Any]:
    reasons = collections.Counter(
        item.reason for outcome in collected.outcomes for item in outcome.dropped
    )
    passed = sum(len(outcome.traces) for outcome in collected.outcomes)
    in_data = sum(len(outcome.traces) for outcome in kept)
    return {
        "answers": sum(outcome.attempts for outcome in collected.outcomes),
        "failed": {name: reasons[name] for name in TRACE_FILTERS},
        "without_answer": {name: reasons[name] for name in ("teacher", "not_asked")},
        "passed": passed,
        "in_questions_dropped": passed - in_data,
        "kept": in_data,
        "kept_by_guideline": count_by((g for o in kept for g in o.traces), str),
        "kept_by_attempt": count_by((t.attempt for o in kept for t in o.traces.values()), str),
    }


def _counts(records: list[Record], sources: list[str]) -> dict[str, dict[str, int]]:
    by_specialty = count_by(records, lambda record: record.specialty)
    return {
        "specialty": {name: by_specialty.get(name, 0) for name in SPECIALTIES},
        "source": count_by(sources, str),
        "license": count_by(records, lambda record: record.meta.get("license")),
        "dataset": count_by(records, lambda record: record.dataset),
        "answer_type": count_by(records, lambda record: record.answer_type),
        "images": count_by(records, lambda record: str(len(record.images))),
    }


def _by_source(dropped: list[Dropped]) -> dict[str, dict[str, int]]:
    """Dropped questions (not traces) by source and reason."""
    questions = [item for item in dropped if item.guideline is None]
    sources = dict.fromkeys(item.source for item in questions)
    return {
        source: count_by((d for d in questions if d.source == source), lambda d: d.reason)
        for source in sources
    }


def _teacher_sheet(cfg: BuildConfig, ledger: Ledger, teacher: Teacher | None) -> dict[str, Any]:
    return {
        **answer_settings(cfg.teacher),
        **(
            teacher.describe()
            if teacher is not None
            else {"endpoints": "none asked (--from-journal)"}
        ),
        "attempts": cfg.teacher.attempts,
        "answers_in_journal": ledger.replies,
        "tokens_in": ledger.tokens_in,
        "tokens_out": ledger.tokens_out,
        "answers_with_estimated_tokens": ledger.estimated,
        "price_input_per_million": cfg.teacher.price_input,
        "price_output_per_million": cfg.teacher.price_output,
        "cost": round(ledger.spent, 6),
        "currency": cfg.teacher.currency,
    }


def _settings(cfg: BuildConfig) -> dict[str, Any]:
    shown = cfg.model_dump(mode="json")
    names = "seed guidelines min_guidelines filters duplicates decontamination balance"
    return {name: shown[name] for name in names.split()}
