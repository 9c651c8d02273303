"""The report's figures: matplotlib, as inline SVG whose colours follow the page (light or dark).

Colours are Okabe and Ito's, which people with any common colour blindness can tell apart; lines
differ in their dashes as well.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mmedx_fast.report_data import Conflicts, label

INK, MUTED, LINE = "#16191d", "#676d75", "#d9dde2"
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#a8569b", "#b07d00", "#3f4fae")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), "-", "--")
_VARIABLES = {INK: "--ink", MUTED: "--muted", LINE: "--line"} | {
    color: f"--c{i + 1}" for i, color in enumerate(PALETTE)
}
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def curves(name: str, lines: Series, *, ylabel: str, alt: str, percent: bool = False) -> str:
    """Lines over training steps: the raw values faint, a running mean over them strong."""
    with _style():
        figure, axes = _figure(4.6, 2.7)
        for i, (title, (steps, values)) in enumerate(lines.items()):
            color = PALETTE[i % len(PALETTE)]
            smooth = running_mean(values, max(1, len(values) // 15))
            if len(values) > 15:
                axes.plot(steps, values, color=color, linewidth=0.7, alpha=0.3)
            marker = "o" if len(values) <= 15 else None
            dashes = _DASHES[i % len(_DASHES)]
            axes.plot(
                steps, smooth, color=color, ls=dashes, lw=1.7, marker=marker, ms=3, label=title
            )
        axes.set_xlabel("step")
        axes.set_ylabel(ylabel)
        axes.margins(x=0.02)
        axes.grid(axis="x", visible=False)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if percent:
            _percent_axis(axes.yaxis)
        if len(lines) > 1:
            columns = 2 if len(lines) > 4 or sum(map(len, lines)) > 32 else len(lines)
            axes.legend(
                loc="lower left",
                bbox_to_anchor=(-0.02, 1.0),
                ncols=columns,
                handlelength=2.2,
                columnspacing=1.2,
                borderaxespad=0.2,
                labelcolor=INK,
            )
        return _svg(figure, name, alt)


def intervals(
    name: str, rows: Sequence[tuple[str, float, tuple[float, float] | None]], chance: float | None
) -> str:
    """Accuracies as dots with their 95 % intervals; ``chance`` as a dashed line."""
    with _style():
        figure, axes = _figure(4.6, 0.75 + 0.27 * len(rows))
        for y, (title, value, interval) in enumerate(rows):
            color = PALETTE[1] if title == "merged" else PALETTE[0]
            if interval is not None:
                axes.plot(interval, [y, y], color=color, linewidth=2.2, alpha=0.55)
            axes.plot([value], [y], "o", color=color, markersize=5.5)
        if chance is not None:
            axes.axvline(chance, color=MUTED, linewidth=1, linestyle=(0, (3, 2)))
            axes.annotate(
                "chance",
                (chance, -0.75),
                color=MUTED,
                fontsize=8,
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
            )
        axes.set_yticks(range(len(rows)), [title for title, _, _ in rows], color=INK)
        axes.set_ylim(len(rows) - 0.5, -1.0)
        low = min([chance or 1.0, *(i[0] if i else v for _, v, i in rows)])
        high = max(i[1] if i else v for _, v, i in rows)
        axes.set_xlim(max(0.0, low - 0.04), min(1.0, high + 0.04))
        _percent_axis(axes.xaxis)
        axes.set_xlabel("macro-accuracy, 95 % interval")
        axes.grid(axis="y", visible=False)
        return _svg(figure, name, f"Macro-accuracy of {len(rows)} models with 95 % intervals.")


def bars(name: str, values: dict[str, float], labels: Sequence[str], *, alt: str) -> str:
    """Horizontal bars, largest first as given, with ``labels`` at their ends."""
    with _style():
        figure, axes = _figure(4.6, 0.35 + 0.27 * len(values))
        axes.barh(range(len(values)), list(values.values()), color=PALETTE[0], height=0.62)
        top = max([*values.values(), 1e-9])
        for y, (value, text) in enumerate(zip(values.values(), labels, strict=True)):
            axes.text(value + 0.015 * top, y, text, va="center", fontsize=8.5)
        axes.set_yticks(range(len(values)), list(values), color=INK)
        axes.set_xlim(0, top * 1.32)
        axes.set_ylim(len(values) - 0.5, -0.5)
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
        axes.grid(visible=False)
        return _svg(figure, name, alt)


def heatmap(conflicts: Conflicts, measure: str) -> Any:
    """A figure of ``measure`` by layer (rows) and module (columns); see :func:`conflict_svg`."""
    layers, modules, values = conflicts.grid(measure)
    figure, axes = _figure(4.6, 1.3 + max(0.17 * len(layers), 0.9))
    finite = [v for row in values for v in row if math.isfinite(v)]
    high = max(finite, default=1.0) or 1.0
    mesh = axes.pcolormesh(values, cmap="cividis", vmin=0, vmax=high, edgecolors="face")
    axes.set_xticks([i + 0.5 for i in range(len(modules))], [_short(m) for m in modules])
    every = max(1, len(layers) // 14)
    shown = range(0, len(layers), every)
    axes.set_yticks([i + 0.5 for i in shown], [layers[i] for i in shown])
    axes.set_ylabel("layer")
    axes.set_ylim(len(layers), 0)
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)
    if len(layers) <= 8:
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                if math.isfinite(value):
                    color = "#ffffff" if value < 0.62 * high else "#000000"
                    text = f"{100 * value:.0f}"
                    axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", color=color)
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=25)
    bar.outline.set_visible(False)
    bar.set_label(f"{measure.replace('_', ' ')} (%)")
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}")
    return figure


def conflict_svg(conflicts: Conflicts, measure: str) -> str:
    """The heatmap for the page."""
    layers, modules, _ = conflicts.grid(measure)
    what = measure.replace("_", " ")
    alt = f"Heatmap of the {what} in {len(layers)} layers x {len(modules)} modules."
    with _style():
        return _svg(heatmap(conflicts, measure), f"heat-{measure}", alt)


def conflict_png(conflicts: Conflicts, measure: str) -> bytes:
    """The heatmap as a PNG of its own, on white."""
    with _style():
        figure = heatmap(conflicts, measure)
        title = f"{measure.replace('_', ' ').capitalize()} by layer and module"
        figure.suptitle(title, fontsize=10)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=160, facecolor="white")
        return out.getvalue()


def cosine_svg(conflicts: Conflicts) -> str:
    """Pairwise cosine of the task vectors, on the whole scale from -1 to 1."""
    matrix = conflicts.cosine or []
    size = len(matrix)
    with _style():
        figure, axes = _figure(4.6, 1.2 + 0.42 * size)
        axes.pcolormesh(matrix, cmap="PuOr_r", vmin=-1, vmax=1, edgecolors="face")
        for i in range(size):
            for j in range(size):
                strong = abs(matrix[i][j]) > 0.75
                color = "#ffffff" if strong else "#000000"
                text = "1" if i == j else f"{matrix[i][j]:.2f}".replace("-", "\u2212")
                axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", color=color)
        names = [label(name) for name in conflicts.experts]
        ticks = [i + 0.5 for i in range(size)]
        axes.set_yticks(ticks, names, color=INK)
        axes.set_xticks(ticks, [n.replace(" ", "\n", 1) for n in names], color=INK, fontsize=8)
        axes.set_ylim(size, 0)
        axes.grid(visible=False)
        for side in axes.spines.values():
            side.set_visible(False)
        return _svg(figure, "cosine", f"Matrix of pairwise cosines of {size} task vectors.")


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last ``window`` values, of fewer at the start."""
    out = []
    for i in range(len(values)):
        part = values[max(0, i + 1 - window) : i + 1]
        out.append(sum(part) / len(part))
    return out


def _style() -> Any:
    import matplotlib

    return matplotlib.rc_context(_STYLE)  # type: ignore[arg-type]


def _figure(width: float, height: float) -> tuple[Any, Any]:
    # Figure without pyplot: no global state, no display, nothing to close.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _percent_axis(axis: Any) -> None:
    axis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")


def _short(module: str) -> str:
    return module.removesuffix("_proj")


def _svg(figure: Any, name: str, alt: str) -> str:
    """Inline SVG: page colours as CSS variables, ids made unique, a title for screen readers."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1; font-family: inherit", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    size = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', text)
    if size is not None:
        text = text.replace(size[0], 'width="100%"', 1)
    label = html.escape(alt, quote=True)
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
