"""PPO (arXiv 1707.06347) with a value head, against a rollout service: one sample per prompt, GAE (arXiv 1506.02438).

    blockroll up configs/cluster/local.yaml --detach
    python examples/ppo.py tcp://127.0.0.1:PORT

Rollouts and weights pass through `RolloutClient` alone. The value head lies beside the policy and stays with the trainer. The
service must serve a policy of the shape of `tiny-reasoner-terse`, such as `tiny-reasoner`.

Legend: N generated tokens of a pack of samples, T rows of the pack, D hidden size.
"""

import argparse
from dataclasses import dataclass

import torch

import blockroll
from blockroll.model.layout import causal
from blockroll.model.tasks import make_tasks, score
from blockroll.model.tokenizer import encode_prompt

FAMILIES = ["chain_sum", "products"]  # where an answer without steps is nearly always wrong
TEMPERATURE, CLIP, GAMMA, LAMBDA = 1.0, 0.2, 1.0, 0.95
PACK = 16


@dataclass
class Sample:
    """A trajectory, its reward, and per token: the recorded log p, the value before it, the advantage and the return."""

    trajectory: blockroll.Trajectory
    reward: float
    old_N: torch.Tensor
    value_N: torch.Tensor
    advantage_N: torch.Tensor
    return_N: torch.Tensor


class ActorCritic(torch.nn.Module):
    """The policy, and a value head on its hidden states. The head's loss does not move the policy."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy
        self.value = torch.nn.Linear(policy.config.hidden_size, 1)
        torch.nn.init.zeros_(self.value.weight)
        torch.nn.init.zeros_(self.value.bias)

    def forward(self, trajectories):
        """log p and value of each generated token of some samples, [N] and [N], and their entropies [N]."""
        texts = [[*t.prompt_tokens, *t.tokens] for t in trajectories]
        rows, targets, end = [], [], 0
        for t, text in zip(trajectories, texts, strict=True):
            rows += range(end + len(t.prompt_tokens) - 1, end + len(text) - 1)  # the rows that predict the tokens
            targets += t.tokens
            end += len(text)
        hidden_ND = self.policy(causal(texts))[torch.tensor(rows)]
        logp_NV = (self.policy.head(hidden_ND).float() / TEMPERATURE).log_softmax(-1)
        logp_N = logp_NV.gather(1, torch.tensor(targets)[:, None])[:, 0]
        return logp_N, self.value(hidden_ND.detach())[:, 0], -(logp_NV.exp() * logp_NV).sum(-1)


def advantages(value_N, reward):
    """GAE of one sample whose reward comes after its last token: advantage_N, return_N."""
    advantage_N, following = torch.zeros_like(value_N), 0.0
    for n in reversed(range(len(value_N))):
        last = n == len(value_N) - 1
        delta = (reward if last else GAMMA * value_N[n + 1]) - value_N[n]
        following = delta + (0.0 if last else GAMMA * LAMBDA * following)
        advantage_N[n] = following
    return advantage_N, advantage_N + value_N


@torch.no_grad()
def observed(model, trajectories, rewards):
    """Samples with the values of the model before the update."""
    samples = []
    for start in range(0, len(trajectories), PACK):
        some = trajectories[start : start + PACK]
        _, value_N, _ = model(some)
        for t, reward, value in zip(some, rewards[start:], value_N.split([len(t.tokens) for t in some]), strict=False):
            samples.append(Sample(t, reward, torch.from_numpy(t.logprobs), value, *advantages(value, reward)))
    every_N = torch.cat([s.advantage_N for s in samples])
    for s in samples:
        s.advantage_N = (s.advantage_N - every_N.mean()) / (every_N.std() + 1e-6)
    return samples


def update(model, optimizer, samples, random, epochs=2, parts=2):
    """Clipped steps over the samples, `parts` of them in each epoch; returns the share of tokens that were clipped."""
    clipped = tokens = 0
    for _ in range(epochs):
        order = torch.randperm(len(samples), generator=random).tolist()
        for part in (order[i::parts] for i in range(parts)):
            total = sum(len(samples[i].old_N) for i in part)
            for pack in (part[i : i + PACK] for i in range(0, len(part), PACK)):
                some = [samples[i] for i in pack]
                new_N, value_N, entropy_N = model([s.trajectory for s in some])
                advantage_N, return_N = torch.cat([s.advantage_N for s in some]), torch.cat([s.return_N for s in some])
                ratio_N = (new_N - torch.cat([s.old_N for s in some])).exp()
                bounded_N = ratio_N.clamp(1 - CLIP, 1 + CLIP)
                gain_N = torch.minimum(ratio_N * advantage_N, bounded_N * advantage_N)
                loss = (-gain_N + 0.5 * (value_N - return_N) ** 2 - 0.003 * entropy_N).sum() / total
                loss.backward()
                clipped += int((bounded_N != ratio_N).sum())
                tokens += len(new_N)
            torch.nn.utils.clip_grad_norm_(model.policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return clipped / tokens


def main(address, steps=24, prompts=96, learning_rate=5e-5, seed=0, name=None, shuffle=False):
    """Trains with PPO; returns the mean reward of each step.

    Args:
        name: client id, which the ids of all requests begin with; a random one by default.
        shuffle: give rewards to other samples: a control, with which nothing can be learned.
    """
    torch.set_num_threads(1)
    random = torch.Generator().manual_seed(seed)
    model = ActorCritic(blockroll.load_policy("tiny-reasoner-terse").train().requires_grad_(True))
    policy, tokenizer = model.policy, model.policy.tokenizer
    optimizer = torch.optim.AdamW([{"params": policy.parameters()}, {"params": model.value.parameters(), "lr": 1e-2}],
                                  lr=learning_rate, weight_decay=0.0)  # fmt: skip
    params = blockroll.SamplingParams(sampler="coupled", temperature=TEMPERATURE, max_tokens=160)
    history = []
    with blockroll.connect(address, client_id=name) as client:
        first = client.push_weights(client.version + 1, policy.state_dict())
        for step in range(steps):
            tasks = make_tasks("rl", prompts, seed=1000 * seed + step, only=FAMILIES)
            texts = [tuple(encode_prompt(tokenizer, task.prompt)) for task in tasks]
            requests = [blockroll.RolloutRequest(f"{client.client_id}/{step:04}/{i:04}", prompt, params,
                                                 seed=1_000_000 * seed + 1000 * step + i) for i, prompt in enumerate(texts)]
            trajectories = client.generate(requests)
            rewards = [score(task, t.text(tokenizer)) if t.finish_reason == "stop" else 0.0
                       for task, t in zip(tasks, trajectories, strict=True)]  # fmt: skip
            history.append(sum(rewards) / len(rewards))
            if shuffle:
                rewards = [rewards[i] for i in torch.randperm(len(rewards), generator=random).tolist()]
            samples = observed(model, trajectories, rewards)
            clipped = update(model, optimizer, samples, random)
            client.push_weights(first + step + 1, policy.state_dict())
            value = torch.cat([s.value_N for s in samples]).mean().item()
            print(f"step {step + 1}: reward {history[-1]:.3f}, value {value:.3f}, clipped {clipped:.3f}", flush=True)
        print(f"weight version {client.version} serves; samples missing: {client.delivery['missing']}")
    return history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address", help="of the gateway, as `blockroll status` prints it")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shuffle", action="store_true", help="control: rewards of other samples")
    options = parser.parse_args()
    main(options.address, steps=options.steps, seed=options.seed, shuffle=options.shuffle)
