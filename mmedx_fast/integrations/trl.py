"""Our ops inside TRL's GRPO trainer (trl 1.16).

Two lines for a trainer of one's own::

    from mmedx_fast.integrations.trl import use_fused_head
    use_fused_head(trainer)  # log-probs and entropies without logits; loss, options and metrics stay TRL's

and a trainer for questions that are asked under several guidelines::

    from mmedx_fast.integrations.trl import GuidelineGRPOTrainer
    trainer = GuidelineGRPOTrainer(model, rewards, args, dataset, guidelines=["analytic", "bayesian"])

Importing this module imports neither TRL nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmedx_fast.integrations._trl_guidelines import GuidelineGRPOTrainer

__all__ = ["GuidelineGRPOTrainer", "use_fused_head"]

INSTALL = "pip install 'mmedx-fast[trl]'"


def __getattr__(name: str) -> Any:
    """The trainer derives from TRL's, so TRL is imported when it is asked for."""
    if name != "GuidelineGRPOTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_trl()
    return importlib.import_module("mmedx_fast.integrations._trl_guidelines").GuidelineGRPOTrainer


def require_trl() -> None:
    """Raise ImportError, with the command that helps, unless a TRL is there whose GRPO trainer calls its model
    with ``fused_lm_head=True``."""
    try:
        import trl
    except ModuleNotFoundError as error:
        raise ImportError(f"mmedx_fast.integrations.trl needs TRL: {INSTALL}") from error
    try:
        from trl.trainer.utils import FusedCausalLMOutput  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"mmedx_fast.integrations.trl needs trl 1.16, whose trainers call model(..., fused_lm_head=True); "
            f"trl {trl.__version__} does not: {INSTALL}"
        ) from error


def use_fused_head(trainer: Any, *, keep_bytes: int | None = None) -> Any:
    """Let this trainer's model, and its reference model, score completions by ``ops.linear_logprob``.

    Nothing else changes: generation, rewards, advantages, the loss of every ``loss_type`` with all its options,
    and the metrics are TRL's own code, on log-probs and entropies that agree to float32 rounding. Only the
    forward of the two model objects is replaced. With a frozen head (LoRA) and no entropy bonus the head takes
    two GEMM passes where TRL takes three, and neither makes the [tokens, vocabulary] matrix.

    In 16 bits the log-probs are more exact than TRL's, whose logits are rounded to 16 bits; a head in another
    dtype than the autocast one is cast as a whole, not tile by tile.

    Args:
        trainer: a ``trl.GRPOTrainer`` or a subclass that scores as it does; before ``train()``, or after.
        keep_bytes: as in ``ops.linear_logprob``: raw logits of at most this size are kept for backward.

    Returns:
        The trainer. A second call changes nothing.

    Raises:
        ImportError: no TRL, or one without that call.
        TypeError: not a GRPO trainer.
        ValueError: something here would be wrong or without effect; the message names the option or module and
            what to do.
    """
    require_trl()
    from mmedx_fast.integrations import _trl_check, _trl_head

    _trl_check.check_trainer(trainer)
    policy = _trl_check.language_model(trainer.model)
    if _trl_head.attached(policy) is not None:
        return trainer
    models = [(policy, True)]
    if trainer.ref_model is not None:
        reference = trainer.accelerator.unwrap_model(trainer.ref_model)
        models.append((_trl_check.language_model(reference), False))
    specs = [_trl_check.head_spec(trainer, model, main, keep_bytes) for model, main in models]
    for (model, _), spec in zip(models, specs, strict=True):
        _trl_head.attach(model, spec)
    return trainer
