"""How rollouts are made: cache, samplers, scheduler, engine, and the Ray actors and cluster around engines.

Knows policies and requests. Does not know trainers, sockets or ledgers. `rollout.types` imports without torch.

A step, in the order of its sentence in `engine`: `schedule` says what a step may run, `scheduler` who takes part,
`steps` lays out the rows, `forwards` runs them over `cache`, `sampling` draws and verifies, `sequence` is what one
sample has so far. `params` is how tokens are drawn, `types` what goes in and comes out, `generate` and `outputs` the same for
`Engine.generate`. `stop_strings` and `prompt_logprobs` are what their names say, `seeds` is where random numbers come from, and
`backend` the interface that the bridge calls.

Folders around it: `planning` chooses schedules. `cluster` spreads engines over Ray. `evaluation` measures what a policy is worth,
`conversion` makes one and measures it, `bench` measures machines. `offline` decodes and scores files. `progress` and `machine`
are what commands show while they run, and say about where they ran.
"""
