"""TRL's AsyncGRPOTrainer: engines make rollouts while TRL trains, and take each new weight version between two decode steps.

    blockroll up configs/cluster/local.yaml --detach
    python examples/trl_async.py ADDRESS [POLICY] [STEPS]

The task, the reward and what is printed are those of trl_grpo.py.
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from trl.experimental.async_grpo import AsyncGRPOConfig
from trl_grpo import FAMILIES, evaluate, right

import blockroll
from blockroll.model.tasks import make_tasks
from blockroll.trainer_bridge.adapters.async_grpo import AsyncGRPOTrainer, DraftTraining

OUTPUT = Path("runs/trl_async")


def main(address, policy="tiny-reasoner-terse", steps=64, heldout=400, tokens=1024, samples=96, output=OUTPUT,
         learning_rate=5e-5, families=FAMILIES, difficulty=None, **options):  # fmt: skip
    """Trains; returns the trainer, and the figures before and after. `difficulty`: by family, options of reasoning-gym."""
    torch.set_num_threads(1)
    tasks, unseen = (make_tasks(split, count, only=families, difficulty=difficulty)
                     for split, count in (("rl", 1000), ("heldout", heldout)))  # fmt: skip
    dataset = Dataset.from_list([{"prompt": task.prompt, "task": task.id} for task in tasks])
    args = AsyncGRPOConfig(
        str(output), gradient_accumulation_steps=2, token_budget=tokens, num_generations=8, max_completion_length=192,
        max_steps=steps, max_staleness=4, max_inflight_tasks=samples, learning_rate=learning_rate, warmup_steps=2,
        logging_steps=1, use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no", report_to=[],
        disable_tqdm=True, **options,
    )  # fmt: skip
    with blockroll.connect(address) as client:
        trainer = AsyncGRPOTrainer(client, model=policy, reward_funcs=right, args=args, train_dataset=dataset,
                                   drafts=DraftTraining(draft_weight=0.1, draft_share=0.5))  # fmt: skip
        tokenizer = trainer.processing_class
        client.push_weights(client.version + 1, trainer.model.policy.state_dict())
        before = evaluate(client, tokenizer, unseen)
        trainer.train()
        after = evaluate(client, tokenizer, unseen)
    print(f"held-out accuracy {before[0]:.3f} -> {after[0]:.3f}, tokens per forward {before[1]:.2f} -> {after[1]:.2f}")
    return trainer, before, after


if __name__ == "__main__":
    address, *rest = sys.argv[1:]
    trainer, before, after = main(address, *rest[:1], *map(int, rest[1:]))
    trainer.save_model(OUTPUT / "policy")
