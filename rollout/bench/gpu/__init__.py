"""`blockroll bench gpu`: one command, a few minutes, what the kernels and a decode step are worth on this device.

    python -m blockroll.rollout.bench.gpu --json gpu.json

is the same without the command line's own dependencies: it needs torch, triton, transformers and numpy, matplotlib for the
plot, and pydantic for the training steps. Sections, in this order:

    ceilings      copy bandwidth, matrix products and launches of this device, in this run
    host          milliseconds of the host per step, on a device that does nothing
    compile       what the others would compile one after another, with several processes
    correctness   every op against its reference on this device; captured against eager, also over whole runs; one batch against
                  another
    kernels       time of each kernel at ZAYA1-8B's sizes, as fractions of the ceilings
    training      a conversion's step over 131072 tokens against a plain autoregressive one
    steps         an engine's decode steps by the clock, of a ZAYA1-8B with random weights; and the same where the drafts are the
                  known continuation (`oracle`)

Times stand beside what was predicted of them before (`planning/predictions.json`).

Invariants:
- Every section's items run in a process of their own, one after another; the JSON is written after each item. What fails,
  hangs or loses the device costs its item, which then records its error, and the rest goes on in a fresh process.
- The time limit holds: what no longer fits is listed as skipped.
- Weights are random and acceptance is forced to a stated survival curve, after it was computed; experts are forced to a
  uniform choice. The output says so.
"""
