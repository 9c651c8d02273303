"""The rollout engine interface: requests in, token ids with their sampling log-probs out."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from mmedx_fast.model_files import (
    ModelFilesError,
    canonical,
    local_folder,
    read_config,
    safetensors_keys,
    tensor_files,
)
from mmedx_fast.prompts import PromptError, Question

if TYPE_CHECKING:
    from torch import Tensor

Request = tuple[Question, str | None]
"""A question and the guideline it is asked under (None: no guideline)."""

Progress = Callable[[int, int], None]
"""Called with (sequences finished, sequences in all) while an engine generates."""

BASE_VERSION = -1
"""``RolloutEngine.version`` while no adapter is loaded."""


class RolloutError(RuntimeError):
    """An engine that cannot start, load weights or take a prompt; the engine stays usable if it
    was."""


class EngineError(RolloutError):
    """An engine that broke or hangs, whatever it was asked; a new one may do it."""


class Interrupted(RolloutError):
    """A ``generate`` that ``interrupt`` ended; nothing of it is left in the engine."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to sample. ``seed`` should change with every training step, or every step sees the same
    noise."""

    n: int = 1
    """Samples per request."""
    temperature: float = 1.0
    top_p: float = 1.0
    """Draw among the most probable tokens that together have this probability; log-probs are then those
    among them. The trainer's log-probs know no such bound: 1 for rollouts to train on."""
    max_tokens: int = 512
    seed: int = 0
    greedy: bool = False
    """Take the most probable token; needs ``n == 1`` and gives log-probs at temperature 1."""

    def __post_init__(self) -> None:
        if self.n < 1 or self.max_tokens < 1:
            raise ValueError(f"n = {self.n} and max_tokens = {self.max_tokens} must be at least 1")
        if self.greedy and self.n != 1:
            raise ValueError(f"greedy sampling gives one answer, n = {self.n} asks for more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p} must lie in (0, 1]")
        # The range both engines take; below it logits overflow, above it vLLM refuses.
        if not 0.01 <= self.temperature <= 2.0:
            raise ValueError(f"temperature = {self.temperature} must lie in [0.01, 2]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout:
    """One sampled response."""

    question: int
    """Index of the question among those of the call (of the request, for ``generate_requests``)."""
    guideline: str | None
    sample: int
    """Number of the sample within its request, from 0."""
    prompt_ids: list[int] = dataclasses.field(repr=False)
    """Prompt tokens, image placeholders expanded."""
    token_ids: list[int] = dataclasses.field(repr=False)
    """Response tokens; the last is an end token exactly if ``finish_reason`` is "stop"."""
    logprobs: list[float] = dataclasses.field(repr=False)
    """Natural-log probability of each response token under the distribution it was drawn from:
    softmax of logits / temperature, over all ids but the banned ones and those outside top_p."""
    finish_reason: Literal["stop", "length"]
    text: str
    """The response without special tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineStats:
    """What an engine did since the last call of ``stats``."""

    requests: int
    sequences: int
    generated_tokens: int
    seconds: float
    """Wall-clock seconds inside ``generate``."""
    prefix_cache_hit_rate: float | None
    """Share of prompt tokens found in the prefix cache; None where there is none or nothing was
    asked."""

    @property
    def tokens_per_second(self) -> float:
        return self.generated_tokens / self.seconds if self.seconds else 0.0


class RolloutEngine(Protocol):
    """What the stages need of an engine; made by ``mmedx_fast.rollout.create_engine``.

    Sampled tokens depend on ``Sampling.seed``, question id, guideline and sample number, not on
    which other requests are in the batch or on their order, up to rounding: another batch shape
    moves a logit by about 1e-6 (float32), which changes a token only where two candidates tie to
    that precision. An engine in this process batches the same requests the same way every time; a
    server batches them as they arrive.
    """

    name: str
    shared: bool
    """Whether rank 0's engine makes the rollouts of all ranks; else each rank's makes its share."""
    takes_tensors: bool
    """Whether it is in this process and has ``update_weights``; else weights come in folders."""
    version: int
    """Version of the loaded adapter, or of ``update_weights``; ``BASE_VERSION`` without either."""

    def generate(
        self,
        questions: Sequence[Question],
        guidelines: Sequence[str | None],
        sampling: Sampling,
        progress: Progress | None = None,
    ) -> list[Rollout]:
        """Answer every question under every guideline; results by question, guideline, sample.

        Raises ``PromptError`` before anything runs if a prompt does not fit, ``RolloutError``
        naming the question if the engine refuses one, ``EngineError`` if the engine breaks.
        """
        ...

    def generate_requests(
        self, requests: Sequence[Request], sampling: Sampling, progress: Progress | None = None
    ) -> list[Rollout]:
        """As ``generate`` for any list of requests; ``Rollout.question`` is the request's index."""
        ...

    def load_adapter(self, folder: str | Path | None, version: int) -> None:
        """Serve a PEFT LoRA folder from now on (None: the bare weights); caches are reset.

        Raises ``RolloutError`` naming the folder; the adapter before stays in use then.
        """
        ...

    def load_weights(self, folder: str | Path, version: int = BASE_VERSION) -> None:
        """Serve the full weights (safetensors) of an HF model folder from now on, without an
        adapter; ``version`` is that of :attr:`version`."""
        ...

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Serve these full weights from now on, without an adapter; caches are reset.

        ``weights``: every tensor of the model under its checkpoint's name, in any order; each is read
        before the next is asked for. ``version`` becomes the engine's until an adapter or other weights
        are loaded. Raises ``RolloutError`` for an incomplete model; the engine's weights are then a
        mixture.
        """
        ...

    def interrupt(self) -> None:
        """Make a ``generate`` that is running raise ``Interrupted`` soon, between two tokens; nothing
        when none runs. May be called from another thread or a signal handler."""
        ...

    def sleep(self) -> None:
        """Free accelerator memory until ``wake``; does nothing on a CPU."""
        ...

    def wake(self) -> None: ...

    def reset_caches(self) -> None:
        """Forget every cached prefix and image."""
        ...

    def stats(self) -> EngineStats:
        """Counters since the last call."""
        ...

    def close(self) -> None:
        """Free everything; the engine cannot be used afterwards. Calling it twice is harmless."""
        ...


def cross(questions: Sequence[Question], guidelines: Sequence[str | None]) -> list[Request]:
    """All pairs, question-major: neighbours share [image + question], which the prefix cache
    wants."""
    if not guidelines:
        raise ValueError("guidelines is empty; pass [None] to ask without one")
    return [(question, guideline) for question in questions for guideline in guidelines]


def renumber(rollouts: Iterable[Rollout], per_question: int) -> list[Rollout]:
    """Turn the request index of rollouts from :func:`cross` into the question's index."""
    return [dataclasses.replace(r, question=r.question // per_question) for r in rollouts]


class AsksByQuestion(abc.ABC):
    """``generate`` of every engine, from its ``generate_requests``."""

    def generate(
        self,
        questions: Sequence[Question],
        guidelines: Sequence[str | None],
        sampling: Sampling,
        progress: Progress | None = None,
    ) -> list[Rollout]:
        rollouts = self.generate_requests(cross(questions, guidelines), sampling, progress)
        return renumber(rollouts, len(guidelines))

    @abc.abstractmethod
    def generate_requests(
        self, requests: Sequence[Request], sampling: Sampling, progress: Progress | None = None
    ) -> list[Rollout]: ...


def request_seeds(requests: Sequence[Request], seed: int) -> list[int]:
    """One seed in [0, 2^62) per request, from ``seed``, question id and guideline alone.

    Sample ``i`` of a request uses its seed + i. The k-th repetition of a request within the list is
    hashed with k, so that repeated requests do not repeat their samples.
    """
    seen: dict[tuple[str, str | None], int] = {}
    seeds = []
    for question, guideline in requests:
        key = (question.id, guideline)
        seen[key] = seen.get(key, -1) + 1
        text = json.dumps([seed, *key, seen[key]])
        seeds.append(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2)
    return seeds


def check_requests(
    requests: Sequence[Request], sampling: Sampling, max_model_len: int, max_images: int
) -> list[list[int]]:
    """Prompt ids of all requests, or an error naming the first question that the engine cannot
    take."""
    prompts = []
    for question, guideline in requests:
        ids = question.prompt_ids(guideline)
        if len(ids) + sampling.max_tokens > max_model_len:
            raise PromptError(
                question.id,
                f"prompt of {len(ids)} tokens and max_tokens = {sampling.max_tokens} exceed the "
                f"{max_model_len} tokens the engine was started for (data.max_prompt_length + "
                "max_completion_length); lower one of the two lengths",
            )
        if len(question.images) > max_images:
            raise PromptError(
                question.id,
                f"{len(question.images)} images, the engine was started for at most {max_images}; "
                "pass a larger max_images to create_engine",
            )
        prompts.append(ids)
    return prompts


def check_adapter(folder: str | Path, max_rank: int) -> dict[str, Any]:
    """The adapter's configuration, after checking what an engine would get wrong in silence.

    Raises ``RolloutError`` for a folder that is no LoRA adapter, a rank the engine has no room for,
    and a LoRA on the vision tower (vLLM drops it without a word, and then answers as another
    model).
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RolloutError(f"{folder}: no readable adapter_config.json ({error})") from error
    if config.get("peft_type") != "LORA":
        raise RolloutError(
            f"{folder}: peft_type is {config.get('peft_type')!r}; only LORA is served"
        )
    if config.get("r", 0) > max_rank:
        raise RolloutError(
            f"{folder}: rank {config['r']} exceeds rollout.max_lora_rank = {max_rank}; raise that"
        )
    try:
        keys = safetensors_keys(folder / "adapter_model.safetensors")
    except ModelFilesError as error:
        raise RolloutError(str(error)) from error
    vision = [key for key in keys if ".visual." in key]
    if vision:
        raise RolloutError(
            f"{folder}: adapts the vision tower ({vision[0]}, {len(vision)} tensors), which "
            "rollout engines do not serve; set lora.target_modules to language-model layers"
        )
    return config


def check_weights(model: str | Path, base: str | Path | None = None) -> list[Path]:
    """The safetensors shards of a model: a folder, or a hub name that is in the local cache.

    Raises ``RolloutError`` when there is none, or when a tensor of the model ``base`` is missing:
    an engine would go on with a mixture of old and new weights.
    """
    try:
        folder = local_folder(model)
        found = tensor_files(folder)
        if base is not None:
            check_names(str(folder), found, base)
    except ModelFilesError as error:
        raise RolloutError(str(error)) from error
    return list(dict.fromkeys(found.values()))


def check_names(source: str, names: Iterable[str], base: str | Path) -> None:
    """Raise ``RolloutError`` naming a tensor of the model ``base`` that is not among ``names``."""
    try:
        folder = local_folder(base)
        needed = {canonical(name) for name in tensor_files(folder)}
        if read_config(folder).get("tie_word_embeddings"):
            needed.discard("lm_head.weight")
    except ModelFilesError as error:
        raise RolloutError(str(error)) from error
    missing = sorted(needed - {canonical(name) for name in names})
    if missing:
        raise RolloutError(
            f"{source}: {len(missing)} of the model's tensors are missing, the first is "
            f"{missing[0]}; write the complete model there"
        )
