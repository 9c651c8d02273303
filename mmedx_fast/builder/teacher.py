"""What a teacher is: questions in, answers out as they come, and what they cost."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from mmedx_fast.builder.config import TeacherConfig
from mmedx_fast.builder.prompt import teacher_messages
from mmedx_fast.data.records import Record

CHARACTERS_PER_TOKEN = 4
PIXELS_PER_TOKEN = 784
"""What an image costs at a Qwen-VL teacher; others differ."""


class TeacherError(ValueError):
    """The teacher gave no answer and the build cannot go on; the message has the server's words."""


class QuestionError(TeacherError):
    """One question got no answer: refused, or every retry failed."""


class BudgetError(TeacherError):
    """The next request could exceed the budget."""


@dataclasses.dataclass(frozen=True)
class Ask:
    """One request: a question under a guideline, for the ``attempt``-th time (from 0).

    ``key`` is what the answer is remembered by, ``tokens_in`` an estimate of the prompt's tokens.
    """

    record: Record
    guideline: str
    attempt: int
    key: str
    seed: int
    tokens_in: int


@dataclasses.dataclass(frozen=True)
class Reply:
    """``estimated``: the server did not report its tokens, they were worked out from the text."""

    text: str
    finish_reason: str | None
    tokens_in: int
    tokens_out: int
    estimated: bool
    model: str
    seconds: float


OnReply = Callable[[Ask, Reply], None]
OnError = Callable[[Ask, QuestionError], None]


class Teacher(Protocol):
    def ask(self, asks: Sequence[Ask], on_reply: OnReply, on_error: OnError) -> None:
        """Ask all; ``on_reply`` and ``on_error`` are called from this thread as answers come.

        Raises ``TeacherError`` when it cannot go on and ``KeyboardInterrupt`` when it was interrupted,
        both after the answers under way have come.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Settings and counters for the datasheet."""
        ...

    def close(self) -> None: ...


def make_ask(
    record: Record,
    digests: Sequence[str],
    pixels: int,
    guideline: str,
    attempt: int,
    cfg: TeacherConfig,
) -> Ask:
    """The request with the key it is remembered by: everything that can change the answer is in it.

    ``digests``: SHA-256 of each image's encoded bytes. ``pixels``: of all images as they are sent.
    """
    messages = teacher_messages(record, guideline, cfg)
    about = {
        "messages": messages,
        "images": list(digests),
        "guideline": guideline,
        "attempt": attempt,
        "teacher": answer_settings(cfg),
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    characters = sum(len(part.get("text", "")) for m in messages for part in m["content"])
    return Ask(
        record=record,
        guideline=guideline,
        attempt=attempt,
        key=digest.hexdigest(),
        seed=int.from_bytes(digest.digest()[:4], "big") >> 1,
        tokens_in=characters // CHARACTERS_PER_TOKEN + pixels // PIXELS_PER_TOKEN + 20,
    )


def answer_settings(cfg: TeacherConfig) -> dict[str, Any]:
    """Settings that change what the teacher says; addresses, patience and prices do not."""
    names = "kind model temperature top_p max_tokens seed extra_body max_pixels image_format reveal_answer"
    settings = {name: getattr(cfg, name) for name in names.split()}
    if cfg.kind == "vllm":
        settings["dtype"] = cfg.vllm.dtype
    return settings


class Ledger:
    """Tokens and money: what was spent, what requests under way may still cost, what may be spent."""

    def __init__(self, cfg: TeacherConfig, spent: Mapping[str, int]) -> None:
        """``spent``: the totals of the journal so far."""
        self._cfg = cfg
        self.tokens_in, self.tokens_out = spent["tokens_in"], spent["tokens_out"]
        self.replies, self.estimated = spent["replies"], spent["estimated"]
        self._reserved = 0.0
        self.under_way = 0
        """Requests that have something put aside."""

    def cost(self, tokens_in: float, tokens_out: float) -> float:
        return (tokens_in * self._cfg.price_input + tokens_out * self._cfg.price_output) / 1_000_000

    @property
    def spent(self) -> float:
        return self.cost(self.tokens_in, self.tokens_out)

    @property
    def mean_output(self) -> float:
        """Answer tokens to expect of a reply: measured once there are some."""
        if self.replies:
            return self.tokens_out / self.replies
        return min(self._cfg.expected_output_tokens, self._cfg.max_tokens)

    def reserve(self, ask: Ask) -> float:
        """Put the most that a request can cost aside. Raises :class:`BudgetError`."""
        most = self.cost(ask.tokens_in, self._cfg.max_tokens)
        budget = self._cfg.budget
        if budget is not None and self.spent + self._reserved + most > budget:
            raise BudgetError(
                f"the budget of {self.money(budget)} is used up: {self.money(self.spent)} spent on "
                f"{self.replies} answers, and the next may cost {self.money(most)}. Raise "
                "teacher.budget and start again to go on, or write the data set from the answers that "
                "are there with --from-journal"
            )
        self._reserved += most
        self.under_way += 1
        return most

    def release(self, reserved: float) -> None:
        self._reserved -= reserved
        self.under_way -= 1

    def add(self, reply: Reply) -> None:
        self.tokens_in += reply.tokens_in
        self.tokens_out += reply.tokens_out
        self.replies += 1
        self.estimated += reply.estimated

    def money(self, amount: float) -> str:
        return f"{amount:,.4f} {self._cfg.currency}"
