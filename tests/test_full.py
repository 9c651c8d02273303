"""Training every weight: against plain autograd and AdamW, resumable, written for transformers and vLLM."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch

from mmedx_fast._paths import find_config
from mmedx_fast.checkpoint import load_latest, save_checkpoint
from mmedx_fast.config import LoraConfig, ModelConfig, OptimizerConfig
from mmedx_fast.model_files import canonical, tensor_files
from mmedx_fast.ops import PolicyLossSpec, linear_logprob
from mmedx_fast.policy import Policy
from mmedx_fast.tree import pack_row


def _helper(name):
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"helper_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny_vl = _helper("_tiny_vl")
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, weight_decay=0.01, lr_scheduler_type="linear")
FP32 = ModelConfig(dtype="float32", gradient_checkpointing=False)
BF16 = ModelConfig(dtype="bfloat16", gradient_checkpointing=True)
KEY_BIAS = ("k_proj.bias", "qkv.bias")
"""Softmax ignores a shift of all keys: its gradient is rounding alone, and so is Adam's direction."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_vl.save(tmp_path_factory.mktemp("model") / "tiny-vl")


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A model whose head is its embedding."""
    return save_tied(tmp_path_factory.mktemp("model") / "tied")


def save_tied(folder):
    model = tiny_vl.build()
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    model.save_pretrained(folder)
    assert "lm_head.weight" not in tensor_files(folder)
    return folder


@pytest.fixture
def policies():
    made = []

    def make(*args, **kwargs):
        made.append(load(*args, **kwargs))
        return made[-1]

    yield make
    for policy in made:
        if hasattr(policy, "module"):
            policy.close()


def load(base, *, stage=None, model=FP32, freeze=True, **kwargs):
    if stage is not None:
        kwargs |= {"optimizer": OPTIMIZER, "total_steps": 8}
        kwargs["deepspeed"] = {"zero_optimization": {"stage": 0}}
        if stage:  # as shipped
            kwargs["deepspeed"] = json.loads(find_config(f"deepspeed/zero{stage}.json").read_text())
    kwargs = {"finetuning_type": "full", "freeze_vision_tower": freeze} | kwargs
    return Policy.load(base, model=model, lora=LoraConfig(r=4, lora_alpha=8), **kwargs)


def trees(seed=0):
    """One image, none, two images."""
    generator = torch.Generator().manual_seed(seed)
    grids = [((1, 4, 6),), (), ((1, 4, 4), (1, 6, 4))]
    return [tiny_vl.make_tree(generator, grids=g, name=str(i)) for i, g in enumerate(grids)]


def stock_loss(model, tree, weight):
    """-weight * sum of the responses' log-probs by transformers' own forward, a rollout at a time."""
    total = 0.0
    for branch in tree.branches:
        ids = torch.tensor([[*branch.prompt_ids, *branch.response_ids]])
        logits = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == tiny_vl.IMAGE).int(),
            pixel_values=tree.pixel_values,
            image_grid_thw=tree.image_grid_thw,
        ).logits
        n = len(branch.response_ids)
        logp = logits[0, -n - 1 : -1].log_softmax(-1).gather(1, ids[0, -n:, None])
        total = total - weight * logp.sum()
    return total


def stock(folder, freeze):
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    model.model.visual.requires_grad_(not freeze)
    return model


# -- gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("freeze", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("head", ["untied", "tied"])
def test_gradients_are_those_of_plain_autograd(base, tied, policies, freeze, checkpointing, head):
    folder = {"untied": base, "tied": tied}[head]
    model = ModelConfig(dtype="float32", gradient_checkpointing=checkpointing)
    policy = policies(folder, stage=0, model=model, freeze=freeze)
    assert policy.tower_frozen == freeze
    reference = stock(folder, freeze)
    for tree in trees():
        stock_loss(reference, tree, 0.01).backward()
        row = policy.with_image_features([pack_row([tree], policy.rope_index)])[0]
        policy.sft_backward(row, torch.full(row.targets.shape, 0.01))
    wanted = {canonical(n): p.grad for n, p in reference.named_parameters() if p.requires_grad}
    found = {canonical(n): p.grad for n, p in policy._trained().items()}
    assert found.keys() == wanted.keys()
    assert ("lm_head.weight" in found) == (head == "untied")
    assert all(float(grad.norm()) > 0 for grad in wanted.values())
    for name, grad in wanted.items():
        apart = float((found[name] - grad).norm() / grad.norm())
        assert apart < 1e-5 or name.endswith("k_proj.bias"), (name, apart)


def test_the_policy_loss_trains_the_head(base, policies):
    policy = policies(base, stage=0)
    row = pack_row(trees()[:1], policy.rope_index)
    advantages = torch.linspace(-1, 1, len(row.targets))
    weight = torch.full(row.targets.shape, 0.1)
    policy.backward(row, advantages=advantages, token_weight=weight, spec=PolicyLossSpec())
    # On-policy the ratio is 1 and its gradient that of the log-prob.
    reference = stock(base, True)
    inner = policies(base).module
    inner.model.load_state_dict(reference.state_dict())

    def head(hidden, w):
        logp = (hidden @ w.t()).log_softmax(-1).gather(1, row.targets[:, None])[:, 0]
        return -(weight * advantages * logp).sum()

    inner(row, head).backward()
    ours, theirs = policy.module.base.lm_head.weight.grad, inner.base.lm_head.weight.grad
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


# -- updates ---------------------------------------------------------------------------------------


def rows_of(policy, step):
    """Image and text; text alone; text first; image, text and two images."""
    one, none, two = [pack_row([tree], policy.rope_index) for tree in trees(100 + step)]
    return [[one, none], [none], [none, one], [one, none, two]][step % 4]


def run_steps(policy, steps, first=0):
    reports = []
    for step in range(first, first + steps):
        rows = rows_of(policy, step)
        total = sum(len(row.targets) for row in rows)
        loss = 0.0
        for row in rows:
            row = policy.with_image_features([row])[0]
            weights = torch.full((len(row.targets),), 1 / total)
            loss += policy.sft_backward(row, weights)["sum:loss"]
        reports.append({"loss": loss, **policy.step()})
    return reports


def reference_steps(policy, steps):
    """The same with AdamW on float32 masters; gradients of each row are rounded to the model's dtype."""
    live = {n: p for n, p in policy._named.items() if p.requires_grad}
    masters = {n: p.detach().float().clone() for n, p in live.items()}
    optimizer = torch.optim.AdamW(
        list(masters.values()), lr=OPTIMIZER.learning_rate, weight_decay=OPTIMIZER.weight_decay
    )
    reports = []
    for step in range(steps):
        rows = rows_of(policy, step)
        total, loss = sum(len(row.targets) for row in rows), 0.0
        for master in masters.values():
            master.grad = torch.zeros_like(master)
        for row in rows:
            row = policy.with_image_features([row])[0]

            def head(hidden, weight, row=row, total=total):
                logp, _ = linear_logprob(hidden, weight, row.targets, return_entropy=False)
                return -(logp / total).sum()

            part = policy._forward(row, head)
            part.backward()
            loss += float(part.detach())
            for name, param in live.items():
                if param.grad is not None:
                    masters[name].grad += param.grad.float()
                    param.grad = None
        norm = torch.nn.utils.clip_grad_norm_(masters.values(), OPTIMIZER.max_grad_norm)
        optimizer.param_groups[0]["lr"] = OPTIMIZER.learning_rate * _factor(step)
        optimizer.step()
        for name, param in live.items():
            param.data.copy_(masters[name])
        reports.append({"loss": loss, "grad_norm": float(norm)})
    return reports, masters


def _factor(step):
    from mmedx_fast.policy_engine import lr_factor

    return lr_factor(OPTIMIZER, 8)(step)


@pytest.fixture(scope="module")
def references(base):
    found = {}
    for name, model in (("float32", FP32), ("bfloat16", BF16)):
        policy = load(base, model=model, freeze=False)
        policy.module.train()
        found[name] = reference_steps(policy, 4)
        policy.close()
    return found


@pytest.mark.parametrize("model", [FP32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_update_is_adamw_on_float32_masters(base, policies, references, model, stage):
    policy = policies(base, stage=stage, model=model, freeze=False)
    reports = run_steps(policy, 4)
    wanted, masters = references[model.dtype]
    bound = 1e-5 if model.dtype == "float32" else 2e-3
    for ours, theirs in zip(reports, wanted, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=bound)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=10 * bound)
    state, _ = policy.state()
    moved = 0.0
    start = policies(base, freeze=False)
    for name, master in masters.items():
        value = state[f"param/{name}"]
        assert value.dtype == torch.float32
        if not name.endswith(KEY_BIAS):
            step = float((master - start._named[name]).norm())
            moved = max(moved, step)
            assert float((value - master).norm()) < (0.01 if bound == 1e-5 else 0.1) * step, name
    assert moved > 0.01
    live = dict(policy.weights())
    for name, value in live.items():
        assert value.dtype == getattr(torch, model.dtype)
        if f"param/{name}" in state:
            assert torch.equal(value, state[f"param/{name}"].to(value.dtype)), name


# -- state -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "stages"),
    [(FP32, (0, 0)), (BF16, (2, 2)), (FP32, (3, 1)), (BF16, (1, 3))],
    ids=["fp32-0", "bf16-2", "fp32-3-to-1", "bf16-1-to-3"],
)
def test_a_run_goes_on_from_a_sharded_checkpoint(base, policies, tmp_path, model, stages):
    policy = policies(base, stage=stages[0], model=model)
    run_steps(policy, 2)
    tensors, meta = policy.named_state()
    limit = 60_000
    folder = save_checkpoint(tmp_path, 2, tensors, meta, max_shard_size=limit)
    shards = sorted(folder.glob("state-*-of-*.safetensors"))
    assert len(shards) > 3
    largest = 4 * max(p.numel() for p in stock(base, True).parameters())
    assert max(file.stat().st_size for file in shards) < max(limit, largest) + 10_000
    unbroken = run_steps(policy, 2, first=2)
    final, _ = policy.state()
    policy.close()
    resumed = policies(base, stage=stages[1], model=model)
    run_steps(resumed, 1)  # nothing of this may survive
    _, saved, meta = load_latest(tmp_path)
    resumed.load_state(saved, meta)
    again, _ = resumed.state()
    assert again.keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in again.items())
    reports = run_steps(resumed, 2, first=2)
    if stages[0] == stages[1]:
        assert reports == unbroken
        assert all(torch.equal(value, final[key]) for key, value in resumed.state()[0].items())
    else:
        rel = 1e-5 if model is FP32 else 1e-2
        for ours, theirs in zip(reports, unbroken, strict=True):
            assert ours == pytest.approx(theirs, rel=rel)


def test_a_damaged_shard_sends_the_run_to_the_checkpoint_before(base, tmp_path):
    state = {f"w{i}": torch.full((100,), float(i)) for i in range(6)}
    for step in (1, 2):
        folder = save_checkpoint(tmp_path, step, iter(state.items()), {}, max_shard_size=900)
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    assert names == [f"state-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    data = bytearray((folder / names[1]).read_bytes())
    data[-3] ^= 1
    (folder / names[1]).write_bytes(bytes(data))
    with pytest.warns(UserWarning, match=names[1]):
        step, saved, _ = load_latest(tmp_path)
    assert step == 1 and dict(saved).keys() == state.keys()
    assert all(torch.equal(saved[name], value) for name, value in state.items())


def test_state_of_other_settings_is_refused(base, policies):
    source = policies(base, stage=0, freeze=False)
    run_steps(source, 1)
    tensors, meta = source.state()
    target = policies(base, stage=0)
    with pytest.raises(ValueError, match=r"gba\.freeze_vision_tower"):
        target.load_state(tensors, meta)
    kept = {k: v for k, v in tensors.items() if k.partition("/")[2] in target._trained()}
    kept["param/lm_head.weight"] = torch.zeros(3, 3)
    with pytest.raises(ValueError, match=r"param/lm_head.weight is \(3, 3\)"):
        target.load_state(kept, meta)


# -- the model on disk -----------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 3])
def test_transformers_loads_the_written_model(base, policies, tmp_path, stage):
    from transformers import AutoModelForImageTextToText

    shutil.copyfile(Path(__file__), base / "tokenizer_config.json")  # any file beside the weights
    policy = policies(base, stage=stage)
    run_steps(policy, 2)
    row = pack_row(trees(), policy.rope_index)
    wanted, _ = policy.logprobs(row, temperature=1.0)
    limit = 60_000
    policy.save_model(tmp_path / "model", max_shard_size=limit)
    files = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert "tokenizer_config.json" in files and "model.safetensors.index.json" in files
    assert not any(name.endswith(".part") for name in files)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensor_files(base).keys()
    sizes = {n: t.numel() * t.element_size() for n, t in policy.weights()}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    for file in set(index["weight_map"].values()):
        held = [sizes[n] for n, where in index["weight_map"].items() if where == file]
        assert sum(held) <= limit or len(held) == 1
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype=torch.float32)
    again = policies(tmp_path / "model")
    assert torch.equal(again.logprobs(row, temperature=1.0)[0], wanted)
    live = {canonical(name): value for name, value in policy.weights()}
    assert all(torch.equal(p, live[canonical(n)]) for n, p in model.named_parameters())
    before = dict(stock(base, True).named_parameters())
    for name, param in model.named_parameters():
        assert torch.equal(param, before[name]) == (".visual." in name), name


def test_tied_weights_are_written_once_and_stay_tied(tied, policies, tmp_path):
    policy = policies(tied, stage=0)
    run_steps(policy, 1)
    policy.save_model(tmp_path / "model")
    assert tensor_files(tmp_path / "model").keys() == tensor_files(tied).keys()
    model = stock(tmp_path / "model", True)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    live = dict(policy.weights())
    assert torch.equal(model.lm_head.weight, live["model.embed_tokens.weight"])


def test_the_start_is_the_base_with_the_adapter_added(base, policies, tmp_path):
    lora = policies(base, finetuning_type="lora", seed=3)
    generator = torch.Generator().manual_seed(11)
    for param in lora._adapter_params("default").values():
        param.data.normal_(0.0, 0.1, generator=generator)
    lora.save_adapter(tmp_path / "start")
    full = policies(base, adapter=tmp_path / "start")
    row = pack_row(trees(), full.rope_index)
    ours, theirs = (p.logprobs(row, temperature=1.0)[0] for p in (full, lora))
    plain = policies(base).logprobs(row, temperature=1.0)[0]
    assert (ours - theirs).abs().max() < 1e-4 < 0.1 < (ours - plain).abs().max()
    assert full.fingerprint == lora.fingerprint
    assert not any("lora" in name for name, _ in full.module.named_parameters())
    # bfloat16: the exact sum, rounded once.
    rounded = dict(policies(base, adapter=tmp_path / "start", model=BF16).weights())
    start = dict(stock(base, True).to(torch.bfloat16).named_parameters())
    keys = lora.adapter_tensors()
    for key, b in keys.items():
        if ".lora_B." not in key:
            continue
        name = key.removeprefix("base_model.model.").replace(".lora_B", "")
        delta = 2.0 * b.double() @ keys[key.replace("lora_B", "lora_A")].double()
        exact = start[name].double() + delta
        found = next(v for n, v in rounded.items() if canonical(n) == canonical(name))
        neighbours = (found.double() - exact).abs() <= exact.abs() * 2**-8 * 1.001
        assert neighbours.all()


def test_what_full_cannot_do_is_said(base, policies, tmp_path):
    from mmedx_fast.config import ConfigError, load_config

    with pytest.raises(ValueError, match="no reference"):
        load(base, reference=True)
    with pytest.raises(ConfigError, match=r"gba\.loss\.beta.*finetuning_type=lora"):
        load_config(None, ["gba.finetuning_type=full", "gba.loss.beta=0.1"])
    policy = policies(base, stage=0)
    row = pack_row(trees()[:1], policy.rope_index)
    with pytest.raises(ValueError, match="no other weights"):
        policy.logprobs(row, temperature=1.0, use="base")
    with pytest.raises(ValueError, match="save_model"):
        policy.save_adapter(tmp_path / "adapter")
    lora = policies(base, finetuning_type="lora")
    with pytest.raises(ValueError, match="adapter_tensors"):
        lora.save_model(tmp_path / "model")


def test_only_what_is_frozen_is_checked_at_the_end(base, policies):
    policy = policies(base, stage=0)
    frozen = policy.base_checksum()
    run_steps(policy, 1)
    assert policy.base_checksum() == frozen
    with torch.no_grad():
        next(policy.module.base.model.visual.parameters()).add_(1e-3)
    assert policy.base_checksum() != frozen
