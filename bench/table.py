"""The README's table of speeds from results files.

    python -m bench.table bench/results/*.json [--readme README.md]

It stands between the two comments ``<!-- bench:begin -->`` and ``<!-- bench:end -->``; running this
twice changes nothing more. ``--print`` writes to the terminal instead.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.results import write

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
ROOT = Path(__file__).resolve().parents[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 2 if a file is missing or the README has no place for the table."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--print", action="store_true", dest="show")
    options = parser.parse_args(argv)
    try:
        text = tables([json.loads(path.read_text(encoding="utf-8")) for path in options.results])
        if options.show:
            print(text)
        else:
            whole = options.readme.read_text(encoding="utf-8")
            write(options.readme, replaced(whole, text, options.readme.name))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def replaced(readme: str, table: str, name: str = "README.md") -> str:
    """``readme`` with everything between the two comments exchanged.

    Raises ValueError unless each comment is there once, in order.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in after:
        raise ValueError(
            f"{name} must hold the lines {BEGIN} and {END} once each, in this order: the table goes between"
        )
    return f"{before}{BEGIN}\n{table.strip()}\n{END}{after}"


def tables(results: list[dict[str, Any]]) -> str:
    """One table for every machine and commit that the results are from."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for data in results:
        key = (data["device"]["name"], data["versions"]["torch"], str(data["commit"]))
        groups.setdefault(key, []).append(data)
    return "\n\n".join(_table(group) for group in groups.values())


def _table(group: list[dict[str, Any]]) -> str:
    first = group[0]
    versions = ", ".join(f"{name} {v}" for name, v in first["versions"].items() if v)
    lines = [
        f"{first['device']['name']}, {first['date'][:10]}, commit {first['commit']}; {versions}. "
        "Medians. Ours and the floor in ms; peers as multiples of our time; peak memory beyond the "
        "inputs at the largest size.",
    ]
    for data in group:
        lines += ["", *_op(data)]
    commands = dict.fromkeys(data["command"] for data in group)
    return "\n".join([*lines, "", *(f"    {command}" for command in commands)])


def _op(data: dict[str, Any]) -> list[str]:
    """A provider a line, a size a column; floors and whole steps in tables of their own."""
    if data["op"] in _OTHERS:
        return _OTHERS[data["op"]](data)
    rows = sorted(data["rows"], key=lambda row: row["tokens"])
    common, columns = _split([row["shape"] for row in rows])
    caption = ", ".join(x for x in (data["title"], " ".join(common), rows[0]["dtype"]) if x)
    lines = [
        f"**`{data['op']}`**: {caption}",
        "",
        f"| | {' | '.join(columns)} | MiB |",
        f"|---|{'---:|' * (len(columns) + 1)}",
    ]
    remarks: dict[str, None] = {}
    for name in dict.fromkeys(p["name"] for row in rows for p in row["providers"]):
        found = [_named(row, name) for row in rows]
        if any("median_ms" in p for p in found):
            lines.append(_line(name, rows, found))
        remarks |= dict.fromkeys(_remark(p) for p in found if name != "ours (torch)")
    remarks.pop("", None)
    return lines + (["", f"{'; '.join(remarks)}."] if remarks else [])


def _floors(data: dict[str, Any]) -> list[str]:
    """A floor a line, a row count a column; TFLOP/s, of the copy GB/s."""
    rows = data["rows"]
    counts = sorted({row["M"] for row in rows if "M" in row})
    gemm = next(row for row in rows if "M" in row)
    lines = [
        f"**floors**: the head's GEMMs, TFLOP/s, V={gemm['V']} H={gemm['H']}",
        "",
        f"| | {' | '.join(f'M={m}' for m in counts)} |",
        f"|---|{'---:|' * len(counts)}",
    ]
    for name in dict.fromkeys(row["name"] for row in rows if "M" in row):
        found = {row["M"]: row["tflops"] for row in rows if row["name"] == name}
        lines.append(f"| {name} | {' | '.join(_figure(found[m]) for m in counts)} |")
    rest = [row for row in rows if "M" not in row]
    said = [
        f"{row['name']} {_figure(row['gb_s'])} GB/s"
        if row.get("gb_s")
        else f"{row['name']} {1e3 * row['median_ms']:.3g} us"
        for row in rest
    ]
    return [*lines, "", f"{', '.join(said)}."]


def _end_to_end(data: dict[str, Any]) -> list[str]:
    """Measured means of a step beside the plan's."""
    lines = [
        f"**whole RL steps**: {data['model']}, {data['steps']} steps after the first",
        "",
        "| mean of a step | measured | planned | ratio |",
        "|---|---:|---:|---:|",
    ]
    for key, value in data["measured"].items():
        if key in data["planned"] or key in _TOLD:
            planned, ratio = data["planned"].get(key), data["measured_over_planned"].get(key)
            cells = ["" if x is None else f"{x:.3g}" for x in (planned, ratio)]
            lines.append(f"| {key} | {value:.3g} | {' | '.join(cells)} |")
    return lines


_TOLD = (
    *("prefix_cache_hit_rate", "perf/mfu", "seconds/sync"),
    *("sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max"),
)
_OTHERS = {"floors": _floors, "end_to_end": _end_to_end}


def _split(names: list[str]) -> tuple[list[str], list[str]]:
    """Words that all the shapes' names share, and the names without them."""
    common = [word for word in names[0].split() if all(word in name.split() for name in names)]
    if len(names) == 1:
        common = common[1:]
    rest = [" ".join(word for word in name.split() if word not in common) for name in names]
    return common, rest


def _named(row: dict[str, Any], name: str) -> dict[str, Any]:
    missing = {"name": name, "status": "not chosen", "kind": "peer", "judged": True, "note": ""}
    return next((p for p in row["providers"] if p["name"] == name), missing)


def _line(name: str, rows: list[dict[str, Any]], found: list[dict[str, Any]]) -> str:
    cells = []
    for row, p in zip(rows, found, strict=True):
        ours = _named(row, "ours")
        if "median_ms" not in p:
            cells.append("")
        elif p["kind"] != "peer" or "median_ms" not in ours:
            cells.append(_figure(p["median_ms"]))
        else:
            cells.append(f"{_figure(p['median_ms'] / ours['median_ms'])}x")
    held = next((p["peak_bytes"] for p in reversed(found) if "peak_bytes" in p), None)
    title = f"**{name}**" if name == "ours" else name
    starred = "" if all(p["judged"] or p["kind"] == "floor" for p in found) else r"\*"
    memory = "" if held is None else _figure(held / 2**20)
    return f"| {title}{starred} | {' | '.join(cells)} | {memory} |"


def _figure(value: float) -> str:
    """Three digits, and thousands set apart."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _remark(p: dict[str, Any]) -> str:
    if "median_ms" not in p:
        return f"{p['name']}: {p['status']}"
    if not p["judged"] and p["kind"] == "peer":
        return rf"\* {p['name']} computes something else: {p['note']}"
    return ""


if __name__ == "__main__":
    sys.exit(main())
