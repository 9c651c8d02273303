"""The module DeepSpeed wraps: a transformers model with LoRA whose forward takes a packed row."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmedx_fast import attention
from mmedx_fast.config import LoraConfig, ModelConfig
from mmedx_fast.tree import PackedRow

Head = Callable[[Tensor, Tensor], Any]
"""(hidden [R, H], head weight [V, H]) -> what the forward returns."""


class _AttachGradient(torch.autograd.Function):
    """A loss whose gradients with respect to `operands` are known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: tuple[Tensor, ...], *operands: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (None, None, *(known * grad.to(known.dtype) for known in ctx.saved_tensors))


def with_gradient(
    hidden: Tensor,
    loss_of: Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]],
    weight: nn.Parameter | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Differentiate the loss down to `hidden`, and to the head's `weight` if that is trained, at once.

    Under ZeRO-3 the head's weight is whole only inside the forward, so nothing may need it later.
    """
    leaf = hidden.detach().requires_grad_()
    with torch.enable_grad():
        loss, metrics = loss_of(leaf)
        inner = [leaf] if weight is None else [leaf, weight]
        gradients = torch.autograd.grad(loss, inner)
    outer = (hidden,) if weight is None else (hidden, weight)
    return attach_gradient(loss.detach(), gradients, *outer), metrics


def attach_gradient(loss: Tensor, gradients: tuple[Tensor, ...], *operands: Tensor) -> Tensor:
    """The loss, as one whose gradients with respect to `operands` are `gradients`."""
    return _AttachGradient.apply(loss, gradients, *operands)


class RowModel(nn.Module):
    """A transformers model, or PEFT's wrapper of one, whose forward takes a packed row."""

    def __init__(
        self, model: Any, backend: attention.Backend, kernel: attention.Kernel | None
    ) -> None:
        super().__init__()
        self.model = model
        self.backend: attention.Backend = backend
        self.kernel = kernel

    @property
    def base(self) -> Any:
        """The transformers model, inside PEFT's wrapper where there is one."""
        wrapped = getattr(self.model, "get_base_model", None)
        return self.model if wrapped is None else wrapped()

    def forward(self, row: PackedRow, head: Head | None, plain: bool = False) -> Any:
        """`head` of the response's hidden states; without a head the image features [tokens, H].

        `plain`: a row of one branch, with the model's own positions and causal attention.
        """
        features = self._image_features(row)
        blank = self._blank_image_features(row)
        if head is None:
            return features
        encoded = None
        if features is not None:
            from transformers.modeling_outputs import BaseModelOutputWithPooling

            encoded = {"image": BaseModelOutputWithPooling(pooler_output=(features,))}
        with self._embeddings_hang_on(blank):
            out = self.base.model(
                input_ids=row.input_ids[None],
                mm_encoder_outputs=encoded,
                use_cache=False,
                **(self._plain_arguments(row) if plain else self._tree_arguments(row)),
            )
        hidden = attention.gather_rows(out.last_hidden_state[0], row.pred_index)
        # Under ZeRO-3 this access gathers the weight and keeps it for the rest of this forward.
        return head(hidden, self.base.lm_head.weight)

    def _image_features(self, row: PackedRow) -> Tensor | None:
        if row.image_features is not None or row.pixel_values is None:
            return row.image_features
        # Apart from the text model: its attention arguments must not reach the vision tower.
        out = self.base.model.get_image_features(
            row.pixel_values, row.image_grid_thw, return_dict=True
        )
        return torch.cat(tuple(out.pooler_output))

    def _blank_image_features(self, row: PackedRow) -> Tensor | None:
        """Features [1, H] of the smallest image, all zeros, for a row that asks for it."""
        if not row.blank_image:
            return None
        vision = self.base.config.vision_config
        merge = vision.spatial_merge_size
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.zeros(merge**2, values, device=row.input_ids.device)
        grid = torch.tensor([[1, merge, merge]], device=row.input_ids.device)
        out = self.base.model.get_image_features(pixels, grid, return_dict=True)
        return torch.cat(tuple(out.pooler_output))

    @contextmanager
    def _embeddings_hang_on(self, blank: Tensor | None) -> Iterator[None]:
        """Token embeddings depend, by nothing, on a blank image that has gradients.

        The backward of the first layer and of the tower hold collectives: they must be those of a row
        with images. A hook, because ZeRO-3 wants the modules entered in the same order too.
        """
        if blank is None or not blank.requires_grad:
            yield
            return
        nothing = 0.0 * blank.sum()
        hook = self.base.get_input_embeddings().register_forward_hook(
            lambda _module, _inputs, embedded: embedded + nothing.to(embedded.dtype)
        )
        try:
            yield
        finally:
            hook.remove()

    def _tree_arguments(self, row: PackedRow) -> dict[str, Any]:
        tree = attention.forward_arguments(self.backend, row.end, row.segments, self.kernel)
        return {"position_ids": row.position_ids[:, None], **tree}

    def _plain_arguments(self, row: PackedRow) -> dict[str, Any]:
        ids = row.input_ids[None]
        mask = torch.ones_like(ids)
        if row.image_grid_thw is None:
            positions = torch.arange(ids.shape[1], device=ids.device).expand(3, 1, -1)
        else:
            kinds = (ids == self.base.config.image_token_id).int()
            positions, _ = self.base.model.get_rope_index(
                ids, mm_token_type_ids=kinds, image_grid_thw=row.image_grid_thw
            )
        return {"position_ids": positions, "attention_mask": mask}


def default_place() -> torch.device:
    from mmedx_fast._env import default_device

    if default_device() == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def lora_layers(module: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]


def load_base(path: str | Path, model: ModelConfig, dtype: torch.dtype) -> Any:
    """The transformers model in eval mode, dropout off, sdpa."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    options = {"trust_remote_code": model.trust_remote_code, "local_files_only": model.offline}
    try:
        config = AutoConfig.from_pretrained(str(path), **options)
    except OSError as error:
        hint = "; model.offline forbids downloading" if model.offline else ""
        raise ValueError(f"no model at {path}{hint}: {error}") from None
    if config.model_type not in ("qwen2_vl", "qwen2_5_vl"):
        raise ValueError(
            f"{path} is a {config.model_type!r} model; packed rows are made for qwen2_vl and "
            f"qwen2_5_vl"
        )
    text = config.get_text_config()
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        raise ValueError(f"{path} uses sliding-window attention, which a packed row cannot express")
    # Tokens that rollouts share would get one dropout mask for all of them.
    text.attention_dropout = 0.0
    with _no_progress_bar():
        base, info = AutoModelForImageTextToText.from_pretrained(
            str(path),
            config=config,
            dtype=dtype,
            attn_implementation="sdpa",
            output_loading_info=True,
            **options,
        )
    wrong = sorted(info["missing_keys"]) + sorted(str(k) for k in info["mismatched_keys"])
    if wrong:
        raise ValueError(
            f"{path}: {len(wrong)} weights are missing or misshapen, such as {wrong[0]}"
        )
    return base


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers' bar over weights would run into the pipeline's own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def new_adapter(lora: LoraConfig) -> Any:
    import peft

    return peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        use_rslora=lora.use_rslora,
        target_modules=lora.target_modules,
        lora_dropout=0.0,
    )


def wrap(base: Any, config: Any, seed: int, with_reference: bool) -> Any:
    """PEFT around the base: float32 adapter `default`, trainable; optionally `reference`,
    frozen."""
    import peft
    from peft.tuners.tuners_utils import BaseTunerLayer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = peft.get_peft_model(base, config)
        except ValueError as error:
            raise ValueError(f"lora.target_modules = {config.target_modules!r}: {error}") from None
        if with_reference:
            model.add_adapter("reference", config)
    if isinstance(base.lm_head, BaseTunerLayer):
        raise ValueError("lora.target_modules matches lm_head; the head must stay frozen")
    for name, param in model.named_parameters():
        if ".lora_" in name:
            param.data = param.data.float()
            param.requires_grad_(".reference." not in name)
    return model
