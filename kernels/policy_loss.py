"""The GRPO family's loss straight from hidden states, with its gradient made while each tile of
logits is there.

For a frozen head that is two GEMM passes (logits, gradient of the hidden states); backward only
scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _logits as lg
from ._dispatch import register_torch, resolve
from ._policy_math import (
    LOSS_TYPES,
    PolicyLossSpec,
    TokenLoss,
    Tokens,
    merge_metrics,
    reduce_metrics,
    token_loss,
)
from .linear_logprob import Grads

__all__ = [
    "PolicyLossSpec",
    "linear_policy_loss",
    "merge_metrics",
    "reduce_metrics",
    "token_weights",
]


def linear_policy_loss(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [N]
    advantages: Tensor,  # [N]
    *,
    old_logprob: Tensor | None = None,  # [N]
    ref_logprob: Tensor | None = None,  # [N]
    rollout_logprob: Tensor | None = None,  # [N]
    token_weight: Tensor,  # [N]
    entropy_weight: Tensor | None = None,  # [N]
    spec: PolicyLossSpec,
    sequence_id: Tensor | None = None,  # [N]
    bias: Tensor | None = None,  # [V]
    softcap: float | None = None,
    chunk: int | None = None,
    banned: Tensor | None = None,  # [n]
) -> tuple[Tensor, dict[str, Tensor]]:
    """loss = sum over tokens of token_weight * (policy loss + beta * KL) - entropy_weight *
    entropy_coef * entropy.

    Nothing is divided inside: the weights carry every normaliser (see :func:`token_weights`), so
    the losses, gradients and metrics of micro-batches and ranks add up to those of the whole batch.

    Args:
        hidden: [N, H] float, the states that predict ``targets``; response tokens only.
        weight, bias, softcap, banned, chunk: as in :func:`linear_logprob`; ``weight`` and ``bias``
            get a gradient only if they require one. ``chunk`` rows are exceeded where one sequence
            is longer and the spec is by sequence.
        targets: [N] token ids.
        advantages: [N], one per token.
        old_logprob: [N] log-probs of the policy that took the actions; None = this policy itself
            (on-policy: ratio 1, with its gradient).
        ref_logprob: [N] log-probs of the reference; required if ``spec.beta`` is not 0, else only
            measured.
        rollout_logprob: [N] log-probs the rollout engine gave, NaN where it gave none; required by
            an importance-sampling correction, else only measured.
        token_weight: [N]. Tokens with weight 0 are masked: whatever stands in their rows (NaN too)
            has no effect.
        entropy_weight: [N], default ``token_weight``. TRL's bonus is a plain token mean: pass
            dapo's weights for it.
        spec: which loss; also the temperature.
        sequence_id: [N] integer, the tokens of a sequence adjacent; required by gspo and sequence
            corrections, where reading the boundaries waits for the device.

    Returns:
        loss: scalar float32 (float64 for float64 inputs), differentiable once with respect to
            hidden, weight and bias.
        metrics: raw sums, minima and maxima over the tokens with a weight, as 0-dim tensors;
            :func:`merge_metrics` adds them up, :func:`reduce_metrics` makes the means to log.

    Raises:
        ValueError: operands that do not fit, missing log-probs or sequence ids, a target outside
            the vocabulary or banned (values are checked on CPU tensors only).
    """
    lg.check_head(hidden, weight, targets, bias, spec.temperature, softcap, chunk)
    per_token = {
        "advantages": advantages,
        "token_weight": token_weight,
        "old_logprob": old_logprob,
        "ref_logprob": ref_logprob,
        "rollout_logprob": rollout_logprob,
        "entropy_weight": entropy_weight,
        "sequence_id": sequence_id,
    }
    for name, x in per_token.items():
        if x is not None and x.shape != targets.shape:
            raise ValueError(f"{name} must be [{len(targets)}], got {tuple(x.shape)}")
    _check_given(spec, ref_logprob, rollout_logprob, sequence_id)
    lg.check_targets(targets, weight.shape[0])
    _check_banned(targets, banned, token_weight)
    impl = resolve("linear_policy_loss", hidden.device)
    return impl(
        hidden,
        weight,
        targets,
        advantages,
        old_logprob=old_logprob,
        ref_logprob=ref_logprob,
        rollout_logprob=rollout_logprob,
        token_weight=token_weight,
        entropy_weight=entropy_weight,
        spec=spec,
        sequence_id=sequence_id,
        bias=bias,
        softcap=softcap,
        chunk=chunk,
        banned=banned,
    )


def _check_given(
    spec: PolicyLossSpec, ref: Tensor | None, rollout: Tensor | None, sequence_id: Tensor | None
) -> None:
    if spec.beta != 0 and ref is None:
        raise ValueError(f"beta={spec.beta} needs ref_logprob")
    if spec.importance_sampling_correction != "none" and rollout is None:
        raise ValueError(
            f"importance_sampling_correction={spec.importance_sampling_correction!r} "
            "needs rollout_logprob"
        )
    if spec.by_sequence and sequence_id is None:
        raise ValueError(
            f"loss_type={spec.loss_type!r} with importance_sampling_correction="
            f"{spec.importance_sampling_correction!r} works by sequence and needs sequence_id"
        )


def _check_banned(targets: Tensor, banned: Tensor | None, token_weight: Tensor) -> None:
    if banned is None or targets.device.type != "cpu":
        return
    wrong = (torch.isin(targets, banned.to(targets.device)) & (token_weight != 0)).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"targets[{row}] = {int(targets[row])} is a banned id: it cannot have been "
            "sampled. Give the token weight 0 or ban the ids the rollout engine banned"
        )


@dataclass(frozen=True)
class _Span:
    rows: slice
    sequence: Tensor | None  # [n] 0..S-1
    sequences: int


def _spans(
    n: int, vocab: int, device: torch.device, chunk: int | None, sequence_id: Tensor | None
) -> Iterator[_Span]:
    """Row ranges of about ``chunk`` tokens; with ``sequence_id`` they end where a sequence ends."""
    plain = list(lg.spans(n, vocab, device, chunk))
    if sequence_id is None or n == 0:
        yield from (_Span(rows, None, 0) for rows in plain)
        return
    ids, lengths = torch.unique_consecutive(sequence_id, return_counts=True)
    if len(torch.unique(ids)) != len(ids):
        raise ValueError(
            "sequence_id: the tokens of a sequence must be adjacent, but an id comes back later"
        )
    index = torch.repeat_interleave(torch.arange(len(ids), device=device), lengths, output_size=n)
    limit = max(rows.stop - rows.start for rows in plain)
    start = end = first = 0
    for s, length in enumerate(lengths.tolist()):
        if end > start and end + length - start > limit:
            yield _Span(slice(start, end), index[start:end] - first, s - first)
            start, first = end, s
        end += length
    yield _Span(slice(start, end), index[start:end] - first, len(ids) - first)


@register_torch("linear_policy_loss")
def _linear_policy_loss_torch(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    *,
    old_logprob: Tensor | None,
    ref_logprob: Tensor | None,
    rollout_logprob: Tensor | None,
    token_weight: Tensor,
    entropy_weight: Tensor | None,
    spec: PolicyLossSpec,
    sequence_id: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    chunk: int | None,
    banned: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    operands = (hidden, weight, bias)
    wanted = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in operands)
    acc = lg.accumulate_dtype(hidden, weight)
    blocked = lg.local_banned(banned, 0, weight.shape[0], hidden.device)
    head = lg.Head(weight, bias, spec.temperature, softcap, blocked, acc, None).prepared()
    tokens = _clean_tokens(
        acc,
        advantages,
        old_logprob,
        ref_logprob,
        rollout_logprob,
        token_weight,
        entropy_weight,
    )
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        grads = Grads(hidden, weight, bias, wanted)
        loss = hidden.new_zeros((), dtype=acc)
        metrics: dict[str, Tensor] = {}
        by_sequence = sequence_id if spec.by_sequence else None
        columns = targets.long()
        for span in _spans(len(targets), weight.shape[0], hidden.device, chunk, by_sequence):
            part = _part(tokens, span)
            rows = torch.where(part.live[:, None], hidden[span.rows], 0.0)
            result = _one_tile(rows, weight, head, columns[span.rows], part, spec, grads, span.rows)
            loss = loss + result.loss
            _accumulate(metrics, result.metrics)
    if not metrics:  # no token at all
        metrics = {"sum:loss": loss, "sum:tokens": loss.new_zeros((), dtype=torch.long)}
    if any(wanted):
        loss = _WithGradient.apply(loss, grads.result(), *operands)
    return loss, metrics


def _clean_tokens(
    acc: torch.dtype, advantages, old, ref, rollout, token_weight, entropy_weight
) -> Tokens:
    """The per-token inputs in the accumulation dtype, with zeros where a token does not count."""
    entropy_weight = token_weight if entropy_weight is None else entropy_weight
    live = (token_weight != 0) | (entropy_weight != 0)

    def clean(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.where(live, x.detach().to(acc), 0.0)

    weight, spread, advantage = clean(token_weight), clean(entropy_weight), clean(advantages)
    assert weight is not None and spread is not None and advantage is not None
    return Tokens(advantage, clean(old), clean(ref), clean(rollout), weight, spread, live, None, 0)


def _part(tokens: Tokens, span: _Span) -> Tokens:
    def cut(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[span.rows]

    return Tokens(
        tokens.advantage[span.rows],
        cut(tokens.old),
        cut(tokens.ref),
        cut(tokens.rollout),
        tokens.weight[span.rows],
        tokens.entropy_weight[span.rows],
        tokens.live[span.rows],
        span.sequence,
        span.sequences,
    )


def _one_tile(
    rows: Tensor,
    weight: Tensor,
    head: lg.Head,
    columns: Tensor,
    tokens: Tokens,
    spec: PolicyLossSpec,
    grads: Grads,
    where: slice,
) -> TokenLoss:
    """Loss of one tile of tokens; adds its gradients to ``grads``."""
    tile = lg.make_tile(rows, head, columns, moment=True)
    assert tile.moment is not None
    total = lg.log_total(tile.others, tile.target)
    entropy = total - tile.moment * (-total).exp()
    result = token_loss(tile.target - total, entropy, tokens, spec)
    if grads.any:
        dz = lg.dlogits(tile, head, columns, None, result.d_logprob, result.d_entropy, entropy)
        grads.add(where, dz, rows, weight)
    return result


def _accumulate(into: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    for key, value in new.items():
        if key not in into:
            into[key] = value
        elif key.startswith("sum"):
            into[key] = into[key] + value
        else:
            into[key] = (torch.minimum if key.startswith("min") else torch.maximum)(
                into[key], value
            )


class _WithGradient(torch.autograd.Function):
    """Hands a loss on together with its gradients, which are already known."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx, loss: Tensor, grads: tuple[Tensor | None, ...], *operands: Tensor | None
    ) -> Tensor:
        ctx.grads = grads
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss: Tensor):  # type: ignore[override]
        return (None, None, *(None if g is None else g * d_loss for g in ctx.grads))


def token_weights(
    sequence_id: Tensor,  # [N]
    loss_type: str,
    *,
    mask: Tensor | None = None,  # [N]
    num_sequences: int | None = None,
    num_items_in_batch: int | None = None,
    max_completion_length: int | None = None,
) -> Tensor:
    """[N] float32 weights with which ``linear_policy_loss`` is TRL's loss of this type, averaged as
    TRL averages it.

    =============  ==============================================  =======================
    loss_type      weight of a counted token                       normaliser to give
    =============  ==============================================  =======================
    grpo, gspo     1 / (counted tokens of its sequence * S)        num_sequences S
    bnpo           1 / T                                           num_items_in_batch T
    dapo, cispo    1 / T                                           num_items_in_batch T
    dr_grpo        1 / (S * max_completion_length)                 num_sequences S,
    max_completion_length
    =============  ==============================================  =======================

    S and T count over everything one optimizer step sees, all micro-batches and ranks together
    (divide by the number of ranks if the trainer averages gradients over ranks). For TRL's bnpo,
    which averages each micro-batch by itself, give the micro-batch's own T times the number of
    accumulation steps.

    Args:
        sequence_id: [N] integer, equal for the tokens of one sequence.
        mask: [N], 0 for tokens that do not count (they get weight 0).
        num_sequences, num_items_in_batch: None = those of this call (S: sequences that have a row
            here).
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type={loss_type!r} is not known: use {', '.join(LOSS_TYPES)}")
    if mask is not None and mask.shape != sequence_id.shape:
        raise ValueError(f"mask must be {tuple(sequence_id.shape)}, got {tuple(mask.shape)}")
    counted = torch.ones_like(sequence_id, dtype=torch.bool) if mask is None else mask != 0
    ids, index = torch.unique(sequence_id, return_inverse=True)
    sequences = len(ids) if num_sequences is None else num_sequences
    weight = counted.float()
    if loss_type in ("grpo", "gspo"):
        length = weight.new_zeros(len(ids)).index_add_(0, index, weight).clamp(min=1)
        return weight / length[index] / max(sequences, 1)
    if loss_type == "dr_grpo":
        if max_completion_length is None or max_completion_length < 1:
            raise ValueError("dr_grpo divides by max_completion_length: give it")
        return weight / (max(sequences, 1) * max_completion_length)
    if num_items_in_batch is None:
        return weight / weight.sum().clamp(min=1)
    return weight / max(num_items_in_batch, 1)
