"""The GRPO family's loss straight from hidden states, with its gradient made while each tile of
logits is there.

For a frozen head that is two GEMM passes (logits, gradient of the hidden states); backward only
scales.
"""

from __future__ import annotations

from dataclasses import fields

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _logits as lg
from ._checks import check_integers
from ._policy_math import (
    LOSS_TYPES,
    PolicyLossSpec,
    Sequences,
    Tokens,
    merge_metrics,
    metric_names,
    reduce_metrics,
    token_loss,
)
from ._routing import TileOps, group_of, name_of, register_op, tiles_for

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
    group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """loss = sum over tokens of token_weight * (policy loss + beta * KL) - entropy_weight *
    entropy_coef * entropy.

    Nothing is divided inside: the weights carry every normaliser (see :func:`token_weights`), so
    the losses, gradients and metrics of micro-batches and ranks add up to those of the whole batch.

    The gradient of the logits is rounded once, to the weight's dtype, before any later loss scale: with
    float16 weights, put the scale into ``token_weight`` and ``entropy_weight``.

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
        group, vocab_start: as in :func:`linear_logprob`; every per-token tensor is the same on every rank,
            and so are loss and metrics. One packed all-reduce a tile in forward, so the ranks must cut the same
            tiles: shards of one size, or ``chunk`` given. One all-reduce of the gradient of ``hidden``.
        sequence_id: [N] integer, the tokens of a sequence adjacent; required by gspo and sequence
            corrections, where reading the boundaries waits for the device.

    Returns:
        loss: scalar float32 (float64 for float64 inputs), differentiable once with respect to
            hidden, weight and bias.
        metrics: raw sums, minima and maxima over the tokens with a weight, as 0-dim tensors of the loss's dtype;
            :func:`merge_metrics` adds them up, :func:`reduce_metrics` makes the means to log.

    Raises:
        ValueError: operands that do not fit, missing log-probs or sequence ids, a target outside
            the vocabulary or banned (values are checked on CPU tensors only).
        RuntimeError: ``MMEDX_KERNELS=triton`` with float64 operands or without a GPU.
    """
    lg.check_head(hidden, weight, targets, bias, spec.temperature, softcap, chunk, banned)
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
    if sequence_id is not None:
        check_integers("sequence_id", sequence_id, _SEQUENCE_IDS)
    _check_given(spec, ref_logprob, rollout_logprob, sequence_id)
    operands = (hidden, weight, bias)
    grad = torch.is_grad_enabled()
    wanted = [grad and x is not None and x.requires_grad for x in operands]
    compiling = torch.compiler.is_compiling()
    run = torch.ops.mmedx_fast.linear_policy_loss if compiling else _PolicyLoss.apply
    loss, packed, *_ = run(
        *operands, targets, advantages, old_logprob, ref_logprob, rollout_logprob, token_weight,
        entropy_weight, sequence_id, banned, softcap, chunk, name_of(group),
        lg.shard_start(weight.shape[0], group, vocab_start), wanted,
        *(getattr(spec, name) for name in _SPEC),
    )  # fmt: skip
    names = metric_names(spec, ref_logprob is not None, rollout_logprob is not None)
    if len(targets) == 0:
        names = ["sum:loss", "sum:tokens"]
    return loss, dict(zip(names, packed.unbind(), strict=True))


_SEQUENCE_IDS = "one number per sequence, at each of its tokens"


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


# How a spec travels through an operator, whose arguments are tensors and numbers.
_SPEC = tuple(field.name for field in fields(PolicyLossSpec))
_SPEC_TYPES = {"float": "float", "float | None": "float?", "str": "str", "bool": "bool"}


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    advantages: Tensor,
    old: Tensor | None,
    ref: Tensor | None,
    rollout: Tensor | None,
    token_weight: Tensor,
    entropy_weight: Tensor | None,
    sequence_id: Tensor | None,
    banned: Tensor | None,
    softcap: float | None,
    chunk: int | None,
    group: str | None,
    start: int,
    wanted: list[bool],
    *spec_values: float | str | bool | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, packed metrics, gradients of hidden, weight and bias or empty tensors)."""
    spec = PolicyLossSpec(**dict(zip(_SPEC, spec_values, strict=True)))  # type: ignore[arg-type]
    if group is None:
        lg.check_targets(targets, weight.shape[0])
    _check_banned(targets, banned, token_weight)
    acc = lg.accumulate_dtype(hidden, weight)
    tokens = _clean_tokens(acc, advantages, old, ref, rollout, token_weight, entropy_weight)
    head = lg.Head(
        weight, bias, spec.temperature, softcap, banned, acc, None, start, group is not None
    )
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        grads = lg.Grads(hidden, weight, bias, (wanted[0], wanted[1], wanted[2]))
        if len(targets) == 0:
            zero = hidden.new_zeros((), dtype=acc)
            return zero, zero.new_zeros(2), *grads.result()
        sequences: Sequences | None = None
        lengths: list[int] = []
        if spec.by_sequence:
            assert sequence_id is not None
            sequences, lengths = Sequences.of(sequence_id)
        tiles = tiles_for("linear_policy_loss", hidden, head, targets, chunk)
        sweep = _Sweep(tiles, tokens, spec, grads, hidden, weight, group, start)
        sweep.run(sequences, lengths)
        if group is not None and grads.hidden is not None:
            dist.all_reduce(grads.hidden, group=group_of(group))
        whole = tokens.cut(slice(None), sequences)
        result = token_loss(sweep.logprob, sweep.entropy, whole, spec)
        packed = torch.stack([x.to(acc) for x in result.metrics.values()])
        return result.loss, packed, *grads.result()


class _Sweep:
    """Tile by tile: log-probs and entropies of all tokens, and the gradients."""

    def __init__(
        self, tiles: TileOps, tokens: Tokens, spec: PolicyLossSpec, grads: lg.Grads,
        hidden: Tensor, weight: Tensor, group: str | None, start: int,
    ) -> None:  # fmt: skip
        self._tiles, self._tokens, self._spec, self._grads = tiles, tokens, spec, grads
        self._operands, self._group, self._start = (hidden, weight), group, start
        n, like = len(tokens.live), tokens.advantage
        self._stats = like.new_zeros(5, n)
        # log-prob, entropy, and the loss's derivative by each
        self._result = like.new_zeros(4, n)

    @property
    def logprob(self) -> Tensor:
        return self._result[0]

    @property
    def entropy(self) -> Tensor:
        return self._result[1]

    def run(self, sequences: Sequences | None, lengths: list[int]) -> None:
        by_tokens = self._group is None and sequences is None and self._grads.any
        one_sweep = getattr(self._tiles, "policy", None) if by_tokens else None
        for rows, part in _parts(self._tiles.spans, sequences, lengths):
            if one_sweep is not None:
                dz = one_sweep(rows, self._tokens, self._spec, self._result)
            else:
                dz = self._by_steps(rows, part)
            if dz is not None:
                self._grads.add(rows, dz, *self._operands, self._tokens.live[rows])

    def _by_steps(self, rows: slice, sequences: Sequences | None) -> Tensor | None:
        """dlogits of a tile (None if nothing wants a gradient), with the loss between statistics and gradient."""
        self._tiles.stats(rows, self._stats, True)
        if self._group is not None:
            self._stats[:, rows] = lg.merge_shards(
                self._stats[:, rows], group_of(self._group), self._start, self._operands[1].shape[0]
            )
        logprob, entropy = lg.outcome(self._stats[:, rows], True)
        assert entropy is not None
        self.logprob[rows], self.entropy[rows] = logprob, entropy
        if not self._grads.any:
            return None
        part = self._tokens.cut(rows, sequences)
        result = token_loss(logprob, entropy, part, self._spec)
        self._result[2, rows] = result.d_logprob
        if result.d_entropy is None:
            return self._tiles.dlogits(rows, self._stats, self._result[2], None)
        self._result[3, rows] = result.d_entropy
        return self._tiles.dlogits(rows, self._stats, self._result[2], self._result[3])


def _parts(
    spans: list[slice], sequences: Sequences | None, lengths: list[int]
) -> list[tuple[slice, Sequences | None]]:
    """The tiles' rows; with ``sequences`` of these ``lengths``, of about the same size but ending where one ends."""
    if sequences is None:
        return [(rows, None) for rows in spans]
    limit = max(rows.stop - rows.start for rows in spans)
    parts: list[tuple[slice, Sequences | None]] = []
    start = end = first = 0
    for s, length in enumerate([*lengths, limit + 1]):  # the last one closes the last part
        if end > start and end + length - start > limit:
            rows = slice(start, end)
            parts.append((rows, sequences.cut(rows, first, s - first)))
            start, first = end, s
        end += length
    return parts


def _clean_tokens(
    acc: torch.dtype,
    advantages: Tensor,
    old: Tensor | None,
    ref: Tensor | None,
    rollout: Tensor | None,
    token_weight: Tensor,
    entropy_weight: Tensor | None,
) -> Tokens:
    """The per-token inputs in the accumulation dtype, with zeros where a token does not count."""
    entropy_weight = token_weight if entropy_weight is None else entropy_weight
    live = (token_weight != 0) | (entropy_weight != 0)

    def clean(x: Tensor) -> Tensor:
        return torch.where(live, x.detach().to(acc), 0.0)

    def optional(x: Tensor | None) -> Tensor | None:
        return None if x is None else clean(x)

    return Tokens(
        clean(advantages), optional(old), optional(ref), optional(rollout), clean(token_weight),
        clean(entropy_weight), live,
    )  # fmt: skip


def _shapes(hidden, weight, bias, targets, advantages, old, ref, rollout, *rest):
    *_, wanted = rest[: -len(_SPEC)]
    spec = PolicyLossSpec(**dict(zip(_SPEC, rest[-len(_SPEC) :], strict=True)))
    acc = lg.accumulate_dtype(hidden, weight)
    names = metric_names(spec, ref is not None, rollout is not None)
    packed = hidden.new_empty(2 if len(targets) == 0 else len(names), dtype=acc)
    loss = hidden.new_empty((), dtype=acc)
    return loss, packed, *lg.gradient_shapes(hidden, weight, bias, wanted)


def _setup(ctx, inputs, output) -> None:
    _, packed, *grads = output
    ctx.wanted, ctx.inputs = inputs[16], len(inputs)
    ctx.save_for_backward(*grads)
    ctx.mark_non_differentiable(packed, *grads)


def _backward(ctx, d_loss: Tensor, *_):
    """The gradients are known: backward only scales them."""
    grads = (
        g * d_loss if wanted else None
        for g, wanted in zip(ctx.saved_tensors, ctx.wanted, strict=True)
    )
    return (*grads, *(None for _ in range(ctx.inputs - 3)))


class _PolicyLoss(torch.autograd.Function):
    """Eager calls: nothing between the caller and the GEMMs, so that profilers and modes see them."""

    forward = staticmethod(_forward)  # type: ignore[assignment]
    setup_context = staticmethod(_setup)
    backward = staticmethod(once_differentiable(_backward))  # type: ignore[assignment]


register_op(
    "linear_policy_loss",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor advantages, Tensor? old, "
    "Tensor? ref, Tensor? rollout, Tensor token_weight, Tensor? entropy_weight, "
    "Tensor? sequence_id, Tensor? banned, float? softcap, SymInt? chunk, str? group, SymInt start, "
    "bool[] wanted, "
    + ", ".join(f"{_SPEC_TYPES[str(f.type)]} {f.name}" for f in fields(PolicyLossSpec))
    + ") -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _shapes,
).register_autograd(_backward, setup_context=_setup)


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
    check_integers("sequence_id", sequence_id, _SEQUENCE_IDS)
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
