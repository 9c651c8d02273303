"""The run folder: one owner, all-or-nothing writes, stages that know whether they are done."""

import json
import math
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from mmedx_fast import atomic
from mmedx_fast.config import Config
from mmedx_fast.run_folder import (
    DiskFullError,
    RunBusyError,
    RunFolder,
    RunFolderError,
    write_bytes,
    write_folder,
    write_json,
)


def _cfg(folder, **changes):
    return Config.model_validate({"run_dir": str(folder), **changes})


def _names(folder):
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*"))


def _full_disk(monkeypatch):
    """Files with a temporary name are written to /dev/full, where the kernel says ENOSPC."""
    real = os.open

    def to_full(path, flags, mode=0o777, **kw):
        if flags & os.O_CREAT and atomic.TEMP in str(path):
            real_fd = real(path, flags, mode, **kw)
            os.close(real_fd)
            return real("/dev/full", os.O_WRONLY)
        return real(path, flags, mode, **kw)

    monkeypatch.setattr(atomic.os, "open", to_full)


def _child(folder, code):
    source = (
        "import sys, time\n"
        "from mmedx_fast.config import Config\n"
        "from mmedx_fast.run_folder import *\n"
        f"run = RunFolder.open(Config(run_dir={str(folder)!r}))\n" + code
    )
    return subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True)


def test_second_process_is_told_who_has_the_folder_and_what_to_do(tmp_path):
    child = _child(tmp_path / "r", "print('open', flush=True); time.sleep(60)")
    try:
        assert child.stdout.readline() == "open\n"
        with pytest.raises(RunBusyError) as error:
            RunFolder.open(_cfg(tmp_path / "r"))
        message = str(error.value)
        assert (
            str(tmp_path / "r") in message and str(child.pid) in message and "run_dir=" in message
        )
        with RunFolder.open(_cfg(tmp_path / "r"), exclusive=False) as reader:
            assert not reader.stage("gba", "f").done()
        assert not (tmp_path / "r" / "gba").exists()
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    with RunFolder.open(_cfg(tmp_path / "r")):  # the lock of a killed process is no obstacle
        with pytest.raises(RunBusyError, match=f"process {os.getpid()} "):
            RunFolder.open(_cfg(tmp_path / "r"))
    RunFolder.open(_cfg(tmp_path / "r")).close()


@pytest.mark.parametrize("end", ["closed", "killed"])
def test_forked_child_does_not_keep_the_lock(tmp_path, end):
    run = RunFolder.open(_cfg(tmp_path))
    go, ready = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(go[1])
        os.write(ready[1], b"x")
        os.read(go[0], 1)  # alive until the parent has tried
        os._exit(0)
    try:
        os.read(ready[0], 1)
        with pytest.raises(
            RunBusyError
        ):  # the child's copy going away does not unlock the parent's
            RunFolder.open(_cfg(tmp_path))
        if end == "closed":
            run.close()
        else:
            os.close(run._lock)  # what the kernel does for a killed process
        RunFolder.open(_cfg(tmp_path)).close()
    finally:
        run._lock = None
        os.write(go[1], b"x")
        os.waitpid(pid, 0)
        for fd in (*go, *ready):
            os.close(fd)


def test_killed_while_writing_leaves_the_old_state_and_no_leftovers(tmp_path):
    code = (
        "write_text(run.path / 'a.txt', 'old')\n"
        "with write_folder(run.path / 'ck') as f: write_text(f / 'x', 'old')\n"
        "with write_folder(run.path / 'ck') as f:\n"
        "    write_text(f / 'x', 'new')\n"
        "    print('filling', flush=True); time.sleep(60)\n"
    )
    child = _child(tmp_path, code)
    assert child.stdout.readline() == "filling\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert any(atomic.TEMP in name for name in _names(tmp_path))
    with RunFolder.open(_cfg(tmp_path)):
        assert _names(tmp_path) == [".lock", "a.txt", "ck", "ck/x", "config.yaml"]
        assert (tmp_path / "ck" / "x").read_text() == "old"


@pytest.mark.parametrize("when", [0, 1, 2], ids=["before", "between", "after"])
def test_folder_swap_interrupted_at_any_rename_is_repaired(tmp_path, monkeypatch, when):
    with write_folder(tmp_path / "ck") as folder:
        (folder / "x").write_text("old")
    calls = []
    rename = os.rename

    def stop(a, b):
        if len(calls) == when:
            os.kill(os.getpid(), signal.SIGKILL)
        calls.append(a)
        rename(a, b)

    pid = os.fork()
    if pid == 0:
        try:
            monkeypatch.setattr(atomic.os, "rename", stop)
            monkeypatch.setattr(atomic.shutil, "rmtree", lambda *a, **k: stop(0, 0))
            with write_folder(tmp_path / "ck") as folder:
                (folder / "x").write_text("new")
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    RunFolder.open(_cfg(tmp_path)).close()
    assert (tmp_path / "ck" / "x").read_text() == ("new" if when == 2 else "old")
    assert _names(tmp_path) == [".lock", "ck", "ck/x", "config.yaml"]


def test_full_disk_names_file_and_bytes_and_keeps_the_old_state(tmp_path, monkeypatch):
    write_bytes(tmp_path / "a", b"good")
    with monkeypatch.context() as patch:
        _full_disk(patch)
        with pytest.raises(DiskFullError) as error:
            write_bytes(tmp_path / "a", b"x" * 12345)
    message = str(error.value)
    assert str(tmp_path / "a") in message and "12,345 bytes" in message and "intact" in message
    assert _names(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"good"


@pytest.mark.parametrize(
    "failure",
    [
        OSError(122, "Disk quota exceeded"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
    ids=["quota", "foreign"],
)
def test_full_disk_inside_a_folder_write(tmp_path, failure):
    with write_folder(tmp_path / "ck") as folder:
        (folder / "x").write_text("old")
    with pytest.raises(DiskFullError, match="777 bytes"):
        with write_folder(tmp_path / "ck", 777) as folder:
            (folder / "x").write_text("new")
            raise failure
    assert _names(tmp_path) == ["ck", "ck/x"] and (tmp_path / "ck" / "x").read_text() == "old"


def test_other_errors_pass_unchanged_and_leave_nothing(tmp_path):
    with pytest.raises(KeyError), write_folder(tmp_path / "ck") as folder:
        (folder / "x").write_text("new")
        raise KeyError("mine")
    with pytest.raises(TypeError, match="a.json"):
        write_json(tmp_path / "a.json", {"x": object()})
    assert _names(tmp_path) == []


def test_json_is_strict_and_takes_numpy_and_paths(tmp_path):
    value = {
        "nan": math.nan,
        "inf": [math.inf],
        "n": np.float32(0.5),
        "p": tmp_path,
        3: np.arange(2),
    }
    write_json(tmp_path / "a.json", value)

    def refuse(name):
        raise AssertionError(name)

    back = json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)
    assert back == {"nan": None, "inf": [None], "n": 0.5, "p": str(tmp_path), "3": [0, 1]}


def test_config_is_written_resolved_and_the_old_one_kept(tmp_path):
    from mmedx_fast.config import load_config

    RunFolder.open(_cfg(tmp_path)).close()
    assert load_config(tmp_path / "config.yaml") == _cfg(tmp_path)
    with RunFolder.open(_cfg(tmp_path)) as run:
        assert run.changed == {}
    with RunFolder.open(_cfg(tmp_path, gba={"steps": 7})) as run:
        assert run.changed == {"gba.steps": (100, 7)}
    assert load_config(tmp_path / "config.yaml").gba.steps == 7
    assert load_config(tmp_path / "config.old-1.yaml").gba.steps == 100


def test_stage_is_done_only_under_its_fingerprint_and_nothing_is_lost(tmp_path):
    with RunFolder.open(_cfg(tmp_path)) as run:
        stage = run.stage("dsa/pediatrics", "aaa")
        assert not stage.done()
        with pytest.raises(RunFolderError, match="dsa/pediatrics"):
            stage.result()
        (stage.dir / "work").write_text("1")
        stage.finish({"loss": 0.5})
    with RunFolder.open(_cfg(tmp_path, gba={"steps": 7})) as run, warnings.catch_warnings():
        warnings.simplefilter("error")
        same = run.stage("dsa/pediatrics", "aaa")
        assert same.done() and same.result() == {"loss": 0.5} and (same.dir / "work").exists()
        assert run.stage("dsa", "zzz").dir == tmp_path / "dsa"  # sub-stages do not disturb it
        warnings.simplefilter("always")
        for number in (1, 2):
            with pytest.warns(UserWarning, match=rf"gba.steps: 100 -> 7.*old-{number}"):
                other = run.stage("dsa/pediatrics", f"b{number}")
            assert not other.done() and _names(other.dir) == ["stage.json"]
    assert (tmp_path / "dsa" / "pediatrics.old-1" / "work").read_text() == "1"
    assert RunFolder.open(_cfg(tmp_path), exclusive=False).peek("dsa/pediatrics.old-1") == {
        "loss": 0.5
    }


def test_unfinished_stage_goes_on_under_the_same_fingerprint(tmp_path):
    with RunFolder.open(_cfg(tmp_path)) as run:
        (run.stage("gba", "f").dir / "partial").write_text("1")
    with RunFolder.open(_cfg(tmp_path)) as run, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (run.stage("gba", "f").dir / "partial").exists()


@pytest.mark.parametrize("damage", ["stage.json", "stray"])
def test_stage_folder_of_unknown_origin_is_kept_aside(tmp_path, damage):
    with RunFolder.open(_cfg(tmp_path)) as run:
        stage = run.stage("gba", "f")
        if damage == "stray":
            (stage.dir / "stage.json").unlink()
        (stage.dir / damage).write_text("{")
        with pytest.warns(UserWarning):
            assert _names(run.stage("gba", "f").dir) == ["stage.json"]
        assert (tmp_path / "gba.old-1" / damage).exists()


def test_bad_folder_and_bad_stage_name(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="file"):
        RunFolder.open(_cfg(tmp_path / "file"))
    with RunFolder.open(_cfg(tmp_path / "r")) as run:
        for name in ("", "../x", "/x"):
            with pytest.raises(ValueError, match="relative"):
                run.stage(name, "f")
