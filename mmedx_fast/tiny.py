"""A tiny Qwen2.5-VL that the project makes itself: architecture, tokenizer and processor.

It is the real architecture (windowed vision tower, M-RoPE, grouped-query attention, untied head) at about
two million parameters, so that every part of the pipeline runs for real on a machine without a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

IMAGE_SIZE = 112
PATCH_SIZE = 14
SPATIAL_MERGE = 2
# About 1 / sqrt(width): with the 0.02 made for wide models, so narrow a one hardly starts to learn.
INITIALIZER_RANGE = 0.07
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_PRETOKENIZE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def assets_folder() -> Path:
    """Where the shipped tiny model lies inside the package."""
    return Path(__file__).parent / "assets" / "tiny_qwen2_5_vl"


def train_tokenizer(corpus: Iterable[str], folder: Path, vocab_size: int = 1536) -> None:
    """Train a byte-level BPE with Qwen2's pre-tokenization on ``corpus`` and save it as HF files."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import Qwen2TokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PRETOKENIZE), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    hf = Qwen2TokenizerFast(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        unk_token=None,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
    )
    hf.save_pretrained(folder)


def model_config(tokenizer) -> object:
    """The Qwen2.5-VL configuration of the tiny model, for a tokenizer with :data:`SPECIAL_TOKENS`."""
    from transformers import Qwen2_5_VLConfig

    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    vocab = -(-len(tokenizer) // 64) * 64
    text = dict(
        vocab_size=vocab,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        use_sliding_window=False,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "mrope_section": [4, 6, 6],
        },
        bos_token_id=ids["<|endoftext|>"],
        eos_token_id=ids["<|im_end|>"],
        pad_token_id=ids["<|endoftext|>"],
        attention_dropout=0.0,
        initializer_range=INITIALIZER_RANGE,
    )
    vision = dict(
        depth=2,
        hidden_size=96,
        intermediate_size=192,
        num_heads=3,
        in_channels=3,
        patch_size=PATCH_SIZE,
        spatial_merge_size=SPATIAL_MERGE,
        temporal_patch_size=2,
        window_size=IMAGE_SIZE,
        fullatt_block_indexes=[1],
        out_hidden_size=192,
        initializer_range=INITIALIZER_RANGE,
    )
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )


def save_processor(folder: Path) -> None:
    """Write the image processor and chat template beside the tokenizer already in ``folder``."""
    from transformers import (
        Qwen2_5_VLProcessor,
        Qwen2TokenizerFast,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    pixels = IMAGE_SIZE * IMAGE_SIZE
    # Both bounds at one size: every image becomes 4 x 4 merged patches, 16 tokens.
    size = {"shortest_edge": pixels, "longest_edge": pixels}
    images = Qwen2VLImageProcessor(size=size, patch_size=PATCH_SIZE, merge_size=SPATIAL_MERGE)
    videos = Qwen2VLVideoProcessor(patch_size=PATCH_SIZE, merge_size=SPATIAL_MERGE)
    tokenizer = Qwen2TokenizerFast.from_pretrained(folder)
    Qwen2_5_VLProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        video_processor=videos,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)


def build_tiny(
    folder: str | Path, corpus: Iterable[str], seed: int = 0, vocab_size: int = 1536
) -> Path:
    """Write a tiny Qwen2.5-VL with random weights, its tokenizer trained on ``corpus``, to ``folder``.

    Deterministic in ``corpus`` and ``seed``; weights are float32. Returns ``folder``.
    """
    from mmedx_fast._env import prepare_environment

    prepare_environment()
    import torch
    from transformers import (
        GenerationConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2TokenizerFast,
    )

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    train_tokenizer(corpus, folder, vocab_size)
    tokenizer = Qwen2TokenizerFast.from_pretrained(folder)
    save_processor(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(model_config(tokenizer)).float()
    eos = tokenizer.convert_tokens_to_ids("<|im_end|>")
    pad = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    model.generation_config = GenerationConfig(eos_token_id=[eos, pad], pad_token_id=pad)
    model.save_pretrained(folder)
    return folder
