"""Which schedule pays: chosen while decoding, from what steps take and how far drafts survive, or on paper, from data sheets.

Knows schedules and samples. Does not know how a step is run: whoever calibrates hands in how.

While decoding: `planner` decides before each step, and argues why that keeps samples exact; `survival` is what it knows of
drafts, `step_costs` what it knows of time, `calibration` how that is measured at start-up. On paper: `roofline` computes bytes
and FLOPs of a step, `plan` is `blockroll plan`.
"""
