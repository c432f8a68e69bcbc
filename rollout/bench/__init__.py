"""Measures decoding speed on this machine: `blockroll bench` and `blockroll kernels check`.

Knows engines, and how to compare them fairly: in turn, in one process, each figure next to a check of what was decoded. Does not
know what a policy is worth; that is `evaluation`.

`decode`: samplers, schedules and peers. `peers`: other libraries that decode the same weights. `planner`: the planner against
every fixed schedule. `gpu`: kernels and steps of an accelerator, importable with torch, triton, transformers and numpy alone.
`kernel_check`: whether every kernel compiles for every target.
"""
