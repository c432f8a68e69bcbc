"""TRL's GRPOTrainer whose rollouts a service makes.

    blockroll up configs/cluster/local.yaml --detach
    python examples/trl_grpo.py ADDRESS [POLICY] [STEPS]

POLICY is the one that the service was started with. Prints held-out accuracy and tokens per forward before and after training.
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from trl import GRPOConfig

import blockroll
from blockroll.model.tasks import make_tasks, score, task_from_id
from blockroll.trainer_bridge.adapters.trl import DraftTraining, GRPOTrainer, load_model

FAMILIES = ["base_conversion", "products", "chain_sum"]
OUTPUT = Path("runs/trl_grpo")


def right(completions, task, finish_reason, **_):
    """1 for a right answer that ended by itself; `task` is a column of the data set, `finish_reason` comes from the rollouts."""
    return [score(task_from_id(name), text) if end == "stop" else 0.0
            for name, text, end in zip(task, completions, finish_reason, strict=True)]  # fmt: skip


def evaluate(client, tokenizer, tasks):
    """Accuracy of greedy answers, tokens per forward of samples at temperature 1, and the accuracy of those."""
    found = {}
    for temperature in (0.0, 1.0):
        params = blockroll.SamplingParams(sampler="coupled", temperature=temperature, max_tokens=192)
        name = f"heldout/{client.version}/{temperature}"
        prompts = [(tokenizer.bos_token_id, *tokenizer.encode(task.prompt)) for task in tasks]
        found[temperature] = client.generate(
            blockroll.RolloutRequest(f"{client.client_id}/{name}/{i:04d}", prompt, params, seed=i)
            for i, prompt in enumerate(prompts))  # fmt: skip
    greedy, sampled = (sum(score(task, t.text(tokenizer)) for task, t in zip(tasks, found[at], strict=True)) / len(tasks)
                       for at in (0.0, 1.0))  # fmt: skip
    return greedy, sum(len(t.tokens) for t in found[1.0]) / sum(t.forwards for t in found[1.0]), sampled


def main(address, policy="tiny-reasoner-terse", steps=64, heldout=400, prompts=10, output=OUTPUT, learning_rate=5e-5,
         families=FAMILIES, difficulty=None, **options):  # fmt: skip
    """Trains; returns the trainer, and the figures before and after. `difficulty`: by family, options of reasoning-gym."""
    torch.set_num_threads(1)
    tasks, unseen = (make_tasks(split, count, only=families, difficulty=difficulty)
                     for split, count in (("rl", steps * prompts), ("heldout", heldout)))  # fmt: skip
    dataset = Dataset.from_list([{"prompt": task.prompt, "task": task.id} for task in tasks])
    args = GRPOConfig(
        str(output), per_device_train_batch_size=prompts * 4, gradient_accumulation_steps=2, num_generations=8,
        max_completion_length=192, max_steps=steps, learning_rate=learning_rate, warmup_steps=2, logging_steps=1, use_cpu=True,
        bf16=False, gradient_checkpointing=False, vllm_importance_sampling_mode="token_truncate", save_strategy="no",
        report_to=[], disable_tqdm=True, **options,
    )  # fmt: skip
    with blockroll.connect(address) as client:
        model = load_model(policy)
        trainer = GRPOTrainer(client, model=model, reward_funcs=right, args=args, train_dataset=dataset,
                              drafts=DraftTraining(draft_weight=0.1, draft_share=0.5))  # fmt: skip
        trainer.rollouts.sync_weights()
        before = evaluate(client, model.policy.tokenizer, unseen)
        trainer.train()
        after = evaluate(client, model.policy.tokenizer, unseen)
    print(f"held-out accuracy {before[0]:.3f} -> {after[0]:.3f}, tokens per forward {before[1]:.2f} -> {after[1]:.2f}")
    return trainer, before, after


if __name__ == "__main__":
    address, *rest = sys.argv[1:]
    trainer, before, after = main(address, *rest[:1], *map(int, rest[1:]))
    trainer.save_model(OUTPUT / "policy")  # a policy's directory, for `blockroll eval` and `blockroll up`
