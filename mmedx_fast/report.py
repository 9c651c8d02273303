"""``report.html``: one file that shows a whole run, with nothing to load from anywhere.

It reads what the run folder holds; a stage without files shows as not run yet.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from mmedx_fast import report_plots as plots
from mmedx_fast.atomic import write_bytes, write_text
from mmedx_fast.progress import duration
from mmedx_fast.report_data import RunData, is_number, label, load_run
from mmedx_fast.report_html import CSS, PAGE, dig, figure, interval, not_yet, numbers, table
from mmedx_fast.report_sections import (
    merge_section,
    samples_section,
    time_section,
    training_section,
)

_SECTIONS = ("Results", "Training", "Merge", "Sample answers", "Time and tokens", "Settings")
_MAIN = ("base", "rl_start", "rl", "merged")


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` and, where there are conflicts, ``caci/conflicts.png``; returns the
    former.

    Raises FileNotFoundError when ``run_dir`` is no folder. A file that cannot be read is named in
    the report instead of stopping it.
    """
    data = load_run(Path(run_dir))
    parts = [_results, training_section, merge_section, samples_section, time_section, _settings]
    blocks = [
        f'<section><h2 id="{_anchor(title)}">{title}</h2>{part(data)}</section>'
        for title, part in zip(_SECTIONS, parts, strict=True)
    ]
    title = f"Run {_name(data)}"
    links = "".join(f'<a href="#{_anchor(title)}">{title}</a>' for title in _SECTIONS)
    head = f"<header><h1>{escape(title)}</h1>{_subtitle(data)}<nav>{links}</nav></header>"
    foot = f"<footer>Written {time.strftime('%Y-%m-%d %H:%M')} by mmedx-fast.</footer>"
    body = "\n".join([head, "<main>", _tiles(data), _problems(data), *blocks, "</main>", foot])
    path = data.folder / "report.html"
    write_text(path, PAGE.format(title=escape(title), css=CSS, body=body))
    if data.conflicts is not None and data.conflicts.linears:
        png = plots.conflict_png(data.conflicts, "sign_conflict")
        write_bytes(data.folder / "caci" / "conflicts.png", png)
    return path


def _subtitle(data: RunData) -> str:
    summary = data.summary
    parts = []
    model = dig(data.config, "model", "path")
    if model:
        parts.append(f"model {model}")
    train = dig(data.config, "data", "train")
    if train:
        parts.append(f"trained on {train}")
    if "seed" in summary:
        parts.append(f"seed {summary['seed']}")
    seconds = numbers(summary.get("seconds"))
    if seconds:
        parts.append(f"{duration(sum(seconds.values()))} in all")
    text = f'<p class="sub">{escape(" · ".join(map(str, parts)))}</p>'
    if "phantom" in (train, dig(data.config, "data", "test")):
        text += (
            '<p class="sub">The phantom clinic is synthetic: its images are drawn and its cases '
            "made up. Its numbers say nothing about patients.</p>"
        )
    return text


def _tiles(data: RunData) -> str:
    macro = numbers(data.summary.get("macro_accuracy"))
    tiles = []
    if "merged" in macro:
        low_high = interval(dig(data.summary, "macro_interval", "merged"))
        note = f"95 % interval {_range(low_high)}" if low_high else "macro-accuracy"
        tiles.append((f"{100 * macro['merged']:.1f} %", f"merged model, macro-accuracy; {note}"))
    for name, other, text in (
        ("merged", "base", "points, merged over base"),
        ("rl", "rl_start", "points, RL over its starting point"),
    ):
        if name in macro and other in macro:
            tiles.append((_signed(100 * (macro[name] - macro[other])), text))
    experts = {k: v for k, v in macro.items() if k not in _MAIN}
    if experts and "merged" in macro:
        best = max(experts, key=lambda name: experts[name])
        gain = _signed(100 * (macro["merged"] - experts[best]))
        tiles.append((gain, f"points, merged over the best expert ({label(best)})"))
    body = "".join(f'<div class="tile"><b>{n}</b><span>{escape(t)}</span></div>' for n, t in tiles)
    return f'<div class="tiles">{body}</div>' if tiles else ""


def _problems(data: RunData) -> str:
    items = "".join(f"<li>{escape(text)}</li>" for text in data.problems)
    return (
        f'<div class="note"><p>Left out of this report:</p><ul>{items}</ul></div>' if items else ""
    )


def _results(data: RunData) -> str:
    macro = numbers(data.summary.get("macro_accuracy"))
    if not macro:
        return not_yet("Evaluation")
    rows = [
        (label(name), value, interval(dig(data.summary, "macro_interval", name)))
        for name, value in macro.items()
    ]
    chance = _chance(data)
    text = (
        "<p>Accuracy in per cent with its 95 % interval; <i>macro</i> is the mean over "
        "specialties. Bold is the highest in a column, which need not mean a real difference.</p>"
    )
    chart = figure("Macro-accuracy", plots.intervals("macro", rows, chance))
    quality = _quality_table(data.summary, list(macro))
    return text + _accuracy_table(data.summary, macro) + f'<div class="grid">{chart}{quality}</div>'


def _accuracy_table(summary: dict[str, Any], macro: dict[str, float]) -> str:
    accuracy = summary.get("accuracy")
    names = list(macro)
    columns = list(dict.fromkeys(s for m in names for s in numbers(dig(accuracy, m))))
    values = {m: [macro[m], *(dig(accuracy, m, s) for s in columns)] for m in names}
    bounds = {
        m: [
            dig(summary, "macro_interval", m),
            *(dig(summary, "intervals", m, s) for s in columns),
        ]
        for m in names
    }
    best = [
        max((row[i] for row in values.values() if is_number(row[i])), default=None)
        for i in range(len(columns) + 1)
    ]
    rows = []
    for model in names:
        cells = [
            _accuracy_cell(value, interval(bound), value == top)
            for value, bound, top in zip(values[model], bounds[model], best, strict=True)
        ]
        kind = ' class="main"' if model == "merged" else ""
        rows.append(f'<tr{kind}><th scope="row">{escape(label(model))}</th>{"".join(cells)}</tr>')
    return table(["model", "macro", *map(label, columns)], rows, "Accuracy by specialty")


def _accuracy_cell(value: Any, bound: tuple[float, float] | None, best: bool) -> str:
    if not is_number(value):
        return "<td>–</td>"
    small = f"<small>{_range(bound)}</small>" if bound else ""
    return f"<td{' class=best' if best else ''}>{100 * value:.1f}{small}</td>"


def _quality_table(summary: dict[str, Any], names: Sequence[str]) -> str:
    guidelines = list(
        dict.fromkeys(g for m in names for g in numbers(dig(summary, "adherence", m)))
    )
    rows, any_value = [], False
    for model in names:
        values = [_of_model(summary.get(key), model) for key in ("format_rate", "unparsed_rate")]
        values += [dig(summary, "adherence", model, g) for g in guidelines]
        any_value = any_value or any(map(is_number, values))
        cells = "".join(f"<td>{100 * v:.0f}</td>" if is_number(v) else "<td>–</td>" for v in values)
        rows.append(f'<tr><th scope="row">{escape(label(model))}</th>{cells}</tr>')
    if not any_value:
        return ""
    heads = ["model", "format", "no answer", *map(label, guidelines)]
    body = table(heads, rows, "Format and guideline adherence", "compact")
    note = (
        "In per cent: answers in the asked format, answers without an answer that could be read, "
        "and the mean adherence score under each guideline."
    )
    return figure("Format and guideline adherence", body, note)


def _settings(data: RunData) -> str:
    versions = data.summary.get("versions")
    out = ""
    if isinstance(versions, dict) and versions:
        text = " · ".join(f"{key} {value}" for key, value in versions.items())
        out += f'<p class="muted">{escape(text)}</p>'
    if not data.config:
        return out + not_yet("config.yaml")
    text = yaml.safe_dump(data.config, sort_keys=False, allow_unicode=True)
    return out + f"<details><summary>config.yaml</summary><pre>{escape(text)}</pre></details>"


def _chance(data: RunData) -> float | None:
    """Mean of 1 / number of options over the questions of one model's predictions."""
    rows = next(iter(data.predictions.values()), [])
    sizes = [len(row["options"]) for row in rows if isinstance(row.get("options"), dict)]
    sizes = [size for size in sizes if size]
    return sum(1 / size for size in sizes) / len(sizes) if sizes else None


def _name(data: RunData) -> str:
    return str(data.config.get("name") or data.folder.resolve().name)


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _of_model(value: Any, model: str) -> Any:
    return value.get(model) if isinstance(value, dict) else value


def _range(bound: tuple[float, float]) -> str:
    return f"{100 * bound[0]:.1f}–{100 * bound[1]:.1f}"


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "\u2212")
