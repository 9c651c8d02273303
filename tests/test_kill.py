"""bench/kill.py sees a difference where there is one."""

import json
import math
import time

import pytest

from bench import kill


def write(folder, rewards, text="B"):
    """A finished run, as far as it is compared."""
    for name in ("gba", "eval/rl"):
        (folder / name).mkdir(parents=True)
    rows = [
        {"step": i, "time": time.time(), "seconds/train": time.perf_counter(), "reward": reward}
        for i, reward in enumerate(rewards)
    ]
    (folder / "gba" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    row = {"id": "q", "text": text, "images": [str(folder)]}
    (folder / "eval" / "rl" / "predictions.jsonl").write_text(json.dumps(row) + "\n")
    summary = {"accuracy": {"rl": 0.5}, "seconds": {"gba": 1.0}, "phases": {}, "tokens": {}}
    (folder / "summary.json").write_text(json.dumps(summary))
    return kill.results(folder)


@pytest.mark.parametrize(
    ("rewards", "text", "differs"),
    [
        ([0.1, None], "B", []),
        ([0.1, 0.2], "B", ["gba/metrics.jsonl"]),
        ([0.1], "C", ["eval/rl/predictions.jsonl", "gba/metrics.jsonl"]),
        ([math.nextafter(0.1, 1), None], "B", ["gba/metrics.jsonl"]),
    ],
)
def test_what_differs_is_named_and_clocks_are_not_compared(tmp_path, rewards, text, differs):
    wanted = write(tmp_path / "a", [0.1, None])
    assert math.isnan(wanted["gba/metrics.jsonl"][1]["reward"])
    assert kill.differences(write(tmp_path / "b", rewards, text), wanted) == differs


def test_a_missing_file_differs(tmp_path):
    wanted = write(tmp_path / "a", [0.1])
    (tmp_path / "a" / "gba" / "metrics.jsonl").unlink()
    assert kill.differences(kill.results(tmp_path / "a"), wanted) == ["gba/metrics.jsonl"]


def test_the_place_is_read_off_the_folder(tmp_path):
    assert kill.place(tmp_path) == "before the first file"
    (tmp_path / "config.yaml").touch()
    assert kill.place(tmp_path) == "before the first stage"
    (tmp_path / "gba").mkdir()
    (tmp_path / "gba" / "stage.json").touch()
    (tmp_path / "gba" / "metrics.jsonl").write_text("{}\n{}\n")
    assert kill.place(tmp_path) == "gba, 2 lines of metrics"
    (tmp_path / "gba" / ".mmedx-tmp.12-ab.step-000002").mkdir()
    assert kill.place(tmp_path) == "writing step-000002"
