"""The project's speed and memory targets, read off the results of one or several runs.

    python -m bench.targets bench/results/*.json

Each target names the op, the shape and the ratio it is about; a ratio compares two providers of one run, which
took turns on one machine. What no result covers is listed as not measured, never left out. Exit status 1 where a
target was measured and missed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
Measure = Callable[[Row], float | None]


@dataclass(frozen=True)
class Target:
    """``measure`` gives a number from one shape's row, or None where it cannot."""

    id: str
    what: str
    op: str
    sizes: Mapping[str, int]
    """The row is the first whose sizes include these."""
    measure: Measure
    goal: float
    stretch: float | None = None
    at_most: bool = False
    """Good is small."""


def provider(row: Row, name: str) -> Row | None:
    """A provider's result that was timed, or None."""
    found = next((p for p in row["providers"] if p["name"] == name), None)
    return found if found is not None and "median_ms" in found else None


def to_floor(name: str = "ours") -> Measure:
    """Its time over the floor's."""

    def measure(row: Row) -> float | None:
        found = provider(row, name)
        return None if found is None else found["ratio_to_floor"]

    return measure


def faster(peer: str, ours: str = "ours") -> Measure:
    """The peer's time over ours."""

    def measure(row: Row) -> float | None:
        own, other = provider(row, ours), provider(row, peer)
        return None if own is None or other is None else other["median_ms"] / own["median_ms"]

    return measure


def leaner(
    peer: str, key: str = "peak_bytes", beside: Callable[[Row], float] = lambda row: 0.0
) -> Measure:
    """Our bytes over the peer's; ``beside`` is left out of both (what any implementation holds)."""

    def measure(row: Row) -> float | None:
        own, other = provider(row, "ours"), provider(row, peer)
        if own is None or other is None or not other.get(key):
            return None
        return (own[key] - beside(row)) / (other[key] - beside(row))

    return measure


def error(name: str, output: str) -> Measure:
    """A provider's error of one output."""

    def measure(row: Row) -> float | None:
        found = next((p for p in row["providers"] if p["name"] == name), None)
        return None if found is None else found["errors"].get(output)

    return measure


def error_over(peer: str, output: str) -> Measure:
    """Our error over the peer's."""
    own, other = error("ours", output), error(peer, output)

    def measure(row: Row) -> float | None:
        a, b = own(row), other(row)
        return None if a is None or not b else a / b

    return measure


def worst_error(row: Row) -> float | None:
    """The largest of our errors over all outputs."""
    found = next((p for p in row["providers"] if p["name"] == "ours"), None)
    return max(found["errors"].values()) if found is not None and found["errors"] else None


def beside_largest(row: Row) -> float | None:
    """Our peak over the bytes of the largest matrix, 16 bits an element."""
    own = provider(row, "ours")
    s = row["sizes"]
    largest = s["I"] * s["H"] if "I" in s else s.get("out", 0) * s.get("in", 0)
    return None if own is None or not largest else own["peak_bytes"] / (2 * largest)


def _d_hidden(row: Row) -> float:
    """Bytes of the gradient that every implementation returns."""
    return float(2 * row["sizes"]["N"] * row["sizes"]["H"])


HEAD = {"N": 8192, "H": 3584}
LONG = {"N": 16384, "H": 3584}
MODEL = {"L": 28, "r": 64}
TARGETS = (
    Target(
        "E1",
        "log-prob and entropy, no gradient, over its GEMM",
        "linear_logprob",
        HEAD,
        to_floor(),
        1.10,
        1.06,
        True,
    ),
    Target(
        "E2",
        "policy loss, forward and backward, over its two GEMMs",
        "policy_loss",
        HEAD,
        to_floor(),
        1.12,
        1.07,
        True,
    ),
    Target(
        "E3",
        "faster than TRL's chunked log-probs",
        "policy_loss",
        HEAD,
        faster("TRL chunked"),
        1.35,
        1.5,
    ),
    Target("E4", "faster than Liger's GRPO loss", "policy_loss", HEAD, faster("Liger GRPO"), 6, 9),
    Target(
        "E4b",
        "faster than Liger's GRPO loss in TF32",
        "policy_loss",
        HEAD,
        faster("Liger GRPO, TF32"),
        2.5,
        3,
    ),
    Target(
        "E5",
        "faster than Liger's fused cross-entropy",
        "policy_loss",
        HEAD,
        faster("Liger FLCE, sum"),
        1.6,
        2.5,
    ),
    Target(
        "E6",
        "faster than Liger's FLSCE, forward and backward",
        "policy_loss",
        HEAD,
        faster("Liger FLSCE"),
        1.3,
        1.7,
    ),
    Target(
        "E6b",
        "Liger's FLSCE without gradient over ours",
        "linear_logprob",
        HEAD,
        faster("Liger FLSCE"),
        0.97,
    ),
    Target("E7", "faster than CCE", "policy_loss", HEAD, faster("CCE"), 1.3, 1.8),
    Target(
        "E7b",
        "faster than CCE without its filter",
        "policy_loss",
        HEAD,
        faster("CCE exact"),
        1.8,
        2.5,
    ),
    Target("E8", "faster than verl's kernel", "policy_loss", HEAD, faster("verl"), 2.5, 3.3),
    Target(
        "E9",
        "faster than F.linear_cross_entropy",
        "policy_loss",
        HEAD,
        faster("F.linear_cross_entropy, sum"),
        1.4,
        1.8,
    ),
    Target(
        "E10", "faster than eager, whole logits", "policy_loss", HEAD, faster("eager torch"), 1.6, 2
    ),
    Target(
        "E10b",
        "faster than torch.compile, whole logits",
        "policy_loss",
        HEAD,
        faster("torch.compile"),
        1.0,
        1.1,
    ),
    Target(
        "E11",
        "extra memory over eager's at 16,384 tokens",
        "policy_loss",
        LONG,
        leaner("eager torch", beside=_d_hidden),
        1 / 8,
        1 / 12,
        True,
    ),
    Target(
        "E12",
        "largest error of a log-prob, nat",
        "linear_logprob",
        HEAD,
        error("ours", "logprob"),
        2e-4,
        5e-5,
        True,
    ),
    Target(
        "E13",
        "error of the gradient over eager's",
        "policy_loss",
        HEAD,
        error_over("eager torch", "d_hidden"),
        1.0,
        0.5,
        True,
    ),
    Target(
        "E15",
        "advantages: faster than TRL's formula",
        "guideline_advantages",
        {"B": 512},
        faster("TRL formula"),
        15,
        40,
    ),
    Target(
        "E15b",
        "advantages: faster than torch.compile",
        "guideline_advantages",
        {"B": 512},
        faster("torch.compile"),
        2,
        4,
    ),
    Target(
        "E16",
        "TIES over a whole model, over a copy of it",
        "lora_merge",
        MODEL,
        to_floor(),
        6,
        4,
        True,
    ),
    Target(
        "E17",
        "faster than TIES on materialised deltas, one linear",
        "lora_merge",
        {"out": 18944, "r": 64},
        faster("materialised TIES"),
        30,
        100,
    ),
    Target(
        "E18",
        "faster than peft's ties_svd, one linear",
        "lora_merge",
        {"out": 3584, "r": 64},
        faster("peft ties_svd"),
        500,
        5000,
    ),
    Target(
        "E19",
        "memory beside the model over its largest matrix",
        "lora_merge",
        MODEL,
        beside_largest,
        0.05,
        0.0,
        True,
    ),
    Target(
        "E20",
        "largest error of a merged weight (relative)",
        "lora_merge",
        {"L": 28},
        worst_error,
        2.0**-8,
        None,
        True,
    ),
    Target(
        "E21",
        "interference: faster than whole deltas",
        "lora_interference",
        {"out": 18944, "r": 64},
        faster("materialised"),
        20,
        50,
    ),
    Target(
        "step",
        "7B update: faster than TRL's",
        "train_step",
        {"R": 256, "checkpoint": 1, "H": 3584},
        faster("TRL GRPO by 4"),
        4,
    ),
    Target(
        "step, memory",
        "7B update: peak over TRL's",
        "train_step",
        {"R": 256, "checkpoint": 1, "H": 3584},
        leaner("TRL GRPO by 4"),
        1 / 3,
        None,
        True,
    ),
)


def judge(target: Target, documents: Sequence[Mapping[str, Any]]) -> tuple[float | None, str]:
    """(value, verdict) from the newest document of the op with the shape: stretch, met, missed, or why not."""
    why = "not measured"
    for data in sorted(documents, key=lambda d: str(d.get("date", "")), reverse=True):
        if data.get("op") != target.op:
            continue
        for row in data["rows"]:
            if any(row["sizes"].get(key) != size for key, size in target.sizes.items()):
                continue
            if row["failed"]:
                why = f"ours failed: {row['failed']}"
                continue
            value = target.measure(row)
            if value is not None and math.isfinite(value):
                return value, _verdict(target, value)
            why = "a side of it was not measured"
    return None, why


def _verdict(target: Target, value: float) -> str:
    def reaches(bound: float) -> bool:
        return value <= bound if target.at_most else value >= bound

    if target.stretch is not None and reaches(target.stretch):
        return "stretch"
    return "met" if reaches(target.goal) else "missed"


def table(documents: Sequence[Mapping[str, Any]]) -> tuple[str, int]:
    """Markdown of all targets, and how many were missed."""
    lines = [
        "| target | what | measured | goal | stretch | verdict |",
        "|---|---|---:|---:|---:|---|",
    ]
    missed = 0
    for target in TARGETS:
        value, verdict = judge(target, documents)
        missed += verdict == "missed"
        sign = "at most" if target.at_most else "at least"
        stretch = "" if target.stretch is None else f"{target.stretch:.3g}"
        measured = "" if value is None else f"{value:.3g}"
        lines.append(
            f"| {target.id} | {target.what} | {measured} | {sign} {target.goal:.3g} | {stretch} | {verdict} |"
        )
    return "\n".join(lines), missed


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 1 where a measured target was missed, 2 for files that are no results."""
    made = argparse.ArgumentParser(
        prog="python -m bench.targets",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("results", nargs="+", type=Path, help="JSON files of bench.run")
    made.add_argument("--markdown", type=Path, help="also write the table here")
    options = made.parse_args(argv)
    documents = []
    for path in options.results:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            documents.append(data if isinstance(data, dict) and "op" in data else _refuse())
        except (OSError, ValueError) as problem:
            print(f"{path}: cannot be read as results of bench.run ({problem})", file=sys.stderr)
            return 2
    text, missed = table(documents)
    print(text)
    if options.markdown is not None:
        from bench.results import write

        write(options.markdown, text + "\n")
    return 1 if missed else 0


def _refuse() -> Mapping[str, Any]:
    raise ValueError("it names no op")


if __name__ == "__main__":
    sys.exit(main())
