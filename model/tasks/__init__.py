"""Reasoning-gym tasks as question, worked steps and answer: what the shipped policy is trained, rewarded and judged on.

Knows texts and verifiers. Does not know tensors or tokenizers. To add a family, write its class in `families.py`.
"""

from .families import FAMILIES
from .prompts import answer, question
from .tasks import SPLITS, Task, families, make_tasks, score, task_from_id

__all__ = ["FAMILIES", "SPLITS", "Task", "answer", "families", "make_tasks", "question", "score", "task_from_id"]
