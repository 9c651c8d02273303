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

from bench.results import number, write

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
        "Medians; x: how many times our time or memory.",
        "",
        "| op | size | ours, ms | floor, ms | ours / floor | peers' time | ours, MiB | peers' memory |",
        "|---|---|---:|---:|---:|---|---:|---|",
    ]
    absent: dict[str, None] = {}
    for data in group:
        for row in data["rows"]:
            lines.append(_line(data, row))
            for p in row["providers"]:
                if "median_ms" not in p and p["name"] != "ours (torch)":
                    absent[f"{p['name']} ({p['status']})"] = None
    commands = dict.fromkeys(data["command"] for data in group)
    lines += ["", *(f"    {command}" for command in commands)]
    if absent:
        lines += ["", f"Not timed at every size: {'; '.join(absent)}."]
    return "\n".join(lines)


def _line(data: dict[str, Any], row: dict[str, Any]) -> str:
    timed = {p["name"]: p for p in row["providers"] if "median_ms" in p}
    head = f"| `{data['op']}` | {row['shape']}, {row['dtype']} |"
    ours = timed.pop("ours", None)
    if ours is None:
        return f"{head} {row['failed'] or 'not timed'} | | | | | |"
    floor = next((p for p in timed.values() if p["kind"] == "floor"), None)
    peers = [p for p in timed.values() if p["kind"] == "peer"]
    time = ", ".join(f"{p['name']} {p['median_ms'] / ours['median_ms']:.3g}x" for p in peers)
    held = max(ours["peak_bytes"], 1)
    memory = ", ".join(f"{p['name']} {p['peak_bytes'] / held:.3g}x" for p in peers)
    return (
        f"{head} {ours['median_ms']:.4g} | {number(floor and floor['median_ms'], '.4g')} | "
        f"{number(ours['ratio_to_floor'], '.2f')} | {time} | {held / 2**20:.4g} | {memory} |"
    )


if __name__ == "__main__":
    sys.exit(main())
