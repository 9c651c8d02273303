"""The head's peers as providers: one list, which each head op wraps in its own way of calling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from bench import head
from bench.registry import Call, Provider, Sizes, little


@dataclass(frozen=True)
class HeadPeer:
    """Another implementation of log-probs from hidden states."""

    name: str
    build: Callable[[], head.LogProb]
    needs: tuple[str, ...] = ()
    cuda: bool = False
    lacking: Callable[[Sizes], str | None] = lambda sizes: None
    note: str = ""
    whole_logits: bool = False
    last: bool = False


def _eager() -> head.LogProb:
    return head.eager


PEERS = (
    HeadPeer("eager torch", _eager, note="whole logits", whole_logits=True),
    HeadPeer("TRL chunked", head.trl, needs=("trl",), note="recomputes logits in backward"),
    HeadPeer("Liger FLSCE", head.liger_scaled, needs=("liger-kernel",)),
    HeadPeer(
        "Liger FLCE",
        partial(head.liger_flce, "none"),
        needs=("liger-kernel",),
        cuda=True,
        note="reduction none, no entropy",
    ),
    HeadPeer(
        "CCE", partial(head.cce, "auto"), needs=("cut-cross-entropy",), cuda=True,
        note="its default filter drops small gradients; no entropy",
    ),
    HeadPeer(
        "CCE exact", partial(head.cce, None), needs=("cut-cross-entropy",), cuda=True,
        note="filter_eps=None; no entropy",
    ),
    HeadPeer(
        "F.linear_cross_entropy", partial(head.torch_lce, "none"), lacking=head.no_torch_lce,
        note="reduction none, no entropy",
    ),
    HeadPeer("verl", head.verl, needs=("verl",), cuda=True),
    HeadPeer(
        "torch.compile", head.compiled, cuda=True, note="whole logits", whole_logits=True, last=True
    ),
)  # fmt: skip


def providers(wrap: Callable[[head.LogProb, head.HeadInputs], Call], passes: int) -> list[Provider]:
    """Every peer as a provider; ``wrap`` makes an op's call from its log-prob function.

    ``passes`` is 1 for a forward alone, 2 where a backward follows.
    """
    made = []
    for peer in PEERS:
        memory = partial(head.eager_bytes, passes=passes) if peer.whole_logits else little
        made.append(
            Provider(
                peer.name,
                partial(_make, peer.build, wrap),
                needs=peer.needs,
                cuda=peer.cuda,
                lacking=peer.lacking,
                limits=head.ROUNDED_LOGITS,
                note=peer.note,
                last=peer.last,
                memory=memory,
            )
        )
    return made


def _make(
    build: Callable[[], head.LogProb],
    wrap: Callable[[head.LogProb, head.HeadInputs], Call],
    x: head.HeadInputs,
) -> Call:
    return wrap(build(), x)
