"""TRL's GRPO trainer with every question asked under four guidelines, and without logits at the head.

    python examples/trl_guidelines.py

A trainer of your own keeps everything else with one line: use_fused_head(trainer).
"""

import tempfile

from mmedx_fast import prepare_environment

prepare_environment(offline=True)  # before transformers, where torchvision's build is not torch's
from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: E402
from trl import GRPOConfig  # noqa: E402

from mmedx_fast.data.images import load_image  # noqa: E402
from mmedx_fast.data.phantom import make_split  # noqa: E402
from mmedx_fast.integrations.trl import GuidelineGRPOTrainer  # noqa: E402
from mmedx_fast.tiny import assets_folder  # noqa: E402

records = make_split("train", 20, 0, set())[:4]
dataset = Dataset.from_dict(
    {
        "prompt": [[{"role": "user", "content": record.question}] for record in records],
        "image": [load_image(record.images[0]) for record in records],
        "answer": [record.answer for record in records],
    }
)


def names_the_answer(completions, answer, **columns):
    """1 for an answer that holds the right diagnosis; the length breaks ties."""
    texts = [completion[0]["content"] for completion in completions]
    return [float(a in t) + len(t) / 1000 for t, a in zip(texts, answer, strict=True)]


with tempfile.TemporaryDirectory() as work:
    trainer = GuidelineGRPOTrainer(
        model=AutoModelForImageTextToText.from_pretrained(assets_folder(), dtype="float32"),
        reward_funcs=names_the_answer,
        args=GRPOConfig(
            output_dir=work, max_steps=2, per_device_train_batch_size=8, num_generations=8,
            max_completion_length=16, report_to="none", use_cpu=True, logging_steps=1,
        ),
        train_dataset=dataset,
        processing_class=AutoProcessor.from_pretrained(assets_folder()),
        peft_config=LoraConfig(r=8, target_modules=r".*language_model.*(q|v)_proj"),
        guidelines=["differential", "intuitive", "analytic", "bayesian"],
    )  # fmt: skip
    trainer.train()
for name in ("reward", "guideline/analytic/reward", "guideline/bayesian/reward", "entropy"):
    print(f"{name:28} {trainer.state.log_history[0][name]:.3f}")
