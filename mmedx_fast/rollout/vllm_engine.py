"""Rollouts through vLLM in this process, on CPU and CUDA alike."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import random
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mmedx_fast._env import default_device, prepare_environment
from mmedx_fast.config import ModelConfig, RolloutConfig
from mmedx_fast.model_files import local_folder, read_tensors, tensor_files
from mmedx_fast.prompts import PromptBuilder
from mmedx_fast.rollout.base import (
    BASE_VERSION,
    AsksByQuestion,
    EngineError,
    EngineStats,
    Interrupted,
    Progress,
    Request,
    Rollout,
    RolloutError,
    Sampling,
    check_adapter,
    check_names,
    check_requests,
    check_weights,
    request_seeds,
)
from mmedx_fast.rollout.prefix import PrefixSharing
from mmedx_fast.rollout.vllm_options import engine_options
from mmedx_fast.rollout.watchdog import Watchdog


class VllmEngine(AsksByQuestion):
    """vLLM behind :class:`mmedx_fast.rollout.base.RolloutEngine`.

    One engine per process, kept to its end: closing it also tears down ``torch.distributed``.
    """

    name = "vllm"
    shared = False

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
        **overrides: Any,
    ) -> None:
        """Start the engine on ``model.path`` (weights in ``model.dtype``).

        ``max_model_len``: prompt plus response, tokens. ``max_images``: images per prompt.
        ``lora``: room for one adapter. ``overrides`` go to ``vllm.LLM`` as they are. Raises
        ``RolloutError``.
        """
        self.builder = builder
        self.version = BASE_VERSION
        self.max_model_len = max_model_len
        self.max_images = max_images
        self.max_lora_rank = rollout.max_lora_rank
        self.device = default_device()
        self._lora = lora
        self._request: Any = None
        self._interrupted = False
        self._loads = 0
        self._timeout = rollout.timeout
        self._sleeps = rollout.sleep and self.device == "cuda"
        self._model_path = model.path
        self._workers = rollout.tensor_parallel_size > 1
        self.takes_tensors = not self._workers
        options = engine_options(
            model,
            rollout,
            device=self.device,
            max_model_len=max_model_len,
            max_images=max_images,
            lora=lora,
            seed=seed,
            own_workers=self._workers,
        )
        if self._workers and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise RolloutError(
                f"rollout.tensor_parallel_size = {rollout.tensor_parallel_size} with several ranks: "
                "every rank has an engine of its own, on its own GPU; set "
                "rollout.tensor_parallel_size=1, or rollout.engine=server for one engine on other GPUs"
            )
        self._llm: Any = _start(options | overrides)
        self._prefix = PrefixSharing(self._engine.vllm_config.cache_config.block_size)
        self._counters = self._read_counters()
        self._tally = [0, 0, 0, 0.0]

    def generate_requests(
        self, requests: Sequence[Request], sampling: Sampling, progress: Progress | None = None
    ) -> list[Rollout]:
        self._interrupted = False
        prompts = check_requests(requests, sampling, self.max_model_len, self.max_images)
        start = time.perf_counter()
        # The CPU sampler draws from torch's global generator, which belongs to the trainer.
        with _preserved_rng():
            outputs = self._run(requests, sampling, progress)
        rollouts = [
            self._rollout(index, requests[index], prompts[index], output, completion)
            for index, output in enumerate(outputs)
            for completion in output.outputs
        ]
        self._prefix.add(requests, prompts, sampling.n)
        self._tally[0] += len(requests)
        self._tally[1] += len(rollouts)
        self._tally[2] += sum(len(rollout.token_ids) for rollout in rollouts)
        self._tally[3] += time.perf_counter() - start
        return rollouts

    def _run(
        self, requests: Sequence[Request], sampling: Sampling, progress: Progress | None
    ) -> list[Any]:
        """Queue all requests, step until all are done; leave no request behind in an engine that
        lives."""
        engine = self._engine
        names: list[str] = []
        outputs: list[Any] = [None] * len(requests)
        total = len(requests) * sampling.n
        try:
            for request, seed in zip(requests, request_seeds(requests, sampling.seed), strict=True):
                self._heed()
                names.append(self._enqueue(request, sampling, seed))
            # Outputs carry the name without the random suffix that enqueue() returns.
            index_of = {name.rpartition("-")[0] or name: i for i, name in enumerate(names)}
            done = 0
            with contextlib.closing(self._finished()) as finished:
                for output in finished:
                    outputs[index_of[output.request_id]] = output
                    done += len(output.outputs)
                    if progress:
                        progress(done, total)
        except EngineError:
            raise
        except BaseException:
            if names:
                engine.abort_request(names, internal=True)
            raise
        return outputs

    def _finished(self) -> Generator[Any, None, None]:
        """Step until no request is left; the finished ones as they come. To be closed.

        Raises ``EngineError`` when no token was made for ``rollout.timeout`` seconds. Where the engine
        does not even come back, the watchdog ends the process.
        """
        made, since, looked = self._tokens_made(), time.monotonic(), time.monotonic()
        with Watchdog(self._timeout, "vLLM") as watchdog:
            while self._engine.has_unfinished_requests():
                self._heed()
                outputs = self._step()
                watchdog.beat()
                yield from (output for output in outputs if output.finished)
                watchdog.beat()  # the time in between was the caller's
                if time.monotonic() - looked < min(1.0, self._timeout / 4):
                    continue
                before, made, looked = made, self._tokens_made(), time.monotonic()
                if outputs or made != before:
                    since = looked
                elif looked - since > self._timeout:
                    raise EngineError(
                        f"vLLM has made no token for {looked - since:.0f} s (rollout.timeout = "
                        f"{self._timeout:g})"
                    )

    def _tokens_made(self) -> tuple[int, int]:
        """Prompt and response tokens since the engine started."""
        counters = self._metrics()
        return counters["vllm:prompt_tokens"], counters["vllm:generation_tokens"]

    @contextlib.contextmanager
    def _alive(self) -> Iterator[None]:
        """Around calls that vLLM has no reason to refuse: it is broken when it does, and hangs when it does
        not come back."""
        try:
            with Watchdog(self._timeout, "vLLM"):
                yield
        except RolloutError:
            raise
        except Exception as error:
            raise EngineError(f"vLLM is broken: {error!r}") from error

    def load_adapter(self, folder: str | Path | None, version: int) -> None:
        old = self._request
        new = None
        with self._alive():
            if folder is not None:
                new = self._add_adapter(Path(folder).resolve(), version)
            if old is not None:
                self._engine.remove_lora(old.lora_int_id)
            self._request = new
            self.version = BASE_VERSION if new is None else version
            # The vision tower carries no adapter, so encoded images stay valid.
            self._llm.reset_prefix_cache()

    def _add_adapter(self, folder: Path, version: int) -> Any:
        from vllm.lora.request import LoRARequest
        from vllm.v1.engine.exceptions import EngineDeadError

        if not self._lora:
            raise RolloutError(f"{folder}: the engine was started without room for adapters")
        check_adapter(folder, self.max_lora_rank)
        # A name and id used before would silently serve the old adapter or its cached prefixes.
        self._loads += 1
        request = LoRARequest(f"adapter-{self._loads}-v{version}", self._loads, str(folder))
        try:
            # In generate() a bad adapter would leave requests behind that spin for ever.
            self._engine.add_lora(request)
        except EngineDeadError:
            raise
        except Exception as error:
            raise RolloutError(f"{folder}: vLLM cannot load this adapter: {error}") from error
        return request

    def load_weights(self, folder: str | Path, version: int = BASE_VERSION) -> None:
        check_weights(folder, self._model_path)
        local = local_folder(folder)
        if self._workers:  # of their own: they read the folder, tensors do not travel to them
            self._reload(str(folder), {"weights_path": str(local.resolve())})
        else:
            self._reload(str(folder), {"weights_iterator": read_tensors(tensor_files(local))})
        self.version = version

    def update_weights(self, weights: Iterable[tuple[str, Any]], version: int) -> None:
        names: list[str] = []

        def copies() -> Iterator[tuple[str, Any]]:
            for name, tensor in weights:
                names.append(name)
                # vLLM keeps what it is given until a layer is complete.
                yield name, tensor.detach().clone()

        source = f"the trainer's weights of version {version}"
        self._reload(source, {"weights_iterator": copies()})
        check_names(source, names, self._model_path)
        self.version = version

    def _reload(self, source: str, weights: dict[str, Any]) -> None:
        """Serve `weights`, arguments of vLLM's ``reload_weights``, without an adapter."""
        from vllm.v1.engine.exceptions import EngineDeadError

        self.load_adapter(None, BASE_VERSION)
        try:
            # Without the watchdog: the trainer's weights come as fast as its ranks gather them.
            self._llm.collective_rpc("reload_weights", kwargs=weights)
        except EngineDeadError as error:
            raise EngineError(f"vLLM is dead: {error}") from error
        except Exception as error:
            raise RolloutError(
                f"{source}: vLLM cannot take these weights: {error}; its model is now in an "
                "undefined state, load other weights or start a new engine"
            ) from error
        finally:
            self.reset_caches()

    def interrupt(self) -> None:
        self._interrupted = True

    def _heed(self) -> None:
        if self._interrupted:
            raise Interrupted("the rollouts were interrupted")

    def sleep(self) -> None:
        if self._sleeps:
            with self._alive():
                self._llm.sleep(level=1)

    def wake(self) -> None:
        if self._sleeps:
            with self._alive():
                self._llm.wake_up()

    def reset_caches(self) -> None:
        # All three: the scheduler else believes that an image is still encoded, and dies on it.
        with self._alive():
            self._llm.reset_prefix_cache()
            self._llm.reset_mm_cache()
            self._engine.reset_encoder_cache()

    def stats(self) -> EngineStats:
        counters = self._read_counters()
        queries, hits = (new - old for new, old in zip(counters, self._counters, strict=True))
        self._counters = counters
        hit_rate = hits / queries if queries else None
        self._prefix.check(hit_rate)
        requests, sequences, tokens, seconds = self._tally
        self._tally = [0, 0, 0, 0.0]
        return EngineStats(
            requests=int(requests),
            sequences=int(sequences),
            generated_tokens=int(tokens),
            seconds=seconds,
            prefix_cache_hit_rate=hit_rate,
        )

    def close(self) -> None:
        if self._llm is None:
            return
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        gc.collect()
        cleanup_dist_env_and_memory()

    @property
    def _engine(self) -> Any:
        if self._llm is None:
            raise RolloutError("the rollout engine is closed")
        return self._llm.llm_engine

    def _enqueue(self, request: Request, sampling: Sampling, seed: int) -> str:
        from vllm import SamplingParams
        from vllm.v1.engine.exceptions import EngineDeadError

        question, guideline = request
        params = SamplingParams(
            n=sampling.n,
            temperature=0.0 if sampling.greedy else sampling.temperature,
            top_p=1.0 if sampling.greedy else sampling.top_p,
            max_tokens=sampling.max_tokens,
            seed=None if sampling.greedy else seed,
            stop_token_ids=self.builder.stop_token_ids,
            # An exact mask: -inf on top of any logit, before the log-probs are taken.
            logit_bias=dict.fromkeys(self.builder.banned_token_ids, -math.inf),
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
        )
        try:
            (name,) = self._llm.enqueue(
                question.vllm_prompt(guideline),
                params,
                lora_request=self._request,
                use_tqdm=False,
            )
        except EngineDeadError as error:
            raise EngineError(f"vLLM is dead: {error}") from error
        except Exception as error:
            raise RolloutError(
                f"question {question.id!r}: vLLM refuses its prompt: {error}"
            ) from error
        return name

    def _step(self) -> list[Any]:
        try:
            return self._engine.step()
        except Exception as error:
            raise EngineError(f"vLLM failed while generating: {error!r}") from error

    def _rollout(
        self, index: int, request: Request, prompt: list[int], output: Any, completion: Any
    ) -> Rollout:
        question, guideline = request
        if list(output.prompt_token_ids) != prompt:
            raise RolloutError(
                f"question {question.id!r}: vLLM made {len(output.prompt_token_ids)} prompt ids, "
                f"the prompt builder {len(prompt)}; both must use the same processor files"
            )
        ids = list(completion.token_ids)
        flat = completion.logprobs
        return Rollout(
            question=index,
            guideline=guideline,
            sample=completion.index,
            prompt_ids=prompt,
            token_ids=ids,
            # Per position the sampled token comes first.
            logprobs=[flat.logprobs[start] for start in flat.start_indices],
            finish_reason="length" if completion.finish_reason == "length" else "stop",
            text=self.builder.tokenizer.decode(ids, skip_special_tokens=True),
        )

    def _read_counters(self) -> tuple[int, int]:
        with self._alive():
            counters = self._metrics()
        return counters["vllm:prefix_cache_queries"], counters["vllm:prefix_cache_hits"]

    def _metrics(self) -> dict[str, int]:
        """vLLM's counters by name."""
        return {metric.name: int(getattr(metric, "value", 0)) for metric in self._llm.get_metrics()}


def _start(options: dict[str, Any]) -> Any:
    prepare_environment()
    import torch

    # The CPU worker replaces it by a function that only warns; the trainer needs the real one.
    set_num_threads = torch.set_num_threads
    try:
        with _preserved_rng():
            from vllm import LLM

            if options.get("enable_lora") and torch.version.cuda is None:
                from mmedx_fast.rollout import vllm_cpu_lora

                vllm_cpu_lora.install()
            return LLM(**options)
    except ImportError as error:
        extra = "cpu" if torch.version.cuda is None else "cuda"
        raise RolloutError(
            f"vLLM cannot be imported ({error}); install it with pip install "
            f"'mmedx-fast[{extra}]', or set rollout.engine=transformers, which is slower"
        ) from error
    except Exception as error:
        raise RolloutError(f"vLLM cannot start on {options['model']}: {error}") from error
    finally:
        torch.set_num_threads = set_num_threads


@contextlib.contextmanager
def _preserved_rng() -> Iterator[None]:
    """Put the global random states of torch, numpy and random back on leaving."""
    import numpy
    import torch

    states = random.getstate(), numpy.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
