"""Rollouts with plain transformers: for machines without vLLM, and as the reference vLLM is tested
against."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mmedx_fast._env import default_device, prepare_environment
from mmedx_fast.config import ModelConfig, RolloutConfig
from mmedx_fast.model_files import canonical
from mmedx_fast.prompts import PromptBuilder, Question
from mmedx_fast.rollout.base import (
    BASE_VERSION,
    AsksByQuestion,
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


@dataclasses.dataclass
class _Sequence:
    """One response in the making."""

    request: int
    sample: int
    generator: Any
    """CPU generator of this response alone, so that its noise does not depend on the batch."""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)


class TransformersEngine(AsksByQuestion):
    """Own sampling loop over a key-value cache; :class:`mmedx_fast.rollout.base.RolloutEngine`.

    Holds a copy of the model of its own. Each prompt is computed once for all of its samples.
    """

    name = "transformers"
    shared = False
    takes_tensors = True

    def __init__(
        self,
        model: ModelConfig,
        rollout: RolloutConfig,
        builder: PromptBuilder,
        *,
        max_model_len: int,
        max_images: int = 1,
        lora: bool = True,
    ) -> None:
        """Load ``model.path`` in ``model.dtype``; arguments as for ``VllmEngine``. Raises
        ``RolloutError``."""
        prepare_environment()
        self.builder = builder
        self.version = BASE_VERSION
        self.max_model_len = max_model_len
        self.max_images = max_images
        self.max_num_seqs = rollout.max_num_seqs
        self.max_lora_rank = rollout.max_lora_rank
        self.device = default_device()
        self._config = model
        self._lora = lora
        self._sleeps = rollout.sleep and self.device == "cuda"
        self._loads = 0
        self._adapter: str | None = None
        self._interrupted = False
        self._tally = [0, 0, 0, 0.0]
        self._folder: str | Path | None = model.path
        self._model: Any = self._load(model.path)

    def _load(self, folder: str | Path) -> Any:
        import torch
        from transformers import AutoModelForImageTextToText

        try:
            model = AutoModelForImageTextToText.from_pretrained(
                str(folder),
                dtype=getattr(torch, self._config.dtype),
                local_files_only=self._config.offline,
                trust_remote_code=self._config.trust_remote_code,
            )
        except (OSError, ValueError) as error:
            raise RolloutError(f"{folder}: transformers cannot load this model: {error}") from error
        return model.to(self.device).eval().requires_grad_(False)

    def generate_requests(
        self, requests: Sequence[Request], sampling: Sampling, progress: Progress | None = None
    ) -> list[Rollout]:
        import torch

        if self._model is None:
            raise RolloutError("the rollout engine is closed")
        self._interrupted = False
        prompts = check_requests(requests, sampling, self.max_model_len, self.max_images)
        start = time.perf_counter()
        todo = [
            _Sequence(index, sample, torch.Generator().manual_seed(seed + sample))
            for index, seed in enumerate(request_seeds(requests, sampling.seed))
            for sample in range(sampling.n)
        ]
        for first in range(0, len(todo), self.max_num_seqs):
            batch = todo[first : first + self.max_num_seqs]
            with torch.inference_mode():
                for finished in self._decode(batch, requests, prompts, sampling):
                    if progress:
                        progress(first + finished, len(todo))
        rollouts = [self._rollout(item, requests, prompts) for item in todo]
        self._tally[0] += len(requests)
        self._tally[1] += len(rollouts)
        self._tally[2] += sum(len(rollout.token_ids) for rollout in rollouts)
        self._tally[3] += time.perf_counter() - start
        return rollouts

    def _decode(
        self,
        batch: list[_Sequence],
        requests: Sequence[Request],
        prompts: list[list[int]],
        sampling: Sampling,
    ) -> Iterator[int]:
        """Fill the sequences of ``batch``; yields how many of them are finished, whenever one
        is."""
        import torch

        wanted = sorted({item.request for item in batch})
        logits, cache, mask, position = self._prefill(
            [requests[i][0] for i in wanted], [prompts[i] for i in wanted]
        )
        rows = torch.tensor([wanted.index(item.request) for item in batch], device=self.device)
        cache.batch_select_indices(rows)
        logits, mask, position = logits[rows], mask[rows], position[rows]
        live = list(batch)
        while True:
            if self._interrupted:
                raise Interrupted("the rollouts were interrupted")
            tokens = self._sample(live, logits, sampling)
            keep = [
                i
                for i, item in enumerate(live)
                if item.token_ids[-1] not in self.builder.stop_token_ids
                and len(item.token_ids) < sampling.max_tokens
            ]
            if len(keep) < len(live):
                live = [live[i] for i in keep]
                yield len(batch) - len(live)
                if not live:
                    return
                rows = torch.tensor(keep, device=self.device)
                cache.batch_select_indices(rows)
                tokens, mask, position = tokens[rows], mask[rows], position[rows]
            mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
            output = self._model(
                input_ids=tokens[:, None],
                attention_mask=mask,
                position_ids=position[None, :, None].expand(3, -1, -1),
                past_key_values=cache,
                use_cache=True,
            )
            cache, logits, position = output.past_key_values, output.logits[:, -1], position + 1

    def _prefill(
        self, questions: list[Question], prompts: list[list[int]]
    ) -> tuple[Any, Any, Any, Any]:
        """Last-token logits [R, V], cache, mask [R, T] and next position [R] of left-padded
        prompts."""
        import torch

        length = max(map(len, prompts))
        pad = self.builder.end_id
        ids = torch.tensor([[pad] * (length - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor(
            [[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=self.device
        )
        vision: dict[str, Any] = {}
        pictured = [q for q in questions if q.images]
        if pictured:
            for name in ("pixel_values", "image_grid_thw"):
                vision[name] = torch.cat([getattr(q, name) for q in pictured]).to(self.device)
        positions, _ = self._inner.get_rope_index(
            ids,
            mm_token_type_ids=(ids == self.builder.image_token_id).int(),
            image_grid_thw=vision.get("image_grid_thw"),
            attention_mask=mask,
        )
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **vision,
        )
        following = positions.masked_fill(mask[None] == 0, -1).amax(dim=(0, 2)) + 1
        return output.logits[:, -1], output.past_key_values, mask, following

    def _sample(self, live: list[_Sequence], logits: Any, sampling: Sampling) -> Any:
        """Append one token to each sequence; returns them [B] int64. ``logits`` [B, V]."""
        import torch

        logits = logits.float()
        logits[:, self.builder.banned_token_ids] = -torch.inf
        if sampling.greedy:
            logprobs = logits.log_softmax(dim=-1)
            tokens = logits.argmax(dim=-1)
        else:
            logprobs = (logits / sampling.temperature).log_softmax(dim=-1)
            if sampling.top_p < 1:
                logprobs = _nucleus(logprobs, sampling.top_p)
            # argmax(p / Exp(1)) is a draw from p (exponential race); one generator per sequence.
            noise = torch.empty(logprobs.shape, dtype=torch.float32)
            for row, item in zip(noise, live, strict=True):
                row.exponential_(generator=item.generator)
            tokens = (logprobs - noise.log().to(logprobs.device)).argmax(dim=-1)
        chosen = logprobs.gather(1, tokens[:, None])[:, 0]
        for item, token, logprob in zip(live, tokens.tolist(), chosen.tolist(), strict=True):
            item.token_ids.append(token)
            item.logprobs.append(logprob)
        return tokens

    def _rollout(
        self, item: _Sequence, requests: Sequence[Request], prompts: list[list[int]]
    ) -> Rollout:
        stopped = item.token_ids[-1] in self.builder.stop_token_ids
        return Rollout(
            question=item.request,
            guideline=requests[item.request][1],
            sample=item.sample,
            prompt_ids=prompts[item.request],
            token_ids=item.token_ids,
            logprobs=item.logprobs,
            finish_reason="stop" if stopped else "length",
            text=self.builder.tokenizer.decode(item.token_ids, skip_special_tokens=True),
        )

    def load_adapter(self, folder: str | Path | None, version: int) -> None:
        name = None
        if folder is not None:
            name = self._add_adapter(Path(folder))
        if self._adapter is not None:
            if name is None:
                self._model = self._model.unload()
            else:
                self._model.delete_adapter(self._adapter)
        self._adapter = name
        self.version = BASE_VERSION if name is None else version

    def _add_adapter(self, folder: Path) -> str:
        from peft import PeftModel

        if not self._lora:
            raise RolloutError(f"{folder}: the engine was started without room for adapters")
        if self._folder is None:  # what _recover would go back to
            raise RolloutError(
                f"{folder}: the engine holds a trainer's weights; load_weights of a folder before an "
                "adapter"
            )
        check_adapter(folder, self.max_lora_rank)
        self._loads += 1
        name = f"adapter-{self._loads}"
        try:
            if self._adapter is None:
                self._model = PeftModel.from_pretrained(self._model, str(folder), adapter_name=name)
            else:
                self._model.load_adapter(str(folder), adapter_name=name)
                self._model.set_adapter(name)
        except Exception as error:
            self._recover(name)
            raise RolloutError(f"{folder}: PEFT cannot load this adapter: {error}") from error
        self._model.eval().requires_grad_(False)
        return name

    def _recover(self, name: str) -> None:
        """Undo a failed load: back to the adapter before, or to bare weights."""
        if self._adapter is None:
            assert self._folder is not None
            self._model = self._load(self._folder)
        else:
            self._model.set_adapter(self._adapter)
            if name in self._model.peft_config:
                self._model.delete_adapter(name)

    def load_weights(self, folder: str | Path, version: int = BASE_VERSION) -> None:
        check_weights(folder, self._config.path)
        self._model = self._load(folder)
        self._folder = str(folder)
        self._adapter, self.version = None, version

    def update_weights(self, weights: Iterable[tuple[str, Any]], version: int) -> None:
        import torch

        self.load_adapter(None, BASE_VERSION)
        self._folder = None
        own = {canonical(name): param for name, param in self._model.named_parameters()}
        names: list[str] = []
        with torch.no_grad():
            for name, tensor in weights:
                names.append(name)
                param = own.get(canonical(name))
                if param is None or param.shape != tensor.shape:
                    raise RolloutError(
                        f"the trainer's weights of version {version}: the engine's model has no "
                        f"{name} of shape {tuple(tensor.shape)}; its weights are now a mixture"
                    )
                param.copy_(tensor)
        check_names(f"the trainer's weights of version {version}", names, self._config.path)
        self.version = version

    @property
    def _inner(self) -> Any:
        """The Qwen-VL model below the head and PEFT's wrapper."""
        model = self._model.get_base_model() if self._adapter is not None else self._model
        return model.model

    def interrupt(self) -> None:
        self._interrupted = True

    def sleep(self) -> None:
        if self._sleeps:
            self._model.to("cpu")

    def wake(self) -> None:
        if self._sleeps:
            self._model.to(self.device)

    def reset_caches(self) -> None:
        """Nothing is kept between calls."""

    def stats(self) -> EngineStats:
        requests, sequences, tokens, seconds = self._tally
        self._tally = [0, 0, 0, 0.0]
        return EngineStats(
            requests=int(requests),
            sequences=int(sequences),
            generated_tokens=int(tokens),
            seconds=seconds,
            prefix_cache_hit_rate=None,
        )

    def close(self) -> None:
        self._model = None


def _nucleus(logprobs: Any, top_p: float) -> Any:
    """Log-probs [B, V] among each row's most probable tokens that together reach ``top_p``; -inf elsewhere."""
    ordered, ids = logprobs.sort(dim=-1, descending=True)
    before = ordered.exp().cumsum(dim=-1) - ordered.exp()
    kept = ordered.masked_fill(before >= top_p, float("-inf"))
    return kept.gather(1, ids.argsort(dim=-1)).log_softmax(dim=-1)
