"""mmedx doctor tells versions, paths and a config's problems with their remedies."""

import subprocess
import sys

import pytest
import torch

from mmedx_fast import __version__, cli, doctor
from mmedx_fast._paths import find_config
from mmedx_fast.config import load_config
from mmedx_fast.kernels import _dispatch


def lines(found: doctor.Checkup, section: str) -> dict[str, str]:
    (title,) = [t for t in found.sections if t.startswith(section)]
    return dict(found.sections[title])


def test_versions_and_paths_are_those_of_this_machine() -> None:
    found = doctor.examine()
    machine, packages = lines(found, "machine"), lines(found, "packages")
    assert machine["mmedx-fast"].startswith(__version__)
    assert machine["torch"].startswith(torch.__version__)
    assert packages["torch"] == torch.__version__
    assert len(packages) == len(doctor.PACKAGES)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for path in _dispatch.paths(device):
        assert path.implementation in lines(found, "ops")[path.op]
        assert path.reason in lines(found, "ops")[path.op]


def test_the_mode_is_given_as_the_reason(monkeypatch) -> None:
    monkeypatch.setenv(_dispatch.ENV, "torch")
    ops = lines(doctor.examine(), "ops")
    assert set(ops.values()) == {f"torch ({_dispatch.ENV}=torch)"}


def test_a_config_shows_sizes_and_backend() -> None:
    cfg = load_config(find_config("qwen2_5_vl_7b.yaml"))
    found = doctor.examine(cfg)
    config = lines(found, "config qwen2_5_vl_7b")
    assert "V 152064, H 3584, 28 layers" in config["sizes"]
    assert f"{cfg.gba.max_row_tokens} tokens" in config["head"] and "rows" in config["head"]
    assert config["attention"].startswith("varlen")
    assert any("data/mmedexpert" in problem for problem in found.problems)


def test_the_demo_has_no_problem_of_its_own() -> None:
    cfg = load_config(find_config("demo.yaml"))
    assert doctor.examine(cfg).problems == doctor.examine().problems


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (["model.path=nowhere/some-model", "model.offline=true"], ("nowhere", "offline", "folder")),
        (["model.attention=flex"], ("flex", "auto")),
        (["data.test=no/such/folder"], ("data.test", "no/such/folder")),
    ],
)
def test_problems_name_the_field_and_the_remedy(override: list[str], words, monkeypatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # so that a GPU cannot run flex either
    cfg = load_config(find_config("demo.yaml"), override)
    problems = " ".join(doctor.examine(cfg).problems)
    assert all(word in problems for word in words)


def test_missing_packages_are_listed_with_what_they_are_for(monkeypatch) -> None:
    real = doctor.version
    monkeypatch.setattr(
        doctor, "version", lambda *names: None if "vllm" in names[0] else real(*names)
    )
    found = doctor.examine(load_config(find_config("demo.yaml"), ["rollout.engine=vllm"]))
    assert lines(found, "packages")["vllm"].startswith("not installed (rollouts")
    assert any("rollout.engine=transformers" in problem for problem in found.problems)


def test_a_cpu_build_beside_a_gpu_is_a_problem(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "cuda_device_present", lambda: True)
    monkeypatch.setattr(doctor, "torch_cuda_version", lambda: None)
    assert any("CPU build" in p for p in doctor._machine_problems(torch.device("cpu")))
    monkeypatch.setattr(doctor, "torch_cuda_version", lambda: "13.0")
    assert any("driver" in p for p in doctor._machine_problems(torch.device("cpu")))


def test_the_command_prints_all_sections_and_exits_with_0(capsys) -> None:
    assert cli.main(["doctor", "demo.yaml", "model.attention=flex"]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("machine\n", "packages\n", "config demo", "problems\n"))
    assert cli.main(["doctor", "no-such.yaml"]) == 2


def test_nothing_heavy_is_imported() -> None:
    heavy = ("vllm", "deepspeed", "transformers", "peft", "liger_kernel", "trl")
    code = (
        "import sys; from mmedx_fast.cli import main; assert main(['doctor']) == 0; "
        f"print([m for m in {heavy!r} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip().endswith("[]")
