"""The environment a run sets, and the import hook for torch's companions beside a CPU torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmedx_fast import _env
from mmedx_fast._env import SHIM_DIR, Environment, prepare_environment

cpu_torch = pytest.mark.skipif(
    torch.version.cuda is not None, reason="the hook is for a CPU build of torch"
)
MANAGED = (*_env._ALWAYS, *_env._CPU, *_env._OFFLINE, "OMP_NUM_THREADS", "PYTHONPATH")


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (
        *MANAGED,
        "VLLM_CPU_KVCACHE_SPACE",
        "LOCAL_WORLD_SIZE",
        "LOCAL_SIZE",
        "CUDA_VISIBLE_DEVICES",
    ):
        monkeypatch.setenv(name, "x")  # so that what the code sets is undone after the test
        monkeypatch.delenv(name)
    return monkeypatch


def child(code: str, **environment: str) -> str:
    """Last line printed by a new interpreter, started outside the checkout."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd="/",
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


def test_cpu_settings(clean: pytest.MonkeyPatch):
    clean.setattr(_env, "torch_cuda_version", lambda: None)
    environment = prepare_environment()
    assert environment.device == "cpu"
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    assert os.environ["TORCHDYNAMO_DISABLE"] == "1"
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert os.environ["PYTHONPATH"] == str(SHIM_DIR)
    assert "HF_HUB_OFFLINE" not in os.environ
    assert {name: os.environ[name] for name in environment.changed} == environment.changed


def test_cuda_settings(clean: pytest.MonkeyPatch):
    clean.setattr(_env, "torch_cuda_version", lambda: "13.0")
    clean.setattr(_env, "cuda_device_present", lambda: True)
    assert prepare_environment().device == "cuda"
    for name in ("DS_ACCELERATOR", "TORCHDYNAMO_DISABLE", "PYTHONPATH"):
        assert name not in os.environ


def test_cuda_torch_without_a_device_runs_on_the_cpu(clean: pytest.MonkeyPatch):
    clean.setattr(_env, "torch_cuda_version", lambda: "13.0")
    clean.setenv("CUDA_VISIBLE_DEVICES", "")
    assert prepare_environment().device == "cpu"
    assert "PYTHONPATH" not in os.environ


def test_the_callers_values_stay_and_a_second_call_changes_nothing(clean: pytest.MonkeyPatch):
    clean.setenv("OMP_NUM_THREADS", "7")
    clean.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    first = prepare_environment()
    assert os.environ["OMP_NUM_THREADS"] == "7" and os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert not {"OMP_NUM_THREADS", "VLLM_LOGGING_LEVEL"} & set(first.changed)
    hooks = list(sys.meta_path)
    assert prepare_environment() == Environment(first.device, {})
    assert sys.meta_path == hooks
    assert set(prepare_environment(offline=True).changed) == set(_env._OFFLINE)


def test_kv_cache_space_is_removed_with_a_warning(
    clean: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    clean.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    prepare_environment(kv_cache_in_bytes=False)
    assert os.environ["VLLM_CPU_KVCACHE_SPACE"] == "4" and not caplog.records
    assert prepare_environment().changed == {"VLLM_CPU_KVCACHE_SPACE": None}
    assert "VLLM_CPU_KVCACHE_SPACE" not in os.environ
    assert "VLLM_CPU_KVCACHE_SPACE=4" in caplog.text


def test_threads_are_shared_by_ranks(clean: pytest.MonkeyPatch, tmp_path: Path):
    clean.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    clean.setattr(_env, "_container_cores", lambda: 8)
    assert _env.threads_per_rank() == 8
    clean.setenv("LOCAL_WORLD_SIZE", "3")
    assert _env.threads_per_rank() == 2
    clean.setenv("LOCAL_WORLD_SIZE", "100")
    assert _env.threads_per_rank() == 1


@pytest.mark.parametrize(
    ("text", "cores"),
    [("max 100000\n", sys.maxsize), ("250000 100000\n", 2), ("50000 100000\n", 1)],
)
def test_container_cores(text: str, cores: int, tmp_path: Path):
    (tmp_path / "cpu.max").write_text(text)
    assert _env._container_cores(tmp_path / "cpu.max") == cores
    assert _env._container_cores(tmp_path / "none") == sys.maxsize


def test_torch_build_is_read_without_importing_torch():
    code = "import sys; from mmedx_fast._env import *; v = torch_cuda_version(); import json; "
    code += "print(json.dumps([v, default_device(), 'torch' in sys.modules]))"
    root = str(Path(_env.__file__).parents[1])
    version, device, imported = json.loads(child(code, PYTHONPATH=root))
    assert version == torch.version.cuda
    assert device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert imported is False


@cpu_torch
def test_child_with_pythonpath_alone_imports_the_companions():
    code = """
import sys
assert "torch" not in sys.modules, "the hook must not import torch at start-up"
import torchvision
from torchvision.transforms.v2 import functional as F
import torch, torchaudio
out = F.resize(torch.arange(16.0).view(1, 4, 4), [2, 2])
from torchvision.ops import nms
try:
    nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
except (RuntimeError, NotImplementedError) as error:
    print(tuple(out.shape), "refused" if "torchvision" in str(error) else error)
"""
    assert child(code, PYTHONPATH=str(SHIM_DIR)) == "(1, 2, 2) refused"


@cpu_torch
def test_hook_installed_by_start_up_and_by_the_package_is_one():
    code = """
import sys
from mmedx_fast._env import prepare_environment
prepare_environment()
from mmedx_fast._torchvision_shim import mmedx_torch_companions as companions
import torchvision
assert companions.declare_missing_ops() == [], "they exist by now"
print(sum(type(finder).__name__ == "TorchCompanionFinder" for finder in sys.meta_path))
"""
    root = str(Path(_env.__file__).parents[1])
    assert child(code, PYTHONPATH=f"{SHIM_DIR}{os.pathsep}{root}") == "1"


def test_sitecustomize_goes_on_to_the_one_it_hides(tmp_path: Path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "sitecustomize.py").write_text("import builtins\nbuiltins.hidden_ran = __name__\n")
    twin = tmp_path / "twin"  # a second copy, as from another checkout: no endless chain
    twin.mkdir()
    for name in ("sitecustomize.py", "mmedx_torch_companions.py"):
        (twin / name).write_text((SHIM_DIR / name).read_text())
    code = "import sys, sitecustomize as s; print(hidden_ran, s.__file__, "
    code += "sum(type(f).__name__ == 'TorchCompanionFinder' for f in sys.meta_path))"
    path = os.pathsep.join(map(str, (SHIM_DIR, twin, other)))
    assert child(code, PYTHONPATH=path).split() == [
        "sitecustomize",
        str(other / "sitecustomize.py"),
        "1",
    ]
    assert child("print('started')", PYTHONPATH=f"{SHIM_DIR}{os.pathsep}{twin}") == "started"


@cpu_torch
@pytest.mark.slow
def test_vllm_and_a_vision_model_import(tmp_path: Path):
    pytest.importorskip("vllm", exc_type=ModuleNotFoundError)
    code = """
import subprocess, sys
from mmedx_fast._env import prepare_environment
prepare_environment(offline=True)
from vllm import LLM
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessor
print(LLM.__name__, Qwen2_5_VLForConditionalGeneration.__name__)
"""
    root = str(Path(_env.__file__).parents[1])
    assert child(code, PYTHONPATH=root) == "LLM Qwen2_5_VLForConditionalGeneration"
