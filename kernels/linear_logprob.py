"""Log-probs and entropies of chosen tokens straight from hidden states; the [tokens, vocabulary]
matrix is never whole.

One tile of logits exists at a time, made by a GEMM (cuBLAS on CUDA) and read by row kernels. What backward
needs is saved in one of three ways (``SAVED``): with a frozen head and no gradient of the entropy, that of every
log-prob by its own hidden state, of which backward only takes multiples (two GEMM passes); the logits themselves,
where they are few (two); or nothing, and they are made again (three).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import _logits as lg
from ._routing import group_of, name_of, register_op, tiles_for

# Raw logits are kept for backward up to this many bytes.
KEEP_CUDA = 1 << 30
KEEP_CPU = 1 << 23
SAVED = ("nothing", "logits", "gradient")


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
    entropy_grad: bool = True,
    banned: Tensor | None = None,  # [n]
    group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
    keep_bytes: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of ``targets`` and entropy under softmax(softcap(hidden @ weight.T + bias) /
    temperature).

    Args:
        hidden: [N, H] float, any strides. N may be 0.
        weight: [V, H] float, the head; with ``group`` this rank's rows of it. A head in another dtype than its
            logits (16-bit on a CPU, or not the dtype of ``hidden``) is cast by slabs of at most 64 MiB.
        targets: [N] token ids.
        temperature: divides the logits after the cap, as an inference engine does before sampling.
        bias: [V], added before the cap; -inf makes a token impossible, below a cap too.
        softcap: z -> softcap * tanh(z / softcap), or None.
        logits_dtype: None or float32 (float64 for float64 inputs): logits keep the GEMM's
            accumulators. bfloat16 or
            float16: logits are rounded to it first, to imitate an engine that does so; not for
                comparing log-probs.
        chunk: rows per tile; None picks by a memory budget. Only speed and memory depend on it:
            results agree to the last digits of float32 (bitwise where the GEMM library does not
            change its order with the row count).
        return_entropy: False returns None instead; with a gradient of ``hidden`` alone that saves a GEMM pass.
        entropy_grad: False returns the entropy as a constant, to be logged or masked with; the same pass is saved.
        banned: ids that cannot occur (logit -inf), as when the engine forbids image tokens. A
            banned target has log-probability -inf; where every id is impossible, log-prob, entropy and gradient
            are NaN.
        group: vocabulary-parallel process group. ``hidden`` and ``targets`` are the same on every
            rank, ``weight``, ``bias`` are shards; targets and banned are global ids. One packed
            all-reduce in forward, one all-reduce of the gradient of ``hidden`` in backward.
        vocab_start: global id of this shard's first row; None = rank * V, for shards of one size. The shards
            must be the whole vocabulary, each id once.
        keep_bytes: where a gradient may follow, the raw logits (4 bytes each, 2 with a 16-bit
            ``logits_dtype``) are kept if they take at most this many bytes, and backward does without their
            GEMM: two passes for a frozen head instead of three. None = 1 GiB on CUDA, 8 MiB elsewhere. Without
            the entropy's gradient and with a frozen, unsharded head it is two passes anyway, and [N, H] are kept.

    Returns:
        (logprob [N], entropy [N] in nats or None), float32 (float64 for float64 inputs).
        Differentiable once with respect to hidden, weight and bias, each only if it requires a
        gradient; weight's gradient is accumulated in float32.

    Raises:
        ValueError: operands that do not fit, a target outside the vocabulary or shards that are not the
            vocabulary (checked on CPU tensors only; elsewhere the log-prob is NaN), a ZeRO-3-partitioned weight.
            In backward: a weight that has been freed since.
        RuntimeError: ``MMEDX_KERNELS=triton`` with float64 operands or without a GPU.
    """
    lg.check_head(hidden, weight, targets, bias, temperature, softcap, chunk, banned)
    if logits_dtype not in (None, torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"logits_dtype={logits_dtype} is not a float dtype this op knows")
    round_to = logits_dtype if logits_dtype in (torch.bfloat16, torch.float16) else None
    operands = (hidden, weight, bias)
    grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands)
    start = lg.shard_start(weight.shape[0], group, vocab_start)
    saved = "nothing"
    if grad and _fits(hidden, weight, round_to, keep_bytes):
        saved = "logits"
    elif grad and hidden.requires_grad and not (return_entropy and entropy_grad) and group is None:
        frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
        saved = "gradient" if frozen else saved
    arguments = (
        *operands, targets, banned, temperature, softcap, round_to, chunk, return_entropy, saved,
        name_of(group), start,
    )  # fmt: skip
    compiling = torch.compiler.is_compiling()
    run = torch.ops.mmedx_fast.linear_logprob if compiling else _LinearLogprob.apply
    logprob, entropy, _, _ = run(*arguments)
    if not return_entropy:
        return logprob, None
    return logprob, entropy if entropy_grad else entropy.detach()


def head_weight(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(weight [V, H], bias [V] or None) of a language model's head, for the ops of this package.

    A PEFT wrapper is looked through: a copy trained in full (``modules_to_save``) counts if it is active, an
    adapter of any kind that is merged or disabled does not matter.

    Raises:
        ValueError: an adapter is active on the head (or merged and then disabled), so that its weight alone is
            not what the model computes; a ZeRO-3-partitioned weight; a module without a [V, H] weight.
    """
    wrapper: Any = module
    on = not getattr(module, "disable_adapters", False)
    active = [str(name) for name in getattr(module, "active_adapters", ())] if on else []
    copies = getattr(module, "modules_to_save", None)
    if copies is not None:
        trained = [name for name in active if name in copies]
        return head_weight(
            wrapper.modules_to_save[trained[0]] if trained else wrapper.original_module
        )
    if hasattr(module, "base_layer"):
        _check_adapters(module, active)
        return head_weight(wrapper.base_layer)
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if weight is None or (weight.dim() != 2 and getattr(weight, "ds_id", None) is None):
        raise ValueError(f"{type(module).__name__} has no [V, H] weight: it is not a linear head")
    lg.check_gathered(weight)
    return weight, bias


def _check_adapters(layer: nn.Module, active: list[str]) -> None:
    """Raise ValueError unless a PEFT layer computes what its base layer's weight alone would."""
    kind, merged = type(layer).__name__, getattr(layer, "merged", False)
    if merged and getattr(layer, "disable_adapters", False):
        raise ValueError(
            f"{kind} is a head whose adapters are disabled, but its weight still contains them: unmerge first"
        )
    # Only a LoRA layer is known to ignore adapters that it has no matrices of.
    lora = getattr(layer, "lora_A", None)
    found = active if lora is None else [name for name in active if name in lora]
    if found and not merged:
        raise ValueError(
            f"{kind} is a head with active {'' if lora is None else 'LoRA '}adapters ({', '.join(found)}), which "
            "its weight does not contain: leave the head out of target_modules, or merge the adapters"
        )


def _fits(hidden: Tensor, weight: Tensor, round_to: torch.dtype | None, limit: int | None) -> bool:
    if limit is None:
        limit = KEEP_CUDA if hidden.device.type == "cuda" else KEEP_CPU
    dtype = round_to or lg.accumulate_dtype(hidden, weight)
    return hidden.shape[0] * lg.raw_width(weight.shape[0]) * dtype.itemsize <= limit


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    banned: Tensor | None,
    temperature: float,
    softcap: float | None,
    round_to: torch.dtype | None,
    chunk: int | None,
    want_entropy: bool,
    saved: str,
    group: str | None,
    start: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprob [N], entropy [N] or [0], statistics [5, N] of the whole vocabulary, what is ``saved``)."""
    if group is None:
        lg.check_targets(targets, weight.shape[0])
    head = _head(hidden, weight, bias, banned, temperature, softcap, round_to, group, start)
    n = hidden.shape[0]
    kept = _kept(hidden, head.vocab, head.raw_dtype, head.acc, saved)
    if saved == "logits":
        kept[:, head.vocab :] = 0.0  # what an op returns is the same twice
    stats = hidden.new_zeros((5, n), dtype=head.acc)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        logits = kept if saved == "logits" else None
        tiles = tiles_for("linear_logprob", hidden, head, targets, chunk, logits)
        one = torch.ones_like(stats[0])
        for rows in tiles.spans:
            tiles.stats(rows, stats, want_entropy)
            if saved == "gradient":
                dz = tiles.dlogits(rows, stats, one, None)
                lg.multiply_gradient(dz, weight.detach(), kept[rows])
        if group is not None:
            stats = lg.merge_shards(stats, group_of(group), start, head.vocab)
        logprob, entropy = lg.outcome(stats, want_entropy)
    return logprob, hidden.new_empty(0) if entropy is None else entropy, stats, kept


def _kept(
    hidden: Tensor, vocab: int, raw: torch.dtype, acc: torch.dtype, saved: str
) -> Tensor:  # fmt: skip
    """Memory for what is saved: raw logits [N, raw_width(V)], a gradient [N, H], or [0, 0]."""
    if saved == "logits":
        return hidden.new_empty((len(hidden), lg.raw_width(vocab)), dtype=raw)
    shape = hidden.shape if saved == "gradient" else (0, 0)
    return hidden.new_empty(shape, dtype=acc)


def _backward(
    d_logprob: Tensor,
    d_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    banned: Tensor | None,
    stats: Tensor,
    kept: Tensor,
    temperature: float,
    softcap: float | None,
    round_to: torch.dtype | None,
    chunk: int | None,
    saved: str,
    group: str | None,
    start: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; an empty tensor for each that is not ``wanted``."""
    if saved == "gradient":
        scale = d_logprob[:, None]
        d_hidden = torch.where(scale == 0, 0.0, kept * scale).to(hidden.dtype)  # 0 * NaN is NaN
        return d_hidden, hidden.new_empty(0), hidden.new_empty(0)
    head = _head(hidden, weight, bias, banned, temperature, softcap, round_to, group, start)
    given = kept if saved == "logits" else None
    d_logprob = d_logprob.contiguous()
    live = d_logprob != 0
    if d_entropy is not None:
        d_entropy = d_entropy.contiguous()
        live |= d_entropy != 0
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        tiles = tiles_for("linear_logprob", hidden, head, targets, chunk, given, filled=True)
        grads = lg.Grads(hidden, weight, bias, (wanted[0], wanted[1], wanted[2]))
        for rows in tiles.spans:
            dz = tiles.dlogits(rows, stats, d_logprob, d_entropy)
            grads.add(rows, dz, hidden, weight, live[rows])
        if group is not None and grads.hidden is not None:
            dist.all_reduce(grads.hidden, group=group_of(group))
        return grads.result()


def _head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, banned: Tensor | None, temperature: float,
    softcap: float | None, round_to: torch.dtype | None, group: str | None, start: int,
) -> lg.Head:  # fmt: skip
    acc = lg.accumulate_dtype(hidden, weight)
    return lg.Head(
        weight, bias, temperature, softcap, banned, acc, round_to, start, group is not None
    )


def _forward_shapes(
    hidden, weight, bias, targets, banned, temperature, softcap, round_to, chunk, want_entropy, saved,
    group, start,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    acc, n = lg.accumulate_dtype(hidden, weight), hidden.shape[0]
    kept = _kept(hidden, weight.shape[0], round_to or acc, acc, saved)
    logprob = hidden.new_empty(n, dtype=acc)
    entropy = hidden.new_empty(n, dtype=acc) if want_entropy else hidden.new_empty(0)
    return logprob, entropy, hidden.new_empty((5, n), dtype=acc), kept


def _backward_shapes(d_logprob, d_entropy, hidden, weight, bias, *rest) -> tuple[Tensor, ...]:
    return lg.gradient_shapes(hidden, weight, bias, rest[-1])


def _setup(ctx, inputs, output) -> None:
    hidden, weight, bias, targets, banned, *scalars = inputs
    logprob, entropy, stats, kept = output
    ctx.scalars, ctx.weight_shape = scalars, weight.shape
    ctx.save_for_backward(hidden, weight, bias, targets, banned, stats, kept)
    ctx.mark_non_differentiable(stats, kept, *(() if scalars[4] else (entropy,)))
    ctx.set_materialize_grads(True)


def _backward_through(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The autograd formula, with ``backward`` a plain function or the op that torch.compile sees."""

    def formula(ctx, d_logprob: Tensor, d_entropy: Tensor, _d_stats, _d_kept):
        hidden, weight, bias, targets, banned, stats, kept = ctx.saved_tensors
        temperature, softcap, round_to, chunk, want_entropy, saved, group, start = ctx.scalars
        wanted = list(ctx.needs_input_grad[:3])
        if saved != "gradient":
            lg.check_kept(weight, ctx.weight_shape)
        found = backward(
            d_logprob, d_entropy if want_entropy else None, hidden, weight, bias, targets, banned,
            stats, kept, temperature, softcap, round_to, chunk, saved, group, start, wanted,
        )  # fmt: skip
        grads = [g if w else None for g, w in zip(found, wanted, strict=True)]
        return (*grads, *(None for _ in range(10)))

    return formula


class _LinearLogprob(torch.autograd.Function):
    """Eager calls: nothing between the caller and the GEMMs, so that profilers and modes see them."""

    forward = staticmethod(_forward)  # type: ignore[assignment]
    setup_context = staticmethod(_setup)
    backward = staticmethod(once_differentiable(_backward_through(_backward)))  # type: ignore


register_op(
    "linear_logprob",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? banned, float temperature, "
    "float? softcap, ScalarType? round_to, SymInt? chunk, bool want_entropy, str saved, str? group, "
    "SymInt start) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_shapes,
).register_autograd(
    _backward_through(
        register_op(
            "linear_logprob_backward",
            "(Tensor d_logprob, Tensor? d_entropy, Tensor hidden, Tensor weight, Tensor? bias, "
            "Tensor targets, Tensor? banned, Tensor stats, Tensor kept, float temperature, "
            "float? softcap, ScalarType? round_to, SymInt? chunk, str saved, str? group, SymInt start, "
            "bool[] wanted) -> (Tensor, Tensor, Tensor)",
            _backward,
            _backward_shapes,
        )
    ),
    setup_context=_setup,
)
