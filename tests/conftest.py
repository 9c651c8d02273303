"""Environment, seeds and markers for every test."""

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Before any test module imports torch, vLLM or transformers. Children of the tests inherit it.
from mmedx_fast._env import prepare_environment

ENVIRONMENT = prepare_environment(offline=True)
ROOT = Path(__file__).resolve().parents[1]
KERNEL_TESTS = {f"test_{path.stem}" for path in (ROOT / "kernels").glob("*.py")}
SEED = 20260110

# Without a GPU the Triton kernels run in Triton's interpreter, which has to be asked for before Triton
# is imported. Children of the tests do not inherit it.
if ENVIRONMENT.device != "cuda":
    os.environ["TRITON_INTERPRET"] = "1"
    import mmedx_fast.kernels._triton  # noqa: F401

    del os.environ["TRITON_INTERPRET"]

# A spawned process imports its function from `tests.<module>`. Last, not first: CONTRIBUTING.md.
sys.path.append(str(ROOT))

# No deadline: a shared machine is no clock. In CI the same examples every time.
settings.register_profile("project", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("project")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files of long tests first, so that no process ends with one of them alone (Makefile: xdist keeps the order).
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)
    if ENVIRONMENT.device == "cuda":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; this machine has none"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Same random numbers for a test whether it runs alone or after others."""
    random.seed(SEED)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(SEED)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(SEED)


@pytest.fixture(params=["torch", "triton"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test on the plain torch op and on the Triton one (interpreted where there is no GPU)."""
    monkeypatch.setenv("MMEDX_KERNELS", request.param)
    return request.param


@pytest.fixture
def triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test on the Triton ops only."""
    monkeypatch.setenv("MMEDX_KERNELS", "triton")


@pytest.fixture
def nan_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill what torch.empty and its relatives return: NaN, or the largest integer.

    A kernel that leaves an element unwritten then fails its comparison instead of passing by luck.
    """
    import torch

    def poisoned(make):
        def wrapper(*args, **kwargs):
            made = make(*args, **kwargs)
            if made.is_floating_point() or made.is_complex():
                return made.detach().fill_(float("nan")).requires_grad_(made.requires_grad)
            return made.fill_(True if made.dtype == torch.bool else torch.iinfo(made.dtype).max)

        return wrapper

    for owner, names in (
        (torch, ("empty", "empty_like", "empty_strided")),
        (torch.Tensor, ("new_empty", "new_empty_strided")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    yield


@pytest.fixture(autouse=True)
def _kernels_get_nan(request: pytest.FixtureRequest) -> None:
    """The tests named after a file of kernels/ run with `nan_empty`; others may ask for it."""
    if request.node.path.stem in KERNEL_TESTS:
        request.getfixturevalue("nan_empty")


LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module", autouse=True)
def no_launcher_of_another_module() -> Iterator[None]:
    """What one module's engines leave in the environment must not make the next one's processes
    look for a launcher: DeepSpeed needs LOCAL_RANK, and accelerate takes it for a launch of several."""
    before = {name: os.environ.pop(name) for name in LAUNCHER if name in os.environ}
    yield
    for name in LAUNCHER:
        os.environ.pop(name, None)
    os.environ.update(before)
