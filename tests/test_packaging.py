"""Wheel, sdist and editable install hold everything; the recipes are found from anywhere."""

import email
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mmedx_fast import __version__
from mmedx_fast._paths import CONFIG_DIR, find_config, shipped_configs

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (
    *("mmedx_fast", "kernels", "configs", "bench", "tests", "requirements"),
    *("pyproject.toml", "setup.py", "MANIFEST.in", "Makefile"),
    *("LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md"),
)
# From another folder, with nothing of the checkout on the path.
PROBE = """
import sys, mmedx_fast, mmedx_fast.ops, mmedx_fast.kernels.advantage
from importlib.metadata import version
from mmedx_fast._paths import find_config
assert version("mmedx-fast") == mmedx_fast.__version__
print(mmedx_fast.__file__)
print(mmedx_fast.kernels.advantage.__file__)
print(find_config("configs/demo.yaml"))
print(find_config("configs/deepspeed/zero2.json"))
"""


@dataclass(frozen=True)
class Built:
    source: Path
    wheel: Path
    sdist: Path


def package_files() -> set[str]:
    """Every file of the package, as `mmedx_fast/...`, through the links."""
    found = set()
    for folder, folders, files in os.walk(ROOT / "mmedx_fast", followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        found |= {(Path(folder) / name).relative_to(ROOT).as_posix() for name in files}
    return found


def run(*command: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """An sdist of a copy of the tree, and the wheel made from that sdist alone."""
    source = tmp_path_factory.mktemp("source") / "mmedx-fast"
    source.mkdir()
    for path in (ROOT / name for name in SOURCES):
        if path.is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, source / path.name, symlinks=True, ignore=ignore)
        elif path.exists():  # bench/ is not there in a checkout without benchmarks
            shutil.copy2(path, source / path.name)
    run(sys.executable, "-m", "build", "--no-isolation", source, cwd=source)
    (wheel,) = (source / "dist").glob("*.whl")
    (sdist,) = (source / "dist").glob("*.tar.gz")
    return Built(source, wheel, sdist)


def make_venv(folder: Path) -> Path:
    """A new environment that sees this one's packages, but not its editable mmedx-fast."""
    venv.create(folder, with_pip=False, symlinks=True)
    site_packages = next((folder / "lib").glob("python3*")) / "site-packages"
    # A folder named in a .pth file is searched for modules, its own .pth files are not read.
    (site_packages / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


def test_wheel_and_sdist_hold_every_file_of_the_package(built: Built):
    expected = package_files()
    assert "mmedx_fast/py.typed" in expected and "mmedx_fast/kernels/advantage.py" in expected
    with zipfile.ZipFile(built.wheel) as wheel:
        in_wheel = set(wheel.namelist())
    assert expected - in_wheel == set()
    with tarfile.open(built.sdist) as sdist:
        in_sdist = {name.partition("/")[2] for name in sdist.getnames()}
    assert expected - in_sdist == set()
    also = {"LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "tests/conftest.py", "setup.py"}
    assert also - in_sdist == set()


def test_wheel_installs_one_top_level_name(built: Built):
    with zipfile.ZipFile(built.wheel) as wheel:
        tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert tops == {"mmedx_fast", f"mmedx_fast-{__version__}.dist-info"}


def test_core_needs_torch_triton_and_numpy_only(built: Built):
    with zipfile.ZipFile(built.wheel) as wheel:
        text = wheel.read(f"mmedx_fast-{__version__}.dist-info/METADATA").decode()
    stated = email.message_from_string(text)
    core = [r for r in stated.get_all("Requires-Dist", []) if "extra ==" not in r]
    assert {r.split(">")[0].split(";")[0].strip() for r in core} == {"numpy", "torch", "triton"}
    extras = {"train", "cpu", "cuda", "flash", "trl", "verl", "dev"}
    assert set(stated.get_all("Provides-Extra", [])) == extras
    assert stated["License-Expression"] == "Apache-2.0"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["wheel", "editable"])
def test_installed_package_works_from_another_folder(built: Built, how: str, tmp_path: Path):
    python = make_venv(tmp_path / "venv")
    what = [built.wheel] if how == "wheel" else ["-e", built.source]
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet")
    run(python, "-m", "pip", "install", *options, *what, cwd=tmp_path)
    home = tmp_path / "venv" if how == "wheel" else built.source
    printed = run(python, "-c", PROBE, cwd=tmp_path).splitlines()
    assert len(printed) == 4
    for line in printed:
        assert Path(line).resolve().is_relative_to(home.resolve()), line
    helped = run(python.parent / "mmedx", "--help", cwd=tmp_path)
    assert "gba" in helped and "merge" in helped


def test_find_config_prefers_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    shipped = find_config("configs/demo.yaml")
    assert shipped == (CONFIG_DIR / "demo.yaml").resolve() == find_config("demo.yaml")
    (tmp_path / "configs").mkdir()
    own = tmp_path / "configs" / "demo.yaml"
    own.write_text("seed: 1\n")
    assert find_config("configs/demo.yaml") == own
    assert find_config(own) == own
    assert find_config("demo.yaml") == shipped


@pytest.mark.parametrize("name", ["no.yaml", "configs/no.yaml", "../_paths.py", "configs"])
def test_find_config_names_what_there_is(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"demo\.yaml") as caught:
        find_config(name)
    assert repr(name) in str(caught.value)
    assert "demo.yaml" in shipped_configs()


def requirements_of(*names: str) -> set[str]:
    """The distributions that pip would install for these, themselves included."""
    found: set[str] = set()
    waiting = [canonicalize_name(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        for line in metadata.requires(name) or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(canonicalize_name(requirement.name))
    return found


def bare_venv(folder: Path, distributions: set[str]) -> Path:
    """A new environment that holds these distributions, as links, and nothing else of this one."""
    venv.create(folder, with_pip=False, symlinks=True)
    site_packages = next((folder / "lib").glob("python3*")) / "site-packages"
    for name in distributions:
        files = metadata.files(name)
        assert files is not None, name
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            link = site_packages / top
            if not link.exists():
                link.symlink_to(Path(sysconfig.get_path("purelib")) / top)
    return folder / "bin" / "python"


ALONE = """
import runpy, sys
from importlib.util import find_spec
unwanted = ("transformers", "vllm", "deepspeed", "peft", "trl", "datasets", "pydantic", "yaml")
assert not [name for name in unwanted if find_spec(name)], "the environment is not bare"
for example in sys.argv[1:]:
    runpy.run_path(example, run_name="__main__")
from mmedx_fast import ops
print(ops.__file__)
"""


@pytest.mark.slow
def test_the_ops_work_where_only_their_requirements_are_installed(built: Built, tmp_path: Path):
    needed = requirements_of("numpy", "torch", "triton")
    python = bare_venv(tmp_path / "venv", needed)
    with zipfile.ZipFile(built.wheel) as wheel:
        wheel.extractall(next((tmp_path / "venv" / "lib").glob("python3*")) / "site-packages")
    examples = [ROOT / "examples" / f"{name}.py" for name in ("op_alone", "grpo_loop")]
    printed = run(python, "-c", ALONE, *examples, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert Path(printed.splitlines()[-1]).is_relative_to(tmp_path / "venv")
    report = run(python.parent / "python", "-m", "mmedx_fast.cli", "doctor", cwd=tmp_path)
    assert "pip install 'mmedx-fast[train]'" in report
