"""How rollouts are made: cache, samplers, scheduler, engine, and the Ray actors and cluster around engines.

Knows policies and requests. Does not know trainers, sockets or ledgers. `rollout.types` imports without torch.

One request's life in one engine: `params` says how tokens are drawn, `types` holds requests and trajectories, `generate` and
`outputs` the prompts and outputs of `Engine.generate`. `engine` queues a request's samples (`sequence`) and runs steps:
`scheduler` picks the samples of a step, `steps` plans and runs it over the `cache`, `sampling` draws and verifies drafts.
`stop_strings` finds where a text ends, `prompt_logprobs` scores prompts. `checks` refuses what an engine cannot serve, `failures`
reports requests whose log-probabilities are not finite. `schedule` names what a step runs, `backend` is the
protocol between the bridge and the engines that serve it.

Folders around the engine: `planning` chooses schedules, `cluster` runs engines on Ray, `search` makes one answer of many samples,
`evaluation` measures policies,
`conversion` converts and measures them, `bench` measures machines. `offline` decodes and scores files. `progress` shows the
progress of a command, `machine` describes the machine it ran on.
"""
