"""Adapters: one file or folder per trainer that is not ours. Each is imported by name, and imports its trainer only then.

`trl`: TRL's GRPOTrainer. `async_grpo`: TRL's AsyncGRPOTrainer. `verl`: verl, in an environment of its own. `policy_model`: a
policy as a transformers model, which all train. `draft_loss`: the draft loss as a mixin of a transformers Trainer. `samples`:
prompts, completions and rewards in TRL's forms. `weight_sync` pushes weights.
"""
