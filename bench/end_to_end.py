"""Whole RL steps with the real rollout engine on random weights of the real size, beside what the plan said.

    python -m bench.end_to_end --out DIR                       # 7B on a GPU, the tiny model without one
    python -m bench.end_to_end --steps 4 --response 512 gba.max_row_tokens=8192

Random weights answer nonsense of full length, which costs what sense would. The images are the phantom
clinic's, enlarged to about a thousand image tokens; the vocabulary is the model's own size. ``mmedx gba`` runs
as a user would start it; its metrics give seconds by phase, prefix-cache hits, the difference of trainer and
engine per token, and GPU hours per 1,000 samples. JSON holds measured and planned numbers and their ratio.
Further ``key=value`` settings go to the run.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmedx_fast._env import prepare_environment

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("qwen2_5_vl_7b", "tiny")
EDGE = 896
"""Pixels on each side of an image at 7B: 1,024 image tokens."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m bench.end_to_end",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--model", choices=MODELS, help="default: 7B on a GPU, else tiny")
    made.add_argument("--steps", type=int, default=3, help="the first is warm-up and not counted")
    made.add_argument("--questions", type=int, default=4, help="a step")
    made.add_argument("--response", type=int, help="tokens; default: 256, 24 for the tiny model")
    made.add_argument("--gpu", default="h200", help="what the plan is made for")
    made.add_argument(
        "--work", type=Path, help="folder for weights and run; default: a temporary one"
    )
    made.add_argument("--out", type=Path, default=ROOT / "bench/results")
    made.add_argument("--commit", help="recorded where the sources are no git checkout")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 0: ran and was written, 2: bad arguments, else the run's own exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options, settings = parser().parse_known_args(arguments)
    wrong = [item for item in settings if "=" not in item or item.startswith("-")]
    if wrong or options.steps < 2:
        said = (
            f"unrecognized arguments: {' '.join(wrong)}" if wrong else "--steps must be at least 2"
        )
        print(said, file=sys.stderr)
        return 2
    prepare_environment(offline=True)
    import torch

    from bench import results

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.model = options.model or (MODELS[0] if device.type == "cuda" else "tiny")
    options.response = options.response or (24 if options.model == "tiny" else 256)
    with tempfile.TemporaryDirectory(prefix="end-to-end-") as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        overrides = [*_overrides(options, work, device), *settings]
        code = _run(options, overrides)
        if code:
            return code
        data = _document(options, overrides, work / "run")
    command = shlex.join(["python", "-m", "bench.end_to_end", *arguments])
    env = results.environment(command, device, options.commit)
    path = options.out / f"{results.stem('end_to_end', env['device'], env['date'])}.json"
    results.write_json(path, env | {"op": "end_to_end"} | data)
    print(text(data))
    print(path)
    return 0


def _config_name(options: argparse.Namespace) -> str:
    return "demo.yaml" if options.model == "tiny" else f"{options.model}.yaml"


def _overrides(options: argparse.Namespace, work: Path, device: Any) -> list[str]:
    """What makes the recipe a short run on these weights and images."""
    questions = options.steps * options.questions
    made = [
        f"run_dir={work / 'run'}",
        "gba.start=base",
        f"gba.steps={options.steps}",
        f"gba.questions_per_step={options.questions}",
        f"gba.save_steps={options.steps}",
        "gba.filter_zero_variance=false",
        f"gba.rewards=[{{name: '{ROOT / 'bench/kill.py'}:by_place'}}]",
        f"rollout.max_completion_length={options.response}",
        "rollout.temperature=1.0",
    ]
    if options.model == "tiny":
        return [
            *made,
            f"phantom.train={max(20, questions)}",
            "phantom.validation=20",
            "phantom.test=20",
        ]
    from mmedx_fast.data.phantom import write_phantom

    data, model = work / "data", work / "model"
    if not data.exists():
        write_phantom(data, train=max(20, questions), validation=20, test=20, seed=0)
        enlarge(data, EDGE)
    if not model.exists():
        write_model(model, device)
    return [
        *made,
        *(f"model.path={model}", "model.offline=true"),
        *(f"data.train={data}", f"data.validation={data}", f"data.test={data}"),
    ]


def enlarge(folder: Path, edge: int) -> None:
    """Every PNG of a data set to ``edge`` x ``edge`` pixels, in place."""
    from PIL import Image

    for path in folder.rglob("*.png"):
        with Image.open(path) as image:
            larger = image.convert("RGB").resize((edge, edge))
        larger.save(path)


def write_model(folder: Path, device: Any, sizes: dict[str, int] | None = None) -> None:
    """A Qwen2.5-VL of random weights (bfloat16) in Hugging Face's form, with the tiny model's tokenizer and
    processor, the vocabulary filled up to the model's."""
    import torch
    from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

    from bench.step import _SEVEN_B, model_config
    from mmedx_fast.tiny import assets_folder

    sizes = sizes or _SEVEN_B
    assets = assets_folder()
    tiny = json.loads((assets / "config.json").read_text(encoding="utf-8"))
    special = {key: value for key, value in tiny.items() if key.endswith("_token_id")}
    config = model_config(sizes) | special
    config["text_config"] |= {
        key: tiny["text_config"].get(key)
        for key in ("eos_token_id", "pad_token_id", "bos_token_id")
    }
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(
            Qwen2_5_VLConfig(**config), dtype=torch.bfloat16
        )
    model.save_pretrained(folder)
    for asset in assets.iterdir():
        if asset.name not in ("config.json", "model.safetensors"):
            shutil.copy(asset, folder)
    fill_vocabulary(folder / "tokenizer.json", sizes["V"])


def fill_vocabulary(path: Path, size: int) -> None:
    """Give every id below ``size`` a word, so that whatever is sampled can be decoded; texts are encoded
    as before."""
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    words = tokenizer["model"]["vocab"]
    # transformers numbers added tokens behind the vocabulary unless they stand in it.
    words |= {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    taken = set(words.values())
    for index in range(size):
        if index not in taken:
            words[f"~{index}"] = index
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def _run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    command = [sys.executable, "-m", "mmedx_fast.cli", "gba", _config_name(options), *overrides]
    print(shlex.join(command), flush=True)
    # Our folder first, but not under the name of Hugging Face's package "kernels".
    return subprocess.run(
        command, env=os.environ | {"PYTHONSAFEPATH": "1", "PYTHONPATH": str(ROOT)}, check=False
    ).returncode


def _document(options: argparse.Namespace, overrides: Sequence[str], run: Path) -> dict[str, Any]:
    """Measured means over the steps after the first, the plan for the same lengths, and ratios."""
    from mmedx_fast._paths import find_config
    from mmedx_fast.config import load_config
    from mmedx_fast.cost import Assumptions, plan
    from mmedx_fast.gpus import find_gpu
    from mmedx_fast.metrics import read_metrics

    cfg = load_config(find_config(_config_name(options)), list(overrides))
    steps = read_metrics(run / "gba" / "metrics.jsonl")[1:]
    keys = sorted({key for step in steps for key in step if key not in ("step", "time")})
    measured = {
        key: statistics.fmean(values)
        for key in keys
        if (values := [step[key] for step in steps if isinstance(step.get(key), int | float)])
    }
    gpu = find_gpu(options.gpu)
    response = max(1, round(measured["completions/mean_length"]))
    assume = Assumptions(tflops=gpu.tflops, bandwidth=gpu.bandwidth, response_tokens=response)
    estimate = plan(cfg, assume, gpu=gpu)
    rollout, update = estimate["stages"][1], estimate["stages"][2]
    planned = {
        "seconds/rollout": rollout["gpu_hours"] * 3600 / cfg.gba.steps,
        "seconds/train": update["gpu_hours"] * 3600 / cfg.gba.steps,
        "gpu_hours_per_1000_samples": estimate["per_1000_questions"]["gpu_hours"],
        "tokens_saved": update["tokens_plain"] / update["tokens"],
        "perf/peak_memory_bytes": float(estimate["machine"]["peak"]),
    }
    seconds = sum(v for k, v in measured.items() if k.startswith("seconds/"))
    own = measured | {
        "gpu_hours_per_1000_samples": seconds / cfg.gba.questions_per_step * 1000 / 3600
    }
    done = json.loads((run / "gba" / "done.json").read_text(encoding="utf-8"))
    return {
        "model": options.model,
        "overrides": list(overrides),
        "steps": len(steps),
        "measured": own,
        "planned": planned,
        "measured_over_planned": {k: own[k] / v for k, v in planned.items() if k in own and v},
        "planned_memory": estimate["memory"],
        "result": done,
    }


def text(data: dict[str, Any]) -> str:
    """The lines worth reading."""
    from mmedx_fast.meter import render_table

    rows = []
    for key in (
        *("seconds/rollout", "seconds/train", "seconds/sync", "seconds/pack", "seconds/reward"),
        *(
            "gpu_hours_per_1000_samples",
            "tokens_saved",
            "prefix_cache_hit_rate",
            "perf/mfu",
            "perf/peak_memory_bytes",
        ),
        *("sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max"),
    ):
        if key in data["measured"]:
            planned = data["planned"].get(key)
            rows.append(
                [key, f"{data['measured'][key]:.4g}", "" if planned is None else f"{planned:.4g}"]
            )
    return render_table(["mean of a step", "measured", "planned"], rows)


if __name__ == "__main__":
    sys.exit(main())
