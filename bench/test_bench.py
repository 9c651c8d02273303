"""The registry under pytest-benchmark: ``pytest bench --benchmark-only``.

Every op at its smallest shape (the first of the 7B's on a GPU), every provider that can run here.
Correctness comes first: a provider that is off fails its test and is not timed. `make test` does not
collect this folder.
"""

from __future__ import annotations

import pytest

from mmedx_fast._env import prepare_environment

prepare_environment(offline=True)

import torch  # noqa: E402

from bench import registry  # noqa: E402
from bench.registry import FLOOR, Case, Op, Provider  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES, DTYPE = (
    ("qwen2_5_vl_7b", torch.bfloat16) if DEVICE.type == "cuda" else ("tiny", torch.float32)
)
PAIRS = [(op, provider) for op in registry.load().values() for provider in op.ordered()]


@pytest.mark.parametrize(("op", "provider"), PAIRS, ids=[f"{o.name}-{p.name}" for o, p in PAIRS])
def test_speed(benchmark, op: Op, provider: Provider) -> None:
    shape = op.shapes[SHAPES][0]
    reason = provider.unavailable(DEVICE, shape.sizes)
    if reason is not None:
        pytest.skip(reason)
    inputs = op.inputs(Case(shape.sizes, DEVICE, DTYPE))
    call = provider.make(inputs)
    if provider.kind != FLOOR:
        _, wrong = registry.compare(call(), op.reference(inputs), op.bounds, provider.limits)
        assert not wrong

    def waited() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{op.name} {shape.name}"
    benchmark.extra_info["flops"] = op.flops(shape.sizes)
    benchmark.pedantic(waited, rounds=5, warmup_rounds=1)
