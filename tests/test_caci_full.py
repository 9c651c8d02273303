"""The merge with an RL model trained in full, against peft's TIES on the materialised changes."""

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch

from mmedx_fast.config import ConfigError, load_config
from mmedx_fast.ops import LoraFactors, MergeSpec, lora_conflicts, lora_merge_, model_conflicts
from mmedx_fast.stages.caci_full import FullTaskVector, as_matrix, full_rank_factors
from mmedx_fast.stages.context import StageError


def _helper(name):
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"helper_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny_vl = _helper("_tiny_vl")
PROJECTIONS = ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")
WEIGHTS = (1.0, 1.0, 3.0)


def experts():
    """Two LoRAs on three linears a layer; the second leaves layer 1 alone."""
    generator = torch.Generator().manual_seed(5)
    shapes = {name: m.weight.shape for name, m in tiny_vl.build().named_modules() if is_linear(m)}
    found = {}
    for layer, part in itertools.product((0, 1), PROJECTIONS):
        name = f"model.language_model.layers.{layer}.{part}"
        out, width = shapes[name]
        made = [
            LoraFactors(
                torch.randn(4, width, generator=generator),
                torch.randn(out, 4, generator=generator),
                0.01,
            )
            for _ in range(2)
        ]
        found[name] = [made[0], made[1] if layer == 0 else None]
    return found


def is_linear(module):
    return isinstance(module, torch.nn.Linear)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folders of base and RL model; the RL model changed everything but the vision tower."""
    root = tmp_path_factory.mktemp("models")
    model = tiny_vl.build()
    model.save_pretrained(root / "base")
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if ".visual." not in name:
                param += 0.02 * torch.randn(param.shape, generator=generator)
    model.save_pretrained(root / "rl", max_shard_size="50KB")
    assert (root / "rl" / "model.safetensors.index.json").is_file()
    return root


def load(folder):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)


def task_vector(world, dtype=torch.float32):
    return FullTaskVector(experts(), 2, world / "rl", world / "base", dtype)


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_the_merge_is_peft_s_ties_on_whole_changes(world, density):
    from peft.utils.merge_utils import ties

    spec = MergeSpec(density=density, lam=0.8, weights=WEIGHTS)
    merged, base, rl = (load(world / name) for name in ("base", "base", "rl"))
    report = task_vector(world).merge_(merged, spec)
    trained, loras = dict(rl.named_parameters()), experts()
    touched = set()
    for (name, ours), start in zip(merged.named_parameters(), base.parameters(), strict=True):
        row = loras.get(name.removesuffix(".weight"), [None, None])
        deltas = [f.delta(dtype=torch.float64) for f in row if f is not None]
        weights = [w for w, f in zip(WEIGHTS[:2], row, strict=True) if f is not None]
        change = trained[name].double() - start.double()
        if change.any():
            deltas, weights = [*deltas, change], [*weights, WEIGHTS[2]]
        if not deltas:
            assert torch.equal(ours, start) and ".visual." in name
            continue
        touched.add(name.removesuffix(".weight"))
        update = ties(deltas, torch.tensor(weights, dtype=torch.float64), density)
        torch.testing.assert_close(
            ours.double(), start.double() + 0.8 * update, rtol=0, atol=2e-7, msg=name
        )
    assert report["linears"].keys() == touched
    assert report["total"]["linears"] == len(touched)


@pytest.mark.parametrize("method", ["linear", "dare_linear", "dare_ties"])
def test_other_methods_merge_whole_changes_too(world, method):
    """Against the merge of each matrix by itself from the changes' singular vectors."""
    spec = MergeSpec(method=method, density=0.5, weights=WEIGHTS, seed=3)
    merged, base, rl = (load(world / name) for name in ("base", "base", "rl"))
    task_vector(world).merge_(merged, spec)
    name = "model.language_model.layers.0.mlp.gate_proj"
    start, after = (dict(m.named_parameters())[f"{name}.weight"].detach() for m in (base, rl))
    u, s, v = torch.linalg.svd((after - start).double(), full_matrices=False)
    row = [*experts()[name], LoraFactors(v.contiguous(), (u * s).contiguous())]
    wanted = start.clone()
    lora_merge_(wanted, row, spec, layer=name)
    found = dict(merged.named_parameters())[f"{name}.weight"]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_conflicts_are_those_of_the_changes(world):
    spec = MergeSpec(density=0.3, weights=WEIGHTS)
    seen = []
    report = task_vector(world).conflicts(
        spec, torch.device("cpu"), lambda name, _: seen.append(name)
    )
    loras = experts()
    assert seen == list(loras) == list(report["linears"])
    base, rl = (dict(load(world / name).named_parameters()) for name in ("base", "rl"))
    whole = {
        name: [*row, full_rank_factors((rl[f"{name}.weight"] - base[f"{name}.weight"]).detach())]
        for name, row in loras.items()
    }
    assert report == model_conflicts(whole, spec)
    name, row = next(iter(whole.items()))
    deltas = torch.stack([f.delta(dtype=torch.float64) for f in row]).flatten(1)
    cosine = torch.nn.functional.cosine_similarity(deltas[:, None], deltas[None], dim=-1)
    torch.testing.assert_close(
        torch.tensor(report["linears"][name]["cosine"], dtype=torch.float64), cosine
    )
    assert report["linears"][name]["norm"][2] == pytest.approx(float(deltas[2].norm()))


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5), (1, 7)], ids=str)
def test_full_rank_factors_are_the_delta(shape):
    delta = torch.randn(shape)
    factors = full_rank_factors(delta)
    assert factors.rank == min(shape) and torch.equal(factors.delta(), delta)
    lora_conflicts([factors, None], MergeSpec())


@pytest.mark.parametrize("shape", [(70, 100), (100, 70)], ids=str)
def test_both_implementations_take_such_ranks(implementation, shape):
    from peft.utils.merge_utils import ties

    generator = torch.Generator().manual_seed(1)
    delta = torch.randn(shape, generator=generator)
    low = LoraFactors(
        torch.randn(4, shape[1], generator=generator), torch.randn(shape[0], 4, generator=generator)
    )
    base = torch.zeros(shape)
    lora_merge_(base, [low, full_rank_factors(delta)], MergeSpec(density=0.4))
    wanted = ties([low.delta(), delta], torch.ones(2), 0.4)
    torch.testing.assert_close(base, wanted, rtol=1e-5, atol=1e-5)


def test_vectors_and_convolutions_are_matrices_in_place():
    for shape, matrix in (((4,), (1, 4)), ((4, 3), (4, 3)), ((4, 3, 2, 5), (4, 30))):
        weight = torch.zeros(shape)
        assert as_matrix(weight).shape == matrix
        as_matrix(weight).add_(1)
        assert weight.eq(1).all()


def test_misfits_are_named(world, tmp_path):
    with pytest.raises(ConfigError, match=r"caci\.trim_scope=tensor"):
        load_config(None, ["gba.finetuning_type=full", "caci.trim_scope=global"])
    other = {"model.language_model.layers.7.self_attn.q_proj": experts().popitem()[1]}
    vector = FullTaskVector(other, 2, world / "rl", world / "base", torch.float32)
    with pytest.raises(StageError, match="layers.7.*another base"):
        vector.merge_(load(world / "base"), MergeSpec(weights=WEIGHTS))
