"""Targets name ops, shapes and providers that exist, and are judged from what was measured."""

import json

import pytest

from bench import registry, table, targets
from bench.targets import TARGETS, Target, faster, judge, to_floor


def row(op: registry.Op, sizes: dict[str, int], ours: float = 2.0) -> dict:
    """A shape's row in which every provider was timed at 8 ms, the floor at 1 and ours at ``ours``."""
    found = []
    for p in op.providers:
        ms = {registry.OURS: ours, registry.FLOOR: 1.0}.get(p.kind, 8.0)
        found.append(
            {
                "name": p.name,
                "median_ms": ms,
                "ratio_to_floor": ms,
                "peak_bytes": int(ms * 2**34),
                "errors": dict.fromkeys(op.bounds, ms * 1e-5),
            }
        )
    return {"sizes": sizes, "failed": "", "providers": found}


def documents(ours: float = 2.0) -> list[dict]:
    return [
        {
            "op": op.name,
            "date": "2026-01-01",
            "rows": [row(op, dict(s.sizes), ours) for s in op.shapes["qwen2_5_vl_7b"]],
        }
        for op in registry.load().values()
    ]


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.id)
def test_every_target_can_be_read_off_a_full_run(target: Target) -> None:
    value, verdict = judge(target, documents())
    assert value is not None and verdict in ("stretch", "met", "missed")


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.id)
def test_a_target_is_missed_by_something_slow_and_not_measured_without_a_run(
    target: Target,
) -> None:
    value, verdict = judge(target, documents(ours=1e6))
    assert verdict == "missed", (value, verdict)
    assert judge(target, []) == (None, "not measured")


def test_ratios_and_the_newest_run() -> None:
    op = registry.load()["policy_loss"]
    sizes = {"N": 8192, "H": 3584, "V": 152064, "T": 512}
    target = Target("x", "", "policy_loss", {"N": 8192}, faster("TRL chunked"), 4)
    old = {"op": op.name, "date": "2026-01-01", "rows": [row(op, sizes, ours=4.0)]}
    new = {"op": op.name, "date": "2026-02-01", "rows": [row(op, sizes, ours=1.0)]}
    assert judge(target, [old]) == (2.0, "missed")
    assert judge(target, [old, new]) == judge(target, [new, old]) == (8.0, "met")


def test_a_row_that_failed_or_lacks_a_side_is_no_measurement() -> None:
    op = registry.load()["policy_loss"]
    one = row(op, {"N": 8192}) | {"failed": "wrong: loss is off"}
    target = Target("x", "", "policy_loss", {"N": 8192}, to_floor(), 1.1, at_most=True)
    value, why = judge(target, [{"op": op.name, "rows": [one]}])
    assert value is None and "wrong: loss is off" in why
    other = row(op, {"N": 8192})
    other["providers"] = [p for p in other["providers"] if p["name"] != "TRL chunked"]
    target = Target("x", "", "policy_loss", {"N": 8192}, faster("TRL chunked"), 1.1)
    assert judge(target, [{"op": op.name, "rows": [other]}])[0] is None


def test_the_command_prints_all_and_says_what_was_missed(tmp_path, capsys) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(documents(ours=1e6)[0]))
    assert targets.main([str(path)]) == 1
    printed = capsys.readouterr().out
    assert all(f"| {t.id} |" in printed for t in TARGETS)
    assert "not measured" in printed and "missed" in printed
    path.write_text("[]")
    assert targets.main([str(path)]) == 2
    assert str(path) in capsys.readouterr().err


def test_floors_are_measured_in_one_run(tmp_path, capsys) -> None:
    from bench import floors

    assert floors.main(["--out", str(tmp_path), "--rounds", "2"]) == 0
    (path,) = tmp_path.glob("floors-*.json")
    data = json.loads(path.read_text())
    names = {r["name"] for r in data["rows"]}
    assert names >= {"logits", "d_hidden", "copy", "launch"}
    for r in data["rows"]:
        assert r["median_ms"] > 0
    gemm = next(r for r in data["rows"] if r["name"] == "logits")
    assert gemm["tflops"] == pytest.approx(
        2e-9 * gemm["M"] * gemm["V"] * gemm["H"] / gemm["median_ms"]
    )
    assert "say nothing about a GPU" in capsys.readouterr().out
    shown = table.tables([data])
    assert f"| M={gemm['M']} |" in shown and "| d_hidden |" in shown and "launch" in shown


def test_the_table_shows_whole_steps_beside_the_plan() -> None:
    env = {"device": {"name": "X"}, "versions": {"torch": "2"}, "commit": "c", "date": "2026-01-01",
           "command": "run me"}  # fmt: skip
    data = env | {
        "op": "end_to_end",
        "model": "m",
        "steps": 2,
        "measured": {"seconds/train": 3.0, "seconds/pack": 1.0, "perf/mfu": 0.4},
        "planned": {"seconds/train": 2.0},
        "measured_over_planned": {"seconds/train": 1.5},
    }
    shown = table.tables([data])
    assert "| seconds/train | 3 | 2 | 1.5 |" in shown and "| perf/mfu | 0.4 |  |  |" in shown
    assert "seconds/pack" not in shown and "    run me" in shown
