"""What the ranks of a launch tell each other beside gradients. With one process everything is local.

Values travel as JSON, so nothing is unpickled; Python's JSON keeps every float to the bit, NaN and
infinities too.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
import torch.distributed as dist


def join() -> None:
    """Meet the launcher's other processes, before a policy does it; without a launcher, nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        from mmedx_fast.policy_engine import ensure_distributed
        from mmedx_fast.policy_model import default_place

        ensure_distributed(default_place())


def _several() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


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
        dist.barrier()


def all_gather(value: Any) -> list[Any]:
    """Every rank's `value` (what JSON can hold), by rank. Every rank must call it."""
    if not _several():
        return [value]
    data = json.dumps(value).encode()
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    own = torch.tensor([len(data)], device=device)
    lengths = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(lengths, own)
    longest = max(int(length) for length in lengths)
    padded = torch.frombuffer(bytearray(data.ljust(longest)), dtype=torch.uint8).to(device)
    texts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(texts, padded)
    return [json.loads(bytes(text.tolist())) for text in texts]


def from_main(value: Any) -> Any:
    """Rank 0's `value`, on every rank; what the others pass is ignored."""
    return all_gather(value if is_main() else None)[0]
