"""The model behind ``mmedx plan`` against real update steps: counted FLOPs and measured bytes."""

import gc
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.saved import saved_for_backward
from mmedx_fast.attention import set_backend
from mmedx_fast.config import (
    Config,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    deepspeed_settings,
)
from mmedx_fast.cost import plan
from mmedx_fast.cost_activations import Training, row_memory
from mmedx_fast.cost_memory import logits_tile
from mmedx_fast.flops import Counts, ModelShape, train_flops
from mmedx_fast.ops import PolicyLossSpec, linear_policy_loss
from mmedx_fast.policy import Policy
from mmedx_fast.policy_model import RowModel, load_base
from mmedx_fast.tree import PackedRow, RopeIndex, pack_row

RANK = 8
WITHIN = 0.10
"""What the plan promises; the formulas are closer."""


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"measured_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ROOT = Path(__file__).resolve().parents[1]
tiny_vl = _load(ROOT / "tests" / "_tiny_vl.py")
memory = _load(ROOT / "tests" / "_peak_memory.py")


def _sizes(hidden: int, inner: int, layers: int, heads: int, vocab: int) -> dict[str, Any]:
    eighth = hidden // heads // 8
    text = tiny_vl.TEXT | {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 4,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [eighth, 3 * eighth // 2, 3 * eighth // 2],
        },
    }
    vision = tiny_vl.VISION | {
        "depth": 4,
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_heads": 2,
        "out_hidden_size": hidden,
        "window_size": 56,
        "fullatt_block_indexes": [1, 3],
    }
    return {
        "model_type": "qwen2_5_vl",
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": False,
        **tiny_vl.TOKENS,
    }


# The second has the 7B's ratios: an MLP of 5.3 times the width, seven query heads for a key head.
CONFIGS = {
    "tiny": _sizes(64, 172, 2, 4, 320),
    "shrunk 7B": _sizes(224, 1184, 3, 28, 512)
    | {
        "text_config": _sizes(224, 1184, 3, 7, 512)["text_config"]
        | {"num_key_value_heads": 1},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import transformers

    made = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        made[name] = tmp_path_factory.mktemp("model") / name.replace(" ", "-")
        sizes = transformers.Qwen2_5_VLConfig(**config)
        transformers.Qwen2_5_VLForConditionalGeneration(sizes).save_pretrained(made[name])
    return made


def varlen(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """``varlen_attn``'s signature, by dense products over each segment's rectangle."""
    return _Varlen.apply(query, key, value, cu_q, cu_k, scale)


class _Varlen(torch.autograd.Function):
    """Keeps what a fused kernel keeps: q, k, v, the output and the log-sum-exp."""

    @staticmethod
    def forward(ctx, query, key, value, cu_q, cu_k, scale):
        out, total = torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32)
        ctx.scale = scale
        for q, k in _segments(cu_q, cu_k):
            scores = _scores(query[q], key[k], scale)
            total[q] = scores.logsumexp(-1).transpose(0, 1)
            share = scores.softmax(-1).to(query.dtype)
            out[q] = (share @ _heads(value[k], query)).transpose(0, 1)
        ctx.save_for_backward(query, key, value, out, total, cu_q, cu_k)
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, out, total, cu_q, cu_k = ctx.saved_tensors
        d_query, d_key, d_value = map(torch.zeros_like, (query, key, value))
        for q, k in _segments(cu_q, cu_k):
            share = (_scores(query[q], key[k], ctx.scale) - total[q].T[..., None]).exp()
            upstream = grad[q].transpose(0, 1)
            d_value[k] += _ungroup(share.to(grad.dtype).transpose(1, 2) @ upstream, value)
            wanted = upstream @ _heads(value[k], query).transpose(1, 2)
            mean = (grad[q] * out[q]).sum(-1).T[..., None]
            slope = (share * (wanted - mean) * ctx.scale).to(grad.dtype)
            d_query[q] = (slope @ _heads(key[k], query)).transpose(0, 1)
            d_key[k] += _ungroup(slope.transpose(1, 2) @ query[q].transpose(0, 1), key)
        return d_query, d_key, d_value, None, None, None


def _segments(cu_q, cu_k):
    ends = zip(cu_q.tolist(), cu_q.tolist()[1:], cu_k.tolist(), cu_k.tolist()[1:], strict=False)
    return [(slice(a, b), slice(c, d)) for a, b, c, d in ends]


def _heads(x, query):
    return x.repeat_interleave(query.shape[1] // x.shape[1], 1).transpose(0, 1)


def _ungroup(x, like):
    return x.unflatten(0, (like.shape[1], -1)).sum(1).transpose(0, 1)


def _scores(q, k, scale):
    hidden = torch.ones(len(q), len(k), dtype=torch.bool).triu(len(k) - len(q) + 1)
    scores = q.transpose(0, 1) @ _heads(k, q).transpose(1, 2) * scale
    return scores.float().masked_fill(hidden, -torch.inf)


def _row(config: Any, edge: int = 16) -> PackedRow:
    """Two guidelines, two rollouts of each; one image of ``edge`` x ``edge`` patches."""
    tree = tiny_vl.make_tree(
        torch.Generator().manual_seed(0), 2, 2, ((1, edge, edge),), 40, 8, response=100
    )
    return pack_row([tree], RopeIndex.of(config))


@dataclass
class Step:
    """A model, and one backward pass over a row of it."""

    row: PackedRow
    present: list[torch.Tensor]
    """Weights and gradients, there before and after."""
    run: Callable[[PackedRow], None]
    module: Any = None

    @property
    def keys(self) -> list[int]:
        """Keys of each segment's path from the root."""
        keys: list[int] = []
        for _, length, parent in self.row.segments:
            keys.append(length + (keys[parent] if parent >= 0 else 0))
        return keys

    @property
    def rectangles(self) -> int:
        """(query, key) pairs as dense products compute them: each segment against its whole path."""
        return sum(n * k for (_, n, _), k in zip(self.row.segments, self.keys, strict=True))


def lora_step(folder: Path, dtype: str, checkpointing: bool, sft: bool = False) -> Step:
    policy = Policy.load(
        folder,
        model=ModelConfig(dtype=dtype, gradient_checkpointing=checkpointing, attention="varlen"),
        lora=LoraConfig(r=RANK, lora_alpha=RANK),
        optimizer=OptimizerConfig(),
        attention_kernel=varlen,
    )

    def run(row: PackedRow) -> None:
        n = len(row.targets)
        weight = torch.full((n,), 1 / n)
        if sft:
            policy.sft_backward(row, weight)
        else:
            spec = PolicyLossSpec(loss_type="dapo")
            policy.backward(
                row,
                advantages=torch.ones(n),
                token_weight=weight,
                spec=spec,
                rollout_logprob=torch.zeros(n),
            )

    # A plan is for a GPU: transformers' own MLP, whatever stands in for it on a CPU.
    for layer in policy.module.base.model.language_model.layers:
        layer.mlp.__dict__.pop("forward", None)
    row = _row(policy.module.base.config)
    row = row if sft else policy.with_image_features([row])[0]
    return _ready(Step(row, [], run), policy.module)


class _Whole(RowModel):
    """Without PEFT around the transformers model."""

    @property
    def base(self) -> Any:
        return self.model


def full_step(folder: Path, dtype: str, checkpointing: bool, tower: bool = False) -> Step:
    """Every weight trained, the vision tower's too with ``tower``; no engine around."""
    base = load_base(folder, ModelConfig(dtype=dtype), getattr(torch, dtype))
    base.train().requires_grad_(True)
    base.model.visual.requires_grad_(tower)
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    module = _Whole(base, "varlen", varlen)
    set_backend(base, "varlen")

    def run(row: PackedRow) -> None:
        n = len(row.targets)

        def head(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            loss, _ = linear_policy_loss(
                *(hidden, weight, row.targets, torch.ones(n)),
                token_weight=torch.full((n,), 1 / n),
                spec=PolicyLossSpec(loss_type="dapo"),
                rollout_logprob=torch.zeros(n),
            )
            return loss

        module(row, head).backward()

    row = _row(base.config)
    if not tower:
        with torch.no_grad():
            row = replace(row, image_features=module(row, None), pixel_values=None)
    return _ready(Step(row, [], run), module)


def _ready(step: Step, module: torch.nn.Module) -> Step:
    """After a first pass, when every gradient has its memory."""
    step.module = module
    step.run(step.row)
    params = list(module.parameters())
    step.present = [*params, *module.buffers(), *(p.grad for p in params if p.grad is not None)]
    return step


STEPS: dict[str, Callable[..., Step]] = {
    "LoRA": lora_step,
    "LoRA, SFT": partial(lora_step, sft=True),
    "full": full_step,
    "full with tower": partial(full_step, tower=True),
}


CASES = [
    ("tiny", "LoRA", False),
    ("tiny", "LoRA, SFT", True),
    ("shrunk 7B", "LoRA", True),
    ("shrunk 7B", "LoRA, SFT", False),
    ("shrunk 7B", "LoRA, SFT", True),
    ("shrunk 7B", "full", True),
    ("shrunk 7B", "full with tower", False),
    ("shrunk 7B", "full with tower", True),
]


@pytest.mark.parametrize(("name", "kind", "checkpointing"), CASES)
def test_flops_of_a_step_are_the_counted_ones(name, kind, checkpointing, folders) -> None:
    step = STEPS[kind](folders[name], "float32", checkpointing)
    # sdpa's own kernel, which the tower takes, is not counted on a CPU; its matrix products are.
    math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}
    with math, FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        step.run(step.row)
    model = ModelShape.from_config(CONFIGS[name])
    images = step.row.pixel_values is not None  # the others' features were there before
    row = step.row
    counts = Counts(
        tokens=row.n_tokens,
        pairs=step.rectangles,
        targets=len(row.targets),
        images=int(images),
    )
    planned = train_flops(
        *(model, counts, 64),
        lora_rank=RANK,
        checkpointing=checkpointing,
        full=kind.startswith("full"),
        train_tower=kind == "full with tower",
    )
    # The kernel above computes the scores again in its backward: half its forward.
    planned += 0.5 * step.rectangles * model.pair_flops()
    assert planned == pytest.approx(counter.get_total_flops(), rel=WITHIN / 4)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["LoRA", "full"])
def test_activations_of_a_step_are_the_measured_ones(kind, dtype, checkpointing, folders) -> None:
    step = STEPS[kind](folders["shrunk 7B"], dtype, checkpointing)
    with saved_for_backward(step.present) as kept:
        step.run(step.row)
    with memory.PeakMemory(*step.present) as live:
        step.run(step.row)
    model = ModelShape.from_config(CONFIGS["shrunk 7B"])
    how = Training(
        size=4 if dtype == "float32" else 2,
        checkpointing=checkpointing,
        full=kind == "full",
        rank=RANK,
    )
    row = step.row
    planned = row_memory(
        model, how, tokens=row.n_tokens, keys=sum(step.keys), targets=len(row.targets)
    )
    # At the loss the last norm's input (and factor) and the gradients made there are kept as well.
    last = (4 + how.size * how.full) * row.n_tokens * model.hidden
    last += how.size * model.hidden * (len(row.targets) + model.vocab * how.full)
    assert planned.kept + last == pytest.approx(kept.peak, rel=WITHIN)
    # On a CPU the tile comes with its exponentials and a product, under bfloat16 with float32 weights.
    tile = 3 * 4 * len(row.targets) * (model.vocab + 32)
    tile += 4 * model.vocab * model.hidden if how.size == 2 else 0
    peak = planned.kept + max(planned.layer, planned.head + tile)
    assert peak == pytest.approx(live.peak, rel=WITHIN)
    # Activations, not the tile, are what is compared.
    assert tile < peak / 3


def test_the_logits_tile_is_the_measured_one(triton_kernels) -> None:
    """The Triton op in the interpreter: the memory that it takes on a GPU."""
    n, width, vocab = 48, 16, 3000
    hidden, weight = torch.randn(n, width, requires_grad=True), torch.randn(vocab, width)
    targets, one = torch.randint(0, vocab, (n,)), torch.ones(n)
    with memory.PeakMemory(hidden, weight, targets, one) as live:
        loss, _ = linear_policy_loss(
            *(hidden, weight, targets, one),
            token_weight=one / n,
            spec=PolicyLossSpec(loss_type="dapo"),
            rollout_logprob=torch.zeros(n),
        )
        loss.backward()
    # Twice, because a CPU's GEMM is given the gradient without gaps: a copy.
    assert 2 * logits_tile(vocab, n) == pytest.approx(live.peak, rel=WITHIN)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_weights_gradients_and_moments_are_the_measured_ones(stage, folders) -> None:
    """What lives between backward and update, on one process: DeepSpeed's real tensors."""
    bucket = 50_000
    zero = {"stage": stage, "reduce_bucket_size": bucket, "overlap_comm": stage == 2}
    cfg = Config.model_validate(
        {
            "model": {"path": str(folders["shrunk 7B"]), "dtype": "float32"},
            "lora": {"r": 64},
            "deepspeed": {"zero_optimization": zero},
        }
    )
    before = _storages()
    policy = Policy.load(
        folders["shrunk 7B"],
        model=cfg.model,
        lora=cfg.lora,
        optimizer=OptimizerConfig(),
        deepspeed=deepspeed_settings(cfg),
        attention_kernel=varlen,
    )
    row = policy.with_image_features([_row(policy.module.base.config)])[0]
    inputs = {x.untyped_storage().data_ptr() for x in vars(row).values() if torch.is_tensor(x)}
    policy.sft_backward(row, torch.full((len(row.targets),), 1.0))
    now = {at: size for at, size in _storages().items() if at not in before and at not in inputs}
    policy.close()
    parts = {part["name"]: part for part in plan(cfg)["memory"]}
    planned = {n: p["bytes"] for n, p in parts.items() if p["phase"] == "always"}
    if stage in (1, 2):
        planned["buckets"] = parts["ZeRO's gradient buckets"]["bytes"]
    assert sum(planned.values()) == pytest.approx(sum(now.values()), rel=WITHIN)
    adapter = sum(v for n, v in planned.items() if n != "frozen weights")
    assert adapter > planned["frozen weights"]  # else an error in it would not show


def _storages() -> dict[int, int]:
    """Address -> bytes of every live tensor's memory; fake ones, which tracing leaves, have none."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    tensors += [x.grad for x in tensors if x.is_leaf and x.grad is not None]
    stores = [x.untyped_storage() for x in tensors if x.device.type == "cpu"]
    return {store.data_ptr(): store.nbytes() for store in stores}
