"""The demo over several seeds, and its ablations: ``python bench/ablate.py {main,gba,ties,linear,adherence}``.

``main`` runs the demo once a seed. The others reuse its finished stages and change one thing:
    gba        plain GRPO (K = 1: one group a question, the same rollouts) for guideline-relative advantages
    ties       the plain mean of the task vectors for TIES
    linear     their scaled sum for TIES, its strength searched on the validation set as that of TIES is
    adherence  no adherence reward
Writes ``<runs>/ablation-<name>.json`` and prints the table; every figure is on the held-out test set.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

NO_ADHERENCE = (
    "gba.rewards=[{name: accuracy_reward, weight: 1.0}, {name: format_reward, weight: 0.2}]"
)
# The merged model is not looked at there: no search for its strength.
ONE_MERGE = ["caci.density=[1.0]", "caci.scale=[1.0]", "caci.rl_weight=[1.0]"]
CHANGES: dict[str, dict[str, Any]] = {
    "main": {"override": [], "reuse": [], "models": None, "compare": "merged"},
    "gba": {
        "override": ["gba.advantage.group_by=question", *ONE_MERGE],
        "reuse": ["dsa"],
        "models": "[rl]",
        "compare": "rl",
    },
    "ties": {
        "override": ["caci.method=linear", "caci.density=[1.0]", "caci.scale=[0.2]"]
        + ["caci.rl_weight=[1.0]"],
        "reuse": ["dsa", "gba"],
        "models": "[merged]",
        "compare": "merged",
    },
    "linear": {
        "override": ["caci.method=linear", "caci.density=[1.0]", "caci.scale=[0.2,0.35,0.5,0.7]"],
        "reuse": ["dsa", "gba"],
        "models": "[merged]",
        "compare": "merged",
    },
    "adherence": {
        "override": [NO_ADHERENCE, *ONE_MERGE],
        "reuse": ["dsa"],
        "models": "[rl]",
        "compare": "rl",
    },
}


def run(config: str, folder: Path, seed: int, overrides: list[str]) -> dict[str, Any]:
    """One run (skipped where it is done); returns its summary."""
    command = [sys.executable, "-m", "mmedx_fast.cli", "run", config, f"seed={seed}"]
    subprocess.run([*command, f"run_dir={folder}", *overrides], check=True)
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def ablate(name: str, config: str, runs: Path, seeds: list[int], more: list[str]) -> dict[str, Any]:
    """Run ``name`` for every seed; returns means and the single values."""
    change = CHANGES[name]
    rows = []
    for seed in seeds:
        main_folder = runs / f"main-{seed}"
        overrides = [*more, *change["override"]]
        overrides += [f"{stage}.reuse={main_folder}" for stage in change["reuse"]]
        if change["models"]:
            overrides.append(f"eval.models={change['models']}")
        summary = run(config, runs / f"{name}-{seed}", seed, overrides)
        row = {"seed": seed, "macro_accuracy": summary["macro_accuracy"]}
        row["adherence"] = summary["adherence"]
        row["seconds"] = summary["seconds"]
        if name != "main":
            base = json.loads((main_folder / "summary.json").read_text())
            row["main"] = base["macro_accuracy"][change["compare"]]
            row["main_adherence"] = base["adherence"][change["compare"]]
        rows.append(row)
    models = list(rows[0]["macro_accuracy"])
    result: dict[str, Any] = {
        "name": name,
        "config": config,
        "overrides": more,
        "mean": {m: _mean([row["macro_accuracy"][m] for row in rows]) for m in models},
        "rows": rows,
    }
    if name != "main":
        result["main_mean"] = _mean([row["main"] for row in rows])
    (runs / f"ablation-{name}.json").write_text(json.dumps(result, indent=1))
    return result


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=CHANGES)
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    result = ablate(
        options.name, options.config, options.runs, options.seeds, list(options.overrides)
    )
    for model, value in result["mean"].items():
        single = ", ".join(f"{100 * row['macro_accuracy'][model]:.1f}" for row in result["rows"])
        print(f"{model:20s} {100 * value:5.1f}   ({single})")
    if "main_mean" in result:
        print(f"{'unchanged':20s} {100 * result['main_mean']:5.1f}")


if __name__ == "__main__":
    main()
