"""``mmedx data build``: MMedExpert data from public questions and a teacher."""

from __future__ import annotations

import argparse
from typing import Any


def add_build(subparsers: Any) -> None:
    """Add ``build`` to the commands of ``mmedx data`` (an argparse sub-parsers action)."""
    text = (
        "Have a teacher write reasoning traces for questions; filter, de-duplicate, decontaminate"
    )
    sub = subparsers.add_parser("build", help=text, description=text)
    sub.set_defaults(command=_build)
    sub.add_argument("-v", "--verbose", action="store_true", help="log more; show tracebacks")
    sub.add_argument("config", help="YAML file (datasets/mmedexpert_build.yaml is one to copy)")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. teacher.attempts=2")
    sub.add_argument(
        "--dry-run", action="store_true", help="check the sources, estimate the cost, ask nothing"
    )
    sub.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="take up at most N questions; a later build reuses them",
    )
    sub.add_argument(
        "--from-journal",
        action="store_true",
        help="ask nothing; write the data set from the answers that are there",
    )


def _build(options: argparse.Namespace) -> int:
    from mmedx_fast._paths import find_config
    from mmedx_fast.builder.config import load_build_config
    from mmedx_fast.config import ConfigError

    if options.limit is not None and options.limit < 1:
        raise ConfigError(f"--limit {options.limit}: give a positive number")
    cfg = load_build_config(find_config(options.config), options.overrides)
    from mmedx_fast.builder.build import build, estimate
    from mmedx_fast.builder.datasheet import estimate_text, funnel_text

    if options.dry_run:
        print(estimate_text(estimate(cfg, limit=options.limit)))
        return 0
    sheet = build(cfg, limit=options.limit, from_journal=options.from_journal)
    print(funnel_text(sheet))
    print(f"\n{cfg.folder / sheet['data']['file']}, {cfg.folder / 'datasheet.md'}")
    return 0
