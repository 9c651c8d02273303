"""The page of ``mmedx data inspect``: one file, images inside, no script, no address outside."""

from __future__ import annotations

from html import escape

from mmedx_fast.data.records import SPECIALTIES, Record
from mmedx_fast.inspection import MISSING, Inspection, Sample, SplitCounts, by_count, tables
from mmedx_fast.report_data import label
from mmedx_fast.report_html import CSS, PAGE, figure, table
from mmedx_fast.report_samples import embedded

_STYLE = (
    CSS
    + """
.rejected th:last-child { text-align: left; }
article .more { margin-top: 6px; }
td.text { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 16ch; }
"""
)


def page(found: Inspection) -> str:
    """The whole page as HTML text."""
    links = "".join(
        f'<a href="#split-{number}">{escape(_name(found, split))}</a>'
        for number, split in enumerate(found.splits)
    )
    sections = "".join(
        f'<section id="split-{number}">{_section(found, split)}</section>'
        for number, split in enumerate(found.splits)
    )
    unread = "".join(
        f'<p class="note">{escape(name)}: not read: {escape(why)}</p>'
        for name, why in found.unread.items()
    )
    total = sum(split.records for split in found.splits)
    rejected = sum(p.count for split in found.splits for p in split.rejected.values())
    body = (
        f'<header><h1>{escape(found.path.name or str(found.path))}</h1><p class="sub">'
        f"{escape(str(found.path))} · format {escape(found.format)}</p><nav>{links}</nav></header>"
        f'<main><div class="tiles">{_tile(total, "questions")}{_tile(rejected, "rejected rows")}'
        f"{_tile(len(found.splits), 'splits')}</div>{sections}{unread}</main>"
    )
    return PAGE.format(title=escape(f"{found.path.name}: data"), css=_STYLE, body=body)


def _tile(number: int, name: str) -> str:
    return f'<div class="tile"><b>{number:,}</b><span>{escape(name)}</span></div>'


def _name(found: Inspection, split: SplitCounts) -> str:
    return split.split if split.path == found.path else f"{split.split}: {split.path.name}"


def _section(found: Inspection, split: SplitCounts) -> str:
    cut = ", stopped at the limit" if split.cut else ""
    files = ", ".join(file.name for file in split.files[:8])
    more = f" and {len(split.files) - 8} more" if len(split.files) > 8 else ""
    figures = "".join(
        figure(title, _counts(title, rows)) for title, rows in tables(split).items() if rows
    )
    samples = "".join(
        f"<h3>{escape(label(name))}</h3>{''.join(map(_article, split.samples[name]))}"
        for name in SPECIALTIES
        if split.samples.get(name)
    )
    broken = "".join(map(_article, split.broken))
    return (
        f"<h2>{escape(_name(found, split))}</h2>"
        f'<p class="sub">{split.records:,} questions in {escape(files + more)}{cut}</p>'
        f'<div class="grid">{figures}</div>{_rejected(split)}{samples}'
        + (f"<h3>Rejected: {escape(MISSING)}</h3>{broken}" if broken else "")
    )


def _counts(title: str, rows: list[tuple[str, int]]) -> str:
    lines = (
        f'<tr><td class="text">{escape(name)}</td><td>{count:,}</td></tr>' for name, count in rows
    )
    return table(("", "questions"), lines, title, "compact")


def _rejected(split: SplitCounts) -> str:
    if not split.rejected:
        return ""
    lines = (
        f'<tr><td class="text">{escape(reason)}</td><td>{problem.count:,}</td>'
        f'<td class="text">{escape(problem.first)}</td></tr>'
        for reason, problem in by_count(split.rejected)
    )
    heads = ("rejected because", "rows", "the first")
    return table(heads, lines, f"Rejected rows of {split.split}", "rejected")


def _article(sample: Sample) -> str:
    record, rule = sample
    pictures = "".join(
        embedded(ref, f"Image {number} of question {record.id}")
        for number, ref in enumerate(record.images, start=1)
    )
    tag = f"{record.id} · {record.answer_type} · specialty by {rule}"
    traces = "".join(
        f"<details><summary>{escape(label(name) if name else 'reasoning')}</summary>"
        f"<pre>{escape(text)}</pre></details>"
        for name, text in record.reasoning.items()
    )
    meta = "".join(f"{key}: {value}\n" for key, value in record.meta.items())
    meta = f"<details><summary>other columns</summary><pre>{escape(meta)}</pre></details>"
    return (
        f'<article><div class="pics">{pictures or "<span class=muted>no image</span>"}</div><div>'
        f'<div class="tag">{escape(tag)}</div><p>{escape(record.question)}</p>{_gold(record)}'
        f'<div class="more">{traces}{meta if record.meta else ""}</div></div></article>'
    )


def _gold(record: Record) -> str:
    if not record.options:
        return f'<p class="right">Answer: {escape(record.answer or "not given")}</p>'
    lines = (
        f'<li class="right">{escape(f"{letter}. {text}")} ← answer</li>'
        if letter == record.answer_label
        else f"<li>{escape(f'{letter}. {text}')}</li>"
        for letter, text in record.options.items()
    )
    return f'<ul class="options">{"".join(lines)}</ul>'
