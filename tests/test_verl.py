"""Our ops against verl's own functions, and in the places where verl calls them."""

import socket
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from mmedx_fast.integrations import _verl_losses as losses
from mmedx_fast.integrations import verl as ours

needs_verl = pytest.mark.skipif(
    find_spec("verl") is None,
    reason="verl is not installed: pip install --no-deps --target .venv/verl -r requirements/verl.txt, "
    "rm -r .venv/verl/{tests,scripts}, PYTHONPATH=.venv/verl pytest tests/test_verl.py",
)


@pytest.fixture
def core(monkeypatch):
    """verl's algorithms, whose registries are put back."""
    import verl.trainer.ppo.core_algos as core

    for name in ("ADV_ESTIMATOR_REGISTRY", "POLICY_LOSS_REGISTRY"):
        monkeypatch.setattr(core, name, dict(getattr(core, name)))
    return core


# Advantages


def batch_of(sizes=(2, 5, 3, 4), length=7, seed=0):
    """Rewards [B, R] on the last token, a mask of uneven lengths, and uids unsorted and uneven."""
    g = torch.Generator().manual_seed(seed)
    rows = sum(sizes)
    lengths = torch.randint(1, length + 1, (rows,), generator=g)
    mask = (torch.arange(length) < lengths[:, None]).long()
    rewards = torch.zeros(rows, length)
    rewards[torch.arange(rows), lengths - 1] = torch.randn(rows, generator=g) * 3
    uids = np.array([f"uid-{k}" for k, n in enumerate(sizes) for _ in range(n)], dtype=object)
    return rewards, mask, uids[torch.randperm(rows, generator=g).numpy()]


@needs_verl
@pytest.mark.parametrize("normalise", [True, False])
def test_one_guideline_is_verls_grpo(core, normalise):
    rewards, mask, uids = batch_of()
    want, _ = core.compute_grpo_outcome_advantage(
        rewards, mask, uids, norm_adv_by_std_in_grpo=normalise
    )
    config = {"norm_adv_by_std_in_grpo": normalise}
    got, returns = ours.gba_advantage(rewards, mask, uids, config=config)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert returns is got and got.dtype == torch.float32


@needs_verl
def test_leave_one_out_is_verls_rloo(core):
    rewards, mask, uids = batch_of()
    want, _ = core.compute_rloo_outcome_advantage(rewards, mask, uids)
    config = {"gba": {"baseline": "leave_one_out", "scale": "none"}}
    got, _ = ours.gba_advantage(rewards, mask, uids, config=config)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    rewards, mask, uids = batch_of(sizes=(1, 3, 1))
    want, _ = core.compute_rloo_vectorized_outcome_advantage(rewards, mask, uids)
    got, _ = ours.gba_advantage(rewards, mask, uids, config=config)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@needs_verl
def test_normalise_then_sum_and_whiten_is_verls_gdpo_where_verl_calls_it(core):
    """Through verl's own compute_advantage, which gives the columns to 'gdpo' alone."""
    from omegaconf import OmegaConf
    from verl import DataProto
    from verl.trainer.ppo.ray_trainer import compute_advantage

    rewards, mask, uids = batch_of()
    g = np.random.default_rng(0)
    columns = {name: g.normal(size=len(uids)) for name in ("accuracy", "format")}
    tensors = {
        "token_level_rewards": rewards,
        "response_mask": mask,
        "prompts": torch.zeros(len(uids), 3),
        "attention_mask": torch.cat([torch.ones(len(uids), 3).long(), mask], 1),
    }
    algorithm = {
        "adv_estimator": "gdpo",
        "gdpo_reward_keys": ["accuracy", "format"],
        "gdpo_reward_weights": [1.0, 0.3],
        "gba": {"combine": "normalize_then_sum", "scale": "none", "whiten": True},
    }

    def advantages():
        data = DataProto.from_dict(tensors=tensors, non_tensors={"uid": uids, **columns})
        return compute_advantage(data, "gdpo", config=OmegaConf.create(algorithm)).batch[
            "advantages"
        ]

    want = advantages()
    ours.register(as_gdpo=True)
    torch.testing.assert_close(advantages(), want, rtol=1e-6, atol=2e-6)
    algorithm["gba"]["whiten"] = False
    assert not torch.allclose(advantages(), want, atol=1e-2)


def formula(rewards, questions, guidelines, eps):
    """The docstring's formula of kernels/advantage.py, in float64 and by hand."""
    out = []
    for r, q, k in zip(rewards, questions, guidelines, strict=True):
        p = np.array([x for x, a in zip(rewards, questions, strict=True) if a == q])
        pk = np.array(
            [x for x, a, b in zip(rewards, questions, guidelines, strict=True) if (a, b) == (q, k)]
        )
        sd_p, sd_pk = (x.std(ddof=1) if len(x) > 1 else 0.0 for x in (p, pk))
        out.append((r - pk.mean()) / (sd_pk + eps) + (pk.mean() - p.mean()) / (sd_p + eps))
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("form", ["text", "pair"])
def test_uids_carry_question_and_guideline(form):
    rewards, mask, uids = batch_of(sizes=(6, 7, 5))
    guidelines = np.random.default_rng(1).choice(["bayesian", "intuitive", "analytic"], len(uids))
    index = np.empty(len(uids), dtype=object)
    for row, (q, k) in enumerate(zip(uids, guidelines, strict=True)):
        index[row] = f"{q}::{k}" if form == "text" else (q, str(k))
    want = formula(rewards.sum(1).double().tolist(), uids.tolist(), guidelines.tolist(), 1e-6)
    got, _ = ours.gba_advantage(rewards, mask, index)
    torch.testing.assert_close(got.double(), want[:, None] * mask, rtol=1e-5, atol=1e-5)
    # a permutation of the rows permutes the advantages
    order = torch.randperm(len(uids))
    moved, _ = ours.gba_advantage(rewards[order], mask[order], index[order.numpy()])
    torch.testing.assert_close(moved, got[order])
    weights = {"bayesian": 2.0, "intuitive": 1.0, "analytic": 0.5}
    config = {"gba": {"guideline_weights": weights}}
    weighted, _ = ours.gba_advantage(rewards, mask, index, config=config)
    factor = torch.tensor([weights[k] for k in guidelines])
    torch.testing.assert_close(weighted, got * factor[:, None])


def test_columns_name_question_guideline_and_scores():
    rewards, mask, uids = batch_of(sizes=(6, 6))
    guidelines = ["a", "b", "b"] * 4
    scores = np.array([None, 1.0] + [0.25 * row for row in range(10)], dtype=object)
    columns = {
        "uid": uids,
        "score": scores,
        "extra_info": np.array([{"q": q, "k": k} for q, k in zip(uids, guidelines, strict=True)]),
    }
    config = {
        "gdpo_reward_keys": ["score"],
        "gba": {"question_key": "q", "guideline_key": "k", "eps": 1e-4},
    }
    got, _ = ours.gba_advantage(rewards, mask, uids, config=config, non_tensor_batch=columns)
    keep = list(range(1, 12))  # None: does not apply, and stays out of every statistic
    want = formula([scores[i] for i in keep], uids[1:], guidelines[1:], 1e-4)
    torch.testing.assert_close(got[1:].double(), want[:, None] * mask[1:], rtol=1e-5, atol=1e-5)
    assert not got[0].any()


@pytest.mark.parametrize(
    ("config", "columns", "index", "message"),
    [
        ({"gba": {"sclae": "group"}}, None, None, r"algorithm\.gba\.sclae is not known.*scale"),
        ({"gba": {"question_key": "q"}}, None, None, "question_key and guideline_key together"),
        (
            {"gba": {"scale": "group"}, "norm_adv_by_std_in_grpo": False},
            None,
            None,
            "scale='group' contradict",
        ),
        (
            {"gdpo_reward_keys": ["x"]},
            None,
            None,
            r"\['x'\] has no effect.*register\(as_gdpo=True\)",
        ),
        (
            {"gba": {"question_key": "q", "guideline_key": "k"}},
            None,
            None,
            r"question_key='q' cannot be read.*as_gdpo",
        ),
        ({"gdpo_reward_keys": ["x"]}, {"uid": []}, None, r"names 'x'.*\(uid\).*use_v1=false"),
        (
            {"gdpo_reward_keys": ["x"], "use_kl_in_reward": True},
            {"x": [1, 2, 3]},
            None,
            "use_kl_in_reward=true",
        ),
        (
            {"gdpo_reward_keys": ["x"], "gdpo_reward_weights": [1, 2]},
            {"x": [1, 2, 3]},
            None,
            r"gdpo_reward_weights=\[1, 2\]",
        ),
        ({}, None, ["q::a", "q", "q"], r"uid\[1\] = 'q' and uid\[0\] = 'q::a'"),
        ({}, None, ["q"], "must have 3 entries.*: 1"),
        ({}, None, "none", "must have 3 entries.*: none"),
        (
            {"gba": {"guideline_weights": {"a": 1}}},
            None,
            ["q::a", "q::b", "q::a"],
            "for 'b'.*has a",
        ),
    ],
)
def test_what_does_not_fit_is_named(config, columns, index, message):
    index = None if index == "none" else index or ["q::a"] * 3
    with pytest.raises(ValueError, match=message):
        ours.gba_advantage(
            torch.ones(3, 2), torch.ones(3, 2), index, config=config, non_tensor_batch=columns
        )


def test_uids_of_a_batch_and_what_is_refused():
    uids = ours.guideline_uids(["x", "y", "x", "y"], ["a", "a", "b", "b"])
    heads = [uid.rsplit("::", 1)[0] for uid in uids]
    assert heads[0] == heads[2] != heads[1] == heads[3] and len(set(uids)) == 4
    assert not any("_" in uid for uid in uids)
    with pytest.raises(ValueError, match="row 1: question 'x' comes twice under guideline 'a'"):
        ours.guideline_uids(["x", "x"], ["a", "a"])
    with pytest.raises(ValueError, match="guideline 'a_b' of row 0"):
        ours.guideline_uids(["x"], ["a_b"])


@needs_verl
def test_verls_v1_trainer_writes_uids_that_gba_reads(core, monkeypatch):
    """Its own fetching of a batch, and its own call of the estimator."""
    pytest.importorskip("transfer_queue", reason="TransferQueue, which verl's V1 trainer needs")
    from omegaconf import OmegaConf
    from verl import DataProto
    from verl.trainer.ppo.v1 import PPOTrainer, PPOTrainerSync
    from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories

    monkeypatch.setattr(PPOTrainer, "_fetch_one_gen_batch", PPOTrainer._fetch_one_gen_batch)
    for _ in range(2):
        ours.use_guideline_uids(PPOTrainer, "question", "guideline")
    trainer = object.__new__(PPOTrainerSync)
    extra = [{"guideline": k} for k in ("a", "b", "a", "b")]
    data = {
        "raw_prompt": np.array(["p"] * 4, dtype=object),
        "question": torch.tensor([[1], [1], [2], [2]])[:, 0],
        "extra_info": np.array(extra, dtype=object),
    }
    trainer.train_dataloader, trainer.train_dataloader_it = [data], iter([dict(data)])
    uids = [str(uid) for uid in trainer._fetch_one_gen_batch()["uid"]]
    assert [uid.rsplit("::")[1] for uid in uids] == ["a", "b", "a", "b"]
    assert uids[0].split("::")[0] == uids[1].split("::")[0] != uids[2].split("::")[0]

    rewards, mask, _ = batch_of(sizes=(12,))
    index = np.array(uids * 3, dtype=object)
    data = DataProto.from_dict(
        tensors={"token_level_rewards": rewards, "response_mask": mask}, non_tensors={"uid": index}
    )
    ours.register()
    done = compute_advantage_for_multi_trajectories(
        data, [f"{uid}_{row}_0" for row, uid in enumerate(index)], "gba", config=OmegaConf.create()
    )
    questions, guidelines = zip(*(uid.split("::") for uid in index), strict=True)
    want = formula(rewards.sum(1).double().tolist(), questions, guidelines, 1e-6)
    got = done.batch["advantages"].double()
    torch.testing.assert_close(got, want[:, None] * mask, rtol=1e-5, atol=1e-5)

    extra = np.array([{"other": 1}], dtype=object)
    trainer.train_dataloader_it = iter(
        [{"raw_prompt": np.array(["p"], dtype=object), "extra_info": extra}]
    )
    with pytest.raises(ValueError, match="row 0 of the batch has no 'question' in extra_info"):
        trainer._fetch_one_gen_batch()


# Policy losses


def log_probs(seed=0, rows=5, length=9):
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(rows, length, generator=g) * 4
    log_prob = old + 0.6 * torch.randn(rows, length, generator=g)
    log_prob[0, 0] = old[0, 0] + 25  # beyond verl's bound of a log-ratio
    log_prob[0, 1] = old[0, 1] - 25.5
    log_prob[1] += 0.7  # sequences whose mean ratio is clipped
    log_prob[2] -= 0.9
    log_prob[3, 0] = old[3, 0]
    advantages = torch.randn(rows, length, generator=g)
    advantages[2, 2] = 0
    advantages[0, 1] = 1  # whose gradient is of the order of 1e-9 where no bound stops it
    lengths = torch.tensor([9, 4, 7, 1, 0])[:rows]
    mask = torch.arange(length) < lengths[:, None]
    weights = torch.rand(rows, length, generator=g) * 2
    return old, log_prob, advantages, mask, weights


def actor_config(**changes):
    from verl.workers.config import ActorConfig

    fields = {"strategy": "fsdp", "rollout_n": 2, "ppo_micro_batch_size_per_gpu": 2} | changes
    info = fields.pop("info", {})
    config = ActorConfig(**fields)
    config.global_batch_info.update(info)
    return config


NAMES = {"mmedx": "vanilla", "mmedx_gspo": "gspo", "mmedx_cispo": "cispo"}
GLOBAL = {"dp_size": 2, "batch_num_tokens": 55, "global_batch_size": 12, "loss_scale_factor": 31}


def both(core, name, config, mode, weighted):
    """(loss, gradient, metrics) of verl's loss and of ours, both from verl's registry."""
    ours.register()
    old, log_prob, advantages, mask, weights = log_probs()
    results = []
    for mode_name in (NAMES[name], name):
        leaf = log_prob.clone().requires_grad_()
        loss, metrics = core.get_policy_loss_fn(mode_name)(
            old_log_prob=old,
            log_prob=leaf,
            advantages=advantages,
            response_mask=mask,
            loss_agg_mode=mode,
            config=config,
            rollout_is_weights=weights if weighted else None,
        )
        (grad,) = torch.autograd.grad(loss, leaf)
        results.append((loss.detach(), grad, metrics))
    return results


@needs_verl
@pytest.mark.parametrize("mode", losses.AGG_MODES)
@pytest.mark.parametrize("name", NAMES)
def test_a_policy_loss_is_verls(core, name, mode):
    for config, weighted in (
        (actor_config(), False),
        (actor_config(clip_ratio_low=0.1, clip_ratio_high=0.3, clip_ratio_c=1.5), True),
        (actor_config(clip_ratio_high=4.0, clip_ratio_c=1.2, info=GLOBAL), True),
    ):
        want, got = both(core, name, config, mode, weighted)
        torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-7)
        assert name != "mmedx" or not (want[1][0, :2].any() or got[1][0, :2].any())
        assert got[2] == pytest.approx(want[2], rel=1e-5, abs=1e-7)
        assert all(type(value) is float for value in got[2].values())
        assert got[2]["actor/pg_clipfrac"] > 0


@needs_verl
def test_verls_actor_loss_with_entropy_and_kl_takes_ours(core):
    """verl.workers.utils.losses.ppo_loss, which adds its other terms to the loss in place."""
    from tensordict import TensorDict
    from verl.workers.config import PolicyLossConfig
    from verl.workers.utils.losses import ppo_loss

    ours.register()
    old, log_prob, advantages, mask, _ = log_probs(rows=4)
    rows, length = old.shape
    lengths = mask.sum(1)

    def jagged(x):
        parts = [row[:n] for row, n in zip(x, lengths.tolist(), strict=True)]
        return torch.nested.as_nested_tensor(parts, layout=torch.jagged)

    results = []
    for mode in ("vanilla", "mmedx"):
        config = actor_config(
            use_kl_loss=True, kl_loss_coef=0.1, entropy_coeff=0.01,
            policy_loss=PolicyLossConfig(loss_mode=mode),
        )  # fmt: skip
        leaf = log_prob.clone().requires_grad_()
        prompts = torch.nested.as_nested_tensor([torch.zeros(1)] * rows, layout=torch.jagged)
        data = TensorDict(
            {
                "prompts": prompts,
                "responses": jagged(old),
                "response_mask": jagged(mask.long()),
                "old_log_probs": jagged(old),
                "advantages": jagged(advantages),
                "ref_log_prob": jagged(old - 0.1),
            },
            batch_size=[rows],
        )
        for key, value in (("dp_size", 1), ("batch_num_tokens", 21), ("global_batch_size", 4)):
            data.set_non_tensor(key, value)
        # the model's log-probs: those of prompt and response tokens, each one place to the left
        flat = torch.cat(
            [torch.cat([leaf[i, :n], leaf.new_zeros(1)]) for i, n in enumerate(lengths)]
        )
        loss, metrics = ppo_loss(config, {"log_probs": flat, "entropy": -flat}, data)
        (grad,) = torch.autograd.grad(loss, leaf)
        numbers = {k: v.aggregate() if hasattr(v, "aggregate") else v for k, v in metrics.items()}
        results.append((loss.detach(), grad, numbers))
    want, got = results
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-7)
    assert got[2] == pytest.approx(want[2], rel=1e-5) and len(got[2]) >= 6


def plain_config(**changes):
    fields = {"clip_ratio": 0.2, "clip_ratio_low": None, "clip_ratio_high": 0.3} | changes
    return SimpleNamespace(global_batch_info={}, **fields)


@pytest.mark.parametrize("name", ["vanilla", "gspo", "cispo"])
def test_the_gradient_of_a_loss_is_its_derivative(name):
    """Central differences in float64, without verl."""
    old, log_prob, advantages, mask, weights = (x.double() for x in log_probs())
    log_prob[0, :2] = old[0, :2]  # no step across a bound
    log_prob = torch.where((log_prob - old).abs() < 0.02, old + 0.05, log_prob)
    call = lambda x: losses.policy_loss(  # noqa: E731
        name, old, x, advantages, mask, "token-mean", plain_config(), weights
    )[0]
    leaf = log_prob.clone().requires_grad_()
    (grad,) = torch.autograd.grad(3 * call(leaf), leaf)
    step, found = 1e-6, torch.zeros_like(grad)
    for i, j in mask.nonzero().tolist():
        e = torch.zeros_like(old)
        e[i, j] = step
        found[i, j] = 3 * (call(log_prob + e) - call(log_prob - e)) / (2 * step)
    if name == "cispo":  # its ratio is a constant, and not to the difference
        weight = (log_prob - old).exp().clamp(0.8, 1.3)
        found = -3 * weight * advantages * weights * mask / mask.sum()
    if name == "gspo":  # the ratio is the sequence's, the gradient given to each token as its own
        found = found * mask.sum(1, keepdim=True)
        same = (advantages * weights)[3:4] != 0  # a sequence of one token is exact
        found, grad = found[3:4] * same, grad[3:4]
    torch.testing.assert_close(grad, found, rtol=1e-5, atol=1e-8)


def test_padding_has_no_effect_and_no_tokens_no_loss():
    old, log_prob, advantages, mask, _ = log_probs()
    results = []
    for rubbish in (0.0, float("nan")):
        tensors = [torch.where(mask, x, rubbish) for x in (old, log_prob, advantages)]
        leaf = tensors[1].requires_grad_()
        loss, metrics = ours.policy_loss_vanilla(
            tensors[0], leaf, tensors[2], mask, config=plain_config()
        )
        results.append((loss, *torch.autograd.grad(loss, leaf), metrics))
    assert results[0][0] == results[1][0] and results[0][2] == results[1][2]
    assert torch.equal(results[0][1], results[1][1])
    loss, _ = ours.policy_loss_gspo(
        old, log_prob, advantages, torch.zeros_like(mask), config=plain_config()
    )
    assert loss == 0


def test_a_loss_names_what_it_lacks():
    x, mask = torch.zeros(1, 2), torch.ones(1, 2)
    config = plain_config()
    with pytest.raises(ValueError, match="needs config"):
        ours.policy_loss_cispo(x, x, x, mask)
    with pytest.raises(ValueError, match="loss_agg_mode='mean' is not known: use token-mean"):
        ours.policy_loss_cispo(x, x, x, mask, "mean", config)
    with pytest.raises(ValueError, match="clip_ratio_c must exceed 1, got 0.5"):
        ours.policy_loss_vanilla(x, x, x, mask, config=plain_config(clip_ratio_c=0.5))
    config.global_batch_info = {"dp_size": 2}
    with pytest.raises(ValueError, match="dp_size=2 needs batch_num_tokens"):
        ours.policy_loss_vanilla(x, x, x, mask, config=config)
    with pytest.raises(ValueError, match="dp_size=2 needs global_batch_size"):
        ours.policy_loss_gspo(x, x, x, mask, config=config)


# The head


def head(v, n=10, h=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=g)
    weight = torch.randn(v, h, generator=g) / h**0.5 * 2
    labels = torch.randint(0, v, (n,), generator=g)
    labels[0] = v - 1
    return hidden, weight, labels


def reference(hidden, weight, labels, temperature):
    """verl's tests' formula for its Triton kernel, in float64."""
    logits = hidden.double() @ weight.double().T / temperature
    p = logits.softmax(-1)
    entropy = logits.logsumexp(-1) - (p * logits).sum(-1)
    return -torch.nn.functional.cross_entropy(logits, labels, reduction="none"), entropy


def outcome(call, hidden, weight):
    """Outputs of call(hidden, weight), and the gradients of a mixture of them."""
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    out = call(*leaves)
    mixture = sum(
        (k + 1) * (x.view(-1) * torch.linspace(0.5, 1.5, x.numel())).sum()
        for k, x in enumerate(out)
    )
    return [*(x.detach() for x in out), *torch.autograd.grad(mixture, leaves)]


@needs_verl
@pytest.mark.parametrize("vocabulary", [127, 1003, 152064])
def test_the_head_is_verls_torch_path(vocabulary):
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    hidden, weight, labels = head(vocabulary)
    hidden, labels = hidden.view(2, 5, -1), labels.view(2, 5)
    exact = outcome(
        lambda h, w: [
            x.view(2, 5) for x in reference(h.view(10, -1), w, labels.view(-1), 0.7)
        ], hidden.double(), weight.double(),
    )  # fmt: skip
    results = [
        outcome(lambda h, w, m=module: m(h, w, labels, 0.7), hidden, weight)
        for module in (FusedLinearForPPO(), ours.FusedLinearForPPO())
    ]
    for want, theirs, got in zip(exact, *results, strict=True):
        torch.testing.assert_close(got, theirs, rtol=1e-4, atol=1e-4)
        bound = 2 * (theirs - want).abs().max() + 1e-6
        assert (got - want).abs().max() <= bound


@pytest.mark.parametrize("reduction", ["none", "SUM", "mean"])
def test_the_head_against_float64(reduction):
    hidden, weight, labels = head(1003)

    def want(h, w):
        logprob, entropy = reference(h, w, labels, 1.3)
        how = {"none": lambda x: x, "SUM": torch.sum, "mean": torch.mean}[reduction]
        return how(logprob), entropy

    call = lambda h, w: ours.linear_cross_entropy(  # noqa: E731
        h.view(5, 2, -1), w, labels.view(5, 2), 1.3, reduction
    )
    results = [outcome(f, hidden, weight) for f in (want, call)]
    for a, b in zip(*results, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(b.double(), a.double(), rtol=1e-5, atol=2e-5)


def test_the_head_names_what_does_not_fit():
    hidden, weight, labels = head(20)
    with pytest.raises(ValueError, match="reduction='max' is not known"):
        ours.linear_cross_entropy(hidden, weight, labels, 1.0, "max")
    with pytest.raises(ValueError, match="impl_backend='triton' is not known"):
        ours.FusedLinearForPPO(impl_backend="triton")
    with pytest.raises(ValueError, match=r"input_ids must be \(10,\)"):
        ours.FusedLinearForPPO()(hidden, weight, labels[:-1])


@needs_verl
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_model_that_verl_has_patched_finds_our_head(monkeypatch, backend):
    """A tiny Qwen2.5-VL with verl's forward for fused kernels; verl's own triton backend needs a GPU."""
    import importlib.util
    from pathlib import Path

    import verl.utils.experimental.torch_functional as torch_functional
    import verl.utils.kernel.linear_cross_entropy as kernel
    from verl.models.transformers.monkey_patch import patch_forward_with_backends

    path = Path(__file__).with_name("_tiny_vl.py")
    spec = importlib.util.spec_from_file_location("verl_tiny_vl", path)
    tiny_vl = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny_vl)
    model = tiny_vl.build()
    monkeypatch.setattr(type(model), "forward", type(model).forward)
    own = kernel.linear_cross_entropy, torch_functional.FusedLinearForPPO

    def run():
        ids = torch.randint(1, 280, (1, 12), generator=torch.Generator().manual_seed(0))
        positions = torch.arange(12).expand(4, 1, -1)
        out = model(ids, position_ids=positions, temperature=0.8, return_dict=True)
        (grad,) = torch.autograd.grad(out.log_probs.sum() + out.entropy.sum(), model.lm_head.weight)
        return out.log_probs.view(-1), out.entropy.view(-1), grad

    patch_forward_with_backends(model, True, "torch")
    want = run()
    patch_forward_with_backends(model, True, backend)
    for _ in range(2):
        ours.use_fused_head()
    try:
        assert kernel.linear_cross_entropy is ours.linear_cross_entropy
        assert torch_functional.FusedLinearForPPO is ours.FusedLinearForPPO
        for a, b in zip(want, run(), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
    finally:
        ours.use_fused_head(on=False)
    assert (kernel.linear_cross_entropy, torch_functional.FusedLinearForPPO) == own


def _shard(rank: int, port: int, folder: str) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    hidden, weight, labels = head(46)
    call = lambda h, w: ours.linear_cross_entropy(  # noqa: E731
        h, w, labels, 0.9, "none", dist.group.WORLD
    )
    torch.save(outcome(call, hidden, weight[23 * rank : 23 * rank + 23]), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_gradients_of_a_split_vocabulary_sum_to_the_whole(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_shard, (port, str(tmp_path)), nprocs=2)
    shards = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2)]
    hidden, weight, labels = head(46)
    want = outcome(lambda h, w: reference(h, w, labels, 0.9), hidden, weight)
    for logprob, entropy, *_ in shards:
        torch.testing.assert_close(logprob.double(), want[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(entropy.double(), want[1], rtol=1e-5, atol=1e-5)
    grad = shards[0][2] + shards[1][2]
    torch.testing.assert_close(grad, want[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([s[3] for s in shards]), want[3], rtol=1e-5, atol=1e-5)


# Registries


@needs_verl
def test_registering_is_explicit_idempotent_and_refuses_a_taken_name(core):
    gdpo = core.ADV_ESTIMATOR_REGISTRY["gdpo"]
    assert "gba" not in core.ADV_ESTIMATOR_REGISTRY and "mmedx" not in core.POLICY_LOSS_REGISTRY
    for _ in range(2):
        ours.register()
    assert core.get_adv_estimator_fn("gba") is ours.gba_advantage
    assert core.get_adv_estimator_fn("gdpo") is gdpo
    core.POLICY_LOSS_REGISTRY["mmedx"] = gdpo
    with pytest.raises(ValueError, match="verl already knows 'mmedx' as .*compute_gdpo"):
        ours.register()


@needs_verl
def test_another_verl_is_named_with_its_version(core, monkeypatch):
    import verl
    import verl.utils.experimental.torch_functional as torch_functional

    monkeypatch.setattr(verl, "__version__", "1.2.3")
    monkeypatch.delattr(torch_functional, "FusedLinearForPPO")
    with pytest.raises(RuntimeError, match=r"verl 1\.2\.3 has no .*FusedLinearForPPO.*0\.9\.1"):
        ours.use_fused_head()
    with pytest.raises(RuntimeError, match="_fetch_one_gen_batch"):
        ours.use_guideline_uids(object)
    monkeypatch.delattr(core, "POLICY_LOSS_REGISTRY")
    with pytest.raises(RuntimeError, match=r"verl 1\.2\.3 has no .*POLICY_LOSS_REGISTRY"):
        ours.register()
