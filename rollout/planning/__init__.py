"""Which schedule makes the most tokens per second: chosen while decoding, from measurements, or on paper, from data sheets.

Knows schedules and samples. Does not know how a step is run: the engine passes a function that runs one.

While decoding: `planner` chooses the schedule of each step, and its docstring says why samples stay exact; `survival` estimates
how many drafts are accepted, `step_costs` how long a step takes, `calibration` measures step times at start-up. On paper:
`roofline` computes bytes and FLOPs of a step, `plan` is `blockroll plan`.
"""
