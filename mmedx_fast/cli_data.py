"""``mmedx data``: the commands that look at and make data sets."""

from __future__ import annotations

import argparse
from typing import Any

from mmedx_fast.cli_build import add_build


def add_data(commands: Any) -> None:
    """Add the group ``data`` to the commands of ``mmedx`` (an argparse sub-parsers action)."""
    text = "Look at data sets and make them"
    group = commands.add_parser("data", help=text, description=text)
    subparsers = group.add_subparsers(required=True, metavar="COMMAND")
    add_inspect(subparsers)
    add_build(subparsers)


def add_inspect(subparsers: Any) -> None:
    """Add ``inspect`` to the commands of ``mmedx data``."""
    text = "Count and show what a data set holds, and which of its rows cannot be used"
    sub = subparsers.add_parser("inspect", help=text, description=text)
    sub.set_defaults(command=_inspect)
    sub.add_argument("-v", "--verbose", action="store_true", help="log more; show tracebacks")
    sub.add_argument("path", help="data file or folder")
    sub.add_argument("--format", help="the data format by name (default: detected)")
    sub.add_argument("--split", help="train, validation, test, ... (default: all there are)")
    sub.add_argument("--limit", type=int, metavar="N", help="at most N questions of each split")
    sub.add_argument("--html", metavar="FILE", help="also write a page with sample questions")
    sub.add_argument(
        "--samples",
        type=int,
        default=6,
        metavar="N",
        help="samples a specialty (default %(default)s)",
    )
    sub.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a choice that the format offers, e.g. language=both for slake",
    )


def _inspect(options: argparse.Namespace) -> int:
    from pathlib import Path

    from mmedx_fast.inspection import inspect_data, report_text

    chosen = {}
    for item in options.option:
        name, mark, value = item.partition("=")
        if not mark:
            raise ValueError(f"--option {item}: give NAME=VALUE")
        chosen[name] = value
    if options.samples < 0:
        raise ValueError(f"--samples {options.samples}: give 0 or more")
    found = inspect_data(
        Path(options.path),
        format=options.format,
        split=options.split,
        limit=options.limit,
        options=chosen,
        samples=options.samples if options.html else 0,
    )
    print(report_text(found))
    if options.html:
        from mmedx_fast.atomic import write_text
        from mmedx_fast.inspection_html import page

        write_text(Path(options.html), page(found))
        print(f"\n{options.html}")
    return 0
