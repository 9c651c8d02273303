"""What no kernel here can beat: the head's GEMMs at a list of row counts, a copy, and a launch.

    python -m bench.floors --out DIR

For M rows, V words and width H: ``logits`` is [M, H] x [H, V] in bfloat16, ``logits_f32`` the same with
float32 results (``torch.mm(out_dtype=...)``), ``d_hidden`` is [M, V] x [V, H]. Each is timed in turn with
all others on a cold L2 cache; TFLOP/s are those of its median. ``launch`` is what one small kernel costs the
host when nothing waits, and the device from a CUDA graph. Without a GPU the sizes are small and the times
say nothing about one.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mmedx_fast._env import prepare_environment

ROOT = Path(__file__).resolve().parents[1]
ROWS = (1152, 2304, 3584, 4096, 7168)
V, H = 152064, 3584
SMALL_ROWS, SMALL_V, SMALL_H = (32, 64), 1000, 48
COPY_BYTES, SMALL_COPY_BYTES = 4 << 30, 1 << 22


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: prints the table and writes ``floors-<device>-<date>.json``."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    made = argparse.ArgumentParser(
        prog="python -m bench.floors",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--out", type=Path, default=ROOT / "bench/results")
    made.add_argument("--rounds", type=int, default=20)
    made.add_argument("--commit", help="recorded where the sources are no git checkout")
    options = made.parse_args(arguments)
    prepare_environment(offline=True)
    import torch

    from bench import results

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    env = results.environment(
        shlex.join(["python", "-m", "bench.floors", *arguments]), device, options.commit
    )
    data = env | {"op": "floors", "rows": measure(device, options.rounds)}
    path = options.out / f"{results.stem('floors', env['device'], env['date'])}.json"
    results.write_json(path, data)
    if device.type == "cpu":
        print("No GPU in use: small sizes. These times say nothing about a GPU.")
    print("\n".join(lines(data["rows"])))
    print(path)
    return 0


def lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One a measurement, for the terminal."""
    found = []
    for row in rows:
        rate = "".join(
            f"  {row[key]:>8.4g} {unit}"
            for key, unit in (("tflops", "TFLOP/s"), ("gb_s", "GB/s"))
            if row.get(key) is not None
        )
        found.append(
            f"{row['name']:<14} M={row.get('M', '')!s:<6} {row['median_ms']:>10.4g} ms{rate}"
        )
    return found


def measure(device: Any, rounds: int) -> list[dict[str, Any]]:
    """Every floor, timed in turn; milliseconds, TFLOP/s or GB/s (read plus written)."""
    from bench import timing

    calls, facts = _calls(device)
    for call in calls.values():
        timing.warm_up(call, device)
    times = timing.interleave(calls, dict.fromkeys(calls, rounds), timing.Clock(device))
    rows = []
    for key, t in times.items():
        fact = facts[key]
        rows.append(
            {k: v for k, v in fact.items() if k not in ("flops", "bytes")}
            | {
                "median_ms": t.median,
                "p20_ms": t.p20,
                "p80_ms": t.p80,
                "tflops": fact["flops"] / t.median / 1e9 if fact.get("flops") else None,
                "gb_s": fact["bytes"] / t.median / 1e6 if fact.get("bytes") else None,
            }
        )
    return rows + _launch(device)


def _calls(device: Any) -> tuple[dict[str, Callable[[], Any]], dict[str, dict[str, Any]]]:
    """The calls by a key, and what each of them is."""
    import torch

    cuda = device.type == "cuda"
    many, vocab, width = (ROWS, V, H) if cuda else (SMALL_ROWS, SMALL_V, SMALL_H)
    dtype = torch.bfloat16 if cuda else torch.float32
    weight = torch.randn(vocab, width, device=device).to(dtype)
    calls: dict[str, Callable[[], Any]] = {}
    facts: dict[str, dict[str, Any]] = {}

    def add(name: str, m: int, call: Callable[[], Any]) -> None:
        calls[f"{name} {m}"] = call
        facts[f"{name} {m}"] = {
            "name": name, "M": m, "V": vocab, "H": width, "flops": 2.0 * m * vocab * width,
        }  # fmt: skip

    # One set of operands for the largest count: the others are its first rows.
    hidden = torch.randn(max(many), width, device=device).to(dtype)
    logits = torch.empty(max(many), vocab, device=device, dtype=dtype)
    slope = torch.randn(max(many), vocab, device=device).to(dtype)
    back = torch.empty_like(hidden)
    for m in many:
        add("logits", m, partial(torch.mm, hidden[:m], weight.t(), out=logits[:m]))
        add("d_hidden", m, partial(torch.mm, slope[:m], weight, out=back[:m]))
        if cuda:
            add("logits_f32", m, partial(torch.mm, hidden[:m], weight.t(), out_dtype=torch.float32))
    size = COPY_BYTES if cuda else SMALL_COPY_BYTES
    source = torch.zeros(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    calls["copy"] = lambda: target.copy_(source)
    facts["copy"] = {"name": "copy", "bytes": 2.0 * size}
    return calls, facts


def _launch(device: Any, count: int = 2000) -> list[dict[str, Any]]:
    """Milliseconds of one small kernel: issued from the host one by one, and within a CUDA graph."""
    import torch

    x = torch.zeros(64, device=device)

    def each(run: Callable[[], Any], per: int) -> float:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start) / per

    def eager() -> None:
        for _ in range(count):
            x.add_(1)

    rows = [{"name": "launch", "median_ms": each(eager, count)}]
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        eager()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            eager()
        rows.append({"name": "launch in graph", "median_ms": each(graph.replay, count)})
    return rows


if __name__ == "__main__":
    sys.exit(main())
