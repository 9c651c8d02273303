"""How much of the prompts of a batch the prefix cache should find, against what it found."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from mmedx_fast.rollout.base import Request

LOG = logging.getLogger(__name__)


def shared_tokens(
    requests: Sequence[Request], prompts: Sequence[Sequence[int]], n: int, block_size: int
) -> tuple[int, int]:
    """(prompt tokens that a cache large enough would hold, prompt tokens asked for).

    Each request is asked ``n`` times. As in vLLM, only full blocks of ``block_size`` tokens are
    shared, a block also depends on everything before it and on the images in it, and the last token
    of a prompt is always computed.
    """
    seen: set[int] = set()
    found = asked = 0
    for (question, _), ids in zip(requests, prompts, strict=True):
        image_token = question.builder.image_token_id
        limit = (len(ids) - 1) // block_size
        chain, chains = 0, []
        for index in range(len(ids) // block_size):
            block = tuple(ids[index * block_size : (index + 1) * block_size])
            images = question.image_hashes if image_token in block else ()
            chain = hash((chain, block, images))
            chains.append(chain)
        hits = sum(chain in seen for chain in chains)
        seen.update(chains)
        found += (min(hits, limit) + (n - 1) * limit) * block_size
        asked += n * len(ids)
    return found, asked


class PrefixSharing:
    """Adds up what the batches since the last ``check`` share; warns once when far less was
    found."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._found = self._asked = 0
        self._warned = False

    def add(self, requests: Sequence[Request], prompts: Sequence[Sequence[int]], n: int) -> None:
        found, asked = shared_tokens(requests, prompts, n, self.block_size)
        self._found += found
        self._asked += asked

    def check(self, measured: float | None) -> None:
        """Compare with the ``measured`` hit rate of the same batches, and start anew."""
        expected = self._found / self._asked if self._asked else 0.0
        self._found = self._asked = 0
        if measured is None or self._warned or measured >= expected / 2:
            return
        self._warned = True
        LOG.warning(
            "the prefix cache found %.0f %% of the prompt tokens, though the prompts share %.0f %% "
            "in whole blocks of %d: most likely the KV cache is too small to keep them until they are "
            "asked for again; raise rollout.kv_cache_memory_bytes or rollout.gpu_memory_utilization, or "
            "lower rollout.max_num_seqs",
            100 * measured,
            100 * expected,
            self.block_size,
        )
