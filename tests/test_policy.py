"""The policy on a tiny random model: exact against plain rows, resumable, never writes its base."""

import gc
import importlib.util
import itertools
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from mmedx_fast import lora_linear, policy_engine, swiglu
from mmedx_fast.config import LoraConfig, ModelConfig, OptimizerConfig
from mmedx_fast.ops import PolicyLossSpec, linear_logprob, token_weights
from mmedx_fast.policy import Policy, TreeMismatchError
from mmedx_fast.policy_adapter import AdapterError, base_fingerprint
from mmedx_fast.policy_engine import lr_factor
from mmedx_fast.tree import pack_row


def _helper(name):
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"helper_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny_vl = _helper("_tiny_vl")
test_attention = _helper("test_attention")
loop_kernel = test_attention.loop_kernel

# Dense, so that the model serves as its own reference: transformers' forward of an ordinary batch.
FP32 = ModelConfig(dtype="float32", attention="dense", gradient_checkpointing=False)
LORA = LoraConfig(r=4, lora_alpha=8)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, weight_decay=0.01)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_vl.save(tmp_path_factory.mktemp("model") / "tiny-vl")


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """A starting adapter whose delta is far from zero."""
    folder = tmp_path_factory.mktemp("adapter") / "start"
    policy = load(base, seed=3)
    generator = torch.Generator().manual_seed(11)
    for param in policy._adapter_params("default").values():
        param.data.normal_(0.0, 0.1, generator=generator)
    policy.save_adapter(folder)
    policy.close()
    return folder


@pytest.fixture
def policies():
    """Makes policies and closes them, so that engines do not pile up."""
    made = []

    def make(*args, **kwargs):
        made.append(load(*args, **kwargs))
        return made[-1]

    yield make
    for policy in made:
        if hasattr(policy, "module"):
            policy.close()


def load(base, *, train=False, stage=0, model=FP32, **kwargs):
    if train:
        kwargs = {"optimizer": OPTIMIZER, "total_steps": 8} | kwargs
        kwargs["deepspeed"] = {"zero_optimization": {"stage": stage}}
    return Policy.load(base, model=model, lora=LORA, **kwargs)


def trees(seed=0, **kwargs):
    """Three questions: one image, none, two images."""
    generator = torch.Generator().manual_seed(seed)
    grids = [((1, 4, 6),), (), ((1, 4, 4), (1, 6, 4))]
    return [
        tiny_vl.make_tree(generator, grids=g, name=str(i), **kwargs) for i, g in enumerate(grids)
    ]


def plain_rows(policy, questions):
    """One row per rollout, in the flat order of the branches."""
    return [
        pack_row([replace(tree, branches=(branch,))], policy.rope_index)
        for tree in questions
        for branch in tree.branches
    ]


def stock_logprobs(policy, questions, temperature=1.0):
    """transformers' own forward of each whole rollout, float32 log_softmax of its logits."""
    out = []
    for tree in questions:
        for branch in tree.branches:
            ids = torch.tensor([[*branch.prompt_ids, *branch.response_ids]])
            with torch.no_grad():
                logits = policy.module.model(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    mm_token_type_ids=(ids == tiny_vl.IMAGE).int(),
                    pixel_values=tree.pixel_values,
                    image_grid_thw=tree.image_grid_thw,
                ).logits
            n = len(branch.response_ids)
            logp = (logits[0, -n - 1 : -1] / temperature).log_softmax(-1)
            out.append(logp.gather(1, ids[0, -n:, None])[:, 0])
    return torch.cat(out)


def gradients(policy):
    params = policy._adapter_params("default")
    grads = {name: param.grad.clone() for name, param in params.items()}
    for param in params.values():
        param.grad = None
    return grads


def relative(ours, theirs):
    apart = sum((ours[name] - theirs[name]).square().sum() for name in theirs)
    return float((apart / sum(grad.square().sum() for grad in theirs.values())).sqrt())


# -- a row equals its rollouts one by one ----------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (4, 1), (3, 2)], ids=str)
def test_logprobs_equal_stock_rows(base, adapter, policies, shape):
    policy = policies(base, adapter=adapter)
    questions = trees(guidelines=shape[0], generations=shape[1])
    row = pack_row(questions, policy.rope_index)
    logprob, entropy = policy.logprobs(row, temperature=0.7)
    apart = stock_logprobs(policy, questions, 0.7)
    assert (logprob - apart).abs().max() < 1e-5
    assert logprob.dtype == entropy.dtype == torch.float32
    assert (entropy >= 0).all()
    for tree in questions:
        assert policy.verify_tree(tree)["max"] < 1e-5


def test_qwen2_vl_too(tmp_path, policies):
    policy = policies(tiny_vl.save(tmp_path / "two", "qwen2_vl"))
    questions = trees(1)
    row = pack_row(questions, policy.rope_index)
    logprob, _ = policy.logprobs(row, temperature=1.0)
    assert (logprob - stock_logprobs(policy, questions)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("checkpointing", "backend"),
    list(itertools.product((False, True), ("dense", "varlen", "flash", "flex"))),
    ids=str,
)
def test_gradients_equal_plain_rows(base, adapter, policies, checkpointing, backend):
    model = replace_config(FP32, gradient_checkpointing=checkpointing, attention=backend)
    # With checkpointing the CPU's own kernel where it has one, without it an independent one.
    own = checkpointing and backend in ("dense", "varlen")
    kernel = None if own else test_attention.INJECTED[backend]
    policy = policies(base, train=True, adapter=adapter, model=model, attention_kernel=kernel)
    questions = trees(2)
    row = pack_row(questions, policy.rope_index)
    weights = torch.randn(len(row.targets)) / len(row.targets)
    metrics = policy.sft_backward(row, weights)
    together = gradients(policy)
    plain = policies(base, train=True, adapter=adapter)
    loss = 0.0
    for index, single in enumerate(plain_rows(plain, questions)):
        mine = weights[row.branch_index == index]
        loss += plain.sft_backward(single, mine)["sum:loss"]
    assert metrics["sum:loss"] == pytest.approx(loss, abs=1e-5)
    assert relative(together, gradients(plain)) < 1e-5


def replace_config(config, **changes):
    return config.model_copy(update=changes)


def test_on_a_cpu_the_mlps_compute_again_in_the_backward(base, policies):
    policy = policies(base, train=True)
    layers = policy.module.base.model.language_model.layers
    assert all(layer.mlp.forward.__func__ is swiglu._forward for layer in layers)


def test_the_adapters_are_fused_with_their_layers(base, policies):
    layers = policies(base, train=True)._layers
    assert layers and all(layer.forward.__func__ is lora_linear._forward for layer in layers)


def test_policy_loss_gradient_equals_plain_autograd(base, adapter, policies):
    policy = policies(base, train=True, adapter=adapter)
    questions = trees(4)
    row = pack_row(questions, policy.rope_index)
    n = len(row.targets)
    logprob, _ = policy.logprobs(row, temperature=0.9)
    old, ref = logprob + 0.3 * torch.randn(n), logprob + 0.2 * torch.randn(n)
    rollout, advantages = old + 0.1 * torch.randn(n), torch.randn(n)
    spec = PolicyLossSpec(
        beta=0.1,
        epsilon_high=0.28,
        temperature=0.9,
        importance_sampling_correction="token_truncate",
        importance_sampling_clip_max=2.0,
        use_bias_correction_kl=False,
    )
    weights = token_weights(row.branch_index, "dapo")
    metrics = policy.backward(
        row,
        advantages=advantages,
        token_weight=weights,
        spec=spec,
        old_logprob=old,
        ref_logprob=ref,
        rollout_logprob=rollout,
    )
    ours = gradients(policy)

    def head(hidden, weight):
        return linear_logprob(hidden, weight, row.targets, temperature=0.9)[0]

    logp = policy.module(row, head)
    ratio = (logp - old).exp()
    clipped = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
    kl = (ref - logp).exp() - (ref - logp) - 1
    loss = (weights * (-clipped * (old - rollout).exp().clamp(max=2.0) + 0.1 * kl)).sum()
    loss.backward()
    assert metrics["sum:loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert relative(ours, gradients(policy)) < 1e-5


def test_vision_features_computed_once_change_nothing(base, adapter, policies):
    policy = policies(base, train=True, adapter=adapter)
    row = pack_row(trees(5), policy.rope_index)
    shared = policy.with_image_features([row])[0]
    assert shared.pixel_values is None and shared.image_features.shape == (6 + 4 + 6, 64)
    calls = []
    policy.module.base.model.visual.register_forward_hook(lambda *_: calls.append(1))
    ours, _ = policy.logprobs(shared, temperature=1.0)
    weights = torch.ones(len(row.targets))
    policy.sft_backward(shared, weights)
    ours_grad = gradients(policy)
    assert not calls
    theirs, _ = policy.logprobs(row, temperature=1.0)
    policy.sft_backward(row, weights)
    assert len(calls) == 2
    assert torch.equal(ours, theirs)
    assert relative(ours_grad, gradients(policy)) < 1e-6


def test_banned_ids_leave_the_distribution(base, policies):
    banned = [3, tiny_vl.IMAGE]
    policy = policies(base, banned_token_ids=banned)
    row = pack_row(trees(6), policy.rope_index)
    free, _ = policies(base).logprobs(row, temperature=1.0)

    def head(hidden, weight):
        return (hidden @ weight.T).log_softmax(-1)[:, banned].exp().sum(-1)

    with torch.no_grad():
        lost = policy.module(row, head)
    logprob, _ = policy.logprobs(row, temperature=1.0)
    kept = ~torch.isin(row.targets, torch.tensor(banned))
    torch.testing.assert_close(logprob[kept], (free - (1 - lost).log())[kept], rtol=1e-4, atol=1e-5)
    assert torch.isneginf(logprob[~kept]).all()


def test_self_check_sees_a_kernel_that_aligns_causality_at_the_top_left(base, policies):
    def wrong(query, key, value, cu_q, cu_k, *args, **kwargs):
        out = []
        for i in range(len(cu_q) - 1):
            parts = (
                query[cu_q[i] : cu_q[i + 1]],
                *(x[cu_k[i] : cu_k[i + 1]] for x in (key, value)),
            )
            out.append(
                torch.nn.functional.scaled_dot_product_attention(
                    *(x.transpose(0, 1) for x in parts), is_causal=True, enable_gqa=True
                )
            )
        return torch.cat(out, dim=1).transpose(0, 1)

    model = replace_config(FP32, attention="varlen")
    good = policies(base, model=model, attention_kernel=loop_kernel)
    assert good.verify_tree(trees()[0])["max"] < 1e-5
    bad = policies(base, model=model, attention_kernel=wrong)
    with pytest.raises(TreeMismatchError, match=r"max .* \(allowed 0.001\)"):
        bad.verify_tree(trees()[0])


def test_bfloat16_base_trains_float32_adapters(base, adapter, policies):
    model = ModelConfig(dtype="bfloat16", gradient_checkpointing=True)
    policy = policies(base, train=True, adapter=adapter, model=model, stage=2)
    for tree in trees():
        policy.verify_tree(tree)
    before = policy.adapter_tensors()
    row = pack_row(trees(), policy.rope_index)
    policy.sft_backward(row, torch.ones(len(row.targets)) / len(row.targets))
    assert math.isfinite(policy.step()["grad_norm"])
    after = policy.adapter_tensors()
    assert all(value.dtype == torch.float32 for value in after.values())
    assert all(not torch.equal(after[name], before[name]) for name in before)
    # The same base in another precision is the same base.
    assert policy.fingerprint == policies(base).fingerprint


# -- training --------------------------------------------------------------------------------------


def run_steps(policy, steps, first=0):
    """SFT and RL passes over two rows an update; returns what each update reported."""
    reports = []
    for step in range(first, first + steps):
        rows = [pack_row([tree], policy.rope_index) for tree in trees(100 + step)[:2]]
        total = sum(len(row.targets) for row in rows)
        loss = 0.0
        for row in rows:
            weights = torch.full((len(row.targets),), 1 / total)
            advantages = torch.linspace(-1, 1, len(row.targets))
            loss += policy.sft_backward(row, weights)["sum:loss"]
            loss += policy.backward(
                row, advantages=advantages, token_weight=weights, spec=PolicyLossSpec()
            )["sum:loss"]
        reports.append({"loss": loss, **policy.step()})
    return reports


@pytest.fixture(scope="module")
def six_steps(base, adapter):
    policy = load(base, train=True, adapter=adapter, reference=True)
    row = pack_row(trees(7), policy.rope_index)
    checksum = policy.base_checksum()
    start, _ = policy.logprobs(row, temperature=1.0)
    reports = run_steps(policy, 6)
    result = {
        "reports": reports,
        "adapter": policy.adapter_tensors(),
        "state": policy.state(),
        "row": row,
        "start": start,
        "after": policy.logprobs(row, temperature=1.0)[0],
        "reference": policy.logprobs(row, temperature=1.0, use="reference")[0],
        "base": policy.logprobs(row, temperature=1.0, use="base")[0],
        "checksums": (checksum, policy.base_checksum()),
    }
    policy.close()
    return result


def test_training_learns_and_keeps_base_and_reference(base, adapter, policies, six_steps):
    first, last = six_steps["reports"][0], six_steps["reports"][-1]
    assert last["loss"] < first["loss"]
    assert first["grad_norm"] > OPTIMIZER.max_grad_norm
    assert six_steps["checksums"][0] == six_steps["checksums"][1]
    assert torch.equal(six_steps["reference"], six_steps["start"])
    assert not torch.allclose(six_steps["after"], six_steps["start"], atol=1e-2)
    bare = policies(base)
    expected, _ = bare.logprobs(six_steps["row"], temperature=1.0)
    torch.testing.assert_close(six_steps["base"], expected, rtol=0, atol=1e-6)
    # Without a starting adapter the reference is the base.
    assert torch.equal(
        bare.logprobs(six_steps["row"], temperature=1.0, use="reference")[0], expected
    )


def test_an_update_is_torch_adamw_on_clipped_gradients(base, adapter, policies):
    policy = policies(base, train=True, adapter=adapter)
    row = pack_row(trees(8), policy.rope_index)
    policy.sft_backward(row, torch.ones(len(row.targets)))
    names = list(policy._adapter_params("default"))
    params = [policy._adapter_params("default")[name].detach().clone() for name in names]
    grads = [policy._adapter_params("default")[name].grad.clone() for name in names]
    report = policy.step()
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    assert report["grad_norm"] == pytest.approx(float(torch.nn.utils.clip_grad_norm_(params, 1.0)))
    # warm-up of one update: half the rate
    assert report["learning_rate"] == pytest.approx(5e-3)
    torch.optim.AdamW(params, lr=5e-3, weight_decay=0.01).step()
    for name, param in zip(names, params, strict=True):
        torch.testing.assert_close(policy.adapter_tensors()[name], param, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resumed_run_equals_unbroken_run_and_stages_agree(
    base, adapter, policies, stage, six_steps
):
    policy = policies(base, train=True, adapter=adapter, stage=stage)
    checksum = policy.base_checksum()
    begun = run_steps(policy, 3)
    tensors, meta = policy.state()
    assert json.loads(json.dumps(meta)) == meta and meta["optimizer_step"] == 3
    assert all(value.is_contiguous() and value.device.type == "cpu" for value in tensors.values())
    unbroken = run_steps(policy, 3, first=3)
    final = policy.adapter_tensors()
    assert policy.base_checksum() == checksum
    policy.close()
    # Another seed: nothing of the new adapter may survive the load.
    resumed = policies(base, train=True, stage=stage, seed=99)
    resumed.load_state(tensors, meta)
    assert run_steps(resumed, 3, first=3) == unbroken
    assert all(torch.equal(value, final[name]) for name, value in resumed.adapter_tensors().items())
    for ours, theirs in zip(begun + unbroken, six_steps["reports"], strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4)


def test_state_moves_between_zero_stages(base, adapter, policies, six_steps):
    source = policies(base, train=True, adapter=adapter, stage=2)
    run_steps(source, 3)
    state = source.state()
    source.close()
    target = policies(base, train=True, stage=0)
    target.load_state(*state)
    again = target.state()
    assert again[1] == state[1]
    assert all(torch.equal(again[0][key], value) for key, value in state[0].items())
    for ours, theirs in zip(run_steps(target, 3, first=3), six_steps["reports"][3:], strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_step_without_finite_norm_is_skipped(base, adapter, policies, stage):
    policy = policies(base, train=True, adapter=adapter, stage=stage)
    row = pack_row(trees(9)[:1], policy.rope_index)
    weights = torch.ones(len(row.targets))
    before = policy.state()
    policy.sft_backward(row, weights * torch.inf)
    report = policy.step()
    assert report["skipped"] == 1.0 and math.isnan(report["grad_norm"])
    after = policy.state()
    assert after[1] == before[1] | {"scheduler_step": before[1]["scheduler_step"] + 1}
    assert all(torch.equal(after[0][key], value) for key, value in before[0].items())
    policy.sft_backward(row, weights)
    assert policy.step()["skipped"] == 0.0
    assert all(torch.isfinite(value).all() for value in policy.adapter_tensors().values())


def test_four_policies_one_after_the_other_leave_no_memory_behind(base):
    def live():
        gc.collect()
        return sum(
            x.nbytes for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)
        )

    sizes = [live()]
    linear = torch.nn.functional.linear
    for stage in (0, 2, 3, 0):
        policy = load(base, train=True, stage=stage)
        run_steps(policy, 1)
        held = live() - sizes[0]
        policy.close()
        del policy
        sizes.append(live())
        assert torch.nn.functional.linear is linear  # ZeRO-3 has one of its own
    assert held > 500_000
    assert max(sizes) - sizes[0] < 20_000, sizes


def test_the_environment_says_no_local_rank_once_the_last_policy_is_closed(base, monkeypatch):
    """accelerate would take it for a launch of several processes."""
    monkeypatch.setattr(policy_engine, "_borrowers", 0)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    first = load(base, train=True)
    second = load(base, train=True)
    assert os.environ["LOCAL_RANK"] == "0"
    first.close()
    assert os.environ["LOCAL_RANK"] == "0"
    second.close()
    assert "LOCAL_RANK" not in os.environ
    with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="no engine"):
        broken.setattr("deepspeed.initialize", Mock(side_effect=RuntimeError("no engine")))
        load(base, train=True)
    assert "LOCAL_RANK" not in os.environ
    monkeypatch.setenv("LOCAL_RANK", "3")  # a launcher's stays
    load(base, train=True).close()
    assert os.environ["LOCAL_RANK"] == "3"


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_schedule(kind):
    factor = lr_factor(OptimizerConfig(lr_scheduler_type=kind, warmup_ratio=0.2), 20)
    values = [factor(step) for step in range(20)]
    assert values[:4] == [0.2, 0.4, 0.6, 0.8] and values[4] == 1.0
    expected = {"constant": 1.0, "linear": 0.5, "cosine": 0.5}[kind]
    assert values[12] == pytest.approx(expected)
    assert all(value > 0 for value in values)


# -- adapters on disk ------------------------------------------------------------------------------


def test_peft_loads_the_adapter_and_agrees(base, adapter, policies, tmp_path):
    import peft
    from transformers import AutoModelForImageTextToText

    policy = policies(base, train=True, adapter=adapter, stage=1)
    run_steps(policy, 1)
    folder = tmp_path / "out"
    policy.save_adapter(folder)
    policy.save_adapter(folder)  # an existing adapter is replaced
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    questions = trees(10)
    row = pack_row(questions, policy.rope_index)
    ours, _ = policy.logprobs(row, temperature=1.0)
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    stock = peft.PeftModel.from_pretrained(model, folder).eval()
    policy.module.model = stock
    assert (ours - stock_logprobs(policy, questions)).abs().max() < 1e-5
    again, _ = policies(base, adapter=folder).logprobs(row, temperature=1.0)
    torch.testing.assert_close(again, ours, rtol=0, atol=1e-6)
    assert json.loads((folder / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(base)


def test_adapter_of_another_base_is_refused(base, adapter, tmp_path):
    other = tiny_vl.save(tmp_path / "other-model", seed=5)
    with pytest.raises(AdapterError, match="another|belongs to") as caught:
        load(other, adapter=adapter)
    assert "tiny-vl" in str(caught.value) and "other-model" in str(caught.value)
    # Without our note PEFT's own record of the base's name decides.
    copy = tmp_path / "foreign"
    copy.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (copy / name).write_bytes((adapter / name).read_bytes())
    with pytest.raises(AdapterError, match="tiny-vl.*other-model"):
        load(other, adapter=copy)
    load(base, adapter=copy).close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 8}, r"lora_A.*is \(4, 64\), the model needs \(8, 64\)"),
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"peft_type": "LOHA"}, "only LORA adapters"),
        ({"target_modules": ".*language_model.*q_proj"}, r"0 keys missing \[\], \d+ unknown"),
    ],
    ids=["rank", "dora", "type", "targets"],
)
def test_adapters_that_do_not_fit(base, adapter, tmp_path, change, message):
    for path in adapter.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(AdapterError, match=message):
        load(base, adapter=tmp_path)


def test_damaged_adapter_files(base, adapter, tmp_path):
    with pytest.raises(AdapterError, match="holds no adapter"):
        load(base, adapter=tmp_path)
    for path in adapter.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(AdapterError, match="adapter_model.safetensors is damaged"):
        load(base, adapter=tmp_path)


def test_fingerprint_sees_one_changed_weight_matrix():
    weights = {"a": torch.randn(40, 30), "b": torch.randn(7)}
    same = {name: weights[name] for name in ("b", "a")}
    assert base_fingerprint(weights.items()) == base_fingerprint(same.items())
    half = {name: value.bfloat16() for name, value in weights.items()}
    assert base_fingerprint(weights.items()) == base_fingerprint(half.items())
    changed = weights | {"a": weights["a"] * 1.01}
    assert base_fingerprint(weights.items()) != base_fingerprint(changed.items())


# -- bad input -------------------------------------------------------------------------------------


def test_bad_settings_are_named(base, tmp_path):
    with pytest.raises(ValueError, match="no model at .*nowhere; model.offline"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="deepspeed.bf16 is decided by model.dtype"):
        Policy.load(
            base, model=FP32, lora=LORA, optimizer=OPTIMIZER, deepspeed={"bf16": {"enabled": True}}
        )
    with pytest.raises(ValueError, match="needs a stage from 0 to 3.*'stage': 4"):
        load(base, train=True, stage=4)
    with pytest.raises(ValueError, match="lora.target_modules = 'no_such_layer'"):
        Policy.load(base, model=FP32, lora=LoraConfig(target_modules="no_such_layer"))
    with pytest.raises(ValueError, match="lm_head"):
        Policy.load(base, model=FP32, lora=LoraConfig(target_modules="lm_head"))


def test_incomplete_base_is_refused(base, tmp_path):
    from safetensors.torch import load_file, save_file

    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    tensors = load_file(base / "model.safetensors")
    tensors.pop("lm_head.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match="1 weights are missing or misshapen, such as lm_head.weight"
    ):
        load(tmp_path)


def test_misuse_is_an_error(base, policies):
    policy = policies(base)
    row = pack_row(trees()[:1], policy.rope_index)
    with pytest.raises(RuntimeError, match="without an optimizer"):
        policy.sft_backward(row, torch.ones(len(row.targets)))
    with pytest.raises(ValueError, match="use must be"):
        policy.logprobs(row, temperature=1.0, use="teacher")
    trained = policies(base, train=True)
    with pytest.raises(
        ValueError, match=r"token_weight has shape \(3,\) but the row has \d+ targets"
    ):
        trained.sft_backward(row, torch.ones(3))
    with pytest.raises(RuntimeError, match="without a backward"):
        trained.step()
    tensors, meta = trained.state()
    with pytest.raises(ValueError, match="belongs to base weights"):
        trained.load_state(tensors, meta | {"base_fingerprint": "x"})
    with pytest.raises(ValueError, match="1 keys differ"):
        trained.load_state(dict(list(tensors.items())[1:]), meta)
    with pytest.raises(ValueError, match="optimizer_step must be an integer, got None"):
        trained.load_state(tensors, {"base_fingerprint": trained.fingerprint})
