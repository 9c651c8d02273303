"""verl's side of the guideline-relative advantages: where question, guideline and scores come from."""

from __future__ import annotations

import uuid
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmedx_fast.ops import guideline_advantages

SEPARATOR = "::"
NO_COLUMNS = (
    "verl hands the columns of the batch only to the estimator it calls 'gdpo', and only in the legacy "
    "trainer: register(as_gdpo=True), algorithm.adv_estimator=gdpo, trainer.use_v1=false"
)


@dataclass(frozen=True)
class GbaSettings:
    """What ``algorithm.gba`` may hold (``+algorithm.gba.within=0.5`` on verl's command line).

    Names and meanings are those of :func:`mmedx_fast.ops.guideline_advantages`, and below.
    """

    combine: str = "sum_then_normalize"
    scale: str | None = None
    """None = ``guideline``, or ``none`` with ``algorithm.norm_adv_by_std_in_grpo=false``."""
    within: float = 1.0
    between: float = 1.0
    baseline: str = "mean"
    eps: float | None = None
    """None = what verl passes, 1e-6."""
    ddof: int = 1
    guideline_weights: Mapping[str, float] | None = None
    """Multiplies the advantages under a guideline, by its name."""
    whiten: bool = False
    """Afterwards make mean 0 and variance 1 over the response tokens of the batch, as verl's gdpo does."""
    question_key: str | None = None
    """Column that says which question a row belongs to; both keys or neither (then ``uid`` says it)."""
    guideline_key: str | None = None
    """Column with the guideline's name."""

    @classmethod
    def of(cls, config: Any) -> GbaSettings:
        """Those of verl's ``config.algorithm``, which may be a DictConfig, AlgoConfig, mapping or None."""
        given = read(config, "gba", None)
        values = {str(key): given[key] for key in given} if given else {}
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(f"algorithm.gba.{name} is not known: use {', '.join(known)}")
        settings = cls(**values)
        if (settings.question_key is None) != (settings.guideline_key is None):
            raise ValueError(
                "algorithm.gba: give question_key and guideline_key together, got "
                f"question_key={settings.question_key!r}, guideline_key={settings.guideline_key!r}"
            )
        return settings

    def divisor(self, normalise: bool) -> str:
        """``scale`` under ``norm_adv_by_std_in_grpo``."""
        if self.scale is None:
            return "guideline" if normalise else "none"
        if not normalise and self.scale != "none":
            raise ValueError(
                f"algorithm.norm_adv_by_std_in_grpo=false and algorithm.gba.scale={self.scale!r} "
                "contradict each other: leave one of them out"
            )
        return self.scale


def read(config: Any, name: str, default: Any) -> Any:
    """A field of a config that may lack it, or of no config."""
    if config is None:
        return default
    return config.get(name, default) if hasattr(config, "get") else getattr(config, name, default)


def gba_advantage(
    token_level_rewards: Tensor,  # [B, R]
    response_mask: Tensor,  # [B, R]
    index: Any = None,  # [B]
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool | None = None,
    config: Any = None,
    non_tensor_batch: Mapping[str, Any] | None = None,
    batch: Any = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """verl's signature of an advantage estimator; registered as ``gba``.

    Args:
        token_level_rewards: [B, R] float; a response's reward is their sum, unless
            ``algorithm.gdpo_reward_keys`` names the columns with its scores.
        response_mask: [B, R], 0 where there is no response token.
        index: [B] verl's ``uid``, unsorted and uneven: ``"question::guideline"`` or a pair
            (question, guideline) for all rows; anything else is a question with one guideline.
        epsilon, norm_adv_by_std_in_grpo: verl's; None = the config's, which is true unless set.
        config: verl's ``config.algorithm``: ``gba`` (:class:`GbaSettings`), ``gdpo_reward_keys`` and
            ``gdpo_reward_weights``, ``norm_adv_by_std_in_grpo``, ``use_kl_in_reward``.
        non_tensor_batch: columns of the batch; verl passes them to the estimator called ``gdpo`` alone.
        batch: accepted because verl passes it; not read.

    Returns:
        advantages and returns, one [B, R] float32 tensor twice, 0 outside the mask.

    A question's only rollout gets 0, as in verl's rloo_vectorized; its grpo, gdpo and rloo keep the raw
    reward there.

    Raises:
        ValueError: settings, keys or uids that do not fit; the message names them.
    """
    settings = GbaSettings.of(config)
    normalise = norm_adv_by_std_in_grpo
    if normalise is None:
        normalise = bool(read(config, "norm_adv_by_std_in_grpo", True))
    scale = settings.divisor(normalise)
    with torch.no_grad():
        rewards, weights = _rewards(token_level_rewards, config, non_tensor_batch)
        questions, guidelines = _labels(index, settings, non_tensor_batch, len(rewards))
        names = list(dict.fromkeys(guidelines))
        advantage, _stats = guideline_advantages(
            rewards,
            _ids(questions, rewards.device),
            _ids(guidelines, rewards.device),
            reward_weights=weights,
            guideline_weights=_guideline_weights(names, settings, rewards.device),
            combine=settings.combine,
            scale=scale,
            within=settings.within,
            between=settings.between,
            baseline=settings.baseline,
            eps=epsilon if settings.eps is None else settings.eps,
            ddof=settings.ddof,
        )
        advantages = advantage[:, None] * response_mask
        if settings.whiten:
            advantages = _whitened(advantages, response_mask)
    return advantages, advantages


def _rewards(
    token_level_rewards: Tensor, config: Any, columns: Mapping[str, Any] | None
) -> tuple[Tensor, Tensor | None]:
    """Scores [B, M] with their weights [M] or None."""
    keys = read(config, "gdpo_reward_keys", None)
    if not keys:
        return token_level_rewards.float().sum(-1, keepdim=True), None
    if columns is None:
        raise ValueError(
            f"algorithm.gdpo_reward_keys={list(keys)} has no effect here: {NO_COLUMNS}"
        )
    if read(config, "use_kl_in_reward", False):
        raise ValueError(
            "algorithm.use_kl_in_reward=true is in the summed reward, which gdpo_reward_keys replaces: "
            "use actor.use_kl_loss, or leave gdpo_reward_keys out"
        )
    device = token_level_rewards.device
    scores = [_column(columns, key, "algorithm.gdpo_reward_keys") for key in keys]
    # None becomes NaN: this reward does not apply to this response.
    rewards = torch.tensor(np.array(scores, dtype=np.float32).T.copy(), device=device)
    weights = read(config, "gdpo_reward_weights", None)
    if weights is None:
        return rewards, None
    if len(weights) != len(keys):
        raise ValueError(
            f"algorithm.gdpo_reward_weights={list(weights)} must have one entry for each of "
            f"gdpo_reward_keys={list(keys)}"
        )
    return rewards, torch.tensor([float(w) for w in weights], device=device)


def _column(columns: Mapping[str, Any], key: str, setting: str) -> list[Any]:
    """A column of the batch, or a field of its column ``extra_info``."""
    if key in columns:
        return list(columns[key])
    extra = columns.get("extra_info")
    if extra is not None and all(isinstance(row, Mapping) and key in row for row in extra):
        return [row[key] for row in extra]
    raise ValueError(
        f"{setting} names {key!r}, which is neither a column of the batch ({', '.join(columns)}) nor in "
        f"every row's extra_info. If uid is the only column: {NO_COLUMNS}"
    )


def _labels(
    index: Any, settings: GbaSettings, columns: Mapping[str, Any] | None, rows: int
) -> tuple[list[Hashable], list[Hashable]]:
    """The question and the guideline of every row."""
    if settings.question_key is not None and settings.guideline_key is not None:
        if columns is None:
            raise ValueError(
                f"algorithm.gba.question_key={settings.question_key!r} cannot be read: {NO_COLUMNS}; "
                "or let uid carry both (use_guideline_uids)"
            )
        return (
            _column(columns, settings.question_key, "algorithm.gba.question_key"),
            _column(columns, settings.guideline_key, "algorithm.gba.guideline_key"),
        )
    if index is None or len(index) != rows:
        found = "none" if index is None else str(len(index))
        raise ValueError(f"index (verl's uid) must have {rows} entries, one per response: {found}")
    pairs = [_split(x) for x in index]
    odd = [row for row, pair in enumerate(pairs) if (len(pair) == 2) != (len(pairs[0]) == 2)]
    if odd:
        raise ValueError(
            f"uid[{odd[0]}] = {index[odd[0]]!r} and uid[0] = {index[0]!r}: either every uid says its "
            f"guideline ('question{SEPARATOR}guideline' or a pair) or none does"
        )
    return [pair[0] for pair in pairs], [pair[-1] if len(pair) == 2 else "" for pair in pairs]


def _split(uid: Any) -> tuple[Hashable, ...]:
    """(question, guideline), or (question,) for a uid that names no guideline."""
    if isinstance(uid, str):
        return tuple(uid.rsplit(SEPARATOR, 1))
    if isinstance(uid, tuple | list | np.ndarray) and len(uid) == 2:
        return (uid[0], uid[1])
    return (uid,)


def _ids(labels: Sequence[Hashable], device: torch.device) -> Tensor:
    """[B] int64, equal labels with equal numbers, in the order they come."""
    numbers: dict[Hashable, int] = {}
    return torch.tensor([numbers.setdefault(x, len(numbers)) for x in labels], device=device).long()


def _guideline_weights(
    names: Sequence[Hashable], settings: GbaSettings, device: torch.device
) -> Tensor | None:
    weights = settings.guideline_weights
    if weights is None or not names:
        return None
    for name in names:
        if name not in weights:
            raise ValueError(
                f"algorithm.gba.guideline_weights has no weight for {name!r}: it has {', '.join(weights)}"
            )
    return torch.tensor([float(weights[str(name)]) for name in names], device=device)


def _whitened(values: Tensor, mask: Tensor) -> Tensor:
    """Mean 0, unbiased variance 1 over the masked tokens; epsilons are those of verl's masked_whiten."""
    count = mask.sum()
    if count < 2:
        raise ValueError("algorithm.gba.whiten needs at least two response tokens in the batch")
    mean = (values * mask).sum() / (count + 1e-8)
    variance = ((values - mean).square() * mask).sum() / (count + 1e-8) * (count / (count - 1))
    return (values - mean) * torch.rsqrt(variance + 1e-8) * mask


def guideline_uids(questions: Iterable[Hashable], guidelines: Iterable[str]) -> np.ndarray:
    """[B] objects, a uid for every row of a batch of prompts: ``<uuid>::<guideline>``, the rows of a
    question with the same uuid.

    Raises:
        ValueError: a question twice under one guideline (verl's uids are keys, so its rows would be
            lost), or a guideline with ``_`` (verl's V1 trainer cuts its keys there) or ``::``.
    """
    shared: dict[Hashable, str] = {}
    uids: dict[str, None] = {}
    for row, (question, guideline) in enumerate(zip(questions, guidelines, strict=True)):
        if "_" in guideline or SEPARATOR in guideline:
            raise ValueError(
                f"guideline {guideline!r} of row {row}: neither '_' nor '{SEPARATOR}' may be in it"
            )
        uid = f"{shared.setdefault(question, str(uuid.uuid4()))}{SEPARATOR}{guideline}"
        if uid in uids:
            raise ValueError(
                f"row {row}: question {question!r} comes twice under guideline {guideline!r} in a batch; "
                "several answers to one prompt are rollout.n"
            )
        uids[uid] = None
    return np.array(list(uids), dtype=object)
