"""Two LoRA adapters of different ranks: how they conflict, then merged into a copy of their base.

    python examples/merge_adapters.py

The same from the shell: mmedx conflicts A B; mmedx merge A B --base BASE --out MERGED
"""

import tempfile
from pathlib import Path

import torch

from mmedx_fast import prepare_environment
from mmedx_fast.merging import conflicts, merge
from mmedx_fast.ops import MergeSpec

prepare_environment(offline=True)  # before transformers, where torchvision's build is not torch's
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: E402

SIZES = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2,
)  # fmt: skip


def make_adapter(base: Path, folder: Path, rank: int, seed: int) -> Path:
    """Stands for your training: random factors on the attention's projections."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


with tempfile.TemporaryDirectory() as work:
    base = Path(work) / "base"
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).save_pretrained(base)
    adapters = [
        make_adapter(base, Path(work) / "cardiology", rank=4, seed=1),
        make_adapter(base, Path(work) / "radiology", rank=8, seed=2),
    ]
    spec = MergeSpec(method="ties", density=0.3)
    found = conflicts(adapters, spec)
    print(f"signs disagree on {found['summed']['sign_conflict']:.1%} of what both change")
    merge(adapters, Path(work) / "merged", spec, base=base)
    merged = AutoModelForCausalLM.from_pretrained(Path(work) / "merged")
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    changed = [name for name, x in merged.state_dict().items() if not torch.equal(x, before[name])]
    print(f"{len(changed)} matrices changed, {changed[0]} the first")
