"""A loop of one's own against a rollout service, in forty lines: prompts out, trajectories in, one weight version per step back.

    blockroll up configs/cluster/local.yaml --detach
    python examples/plain_loop.py tcp://127.0.0.1:PORT
"""

import sys

import torch

import blockroll

POLICY, GROUP, PROMPTS = "tiny-reasoner-terse", 8, 8


def reward(text, right):
    """1 for the right answer after the mark."""
    return float(text.rpartition("A:")[2].strip() == right)


def main(address, steps=4):
    torch.set_num_threads(1)
    policy = blockroll.load_policy(POLICY).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-5, weight_decay=0.0)
    params = blockroll.SamplingParams(sampler="coupled", n=GROUP, max_tokens=96)
    with blockroll.connect(address) as client:
        first = client.push_weights(client.version + 1, policy.state_dict())  # the service serves this policy from here on
        for step in range(steps):
            sums = [(11 + 7 * i + 13 * step, 12 + 5 * i) for i in range(PROMPTS)]
            prompts = [tuple([policy.tokenizer.bos_token_id, *policy.tokenizer.encode(f"Q:{a}*{b}\nS:")]) for a, b in sums]
            requests = [blockroll.RolloutRequest(f"{client.client_id}/{step}/{i:03}", p, params) for i, p in enumerate(prompts)]
            samples = client.generate(requests)  # ordered by id and sample: the group of a prompt lies together
            rewards = torch.tensor([reward(s.text(policy.tokenizer), str(a * b))
                                    for (a, b), i in zip(sums, range(0, len(samples), GROUP), strict=True)
                                    for s in samples[i : i + GROUP]]).view(PROMPTS, GROUP)  # fmt: skip
            advantages = (rewards - rewards.mean(1, keepdim=True)).flatten().tolist()
            logprobs = policy.logprobs([s.prompt_tokens for s in samples], [s.tokens for s in samples])
            loss = -sum(a * new.sum() for a, new in zip(advantages, logprobs, strict=True)) / sum(len(s.tokens) for s in samples)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            client.push_weights(first + step + 1, policy.state_dict())
            print(f"step {step + 1}: reward {rewards.mean():.3f}, weight version {client.version}")


if __name__ == "__main__":
    main(sys.argv[1])
