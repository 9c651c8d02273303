"""The merge when RL trained all weights: the RL model's task vector, one tensor at a time.

On a linear that the experts' LoRAs touch, the RL model's change D = W_rl - W_base takes part as factors of
full rank, D = I @ D or D @ I, which is exact. A tensor that no LoRA touches (norms, biases, embeddings, head,
vision tower) is merged by the same method with the RL model as its only contributor: TIES trims the change to
its ``density`` largest elements, elects their own signs, and adds ``scale`` times them (times the RL model's
weight where the divisor counts); DARE drops and rescales them; linear adds them weighted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmedx_fast.checkpoint import SavedTensors
from mmedx_fast.model_files import canonical, local_folder, tensor_files
from mmedx_fast.stages.context import StageError

if TYPE_CHECKING:
    from mmedx_fast.ops import ConflictReport, LoraFactors, MergeSpec

Named = Callable[[str, Any], None]


def full_rank_factors(delta: Tensor) -> LoraFactors:
    """Factors of any delta [out, in]: the shorter side's identity is the other one."""
    from mmedx_fast.ops import LoraFactors

    out, width = delta.shape
    if out <= width:
        return LoraFactors(delta, torch.eye(out, dtype=delta.dtype, device=delta.device))
    return LoraFactors(torch.eye(width, dtype=delta.dtype, device=delta.device), delta)


def as_matrix(tensor: Tensor) -> Tensor:
    """A view [out, in] of a weight, [1, n] of a bias or norm, [out, the rest] of a convolution."""
    return tensor.reshape(1, -1) if tensor.dim() < 2 else tensor.reshape(tensor.shape[0], -1)


class _Folder:
    """A model folder's tensors, by any spelling of their names."""

    def __init__(self, folder: Path) -> None:
        files = tensor_files(local_folder(folder))
        self.names = {canonical(name): name for name in files}
        self._tensors = SavedTensors(dict.fromkeys(files.values()))
        self.folder = folder

    def sizes(self) -> Iterator[int]:
        """Elements of each tensor."""
        return (self._tensors.shape(name).numel() for name in self._tensors)

    def __getitem__(self, name: str) -> Tensor:
        found = self.names.get(canonical(name))
        if found is None:
            raise StageError(f"{self.folder} has no tensor {name}; run mmedx gba again")
        return self._tensors[found]


class FullTaskVector:
    """What the experts and a fully trained RL model change, tensor by tensor; the RL model comes last.

    In memory: the experts' factors, and the RL model's change of one tensor.
    """

    def __init__(
        self,
        experts: Mapping[str, Sequence[LoraFactors | None]],
        count: int,
        rl: Path,
        base: Path,
        dtype: torch.dtype,
    ) -> None:
        """`experts`: factors by linear, `count` each; `rl`, `base`: model folders; `dtype`: what the
        trainer held the base in."""
        self.experts = dict(experts)
        self.count = count
        self.dtype = dtype
        self._rl, self._base = _Folder(rl), _Folder(base)

    @property
    def nbytes(self) -> int:
        """Of the experts' factors, and of what a merge holds of the largest tensor beside its base."""
        pairs = [f for row in self.experts.values() for f in row if f is not None]
        largest = max(self._rl.sizes())
        return sum(x.numel() * x.element_size() for f in pairs for x in (f.A, f.B)) + 12 * largest

    def _factors(self, name: str, base: Tensor) -> list[LoraFactors | None]:
        """All contributors to a parameter whose value in the base is `base`; null for no change."""
        linear = name.removesuffix(".weight")
        row = list(self.experts.get(linear) or [None] * self.count)
        change = as_matrix(self._rl[name].to(base.device).float() - base.float())
        return [*row, full_rank_factors(change) if bool(change.any()) else None]

    def conflicts(self, spec: MergeSpec, device: torch.device, on_linear: Named) -> dict[str, Any]:
        """``model_conflicts`` over the linears that experts touch, computed on `device`."""
        from mmedx_fast.ops import lora_conflicts

        reports = []
        for linear in self.experts:
            name = f"{linear}.weight"
            base = self._base[name].to(device, self.dtype)
            reports.append(lora_conflicts(self._factors(name, base), spec, layer=linear))
            on_linear(linear, reports[-1])
        return _document(reports)

    def merge_(self, model: nn.Module, spec: MergeSpec) -> dict[str, Any]:
        """``merge_model_`` over all parameters of a copy of the base, in place."""
        from mmedx_fast.ops import lora_merge_

        params = dict(model.named_parameters())
        unknown = sorted({f"{linear}.weight" for linear in self.experts} - params.keys())
        if unknown:
            raise StageError(
                f"the base model has no {unknown[0]}: are the experts of another base?"
            )
        reports = []
        with torch.no_grad():
            for name, param in params.items():
                factors = self._factors(name, param)
                if any(f is not None for f in factors):
                    linear = name.removesuffix(".weight")
                    reports.append(lora_merge_(as_matrix(param.data), factors, spec, layer=linear))
        return _document(reports)


def _document(reports: Sequence[ConflictReport]) -> dict[str, Any]:
    from mmedx_fast.ops import sum_reports

    total = sum_reports(reports)
    return {"linears": {r.name: r.to_dict() for r in reports}, "total": total.to_dict()}
