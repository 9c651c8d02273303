"""The typed configuration of ``mmedx data build``; the manner is that of :mod:`mmedx_fast.config`."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from mmedx_fast.config import ConfigError, Section, _apply_override, _read_yaml
from mmedx_fast.data.records import GUIDELINE_NAMES, SPECIALTIES, AnswerType

Rule = Literal["image_and_text", "long_text", "text_only", "text", "image"]

EXTRA_INSTRUCTION = (
    "Write for a colleague who sees the same images: say what the images and the history show before you "
    "draw on it, argue in the form asked for, and end the reasoning with one sentence that names the option "
    "you conclude on. Use no headings, tags or lists of options inside the reasoning."
)


class DataSetConfig(Section):
    """Where one split of a data set lies."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Short name, for counts and messages."""
    path: str
    """A folder or file in a supported format."""
    split: str = "train"
    format: str | None = None
    """Format name; null detects it."""
    limit: int | None = Field(None, ge=1)
    """Read at most this many questions."""
    check_images: bool = True
    options: dict[str, Any] = {}
    """Choices that the format offers, such as ``{language: en}`` for SLAKE."""


class SourceConfig(DataSetConfig):
    license: str | None = None
    """Written to rows whose own data names no licence."""
    answer_types: tuple[AnswerType, ...] = ("mcq", "yesno", "closed")
    """Questions of other types are dropped: an open answer can hardly be checked strictly."""


class EvaluationConfig(DataSetConfig):
    split: str = "test"


class VllmConfig(Section):
    """The engine in this process, for ``teacher.kind = vllm``."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    max_prompt_length: int = Field(8192, ge=32)
    """Tokens, image tokens included."""
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    kv_cache_memory_bytes: int | None = Field(None, ge=1 << 20)
    max_num_seqs: int = Field(128, ge=1)
    tensor_parallel_size: int = Field(1, ge=1)
    batch: int = Field(512, ge=1)
    """Questions asked together; the answers are saved after each batch."""


class TeacherConfig(Section):
    kind: Literal["openai", "vllm"] = "openai"
    """``openai``: any endpoint with ``/v1/chat/completions``; ``vllm``: vLLM in this process."""
    base_urls: tuple[str, ...] = ()
    """``https://host/v1`` of one or several endpoints that serve the same model."""
    model: str
    """The model's name at the endpoint; for ``vllm`` a model folder or ``tiny``."""
    api_key_env: str | None = Field(None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """NAME of the environment variable that holds the key; the key itself is never written."""
    temperature: float | None = Field(0.7, ge=0, le=2)
    """Null is not sent, for models that refuse it."""
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int = Field(1024, ge=1)
    """Of one answer."""
    seed: int = 0
    """Each question, guideline and attempt gets a seed of its own derived from it."""
    extra_body: dict[str, Any] = {}
    """Merged into the request's body; null removes a field (``max_tokens: null``)."""
    system_prompt: str | None = None
    """Overrides the training prompt's."""
    extra_instruction: str = EXTRA_INSTRUCTION
    """Stands before the guideline's instruction; empty gives exactly the training prompt."""
    answer_format: Literal["letter", "text"] = "letter"
    reveal_answer: bool = False
    """Tell the teacher the right answer. Withheld, a trace that arrives at it is evidence that its
    reasoning works, but hard questions get no trace and the data leans to easy ones. Revealed, nearly
    every question gets one, but it may justify after the fact what it was told, and images count for
    less. Traces that mention the hint are then filtered too."""
    max_pixels: int = Field(1_003_520, ge=784)
    """Larger images are scaled down before they are sent."""
    image_format: Literal["png", "jpeg"] = "png"
    attempts: int = Field(4, ge=1)
    """Per question and guideline, until one passes the filters."""
    concurrency: int = Field(16, ge=1)
    """Requests under way at once, all endpoints together."""
    timeout: float = Field(300.0, gt=0)
    """Seconds for one request, from sending to the last byte."""
    max_retries: int = Field(6, ge=0)
    """Of one request, after 429, 5xx, timeouts, lost connections and replies that make no sense."""
    backoff: float = Field(1.0, ge=0)
    """Seconds before the first retry, doubled each time, less up to half by chance."""
    max_backoff: float = Field(60.0, ge=0)
    max_retry_after: float = Field(900.0, ge=0)
    """A server that asks for a longer pause by Retry-After stops the build."""
    on_error: Literal["stop", "drop"] = "stop"
    """What a question that the teacher refuses (400, 413, 422), or gives no answer to after all retries,
    does: stop the build, or be dropped with the teacher's words. Wrong keys and addresses always stop it."""
    max_failures: int = Field(20, ge=1)
    """With ``on_error = drop``: so many failures in a row stop the build all the same."""
    price_input: float = Field(0.0, ge=0)
    """Of a million prompt tokens."""
    price_output: float = Field(0.0, ge=0)
    """Of a million answer tokens."""
    currency: str = "USD"
    budget: float | None = Field(None, gt=0)
    """The build stops before a request that could exceed it; what was answered is kept."""
    expected_output_tokens: int = Field(350, ge=1)
    """Of one answer, for the estimate until there are answers to measure."""
    vllm: VllmConfig = VllmConfig()

    @field_validator("base_urls")
    @classmethod
    def _urls(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for url in value:
            parts = urlsplit(url)
            if parts.username or parts.password:
                raise ValueError("an address must not hold a key or password; use api_key_env")
            if parts.scheme not in ("http", "https") or not parts.netloc or parts.query:
                raise ValueError(f"{url!r} is no address; give https://host/v1")
        if len(set(value)) != len(value):
            raise ValueError("repeats an address")
        return tuple(url.rstrip("/").removesuffix("/chat/completions") for url in value)

    @model_validator(mode="after")
    def _consistent(self) -> TeacherConfig:
        if self.kind == "openai" and not self.base_urls:
            raise ValueError("base_urls is empty: give the endpoint's address, https://host/v1")
        if self.kind == "vllm" and self.base_urls:
            raise ValueError("base_urls belong to kind = openai, not to vllm")
        if self.kind == "vllm" and self.extra_body:
            raise ValueError("extra_body belongs to kind = openai, not to vllm")
        if self.kind == "vllm" and self.top_p is not None:
            raise ValueError("top_p belongs to kind = openai, not to vllm; leave it null")
        if self.temperature == 0 and self.attempts > 1:
            raise ValueError(
                f"attempts = {self.attempts} at temperature 0 would give the same answer again; "
                "set attempts=1 or a temperature"
            )
        if self.budget is not None and not (self.price_input or self.price_output):
            raise ValueError("budget needs price_input and price_output")
        return self


class FilterConfig(Section):
    """What a trace must hold to be kept; see :mod:`mmedx_fast.builder.trace_filters`."""

    min_adherence: float = Field(0.75, ge=0, le=1)
    """Share of the guideline's criteria; 0 keeps traces that fail its gates too."""
    stated_findings: bool = True
    """What a trace says that an image shows counts as a finding, beside the question text's and the row's."""
    min_words: int = Field(15, ge=1)
    max_words: int = Field(600, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> FilterConfig:
        if self.min_words > self.max_words:
            raise ValueError(f"min_words = {self.min_words} exceeds max_words = {self.max_words}")
        return self


class MatchConfig(Section):
    """When two questions count as the same one; see :mod:`mmedx_fast.builder.matching`."""

    enabled: bool = True
    rules: tuple[Rule, ...] = ("image_and_text", "text_only")
    """Any of them suffices. ``image_and_text``: an image is near-identical and the text similar.
    ``long_text``: long question texts are near-identical. ``text_only``: neither has images and the
    texts are near-identical. ``text`` and ``image``: the one alone decides."""
    image_distance: float = Field(0.18, ge=0, lt=0.5)
    """Largest share of differing bits of the 1,024-bit perceptual hashes. Copies (half the size, JPEG at
    quality 60, other colours) of small drawn films differ in up to 0.1, the two most alike of 200 in 0.195."""
    similar_text: float = Field(0.8, gt=0, le=1)
    """Smallest Jaccard similarity of word triples beside a matching image."""
    identical_text: float = Field(0.85, gt=0, le=1)
    """The same for ``text_only`` and ``text``."""
    long_words: int = Field(30, ge=13)
    """Question texts from this many words on are long."""
    long_text: float = Field(0.8, gt=0, le=1)
    """Smallest similarity for ``long_text``: Jaccard of word triples, or share of the shorter text's
    13-word runs found in the other."""
    num_perm: int = Field(128, ge=16)
    """Permutations of the MinHash that proposes similar texts."""

    @field_validator("rules")
    @classmethod
    def _rules(cls, value: tuple[Rule, ...]) -> tuple[Rule, ...]:
        if not value:
            raise ValueError("is empty: set enabled=false to match nothing")
        return value


class DuplicateConfig(MatchConfig):
    pass


class DecontaminationConfig(MatchConfig):
    rules: tuple[Rule, ...] = ("image_and_text", "long_text", "text_only")
    similar_text: float = Field(0.5, gt=0, le=1)
    evaluation: tuple[EvaluationConfig, ...] = ()
    """Every data set that models trained on this data will be tested on."""
    run_configs: tuple[str, ...] = ()
    """Training configs whose ``data.test`` and ``eval.sets`` are evaluation sets too."""
    none_to_check: bool = False
    """Say so explicitly when there is no evaluation set to check against."""

    @model_validator(mode="after")
    def _something(self) -> DecontaminationConfig:
        if self.enabled and not self.evaluation and not self.run_configs and not self.none_to_check:
            raise ValueError(
                "evaluation and run_configs are empty: name the sets that models will be tested on, "
                "or set none_to_check=true to build data that was checked against nothing"
            )
        names = [item.name for item in self.evaluation]
        if len(set(names)) != len(names):
            raise ValueError(f"evaluation repeats a name: {names}")
        return self


class BalanceConfig(Section):
    """How many to make. Questions are taken in an order drawn by ``seed`` until the numbers are met."""

    questions: dict[str, int] = {}
    """Kept questions by specialty; one without a number is not bounded."""
    traces: dict[str, int] = {}
    """Kept traces by guideline; one without a number is not bounded."""

    @field_validator("questions")
    @classmethod
    def _specialties(cls, value: dict[str, int]) -> dict[str, int]:
        return _targets(value, SPECIALTIES)

    @field_validator("traces")
    @classmethod
    def _guidelines(cls, value: dict[str, int]) -> dict[str, int]:
        return _targets(value, GUIDELINE_NAMES)


def _targets(value: dict[str, int], known: tuple[str, ...]) -> dict[str, int]:
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise ValueError(f"unknown {unknown}; choose from {list(known)}")
    if any(count < 0 for count in value.values()):
        raise ValueError("numbers must not be negative")
    return value


class BuildConfig(Section):
    output: str
    """Folder of the data set, its datasheet and the journal of the teacher's answers."""
    split: str = Field("train", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the file: ``<output>/<split>.jsonl``."""
    seed: int = 0
    """Draws the order in which questions are taken."""
    sources: tuple[SourceConfig, ...]
    guidelines: tuple[str, ...] = GUIDELINE_NAMES
    min_guidelines: int = Field(1, ge=1)
    """A question is kept when it has passing traces under so many guidelines."""
    teacher: TeacherConfig
    filters: FilterConfig = FilterConfig()
    duplicates: DuplicateConfig = DuplicateConfig()
    decontamination: DecontaminationConfig
    balance: BalanceConfig = BalanceConfig()
    workers: int = Field(4, ge=1)
    """Threads that read and hash images."""

    @model_validator(mode="after")
    def _consistent(self) -> BuildConfig:
        names = [source.name for source in self.sources]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"sources must have different names, got {names}")
        unknown = [name for name in self.guidelines if name not in GUIDELINE_NAMES]
        if unknown or not self.guidelines or len(set(self.guidelines)) != len(self.guidelines):
            raise ValueError(
                f"guidelines must be different ones of {list(GUIDELINE_NAMES)}, got "
                f"{list(self.guidelines)}"
            )
        if self.min_guidelines > len(self.guidelines):
            raise ValueError(
                f"min_guidelines = {self.min_guidelines} exceeds the {len(self.guidelines)} guidelines"
            )
        return self

    @property
    def folder(self) -> Path:
        return Path(self.output)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_build_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> BuildConfig:
    """Read ``path`` (YAML), apply ``a.b=value`` overrides, validate. Raises :class:`ConfigError`."""
    raw = _read_yaml(Path(path))
    for item in overrides:
        _apply_override(raw, item)
    try:
        return BuildConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(_explain(error, str(path))) from None


def _explain(error: ValidationError, source: str) -> str:
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"]) or "(top level)"
        if item["type"] == "extra_forbidden":
            lines.append(f"  {key}: unknown key; {_suggest(item['loc'])}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            # A section's whole content is no help, and an address may hold what must not be shown.
            shown = "" if isinstance(item.get("input"), dict | tuple | list) else _got(item)
            lines.append(f"  {key}: {message}{shown}")
    return f"{source}: the configuration cannot be used\n" + "\n".join(lines)


def _got(item: Any) -> str:
    text = repr(item.get("input"))
    return f" (got {text if len(text) <= 80 else text[:77] + '...'})"


def _suggest(loc: tuple[int | str, ...]) -> str:
    model: Any = BuildConfig
    for part in loc[:-1]:
        if isinstance(part, int):
            continue
        kind = model.model_fields[part].annotation
        kinds = [kind, *get_args(kind)]
        model = next(k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel))
    known = list(model.model_fields)
    close = difflib.get_close_matches(str(loc[-1]), known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
