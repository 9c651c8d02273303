"""Log-probs and entropies of chosen tokens straight from hidden states; the [tokens, vocabulary]
matrix is never whole.

One tile of logits exists at a time. Backward recomputes it (three GEMM passes for a frozen head),
unless the call was small enough to be a single tile that was kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _logits as lg
from ._dispatch import register_torch, resolve

# A call of one tile keeps it for backward if it has at most this many elements.
KEEP_CPU = 1 << 21
KEEP_CUDA = 1 << 27


def linear_logprob(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [N]
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,  # [V]
    softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
    chunk: int | None = None,
    return_entropy: bool = True,
    banned: Tensor | None = None,  # [n]
    group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of ``targets`` and entropy under softmax(softcap(hidden @ weight.T + bias) /
    temperature).

    Args:
        hidden: [N, H] float, any strides. N may be 0.
        weight: [V, H] float, the head; with ``group`` this rank's rows of it.
        targets: [N] token ids.
        temperature: divides the logits after the cap, as an inference engine does before sampling.
        bias: [V], added before the cap.
        softcap: z -> softcap * tanh(z / softcap), or None.
        logits_dtype: None or float32 (float64 for float64 inputs): logits keep the GEMM's
            accumulators. bfloat16 or
            float16: logits are rounded to it first, to imitate an engine that does so; not for
                comparing log-probs.
        chunk: rows per tile; None picks by a memory budget. Only speed and memory depend on it:
            results agree to the last digits of float32 (bitwise where the GEMM library does not
            change its order with the row count).
        return_entropy: False returns None instead and saves a pass.
        banned: ids that cannot occur (logit -inf), as when the engine forbids image tokens. A
            banned target has log-probability -inf.
        group: vocabulary-parallel process group. ``hidden`` and ``targets`` are the same on every
            rank, ``weight``, ``bias`` are shards; targets and banned are global ids. One packed
            all-reduce in forward, one all-reduce of the gradient of ``hidden`` in backward.
        vocab_start: global id of this shard's first row; None = rank * V.

    Returns:
        (logprob [N], entropy [N] in nats or None), float32 (float64 for float64 inputs).
        Differentiable once with respect to hidden, weight and bias, each only if it requires a
        gradient; weight's gradient is accumulated in float32.

    Raises:
        ValueError: operands that do not fit, a target outside the vocabulary (checked on CPU
            tensors only), a ZeRO-3-partitioned weight.
    """
    lg.check_head(hidden, weight, targets, bias, temperature, softcap, chunk)
    if logits_dtype not in (None, torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"logits_dtype={logits_dtype} is not a float dtype this op knows")
    if group is None:
        lg.check_targets(targets, weight.shape[0])
    impl = resolve("linear_logprob", hidden.device)
    return impl(
        hidden,
        weight,
        targets,
        temperature=temperature,
        bias=bias,
        softcap=softcap,
        logits_dtype=logits_dtype,
        chunk=chunk,
        return_entropy=return_entropy,
        banned=banned,
        group=group,
        vocab_start=vocab_start,
    )


@dataclass(frozen=True)
class _Call:
    """The arguments of one call that are not differentiable."""

    targets: Tensor
    temperature: float
    softcap: float | None
    banned: Tensor | None
    round_to: torch.dtype | None
    chunk: int | None
    entropy: bool
    group: dist.ProcessGroup | None
    start: int
    grad: bool  # a backward may follow

    def head(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> lg.Head:
        acc = lg.accumulate_dtype(hidden, weight)
        return lg.Head(
            weight, bias, self.temperature, self.softcap, self.banned, acc, self.round_to
        )

    def local_targets(self, vocab: int) -> tuple[Tensor, Tensor | None]:
        """Column of each target in this shard, and which targets are in it (None = all)."""
        if self.group is None:
            return self.targets, None
        local = self.targets - self.start
        owned = (local >= 0) & (local < vocab)
        return local.clamp(0, vocab - 1), owned


@register_torch("linear_logprob")
def _linear_logprob_torch(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    bias: Tensor | None,
    softcap: float | None,
    logits_dtype: torch.dtype | None,
    chunk: int | None,
    return_entropy: bool,
    banned: Tensor | None,
    group: dist.ProcessGroup | None,
    vocab_start: int | None,
) -> tuple[Tensor, Tensor | None]:
    start = 0
    if group is not None:
        start = dist.get_rank(group) * weight.shape[0] if vocab_start is None else vocab_start
    call = _Call(
        targets=targets.long(),
        temperature=temperature,
        softcap=softcap,
        banned=lg.local_banned(banned, start, weight.shape[0], hidden.device),
        round_to=logits_dtype if logits_dtype in (torch.bfloat16, torch.float16) else None,
        chunk=chunk,
        entropy=return_entropy,
        group=group,
        start=start,
        grad=torch.is_grad_enabled(),
    )
    logprob, entropy = _LinearLogprob.apply(hidden, weight, bias, call)
    return logprob, entropy if return_entropy else None


def _merge_shards(stats: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[5, N] of this shard (top, others, moment, target, owned) -> the same of the whole
    vocabulary.

    One all-reduce: every rank puts its rows in its own slot of a zero buffer.
    """
    slots = stats.new_zeros((dist.get_world_size(group), *stats.shape))
    slots[dist.get_rank(group)] = stats
    dist.all_reduce(slots, group=group)
    top, others, moment, target, owned = slots.unbind(1)
    mine = owned > 0
    whole_top = top.amax(0)
    shift = (top - whole_top).clamp(min=lg.FLOOR)
    scale = shift.exp()
    total = others + torch.where(mine, target.exp(), 0.0)
    # sum of exp(z) * z, with z relative to the new maximum
    moment = ((moment + shift * total) * scale).sum(0)
    others = (others * scale).sum(0)
    target = torch.where(mine, target + shift, 0.0).sum(0)
    found = mine.any(0)
    if stats.device.type == "cpu" and not bool(found.all()):
        row = int((~found).nonzero()[0])
        raise ValueError(
            f"targets[{row}] is in no rank's part of the vocabulary: check vocab_start"
        )
    return torch.stack([whole_top, others, moment, target, found.to(stats.dtype)])


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _Call
    ) -> tuple[Tensor, Tensor]:
        n, vocab = hidden.shape[0], weight.shape[0]
        columns, owned = call.local_targets(vocab)
        head = call.head(hidden, weight, bias).prepared()
        stats = hidden.new_zeros((5, n), dtype=head.acc)
        stats[4] = 1.0 if owned is None else owned.to(head.acc)
        kept: lg.Tile | None = None
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in lg.spans(n, vocab, hidden.device, call.chunk):
                own = None if owned is None else owned[rows]
                tile = lg.make_tile(hidden[rows], head, columns[rows], own, call.entropy)
                stats[0, rows], stats[1, rows], stats[3, rows] = tile.top, tile.others, tile.target
                if tile.moment is not None:
                    stats[2, rows] = tile.moment
                kept = tile if rows == slice(0, n) else None
        whole = stats if call.group is None else _merge_shards(stats, call.group)
        _, others, moment, target, _ = whole.unbind(0)
        total = lg.log_total(others, target)
        logprob = target - total
        entropy = total - moment * (-total).exp() if call.entropy else torch.empty_like(logprob)
        if not call.entropy:
            ctx.mark_non_differentiable(entropy)
        if call.grad and any(ctx.needs_input_grad[:3]):
            ctx.call = call
            ctx.kept = _keep(kept, hidden.device)
            ctx.save_for_backward(hidden, weight, bias, whole, entropy)
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, d_logprob: Tensor, d_entropy: Tensor):  # type: ignore[override]
        hidden, weight, bias, whole, entropy = ctx.saved_tensors
        call: _Call = ctx.call
        kept, ctx.kept = ctx.kept, None  # its memory is overwritten; a second backward recomputes
        grads = Grads(hidden, weight, bias, ctx.needs_input_grad)
        columns, owned = call.local_targets(weight.shape[0])
        head = call.head(hidden, weight, bias).prepared()
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in lg.spans(hidden.shape[0], weight.shape[0], hidden.device, call.chunk):
                own = None if owned is None else owned[rows]
                tile = kept or lg.make_tile(hidden[rows], head, columns[rows], own)
                if call.group is not None:
                    tile.rebase(whole[0, rows], whole[1, rows], whole[3, rows])
                d_ent, ent = (d_entropy[rows], entropy[rows]) if call.entropy else (None, None)
                dz = lg.dlogits(tile, head, columns[rows], own, d_logprob[rows], d_ent, ent)
                grads.add(rows, dz, hidden[rows], weight)
        return (*grads.result(call.group), None)


def _keep(tile: lg.Tile | None, device: torch.device) -> lg.Tile | None:
    limit = KEEP_CUDA if device.type == "cuda" else KEEP_CPU
    return tile if tile is not None and tile.z.numel() <= limit else None


class Grads:
    """Accumulates what the operands that want a gradient get from each tile of dlogits."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, ...]
    ) -> None:
        self.acc = lg.accumulate_dtype(hidden, weight)
        self.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        self.hidden = (
            torch.zeros_like(hidden, memory_format=torch.contiguous_format) if wanted[0] else None
        )
        self.weight = torch.zeros_like(weight, dtype=self.acc) if wanted[1] else None
        self.bias = (
            torch.zeros_like(bias, dtype=self.acc) if wanted[2] and bias is not None else None
        )

    @property
    def any(self) -> bool:
        return not (self.hidden is None and self.weight is None and self.bias is None)

    def add(self, rows: slice, dz: Tensor, hidden: Tensor, weight: Tensor) -> None:
        low = dz.to(weight.dtype)  # the gradient's GEMM may run in the weight's own dtype
        if self.hidden is not None:
            self.hidden[rows] = (low @ weight).to(self.hidden.dtype)
        if self.weight is not None:
            self.weight.addmm_(low.t().to(self.acc), hidden.to(self.acc))
        if self.bias is not None:
            self.bias += dz.sum(0)

    def result(self, group: dist.ProcessGroup | None = None) -> tuple[Tensor | None, ...]:
        """Gradients in the operands' dtypes; that of hidden summed over the vocabulary's shards."""
        if group is not None and self.hidden is not None:
            dist.all_reduce(self.hidden, group=group)
        weight = None if self.weight is None else self.weight.to(self.dtypes[1])
        bias = None if self.bias is None else self.bias.to(self.dtypes[2])
        return self.hidden, weight, bias
