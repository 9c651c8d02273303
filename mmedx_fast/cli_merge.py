"""``mmedx conflicts`` and ``mmedx merge`` on PEFT adapters made by anyone."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmedx_fast.ops import MergeSpec

COMMANDS = ("conflicts", "merge")
_OF_ADAPTERS = ("--base", "--out", "--as-lora")
HINT = (
    "mmedx {command} ADAPTER_DIR [ADAPTER_DIR ...] does the same for any PEFT LoRA adapters, without a run: "
    "see mmedx {command} ADAPTER_DIR --help."
)


def takes_adapters(arguments: Sequence[str]) -> bool:
    """Whether a command line is of adapters: it names a folder, as a config is a file, or several things
    (a config comes alone but for ``key=value``), or has an option that only adapters have."""
    if not arguments or arguments[0] not in COMMANDS:
        return False
    named = [item for item in arguments[1:] if not item.startswith("-")]
    options = {item.partition("=")[0] for item in arguments[1:] if item.startswith("-")}
    return (
        any(Path(item).is_dir() for item in named)
        or sum("=" not in item for item in named) > 1
        or not options.isdisjoint(_OF_ADAPTERS)
    )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse ``conflicts ADAPTER_DIR...`` or ``merge ADAPTER_DIR...``."""
    parser = {"conflicts": _conflicts_parser, "merge": _merge_parser}[arguments[0]]()
    return parser.parse_args(arguments[1:])


def _parser(command: str, text: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"mmedx {command}", description=text)
    parser.add_argument(
        "adapters", nargs="+", metavar="ADAPTER_DIR", help="folder with adapter_config.json"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="log more; show tracebacks")
    parser.add_argument(
        "--density",
        type=float,
        default=0.3,
        help="share of each adapter's change that is kept (default %(default)s)",
    )
    parser.add_argument(
        "--trim-scope",
        choices=("tensor", "global"),
        default="tensor",
        help="trim every matrix by itself, or an adapter's matrices together (default %(default)s)",
    )
    parser.add_argument(
        "--any-base",
        action="store_true",
        help="the adapters name different bases, which are the same",
    )
    return parser


def _conflicts_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "conflicts", "Measure how the changes of PEFT LoRA adapters conflict, module by module."
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measures there")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw sign conflicts by layer")
    parser.set_defaults(command=run_conflicts)
    return parser


def _merge_parser() -> argparse.ArgumentParser:
    parser = _parser("merge", "Merge PEFT LoRA adapters into their base, or into one adapter.")
    parser.add_argument("--base", metavar="DIR", help="folder of the base model (for a model)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--method",
        choices=("ties", "dare_ties", "dare_linear", "linear"),
        default="ties",
        help="(default %(default)s)",
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, help="factor on the merged change (default 1)"
    )
    parser.add_argument(
        "--weights", type=float, nargs="+", metavar="W", help="one per adapter (default ones)"
    )
    parser.add_argument(
        "--election",
        choices=("total", "weighted", "frequency"),
        default="total",
        help="whose sign wins: that of the sum, of the weighted sum, of most (default %(default)s)",
    )
    parser.add_argument(
        "--divisor",
        choices=("count", "weight"),
        default="count",
        help="the agreeing changes' mean, by number or by weight (default %(default)s)",
    )
    parser.add_argument(
        "--rounding",
        choices=("nearest", "stochastic"),
        default="nearest",
        help="of the sum to the base's dtype (default %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of random dropping and rounding")
    parser.add_argument("--as-lora", action="store_true", help="write an adapter, not a model")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--rank", type=int, help="of the adapter")
    size.add_argument(
        "--energy",
        type=float,
        help="instead of a rank: share of the merged change to keep (default 0.99)",
    )
    parser.add_argument(
        "--space",
        choices=("core", "delta"),
        default="core",
        help="merge in the adapters' common low-rank space, or decompose the merged matrices as PEFT's "
        "*_svd do, which is slow (default %(default)s)",
    )
    parser.set_defaults(command=run_merge)
    return parser


def _prepare() -> None:
    """The environment that torch reads at import."""
    from mmedx_fast._env import prepare_environment

    prepare_environment(offline=True)


def _spec(options: argparse.Namespace) -> MergeSpec:
    from mmedx_fast.ops import MergeSpec

    given: dict[str, Any] = {"density": options.density, "trim_scope": options.trim_scope}
    if hasattr(options, "method"):
        weights = None if options.weights is None else tuple(options.weights)
        given |= {
            "method": options.method,
            "lam": options.scale,
            "weights": weights,
            "election": options.election,
            "divisor": options.divisor,
            "rounding": options.rounding,
            "seed": options.seed,
        }
    return MergeSpec(**given)


def run_conflicts(options: argparse.Namespace) -> int:
    """``mmedx conflicts ADAPTER_DIR...``"""
    _prepare()
    from mmedx_fast.atomic import write_bytes, write_json
    from mmedx_fast.merging import conflicts
    from mmedx_fast.meter import render_table

    found = conflicts(options.adapters, _spec(options), any_base=options.any_base)
    keys = ("sign_conflict", "weighted_sign_conflict", "cancelled_energy", "kept_fraction")
    rows = [[name, *(f"{row[k]:.3f}" for k in keys)] for name, row in found["linears"].items()]
    rows.append(["all", *(f"{found['summed'][k]:.3f}" for k in keys)])
    print(render_table(["linear", *keys], rows))
    names = found["experts"]
    cosines = [
        [name, *(f"{x:.3f}" for x in row)]
        for name, row in zip(names, found["summed"]["cosine"], strict=True)
    ]
    print("\n" + render_table(["cosine", *names], cosines))
    for note in found["notes"]:
        print(f"note: {note}")
    if options.json:
        write_json(options.json, found)
        print(options.json)
    if options.png:
        write_bytes(options.png, _png(found))
        print(options.png)
    return 0


def _png(found: dict[str, Any]) -> bytes:
    from mmedx_fast.report_data import Conflicts
    from mmedx_fast.report_plots import conflict_png

    linears, summed = found["linears"], found["summed"]
    data = Conflicts(found["experts"], linears, summed, summed["cosine"])
    return conflict_png(data, "sign_conflict")


def run_merge(options: argparse.Namespace) -> int:
    """``mmedx merge ADAPTER_DIR... --out DIR``"""
    _prepare()
    from mmedx_fast.merging import merge

    made = merge(
        options.adapters,
        options.out,
        _spec(options),
        base=options.base,
        as_lora=options.as_lora,
        rank=options.rank,
        energy=options.energy,
        space=options.space,
        any_base=options.any_base,
    )
    for note in made["notes"]:
        print(f"note: {note}")
    if made["form"] == "adapter":
        print(f"rank {made['rank']}, {made['energy_kept']:.4f} of the energy kept, {options.out}")
        return 0
    total = made["total"]
    print(
        f"{len(made['linears'])} matrices, sign conflicts {total['sign_conflict_rate']:.3f}, "
        f"{total['lost_update_fraction']:.4f} of the updates lost to rounding, {options.out}"
    )
    return 0
