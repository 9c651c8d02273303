"""The report's sections on training, merge, samples and time; each is HTML from a
:class:`RunData`."""

from __future__ import annotations

from html import escape
from typing import Any

from mmedx_fast import report_plots as plots
from mmedx_fast.progress import duration
from mmedx_fast.report_data import RunData, is_number, label, series, totals
from mmedx_fast.report_html import dig, figure, not_yet, numbers, table
from mmedx_fast.report_samples import samples


def training_section(data: RunData) -> str:
    losses = {label(name): series(rows, "loss") for name, rows in data.sft.items()}
    losses = {name: line for name, line in losses.items() if line[0]}
    missing, figures = [], []
    if losses:
        alt = f"Training loss of {len(losses)} experts over steps."
        curve = plots.curves("sft", losses, ylabel="loss (nat per token)", alt=alt)
        figures.append(figure("Experts: loss", curve))
    else:
        missing.append(not_yet("Training of the experts"))
    learned = _rl_figures(data)
    if not learned:
        missing.append(not_yet("Reinforcement learning"))
    text = "<p>Faint lines are single steps, strong ones a running mean.</p>"
    body = f'{text}<div class="grid">{"".join([*figures, *learned])}</div>'
    return (body if figures or learned else "") + "".join(missing)


def _rl_figures(data: RunData) -> list[str]:
    keys = list(dict.fromkeys(key for row in data.rl for key in row))

    def named(prefix: str, suffix: str = "") -> dict[str, str]:
        found = [k for k in keys if k.startswith(prefix) and k.endswith(suffix)]
        return {label(k[len(prefix) : len(k) - len(suffix)]): k for k in found}

    rewards = {"total": "reward"} | named("rewards/", "/mean")
    shares = {
        "questions without variance": "frac_reward_zero_std",
        "prefix cache hits": "prefix_cache_hit_rate",
        "clipped from below": "clip_ratio/low_mean",
        "clipped from above": "clip_ratio/high_mean",
        "answers cut off": "completions/clipped_ratio",
    }
    drift = {"entropy": "entropy", "KL to the start": "kl"}
    mismatch = {"mean": "sampling/sampling_logp_difference/mean"}
    saved = {"tokens": "tokens_saved"}
    charts = [
        ("RL: rewards, mean over rollouts", rewards, "reward", False),
        ("RL: reward by guideline", named("reward_guideline/"), "reward", False),
        ("RL: entropy and KL", drift, "nat per token", False),
        ("RL: length of answers", {"mean": "completions/mean_length"}, "tokens", False),
        ("RL: shares", shares, "share", True),
        ("RL: log-probs, trainer against engine", mismatch, "mean |difference| (nat)", False),
        ("RL: tokens, plain over tree", saved, "factor", False),
    ]
    figures = []
    for number, (title, wanted, unit, percent) in enumerate(charts):
        lines = {text: series(data.rl, key) for text, key in wanted.items()}
        lines = {text: line for text, line in lines.items() if line[0]}
        if lines:
            alt = f"{title}, over training steps: {', '.join(lines)}."
            curve = plots.curves(f"rl{number}", lines, ylabel=unit, alt=alt, percent=percent)
            figures.append(figure(title, curve))
    return figures


def merge_section(data: RunData) -> str:
    out = [_merge_choice(data.summary)]
    conflicts = data.conflicts
    if conflicts is None:
        return "".join(out) + not_yet("The conflict report")
    figures = []
    if conflicts.linears:
        chart = plots.conflict_svg(conflicts, "sign_conflict")
        note = "Per cent of the kept weights on which the models pull in opposite directions."
        figures.append(figure("Sign conflicts by layer and module", chart, note))
    if conflicts.cosine:
        note = "1 means the same direction, 0 unrelated, below 0 opposed."
        figures.append(figure("Similarity of the task vectors", plots.cosine_svg(conflicts), note))
    out.append(f'<div class="grid">{"".join(figures)}</div>')
    if conflicts.summed:
        cells = [
            f'<tr><th scope="row">{escape(label(k))}</th><td>{100 * v:.1f} %</td></tr>'
            for k, v in conflicts.summed.items()
        ]
        out.append(
            table(["over all layers", "share"], cells, "Conflicts over all layers", "narrow")
        )
    return "".join(out)


def _merge_choice(summary: dict[str, Any]) -> str:
    merge = _object(summary.get("merge"))
    candidates = [c for c in merge.get("candidates") or [] if isinstance(c, dict)]
    chosen = merge.get("chosen spec", merge.get("chosen"))
    text = f"<p>Merged with {escape(_spec(chosen))}.</p>" if chosen else ""
    energy = summary.get("start_energy_kept")
    if is_number(energy):
        text += (
            f"<p>RL started with {100 * energy:.1f} % of the energy of the mean expert delta.</p>"
        )
    if len(candidates) > 1:
        rows = []
        for candidate in candidates:
            value = candidate.get("validation_accuracy")
            main = ' class="main"' if candidate.get("spec") == chosen else ""
            number = f"{100 * value:.1f} %" if is_number(value) else "–"
            spec = escape(_spec(_differing(candidate.get("spec"), candidates)))
            rows.append(f'<tr{main}><th scope="row">{spec}</th><td>{number}</td></tr>')
        text += table(["candidate", "validation accuracy"], rows, "Merge candidates", "narrow")
    return text


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _differing(spec: Any, candidates: list[dict[str, Any]]) -> Any:
    """The settings in which the candidates differ; the common ones stand in the sentence above."""
    if not isinstance(spec, dict):
        return spec
    others = [_object(candidate.get("spec")) for candidate in candidates]
    return {k: v for k, v in spec.items() if any(other.get(k) != v for other in others)} or spec


def _spec(spec: Any) -> str:
    if isinstance(spec, dict):
        return ", ".join(f"{key} {value}" for key, value in spec.items() if value is not None)
    return str(spec)


def samples_section(data: RunData) -> str:
    if not data.predictions:
        return not_yet("Evaluation")
    count = dig(data.config, "eval", "samples_in_report")
    body = samples(data, count if isinstance(count, int) else 8)
    return (
        "<p>Chosen to show every model right and wrong, not to be typical. Open a line to read the "
        f"whole answer.</p>{body}"
    )


def time_section(data: RunData) -> str:
    stages = numbers(data.summary.get("seconds"))
    phases = totals(data.rl, "seconds")
    tokens = totals(data.rl, "tokens")
    figures = []
    for name, title, values in (
        ("stages", "Time by stage", stages),
        ("phases", "RL, time by phase", phases),
    ):
        values = {label(k): v for k, v in values.items() if v > 0}
        if values:
            ordered = dict(sorted(values.items(), key=lambda item: -item[1]))
            labels = [_share(v, sum(ordered.values())) for v in ordered.values()]
            chart = plots.bars(name, ordered, labels, alt=f"{title}: {', '.join(ordered)}.")
            figures.append(figure(title, chart))
    rows = [_token_row(name, int(value), phases.get(name)) for name, value in tokens.items()]
    rows += [_token_row(name, value, None) for name, value in _flat(data.summary.get("tokens"))]
    counts = (
        table(["tokens", "count", "per second"], rows, "Tokens by phase", "narrow") if rows else ""
    )
    if not figures and not rows:
        return not_yet("Anything that is timed")
    return f'<div class="grid">{"".join(figures)}</div>{counts}'


def _token_row(name: str, count: float, seconds: float | None) -> str:
    rate = f"{count / seconds:,.0f}" if seconds else "–"
    number = f"{count:,}" if isinstance(count, int) else f"{count:,.4g}"
    return f'<tr><th scope="row">{escape(label(name))}</th><td>{number}</td><td>{rate}</td></tr>'


def _share(value: float, total: float) -> str:
    return f"{duration(value)} · {100 * value / total:.0f} %"


def _flat(value: Any, prefix: str = "") -> list[tuple[str, float]]:
    if is_number(value):
        return [(prefix, value)]
    if not isinstance(value, dict):
        return []
    return [pair for key, item in value.items() for pair in _flat(item, f"{prefix} {key}".strip())]
