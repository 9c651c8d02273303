"""The policy: a Qwen-VL model with LoRA adapters or trained in full, DeepSpeed around it; packed rows
in.

One wrapped forward per row, so ZeRO's hooks see an ordinary module. Only the hidden states that
predict a response token reach the head, and the loss makes its own gradient there.

Letters: T tokens of a row, R response tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from mmedx_fast import attention, lora_linear, swiglu
from mmedx_fast.atomic import write_folder
from mmedx_fast.config import LoraConfig, ModelConfig, OptimizerConfig
from mmedx_fast.liger import apply_liger, choose_liger
from mmedx_fast.model_files import local_folder, write_model
from mmedx_fast.ops import linear_logprob, linear_policy_loss
from mmedx_fast.policy_adapter import (
    base_fingerprint,
    check_base,
    read_config,
    read_tensors,
    weights_checksum,
    write_adapter,
    write_base_note,
)
from mmedx_fast.policy_engine import Engine, gathered
from mmedx_fast.policy_full import checkpoint_names, merge_adapter_, thaw_, whole_weights
from mmedx_fast.policy_images import LeafFeatures, SharedFeatures, over_rows
from mmedx_fast.policy_model import (
    Head,
    RowModel,
    default_place,
    load_base,
    lora_layers,
    new_adapter,
    with_gradient,
    wrap,
)
from mmedx_fast.tree import PackedRow, RopeIndex, Tree, pack_row

if TYPE_CHECKING:
    from mmedx_fast.ops import PolicyLossSpec

Use = Literal["policy", "reference", "base"]
Found = TypeVar("Found")

_TREE_BOUND = {torch.float32: (1e-3, 1e-4), torch.bfloat16: (0.75, 0.06)}
"""dtype -> largest allowed (maximum, mean) |tree - plain| log-prob; bfloat16 rounding alone gives
0.1 and 0.02."""


class TreeMismatchError(RuntimeError):
    """The packed row computes something else than plain rows do."""


class Policy:
    """See the module's docstring; made by :meth:`load`."""

    def __init__(
        self,
        module: RowModel,
        adapter_config: Any,
        base_name: str,
        fingerprint: str,
        device: torch.device,
        dtype: torch.dtype,
        has_reference: bool,
        banned: Sequence[int],
    ) -> None:
        self.module = module
        self.device = device
        self.dtype = dtype
        self.base_name = base_name
        self.fingerprint = fingerprint
        """Of the base, before anything was merged or trained."""
        self.full = adapter_config is None
        self.rope_index = RopeIndex.of(module.base.config)
        self.tower_frozen = not any(p.requires_grad for p in module.base.model.visual.parameters())
        self._adapter_config = adapter_config
        self._has_reference = has_reference
        self._engine: Engine | None = None
        self._layers = lora_layers(module)
        self._banned = torch.tensor(list(banned), device=device) if banned else None
        self._named = checkpoint_names(module.model, base_name) if self.full else {}

    @classmethod
    def load(
        cls,
        model_path: str | Path,
        *,
        model: ModelConfig,
        lora: LoraConfig,
        finetuning_type: Literal["lora", "full"] = "lora",
        freeze_vision_tower: bool = True,
        adapter: Path | None = None,
        reference: bool = False,
        optimizer: OptimizerConfig | None = None,
        total_steps: int = 1,
        deepspeed: Mapping[str, Any] | None = None,
        seed: int = 0,
        banned_token_ids: Sequence[int] = (),
        device: torch.device | str | None = None,
        attention_kernel: attention.Kernel | None = None,
    ) -> Policy:
        """Load the base, put a LoRA on it or thaw it, and (with `optimizer`) wrap it in DeepSpeed.

        Args:
            model_path: folder or name of a Qwen2-VL / Qwen2.5-VL model.
            lora: shape of a new adapter; an `adapter` brings its own. Ignored by ``full``.
            finetuning_type: train a LoRA, or all weights (``full``; DeepSpeed keeps float32 masters of
                a bfloat16 model).
            freeze_vision_tower: with ``full``, leave the vision tower and its projector alone. With a
                LoRA its target modules decide.
            adapter: PEFT folder to go on from; ``full`` adds it to the weights.
            reference: keep a frozen copy of `adapter` for ``use="reference"``. Without an adapter
                the reference is the base itself and costs nothing. Not with ``full``.
            optimizer: null makes a policy that only evaluates.
            total_steps: updates the learning-rate schedule is made for.
            deepspeed: DeepSpeed settings; what the rest of the configuration decides is refused.
                With several ranks, all must run the vision tower in the same passes, or a rank that
                skips it leaves the others waiting: :func:`mmedx_fast.planner.plan_ranks` sees to it.
            seed: of a new adapter's A matrices (B starts at zero).
            banned_token_ids: vocabulary ids that cannot be sampled, masked in every log-prob.
            attention_kernel: takes the place of the attention backend's kernel.

        Raises:
            ValueError: unknown architecture, missing weights, an adapter of another base
                (:class:`~mmedx_fast.policy_adapter.AdapterError`), settings that contradict.
        """
        if finetuning_type == "full" and reference:
            raise ValueError(
                "a policy trained in full keeps no reference: use a LoRA, or no KL term"
            )
        place = default_place() if device is None else torch.device(device)
        dtype = getattr(torch, model.dtype)
        base = load_base(model_path, model, dtype).to(place)
        fingerprint = base_fingerprint(base.named_parameters())
        if adapter is not None:
            check_base(adapter, str(model_path), fingerprint)
        backend = attention.choose_backend(model.attention, place, dtype, attention_kernel)
        attention.set_backend(base, backend)
        # An extra pass over the MLP's width is nothing to a CPU, where memory is touched page by page.
        swiglu.set_recompute(base, place.type == "cpu")
        if choose_liger(
            model.use_liger_kernel, place
        ):  # after the line above, which would undo its MLP
            apply_liger(base)
        config: Any = None
        whole: Any = base
        has_reference = reference and adapter is not None
        if finetuning_type == "full":
            whole = base if adapter is None else merge_adapter_(base, adapter)
            thaw_(whole, freeze_vision_tower)
        else:
            config = new_adapter(lora) if adapter is None else read_config(adapter)
            whole = wrap(base, config, seed, with_reference=has_reference)
            lora_linear.set_fused(whole, True)
        if model.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
            # transformers makes every embedding require gradients now, the frozen vision tower's too,
            # which would then be computed again and go backward for nothing. PEFT did the same had it
            # found checkpointing on, with hooks that nothing removes: hence after it.
            base.disable_input_require_grads()
        policy = cls(
            RowModel(whole, backend, attention_kernel),
            config,
            str(model_path),
            fingerprint,
            place,
            dtype,
            has_reference,
            banned_token_ids,
        )
        if adapter is not None and not policy.full:
            policy._read_adapter(adapter)
        policy.module.train(optimizer is not None)
        if optimizer is not None:
            trained = policy._trained()
            policy._engine = Engine(
                policy.module, trained, optimizer, deepspeed or {}, total_steps, place
            )
        return policy

    # -- forward ---------------------------------------------------------------------------------

    def logprobs(
        self, row: PackedRow, *, temperature: float, use: Use = "policy"
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [R] float32 of the row's targets, without gradient.

        `use`: the trained adapter, the frozen starting adapter, or no adapter.
        """

        def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
            return linear_logprob(
                hidden, weight, targets, temperature=temperature, banned=self._banned
            )

        row = row.to(self.device)
        targets = row.targets
        with torch.no_grad(), self._using(use):
            return self._forward(row, head)

    def with_image_features(self, rows: Sequence[PackedRow]) -> list[PackedRow]:
        """Rows with their image features computed, to share between the passes of one step.

        An image that several rows show goes through the vision tower once. Rows whose tower is trained come
        back as they were. With several ranks, all of them call it for the rows of the same rounds.
        """
        if not self.tower_frozen:
            return list(rows)
        features = self._features("policy")
        return [features.give(row) for row in rows]

    def over_rows(
        self,
        rows: Sequence[PackedRow],
        work: Callable[[int, PackedRow], Found],
        *,
        use: Use | None = None,
    ) -> list[Found]:
        """``work(index, row)`` for every row; an image that several of them show goes through the vision
        tower once, and what the tower made of it is kept until the last of them.

        A trained tower goes backward once too: the rows leave their gradient at its output, and behind the
        last of them it goes on from there. Not where gradients meet within a backward (ZeRO-2 and 3 with several
        ranks): questions are split differently on each rank, so there every row runs a trained tower itself.

        Args:
            work: a backward pass of its row; with `use` a :meth:`logprobs` of that `use`.
        """
        if use is not None or self.tower_frozen:
            return over_rows(rows, work, self._features(use or "policy"))
        engine = self._training()
        if engine.reduces_in_backward:
            return [work(index, row) for index, row in enumerate(rows)]
        leaves = LeafFeatures(
            lambda row: self._forward(row.to(self.device), None),
            self.rope_index.spatial_merge_size,
            engine.backward_on,
            rows,
        )
        return over_rows(rows, work, leaves)

    def _features(self, use: Use) -> SharedFeatures:
        def run(row: PackedRow) -> Tensor:
            with torch.no_grad(), self._using(use):
                return cast(Tensor, self._forward(row.to(self.device), None))

        lockstep = self._engine is not None and self._engine.gathers_in_forward
        return SharedFeatures(run, self.rope_index.spatial_merge_size, lockstep)

    def _forward(self, row: PackedRow, head: Head | None, plain: bool = False) -> Any:
        runner = self.module if self._engine is None else self._engine.engine
        return runner(row, head, plain)

    @contextmanager
    def _using(self, use: Use) -> Iterator[None]:
        """Switch the active adapter.

        PEFT's own switches also flip requires_grad, which an engine's hooks do not survive.
        """
        if use == "policy":
            yield
            return
        if use not in ("reference", "base"):
            raise ValueError(f"use must be 'policy', 'reference' or 'base', got {use!r}")
        if self.full:
            raise ValueError(f"use={use!r}: a policy trained in full keeps no other weights")
        switch_off = use == "base" or not self._has_reference
        for layer in self._layers:
            layer._disable_adapters = switch_off
            layer._active_adapter = ["default" if switch_off else "reference"]
        try:
            yield
        finally:
            for layer in self._layers:
                layer._disable_adapters = False
                layer._active_adapter = ["default"]

    # -- training --------------------------------------------------------------------------------

    def sft_backward(self, row: PackedRow, token_weight: Tensor) -> dict[str, float]:
        """Accumulate the gradient of ``-sum(token_weight * logprob)``; token_weight is [R].

        The weights are shares of the whole step, over all rows and ranks.

        Returns raw metrics for :func:`mmedx_fast.ops.reduce_metrics`: ``sum:loss``, and over the
        targets of non-zero weight ``sum:tokens`` and ``sum:logprob``.
        """
        row, weights = row.to(self.device), self._per_target(row, token_weight, "token_weight")

        def loss_of(hidden: Tensor, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            logprob, _ = linear_logprob(
                hidden, weight, row.targets, banned=self._banned, return_entropy=False
            )
            used = weights != 0
            loss = -torch.where(used, weights * logprob, 0.0).sum()
            return loss, {
                "sum:loss": loss.detach(),
                "sum:tokens": used.sum(),
                "sum:logprob": torch.where(used, logprob.detach(), 0.0).sum(),
            }

        return self._backward(row, loss_of)

    def backward(
        self,
        row: PackedRow,
        *,
        advantages: Tensor,
        token_weight: Tensor,
        spec: PolicyLossSpec,
        old_logprob: Tensor | None = None,
        ref_logprob: Tensor | None = None,
        rollout_logprob: Tensor | None = None,
        entropy_weight: Tensor | None = None,
        sequence_id: Tensor | None = None,
    ) -> dict[str, float]:
        """Accumulate the gradient of the policy loss over this row.

        Every tensor is [R], in the row's target order; the contract is that of
        :func:`mmedx_fast.ops.linear_policy_loss`. The weights are shares of the whole step, over
        all rows and ranks. `sequence_id` defaults to the row's branches.

        Returns the op's raw metrics as floats, for :func:`mmedx_fast.ops.reduce_metrics`.
        """
        row = row.to(self.device)
        given = {
            "advantages": advantages,
            "token_weight": token_weight,
            "old_logprob": old_logprob,
            "ref_logprob": ref_logprob,
            "rollout_logprob": rollout_logprob,
            "entropy_weight": entropy_weight,
        }
        tensors: dict[str, Any] = {
            name: None if value is None else self._per_target(row, value, name)
            for name, value in given.items()
        }
        sequences = row.branch_index if sequence_id is None else sequence_id.to(self.device)

        def loss_of(hidden: Tensor, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return linear_policy_loss(
                hidden,
                weight,
                row.targets,
                spec=spec,
                sequence_id=sequences,
                banned=self._banned,
                **tensors,
            )

        return self._backward(row, loss_of)

    def _backward(self, row: PackedRow, loss_of: Callable[..., Any]) -> dict[str, float]:
        engine = self._training()

        def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            trained = cast(nn.Parameter, weight) if weight.requires_grad else None
            return with_gradient(hidden, lambda leaf: loss_of(leaf, weight), trained)

        loss, metrics = self._forward(row, head)
        engine.backward(loss)
        return _floats(metrics)

    def _per_target(self, row: PackedRow, value: Tensor, name: str) -> Tensor:
        if value.shape != row.targets.shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} but the row has {len(row.targets)} targets"
            )
        return value.to(self.device, torch.float32)

    def _training(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("this policy was loaded without an optimizer; it only evaluates")
        return self._engine

    def step(self, refuse: bool = False) -> dict[str, float]:
        """One optimizer update; see :meth:`mmedx_fast.policy_engine.Engine.step`."""
        return self._training().step(refuse)

    def skip(self, steps: int = 1) -> None:
        """Let the learning-rate schedule count updates that are not made."""
        self._training().skip(steps)

    def discard(self) -> None:
        """Drop all gradients since the last update, and the memory they and a failed row held."""
        self._training().discard()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # -- weights ---------------------------------------------------------------------------------

    def _adapter_params(self, adapter: str) -> dict[str, nn.Parameter]:
        """PEFT's keys on disk -> the parameters of an adapter."""
        marked = f".{adapter}."
        return {
            name.replace(marked, "."): param
            for name, param in self.module.model.named_parameters()
            if marked in name and ".lora_" in name
        }

    def _trained(self) -> dict[str, nn.Parameter]:
        """Names on disk -> the parameters that the optimizer steps."""
        if not self.full:
            return self._adapter_params("default")
        return {name: param for name, param in self._named.items() if param.requires_grad}

    def _base_weights(self) -> Iterator[tuple[str, Tensor]]:
        """What training must not change, whole: the base under the adapters, or what ``full`` freezes."""
        for name, param in self.module.model.named_parameters():
            if ".lora_" not in name and not param.requires_grad:
                plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
                with gathered([param]):
                    yield plain, param.detach()

    def _read_adapter(self, folder: Path) -> None:
        params = self._adapter_params("default")
        tensors = read_tensors(folder, {key: param.shape for key, param in params.items()})
        copies = [params]
        if self._has_reference:
            copies.append(self._adapter_params("reference"))
        with torch.no_grad():
            for copy in copies:
                for key, param in copy.items():
                    param.copy_(tensors[key])

    def save_adapter(self, folder: Path, *, durable: bool = True) -> None:
        """Write the adapter for PEFT and vLLM; every rank calls it, rank 0 writes. ``durable`` as in
        :func:`mmedx_fast.atomic.write_folder`."""
        tensors = self.adapter_tensors()
        if not _is_main():
            return
        about = (self._adapter_config, self.base_name, self.fingerprint)
        write_adapter(Path(folder), tensors, *about, durable=durable)

    def adapter_tensors(self) -> dict[str, Tensor]:
        """PEFT's keys -> float32 copies on the CPU, gathered block by block. Every rank must call
        it."""
        if self.full:
            raise ValueError(
                "a policy trained in full has no adapter; save_model writes its weights"
            )
        if self._engine is not None:
            return self._engine.values()
        params = self._adapter_params("default")
        return {
            key: param.detach().to("cpu", torch.float32, copy=True) for key, param in params.items()
        }

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """All weights of a policy trained in full: the checkpoint's names, copies in the model's dtype.

        Under ZeRO-3 gathered block by block: every rank must go through all of them.
        """
        if not self.full:
            raise ValueError("a LoRA policy's weights are those of its base; see adapter_tensors")
        return whole_weights(self._named)

    def save_model(
        self, folder: Path, max_shard_size: int = 5_000_000_000, *, durable: bool = True
    ) -> None:
        """Write a policy trained in full as a model folder for transformers and vLLM, beside it which
        base it came from. Every rank calls it, rank 0 writes, `max_shard_size` bytes at a time."""
        weights = self.weights()
        if not _is_main():
            for _ in weights:
                pass
            return
        with write_folder(Path(folder), durable=durable) as partial:
            write_model(partial, weights, local_folder(self.base_name), self.dtype, max_shard_size)
            write_base_note(partial, self.base_name, self.fingerprint)

    def named_state(self) -> tuple[Iterator[tuple[str, Tensor]], dict[str, Any]]:
        """What training needs to go on bit for bit: tensors, one at a time, and JSON values.

        Every rank must go through all tensors.
        """
        tensors, meta = self._training().named_state()
        return tensors, {**meta, "base_fingerprint": self.fingerprint}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """:meth:`named_state`, all tensors at once."""
        tensors, meta = self.named_state()
        return dict(tensors), meta

    def load_state(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`.

        Raises:
            ValueError: the state was saved with another base or another adapter shape.
        """
        if meta.get("base_fingerprint") != self.fingerprint:
            raise ValueError(
                f"the checkpoint belongs to base weights {meta.get('base_fingerprint')}, but "
                f"{self.base_name} has {self.fingerprint}"
            )
        self._training().load_state(tensors, meta)

    def base_checksum(self) -> str:
        """sha256 of the frozen weights (of all of the base, with a LoRA): equal before and after
        training, or something wrote."""
        return weights_checksum(self._base_weights())

    # -- checks and end --------------------------------------------------------------------------

    def verify_tree(self, tree: Tree, *, temperature: float = 1.0) -> dict[str, float]:
        """Compare a tree's log-probs with stock plain rows, one rollout at a time.

        The plain side uses transformers' own positions, sdpa and causal mask.

        Returns:
            {"max": , "mean": } of |tree - plain| in nats.

        Raises:
            TreeMismatchError: the difference exceeds what the dtype's rounding explains.
        """
        packed = pack_row([tree], self.rope_index)
        together, _ = self.logprobs(packed, temperature=temperature)
        single = [
            pack_row([replace(tree, branches=(branch,))], self.rope_index)
            for branch in tree.branches
        ]
        apart = torch.cat([self._plain_logprobs(row, temperature) for row in single])
        difference = (together - apart).abs()
        found = {"max": float(difference.max()), "mean": float(difference.mean())}
        bound = _TREE_BOUND[self.dtype]
        # `not <=` so that NaN fails too.
        if not (found["max"] <= bound[0] and found["mean"] <= bound[1]):
            raise TreeMismatchError(
                f"tree attention {self.module.backend!r} differs from plain rows: log-prob "
                f"difference max {found['max']:.3g} (allowed {bound[0]:.3g}), mean "
                f"{found['mean']:.3g} (allowed {bound[1]:.3g}) over {len(difference)} tokens in "
                f"{self.dtype}; choose another model.attention"
            )
        return found

    def _plain_logprobs(self, row: PackedRow, temperature: float) -> Tensor:
        row = row.to(self.device)

        def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
            return linear_logprob(
                hidden, weight, row.targets, temperature=temperature, banned=self._banned
            )

        attention.set_backend(self.module.base, "dense")
        try:
            with torch.no_grad():
                return self._forward(row, head, plain=True)[0]
        finally:
            attention.set_backend(self.module.base, self.module.backend)

    def close(self) -> None:
        """Free model and engine, so that another policy can be loaded in this process."""
        self._layers, self._named = [], {}
        del self.module
        if self._engine is not None:
            self._engine.close()
            self._engine = None
            gc.collect()  # DeepSpeed's engine is full of cycles
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _is_main() -> bool:
    import torch.distributed as dist

    return not dist.is_initialized() or dist.get_rank() == 0


def _floats(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """One transfer for all metrics of a row."""
    values = torch.stack([value.detach().double() for value in metrics.values()]).tolist()
    return dict(zip(metrics, values, strict=True))
