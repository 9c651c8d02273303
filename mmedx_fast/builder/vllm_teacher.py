"""The teacher as a vLLM engine in this process, for a machine whose GPUs are free for it."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmedx_fast.builder.config import TeacherConfig
from mmedx_fast.builder.prompt import teacher_messages
from mmedx_fast.builder.teacher import (
    Ask,
    BudgetError,
    Ledger,
    OnError,
    OnReply,
    QuestionError,
    Reply,
    TeacherError,
)
from mmedx_fast.data.records import Record

if TYPE_CHECKING:
    from mmedx_fast.prompts import Question
    from mmedx_fast.rollout import Rollout, RolloutEngine

_LOG = logging.getLogger(__name__)


class VllmTeacher:
    """The project's own rollout engine on the teacher's weights, started when there is a question."""

    def __init__(self, cfg: TeacherConfig, ledger: Ledger, max_images: int) -> None:
        self._cfg, self._ledger, self._max_images = cfg, ledger, max_images
        self._engine: RolloutEngine | None = None
        self._builder: Any = None

    def ask(self, asks: Sequence[Ask], on_reply: OnReply, on_error: OnError) -> None:
        for attempt, group in itertools.groupby(asks, key=lambda ask: ask.attempt):
            waiting = list(group)
            while waiting:
                batch = self._affordable(waiting[: self._cfg.vllm.batch])
                self._ask_batch(batch, attempt, on_reply, on_error)
                waiting = waiting[len(batch) :]

    def describe(self) -> dict[str, Any]:
        return {"engine": "vllm in process"}

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _affordable(self, asks: Sequence[Ask]) -> Sequence[Ask]:
        """As many from the first on as the budget holds together. Raises ``BudgetError`` for none."""
        reserved: list[float] = []
        try:
            for ask in asks:
                reserved.append(self._ledger.reserve(ask))
        except BudgetError:
            if not reserved:
                raise
        for amount in reserved:
            self._ledger.release(amount)
        return asks[: len(reserved)]

    def _ask_batch(
        self, asks: Sequence[Ask], attempt: int, on_reply: OnReply, on_error: OnError
    ) -> None:
        from mmedx_fast.prompts import PromptError
        from mmedx_fast.rollout import Sampling

        engine = self._started()
        ready: list[tuple[Ask, Question]] = []
        questions: dict[str, Question] = {}
        for ask in asks:
            try:
                if ask.record.id not in questions:
                    questions[ask.record.id] = self._builder.question(ask.record)
                questions[ask.record.id].prompt_ids(ask.guideline)
                ready.append((ask, questions[ask.record.id]))
            except PromptError as error:
                if self._cfg.on_error == "stop":
                    raise QuestionError(f"{error}, or set teacher.on_error=drop") from None
                on_error(ask, QuestionError(str(error)))
        temperature = 1.0 if self._cfg.temperature is None else self._cfg.temperature
        sampling = Sampling(
            temperature=temperature or 1.0,
            greedy=temperature == 0,
            max_tokens=self._cfg.max_tokens,
            seed=self._cfg.seed * 1_000_003 + attempt,
        )
        start = time.monotonic()
        requests = [(question, ask.guideline) for ask, question in ready]
        rollouts = engine.generate_requests(requests, sampling) if requests else []
        seconds = (time.monotonic() - start) / max(1, len(rollouts))
        for (ask, _), rollout in zip(ready, rollouts, strict=True):
            reply = self._reply(rollout, seconds)
            self._ledger.add(reply)
            on_reply(ask, reply)

    def _reply(self, rollout: Rollout, seconds: float) -> Reply:
        return Reply(
            text=rollout.text,
            finish_reason=rollout.finish_reason,
            tokens_in=len(rollout.prompt_ids),
            tokens_out=len(rollout.token_ids),
            estimated=False,
            model=self._cfg.model,
            seconds=round(seconds, 3),
        )

    def _started(self) -> RolloutEngine:
        if self._engine is None:
            self._engine = self._start()
        return self._engine

    def _start(self) -> RolloutEngine:
        from mmedx_fast._env import prepare_environment

        prepare_environment(offline=True)
        from mmedx_fast.config import DataConfig, ModelConfig, RolloutConfig
        from mmedx_fast.prompts import PromptBuilder
        from mmedx_fast.rollout import create_engine
        from mmedx_fast.tiny import assets_folder

        cfg, vllm = self._cfg, self._cfg.vllm

        class TeacherPrompts(PromptBuilder):
            """The project's prompts with the teacher's words."""

            def messages(
                self, record: Record, guideline: str | None = None
            ) -> list[dict[str, Any]]:
                made = teacher_messages(record, guideline or "", cfg)
                for part in itertools.chain.from_iterable(m["content"] for m in made):
                    self._refuse_special(record, "question or options", part.get("text", ""))
                return made

        folder = str(assets_folder()) if cfg.model == "tiny" else cfg.model
        data = DataConfig(max_prompt_length=vllm.max_prompt_length)
        try:
            self._builder = TeacherPrompts.from_folder(folder, data, cfg.max_pixels)
        except ValueError as error:
            raise TeacherError(f"teacher.model = {cfg.model}: {error}") from error
        settings = RolloutConfig(
            engine="vllm",
            max_num_seqs=vllm.max_num_seqs,
            gpu_memory_utilization=vllm.gpu_memory_utilization,
            kv_cache_memory_bytes=vllm.kv_cache_memory_bytes,
            tensor_parallel_size=vllm.tensor_parallel_size,
            sleep=False,
        )
        return create_engine(
            ModelConfig(path=folder, dtype=vllm.dtype, max_pixels=cfg.max_pixels),
            settings,
            self._builder,
            max_model_len=vllm.max_prompt_length + cfg.max_tokens,
            max_images=self._max_images,
            lora=False,
            seed=cfg.seed,
        )
