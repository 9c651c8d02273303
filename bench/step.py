"""The update of one question's rollouts: a random Qwen2.5-VL with LoRA, as a tree and as plain rows.

K guidelines x n rollouts. The prompt of P tokens (one image and the question), a guideline of G
tokens and a response of R tokens make a rollout. Everything runs on the same model, token ids,
advantages and old log-probs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench import head
from bench.registry import Call, Case, Outputs, Shape, Sizes
from mmedx_fast import attention, lora_linear, swiglu
from mmedx_fast.config import LoraConfig
from mmedx_fast.flops import ModelShape, plain_counts, train_flops, tree_counts
from mmedx_fast.ops import PolicyLossSpec, linear_policy_loss
from mmedx_fast.policy_model import RowModel, new_adapter, with_gradient, wrap
from mmedx_fast.tree import Branch, PackedRow, RopeIndex, Tree, pack_row

SPEC = PolicyLossSpec(
    loss_type="dapo", epsilon=head.EPSILON, epsilon_high=head.EPSILON_HIGH, beta=0.0
)
# The last words of every vocabulary; what is sampled lies below.
SPECIAL = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")

# Width, MLP, layers, heads, key heads, vocabulary; vision tower: depth, width, MLP, heads.
_TINY = dict(H=192, I=512, L=4, A=6, KV=2, V=1536, VD=2, VH=96, VI=192, VA=3, rank=16)
_WIDE = _TINY | dict(H=512, I=1376, A=8)
_SEVEN_B = dict(H=3584, I=18944, L=28, A=28, KV=4, V=152064, VD=32, VH=1280, VI=3420, VA=16)


def shape(edge: int, model: Sizes, **lengths: int) -> Shape:
    """A size of the op: ``edge`` patches on each side of the image, merged two by two."""
    sizes = {"edge": edge, "K": 4, "n": 4, "checkpoint": 0, **model, **lengths}
    name = " ".join(f"{key}={sizes[key]}" for key in ("P", "G", "R", "K", "n", "H", "L"))
    name += " checkpointed" * sizes["checkpoint"]
    return Shape(name, sizes, counts(sizes, plain=False).tokens)


def counts(s: Sizes, *, plain: bool) -> Any:
    """Tokens, attention pairs and targets of all rollouts."""
    count = plain_counts if plain else tree_counts
    return count(s["P"], s["G"], s["R"], guidelines=s["K"], n=s["n"])


def model_config(s: Sizes) -> dict[str, Any]:
    """A Hugging Face configuration of Qwen2.5-VL."""
    eighth, every = s["H"] // s["A"] // 8, max(s["VD"] // 4, 2)
    text = {
        "vocab_size": s["V"],
        "hidden_size": s["H"],
        "intermediate_size": s["I"],
        "num_hidden_layers": s["L"],
        "num_attention_heads": s["A"],
        "num_key_value_heads": s["KV"],
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [eighth, 3 * eighth // 2, 3 * eighth // 2],
        },
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "attention_dropout": 0.0,
        "initializer_range": s["H"] ** -0.5,
    }
    vision = {
        "depth": s["VD"],
        "hidden_size": s["VH"],
        "intermediate_size": s["VI"],
        "num_heads": s["VA"],
        "out_hidden_size": s["H"],
        "window_size": 112,
        "fullatt_block_indexes": list(range(every - 1, s["VD"], every)),
        "initializer_range": s["VH"] ** -0.5,
    }
    special = {name: s["V"] - len(SPECIAL) + i for i, name in enumerate(SPECIAL)}
    return {"text_config": text, "vision_config": vision, "tie_word_embeddings": False, **special}


def flops(s: Sizes) -> float:
    """Forward and backward of the tree without recomputation; frozen base and vision tower.

    The last token of a response predicts nothing and is not fed.
    """
    model = ModelShape.from_config(model_config(s))
    fed = counts({**s, "R": s["R"] - 1}, plain=False)
    whole = replace(fed, targets=counts(s, plain=False).targets)
    image = s["edge"] ** 2 // 4
    return train_flops(model, whole, image, lora_rank=s["rank"], checkpointing=False)


def moved(s: Sizes, itemsize: int) -> float:
    """Every weight read once; the adapter (float32) read, and its gradient written."""
    model = ModelShape.from_config(model_config(s))
    return float(itemsize * model.params + 8 * model.lora_params(s["rank"]))


@dataclass(frozen=True)
class StepInputs:
    """One question's rollouts and the model that is updated with them. B = K n rollouts."""

    model: Any
    """PEFT model in train mode; only its adapter (float32) requires gradients."""
    row: PackedRow
    ids: Tensor  # [B, P + G + R]
    positions: Tensor  # [3, B, P + G + R]
    pixel_values: Tensor  # [patches, features], of the one image
    grid: Tensor  # [1, 3]
    advantages: Tensor  # [B, R] f32, equal within a rollout
    old_logprob: Tensor  # [B, R] f32, within 0.05 of the present one: no ratio reaches the clip
    token_weight: Tensor  # [B, R] f32, 1 / (B R)
    sizes: Sizes

    @property
    def base(self) -> Any:
        """The transformers model inside PEFT's wrapper."""
        return self.model.base_model.model

    @property
    def adapter(self) -> list[Tensor]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def prompt(self) -> int:
        return self.sizes["P"] + self.sizes["G"]

    def images(self, rollouts: int) -> dict[str, Tensor]:
        """The image once for each rollout, as rows without a tree need it."""
        return {
            "pixel_values": self.pixel_values.repeat(rollouts, 1),
            "image_grid_thw": self.grid.repeat(rollouts, 1),
        }


def inputs(case: Case) -> StepInputs:
    """Model and rollouts; the old log-probs are the model's own, off by less than the clip."""
    s, device = case.sizes, case.device
    random = torch.Generator().manual_seed(case.seed)
    model = build_model(case)
    tree = make_tree(s, model.config, random)
    rope = RopeIndex.of(model.base_model.model.config)
    row = pack_row([tree], rope).to(device)
    ids = torch.tensor([[*b.prompt_ids, *b.response_ids] for b in tree.branches], device=device)
    assert tree.pixel_values is not None and tree.image_grid_thw is not None
    grid = tree.image_grid_thw.to(device)
    kinds = (ids == rope.image_token_id).int()
    positions, _ = model.base_model.model.model.get_rope_index(
        ids, mm_token_type_ids=kinds, image_grid_thw=grid.repeat(len(ids), 1)
    )
    one = torch.ones(len(ids), s["R"], device=device)
    advantages = torch.randn(len(ids), 1, generator=random).to(device) * one
    noise = 0.1 * (torch.rand(len(ids), s["R"], generator=random) - 0.5).to(device)
    x = StepInputs(
        model, row, ids, positions, tree.pixel_values.to(device), grid,
        advantages, one, one / one.numel(), s,
    )  # fmt: skip
    with torch.no_grad():
        now = torch.cat([stock_logprob(x, x.base, slice(i, i + 1)) for i in range(len(ids))])
    return replace(x, old_logprob=now.float() + noise)


def build_model(case: Case) -> Any:
    """Random weights made on the device, LoRA on the language model's linears, B not zero."""
    from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

    devices = [case.device] if case.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(case.seed)
        with torch.device(case.device):
            base = AutoModelForImageTextToText.from_config(
                Qwen2_5_VLConfig(**model_config(case.sizes)),
                dtype=case.dtype,
                attn_implementation="sdpa",
            )
        rank = case.sizes["rank"]
        model = wrap(base, new_adapter(LoraConfig(r=rank, lora_alpha=2 * rank)), case.seed, False)
        for name, param in model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(param, std=0.02)
    if case.sizes["checkpoint"]:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def make_tree(s: Sizes, config: Any, random: torch.Generator) -> Tree:
    """K prompts that share image and question, n random responses to each."""
    image = s["edge"] ** 2 // 4

    def words(length: int) -> list[int]:
        return torch.randint(
            1, s["V"] - s["K"] - len(SPECIAL), (length,), generator=random
        ).tolist()

    stem = [config.vision_start_token_id, *[config.image_token_id] * image]
    stem += [config.vision_end_token_id, *words(s["P"] - image - 2)]
    branches = []
    for k in range(s["K"]):
        # A first word of its own, so that the guidelines fork here whatever is drawn.
        prompt = [*stem, s["V"] - len(SPECIAL) - 1 - k, *words(s["G"] - 1)]
        branches += [Branch(prompt, words(s["R"])) for _ in range(s["n"])]
    features = 3 * 2 * 14 * 14
    pixels = torch.randn(s["edge"] ** 2, features, generator=random)
    return Tree(tuple(branches), pixels, torch.tensor([[1, s["edge"], s["edge"]]]), "bench")


def stock_hidden(x: StepInputs, base: Any, part: slice) -> Tensor:
    """[rollouts, R, H]: the states that predict the responses, from transformers' own forward."""
    ids = x.ids[part, :-1]
    out = base.model(
        input_ids=ids,
        position_ids=x.positions[:, part, :-1],
        attention_mask=torch.ones_like(ids),
        use_cache=False,
        **x.images(len(ids)),
    )
    return out.last_hidden_state[:, x.prompt - 1 :]


def stock_logprob(x: StepInputs, base: Any, part: slice) -> Tensor:
    """[rollouts, R] log-probs of the responses through whole logits, at least float32."""
    logits = base.lm_head(stock_hidden(x, base, part))
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logprob = torch.log_softmax(logits.to(wide), -1)
    return logprob.gather(-1, x.ids[part, x.prompt :, None])[..., 0]


def reference(x: StepInputs) -> Outputs:
    """One rollout after another by stock transformers and whole logits.

    In float64 where the model is float32; a bfloat16 model keeps its weights and rounding, because
    a float64 copy of 7B fits nowhere.
    """
    model = copy.deepcopy(x.model).double() if _is_float32(x) else x.model
    prepare(model.base_model.model, "dense", ours=False)
    losses = []
    for i in range(len(x.ids)):
        part = slice(i, i + 1)
        logprob = stock_logprob(x, model.base_model.model, part)
        ratio = (logprob - x.old_logprob[part]).exp()
        clipped = ratio.clamp(1 - head.EPSILON, 1 + head.EPSILON_HIGH)
        advantage = x.advantages[part]
        gain = torch.minimum(ratio * advantage, clipped * advantage)
        loss = -(gain * x.token_weight[part]).sum()
        loss.backward()
        losses.append(loss.detach())
    return {"loss": torch.stack(losses).sum(), "d_adapter": take_gradient(model)}


def _is_float32(x: StepInputs) -> bool:
    return bool(x.base.lm_head.weight.dtype == torch.float32)


def take_gradient(model: Any) -> Tensor:
    """The adapter's gradient in one vector; the parameters are left without one."""
    params = [p for p in model.parameters() if p.requires_grad]
    whole = torch.cat([p.grad.flatten() for p in params])
    for p in params:
        p.grad = None
    return whole


def prepare(base: Any, backend: attention.Backend, *, ours: bool) -> None:
    """Attention, adapters and MLP of the model that all providers share: ``ours`` as
    :class:`mmedx_fast.policy.Policy` sets them on this device, else PEFT's and transformers' own."""
    attention.set_backend(base, backend)
    lora_linear.set_fused(base, ours)
    swiglu.set_recompute(base, ours and base.device.type == "cpu")


def tree_call(x: StepInputs, backend: attention.Backend) -> Call:
    """One packed row, as :class:`mmedx_fast.policy.Policy` runs it."""
    rows = RowModel(x.model, backend, None)

    def call() -> Outputs:
        prepare(x.base, backend, ours=True)
        loss = rows(x.row, lambda h, w: with_gradient(h, _policy_loss(x, slice(None), w))[0])
        loss.backward()
        return {"loss": loss.detach(), "d_adapter": take_gradient(x.model)}

    return call


def plain_call(x: StepInputs, micro: int, ours: bool = False) -> Call:
    """Rollouts as rows of a batch, ``micro`` at once, with our head and loss; ``ours``: our layers too."""

    def call() -> Outputs:
        prepare(x.base, "dense", ours=ours)
        total = torch.zeros((), device=x.ids.device)
        for start in range(0, len(x.ids), micro):
            part = slice(start, start + micro)
            hidden = stock_hidden(x, x.base, part).flatten(0, 1)
            loss, _ = with_gradient(hidden, _policy_loss(x, part, x.base.lm_head.weight))
            loss.backward()
            total += loss.detach()
        return {"loss": total, "d_adapter": take_gradient(x.model)}

    return call


def _policy_loss(
    x: StepInputs, part: slice, weight: Tensor
) -> Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]:
    def loss_of(hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return linear_policy_loss(
            hidden,
            weight,
            x.ids[part, x.prompt :].flatten(),
            x.advantages[part].flatten(),
            old_logprob=x.old_logprob[part].flatten(),
            token_weight=x.token_weight[part].flatten(),
            spec=SPEC,
        )

    return loss_of


def gemm_call(x: StepInputs) -> Call:
    """The GEMMs of the language model and its head over the tree's tokens, forward and dX."""
    weights = [
        (m.weight, x.row.n_tokens)
        for name, m in x.base.model.language_model.named_modules()
        if isinstance(m, torch.nn.Linear) and ".lora_" not in name
    ]
    weights.append((x.base.lm_head.weight, len(x.row.targets)))

    def operands() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        made: dict[tuple[int, int], Tensor] = {}
        for weight, tokens in weights:
            sides = [(tokens, weight.shape[1]), (tokens, weight.shape[0])]
            for side in sides:
                made.setdefault(side, torch.ones(side, dtype=weight.dtype, device=weight.device))
            yield weight.detach(), made[sides[0]], made[sides[1]]

    products = list(operands())

    def call() -> Outputs:
        for weight, states, slopes in products:
            torch.mm(states, weight.t())
            torch.mm(slopes, weight)
        return {}

    return call


SHAPES = {
    # the project's tiny model
    "tiny": (shape(8, _TINY, P=256, G=16, R=128),),
    "cpu_large": (shape(8, _WIDE, P=256, G=16, R=128),),
    "qwen2_5_vl_7b": tuple(
        shape(64, _SEVEN_B, P=1200, G=60, R=r, rank=64, checkpoint=c)
        for r, c in ((256, 1), (512, 1), (256, 0))
    ),
}
