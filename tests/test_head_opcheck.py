"""The head ops keep torch's rules for operators: schema, fake tensors, autograd, tracing."""

import pytest
import torch
from torch import Tensor

from mmedx_fast.kernels import policy_loss as pl
from mmedx_fast.kernels.linear_logprob import SAVED

pytestmark = pytest.mark.usefixtures("implementation")
N, H, V = 3, 4, 11
LAYOUTS = ("contiguous", "transposed", "strided")


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        x = x.t().contiguous().t() if x.dim() == 2 else x
    elif layout == "strided":
        x = torch.stack([x, x], -1)[..., 0]
    return x.detach().requires_grad_()


def operands(layout: str) -> list[Tensor]:
    return [laid_out(torch.randn(shape), layout) for shape in ((N, H), (V, H), (V,))]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("saved", SAVED)
def test_linear_logprob(layout: str, saved: str) -> None:
    hidden, weight, bias = operands(layout)
    if saved == "gradient":  # a frozen head's
        weight, bias = weight.detach(), bias.detach()
    targets, banned = torch.tensor([1, 5, 10]), torch.tensor([0, 3])
    arguments = (
        hidden, weight, bias, targets, banned, 0.8, 3.0, None, 2, saved != "gradient", saved, None, 0,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.mmedx_fast.linear_logprob.default, arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_linear_policy_loss(layout: str) -> None:
    targets, weights = torch.tensor([1, 5, 10]), torch.rand(3)
    spec = pl.PolicyLossSpec(entropy_coef=0.1, beta=0.2)
    arguments = (
        *operands(layout), targets, torch.randn(3), None, torch.randn(3), None, weights,
        None, None, None, None, 2, None, 0, [True, True, True],
        *(getattr(spec, name) for name in pl._SPEC),
    )  # fmt: skip
    torch.library.opcheck(torch.ops.mmedx_fast.linear_policy_loss.default, arguments)
