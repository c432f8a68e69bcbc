"""Brings a whole rollout service up and down, watches it and changes it, from one configuration.

Knows the parts of a service (Ray, engines, gateway, metrics) and their order, and what a machine must have for them. Does not
know how tokens are made.

`config`: `ServiceConfig`. `preflight` refuses what cannot work; `lifecycle` serves for as long as a `with` block lasts.
`commands`: up, status, scale, down, logs; `detached` starts and ends the process of a service, `runtime_file` says where it
answers. `autoscaler` lets the number of engines follow the queue. `metrics`, `logs`: what is seen of it. `of_run`: the service
of a GRPO run. `policy_files`: what is read of a policy before an engine loads it. `doctor`: checks of a machine.
"""
