"""SwiGLU that keeps its inputs alone, against autograd through torch's own operators."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch

from mmedx_fast import swiglu


def tiny_vl():
    path = Path(__file__).with_name("_tiny_vl.py")
    spec = importlib.util.spec_from_file_location("helper_tiny_vl_swiglu", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_equal_to_the_bit_with_gradients(dtype):
    torch.manual_seed(0)
    gate, up, upstream = (3 * torch.randn(5, 7, 33, dtype=dtype) for _ in range(3))
    results = []
    for call in (swiglu.swiglu, lambda g, u: torch.nn.functional.silu(g) * u):
        leaves = [x.clone().requires_grad_() for x in (gate, up)]
        out = call(*leaves)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, upstream)))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == dtype and torch.equal(ours, theirs)


def test_gradients_are_the_derivatives():
    gate, up = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(swiglu.swiglu, (gate, up))


def kept(model, ids):
    """(log-probs' sum, gradients by name, bytes kept for backward besides the weights)."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        total = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[..., 3].sum()
    size = sum(storages.values())
    total.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return total.detach(), grads, size


def test_a_model_keeps_less_and_computes_the_same():
    model = tiny_vl().build().train()
    config = model.config.get_text_config()
    ids = torch.randint(1, 200, (1, 50), generator=torch.Generator().manual_seed(1))
    stock = kept(model, ids)
    count = swiglu.set_recompute(model, True)
    assert count >= config.num_hidden_layers
    ours = kept(model, ids)
    assert torch.equal(ours[0], stock[0]) and ours[1].keys() == stock[1].keys()
    for name, grad in ours[1].items():
        assert torch.equal(grad, stock[1][name]), name
    # silu(gate); the product is still there: down_proj is trained here and keeps its input
    freed = 4 * ids.numel() * config.intermediate_size * config.num_hidden_layers
    assert stock[2] - ours[2] == freed
    again = kept(copy.deepcopy(model), ids)
    assert again[2] == ours[2] and torch.equal(again[0], ours[0])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    recomputed = kept(model, ids)
    for name, grad in recomputed[1].items():
        torch.testing.assert_close(grad, stock[1][name], rtol=1e-6, atol=1e-7)
    model.gradient_checkpointing_disable()
    assert swiglu.set_recompute(model, False) == count
    assert kept(model, ids)[2] == stock[2]
