"""A decode step: planned as data, then run.

Knows samples, drafts, the policy and the cache. Does not know requests that wait, nor which schedule pays.

`ar`, `two_pass` and `fused` hold one class per schedule kind, which plans a step. `plan` holds the plan: `StepPlan`, and
`ForwardRequest`, the rows of one forward pass. `runner` runs any plan: forward, verify, draft. `model_runner` runs one forward
pass; `shapes` and `recurring` keep the inputs and graphs of passes that run again and again.
"""
