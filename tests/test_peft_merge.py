"""Adapters made by PEFT itself, merged: against PEFT's own functions, transformers, and its unmerged forward."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmedx_fast import cli
from mmedx_fast.merging import conflicts, merge
from mmedx_fast.model_files import ModelFilesError
from mmedx_fast.ops import MergeSpec
from mmedx_fast.peft_adapters import REFUSED, read_adapter, read_adapters
from mmedx_fast.policy_adapter import AdapterError
from mmedx_fast.tiny import assets_folder

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

_file = Path(__file__).with_name("_tiny_vl.py")
_spec = importlib.util.spec_from_file_location("tiny_vl_for_merge", _file)
tiny_vl = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny_vl)

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
LLAMA = SMALL | {"intermediate_size": 48, "num_key_value_heads": 1, "eos_token_id": 0}
IDS = torch.arange(1, 11)[None]
LINEAR = MergeSpec(method="linear")


def load(folder, kind="causal"):
    cls = {"causal": "AutoModelForCausalLM", "vl": "AutoModelForImageTextToText"}[kind]
    return getattr(transformers, cls).from_pretrained(folder, dtype=torch.float32)


def make_adapter(base, folder, seed=0, kind="causal", **config):
    """An adapter with random factors, as PEFT writes it."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(load(base, kind), peft.LoraConfig(**config))
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_" in name:
                param.normal_(std=0.15)
    model.save_pretrained(folder)
    return folder


def by_peft(base, adapter, kind="causal"):
    """The state that PEFT's own merge of one adapter gives."""
    with_adapter = peft.PeftModel.from_pretrained(load(base, kind), adapter)
    return with_adapter.merge_and_unload().state_dict()


def assert_equal(ours, theirs, atol=5e-7):
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=atol, rtol=1e-6, msg=name)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("peft_merge")


@pytest.fixture(scope="module")
def llama(root) -> Path:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**LLAMA, tie_word_embeddings=False)
    transformers.LlamaForCausalLM(config).save_pretrained(root / "llama", max_shard_size="20KB")
    (root / "llama" / "tokenizer_config.json").write_text("{}")
    assert len(list((root / "llama").glob("*.safetensors"))) > 2
    return root / "llama"


@pytest.fixture(scope="module")
def three(root, llama) -> list[Path]:
    """Other ranks, scales and targets in each."""
    return [
        make_adapter(
            llama, root / "one", 1, r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"]
        ),
        make_adapter(
            llama,
            root / "two",
            2,
            r=8,
            lora_alpha=4,
            use_rslora=True,
            target_modules=["q_proj", "v_proj", "down_proj"],
            rank_pattern={"v_proj": 3},
            alpha_pattern={"layers.1.self_attn.q_proj": 10},
        ),
        make_adapter(
            llama,
            root / "three",
            3,
            r=2,
            target_modules=["q_proj", "down_proj"],
            layers_to_transform=[1],
        ),
    ]


def deltas(model, adapters, module):
    """PEFT's own deltas of a module, loaded side by side; None where an adapter does not touch it."""
    layer = model.get_submodule(f"base_model.model.{module}")
    return [layer.get_delta_weight(a) if a in layer.lora_A else None for a in adapters]


@pytest.fixture(scope="module")
def together(llama, three):
    model = peft.PeftModel.from_pretrained(load(llama), three[0], adapter_name="one")
    model.load_adapter(three[1], adapter_name="two")
    model.load_adapter(three[2], adapter_name="three")
    return model


def test_one_adapter_merged_is_pefts_merge(tmp_path, llama, three) -> None:
    for i, adapter in enumerate(three):
        made = merge([adapter], tmp_path / str(i), LINEAR, base=llama)
        assert_equal(load(tmp_path / str(i)).state_dict(), by_peft(llama, adapter))
        assert made["notes"] == [] and not made["untied"]
        assert json.loads((tmp_path / str(i) / "merge.json").read_text())["form"] == "model"
    assert (tmp_path / "0" / "tokenizer_config.json").is_file()


def _gpt2(folder):
    config = transformers.GPT2Config(
        vocab_size=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=32,
        eos_token_id=0,
        bos_token_id=0,
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return {"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"]}


def _embedding(folder):
    config = transformers.LlamaConfig(**LLAMA, tie_word_embeddings=False)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return {"r": 3, "lora_alpha": 5, "target_modules": ["embed_tokens", "lm_head", "k_proj"]}


def _vision(folder):
    tiny_vl.save(folder)
    proj = ["patch_embed.proj", "visual.blocks.1.attn.qkv", "merger.mlp.0", "down_proj"]
    return {"r": 4, "target_modules": proj}


def _experts(folder):
    config = transformers.MixtralConfig(**LLAMA, num_local_experts=3, num_experts_per_tok=2)
    model = transformers.MixtralForCausalLM(config)
    model.save_pretrained(folder, save_original_format=False)
    both = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return {"r": 2, "target_modules": ["q_proj"], "target_parameters": both}


def _turned_experts(folder):
    """Square, and stored [experts, in, out]: only the module says which way round."""
    config = transformers.GptOssConfig(
        **SMALL | {"intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 16, "eos_token_id": 0},
        num_local_experts=3, num_experts_per_tok=2, layer_types=["full_attention"] * 2,
    )  # fmt: skip
    transformers.GptOssForCausalLM(config).save_pretrained(folder)
    return {"r": 2, "target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}


@pytest.mark.parametrize("make", [_gpt2, _embedding, _vision, _experts, _turned_experts])
def test_every_kind_of_layer_is_pefts_merge(tmp_path, make) -> None:
    base, kind = tmp_path / "base", "vl" if make is _vision else "causal"
    adapter = make_adapter(base, tmp_path / "a", kind=kind, **make(base))
    merge([adapter], tmp_path / "out", LINEAR, base=base)
    want, before = by_peft(base, adapter, kind), load(base, kind).state_dict()
    assert_equal(load(tmp_path / "out", kind).state_dict(), want)
    changed = [name for name in want if not torch.equal(want[name], before[name])]
    assert len(changed) == len({x.name for x in read_adapter(adapter).layers.values()})
    # The same adapter, through a merge in low rank, is the same adapter again.
    made = merge([adapter], tmp_path / "lora", LINEAR, as_lora=True, energy=1.0)
    assert made["energy_kept"] == pytest.approx(1.0, abs=1e-6)
    assert_equal(by_peft(base, tmp_path / "lora", kind), want, atol=2e-6)


@pytest.mark.parametrize("density", [0.2, 1.0])
def test_ties_of_a_model_is_pefts_ties_of_the_deltas(
    tmp_path, llama, three, together, density
) -> None:
    from peft.utils.merge_utils import ties

    weights = (1.0, 0.5, 2.0)
    made = merge(three, tmp_path / "out", MergeSpec(density=density, weights=weights), base=llama)
    got, before = load(tmp_path / "out").state_dict(), load(llama).state_dict()
    names = ("one", "two", "three")
    for module in (
        "layers.0.self_attn.q_proj",
        "layers.1.self_attn.q_proj",
        "layers.1.mlp.down_proj",
    ):
        found = deltas(together, names, f"model.{module}")
        given = [
            torch.zeros(before[f"model.{module}.weight"].shape) if d is None else d for d in found
        ]
        want = ties([d.float() for d in given], torch.tensor(weights), density)
        name = f"model.{module}.weight"
        torch.testing.assert_close(got[name], before[name] + want, atol=5e-7, rtol=1e-6)
        rate = made["linears"][module]["sign_conflict_rate"]
        assert 0.3 < rate < 0.8


def test_linear_and_ties_svd_are_pefts_weighted_adapters(tmp_path, llama, three, together) -> None:
    pairs = [("linear", "svd", "core", 1.0), ("ties", "ties_svd", "delta", 0.4)]
    for method, theirs, space, density in pairs:
        together.add_weighted_adapter(
            ["one", "two"], [1.0, 0.5], theirs, theirs, svd_rank=6, density=density
        )
        spec = MergeSpec(method=method, density=density, weights=(1.0, 0.5))
        made = merge(three[:2], tmp_path / method, spec, as_lora=True, rank=6, space=space)
        assert made["rank"] == 6 and 0.5 < made["energy_kept"] < 1
        ours = peft.PeftModel.from_pretrained(load(llama), tmp_path / method, adapter_name="ours")
        for module in ("layers.1.self_attn.q_proj", "layers.0.self_attn.v_proj"):
            (want,) = deltas(together, [theirs], f"model.{module}")
            (got,) = deltas(ours, ["ours"], f"model.{module}")
            torch.testing.assert_close(got, want, atol=3e-6, rtol=1e-4)


def test_dare_ties_svd_is_pefts_with_the_same_draws(tmp_path, llama, three, together, monkeypatch):
    from mmedx_fast.kernels._lora_trim import random_keep

    key, module = "layers.1.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
    keeps = [
        random_keep(slice(0, 32), 32, 0.5, 7, key, e, torch.device("cpu")).float() for e in (0, 1)
    ]
    draws = iter(keeps)
    monkeypatch.setattr(torch, "bernoulli", lambda x: next(draws))
    found = deltas(together, ["one", "two"], module)
    want = peft.utils.merge_utils.dare_ties(found, torch.ones(2), 0.5)
    spec = MergeSpec(method="dare_ties", density=0.5, seed=7)
    merge(three[:2], tmp_path / "out", spec, base=llama)
    before = load(llama).state_dict()[f"{module}.weight"]
    got = load(tmp_path / "out").state_dict()[f"{module}.weight"]
    torch.testing.assert_close(got, before + want, atol=5e-7, rtol=1e-6)


def test_pefts_ties_of_factors_is_not_ties_of_deltas(tmp_path, llama) -> None:
    """README's number: PEFT's ``ties`` trims and elects in A and B apart; ``ties_svd`` in their product."""
    from peft.utils.merge_utils import ties

    names = list("abcde")
    folders = [
        make_adapter(llama, tmp_path / name, i, r=16, target_modules=["down_proj"])
        for i, name in enumerate(names)
    ]
    model = peft.PeftModel.from_pretrained(load(llama), folders[0], adapter_name=names[0])
    for name, folder in zip(names[1:], folders[1:], strict=True):
        model.load_adapter(folder, adapter_name=name)
    model.add_weighted_adapter(names, [1.0] * 5, "factors", "ties", density=0.3)
    module = "model.layers.0.mlp.down_proj"
    want = ties(deltas(model, names, module), torch.ones(5), 0.3)
    (theirs,) = deltas(model, ["factors"], module)
    merge(folders, tmp_path / "out", MergeSpec(density=0.3), base=llama)
    before, after = (load(x).state_dict()[f"{module}.weight"] for x in (llama, tmp_path / "out"))

    def cosine(x):
        return float(torch.cosine_similarity(x.flatten(), want.flatten(), 0))

    assert cosine(after - before) > 0.99999
    assert 0.1 < cosine(theirs) < 0.3


def test_global_trimming_shard_by_shard_is_that_of_the_whole(tmp_path, llama, three) -> None:
    from mmedx_fast.ops import merge_model_
    from mmedx_fast.stages.adapters import by_linear

    spec = MergeSpec(density=0.25, trim_scope="global")
    made = merge(three, tmp_path / "out", spec, base=llama)
    rows = by_linear({a.name: a.layers for a in read_adapters(three)})
    factors = {k: [x and x.factors for x in row] for k, row in rows.items()}
    want = load(llama).state_dict()
    weights = {name: want[f"model.{name}.weight"] for name in factors}
    report = merge_model_(weights, factors, spec)
    assert_equal(load(tmp_path / "out").state_dict(), want, atol=0)
    for key in ("kept_fraction", "conflicts", "threshold", "update_norm"):
        assert made["total"][key] == pytest.approx(report["total"][key])


def test_conflicts_need_no_base_and_are_those_of_the_merge(tmp_path, llama, three) -> None:
    spec = MergeSpec(density=0.2)
    found = conflicts(three, spec)
    made = merge(three, tmp_path / "out", spec, base=llama)
    assert found["experts"] == ["one", "two", "three"]
    assert found["full"]["linears"].keys() == made["linears"].keys()
    for name, one in found["full"]["linears"].items():
        assert one["conflicts"] == made["linears"][name]["conflicts"]
    assert found["summed"]["cosine"][0][0] == pytest.approx(1.0)


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"]])
def test_an_adapter_of_one_use_of_a_tied_weight_unties_it(tmp_path, targets) -> None:
    torch.manual_seed(2)
    config = transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    adapter = make_adapter(tmp_path / "base", tmp_path / "a", r=4, target_modules=targets)
    made = merge([adapter], tmp_path / "out", LINEAR, base=tmp_path / "base")
    assert made["untied"] and "tie_word_embeddings" in made["notes"][0]
    unmerged = peft.PeftModel.from_pretrained(load(tmp_path / "base"), adapter)
    with torch.no_grad():
        want, got = unmerged(IDS).logits, load(tmp_path / "out")(IDS).logits
        plain = load(tmp_path / "base")(IDS).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert (want - plain).abs().max() > 1e-3


def test_a_tied_adapter_keeps_the_weights_tied(tmp_path) -> None:
    config = transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    adapter = make_adapter(
        tmp_path / "base", tmp_path / "a", r=4, target_modules=["embed_tokens", "lm_head"],
        ensure_weight_tying=True,
    )  # fmt: skip
    made = merge([adapter], tmp_path / "out", LINEAR, base=tmp_path / "base")
    assert not made["untied"]
    unmerged = peft.PeftModel.from_pretrained(load(tmp_path / "base"), adapter)
    with torch.no_grad():
        torch.testing.assert_close(
            load(tmp_path / "out")(IDS).logits, unmerged(IDS).logits, atol=1e-5, rtol=1e-5
        )


def test_shards_and_index_are_whole(tmp_path, llama, three) -> None:
    merge(three, tmp_path / "out", base=llama, max_shard_size=20_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    held: dict[str, str] = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            held |= dict.fromkeys(opened.keys(), file.name)
    assert held == index["weight_map"] and len(set(held.values())) > 2
    sizes = [p.numel() * 4 for p in load(llama).state_dict().values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert (
        load(tmp_path / "out").config.to_dict()
        == load(llama).config.to_dict() | {"_name_or_path": str(tmp_path / "out")}
        or load(tmp_path / "out").config.vocab_size == 64
    )


_RSS = """
import sys
from pathlib import Path
from mmedx_fast._env import prepare_environment
prepare_environment(offline=True)
from mmedx_fast.merging import merge
base, adapter, out, warm = sys.argv[1:]
merge([adapter], warm, base=base + "-small", max_shard_size=1 << 20)
def status(key):
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key)]
    return int(line.split()[1]) << 10
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = status("VmRSS")
merge([adapter], out, base=base, max_shard_size=16 << 20)
print(status("VmHWM") - before)
"""


def test_memory_is_of_a_shard_not_of_the_model(tmp_path) -> None:
    """A base of twelve shards of 12 MiB in bfloat16, in a process of its own."""
    linear = "layers.0.mlp.down_proj"
    for folder, shards, size in (("base", 12, 6 << 20), ("base-small", 1, 1 << 10)):
        made = tmp_path / folder
        made.mkdir()
        weights = {f"model.{linear}.weight": torch.randn(128, 64).bfloat16()}
        where: dict[str, str] = {}
        for i in range(shards):
            weights[f"model.layers.{i}.rest"] = torch.zeros(size, dtype=torch.bfloat16)
            file = f"model-{i:05d}.safetensors"
            save_file(weights, made / file)
            where |= dict.fromkeys(weights, file)
            weights = {}
        (made / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        (made / "config.json").write_text('{"model_type": "of its own"}')
    prefix = f"base_model.model.model.{linear}"
    tensors = {f"{prefix}.lora_A.weight": torch.randn(2, 64)}
    tensors[f"{prefix}.lora_B.weight"] = torch.randn(128, 2)
    write_raw(tmp_path / "a", tensors)
    size = sum(file.stat().st_size for file in (tmp_path / "base").iterdir())
    done = subprocess.run(
        [sys.executable, "-c", _RSS, *(str(tmp_path / x) for x in ("base", "a", "out", "warm"))],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout)
    assert size > 140 << 20
    # one output shard, one input file's mapped pages, and what the allocator rounds up
    assert 4 << 20 < grown < 40 << 20, f"{grown >> 20} MiB for a base of {size >> 20}"


def write_raw(folder, tensors=None, weights="adapter_model.safetensors", **config):
    """An adapter as its files, with whatever the configuration should say."""
    folder.mkdir(parents=True, exist_ok=True)
    if tensors is None:
        prefix = "base_model.model.model.layers.0.self_attn.q_proj"
        tensors = {
            f"{prefix}.lora_A.weight": torch.ones(2, 32),
            f"{prefix}.lora_B.weight": torch.ones(32, 2),
        }
    save_file(tensors, folder / weights)
    made = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]} | config
    (folder / "adapter_config.json").write_text(json.dumps(made))
    return folder


@pytest.mark.parametrize("key", [*REFUSED, "a_field_of_tomorrow"])
def test_what_is_no_plain_lora_is_refused_by_name(tmp_path, key) -> None:
    folder = write_raw(tmp_path / "a", **{key: True})
    with pytest.raises(AdapterError, match=rf"adapter_config\.json: {key} = True"):
        read_adapter(folder)


def test_refused_fields_are_all_of_pefts_variants() -> None:
    """A variant that a later PEFT adds is seen here; until then its field is refused as not known."""
    import dataclasses

    from mmedx_fast.peft_adapters import _TYPES, _check_config

    variants = {
        f.name for f in dataclasses.fields(peft.LoraConfig) if f.metadata.get("is_lora_variant")
    }
    assert variants <= REFUSED.keys()
    for f in dataclasses.fields(peft.LoraConfig):
        raw = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, f.name: f.name not in REFUSED}
        if f.name in ("r", "lora_alpha", "peft_type", "bias", "init_lora_weights", *_TYPES):
            continue
        _check_config(Path("adapter_config.json"), raw)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bias": "all"}, "bias = 'all'"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"r": 3}, "has rank 2, but adapter_config.json says 3"),
        ({"rank_pattern": {"layers.0.self_attn.q_proj": 4}}, "says 4"),
        ({"lora_alpha": None}, "lora_alpha = None"),
        ({"lora_alpha": float("nan")}, "lora_alpha = nan must be a number above 0"),
        ({"r": 2.5}, "r = 2.5 must be a whole number"),
        ({"r": True}, "r = True"),
        ({"rank_pattern": {"[": 2}}, "rank_pattern: '[' is no regular expression"),
        ({"rank_pattern": [1]}, "rank_pattern = [1] must be an object or null"),
        ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern['q_proj'] = 2.5"),
        ({"rank_pattern": {"q_proj": None}}, "rank_pattern['q_proj'] = None"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern['q_proj'] = 'x' must be a number"),
        ({"alpha_pattern": "q_proj"}, "alpha_pattern = 'q_proj'"),
        ({"use_rslora": "false"}, "use_rslora = 'false' must be true, false or null"),
        ({"fan_in_fan_out": "false"}, "fan_in_fan_out = 'false'"),
        ({"target_parameters": "experts.w"}, "target_parameters = 'experts.w' must be a list"),
        ({"target_parameters": [1]}, "target_parameters must hold names"),
        ({"task_type": ["CAUSAL_LM"]}, "task_type = ['CAUSAL_LM'] must be a text"),
    ],
)
def test_configurations_that_cannot_be_merged(tmp_path, change, words) -> None:
    with pytest.raises(AdapterError, match=r"adapter_config\.json") as caught:
        read_adapter(write_raw(tmp_path / "a", **change))
    assert words in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("key", "tensor", "words"),
    [
        ("base_model.model.x.lora_A.weight", torch.ones(2, 4), "only its lora_A"),
        ("x.lora_A.weight", torch.ones(2, 4), "does not begin with"),
        ("base_model.model.x.lora_magnitude_vector", torch.ones(4), "no LoRA factor"),
        ("base_model.model.x.bias", torch.ones(4), "no LoRA factor"),
    ],
)
def test_files_that_hold_something_else(tmp_path, key, tensor, words) -> None:
    with pytest.raises(AdapterError, match=words):
        read_adapter(write_raw(tmp_path / "a", {key: tensor}))
    bad = write_raw(tmp_path / "b")
    (bad / "adapter_model.safetensors").write_bytes(b"no such thing")
    with pytest.raises(AdapterError, match="cannot be read as safetensors"):
        read_adapter(bad)


def test_a_pickle_is_never_read(tmp_path) -> None:
    folder = write_raw(tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match="adapter_model.bin is a pickle.*save_pretrained"):
        read_adapter(folder)
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelFilesError, match="pytorch_model.bin is a pickle"):
        merge([write_raw(tmp_path / "c")], tmp_path / "out", base=base)


def test_values_that_are_not_finite_are_named(tmp_path) -> None:
    prefix = "base_model.model.q"
    tensors = {f"{prefix}.lora_A.weight": torch.full((2, 4), torch.nan)}
    tensors[f"{prefix}.lora_B.weight"] = torch.ones(4, 2)
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors: q: .*A holds NaN"):
        read_adapter(write_raw(tmp_path / "a", tensors))


def test_bases_that_differ_need_a_word(tmp_path) -> None:
    a = write_raw(tmp_path / "a", base_model_name_or_path="org/one")
    b = write_raw(tmp_path / "b", base_model_name_or_path="org/two")
    with pytest.raises(AdapterError, match="'org/two'.*'org/one'.*--any-base"):
        conflicts([a, b])
    assert conflicts([a, b], any_base=True)["experts"] == ["a", "b"]
    for folder, print_ in ((a, "x"), (b, "x")):
        (folder / "base_model.json").write_text(json.dumps({"base_fingerprint": print_}))
    assert len(read_adapters([a, b])) == 2  # the same weights under two names
    (b / "base_model.json").write_text('{"base_fingerprint": "y"}')
    with pytest.raises(AdapterError, match="fingerprint"):
        read_adapters([a, b])


def test_what_does_not_fit_the_base_is_named_and_nothing_is_written(tmp_path, llama) -> None:
    prefix = "base_model.model.model.layers.0.self_attn"
    wide = {f"{prefix}.q_proj.lora_A.weight": torch.ones(2, 40)}
    wide[f"{prefix}.q_proj.lora_B.weight"] = torch.ones(32, 2)
    other = {f"{prefix}.w_proj.lora_A.weight": torch.ones(2, 32)}
    other[f"{prefix}.w_proj.lora_B.weight"] = torch.ones(32, 2)
    copy = {"base_model.model.model.embed_tokens.weight": torch.ones(64, 32)}
    good = load_file(write_raw(tmp_path / "good") / "adapter_model.safetensors")
    for i, (tensors, words) in enumerate(
        [
            (wide, r"q_proj.*\(32, 40\).*\(32, 32\)"),
            (other, "no tensor for .*w_proj"),
            (good | copy, "weights of its own for model.embed_tokens.weight"),
        ]
    ):
        folder = write_raw(tmp_path / str(i), tensors)
        with pytest.raises(AdapterError, match=words):
            merge([folder], tmp_path / "out", base=llama)
    with pytest.raises(AdapterError, match="different bases"):
        conflicts([tmp_path / "good", tmp_path / "0"])
    assert not (tmp_path / "out").exists()
    assert not [x for x in tmp_path.iterdir() if x.name.startswith(".")]


def test_copies_of_the_base_beside_the_factors_are_told(tmp_path, llama) -> None:
    """Without a base nobody knows whether a copy is the base's: said, or settled with it."""
    good = load_file(write_raw(tmp_path / "good") / "adapter_model.safetensors")
    own = load(llama).state_dict()["model.embed_tokens.weight"]
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    same = write_raw(tmp_path / "same", good | {name: own})
    other = write_raw(tmp_path / "other", good | {name: own + 1})
    assert "embed_tokens.weight" in conflicts([same])["notes"][0]
    made = merge([other], tmp_path / "a", LINEAR, as_lora=True, rank=2)
    assert "taken to be unchanged" in made["notes"][0]
    made = merge([same], tmp_path / "b", LINEAR, as_lora=True, rank=2, base=llama)
    assert made["notes"] == []
    with pytest.raises(AdapterError, match="weights of its own"):
        merge([other], tmp_path / "c", LINEAR, as_lora=True, rank=2, base=llama)


def test_quantised_and_split_bases_are_refused(tmp_path, llama) -> None:
    quantised = tmp_path / "q"
    quantised.mkdir()
    raw = json.loads((llama / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "bitsandbytes"}
    (quantised / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelFilesError, match="bitsandbytes"):
        merge([write_raw(tmp_path / "a")], tmp_path / "out", base=quantised)
    config = _experts(tmp_path / "fused")
    adapter = make_adapter(tmp_path / "fused", tmp_path / "b", **config)
    mixtral = transformers.AutoConfig.from_pretrained(tmp_path / "fused")
    transformers.MixtralForCausalLM(mixtral).save_pretrained(tmp_path / "split")
    with pytest.raises(AdapterError, match="experts one by one.*save_original_format=False"):
        merge([adapter], tmp_path / "out", base=tmp_path / "split")


def test_options_that_contradict(tmp_path, llama) -> None:
    a = write_raw(tmp_path / "a")
    with pytest.raises(ValueError, match="--base"):
        merge([a], tmp_path / "out")
    with pytest.raises(ValueError, match="as_lora"):
        merge([a], tmp_path / "out", base=llama, rank=4)
    with pytest.raises(ValueError, match="2 weights for 1 experts"):
        merge([a], tmp_path / "out", MergeSpec(weights=(1.0, 2.0)), base=llama)
    with pytest.raises(ValueError, match="density = 0"):
        merge([a], tmp_path / "out", MergeSpec(density=0.0), base=llama)
    with pytest.raises(ValueError, match="density = 0"):
        conflicts([a], MergeSpec(density=0.0))
    with pytest.raises(AdapterError, match="not empty"):
        merge([a], a, base=llama)
    with pytest.raises(AdapterError, match="no adapter given"):
        merge([], tmp_path / "out", base=llama)


def test_energy_decides_the_rank(tmp_path, three, llama) -> None:
    ranks = {}
    for energy in (0.5, 0.9, 1.0):
        made = merge(three, tmp_path / str(energy), LINEAR, as_lora=True, energy=energy)
        assert made["energy_kept"] >= energy - 1e-9
        ranks[energy] = made["rank"]
        less = merge(
            three, tmp_path / f"less{energy}", LINEAR, as_lora=True, rank=max(1, made["rank"] - 1)
        )
        assert less["energy_kept"] < energy or made["rank"] == 1
    assert ranks[0.5] < ranks[0.9] < ranks[1.0] <= 4 + 8 + 2
    # all of it: the linear merge into the model, and the adapter, are one
    merge(three, tmp_path / "dense", LINEAR, base=llama)
    want = load(tmp_path / "dense").state_dict()
    assert_equal(by_peft(llama, tmp_path / "1.0"), want, atol=3e-6)


def test_adapters_of_older_transformers_meet_newer_ones(tmp_path) -> None:
    """One module under two names, and a checkpoint with the older ones."""
    base = tiny_vl.save(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "new", kind="vl", r=4, target_modules=["v_proj"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert all("model.language_model.layers" in key for key in tensors)
    old = {k.replace("model.language_model.", "model."): v for k, v in tensors.items()}
    write_raw(tmp_path / "old", old, r=4, lora_alpha=8)
    half = MergeSpec(method="linear", weights=(0.5, 0.5))
    merge([adapter, tmp_path / "old"], tmp_path / "out", half, base=base)
    assert_equal(load(tmp_path / "out", "vl").state_dict(), by_peft(base, adapter, "vl"))


def _effect(base, adapter):
    """Logits that PEFT gives with the adapter, and how many of its modules it loaded."""
    model = peft.PeftModel.from_pretrained(load(base, "vl"), adapter)
    loaded = [p for name, p in model.named_parameters() if "lora_B" in name and p.any()]
    with torch.no_grad():
        return model(IDS).logits, len(loaded)


def test_an_adapter_of_older_and_newer_names_is_loaded_whole(tmp_path) -> None:
    base = tiny_vl.save(tmp_path / "base")
    new = make_adapter(base, tmp_path / "new", kind="vl", r=4, target_modules=["q_proj"])
    targets = ["v_proj", "blocks.0.attn.qkv"]
    later = make_adapter(base, tmp_path / "later", 1, kind="vl", r=4, target_modules=targets)
    tensors = load_file(later / "adapter_model.safetensors")
    older = {"model.language_model.": "model.", "model.visual.": "visual."}
    for name, was in older.items():
        tensors = {k.replace(f"base_model.model.{name}", f"base_model.model.{was}"): v
                   for k, v in tensors.items()}  # fmt: skip
    old = write_raw(tmp_path / "old", tensors, r=4, lora_alpha=8, target_modules=targets)
    for given, count in (([old], 3), ([new, old], 5), ([old, new], 5)):
        to = tmp_path / "-".join(x.name for x in given)
        merge(given, to / "model", LINEAR, base=base)
        merge(given, to / "lora", LINEAR, base=base, as_lora=True, energy=1.0)
        got, loaded = _effect(base, to / "lora")
        assert loaded == count
        with torch.no_grad():
            want = load(to / "model", "vl")(IDS).logits
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
        assert_equal(by_peft(base, to / "lora", "vl"), load(to / "model", "vl").state_dict(), 2e-6)
    # nothing says which names are right without the base
    eyes = {k: v for k, v in tensors.items() if ".visual." in k}
    eyes = write_raw(tmp_path / "eyes", eyes, r=4, lora_alpha=8)
    for other in (old, eyes):
        with pytest.raises(AdapterError, match=r"language_model.*different versions.*--base DIR"):
            merge([new, other], tmp_path / "lora", LINEAR, as_lora=True)
    assert not (tmp_path / "lora").exists()
    assert merge([old, eyes], tmp_path / "lora", LINEAR, as_lora=True)["form"] == "adapter"


def test_two_names_that_are_one_module_of_the_base_are_refused(tmp_path) -> None:
    base = tmp_path / "gpt2"
    whole = make_adapter(base, tmp_path / "whole", **_gpt2(base))
    tensors = load_file(whole / "adapter_model.safetensors")
    inner = {k.replace(".transformer.", "."): v for k, v in tensors.items()}
    config = json.loads((whole / "adapter_config.json").read_text())
    bare = write_raw(tmp_path / "bare", inner, **config)
    with pytest.raises(AdapterError, match=r"transformer\.h\.0.* are one module of the base"):
        merge([whole, bare], tmp_path / "lora", LINEAR, base=base, as_lora=True)


def test_the_commands(tmp_path, llama, three, capsys) -> None:
    folders = [str(x) for x in three]
    files = ["--json", str(tmp_path / "c.json"), "--png", str(tmp_path / "c.png")]
    assert cli.main(["conflicts", *folders, "--density", "0.2", *files]) == 0
    said = capsys.readouterr().out
    assert "layers.0.self_attn.q_proj" in said and "cosine" in said and "three" in said
    assert json.loads((tmp_path / "c.json").read_text()) == json.loads(
        json.dumps(conflicts(three, MergeSpec(density=0.2)))
    )
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"
    out = ["--base", str(llama), "--out", str(tmp_path / "m")]
    options = [
        "--method",
        "ties",
        "--density",
        "0.2",
        "--weights",
        "1",
        "2",
        "0.5",
        "--scale",
        "0.7",
    ]
    assert cli.main(["merge", *out, *folders, *options]) == 0
    spec = MergeSpec(density=0.2, weights=(1.0, 2.0, 0.5), lam=0.7)
    merge(three, tmp_path / "n", spec, base=llama)
    assert_equal(load(tmp_path / "m").state_dict(), load(tmp_path / "n").state_dict(), atol=0)
    lora = ["--as-lora", "--rank", "3", "--out", str(tmp_path / "l")]
    assert cli.main(["merge", *folders, *lora]) == 0
    assert "rank 3" in capsys.readouterr().out
    assert cli.main(["merge", *folders, *out]) == 2
    assert "not empty" in capsys.readouterr().err
    assert cli.main(["merge", "no-such.yaml"]) == 2  # a config, as before
    assert "no-such.yaml" in capsys.readouterr().err
    for line in (
        ["merge", "no-such", "other", "--base", "b", "--out", str(tmp_path / "o")],
        ["merge", "no-such", f"--out={tmp_path / 'o'}"],
        ["merge", "no-such", "--as-lora", "--out", str(tmp_path / "o")],
        ["conflicts", "no-such", "other"],
        ["conflicts", str(three[0]), "no-such"],
    ):
        assert cli.main(line) == 2
        assert "no-such: no such folder" in capsys.readouterr().err
    assert cli.main(["merge", "no-such.yaml", "seed=2", "caci.scale=1"]) == 2
    assert "config 'no-such.yaml': not found" in capsys.readouterr().err
    assert cli.main(["conflicts", str(llama)]) == 2
    assert "adapter_config.json" in capsys.readouterr().err


_VLLM = """
import sys
from mmedx_fast._env import prepare_environment
prepare_environment(offline=True)
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
merged, base, lora = sys.argv[1:]
options = dict(dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=4, block_size=32,
    kv_cache_memory_bytes=64 << 20, skip_mm_profiling=True, limit_mm_per_prompt={"image": 1, "video": 0})
ask = [{"prompt_token_ids": list(range(5, 25))}], SamplingParams(temperature=0, max_tokens=12)
def tokens(llm, **more):
    return list(llm.generate(*ask, use_tqdm=False, **more)[0].outputs[0].token_ids)
llm = LLM(merged, **options)
dense = tokens(llm)
llm.llm_engine.engine_core.shutdown()
del llm
from vllm.distributed import cleanup_dist_env_and_memory
cleanup_dist_env_and_memory()
llm = LLM(base, enable_lora=True, max_lora_rank=16, **options)
adapter = LoRARequest("merged", 1, lora)
llm.llm_engine.add_lora(adapter)
print("TOKENS", dense, tokens(llm, lora_request=adapter), tokens(llm))
llm.llm_engine.engine_core.shutdown()
"""


@pytest.mark.slow
def test_vllm_loads_model_and_adapter(tmp_path) -> None:
    pytest.importorskip("vllm")
    base = assets_folder()
    targets = r".*language_model\..*\.(q_proj|down_proj)"
    adapters = [
        make_adapter(base, tmp_path / str(i), i, kind="vl", r=4, target_modules=targets)
        for i in (1, 2)
    ]
    merge(adapters, tmp_path / "merged", LINEAR, base=base)
    made = merge(adapters, tmp_path / "lora", LINEAR, as_lora=True, energy=1.0)
    assert made["rank"] <= 8
    prompt = torch.arange(5, 25)[None]
    with torch.no_grad():
        want = load(tmp_path / "merged", "vl").generate(prompt, max_new_tokens=12, do_sample=False)
    folders = [str(tmp_path / "merged"), str(base), str(tmp_path / "lora")]
    done = subprocess.run(
        [sys.executable, "-c", _VLLM, *folders], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [x for x in done.stdout.splitlines() if x.startswith("TOKENS")]
    dense, lora, plain = json.loads("[" + line[7:].replace("] [", "], [") + "]")
    assert dense == want[0, 20:].tolist()
    assert lora == dense and plain != dense
