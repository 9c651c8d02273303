"""Progress: quiet when it is over soon, plain lines in a log, a bar on a terminal."""

import io
import os
import pty
import subprocess
import sys
import time

import pytest

from mmedx_fast.progress import duration, progress


def test_nothing_is_shown_for_what_is_over_soon():
    out = io.StringIO()
    with progress(3, "Short", file=out) as bar:
        for _ in range(3):
            bar.update(1)
    assert list(progress(range(4), "Items", file=out)) == [0, 1, 2, 3]
    assert out.getvalue() == ""


def test_plain_lines_have_count_rate_time_left_and_fields():
    out = io.StringIO()
    with progress(10, "GBA", unit="step", file=out, every=0.03, min_seconds=0.0) as bar:
        bar.update(4, loss=0.25, note="x")
        time.sleep(0.1)
        bar.update(6)
    lines = out.getvalue().splitlines()
    assert any("4/10" in line and "left" in line and "step/s" in line for line in lines)
    assert lines[-1].startswith("GBA: 10/10 step") and "done in" in lines[-1]
    assert all("loss 0.25 note x" in line for line in lines[1:])


def test_a_line_comes_even_if_no_unit_is_done_and_resumed_units_do_not_count_as_speed():
    out = io.StringIO()
    with progress(10, "GBA", start=8, file=out, every=0.02, min_seconds=0.0):
        time.sleep(0.06)
    lines = out.getvalue().splitlines()
    assert len(lines) >= 3 and lines[0] == "GBA: 8/10 it"


def test_interrupted_work_is_not_called_done():
    out = io.StringIO()
    with pytest.raises(KeyboardInterrupt), progress(10, "X", file=out, min_seconds=0.0) as bar:
        bar.update(1)
        time.sleep(0.05)
        raise KeyboardInterrupt
    assert "done" not in out.getvalue()


def test_items_of_unknown_number_are_counted():
    with progress((i for i in range(3)), "X") as bar:
        assert list(bar) == [0, 1, 2] and bar.total is None and bar.done == 3
    with pytest.raises(TypeError):
        list(progress(3, "X"))


CODE = """
import time
from mmedx_fast.progress import progress
with progress(2, "Outer", min_seconds=0.05) as outer:
    with progress(5, "Inner", unit="row", min_seconds=0.05) as inner:
        for i in range(5):
            time.sleep(0.08); inner.update(1, loss=0.5)
    outer.update(2)
"""


def test_nested_bars_on_a_terminal():
    master, slave = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", CODE], stderr=slave, env=os.environ | {"TERM": "xterm"}
    )
    os.close(slave)
    text = b""
    try:
        while chunk := os.read(master, 4096):
            text += chunk
    except OSError:  # Linux says EIO when the other end is closed
        pass
    os.close(master)
    assert child.wait() == 0
    shown = text.decode()
    assert "Inner" in shown and "Outer" in shown and "5/5" in shown and "loss 0.5" in shown
    assert "Inner: 5/5 row" in shown and "done in" in shown


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(6.6, "7 s"), (185, "3 min 05 s"), (59.7, "1 min 00 s"), (7830, "2 h 10 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
