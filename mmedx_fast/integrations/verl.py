"""Our ops inside verl (written for and tested with verl 0.9.1). Nothing happens at import; every hook is a call.

A module of your own, which every process of verl imports (``VERL_USE_EXTERNAL_MODULES=my_verl``; in the
workers also ``actor_rollout_ref.model.external_lib=my_verl``)::

    from mmedx_fast.integrations import verl as mmedx

    mmedx.register()          # algorithm.adv_estimator=gba, actor.policy_loss.loss_mode=mmedx
    mmedx.use_fused_head()    # the log-prob head of every model with use_fused_kernels=true

**Advantages** (``gba``). verl 0.9.1 gives an estimator one summed reward a response and its ``uid``, a fresh
number for each row of the data set; the columns of the batch go only to the estimator called ``gdpo``, and only in
the legacy trainer. So a question's rows under several guidelines meet in one of two ways:

- any trainer: the uid carries both, ``question::guideline``. In the V1 trainer :func:`use_guideline_uids` writes
  such uids from two columns of the data set (the rows of a question must come in one batch: no shuffling, or a
  sampler that keeps them together). Rewards are the summed ones.
- legacy trainer (``trainer.use_v1=false``): ``register(as_gdpo=True)`` and ``adv_estimator=gdpo``;
  ``+algorithm.gba.question_key=... +algorithm.gba.guideline_key=...`` name the columns, and
  ``algorithm.gdpo_reward_keys`` the scores, each of which may be None for "does not apply".

A session's outputs, where an agent loop has several, count as a response each. Otherwise
``+algorithm.gba.<name>=<value>`` sets what :class:`GbaSettings` lists. Where one uid is one guideline,
the defaults are verl's grpo.

**Policy losses** (``mmedx``, ``mmedx_gspo``, ``mmedx_cispo``): verl's vanilla, gspo and cispo with every
``loss_agg_mode``, its metrics and rollout weights. verl calls a policy loss with log-probs, after the model's
forward, so head and loss cannot be one op here: in verl the head is fused by :func:`use_fused_head`, and
:func:`mmedx_fast.ops.linear_policy_loss` is for loops of your own.

**Head**: :func:`linear_cross_entropy` and :class:`FusedLinearForPPO` have the signatures of verl's.

verl 0.9.1 asks for transformers below 5.11, our training stack for 5.19: the ops need neither, and live in verl's
environment (``pip install mmedx-fast`` has torch and triton alone). Not run with verl itself, for want of a GPU
and a cluster: its trainers as a whole, Megatron, and its Triton kernel, which has no CPU path.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmedx_fast.integrations._verl_advantage import GbaSettings, gba_advantage, guideline_uids
from mmedx_fast.integrations._verl_losses import policy_loss
from mmedx_fast.ops import linear_logprob

__all__ = [
    "FusedLinearForPPO",
    "GbaSettings",
    "gba_advantage",
    "guideline_uids",
    "linear_cross_entropy",
    "policy_loss_cispo",
    "policy_loss_gspo",
    "policy_loss_vanilla",
    "register",
    "use_fused_head",
    "use_guideline_uids",
]


def policy_loss_vanilla(
    old_log_prob: Tensor,  # [B, R]
    log_prob: Tensor,  # [B, R]
    advantages: Tensor,  # [B, R]
    response_mask: Tensor,  # [B, R]
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,  # [B, R]
) -> tuple[Tensor, dict[str, float]]:
    """PPO's clipped loss with the dual clip, as verl's ``vanilla``; registered as ``mmedx``.

    Args:
        old_log_prob, log_prob, advantages: [B, R] float; only ``log_prob`` gets a gradient.
        response_mask: [B, R]; what stands where it is 0 has no effect.
        loss_agg_mode: verl's, e.g. ``seq-mean-token-sum-norm`` for Dr. GRPO.
        config: verl's actor config: clip_ratio, clip_ratio_low, clip_ratio_high, clip_ratio_c and
            global_batch_info.
        rollout_is_weights: [B, R], multiplies the loss of each token.

    Returns:
        loss: scalar float32, differentiable once. 0 for a batch without a response token.
        metrics: ``actor/pg_clipfrac``, ``actor/ppo_kl``, ``actor/pg_clipfrac_lower``.

    Raises:
        ValueError: no config, an unknown mode, or a mean over ranks without its global count.
    """
    return policy_loss(
        "vanilla", old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config,
        rollout_is_weights,
    )  # fmt: skip


def policy_loss_gspo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """GSPO as verl's ``gspo``: one ratio a sequence, the gradient token by token. Else as
    :func:`policy_loss_vanilla`; registered as ``mmedx_gspo``."""
    return policy_loss(
        "gspo", old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config,
        rollout_is_weights,
    )  # fmt: skip


def policy_loss_cispo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """CISPO as verl's ``cispo``: the ratio clipped on both sides is a constant weight. Else as
    :func:`policy_loss_vanilla`; registered as ``mmedx_cispo``."""
    return policy_loss(
        "cispo", old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config,
        rollout_is_weights,
    )  # fmt: skip


LOSSES = {
    "mmedx": policy_loss_vanilla,
    "mmedx_gspo": policy_loss_gspo,
    "mmedx_cispo": policy_loss_cispo,
}


def register(*, as_gdpo: bool = False) -> None:
    """Enter ``gba``, ``mmedx``, ``mmedx_gspo`` and ``mmedx_cispo`` in verl's registries of this process.

    May be called again. With ``as_gdpo`` ours also takes the place of verl's ``gdpo``, the one estimator
    that verl gives the columns of the batch.

    Raises:
        ModuleNotFoundError: verl, or something it needs, is not installed.
        RuntimeError: this version of verl has no such registries.
        ValueError: somebody else's function has one of the names.
    """
    import verl.trainer.ppo.core_algos as core

    estimators = _attribute(core, "ADV_ESTIMATOR_REGISTRY")
    losses = _attribute(core, "POLICY_LOSS_REGISTRY")
    for registry, name, function in (
        (estimators, "gba", gba_advantage),
        *((losses, name, function) for name, function in LOSSES.items()),
    ):
        if registry.get(name, function) is not function:
            raise ValueError(
                f"verl already knows {name!r} as {registry[name]}: register it under another name"
            )
    _attribute(core, "register_adv_est")("gba")(gba_advantage)
    for name, function in LOSSES.items():
        _attribute(core, "register_policy_loss")(name)(function)
    if as_gdpo:
        # verl's decorator refuses a second function under a name.
        estimators["gdpo"] = gba_advantage


def use_guideline_uids(
    trainer_class: type, question_key: str = "question", guideline_key: str = "guideline"
) -> None:
    """Let a V1 trainer of verl write ``question::guideline`` uids, which ``gba`` reads.

    Args:
        trainer_class: ``verl.trainer.ppo.v1.PPOTrainer``, for all its modes, or one of its subclasses.
        question_key, guideline_key: columns of the data set, or fields of its column ``extra_info``.

    verl then counts each (question, guideline) row as a prompt with rollout.n responses, as before. May be
    called again; the last keys count. A batch is refused with :func:`guideline_uids`'s errors.

    Raises:
        RuntimeError: the class fetches its batches in another way than verl 0.9.1's.
    """
    fetch = _attribute(trainer_class, "_fetch_one_gen_batch")
    fetch = getattr(fetch, "without_guidelines", fetch)

    def fetch_with_guidelines(self: Any) -> Any:
        import verl.utils.tensordict_utils as tu

        batch = fetch(self)
        columns = [_cells(batch, key) for key in (question_key, guideline_key)]
        tu.assign_non_tensor_stack(batch, "uid", list(guideline_uids(*columns)))
        return batch

    fetch_with_guidelines.without_guidelines = fetch  # type: ignore[attr-defined]
    trainer_class._fetch_one_gen_batch = fetch_with_guidelines  # type: ignore[attr-defined]


def _cells(batch: Any, key: str) -> list[Any]:
    """A column of a fetched batch, or a field of its extra_info."""
    if key in batch.keys():
        column = batch[key]
        return column.tolist() if isinstance(column, Tensor) else list(column)
    rows = list(batch["extra_info"]) if "extra_info" in batch.keys() else []
    for row, extra in enumerate(rows):
        if key not in extra:
            raise ValueError(
                f"row {row} of the batch has no {key!r} in extra_info ({', '.join(extra)})"
            )
    if not rows:
        known = ", ".join(str(name) for name in batch.keys())
        raise ValueError(f"the data set has no column {key!r} and no extra_info: it has {known}")
    return [extra[key] for extra in rows]


def linear_cross_entropy(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [...]
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of labels, with verl's signature; on any device and for any H and V.

    Args:
        hidden: [..., H] float, N tokens in all.
        weight: [V, H]; with a group this rank's rows of it, all ranks' shards of one size.
        labels: N token ids, of the whole vocabulary.
        temperature: divides the logits.
        reduction: of the log-probs: ``none``, ``sum`` or ``mean``.
        dist_process_group: the vocabulary is split over its ranks.

    Returns:
        (log-probs [N], or a scalar with a reduction; entropies [N] in nats), flat as verl's, float32.
        Differentiable once by hidden and weight, each only if it requires a gradient. As with verl's op the
        gradients of ``hidden`` are to be summed over the group's ranks, which Megatron does.

    Raises:
        ValueError: an unknown reduction, or operands :func:`mmedx_fast.ops.linear_logprob` refuses.
    """
    how = reduction.lower()
    if how not in ("none", "sum", "mean"):
        raise ValueError(f"reduction={reduction!r} is not known: use none, sum or mean")
    flat = hidden.reshape(-1, hidden.shape[-1])
    if dist_process_group is not None:
        flat = _Share.apply(flat, dist.get_world_size(dist_process_group))
    logprob, entropy = linear_logprob(
        flat, weight, labels.reshape(-1), temperature=temperature, group=dist_process_group
    )
    assert entropy is not None
    if how != "none":
        logprob = logprob.sum() if how == "sum" else logprob.mean()
    return logprob, entropy


class _Share(torch.autograd.Function):
    """The same values; of their gradient, which our op has summed over the ranks, an equal share each."""

    @staticmethod
    def forward(ctx, x: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return grad / ctx.ranks, None


class FusedLinearForPPO(nn.Module):
    """verl's module of this name over our op.

    ``chunk_size`` (rows a tile; None, our default, picks by a memory budget) changes speed and memory, not
    results. ``impl_backend`` is verl's choice between its own implementations: both names mean this one.

    Raises:
        ValueError: a backend verl does not have either.
    """

    def __init__(self, chunk_size: int | None = None, impl_backend: str = "torch") -> None:
        super().__init__()
        if impl_backend not in ("torch", "liger"):
            raise ValueError(f"impl_backend={impl_backend!r} is not known: use torch or liger")
        self.chunk_size = chunk_size
        self.impl_backend = impl_backend

    def forward(
        self,
        hidden_states: Tensor,  # [..., H]
        vocab_weights: Tensor,  # [V, H]
        input_ids: Tensor,  # [...]
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """(log-probs, entropies), float32, of the shape of ``input_ids``, the labels.

        Raises:
            ValueError: ``input_ids`` are not one label for each hidden state.
        """
        if input_ids.shape != hidden_states.shape[:-1]:
            raise ValueError(
                f"input_ids must be {tuple(hidden_states.shape[:-1])}, one label for each hidden state, "
                f"got {tuple(input_ids.shape)}"
            )
        logprob, entropy = linear_logprob(
            hidden_states.reshape(-1, hidden_states.shape[-1]),
            vocab_weights,
            input_ids.reshape(-1).long(),
            temperature=temperature,
            chunk=self.chunk_size,
        )
        assert entropy is not None
        return logprob.view(input_ids.shape), entropy.view(input_ids.shape)


# Where verl 0.9.1 has its heads. Its models import them from the first two when they run (backend triton,
# and torch or liger); the Megatron modules keep a name of their own.
_KERNEL = "verl.utils.kernel.linear_cross_entropy"
_TORCH = "verl.utils.experimental.torch_functional"
_MEGATRON = tuple(
    f"verl.models.mcore.{name}" for name in ("model_forward_fused", "model_forward_1f1b_overlap")
)
_verls_own: dict[str, Any] = {}


def use_fused_head(on: bool = True) -> None:
    """Let verl's fused heads be ours in this process, or with ``on=False`` verl's again.

    verl itself patches the forward of each model it knows when ``model.use_fused_kernels=true``, with
    ``fused_kernel_options.impl_backend`` torch, liger or triton; those forwards then find ours, whichever
    backend is named. May be called again, before or after the model is built.

    Raises:
        ModuleNotFoundError: verl, or something it needs, is not installed.
        RuntimeError: this version of verl has its heads elsewhere.
    """
    import importlib

    heads: list[tuple[str, str, Any]] = [
        (_KERNEL, "linear_cross_entropy", linear_cross_entropy),
        (_TORCH, "FusedLinearForPPO", FusedLinearForPPO),
    ]
    found = [(importlib.import_module(name), attribute, ours) for name, attribute, ours in heads]
    for name in _MEGATRON:
        if name in sys.modules:
            found.append((sys.modules[name], "linear_cross_entropy", linear_cross_entropy))
    for module, attribute, ours in found:
        current = _attribute(module, attribute)
        if current is not ours:
            _verls_own.setdefault(attribute, current)
    for module, attribute, ours in found:
        setattr(module, attribute, ours if on else _verls_own.get(attribute, ours))


def _attribute(owner: Any, name: str) -> Any:
    """Of verl; what it lacks is named together with its version."""
    if not hasattr(owner, name):
        import verl

        raise RuntimeError(
            f"verl {verl.__version__} has no {owner.__name__}.{name}; "
            "mmedx_fast.integrations.verl is written for verl 0.9.1: pip install verl==0.9.1"
        )
    return getattr(owner, name)
