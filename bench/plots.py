"""The picture of one op: time and memory against size, and a roofline from what was measured here."""

from __future__ import annotations

import io
from collections import defaultdict
from typing import Any

LEFT, MIDDLE, RIGHT = "median time", "peak memory beyond the inputs", "roofline"


def picture(data: dict[str, Any]) -> bytes:
    """PNG of one op's results (``bench.results.document``)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (times, memory, roof) = plt.subplots(1, 3, figsize=(15, 5.2))
    styles = _styles(data)
    _lines(times, data, styles, "median_ms", 1.0, "ms")
    _lines(memory, data, styles, "peak_bytes", 2.0**-20, "MiB")
    _roofline(roof, data, styles)
    peaks = data["peaks"]
    measured = f"measured: {peaks['tflops']:.3g} TFLOP/s, {peaks['gb_s']:.4g} GB/s"
    titles = (LEFT, MIDDLE, f"{RIGHT} ({measured})")
    for axes, title in zip((times, memory, roof), titles, strict=True):
        axes.set_title(title, fontsize=10)
        axes.grid(True, which="major", linewidth=0.4, alpha=0.5)
    handles, names = times.get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncol=min(5, max(len(names), 1)), fontsize=8)
    figure.suptitle(f"{data['op']} on {data['device']['name']}, {data['date'][:10]}", fontsize=11)
    rows = -(-max(len(names), 1) // 5)
    figure.tight_layout(rect=(0, 0.04 + 0.04 * rows, 1, 0.98))
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    plt.close(figure)
    return out.getvalue()


def _styles(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Colour and marker by provider; ours is thick, the floor a dashed grey."""
    import matplotlib.pyplot as plt

    kinds = {p["name"]: p["kind"] for row in data["rows"] for p in row["providers"]}
    colours, markers = plt.get_cmap("tab10").colors, "osv^DPX*<>"  # type: ignore[attr-defined]
    styles: dict[str, dict[str, Any]] = {}
    peers = 0
    for name, kind in kinds.items():
        if kind == "floor":
            styles[name] = {"color": "0.5", "linestyle": "--", "marker": "_"}
        elif name == "ours":
            styles[name] = {"color": "black", "linewidth": 2.4, "marker": "o", "zorder": 5}
        else:
            marker = markers[(peers + 3 * (peers // 10)) % 10]
            styles[name] = {"color": colours[peers % 10], "marker": marker}
            styles[name] |= {"linewidth": 1.2, "linestyle": "-" if peers < 10 else ":"}
            peers += 1
    return styles


def _points(data: dict[str, Any], key: str) -> dict[str, list[tuple[float, float]]]:
    """(size, value) by provider, ascending; shapes of one size are all there."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in data["rows"]:
        for p in row["providers"]:
            if p.get(key):
                found[p["name"]].append((row["tokens"], p[key]))
    return {name: sorted(points) for name, points in found.items()}


def _lines(axes: Any, data: dict[str, Any], styles: Any, key: str, scale: float, unit: str) -> None:
    sizes = [row["tokens"] for row in data["rows"]]
    # several shapes of one size (other ranks, more rewards) are no curve
    joined = {} if len(set(sizes)) == len(sizes) else {"linestyle": "none"}
    for name, points in _points(data, key).items():
        x, y = zip(*points, strict=True)
        axes.plot(x, [scale * v for v in y], label=name, **(styles[name] | joined))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.set_xticks(sorted(set(sizes)), [_short(n) for n in sorted(set(sizes))], fontsize=8)
    axes.set_xlabel(data["axis"])
    axes.set_ylabel(unit)


def _short(count: float) -> str:
    """1536 -> 1,536; 67895296 -> 67.9M."""
    for size, suffix in ((1e9, "G"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.3g}{suffix}"
    return f"{count:,.0f}"


def _roofline(axes: Any, data: dict[str, Any], styles: Any) -> None:
    peak, speed = data["peaks"]["tflops"], data["peaks"]["gb_s"]
    found = []
    for row in data["rows"]:
        intensity = row["flops"] / row["bytes"]
        for p in row["providers"]:
            if p.get("tflops"):
                style = {k: styles[p["name"]][k] for k in ("color", "marker")}
                axes.plot(intensity, p["tflops"], linestyle="none", **style)
                found.append(intensity)
    ridge = 1e3 * peak / speed
    ends = sorted([min([*found, ridge]) / 4, ridge, max([*found, ridge]) * 4])
    axes.plot(ends, [min(peak, x * speed / 1e3) for x in ends], color="0.3", linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP per byte (least work, least traffic)")
    axes.set_ylabel("TFLOP/s")
