"""A hand-written GRPO loop on two ops: advantages relative to the guideline, loss at the head.

    python examples/grpo_loop.py

A toy policy learns to answer with even numbers; replace body and reward with yours.
"""

import torch

from mmedx_fast.ops import (
    PolicyLossSpec,
    guideline_advantages,
    linear_policy_loss,
    reduce_metrics,
    token_weights,
)

QUESTIONS, GUIDELINES, ROLLOUTS, LENGTH, V, H = 4, 4, 4, 8, 64, 32
torch.manual_seed(0)
body = torch.nn.Sequential(torch.nn.Embedding(V, H), torch.nn.Linear(H, H), torch.nn.Tanh())
head = torch.nn.Linear(H, V, bias=False).requires_grad_(False)  # frozen: two GEMM passes
torch.nn.init.normal_(head.weight, std=0.5)
optimizer = torch.optim.AdamW(body.parameters(), lr=1e-2)
spec = PolicyLossSpec(loss_type="dapo", epsilon_high=0.28)

batch = QUESTIONS * GUIDELINES * ROLLOUTS
question = torch.arange(batch) // (GUIDELINES * ROLLOUTS)
guideline = torch.arange(batch) // ROLLOUTS % GUIDELINES
sequence = torch.arange(batch).repeat_interleave(LENGTH)  # which rollout each token belongs to


@torch.no_grad()
def sample() -> torch.Tensor:
    """[batch, LENGTH + 1] tokens; the first is the prompt."""
    tokens = [question * GUIDELINES + guideline]
    for _ in range(LENGTH):
        probabilities = torch.softmax(head(body(tokens[-1])), -1)
        tokens.append(torch.multinomial(probabilities, 1).squeeze(1))
    return torch.stack(tokens, 1)


for step in range(60):
    tokens = sample()
    reward = (tokens[:, 1:] % 2 == 0).float().mean(1, keepdim=True)  # [batch, rewards]
    advantages, stats = guideline_advantages(reward, question, guideline)
    hidden = body(tokens[:, :-1]).flatten(0, 1)  # the states that predict tokens[:, 1:]
    loss, metrics = linear_policy_loss(
        hidden, head.weight, tokens[:, 1:].flatten(), advantages[sequence],
        token_weight=token_weights(sequence, "dapo"), spec=spec,
    )  # fmt: skip
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 19:
        logged = reduce_metrics([metrics])
        print(
            f"step {step + 1}: reward {float(reward.mean()):.2f}, entropy {float(logged['entropy']):.2f}"
        )
assert float(reward.mean()) > 0.8, "the policy did not learn"
