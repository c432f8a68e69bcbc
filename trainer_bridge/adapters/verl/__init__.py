"""verl on rollouts of a service. verl runs in an environment of its own, the service in another process and environment.

`plugin` tells verl of the rest: it is the module of the entry point `verl.plugins`. Generation: `replica` launches a `server`,
whose `generations` are requests to the service, numbered by `turns`; `sampling` translates what goes there and comes back.
Weights: `rollout` (trainer and rollouts in one worker) and `checkpoint_engine` (apart) push through a `publisher`;
`weight_steps` remembers which of verl's steps a weight version is. Training: `model` makes a policy a model that verl loads,
and `engine` adds the draft loss to verl's FSDP engine. `settings` reads the section `engine_kwargs.blockroll`. `cpu_platform`
is verl's platform for a machine without accelerators.

`settings`, `sampling` and `generations` import neither verl nor torch.
"""
