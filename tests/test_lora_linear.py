"""The fused LoRA layer against PEFT's own."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mmedx_fast import lora_linear
from mmedx_fast.lora_linear import set_fused


class Two(torch.nn.Module):
    """Two layers that read the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(12, 20)
        self.second = torch.nn.Linear(12, 20, bias=False)

    def forward(self, x):
        return self.first(x) * self.second(x)


def made(dtype=torch.float32, **options):
    """Two layers with an adapter (float32 at least) whose B is not zero."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["first", "second"], **options)
    model = get_peft_model(Two().to(dtype), config)
    for name, param in model.named_parameters():
        if ".lora_" in name:
            param.data = torch.randn_like(param, dtype=torch.promote_types(dtype, torch.float32))
    return model.train()


def update(model, x, upstream):
    """Output, and the gradients of input and adapters."""
    x = x.clone().requires_grad_()
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    out = model(x)
    grads = torch.autograd.grad(out, [x, *params.values()], upstream)
    return {"out": out.detach(), **dict(zip(["x", *params], grads, strict=True))}


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)]
)
def test_equal_to_peft_with_gradients(dtype, bound):
    model = made(dtype)
    x, upstream = torch.randn(2, 7, 12).to(dtype), torch.randn(2, 7, 20).to(dtype)
    theirs = update(model, x, upstream)
    assert set_fused(model, True) == 2
    ours = update(model, x, upstream)
    for name, value in theirs.items():
        got = ours[name]
        assert got.dtype == value.dtype and got.shape == value.shape, name
        error = (got.double() - value.double()).norm() / value.double().norm()
        assert error < bound, (name, float(error))


def test_gradients_are_the_derivatives():
    torch.manual_seed(0)
    made = {"x": (3, 5), "weight": (4, 5), "bias": (4,), "a": (2, 5), "b": (4, 2)}
    leaves = [torch.randn(shape, dtype=torch.float64) for shape in made.values()]
    for index in (0, 3, 4):
        leaves[index].requires_grad_()
    assert torch.autograd.gradcheck(lambda *args: lora_linear.lora_linear(*args, 1.7), leaves)


def test_the_input_needs_no_gradient():
    model, x = made(), torch.randn(3, 12)
    set_fused(model, True)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def kept(model, x):
    """Bytes kept for backward besides the weights and what both forwards' product keeps."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)
    assert out.grad_fn is not None
    return sum(storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bfloat16_input_is_kept_once_and_as_it_came(dtype):
    model, x = made(dtype), torch.randn(9, 12).to(dtype)
    stock = kept(model, x)
    set_fused(model, True)
    ours = kept(model, x)
    # PEFT keeps a float32 copy for each of the two layers; of a float32 input none.
    copies = 0 if dtype == torch.float32 else 2 * 4 * x.numel() - x.nbytes
    assert stock - ours == copies


@pytest.mark.parametrize("case", ["dropout", "dora", "bias", "merged", "two", "none", "thawed"])
def test_peft_s_own_forward_where_it_does_more(case, monkeypatch):
    options = {
        "dropout": {"lora_dropout": 0.5},
        "dora": {"use_dora": True},
        "bias": {"lora_bias": True},
    }
    model = made(**options.get(case, {}))
    layers = [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]
    if case == "merged":
        model.merge_adapter()
    if case == "two":
        model.add_adapter("other", LoraConfig(r=2, target_modules=["first", "second"]))
        for layer in layers:
            layer._active_adapter = ["default", "other"]
    if case == "none":
        for layer in layers:
            layer._disable_adapters = True
    if case == "thawed":
        for layer in layers:
            layer.base_layer.requires_grad_(True)
    set_fused(model, True)
    monkeypatch.setattr(lora_linear, "lora_linear", None)
    x = torch.randn(5, 12)
    torch.manual_seed(1)
    ours = model(x)
    set_fused(model, False)
    torch.manual_seed(1)
    assert torch.equal(ours, model(x))


def test_the_active_adapter_is_the_one_that_counts():
    model = made()
    model.add_adapter("reference", LoraConfig(r=4, target_modules=["first", "second"]))
    x = torch.randn(5, 12)
    set_fused(model, True)
    with torch.no_grad():
        trained = model(x)
        for layer in model.modules():
            if hasattr(layer, "lora_A"):
                layer._active_adapter = ["reference"]
        new = model(x)
        set_fused(model, False)
        torch.testing.assert_close(new, model(x))
    assert not torch.equal(new, trained)


def test_its_own_forward_comes_back():
    model = made()
    set_fused(model, True)
    assert set_fused(model, False) == 2
    assert not any("forward" in m.__dict__ for m in model.modules())
