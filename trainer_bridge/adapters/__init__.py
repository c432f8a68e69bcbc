"""Adapters: one file per trainer that is not ours. Each is imported by name, and imports its trainer only then.

`trl`: TRL's GRPOTrainer. `async_grpo`: TRL's AsyncGRPOTrainer. `policy_model`: a policy as a transformers model, which both
train. `draft_loss`: the draft loss as a mixin of a transformers Trainer. `samples`: prompts, completions and rewards in TRL's
forms. `weight_sync` pushes weights.
"""
