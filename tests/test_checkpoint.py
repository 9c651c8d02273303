"""Checkpoints: exact, whole or absent, believed only after their checksums."""

import builtins
import errno
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from mmedx_fast.checkpoint import (
    CheckpointError,
    load_latest,
    rng_state,
    save_checkpoint,
    set_rng_state,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


def _tensors():
    gen = torch.Generator().manual_seed(1)
    out = {str(d): (torch.randn(3, 5, generator=gen) * 9).to(d) for d in DTYPES}
    base = torch.arange(12.0)
    return out | {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "special": torch.tensor([float("nan"), float("inf"), -0.0]),
        "view": base[2:5],
        "transposed": base.view(3, 4).t(),
        "whole": base,
        "tied": base,
    }


def test_round_trip_is_exact(tmp_path):
    tensors = _tensors()
    meta = {"order": [3, 1], "nested": {"lr": 1e-5, "name": "ä", "none": None}, "big": 2**70}
    path = save_checkpoint(tmp_path, 10, tensors, meta)
    assert path == tmp_path / "checkpoints" / "step-000010"
    assert sorted(p.name for p in path.iterdir()) == ["meta.json", "state.safetensors"]
    step, back, info = load_latest(tmp_path)
    assert step == 10 and info == meta and back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
        bits = [t.contiguous().view(torch.uint8) if t.dim() else t for t in (tensor, back[name])]
        assert torch.equal(*bits), name


def test_only_the_newest_are_kept_and_a_step_can_be_written_again(tmp_path):
    assert load_latest(tmp_path) is None
    for step in (5, 10, 15, 15):
        save_checkpoint(tmp_path, step, {"x": torch.tensor([step])}, {}, keep=2)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000010", "step-000015"]
    # A checkpoint of a later, abandoned step neither counts nor goes away.
    save_checkpoint(tmp_path, 12, {"x": torch.tensor([12])}, {}, keep=1)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000012", "step-000015"]


def _flip(path):
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(bytes(data))


DAMAGE = {
    "state truncated": ("state.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-7])),
    "state flipped": ("state.safetensors", _flip),
    "state missing": ("state.safetensors", lambda p: p.unlink()),
    "meta truncated": ("meta.json", lambda p: p.write_bytes(p.read_bytes()[:40])),
    "meta edited": (
        "meta.json",
        lambda p: p.write_text(p.read_text().replace('"seed": 3', '"seed": 4')),
    ),
    "meta missing": ("meta.json", lambda p: p.unlink()),
    "meta not an object": ("meta.json", lambda p: p.write_text("[]")),
    "meta binary": ("meta.json", lambda p: p.write_bytes(b"\xff\xfe\x00")),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_checkpoint_is_passed_over_with_a_warning_naming_the_file(tmp_path, kind):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"x": torch.full((8,), float(step))}, {"seed": 3})
    name, damage = DAMAGE[kind]
    damage(tmp_path / "checkpoints" / "step-000002" / name)
    with pytest.warns(UserWarning, match=rf"step-000002/{name}"):
        step, tensors, _ = load_latest(tmp_path)
    assert step == 1 and tensors["x"].eq(1).all()


@pytest.mark.parametrize("kind", DAMAGE)
def test_only_damaged_checkpoints_are_no_reason_to_begin_anew(tmp_path, kind):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"x": torch.full((8,), float(step))}, {"seed": 3})
        name, damage = DAMAGE[kind]
        damage(tmp_path / "checkpoints" / f"step-{step:06d}" / name)
    with pytest.raises(CheckpointError) as caught:
        load_latest(tmp_path)
    message = str(caught.value)
    for step in (1, 2):
        assert f"step-{step:06d}/{name}" in message
    assert f"delete {tmp_path / 'checkpoints'} to begin" in message


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.ESTALE, errno.EIO])
@pytest.mark.parametrize("name", ["meta.json", "state.safetensors"])
def test_what_cannot_be_read_now_is_not_passed_over(tmp_path, monkeypatch, name, number):
    """It may be whole, and the next start would jump to it from a step before."""
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"x": torch.full((8,), float(step))}, {"seed": 3})
    bad = tmp_path / "checkpoints" / "step-000002" / name

    def refusing(real):
        def opened(file, *args, **kwargs):
            if str(file) == str(bad):
                raise OSError(number, os.strerror(number), str(file))
            return real(file, *args, **kwargs)

        return opened

    with monkeypatch.context() as patched:
        patched.setattr(builtins, "open", refusing(open))
        patched.setattr(pathlib.io, "open", refusing(open))
        with pytest.raises(CheckpointError, match=rf"{os.strerror(number)}.*{bad}.*same command"):
            load_latest(tmp_path)
    assert load_latest(tmp_path)[0] == 2


def test_copied_under_another_step_is_not_believed(tmp_path):
    folder = save_checkpoint(tmp_path, 1, {"x": torch.ones(1)}, {})
    shutil.copytree(folder, folder.with_name("step-000009"))
    with pytest.warns(UserWarning, match="step-000009"):
        assert load_latest(tmp_path)[0] == 1


@pytest.mark.parametrize("meta", [{1: 2}, {"a": [{2: 3}]}, {"a": object()}, {"a": torch.ones(1)}])
def test_meta_that_would_not_come_back_is_refused(tmp_path, meta):
    with pytest.raises(ValueError, match="meta"):
        save_checkpoint(tmp_path, 1, {}, meta)
    assert load_latest(tmp_path) is None


@pytest.mark.parametrize(("step", "keep"), [(-1, 2), (1, 0)])
def test_bad_arguments(tmp_path, step, keep):
    with pytest.raises(ValueError, match=f"{step}.*{keep}"):
        save_checkpoint(tmp_path, step, {}, {}, keep=keep)


DISK_FULL = """
import pathlib, subprocess, torch
from mmedx_fast.checkpoint import load_latest, save_checkpoint
from mmedx_fast.run_folder import DiskFullError
where = pathlib.Path({folder!r})
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(where)], check=True)
save_checkpoint(where, 1, {{"x": torch.ones(1000)}}, {{}})
try:
    save_checkpoint(where, 2, {{"x": torch.ones(1_000_000)}}, {{}})
except DiskFullError as error:
    message = str(error)
assert "step-000002" in message and "4,000,0" in message, message
assert load_latest(where)[0] == 1
assert [p.name for p in (where / "checkpoints").iterdir()] == ["step-000001"]
print("survived")
"""


def test_disk_full_on_a_real_small_disk_keeps_the_last_good_checkpoint(tmp_path):
    unshare = ["unshare", "-rm"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"]).returncode:
        pytest.skip("needs user namespaces to mount a small tmpfs")
    code = DISK_FULL.format(folder=str(tmp_path))
    out = subprocess.run([*unshare, sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout == "survived\n", out.stderr


def _draw():
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
        torch.rand(3).tolist(),
        torch.randn(3).tolist(),
    ]


def test_generators_go_on_exactly_after_a_checkpoint(tmp_path):
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    _draw()  # leaves a cached gaussian in python and numpy
    tensors, info = rng_state()
    save_checkpoint(tmp_path, 4, tensors | {"other": torch.ones(1)}, {"rng": info})
    expected = [_draw(), _draw()]
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    _, tensors, meta = load_latest(tmp_path)
    set_rng_state(tensors, meta["rng"])
    assert [_draw(), _draw()] == expected


def test_generator_state_that_is_missing_is_named():
    tensors, info = rng_state()
    with pytest.raises(CheckpointError, match="rng/numpy"):
        set_rng_state({k: v for k, v in tensors.items() if k != "rng/numpy"}, info)
    with pytest.raises(CheckpointError, match="python"):
        set_rng_state(tensors, {"numpy": info["numpy"]})


def test_other_number_of_devices_warns():
    tensors, info = rng_state()
    extra = {f"rng/cuda/{torch.cuda.device_count()}": torch.get_rng_state()}
    with pytest.warns(UserWarning, match="CUDA devices"):
        set_rng_state(tensors | extra, info)


def test_nothing_is_pickled(tmp_path):
    path = save_checkpoint(tmp_path, 1, _tensors() | rng_state()[0], {"rng": rng_state()[1]})
    json.loads((path / "meta.json").read_text())
    size = int.from_bytes((path / "state.safetensors").read_bytes()[:8], "little")
    json.loads((path / "state.safetensors").read_bytes()[8 : 8 + size])
