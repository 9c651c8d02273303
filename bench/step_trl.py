"""TRL's update of the same rollouts: its GRPOTrainer's own loss and backward."""

from __future__ import annotations

import tempfile
import warnings
from typing import Any

import torch

from bench import head
from bench.registry import Call, Outputs
from bench.step import StepInputs, prepare, take_gradient
from mmedx_fast.tiny import assets_folder


def trl_call(x: StepInputs, micro: int = 0, old_pass: bool = False) -> Call:
    """``GRPOTrainer.compute_loss`` and backward over micro-batches of ``micro`` rollouts (0: all).

    ``old_pass`` adds the pass without gradient for the old log-probs, which TRL makes whenever vLLM
    samples; the loss takes the given ones all the same.
    """
    micro = micro or len(x.ids)
    trainer = make_trainer(x, micro)
    parts = [slice(i, i + micro) for i in range(0, len(x.ids), micro)]
    batches = [batch(x, part) for part in parts]

    def call() -> Outputs:
        prepare(x.base, "dense", ours=False)
        if old_pass:
            for part, b in zip(parts, batches, strict=True):
                _old_logprobs(trainer, x, part, b)
        total = torch.zeros((), device=x.ids.device)
        for b in batches:
            loss = trainer.compute_loss(x.model, b)
            trainer.accelerator.backward(loss)
            total += loss.detach()
        trainer._metrics["train"].clear()
        return {"loss": total, "d_adapter": take_gradient(x.model)}

    return call


def make_trainer(x: StepInputs, micro: int) -> Any:
    """A GRPOTrainer around the same model object; it generates nothing and reads no data."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from datasets import Dataset
        from transformers import Qwen2TokenizerFast
        from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(
        output_dir=tempfile.gettempdir(),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=len(x.ids) // micro,
        num_generations=len(x.ids),
        max_completion_length=x.sizes["R"],
        loss_type="dapo",
        epsilon=head.EPSILON,
        epsilon_high=head.EPSILON_HIGH,
        beta=0.0,
        # The model checkpoints already where the size says so; here it would also change ours.
        gradient_checkpointing=False,
        bf16=x.base.lm_head.weight.dtype == torch.bfloat16,
        use_cpu=x.ids.device.type == "cpu",
        report_to="none",
        seed=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = GRPOTrainer(
            model=x.model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=config,
            train_dataset=Dataset.from_dict({"prompt": ["x"]}),
            processing_class=Qwen2TokenizerFast.from_pretrained(assets_folder()),
        )
    # What Trainer.train sets on its first step.
    trainer.current_gradient_accumulation_steps = config.gradient_accumulation_steps
    return trainer


def batch(x: StepInputs, part: slice) -> dict[str, Any]:
    """What ``_generate_and_score_completions`` hands to the loss; no rollout is padded."""
    prompt, completion = x.ids[part, : x.prompt], x.ids[part, x.prompt :]
    return {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": completion,
        "completion_mask": torch.ones_like(completion),
        "advantages": x.advantages[part, 0],
        "old_per_token_logps": x.old_logprob[part],
        "num_items_in_batch": torch.tensor(x.token_weight.numel(), device=x.ids.device),
        "num_images": [1] * len(prompt),
        "mm_token_type_ids": (x.ids[part] == x.base.config.image_token_id).int(),
        **x.images(len(prompt)),
    }


def _old_logprobs(trainer: Any, x: StepInputs, part: slice, b: dict[str, Any]) -> None:
    ids = x.ids[part]
    names = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
    with torch.no_grad():
        trainer._get_per_token_logps_and_entropies(
            x.model, ids, torch.ones_like(ids), x.sizes["R"], **{name: b[name] for name in names}
        )
