"""The folder kernels/ never passes for Hugging Face's `kernels`, and our imports stay light."""

import json
import subprocess
import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Every name that transformers asks for is a class whose instances decorate without effect.
HUB_KERNELS = """
__version__ = "0.17.2"


class _Stub:
    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, decorated):
        return decorated


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (_Stub,), {})
"""

IMPORT_A_MODEL = """
import json, sys
sys.path.extend(sys.argv[1:])
from transformers import Qwen2ForCausalLM
from transformers.utils.import_utils import is_kernels_available
import kernels
print(json.dumps([sys.path[0], kernels.__file__, is_kernels_available()]))
"""


def python(code: str, *arguments: str) -> str:
    """Output of `python -c code` at the root of the project, which is then first on the path."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.fixture
def hub_kernels(tmp_path: Path) -> Path:
    """A folder with a stand-in for Hugging Face's kernels 0.17.2: package and metadata."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(HUB_KERNELS)
    metadata = tmp_path / "kernels-0.17.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.17.2\n")
    (metadata / "RECORD").write_text("kernels/__init__.py,,\n")
    (metadata / "top_level.txt").write_text("kernels\n")
    return tmp_path


def test_files_that_put_the_root_or_our_folder_first_do_not_exist():
    for name in ("kernels/__init__.py", "tests/__init__.py", "conftest.py"):
        assert not (ROOT / name).exists(), f"{name}: see CONTRIBUTING.md, Layout"


def test_kernels_is_a_namespace_reached_through_the_package():
    assert (ROOT / "mmedx_fast" / "kernels").resolve() == (ROOT / "kernels").resolve()
    spec = PathFinder.find_spec("kernels", [str(ROOT)])
    assert spec is not None and spec.loader is None  # any regular package outranks it


def test_a_model_imports_from_the_root_beside_the_hub_package(hub_kernels: Path):
    first, file, available = json.loads(python(IMPORT_A_MODEL, str(hub_kernels)))
    assert first == "", "the root must come first, or this test proves nothing"
    assert Path(file) == hub_kernels / "kernels" / "__init__.py"
    assert available is True


@pytest.mark.skipif(
    bool(getattr(find_spec("kernels"), "origin", None)), reason="the hub's kernels is installed"
)
def test_a_model_imports_from_the_root_without_the_hub_package():
    first, file, available = json.loads(python(IMPORT_A_MODEL))
    assert first == ""
    assert file is None, "our folder, as a namespace"
    assert available is False, "and transformers does not take it for the hub's"


@pytest.mark.parametrize(
    ("modules", "unwanted"),
    [
        (
            "mmedx_fast, mmedx_fast.ops",
            {"transformers", "vllm", "deepspeed", "trl", "peft", "datasets", "pydantic", "yaml"},
        ),
        (
            "mmedx_fast.config, mmedx_fast.cli, mmedx_fast._env, mmedx_fast._paths",
            {"torch", "transformers", "vllm", "deepspeed", "trl", "peft", "datasets", "numpy"},
        ),
    ],
    ids=["ops", "cli"],
)
def test_imports_stay_light(modules: str, unwanted: set[str]):
    code = f"import sys, json, {modules}; print(json.dumps(sorted(set(sys.modules) & {unwanted})))"
    assert json.loads(python(code)) == []
