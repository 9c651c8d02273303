"""What a run leaves: the machine it ran on, and JSON and Markdown of one op."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench import timing
from bench.memory import watched
from bench.registry import Op, installed

SCHEMA = 1
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    *("mmedx-fast", "torch", "triton", "numpy", "transformers", "peft", "trl"),
    *("liger-kernel", "cut-cross-entropy", "verl", "deepspeed", "nvidia-cutlass-dsl"),
)


def environment(command: str, device: torch.device, of: str | None = None) -> dict[str, Any]:
    """Where and with what: command, date, commit (``of``, if given), device, versions (null = not
    installed), measured peaks."""
    return {
        "schema": SCHEMA,
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": of or commit(),
        "device": describe(device),
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "peaks": peaks(device),
    }


def commit() -> str | None:
    """Abbreviated commit of the checkout, with ``+`` where files differ from it; None outside one."""
    found = _git("rev-parse", "--short=12", "HEAD")
    if found is None:
        return None
    return found + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def describe(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        return {
            "type": "cuda",
            "name": p.name,
            "capability": f"{p.major}.{p.minor}",
            "memory_bytes": p.total_memory,
            "multiprocessors": p.multi_processor_count,
            "l2_bytes": p.L2_cache_size,
        }
    return {"type": "cpu", "name": _cpu_name(), "cores": os.cpu_count()}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def peaks(device: torch.device) -> dict[str, float]:
    """Best measured matmul (TFLOP/s) and copy (GB/s, read plus written): the roofline's two lines."""
    cuda = device.type == "cuda"
    n, size = (8192, 1 << 30) if cuda else (512, 1 << 25)
    dtype = torch.bfloat16 if cuda else torch.float32
    a = torch.randn(n, n, device=device).to(dtype)
    out = torch.empty_like(a)
    source = torch.zeros(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    calls = {"mm": lambda: torch.mm(a, a, out=out), "copy": lambda: target.copy_(source)}
    for call in calls.values():
        timing.warm_up(call, device)
        watched(call, device)  # the profiler's first start takes seconds
    rounds = dict.fromkeys(calls, 10)
    times = timing.interleave(calls, rounds, timing.Clock(device))
    return {
        "tflops": 2.0 * n**3 / times["mm"].p20 / 1e9,
        "gb_s": 2.0 * size / times["copy"].p20 / 1e6,
    }


def stem(op: str, device: dict[str, Any], date: str) -> str:
    """File name without its ending: op, device and date, such as ``lora_merge-nvidia-h200-20261122``."""
    kind = device["name"] if device["type"] == "cuda" else "cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")
    return f"{op}-{slug}-{date[:10].replace('-', '')}"


def document(
    op: Op, chosen: str, env: dict[str, Any], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    return env | {"op": op.name, "title": op.title, "axis": op.axis, "shapes": chosen, "rows": rows}


def write(path: Path, text: str) -> None:
    """Whole or not at all: a run that is killed leaves the last complete file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def write_json(path: Path, data: dict[str, Any]) -> None:
    write(path, json.dumps(data, indent=1, allow_nan=True) + "\n")


def markdown(data: dict[str, Any]) -> str:
    """The op's tables, one a shape."""
    device = data["device"]
    versions = ", ".join(f"{n} {v}" for n, v in data["versions"].items() if v)
    lines = [
        f"# {data['op']}: {data['title']}",
        "",
        f"{device['name']}, {data['date']}, commit {data['commit']}, {versions}.",
        "",
        f"    {data['command']}",
    ]
    for row in data["rows"]:
        lines += ["", f"## {row['shape']}, {row['dtype']}", ""]
        if row["failed"]:
            lines += [f"**Nothing was timed: ours {row['failed']}**", ""]
        lines += _table(row)
    return "\n".join(lines) + "\n"


def _table(row: dict[str, Any]) -> list[str]:
    saving = any(p.get("saved_bytes") is not None for p in row["providers"])
    lines = [
        "| provider | median ms | p20 - p80 | to floor | TFLOP/s | peak MiB |"
        f"{' saved MiB |' if saving else ''} error | note |",
        f"|---|---:|---:|---:|---:|---:|{'---:|' if saving else ''}---|---|",
    ]
    for p in row["providers"]:
        name = f"**{p['name']}** ({row['path']})" if p["name"] == "ours" else p["name"]
        errors = ", ".join(f"{k} {v:.1e}" for k, v in worst(p["errors"]).items())
        if "median_ms" not in p:
            blank = " |" if saving else ""
            lines.append(f"| {name} | {p['status']} | | | | |{blank} {errors} | {p['note']} |")
            continue
        kept = f" {_mib(p['saved_bytes'])} |" if saving else ""
        lines.append(
            f"| {name} | {p['median_ms']:.4g} | {p['p20_ms']:.4g} - {p['p80_ms']:.4g} | "
            f"{number(p['ratio_to_floor'], '.2f')} | {number(p['tflops'], '.3g')} | "
            f"{_mib(p['peak_bytes'])} |{kept} {errors} | {p['note']} |"
        )
    return lines


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:.3g}"


def number(value: float | None, how: str) -> str:
    return "" if value is None else format(value, how)


def worst(errors: dict[str, float]) -> dict[str, float]:
    """The errors by output; of a model's linears only the worst."""
    several = {k: v for k, v in errors.items() if k.partition(".")[0].isdigit()}
    if not several:
        return errors
    name = max(several, key=lambda k: several[k])
    return {k: v for k, v in errors.items() if k not in several} | {name: several[name]}
