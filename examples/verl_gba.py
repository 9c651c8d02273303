"""Guideline-relative advantages and the fused head inside verl, called as verl calls them.

    python examples/verl_gba.py

In a training run the first three lines stand in a module that verl imports (VERL_USE_EXTERNAL_MODULES),
with algorithm.adv_estimator=gba, actor.policy_loss.loss_mode=mmedx, model.use_fused_kernels=true.
"""

from mmedx_fast import prepare_environment
from mmedx_fast.integrations import verl as mmedx

prepare_environment(offline=True)  # before transformers, where torchvision's build is not torch's
mmedx.register()

import torch  # noqa: E402
from verl.trainer.ppo import core_algos  # noqa: E402
from verl.workers.config import ActorConfig  # noqa: E402

torch.manual_seed(0)
GUIDELINES = ("differential", "intuitive", "analytic", "bayesian")
# Two questions under four guidelines: a uid for each such prompt, and rollout.n = 2 responses to it.
questions = [q for q in range(2) for _ in GUIDELINES]
index = mmedx.guideline_uids(questions, GUIDELINES * 2).repeat(2)

responses, length = 16, 6
mask = torch.ones(responses, length)
rewards = torch.zeros(responses, length)
rewards[:, -1] = torch.rand(responses)  # the score stands on the last token, as in verl
estimate = core_algos.get_adv_estimator_fn("gba")
advantages, _ = estimate(token_level_rewards=rewards, response_mask=mask, index=index)
print("advantages of the first question:", [round(a, 2) for a in advantages[:4, 0].tolist()])

hidden = torch.randn(responses * length, 32, requires_grad=True)
head = torch.randn(500, 32) / 6
tokens = torch.randint(500, (responses * length,))
logprob, _ = mmedx.linear_cross_entropy(hidden, head, tokens, 1.0)
logprob = logprob.view(responses, length)
config = ActorConfig(strategy="fsdp", rollout_n=2, ppo_micro_batch_size_per_gpu=16)
ours, theirs = (core_algos.get_policy_loss_fn(name) for name in ("mmedx", "vanilla"))
arguments = (logprob.detach() + 0.1 * torch.randn_like(logprob), logprob, advantages, mask)
loss, metrics = ours(*arguments, config=config)
want, _ = theirs(*arguments, config=config)
loss.backward()
torch.testing.assert_close(loss.detach(), want.detach())
print(f"policy loss {loss.item():.4f}, as verl's own; clipped {metrics['actor/pg_clipfrac']:.1%}")
