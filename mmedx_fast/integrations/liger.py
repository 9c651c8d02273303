"""Liger-Kernel's fused linear GRPO loss (its 0.8.5 signature) over our ops.

Code that takes ``liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss`` takes :class:`FusedLinearGRPOLoss`; Liger
need not be installed. What differs: padding never reaches the head; with a frozen head there are two GEMM passes
where Liger has three; with 16-bit weights the gradient of the logits is rounded to their dtype before its GEMM.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmedx_fast.integrations import _liger_losses as extra
from mmedx_fast.ops import PolicyLossSpec, linear_logprob, linear_policy_loss

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", *extra.LOSS_TYPES)
TOKEN_LEVEL = ("cispo", "sapo", "vespo")
# An importance weight of 0 becomes this: the term is gone from float32, its sign is not.
SIGN = 1e-30


class FusedLinearGRPOLoss(nn.Module):
    """The loss of a policy straight from the hidden states of its completions.

    Args:
        beta: weight of the k3 KL to the reference; 0 reports none.
        compiled, chunk_size: Liger's; accepted without effect (our tiles follow a memory budget, and
            results depend on neither).
        use_ref_model: False: the reference is the policy itself, whatever is given.
        epsilon_low, epsilon_high: clip of the ratio; for cispo epsilon_high is the largest weight itself.
        loss_type: grpo, bnpo, dr_grpo, dapo, cispo, sapo, luspo or vespo.
        max_completion_length: required by dr_grpo.
        importance_sampling_level: token, or sequence (GSPO); cispo, sapo and vespo know token alone.
        sapo_temperature_pos, sapo_temperature_neg: of SAPO's gate.
        temperature: divides the logits.
        delta: largest ratio of negative advantages (INTELLECT-2); above 1.
        use_bias_correction_kl: multiply the KL by the ratio.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: VESPO's gamma weights.

    Raises:
        ValueError: a value no loss can have. ``epsilon_low`` of 1 or more and ``delta`` of 1 or less, which
            Liger takes, are refused where the loss reads them.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        super().__init__()
        self.beta = beta
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.chunk_size = chunk_size
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high
        self.loss_type = loss_type
        self.max_completion_length = max_completion_length
        self.importance_sampling_level = importance_sampling_level
        self.sapo_temperature_pos = sapo_temperature_pos
        self.sapo_temperature_neg = sapo_temperature_neg
        self.temperature = temperature
        self.delta = delta
        self.use_bias_correction_kl = use_bias_correction_kl
        self.vespo_k_pos = vespo_k_pos
        self.vespo_lambda_pos = vespo_lambda_pos
        self.vespo_k_neg = vespo_k_neg
        self.vespo_lambda_neg = vespo_lambda_neg
        self._spec()

    def forward(
        self,
        _input: Tensor,  # [B, T, H]
        lin_weight: Tensor,  # [V, H]
        selected_token_ids: Tensor,  # [B, T]
        attention_mask: Tensor,  # [B, T]
        advantages: Tensor,  # [B]
        bias: Tensor | None = None,  # [V]
        ref_per_token_logps: Tensor | None = None,  # [B, T]
        old_per_token_logps: Tensor | None = None,  # [B, T]
        ref_input: Tensor | None = None,  # [B, T, H]
        ref_weight: Tensor | None = None,  # [V, H]
        ref_bias: Tensor | None = None,  # [V]
        vllm_is_ratio: Tensor | None = None,  # [B, T], [B, 1] or [B]
        num_items_in_batch: Tensor | float | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss and metrics of B completions of up to T tokens.

        Args:
            _input: [B, T, H] float, the states that predict ``selected_token_ids``.
            lin_weight, bias: the head; each gets a gradient only if it requires one.
            selected_token_ids: [B, T] token ids.
            attention_mask: [B, T], 1 for the tokens that count, else 0.
            advantages: [B].
            ref_per_token_logps: [B, T] log-probs of the reference; or ``ref_input`` with ``ref_weight`` and
                ``ref_bias``, from which they are computed.
            old_per_token_logps: [B, T]; None = the policy itself (ratio 1, with its gradient).
            vllm_is_ratio: importance weights of at least 0, multiplied onto the policy's term.
            num_items_in_batch: tokens of the whole batch over all ranks; divides dapo, cispo and vespo. None =
                those of this call, averaged over the ranks.

        Returns:
            loss: scalar float32, differentiable once.
            metrics: (KL, clipped fraction) per token that counts, without the KL if beta is 0.

        Raises:
            ValueError: operands that do not fit, or a reference that is missing (values are checked on the
                CPU only).
        """
        mask = attention_mask != 0
        self._check(_input, selected_token_ids, attention_mask, advantages, vllm_is_ratio)
        ref = self._reference(
            selected_token_ids, mask, ref_per_token_logps, ref_input, ref_weight, ref_bias
        )
        x = _Batch(
            hidden=_input,
            targets=selected_token_ids,
            mask=mask,
            advantage=advantages.detach().float()[:, None],
            old=old_per_token_logps,
            ref=ref,
            importance=_importance(vllm_is_ratio),
        )
        weight = self._token_weights(mask, num_items_in_batch)
        run = self._by_logprob if self.loss_type in extra.LOSS_TYPES else self._fused
        loss, kl, clipped = run(x, lin_weight, bias, weight)
        count = mask.sum().clamp(min=1)
        return loss, (*((kl / count,) if self.beta != 0 else ()), clipped / count)

    def _fused(
        self, x: _Batch, weight: Tensor, bias: Tensor | None, token_weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, and the sums of KL and clipped tokens, by the op that makes the gradient in the forward."""
        rows = x.mask.reshape(-1).nonzero().squeeze(1)

        def pick(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.expand(x.mask.shape).reshape(-1)[rows]

        advantage = x.advantage
        if x.importance is not None:
            # The policy's term is linear in an advantage of one sign, which the clip metric reads.
            advantage = advantage * x.importance.clamp(min=SIGN)
        spec = self._spec()
        assert spec is not None
        if x.ref is None:
            spec = replace(spec, beta=0.0)
        number = torch.arange(len(x.mask), device=rows.device)[:, None]
        loss, raw = linear_policy_loss(
            x.hidden.reshape(-1, x.hidden.shape[-1])[rows],
            weight,
            x.targets.reshape(-1)[rows],
            _given(pick(advantage)),
            old_logprob=pick(x.old),
            ref_logprob=pick(x.ref),
            token_weight=_given(pick(token_weight)),
            spec=spec,
            sequence_id=pick(number) if spec.by_sequence else None,
            bias=bias,
        )
        zero = torch.zeros_like(loss.detach())
        clip = "sum:cispo_clip" if self.loss_type == "cispo" else "sum:clip_region"
        return loss, raw.get("sum:kl", zero), raw.get(clip, zero)

    def _by_logprob(
        self, x: _Batch, weight: Tensor, bias: Tensor | None, token_weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same for the losses that only Liger's signature has."""
        used = self._used(x.mask)
        logp = self._logprobs(x.hidden, weight, x.targets, used, bias)
        found = extra.token_losses(
            extra.Completions(
                logp=logp,
                old=logp.detach()
                if x.old is None
                else torch.where(used, x.old.detach().to(logp), 0.0),
                ref=None if x.ref is None else torch.where(used, x.ref.detach().to(logp), 0.0),
                advantage=x.advantage,
                mask=x.mask.to(logp),
                importance=x.importance,
            ),
            self,
        )
        if self.loss_type == "luspo":
            longest = found.value.shape[1]
            length = x.mask.sum(1, keepdim=True)
            loss = (found.value * length).sum() / (max(len(x.mask), 1) * max(longest, 1))
        else:
            loss = (found.value * token_weight).sum()
        kl = torch.zeros_like(logp) if found.kl is None else found.kl
        return loss, (kl * x.mask).sum(), (found.clipped & x.mask).sum()

    def _spec(self) -> PolicyLossSpec | None:
        """Our op's loss, with this module's normaliser in the token weights; None if it has no such loss.

        Raises:
            ValueError: settings no loss can have.
        """
        level = self.importance_sampling_level
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(
                f"loss_type={self.loss_type!r} is not known: use {', '.join(LOSS_TYPES)}"
            )
        if level not in ("token", "sequence"):
            raise ValueError(
                f"importance_sampling_level={level!r} is not known: use token or sequence"
            )
        if level == "sequence" and self.loss_type in TOKEN_LEVEL:
            raise ValueError(
                f"importance_sampling_level='sequence' is not for loss_type={self.loss_type!r}: use 'token'"
            )
        if self.loss_type == "dr_grpo" and self.max_completion_length is None:
            raise ValueError("loss_type='dr_grpo' divides by max_completion_length: give it")
        for name in ("sapo_temperature_pos", "sapo_temperature_neg", "temperature", "delta"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.loss_type in extra.LOSS_TYPES:
            return None
        cispo = self.loss_type == "cispo"
        return PolicyLossSpec(
            loss_type="cispo" if cispo else "gspo" if level == "sequence" else "dapo",
            epsilon=0.0 if cispo else self.epsilon_low,
            epsilon_high=self.epsilon_high,
            delta=None if cispo else self.delta,
            beta=self.beta,
            use_bias_correction_kl=self.use_bias_correction_kl,
            temperature=self.temperature,
        )

    def _token_weights(self, mask: Tensor, num_items: Tensor | float | None) -> Tensor:
        """[B, T] float32, with which a sum over tokens is the mean this loss takes."""
        weight, batch = mask.float(), max(len(mask), 1)
        if self.loss_type in ("grpo", "sapo"):
            return weight / weight.sum(1, keepdim=True).clamp(min=1) / batch
        if self.loss_type == "bnpo":
            return weight / weight.sum().clamp(min=1)
        if self.loss_type == "dr_grpo":
            assert self.max_completion_length is not None
            return weight / (batch * self.max_completion_length)
        return weight / _tokens_a_rank(weight, num_items)

    def _reference(
        self, targets: Tensor, mask: Tensor, given: Tensor | None, hidden: Tensor | None,
        weight: Tensor | None, bias: Tensor | None,
    ) -> Tensor | None:  # fmt: skip
        """[B, T] log-probs of the reference; None where no KL is to be had."""
        if not self.use_ref_model:
            return None  # the policy itself: a KL of 0, with a derivative of 0
        if given is None and (hidden is None or weight is None):
            raise ValueError(
                "use_ref_model=True needs ref_per_token_logps, or ref_input with ref_weight: give one, or "
                "construct the loss with use_ref_model=False"
            )
        if self.beta == 0:
            return None
        if given is not None:
            return given
        assert hidden is not None and weight is not None
        with torch.no_grad():
            return self._logprobs(hidden, weight, targets, self._used(mask), bias)

    def _used(self, mask: Tensor) -> Tensor:
        """The tokens whose log-probs are read: LUSPO's mean, in Liger and TRL, runs over the padding too."""
        return torch.ones_like(mask) if self.loss_type == "luspo" else mask

    def _logprobs(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, used: Tensor, bias: Tensor | None
    ) -> Tensor:
        """[B, T] log-probs of the used tokens, 0 elsewhere."""
        rows = used.reshape(-1).nonzero().squeeze(1)
        logprob, _ = linear_logprob(
            hidden.reshape(-1, hidden.shape[-1])[rows],
            weight,
            targets.reshape(-1)[rows],
            temperature=self.temperature,
            bias=bias,
            return_entropy=False,
        )
        return logprob.new_zeros(used.numel()).index_put((rows,), logprob).view(used.shape)

    def _check(
        self,
        hidden: Tensor,
        targets: Tensor,
        mask: Tensor,
        advantages: Tensor,
        ratio: Tensor | None,
    ) -> None:
        shape = tuple(mask.shape)
        if mask.dim() != 2 or hidden.dim() != 3 or tuple(hidden.shape[:2]) != shape:
            raise ValueError(
                f"_input must be [B, T, H] and attention_mask [B, T], got {tuple(hidden.shape)} and {shape}"
            )
        if tuple(targets.shape) != shape or tuple(advantages.shape) != shape[:1]:
            raise ValueError(
                f"selected_token_ids must be {shape} and advantages {shape[:1]}, "
                f"got {tuple(targets.shape)} and {tuple(advantages.shape)}"
            )
        if ratio is not None and tuple(ratio.shape) not in ((shape[0],), (shape[0], 1), shape):
            raise ValueError(
                f"vllm_is_ratio must be {shape}, ({shape[0]}, 1) or ({shape[0]},), got {tuple(ratio.shape)}"
            )
        if mask.device.type != "cpu":
            return  # looking at values would wait for the device
        if not torch.isin(mask, torch.tensor([0, 1], dtype=mask.dtype)).all():
            raise ValueError("attention_mask must hold 0 and 1 only: put weights into advantages")
        if ratio is not None and bool((ratio < 0).any()):
            raise ValueError(f"vllm_is_ratio must be at least 0, got {ratio.min().item()}")


@dataclass(frozen=True)
class _Batch:
    """What forward was given, B completions of T tokens."""

    hidden: Tensor  # [B, T, H]
    targets: Tensor  # [B, T]
    mask: Tensor  # [B, T] bool
    advantage: Tensor  # [B, 1] float32
    old: Tensor | None  # [B, T]
    ref: Tensor | None  # [B, T]
    importance: Tensor | None  # [B, T] or [B, 1]


def _importance(ratio: Tensor | None) -> Tensor | None:
    if ratio is None:
        return None
    return (ratio[:, None] if ratio.dim() == 1 else ratio).detach().float()


def _given(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


def _tokens_a_rank(weight: Tensor, num_items: Tensor | float | None) -> Tensor:
    """The divisor of a mean over all ranks' tokens, for a trainer that averages gradients over ranks."""
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if num_items is not None:
        total = torch.as_tensor(num_items, dtype=torch.float32, device=weight.device)
        return (total / ranks).clamp(min=1)
    total = weight.sum()
    if ranks > 1:
        dist.all_reduce(total)
    return (total / ranks).clamp(min=1)
