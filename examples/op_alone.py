"""One op, nothing else: log-probs and entropies from hidden states, beside what they replace.

    python examples/op_alone.py

Needs torch alone (and triton on CUDA).
"""

import torch

from mmedx_fast.ops import linear_logprob

N, H, V = 256, 64, 20_000
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
hidden = torch.randn(N, H, device=device, requires_grad=True)
weight = torch.randn(V, H, device=device) / H**0.5  # a frozen head, [vocabulary, width]
targets = torch.randint(V, (N,), device=device)
upstream = torch.randn(N, device=device)  # whatever your loss sends back


def eager(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The [N, V] matrix, whole, and a few copies of it."""
    logp = torch.log_softmax(hidden @ weight.T / 0.7, dim=-1)
    chosen = logp.gather(1, targets[:, None]).squeeze(1)
    return chosen, -(logp.exp() * logp).sum(-1)


logp, entropy = linear_logprob(hidden, weight, targets, temperature=0.7)
(gradient,) = torch.autograd.grad((logp * upstream).sum(), hidden)

want_logp, want_entropy = eager(hidden)
(want_gradient,) = torch.autograd.grad((want_logp * upstream).sum(), hidden)

for name, got, want in (
    ("log-prob", logp, want_logp),
    ("entropy", entropy, want_entropy),
    ("gradient", gradient, want_gradient),
):
    assert got is not None
    worst = (got - want).abs().max().item()
    print(f"{name:9} differs by at most {worst:.1e}")
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)
print(f"the whole matrix would be {N * V * 4 / 2**20:.0f} MiB of float32, and eager holds several")
