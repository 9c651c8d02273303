"""Peak memory of TRL's loss with three heads: ``python -m bench.trl_head [--rows 4 --completion 128]``.

One ``GRPOTrainer.compute_loss`` with backward on one batch, LoRA on a Qwen2.5-VL of the tiny model's shape with the
vocabulary of the 7B: the logits as a whole (``selective_log_softmax_and_entropy``, what TRL did before 1.16), TRL's
own chunked head, and ours. Peak bytes are those of ``bench.memory.watched``: beyond model, batch and optimizer.
On a CPU ours works in tiles of 128 rows, TRL's in tiles of 32,768 columns.
"""

from __future__ import annotations

import argparse
import tempfile
import types
import warnings
from typing import Any

import torch
from torch import Tensor

from bench.memory import watched
from mmedx_fast.meter import render_table
from mmedx_fast.tiny import assets_folder

VOCAB = 152_064
LAYERS = 4
PROMPT = 16
HEADS = ("eager", "chunked", "ours")


def make_model(vocab: int, layers: int) -> Any:
    """The tiny model's body, or its first ``layers``, with ``vocab`` tokens and LoRA on its attention; random
    weights."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(assets_folder())
    text = config.text_config
    text.vocab_size, text.num_hidden_layers = vocab, layers
    text.layer_types = text.layer_types[:layers]
    model = Qwen2_5_VLForConditionalGeneration(config)
    targets = r"(?!.*visual).*(q_proj|v_proj)"
    return get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))


def make_trainer(head: str, vocab: int, rows: int, completion: int, layers: int) -> Any:
    """A GRPOTrainer that scores with ``head``; it generates nothing and reads no data."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from datasets import Dataset
        from transformers import Qwen2TokenizerFast
        from trl import GRPOConfig, GRPOTrainer

        config = GRPOConfig(
            output_dir=tempfile.gettempdir(),
            per_device_train_batch_size=rows,
            num_generations=rows,
            max_completion_length=completion,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
        )
        trainer = GRPOTrainer(
            model=make_model(vocab, layers),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=config,
            train_dataset=Dataset.from_dict({"prompt": ["x"]}),
            processing_class=Qwen2TokenizerFast.from_pretrained(assets_folder()),
        )
    trainer.current_gradient_accumulation_steps = 1
    if head == "eager":
        scores = types.MethodType(_eager_scores, trainer)
        trainer._get_per_token_logps_and_entropies = scores
    elif head == "ours":
        from mmedx_fast.integrations.trl import use_fused_head

        use_fused_head(trainer)
    return trainer


def _eager_scores(
    trainer: Any, model: Any, input_ids: Tensor, attention_mask: Tensor, keep: int, **_: Any
) -> tuple[Tensor, Tensor, None]:
    """From the model's own logits, [B, C, V] at once."""
    from trl.trainer.utils import selective_log_softmax_and_entropy

    logits = model(
        input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=keep + 1, use_cache=False
    ).logits
    logprobs, entropy = selective_log_softmax_and_entropy(
        logits[:, :-1],
        input_ids[:, -keep:],
        entropy_requires_grad=False,
        temperature=trainer.temperature,
    )
    return logprobs, entropy, None


def make_batch(rows: int, completion: int, device: torch.device) -> dict[str, Any]:
    """Random ids of the tiny tokenizer, nothing padded."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(10, 200, (rows, PROMPT + completion), generator=g).to(device)
    return {
        "prompt_ids": ids[:, :PROMPT],
        "prompt_mask": torch.ones_like(ids[:, :PROMPT]),
        "completion_ids": ids[:, PROMPT:],
        "completion_mask": torch.ones_like(ids[:, PROMPT:]),
        "advantages": torch.randn(rows, generator=g).to(device),
        "num_items_in_batch": torch.tensor(rows * completion, device=device),
    }


def measure(
    head: str, vocab: int, rows: int, completion: int, layers: int = LAYERS
) -> tuple[float, int]:
    """(loss, peak bytes) of one loss with backward; gradients are there before."""
    trainer = make_trainer(head, vocab, rows, completion, layers)
    device = trainer.accelerator.device
    batch = make_batch(rows, completion, device)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)

    def call() -> Tensor:
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        return loss.detach()

    loss, peak = watched(call, device)
    return loss.item(), peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--vocab", type=int, default=VOCAB)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--completion", type=int, default=128, help="tokens per row")
    options = parser.parse_args()
    found = {head: measure(head, options.vocab, options.rows, options.completion) for head in HEADS}
    ours = found["ours"][1]
    table = [
        [head, f"{loss:.6f}", f"{peak / 2**20:.0f}", f"{peak / ours:.2f}"]
        for head, (loss, peak) in found.items()
    ]
    print(render_table(["head", "loss", "peak MiB", "times ours"], table))


if __name__ == "__main__":
    from mmedx_fast._env import prepare_environment

    prepare_environment(offline=True)
    main()
