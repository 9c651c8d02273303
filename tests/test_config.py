"""The configuration: what is accepted, what is refused, and in which words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mmedx_fast.config import Config, ConfigError, deepspeed_settings, load_config
from mmedx_fast.config_deepspeed import KNOWN, OWNED, REFUSED

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configs_load_and_come_back_from_yaml(path: Path, tmp_path: Path) -> None:
    cfg = load_config(path)
    copy = tmp_path / "resolved.yaml"
    copy.write_text(cfg.to_yaml())
    assert load_config(copy) == cfg


def test_overrides_reach_nested_fields_and_keep_their_type() -> None:
    cfg = load_config(None, ["gba.steps=7", "gba.guidelines=[bayesian]", "gba.loss.beta=0.5"])
    assert (cfg.gba.steps, cfg.gba.guidelines, cfg.gba.loss.beta) == (7, ("bayesian",), 0.5)
    assert load_config(None, ["data.validation="]).data.validation is None


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("gba.stepz=3", ["gba.stepz", "unknown key", "'steps'"]),
        ("gba.steps=0", ["gba.steps", "got 0"]),
        ("gba.steps=many", ["gba.steps", "'many'"]),
        ("gba.guidelines=[hunch]", ["gba.guidelines", "hunch", "bayesian"]),
        ("gba.guidelines=[bayesian,bayesian]", ["gba.guidelines", "repeats"]),
        ("gba.start=nowhere", ["gba.start", "experts_mean"]),
        ("caci.density=[0.2,1.5]", ["caci", "density", "1.5"]),
        ("caci.scale=[]", ["caci", "scale"]),
        ("lora.r=300", ["lora.r", "max_lora_rank"]),
        ("gba.loss.loss_type=cispo", ["epsilon_high", "cispo"]),
        ("rollout.temperature=0", ["rollout.temperature"]),
        ("eval.models=[best]", ["eval.models", "best", "merged"]),
        ("name=a/b", ["name"]),
        ("steps", ["section.key=value"]),
        ("name.x=3", ["name", "not a section"]),
        ("gba.steps=[", ["YAML"]),
        ("deepspeed={zero_optimisation: {stage: 3}}", ["unknown key", "'zero_optimization'"]),
        ("deepspeed={sequence_parallel_size: 2}", ["sequence_parallel_size", "not supported"]),
        ("deepspeed={zero_optimization: 2}", ["deepspeed", "stage from 0 to 3", "got 2"]),
        ("deepspeed={bf16: {enabled: true}}", ["deepspeed.bf16", "model.dtype"]),
        (
            "deepspeed={zero_optimization: {stage: 2, reduce_bucket_size: 5e8}}",  # text in YAML
            ["zero_optimization.reduce_bucket_size", "number", "'5e8'"],
        ),
        (
            "deepspeed={zero_optimization: {stage: 2, overlap_comm: auto}}",
            ["zero_optimization.overlap_comm", "true or false", "'auto'"],
        ),
    ],
)
def test_a_bad_value_is_named_with_what_would_do(
    override: str, words: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\n")
    with pytest.raises(ConfigError) as error:
        load_config(path, [override])
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("- a\n- b\n", "mapping"),
        ("a: [", "not valid YAML"),
        (None, "cannot read"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "broken.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=words) as error:
        load_config(path)
    assert "broken.yaml" in str(error.value)


def test_a_deepspeed_file_is_held_to_the_same(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text('{"zero_optimisation": {"stage": 3}}')
    with pytest.raises(ConfigError, match="zero.json: .*did you mean 'zero_optimization'"):
        deepspeed_settings(load_config(None, [f"deepspeed={path}"]))


def test_every_key_that_deepspeed_reads_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed import comm
    from deepspeed.runtime.config import DeepSpeedConfig

    # one key is read only where a process group is there, as on every rank of a run
    monkeypatch.setattr(comm, "get_rank", lambda group=None: 0)
    monkeypatch.setattr(comm, "get_world_size", lambda group=None: 1)

    asked: set[str] = set()

    class Keys(set[str]):
        def __contains__(self, key: object) -> bool:
            asked.add(str(key))
            return super().__contains__(key)

    class Recorder(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            asked.add(key)
            return super().get(key, default)

        def __contains__(self, key: object) -> bool:
            asked.add(str(key))
            return super().__contains__(key)

        def keys(self) -> Any:
            return Keys(super().keys())

    DeepSpeedConfig(Recorder(train_micro_batch_size_per_gpu=1))
    assert len(asked) > 40
    assert "sequence_parallel_size" in asked
    assert asked <= KNOWN | OWNED.keys() | REFUSED.keys()


def test_a_run_that_met_its_machines_limits_goes_on_with_other_ones() -> None:
    one = load_config(None, [])
    how = ["gba.max_row_tokens=100", "rollout.gpu_memory_utilization=0.2", "rollout.timeout=5"]
    server = ["rollout.server_urls=[http://other:1]", "rollout.engine=server"]
    assert load_config(None, how).fingerprint("gba", "rollout") == one.fingerprint("gba", "rollout")
    with_server = load_config(None, server)
    elsewhere = load_config(None, ["rollout.server_urls=[http://a:2]", "rollout.engine=server"])
    assert with_server.fingerprint("rollout") == elsewhere.fingerprint("rollout")
    for field in ("gba.loss.beta=0.5", "rollout.temperature=0.5", "rollout.num_generations=3"):
        section = field.split(".")[0]
        assert load_config(None, [field]).fingerprint(section) != one.fingerprint(section)


def test_fingerprint_sees_its_sections_and_no_others() -> None:
    one, two = Config(), load_config(None, ["gba.steps=3"])
    assert one.fingerprint("dsa", "lora") == two.fingerprint("dsa", "lora")
    assert one.fingerprint("gba") != two.fingerprint("gba")


def test_config_loads_nothing_heavy() -> None:
    probe = (
        "import sys, mmedx_fast.config\n"
        "heavy = {'torch', 'transformers', 'numpy', 'vllm', 'deepspeed'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", probe], check=True, cwd=CONFIGS[0].parents[1])


def test_format_and_options_of_data_go_by_split() -> None:
    data = load_config(
        None, ["data.format={test: slake}", "data.options={test: {language: both}}"]
    ).data
    assert data.format == {"test": "slake"}
    assert data.options == {"test": {"language": "both"}}
    with pytest.raises(ConfigError, match="data.options"):
        load_config(None, ["data.options={tset: {language: both}}"])
