"""One step of a policy gradient in one process: samples, rewards, a loss of differentiable log-probabilities, new weights."""

import torch

import blockroll
from blockroll.model.tasks import make_tasks, score

policy = blockroll.load_policy("tiny-reasoner")  # decodes
trained = blockroll.load_policy("tiny-reasoner").requires_grad_(True)  # learns
engine = blockroll.Engine(policy, max_batch=32)
optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-5)

tasks = make_tasks("rl", 4, only=["chain_sum"])
outputs = engine.generate([task.prompt for task in tasks], blockroll.SamplingParams(n=8, max_tokens=128, seed=3))
samples, advantages = [], []
for task, output in zip(tasks, outputs, strict=True):
    rewards = torch.tensor([score(task, sample.text) for sample in output.samples])
    samples += [sample.trajectory for sample in output.samples]
    advantages += (rewards - rewards.mean()).tolist()

logprobs = trained.logprobs([s.prompt_tokens for s in samples], [s.tokens for s in samples])
difference = max((new - torch.from_numpy(s.logprobs)).abs().max().item() for new, s in zip(logprobs, samples, strict=True))
loss = -sum(a * new.sum() for a, new in zip(advantages, logprobs, strict=True)) / len(samples)
loss.backward()
optimizer.step()
engine.load_weights(trained.state_dict(), version=1)
print(f"loss {loss.item():.3f}; recorded and recomputed log-probabilities differ by at most {difference:.1e}")
print(f"the engine serves version {engine.version}")
