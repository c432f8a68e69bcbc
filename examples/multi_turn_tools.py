"""Multi-turn reinforcement learning with a tool: the policy writes a step up to `=`, a calculator writes the result, and so on.

    blockroll up configs/cluster/local.yaml --detach
    python examples/multi_turn_tools.py tcp://127.0.0.1:PORT

The tokens of the calculator are in the text that the policy reads and not in its loss. Rollouts and weights pass through
`RolloutClient` alone. The service must serve a policy of the shape of `tiny-reasoner-terse`, such as `tiny-reasoner`.
"""

import argparse
import re

import torch

import blockroll
from blockroll.model.tasks import make_tasks, score
from blockroll.model.tokenizer import encode_prompt

STEP = re.compile(r"(\d+)([-+*%])(\d+)(?::[^=]*)?=$")  # `47+85:...=`: the policy may have worked it in columns already
OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "%": lambda a, b: a % b if b else 0}
CLIP, TEMPERATURE = 0.2, 1.0


def calculator(tokenizer):
    """The environment: after a turn that ends with a step's `=` it writes the result; any other turn ends the conversation."""

    def reply(conversation):
        step = STEP.search(tokenizer.decode(conversation.tokens))
        if step is None or conversation.trajectories[-1].stop_reason != "=":
            return None
        left, sign, right = step.groups()
        return tokenizer.encode(str(OPERATIONS[sign](int(left), int(right))), add_special_tokens=False)

    return reply


def main(address, steps=24, prompts=12, samples=8, learning_rate=1e-4, seed=0, name=None, shuffle=False):
    """Trains with GRPO; returns the mean reward of each step.

    Args:
        name: client id, which the ids of all requests begin with; a random one by default.
        shuffle: give a group's rewards to other samples of the group: a control, with which nothing can be learned.
    """
    torch.set_num_threads(1)
    random = torch.Generator().manual_seed(seed)
    policy = blockroll.load_policy("tiny-reasoner-terse").train().requires_grad_(True)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate, weight_decay=0.0)
    tokenizer = policy.tokenizer
    params = blockroll.SamplingParams(sampler="coupled", temperature=TEMPERATURE, max_tokens=48, stop=["="])
    history = []
    with blockroll.connect(address, client_id=name) as client:
        first = client.push_weights(client.version + 1, policy.state_dict())
        for step in range(steps):
            tasks = make_tasks("rl", prompts, seed=1000 * seed + step, only=["chain_sum", "products"])
            conversations = [
                blockroll.Conversation(f"{client.client_id}/{step}/{t}/{s}", encode_prompt(tokenizer, task.prompt), params,
                                       seed=seed, max_length=256)
                for t, task in enumerate(tasks) for s in range(samples)
            ]  # fmt: skip
            blockroll.converse(client, conversations, calculator(tokenizer))
            texts = [tokenizer.decode(c.tokens, skip_special_tokens=True) for c in conversations]
            reward_GK = torch.tensor([score(tasks[i // samples], text) if conversations[i].finish_reason == "stop" else 0.0
                                      for i, text in enumerate(texts)]).view(prompts, samples)  # fmt: skip
            history.append(reward_GK.mean().item())
            calls = sum(len(c.trajectories) - 1 for c in conversations) / len(conversations)
            if shuffle:
                reward_GK = torch.stack([row[torch.randperm(samples, generator=random)] for row in reward_GK])
            advantage_GK = (reward_GK - reward_GK.mean(1, keepdim=True)) / (reward_GK.std(1, keepdim=True) + 1e-4)
            update(policy, optimizer, [(c, a) for c, a in zip(conversations, advantage_GK.flatten().tolist(), strict=True) if a])
            client.push_weights(first + step + 1, policy.state_dict())
            print(f"step {step + 1}: reward {history[-1]:.3f}, {calls:.1f} calls of the calculator per conversation", flush=True)
        print(f"weight version {client.version} serves; samples missing: {client.delivery['missing']}")
    return history


def update(policy, optimizer, pairs, parts=2):
    """Clipped policy-gradient steps over (conversation, advantage), each part of them one step."""
    for part in range(parts):
        some = pairs[part::parts]
        total = sum(int(c.mask.sum()) for c, _ in some)
        for batch in (some[i : i + 16] for i in range(0, len(some), 16)):
            new = policy.logprobs([c.prompt_tokens for c, _ in batch], [c.tokens for c, _ in batch], TEMPERATURE)
            loss = torch.zeros(())
            for (conversation, advantage), new_N in zip(batch, new, strict=True):
                ratio_N = (new_N - torch.from_numpy(conversation.logprobs)).exp()
                gain_N = torch.minimum(ratio_N * advantage, ratio_N.clamp(1 - CLIP, 1 + CLIP) * advantage)
                loss = loss - (torch.from_numpy(conversation.mask) * gain_N).sum() / total  # the environment's tokens: mask 0
            loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address", help="of the gateway, as `blockroll status` prints it")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shuffle", action="store_true", help="control: rewards of other samples")
    options = parser.parse_args()
    main(options.address, steps=options.steps, seed=options.seed, shuffle=options.shuffle)
