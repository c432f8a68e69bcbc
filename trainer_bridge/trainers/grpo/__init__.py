"""The reference GRPO trainer (arXiv 2402.03300), written to be read.

It is given the address of a rollout service and starts none.

`run` prepares the run's directory; `trainer` is the loop: roll out, reward, update, checkpoint, push.
`rewards` turns trajectories into groups with advantages; `learner` makes the optimiser steps, over the loss of `loss`;
`checkpoint` makes a killed run resumable; `config` is the run's file; `report` shows the run.
"""
