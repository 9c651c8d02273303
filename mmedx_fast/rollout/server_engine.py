"""Rollouts through vLLM's own HTTP server, on other GPUs or machines than the trainer.

Prompts go as token ids with their images, responses come back as token ids with the log-probs of the
distribution they were drawn from; no text is tokenised on the way.
"""

from __future__ import annotations

import base64
import contextlib
import io
import math
import tempfile
import time
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mmedx_fast._env import default_device
from mmedx_fast.config import ModelConfig, RolloutConfig
from mmedx_fast.prompts import PromptBuilder, Question
from mmedx_fast.rollout.base import (
    BASE_VERSION,
    AsksByQuestion,
    EngineError,
    EngineStats,
    Progress,
    Request,
    Rollout,
    RolloutError,
    Sampling,
    check_adapter,
    check_requests,
    check_weights,
    request_seeds,
)
from mmedx_fast.rollout.prefix import PrefixSharing
from mmedx_fast.rollout.server_client import ServerClient, ServerError, ServerGone, wrong_settings
from mmedx_fast.rollout.server_follower import FOLDERS_ONLY
from mmedx_fast.rollout.server_process import ServerProcess, by_hand
from mmedx_fast.rollout.server_requests import Asker, RequestError
from mmedx_fast.rollout.vllm_options import engine_options

_CONNECT_SECONDS = 30.0


class ServerEngine(AsksByQuestion):
    """vLLM servers behind :class:`mmedx_fast.rollout.base.RolloutEngine`.

    Those of ``rollout.server_urls``, all with the same adapter, or one that this engine starts and
    ends.
    """

    name = "server"
    shared = True
    takes_tensors = False

    def __init__(
        self,
        model: ModelConfig,
        rollout: RolloutConfig,
        builder: PromptBuilder,
        *,
        max_model_len: int,
        max_images: int = 1,
        lora: bool = True,
        seed: int = 0,
        log: Path | None = None,
        **overrides: Any,
    ) -> None:
        """Connect, or start a server and wait for it. ``log``: the file it prints to (a temporary
        one by default); the rest as :class:`VllmEngine`. Raises ``RolloutError``."""
        self.builder = builder
        self.version = BASE_VERSION
        self.max_model_len = max_model_len
        self.max_images = max_images
        self.max_lora_rank = rollout.max_lora_rank
        folder = Path(model.path)
        self._model_path = str(folder.resolve()) if folder.is_dir() else model.path
        self._lora = lora
        self._timeout = rollout.server_timeout
        self._adapter: str | None = None
        self._loads = 0
        # Servers that outlive their trainer still know the names of an earlier one.
        self._mark = uuid.uuid4().hex[:8]
        self._tally = [0, 0, 0, 0.0]
        self._process: ServerProcess | None = None
        self._closed = False
        options = engine_options(
            model.model_copy(update={"path": self._model_path}),
            rollout,
            device=default_device(),
            max_model_len=max_model_len,
            max_images=max_images,
            lora=lora,
            seed=seed,
            own_workers=True,
        )
        self._command = by_hand(options)
        urls = rollout.server_urls
        if not urls:
            own_log = Path(tempfile.gettempdir()) / f"mmedx-server-{self._mark}.log"
            self._process = ServerProcess(
                options | overrides,
                extra=rollout.server_args,
                gpus=rollout.server_gpus,
                log=log or own_log,
            )
            urls = (self._process.url,)
        self._servers = [ServerClient(url, self._timeout) for url in urls]
        self._asker = Asker(self._servers, self._timeout)
        try:
            self._connect(rollout)
        except BaseException:
            self.close()
            raise

    def _connect(self, rollout: RolloutConfig) -> None:
        for server in self._servers:
            self._wait_for(server)
        configs = [self._checked_config(server, rollout) for server in self._servers]
        self._priority = all(c["scheduler_config"]["policy"] == "priority" for c in configs)
        self._sleeps = all(c["model_config"]["enable_sleep_mode"] for c in configs)
        self._prefix = [PrefixSharing(int(c["cache_config"]["block_size"])) for c in configs]
        if self._process is None:
            # A run that was killed may have left other weights, or a sleeping server.
            self.wake()
            self.load_weights(self._model_path)
        self._counters = self._read_counters()

    def _wait_for(self, server: ServerClient) -> None:
        """Until it is ready; one that somebody else started should be already."""
        patience = min(self._timeout, self._timeout if self._process else _CONNECT_SECONDS)
        until = time.monotonic() + patience
        while not server.healthy():
            if self._process is not None:
                self._process.check()
            if time.monotonic() > until:
                help = (
                    f"raise rollout.server_timeout if it is only slow; {self._process.last_words()}"
                    if self._process
                    else f"see that rollout.server_urls is right. To start one:\n{self._command}"
                )
                raise RolloutError(
                    f"the rollout server {server.url} does not answer for {patience:.0f} s; {help}"
                )
            time.sleep(0.2)

    def _checked_config(self, server: ServerClient, rollout: RolloutConfig) -> dict[str, Any]:
        """The server's configuration; ``RolloutError`` when rollouts from it would be wrong."""
        try:
            config = server.config()
        except ServerError as error:
            if error.status != 404:
                raise
            raise RolloutError(
                f"the rollout server {server.url} does not tell its settings: it runs without "
                f"VLLM_SERVER_DEV_MODE=1. Start it as:\n{self._command}"
            ) from error
        problems = wrong_settings(
            config,
            max_model_len=self.max_model_len,
            max_images=self.max_images,
            lora_rank=rollout.max_lora_rank if self._lora else 0,
        )
        if not server.takes_tokens():
            problems.append("neither --enable-scale-out nor --tokens-only, needed the first")
        if problems:
            raise RolloutError(
                f"the rollout server {server.url} was started with {'; '.join(problems)}. "
                f"Start it as:\n{self._command}"
            )
        return config

    # -- rollouts --------------------------------------------------------------------------------

    def generate_requests(
        self, requests: Sequence[Request], sampling: Sampling, progress: Progress | None = None
    ) -> list[Rollout]:
        if self._closed:
            raise RolloutError("the rollout engine is closed")
        self._asker.interrupted = False
        prompts = check_requests(requests, sampling, self.max_model_len, self.max_images)
        start = time.perf_counter()
        owners = self._owners(requests)
        for number, prefix in enumerate(self._prefix):
            share = [i for i, owner in enumerate(owners) if owner == number]
            prefix.add([requests[i] for i in share], [prompts[i] for i in share], sampling.n)
        bodies = self._bodies(requests, owners, sampling)
        try:
            answers = self._asker.ask(list(zip(owners, bodies, strict=True)), sampling.n, progress)
        except RequestError as error:
            raise self._explained(error, requests[error.index][0]) from error
        rollouts = [
            self._rollout(index, requests[index], prompts[index], choice)
            for index, answer in enumerate(answers)
            for choice in self._choices(requests[index], prompts[index], answer, sampling.n)
        ]
        self._tally[0] += len(requests)
        self._tally[1] += len(rollouts)
        self._tally[2] += sum(len(rollout.token_ids) for rollout in rollouts)
        self._tally[3] += time.perf_counter() - start
        return rollouts

    def interrupt(self) -> None:
        self._asker.interrupt()

    def _owners(self, requests: Sequence[Request]) -> list[int]:
        """The server of each request: questions in turn, so that a question's prompts meet in one
        prefix cache. A function of the requests alone."""
        seen: dict[str, int] = {}
        return [
            seen.setdefault(question.id, len(seen)) % len(self._servers) for question, _ in requests
        ]

    def _bodies(
        self, requests: Sequence[Request], owners: Sequence[int], sampling: Sampling
    ) -> list[dict[str, Any]]:
        """What goes to the servers; a question's prompts share one copy of its images."""
        params = {
            "n": sampling.n,
            "temperature": 0.0 if sampling.greedy else sampling.temperature,
            "top_p": 1.0 if sampling.greedy else sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "stop_token_ids": self.builder.stop_token_ids,
            # As in process: an exact mask, before the log-probs are taken.
            "logit_bias": {str(id): -math.inf for id in self.builder.banned_token_ids},
            "logprobs": 0,
            "detokenize": False,
        }
        seeds = request_seeds(requests, sampling.seed)
        pictures: dict[int, list[dict[str, Any]]] = {}
        bodies = []
        for order, (question, guideline) in enumerate(requests):
            if id(question) not in pictures:
                pictures[id(question)] = _content_parts(question)
            seed = None if sampling.greedy else seeds[order]
            body: dict[str, Any] = {
                "token_ids": question.unexpanded_ids(guideline),
                "content_parts": pictures[id(question)] or None,
                "sampling_params": params | {"seed": seed},
                # The ids after the placeholders' expansion, to be compared with ours.
                "return_token_ids": True,
            }
            if self._adapter is not None:
                body["model"] = _name(self._adapter, owners[order])
            if self._priority:
                body["priority"] = order
            bodies.append(body)
        return bodies

    def _explained(self, error: RequestError, question: Question) -> RolloutError:
        status = error.cause.status
        if status == 0 and self._process is not None:
            return EngineError(f"{error.cause}; {self._process.last_words()}")
        if status == 0:
            return EngineError(str(error.cause))
        if status == 404:
            return RolloutError(
                f"{error.cause}; it has lost the trainer's adapter: was it restarted? Start this run "
                "again to go on"
            )
        if status >= 400:
            return RolloutError(f"question {question.id!r}: {error.cause}")
        return error.cause

    def _choices(
        self, request: Request, prompt: list[int], answer: dict[str, Any], n: int
    ) -> list[dict[str, Any]]:
        """The ``n`` samples of an answer in their order, checked against what was asked."""
        name = request[0].id
        found = answer["prompt_token_ids"]
        if found != prompt:
            raise RolloutError(
                f"question {name!r}: the server made {len(found)} prompt ids, the prompt builder "
                f"{len(prompt)}; both must use the same processor files"
            )
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        reasons = {choice["finish_reason"] for choice in choices}
        if len(choices) != n or not reasons <= {"stop", "length"}:
            raise RolloutError(
                f"question {name!r}: the server gave {len(choices)} of {n} samples, ended by "
                f"{sorted(map(str, reasons))}; somebody else aborted requests on it"
            )
        return choices

    def _rollout(
        self, index: int, request: Request, prompt: list[int], choice: dict[str, Any]
    ) -> Rollout:
        ids = choice["token_ids"]
        return Rollout(
            question=index,
            guideline=request[1],
            sample=choice["index"],
            prompt_ids=prompt,
            token_ids=ids,
            logprobs=[position["logprob"] for position in choice["logprobs"]["content"]],
            finish_reason=choice["finish_reason"],
            text=self.builder.tokenizer.decode(ids, skip_special_tokens=True),
        )

    # -- weights ---------------------------------------------------------------------------------

    def load_adapter(self, folder: str | Path | None, version: int) -> None:
        old, new = self._adapter, None
        if folder is not None:
            new = self._add_adapter(Path(folder).resolve(), version)
        if old is not None:
            self._unload(old, len(self._servers))
        self._adapter = new
        self.version = BASE_VERSION if new is None else version
        for server in self._servers:
            server.reset_prefix_cache()

    def _add_adapter(self, folder: Path, version: int) -> str:
        """Load it into all servers or into none; returns its name, which was never used before."""
        if not self._lora:
            raise RolloutError(f"{folder}: the engine was started without room for adapters")
        check_adapter(folder, self.max_lora_rank)
        self._loads += 1
        name = f"mmedx-{self._mark}-{self._loads}-v{version}"
        loaded = 0
        try:
            for number, server in enumerate(self._servers):
                server.load_adapter(_name(name, number), folder)
                loaded += 1
        except ServerError as error:
            with contextlib.suppress(ServerError):
                self._unload(name, loaded)
            if isinstance(error, ServerGone):
                raise
            raise RolloutError(f"{folder}: vLLM cannot load this adapter: {error}") from error
        return name

    def _unload(self, name: str, servers: int) -> None:
        for number, server in enumerate(self._servers[:servers]):
            server.unload_adapter(_name(name, number))

    def load_weights(self, folder: str | Path, version: int = BASE_VERSION) -> None:
        files = check_weights(folder, self._model_path)
        self.load_adapter(None, BASE_VERSION)
        try:
            for server in self._servers:
                server.load_weights(files[0].resolve().parent)
        except ServerGone:
            raise
        except ServerError as error:
            raise RolloutError(
                f"{folder}: vLLM cannot take these weights: {error}; the folder must be on a file "
                "system that the server sees under the same path. Its model is now in an undefined "
                "state: load other weights or restart it"
            ) from error
        finally:
            self.reset_caches()
        self.version = version

    def update_weights(self, weights: Iterable[tuple[str, Any]], version: int) -> None:
        raise RolloutError(FOLDERS_ONLY)

    # -- the rest --------------------------------------------------------------------------------

    def sleep(self) -> None:
        if self._sleeps:
            for server in self._servers:
                server.sleep()

    def wake(self) -> None:
        if self._sleeps:
            for server in self._servers:
                server.wake()

    def reset_caches(self) -> None:
        for server in self._servers:
            server.reset_prefix_cache()
            server.reset_image_caches()

    def stats(self) -> EngineStats:
        counters = self._read_counters()
        deltas = [(q - p, h - g) for (q, h), (p, g) in zip(counters, self._counters, strict=True)]
        self._counters = counters
        for prefix, (queries, hits) in zip(self._prefix, deltas, strict=True):
            prefix.check(hits / queries if queries else None)
        asked, found = (sum(column) for column in zip(*deltas, strict=True))
        requests, sequences, tokens, seconds = self._tally
        self._tally = [0, 0, 0, 0.0]
        return EngineStats(
            requests=int(requests),
            sequences=int(sequences),
            generated_tokens=int(tokens),
            seconds=seconds,
            prefix_cache_hit_rate=found / asked if asked else None,
        )

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self.interrupt()
        if self._process is None and self._adapter is not None:
            with contextlib.suppress(ServerError):
                self._unload(self._adapter, len(self._servers))
        for server in self._servers:
            server.close()
        if self._process is not None:
            self._process.stop()

    def _read_counters(self) -> list[tuple[float, float]]:
        return [server.counters() for server in self._servers]


def _name(adapter: str, server: int) -> str:
    """An adapter's name in one server; two addresses may lead to the same one."""
    return f"{adapter}-{server}"


def _content_parts(question: Question) -> list[dict[str, Any]]:
    """The images as lossless PNGs, with the hashes that spare the server hashing the pixels."""
    parts = []
    for image, name in zip(question.images, question.image_hashes, strict=True):
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=1)
        data = base64.b64encode(buffer.getvalue()).decode()
        parts.append({"type": "image_url", "url": f"data:image/png;base64,{data}", "uuid": name})
    return parts
