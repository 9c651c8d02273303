"""metrics.jsonl and TensorBoard events: a resumed run ends with the file of an unbroken one."""

import json
import math
import time

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from mmedx_fast.metrics import MetricsLogger, read_metrics, without_times


def _events(folder):
    loaded = EventAccumulator(str(folder), purge_orphaned_data=True)
    loaded.Reload()
    return {
        tag: [(e.step, e.value) for e in loaded.Scalars(tag)] for tag in loaded.Tags()["scalars"]
    }


def _run(folder, steps, resume_step, offset=0.0):
    with MetricsLogger(folder, folder / "tb", resume_step=resume_step) as logger:
        for step in steps:
            values = {"loss": 1 / step, "seconds": {"rollout": offset + step}, "note": "x"}
            logger.log(step, values)


def test_values_of_every_kind(tmp_path):
    with MetricsLogger(tmp_path, None, resume_step=None) as logger:
        logger.log(
            1,
            {
                "a": 1,
                "b": {"c": np.float32(0.5), "d": {"e": torch.tensor(2.0)}},
                "nan": math.nan,
                "inf": np.inf,
                "none": None,
                "yes": True,
                "text": "späť",
            },
        )
    row = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert row.pop("time") > 1e9
    assert all(math.isnan(row.pop(key)) for key in ("nan", "inf", "none"))
    assert row == {"step": 1, "a": 1, "b/c": 0.5, "b/d/e": 2.0, "yes": 1, "text": "späť"}
    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("bad", [[1, 2], torch.ones(2), object()], ids=["list", "tensor", "object"])
def test_value_that_is_no_number_is_named(tmp_path, bad):
    with MetricsLogger(tmp_path, None, resume_step=None) as logger:
        with pytest.raises(ValueError, match="rewards/x"):
            logger.log(1, {"rewards": {"x": bad}})
        with pytest.raises(ValueError, match="step"):
            logger.log(1, {"step": 2})
    assert read_metrics(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("later", [0, 100, -100], ids=["same second", "later", "clock set back"])
def test_killed_and_resumed_equals_unbroken(tmp_path, monkeypatch, later):
    now = [1_800_000_000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    # Event files are named by second, host, process and a counter, and read in that order.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(8))
    _run(tmp_path / "unbroken", range(1, 9), None)
    # Checkpoint at 4, killed in the middle of writing step 7, resumed from the checkpoint.
    _run(tmp_path / "broken", range(1, 7), None)
    path = tmp_path / "broken" / "metrics.jsonl"
    with open(path, "a") as file:
        file.write('{"step": 7, "lo')
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5, 6]
    now[0] += later
    _run(tmp_path / "broken", range(5, 9), 4, offset=100.0)
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("unbroken", "broken")]
    assert without_times(rows[0]) == without_times(rows[1]) and len(rows[0]) == 8
    assert rows[0] != rows[1]
    events = [_events(tmp_path / name / "tb") for name in ("unbroken", "broken")]
    assert events[0]["loss"] == events[1]["loss"] and len(events[0]["loss"]) == 8
    assert "note" not in events[0]
    times = EventAccumulator(str(tmp_path / "broken" / "tb")).Reload().Scalars("loss")
    assert [e.wall_time for e in times] == [now[0] - later] * 4 + [now[0]] * 4


def test_resume_at_zero_drops_everything_after_it_and_none_everything(tmp_path):
    with MetricsLogger(tmp_path, None, resume_step=None) as logger:
        for step in (0, 1):
            logger.log(step, {"x": step})
    MetricsLogger(tmp_path, None, resume_step=0).close()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0]
    MetricsLogger(tmp_path, None, resume_step=None).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("line", ["{", "[]", '{"loss": 1}', '{"step": "1"}'])
def test_damage_before_the_last_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2"):
        read_metrics(path)
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2"):
        MetricsLogger(tmp_path, None, resume_step=1)


def test_no_file_is_no_rows(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []
