"""PEFT LoRA adapters made by anyone, as factors of each weight they change.

Read: any ranks and scales (rsLoRA, rank and alpha patterns), linears, Conv1D, embeddings, convolutions,
and stacked parameters (``target_parameters``). What is no plain ``scale * B @ A`` on the given base is
refused by name, never ignored; nothing is unpickled.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmedx_fast.model_files import canonical
from mmedx_fast.policy_adapter import BASE_NAME, CONFIG_NAME, WEIGHTS_NAME, AdapterError

if TYPE_CHECKING:
    from torch import Tensor

    from mmedx_fast.ops import LoraFactors

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+?)\.lora_(?:(?P<kind>embedding)_)?(?P<factor>[AB])(\.weight)?")
_PICKLED = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")

_DIFFERS = "its change is not scale * B @ A"
_APART = "merge it by itself with PEFT (merge_and_unload), or train without it"
REFUSED: dict[str, tuple[str, str]] = {
    "use_dora": ("DoRA also rescales the base's columns", _APART),
    "lora_bias": ("its B has a bias", "train with lora_bias=False"),
    "modules_to_save": (
        "whole modules were trained beside the LoRA",
        "train without modules_to_save, or merge it by itself with PEFT",
    ),
    "trainable_token_indices": ("rows of the embedding were trained", _APART),
    "layer_replication": ("it belongs to a model with repeated layers", "merge it with PEFT"),
    "alora_invocation_tokens": (
        "aLoRA acts from its invocation tokens on, which no merged weight can do",
        "keep it as an adapter",
    ),
    "use_qalora": (f"QALoRA pools its inputs: {_DIFFERS}", "train without it"),
    "use_bdlora": (f"BD-LoRA stores block-diagonal factors: {_DIFFERS}", "train without it"),
    "velora_config": ("VeLoRA stores projections beside the factors", "train without it"),
    "monteclora_config": (f"MonteCLoRA samples its factors: {_DIFFERS}", "train without it"),
    "arrow_config": ("Arrow routes between adapters by the input", "keep it as an adapter"),
    "kasa_config": (f"KaSA scales singular values: {_DIFFERS}", _APART),
    "megatron_config": (
        "Megatron's parallel layers are not those of a transformers model",
        "convert adapter and base to transformers' layout",
    ),
}
"""Field of adapter_config.json -> why an adapter that sets it is refused, and what to do."""

_INITS_OF_ANOTHER_BASE = ("pissa", "olora", "corda", "lora_ga")
_INERT = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha"),
    *("lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "init_lora_weights"),
    *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_core"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
    *("target_parameters", "runtime_config", "ensure_weight_tying"),
    # ms-swift's, of training alone
    *("lora_dtype", "lorap_lr_ratio", "lorap_emb_lr", "model_key_mapping"),
}
"""Fields that are read here, or that a trained adapter's change does not depend on."""

_WORDS: dict[type, str] = {bool: "true, false", dict: "an object", list: "a list", str: "a text"}
_TYPES: dict[str, type] = {
    **dict.fromkeys(("use_rslora", "fan_in_fan_out"), bool),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), dict),
    **dict.fromkeys(("task_type", "base_model_name_or_path", "revision"), str),
    "target_parameters": list,
}
"""What is read must be of its type: "false" would be true."""

Patterns = list[tuple[re.Pattern[str], Any]]


@dataclass(frozen=True)
class LoraLayer:
    """One matrix that an adapter changes: delta [out, in] = scale * B @ A, in PEFT's orientation (an
    embedding's is [width, vocabulary], a convolution's [out, the rest])."""

    name: str
    """The module as the adapter names it."""
    kind: str
    """linear, embedding, conv, or stacked (one matrix of a parameter [experts, ., .])."""
    factors: LoraFactors
    kernel: tuple[int, ...] = ()
    """conv: shape of a filter, [in, ...]."""
    index: int = 0
    """stacked: which of the parameter's matrices."""
    fan_in_fan_out: bool = False
    """The adapter's configuration says that (some of) its modules store [in, out]."""

    @property
    def key(self) -> str:
        """One spelling whichever version of transformers named the module."""
        name = canonical(self.name)
        return f"{name}[{self.index}]" if self.kind == "stacked" else name


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter in memory: the layers it changes by :attr:`LoraLayer.key`."""

    name: str
    folder: Path
    config: dict[str, Any]
    layers: dict[str, LoraLayer]
    copies: dict[str, str] = field(default_factory=dict)
    """Weights of the base that PEFT saved beside the factors: the base's name -> key in the file."""
    fingerprint: str = ""
    """Of the base's weights, where this project's trainer wrote it down."""

    @property
    def base(self) -> str:
        """The base model as the adapter names it, empty where it does not."""
        return str(self.config.get("base_model_name_or_path") or "")

    def copy(self, name: str) -> Tensor:
        """The copy of the base's weight ``name`` that lies in the adapter's file."""
        from safetensors import safe_open

        with safe_open(self.folder / WEIGHTS_NAME, framework="pt") as opened:
            found: Tensor = opened.get_tensor(self.copies[name])
        return found


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter, or what is left of one."""
    return (Path(folder) / CONFIG_NAME).is_file()


def read_adapters(folders: Sequence[str | Path], any_base: bool = False) -> list[Adapter]:
    """The adapters, in order, each under a name of its own.

    Raises:
        AdapterError: none given; one cannot be used; two name different bases (``any_base`` lets them);
            two change matrices of different shapes under one name.
    """
    if not folders:
        raise AdapterError("no adapter given: name one or more folders with adapter_config.json")
    paths = [Path(folder) for folder in folders]
    adapters = [read_adapter(path, name) for path, name in zip(paths, _names(paths), strict=True)]
    if not any_base:
        _check_bases(adapters)
    for one, other in _pairs(adapters):
        for key in one.layers.keys() & other.layers.keys():
            _check_same(one, other, key)
    return adapters


def read_adapter(folder: str | Path, name: str = "") -> Adapter:
    """One adapter. Raises AdapterError naming file, field or key, and what to do."""
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file, not an adapter's folder" if folder.exists() else "no such folder"
        raise AdapterError(f"{folder}: {what}")
    config = _read_json(folder / CONFIG_NAME)
    _check_config(folder / CONFIG_NAME, config)
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        _refuse_missing(folder)
    layers, copies = _read_layers(path, config)
    if not layers:
        raise AdapterError(f"{path} holds no LoRA factors")
    note = _read_json(folder / BASE_NAME) if (folder / BASE_NAME).is_file() else {}
    fingerprint = str(note.get("base_fingerprint") or "")
    return Adapter(name or folder.name, folder, config, layers, copies, fingerprint)


def _refuse_missing(folder: Path) -> None:
    for name in _PICKLED:
        if (folder / name).is_file():
            raise AdapterError(
                f"{folder / name} is a pickle, which can run code when it is read; only "
                f"{WEIGHTS_NAME} is. If you trust it, load it once with PEFT and save_pretrained it"
            )
    raise AdapterError(f"{folder / WEIGHTS_NAME} is missing; this folder holds no adapter weights")


def _check_config(path: Path, config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise AdapterError(
            f"{path}: peft_type is {config.get('peft_type')!r}; only LORA adapters can be merged"
        )
    for key, (why, remedy) in REFUSED.items():
        if config.get(key):
            raise AdapterError(f"{path}: {key} = {config[key]!r}: {why}; {remedy}")
    if config.get("bias", "none") != "none":
        raise AdapterError(
            f"{path}: bias = {config['bias']!r}: the base's biases were trained; train with "
            "bias='none', or merge it by itself with PEFT (merge_and_unload)"
        )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_INITS_OF_ANOTHER_BASE):
        raise AdapterError(
            f"{path}: init_lora_weights = {init!r} changes the base, so that the factors are no change of "
            "the original one; convert the adapter with PEFT's save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)"
        )
    for key, value in config.items():
        if key not in _INERT and key not in REFUSED and value:
            raise AdapterError(
                f"{path}: {key} = {value!r} is not known here, and may change what the adapter does; if it "
                "has no part in the trained weights, remove the field"
            )
    for key, kind in _TYPES.items():
        if not isinstance(config.get(key), kind | None):
            raise AdapterError(f"{path}: {key} = {config[key]!r} must be {_WORDS[kind]} or null")
    if not all(isinstance(item, str) for item in config.get("target_parameters") or ()):
        raise AdapterError(f"{path}: target_parameters must hold names of parameters alone")
    _check_number(path, "r", config.get("r"), int)
    _check_number(path, "lora_alpha", config.get("lora_alpha"), int | float)


def _check_number(path: Path, field: str, value: Any, kind: Any) -> None:
    """Above 0. Python takes true for 1, and json reads NaN."""
    if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < math.inf:
        what = "a whole number" if kind is int else "a number"
        raise AdapterError(f"{path}: {field} = {value!r} must be {what} above 0")


def _patterns(path: Path, config: dict[str, Any], field: str, kind: Any) -> Patterns:
    """What a field says of the modules whose names' ends a regular expression matches: PEFT's rule."""
    made = []
    for key, value in (config.get(field) or {}).items():
        _check_number(path, f"{field}[{key!r}]", value, kind)
        try:
            made.append((re.compile(rf"(.*\.)?({key})$"), value))
        except re.error as error:
            raise AdapterError(
                f"{path}: {field}: {key!r} is no regular expression ({error})"
            ) from None
    return made


def _read_layers(path: Path, config: dict[str, Any]) -> tuple[dict[str, LoraLayer], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    at_config = path.with_name(CONFIG_NAME)
    ranks = _patterns(at_config, config, "rank_pattern", int)
    alphas = _patterns(at_config, config, "alpha_pattern", int | float)
    pairs: dict[tuple[str, bool], dict[str, Tensor]] = {}
    copies: dict[str, str] = {}
    try:
        with safe_open(path, framework="pt") as opened:
            for key in opened.keys():
                if not key.startswith(_PREFIX):
                    raise AdapterError(
                        f"{path}: {key} does not begin with {_PREFIX!r}, as PEFT's do"
                    )
                match = _FACTOR.fullmatch(key.removeprefix(_PREFIX))
                if match is None:
                    copies[_copied(path, key)] = key
                    continue
                at = (match["module"], bool(match["kind"]))
                pairs.setdefault(at, {})[match["factor"]] = opened.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: cannot be read as safetensors ({error})") from None
    layers = [
        layer
        for (module, embedding), pair in pairs.items()
        for layer in _layers_of(
            path,
            module,
            embedding,
            pair,
            config,
            rank=_pattern(ranks, module, config["r"]),
            alpha=_pattern(alphas, module, config["lora_alpha"]),
        )
    ]
    made: dict[str, LoraLayer] = {}
    for layer in layers:
        if layer.key in made:
            raise AdapterError(f"{path}: {layer.name} and {made[layer.key].name} are one module")
        made[layer.key] = layer
    return made, copies


def _copied(path: Path, key: str) -> str:
    """The base's name of a weight that is no factor. Only those may stand beside factors."""
    name = key.removeprefix(_PREFIX)
    if "lora_" in name or not name.endswith(".weight"):
        raise AdapterError(
            f"{path}: {key} is no LoRA factor that can be merged; train without what made it"
        )
    return name.replace(".base_layer.", ".")


def _layers_of(
    path: Path,
    module: str,
    embedding: bool,
    pair: dict[str, Tensor],
    config: dict[str, Any],
    rank: int,
    alpha: float,
) -> list[LoraLayer]:
    if set(pair) != {"A", "B"}:
        raise AdapterError(f"{path}: {module} has only its lora_{next(iter(pair))} factor")
    a, b = pair["A"], pair["B"]
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    found, kind = a.shape[0], "embedding" if embedding else "linear"
    kernel: tuple[int, ...] = ()
    if not embedding and a.dim() > 2:
        kind, kernel = "conv", tuple(a.shape[1:])
        a, b = a.flatten(1), b.flatten(1)
    if a.dim() != 2 or b.dim() != 2 or b.shape[1] != found:
        raise AdapterError(
            f"{path}: {module} has lora_A {tuple(pair['A'].shape)} and lora_B {tuple(pair['B'].shape)}, which "
            "do not fit together; was the adapter saved from weights that ZeRO-3 or FSDP had split?"
        )
    if config.get("target_parameters") and found != rank and found % rank == 0:
        return _stacked(path, module, a, b, found // rank, scale, config)
    if found != rank:
        raise AdapterError(
            f"{path}: {module} has rank {found}, but {CONFIG_NAME} says {rank} (r, rank_pattern)"
        )
    factors = _factors(path, module, a, b, scale)
    turned = bool(config.get("fan_in_fan_out"))
    return [LoraLayer(module, kind, factors, kernel, fan_in_fan_out=turned)]


def _stacked(
    path: Path, module: str, a: Tensor, b: Tensor, count: int, scale: float, config: dict[str, Any]
) -> list[LoraLayer]:
    """PEFT's layout of a parameter of ``count`` matrices: A [count * r, in], B [out, r * count]."""
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        raise AdapterError(
            f"{path}: {module} is of target_parameters, and rank_pattern or alpha_pattern is set: that "
            "combination cannot be read; train with one r and lora_alpha"
        )
    rows = a.reshape(count, -1, a.shape[1])
    columns = b.reshape(b.shape[0], -1, count)
    return [
        LoraLayer(
            module,
            "stacked",
            _factors(path, module, rows[e], columns[:, :, e].contiguous(), scale),
            index=e,
        )
        for e in range(count)
    ]


def _factors(path: Path, module: str, a: Tensor, b: Tensor, scale: float) -> LoraFactors:
    import torch

    from mmedx_fast.ops import LoraFactors

    if not a.is_floating_point() or a.element_size() < 2:
        a, b = a.float(), b.float()
    if a.dtype != b.dtype:
        wide = torch.promote_types(a.dtype, b.dtype)
        a, b = a.to(wide), b.to(wide)
    try:
        return LoraFactors(a, b, scale)
    except ValueError as error:
        raise AdapterError(f"{path}: {module}: {error}") from None


def _pattern(patterns: Patterns, module: str, default: Any) -> Any:
    """The first that matches counts."""
    return next((value for key, value in patterns if key.match(module)), default)


def _check_bases(adapters: Sequence[Adapter]) -> None:
    facts: tuple[tuple[str, Callable[[Adapter], str]], ...] = (
        ("weights with the fingerprint", lambda adapter: adapter.fingerprint),
        ("base model", lambda adapter: adapter.base.rstrip("/")),
        ("revision", lambda adapter: str(adapter.config.get("revision") or "")),
    )
    for what, fact in facts:
        known = [adapter for adapter in adapters if fact(adapter)]
        for adapter in known[1:]:
            if fact(adapter) != fact(known[0]):
                raise AdapterError(
                    f"{adapter.folder} belongs to the {what} {fact(adapter)!r}, {known[0].folder} to "
                    f"{fact(known[0])!r}: only adapters of one base can be merged. If the two are the same, "
                    "say so with --any-base (any_base=True)"
                )
        if what.startswith("weights") and len(known) == len(adapters):
            return  # the weights themselves agree: under which name they lay does not matter


def _check_same(one: Adapter, other: Adapter, key: str) -> None:
    a, b = one.layers[key], other.layers[key]
    if (a.kind, a.factors.shape, a.kernel) != (b.kind, b.factors.shape, b.kernel):
        raise AdapterError(
            f"{a.name} is a {a.kind} of {a.factors.shape} in {one.folder}, but a {b.kind} of "
            f"{b.factors.shape} in {other.folder}: they are of different bases"
        )


def _pairs(adapters: Sequence[Adapter]) -> Iterable[tuple[Adapter, Adapter]]:
    return ((one, other) for i, one in enumerate(adapters) for other in adapters[i + 1 :])


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            break
    return [f"{name} ({names[: i + 1].count(name)})" if names.count(name) > 1 else name
            for i, name in enumerate(names)]  # fmt: skip


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterError(f"{path}: {error.strerror}; this folder holds no adapter") from None
    except ValueError as error:
        raise AdapterError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise AdapterError(f"{path} must hold an object, not {type(raw).__name__}")
    return raw
