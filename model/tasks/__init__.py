"""Prompts, and what the answers to them are worth: reasoning-gym tasks as question, worked steps and answer, on which the shipped
policies are trained and judged, or rows of files of one's own.

Knows texts, token ids and verifiers. Does not know requests or engines. To add a family, write its class in `families.py`.

`tasks`, `families`, `prompts`: reasoning-gym's. `task_set`: what trainers and evaluations draw from, whatever the source.
`own_config`, `own_rows`, `own`: one's own. `reward_process` calls a reward function in the process of `reward_worker`; `matches`
and `math_match` hold functions that come along.
"""

from .families import FAMILIES
from .prompts import answer, question
from .tasks import SPLITS, Task, families, make_tasks, score, task_from_id

__all__ = ["FAMILIES", "SPLITS", "Task", "answer", "families", "make_tasks", "question", "score", "task_from_id"]
