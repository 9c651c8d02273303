"""What the ranks of a launch tell each other beside gradients. With one process everything is local.

Values travel as JSON, so nothing is unpickled; Python's JSON keeps every float to the bit, NaN and
infinities too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

PATIENCE = timedelta(hours=12)
"""How long ranks wait for one that is at work alone (reading data, merging a model)."""

T = TypeVar("T")
_talk: tuple[Any, Any] = (None, None)
"""The world that the group of :func:`_group` was made in, and the group."""


class OtherRankError(RuntimeError):
    """Rank 0 could not do what all ranks need; the message is rank 0's."""


def join() -> None:
    """Meet the launcher's other processes, before a policy does it; without a launcher, nothing."""
    if launched() and not dist.is_initialized():
        from mmedx_fast.policy_engine import ensure_distributed
        from mmedx_fast.policy_model import default_place

        ensure_distributed(default_place())


def launched() -> bool:
    """Whether a launcher (torchrun, deepspeed) started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def leave() -> None:
    """The end of what :func:`join` began, once every rank is here."""
    if launched() and dist.is_initialized():
        barrier()
        dist.destroy_process_group()


def _several() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def _group() -> Any:
    """A gloo group for JSON and barriers: NCCL gives up after minutes and keeps the GPU busy meanwhile."""
    global _talk
    world = dist.group.WORLD
    if _talk[0] is not world:
        _talk = (world, dist.new_group(backend="gloo", timeout=PATIENCE))
    return _talk[1]


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number among them, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this process is the one that writes files."""
    return rank() == 0


def barrier() -> None:
    """Wait until every rank is here."""
    if _several():
        dist.barrier(_group())


def all_gather(value: Any) -> list[Any]:
    """Every rank's `value` (what JSON can hold), by rank. Every rank must call it."""
    if not _several():
        return [value]
    data = json.dumps(value).encode()
    own = torch.tensor([len(data)])
    lengths = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(lengths, own, _group())
    longest = max(int(length) for length in lengths)
    padded = torch.frombuffer(bytearray(data.ljust(longest)), dtype=torch.uint8)
    texts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(texts, padded, _group())
    return [json.loads(text.numpy().tobytes()) for text in texts]


def from_main(value: Any) -> Any:
    """Rank 0's `value`, on every rank; what the others pass is ignored."""
    return all_gather(value if is_main() else None)[0]


def main_first(work: Callable[[], T]) -> T:
    """`work` on rank 0, then on the others, which find on disk what rank 0 wrote. Every rank calls it.

    Raises:
        OtherRankError: on the others, where rank 0's `work` raised; rank 0 gets its own error.
    """
    if not is_main():
        _heed(from_main(None))
        return work()
    try:
        done = work()
    except Exception as error:
        from_main(str(error) or type(error).__name__)
        raise
    from_main(None)
    return done


def main_only(work: Callable[[], None]) -> None:
    """`work` on rank 0 while the others wait. Every rank calls it; errors as in :func:`main_first`."""
    main_first(lambda: work() if is_main() else None)


def _heed(error: str | None) -> None:
    if error is not None:
        raise OtherRankError(f"rank 0 stopped: {error}")
