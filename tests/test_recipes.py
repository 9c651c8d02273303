"""Every shipped recipe resolves, plans, fits the hardware on its first line, and runs on a shrunk model."""

import importlib.util
from pathlib import Path

import pytest
import torch

from mmedx_fast.config import Config, load_config
from mmedx_fast.cost import KNOWN_MODELS, plan, plan_text
from mmedx_fast.flops import ModelShape
from mmedx_fast.gpus import GPUS
from mmedx_fast.metrics import read_metrics
from mmedx_fast.run_folder import RunFolder
from mmedx_fast.stages.context import Context

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
REAL = [name for name in RECIPES if name != "demo"]
# The GPUs that a recipe's first line names.
HARDWARE = {
    "qwen2_5_vl_7b": [("a100", 1), ("h100", 1), ("h200", 1), ("h100", 4)],
    "qwen2_5_vl_7b_8gpu": [("a100", 8), ("h100", 8)],
    "qwen2_vl_2b": [("rtx4090", 1), ("rtx4090", 2), ("a100", 1)],
}


def _helper():
    path = Path(__file__).with_name("_recipe.py")
    spec = importlib.util.spec_from_file_location("recipe_models", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


recipe_models = _helper()


def _recipe(name: str, *overrides: str) -> Config:
    return load_config(ROOT / "configs" / f"{name}.yaml", overrides)


def test_the_three_recipes_are_there():
    assert set(REAL) == set(HARDWARE)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_resolves_and_plans_on_every_gpu(name):
    first = (ROOT / "configs" / f"{name}.yaml").read_text().splitlines()[0]
    assert first.startswith("# Hardware: ")
    cfg = _recipe(name)
    assert cfg.name == name
    for gpu in GPUS.values():
        for count in (1, 8):
            estimate = plan(cfg, gpu=gpu, gpus=count)
            assert gpu.name in plan_text(estimate)
            assert all(part["bytes"] >= 0 for part in estimate["memory"])
            assert 0 < estimate["total"]["gpu_hours"] < estimate["total"]["gpu_hours_plain"]


@pytest.mark.parametrize(("name", "gpu", "gpus"), [(n, *g) for n in REAL for g in HARDWARE[n]])
def test_a_recipe_fits_the_hardware_it_names(name, gpu, gpus):
    machine = plan(_recipe(name), gpu=GPUS[gpu], gpus=gpus)["machine"]
    assert machine["fits"], machine["problems"]
    cfg = _recipe(name)
    each = cfg.gba.questions_per_step * len(cfg.gba.guidelines) * cfg.rollout.num_generations
    # All rollouts of a GPU decode at once, and the cache holds them at full length.
    assert machine["sequences"] >= min(each // gpus, cfg.rollout.max_num_seqs) * 0.9


@pytest.mark.parametrize("name", REAL)
def test_a_recipe_skips_steps_that_explode_and_no_others(name):
    cfg = _recipe(name)
    for optimizer in (cfg.dsa.optimizer, cfg.gba.optimizer):
        assert optimizer.max_step_grad_norm == 100 * optimizer.max_grad_norm


@pytest.mark.parametrize("name", REAL)
def test_the_shrunk_model_keeps_the_recipe_s_architecture(name):
    path = _recipe(name).model.path
    real = ModelShape.from_config(KNOWN_MODELS[path.rsplit("/", 1)[-1].lower()])
    cut = ModelShape.from_config(recipe_models.shrink(path))
    assert cut.heads // cut.kv_heads == real.heads // real.kv_heads
    assert cut.intermediate / cut.hidden == pytest.approx(real.intermediate / real.hidden, rel=0.01)
    assert (cut.tied, cut.vision.mlp_matrices) == (real.tied, real.vision.mlp_matrices)
    assert (cut.vision.window is None) == (real.vision.window is None)
    assert cut.head_dim == recipe_models.HEAD_DIM and cut.layers < real.layers


# What makes a recipe's run short; all else is the recipe's.
SHORT = [
    "model.offline=true",
    "data.train=phantom",
    "data.test=phantom",
    "phantom.train=24",
    "phantom.validation=20",
    "phantom.test=20",
    "dsa.specialties=[pediatrics]",
    "dsa.steps=2",
    "dsa.questions_per_step=2",
    "gba.start=pediatrics",
    "gba.steps=2",
    "gba.questions_per_step=2",
    "gba.rewards=[{name: tests._recipe.length_reward}]",
    "rollout.num_generations=2",
    "rollout.max_completion_length=12",
    "rollout.max_num_seqs=32",
    "rollout.kv_cache_memory_bytes=33554432",
    "rollout.block_size=32",
    "eval.max_completion_length=12",
    "data.max_prompt_length=400",
]


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("qwen2_5_vl_7b", "vllm"),
        ("qwen2_5_vl_7b_8gpu", "transformers"),
        ("qwen2_vl_2b", "transformers"),
    ],
)
def test_a_recipe_runs_two_steps_of_dsa_and_gba(name, engine, tmp_path):
    from mmedx_fast.stages.dsa import run_dsa
    from mmedx_fast.stages.gba import run_gba

    recipe = _recipe(name)
    dtype = getattr(torch, recipe.model.dtype)
    folder = recipe_models.save_shrunk(recipe.model.path, tmp_path / "model", dtype)
    places = [f"model.path={folder}", f"run_dir={tmp_path / 'run'}", f"rollout.engine={engine}"]
    cfg = _recipe(name, *SHORT, *places)
    with RunFolder.open(cfg) as run, Context(cfg, run) as ctx:
        run_dsa(ctx)
        run_gba(ctx)
        experts = read_metrics(run.path / "dsa" / "pediatrics" / "metrics.jsonl")
        steps = read_metrics(run.path / "gba" / "metrics.jsonl")
    assert [row["step"] for row in experts] == [row["step"] for row in steps] == [1, 2]
    for row in [*experts, *steps]:
        assert (
            row["loss"] == row["loss"]
            and not row["skipped"]
            and row["grad_norm"] > 0
            and row["tokens_saved"] > 1
        )
        assert row["perf/train_tokens_per_second"] > 0
        shares = [value for key, value in row.items() if key.startswith("perf/share/")]
        assert sum(shares) == pytest.approx(1.0)
        # On a CPU there is no peak and no GPU hour.
        gpu_only = {"perf/mfu", "perf/gpu_hours_per_1000_samples"} & set(row)
        assert bool(gpu_only) == torch.cuda.is_available()
    assert steps[0]["sampling/sampling_logp_difference/mean"] < 0.1
