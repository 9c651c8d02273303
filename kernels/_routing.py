"""How the head ops reach their implementation: by device, by dtype, and through torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from . import _logits_torch
from ._dispatch import logger, mode, register_triton, resolve
from ._logits import Head

LIBRARY = "mmedx_fast"
_said: set[str] = set()


class TileOps(Protocol):
    """What an implementation offers: ``_logits_torch.TorchTiles`` and ``_logits_triton.TritonTiles``."""

    spans: list[slice]

    def stats(self, rows: slice, stats: Tensor, moment: bool) -> None: ...

    def dlogits(
        self, rows: slice, stats: Tensor, d_logprob: Tensor, d_entropy: Tensor | None
    ) -> Tensor: ...


def tiles_for(
    op: str,
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    chunk: int | None,
    kept: Tensor | None = None,
    filled: bool = False,
) -> TileOps:
    """The tiles of one call of ``op``. float64 has no kernels: plain torch, or an error where Triton is asked for."""
    build: Callable[..., TileOps] = resolve(op, hidden.device)
    if head.acc == torch.float64 and build is not _logits_torch.TorchTiles:
        reason = "its kernels compute in float32 and the operands are float64"
        if mode() == "triton":
            raise RuntimeError(f"MMEDX_KERNELS=triton, but {op} cannot use Triton: {reason}")
        if op not in _said:
            _said.add(op)
            logger.info("%s runs in plain torch: %s", op, reason)
        build = _logits_torch.TorchTiles
    filled = filled and kept is not None
    return build(hidden, head, targets.long(), chunk, kept=kept, filled=filled)


@register_triton("linear_logprob")
def _logprob_tiles(*args: Any, **kwargs: Any) -> TileOps:
    """Imported at the first use: a machine without a GPU does not wait for Triton."""
    from ._logits_triton import TritonTiles

    return TritonTiles(*args, **kwargs)


@register_triton("linear_policy_loss")
def _policy_tiles(*args: Any, **kwargs: Any) -> TileOps:
    from ._policy_triton import TritonPolicyTiles

    return TritonPolicyTiles(*args, **kwargs)


def register_op(
    name: str, schema: str, run: Callable[..., Any], shapes: Callable[..., Any]
) -> torch.library.CustomOpDef:
    """A functional operator that torch.compile takes as one node, with ``shapes`` as its fake kernel."""
    op = torch.library.custom_op(f"{LIBRARY}::{name}", run, mutates_args=(), schema=schema)
    op.register_fake(shapes)
    return op


def name_of(group: dist.ProcessGroup | None) -> str | None:
    """Operators take a group by its name."""
    return None if group is None else group.group_name


def group_of(name: str) -> dist.ProcessGroup:
    resolve_group: Any = dist.distributed_c10d._resolve_process_group
    return resolve_group(name)
