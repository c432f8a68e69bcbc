"""Tasks of one's own: prompts from the rows of files, rewards by one's own function or by a match with a field.

Invariants:
- All that can be wrong with rows and function is found before anything is decoded.
- No prompt is both trained on and held out.
- An epoch goes through every row that is trained on once, in an order that the seed decides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, cast

from ...errors import ConfigError, DataError
from ...seeds import named_generator
from ..arguments import short
from ..policy import Policy
from .own_config import TaskSource
from .own_rows import OwnTask, RowReader
from .reward_process import Parameters, RewardProcess
from .task_set import Answer

_ONE = ("prompt", "completion", "completion_ids", "finish_reason")
_BATCH = ("prompts", "completions", "completion_ids", "finish_reasons")
"""What a reward function is given beside the fields of the row: of one sample, and of a batch."""
_MATCHES = {"exact": "blockroll.model.tasks.matches:exact", "math": "blockroll.model.tasks.math_match:math"}


class OwnTasks:
    """The tasks of a source. `close` ends the process of the reward function.

    Args:
        policy: whose tokenizer reads the prompts, and whose longest sequence bounds them.
        seed: of the order in which rows are trained on.
        where: what errors call the section.
        prompts_per_step: most tasks that are drawn at once.

    Raises:
        ConfigError, DataError: the source cannot be used.
    """

    def __init__(self, source: TaskSource, policy: Policy, seed: int = 0, where: str = "tasks.source",
                 prompts_per_step: int = 0) -> None:
        self.source, self._seed, self._where = source, seed, where
        reading = RowReader(source, policy, where)
        rows = reading.tasks(source.paths, source.split)
        if source.heldout_paths or source.heldout_split is not None:
            heldout = reading.tasks(source.heldout_paths or source.paths, source.heldout_split)
            known = {task.tokens: task.place for task in rows}
            twice = next((task for task in heldout if task.tokens in known), None)
            if twice is not None:
                raise DataError(twice.place, f"its prompt is also that of {known[twice.tokens]}, which is trained on",
                                "take it out of one of the two")  # fmt: skip
            self.training, self._heldout = rows, heldout
        else:
            self.training = [task for task in rows if not _held_out(task, source.heldout_share)]
            self._heldout = [task for task in rows if _held_out(task, source.heldout_share)]
        if prompts_per_step > len(self.training):
            raise ConfigError("tasks.prompts_per_step", f"{prompts_per_step} is more than the {len(self.training)} rows that are "
                              "trained on", "lower it, or give more rows that are not held out")
        if not self._heldout:
            raise DataError(self._where, f"none of {len(self.training)} rows is held out",
                            "raise heldout_share, or give heldout_paths")  # fmt: skip
        self._epoch: tuple[int, list[int]] = (-1, [])
        self._has_text = policy.tokenizer is not None
        reward = source.reward
        if reward.match == "math" and find_spec("math_verify") is None:
            raise ConfigError(f"{where}.reward.match", "math needs math-verify, which is not installed",
                              "pip install 'blockroll[math]'")
        function = reward.function or _MATCHES[reward.match or "exact"]
        self._process = RewardProcess(function, reward.timeout_s, f"{where}.reward.function")
        try:
            self._parameters = self._checked_function(self._process.start(), [*self.training, *self._heldout])
            if reward.match is not None:
                self._check_golds([*self.training, *self._heldout])
        except BaseException:
            self._process.close()
            raise

    @property
    def late(self) -> int:
        """Calls of the reward function that took too long."""
        return self._process.late

    @property
    def digest(self) -> str:
        """Of all rows, in their order."""
        state = hashlib.blake2b(digest_size=16)
        for task in (*self.training, *self._heldout):
            state.update(repr((task.id, sorted(task.row.items(), key=lambda item: item[0]))).encode())
        return state.hexdigest()

    def draw(self, number: int, count: int, seed: int) -> list[OwnTask]:
        """Tasks of batch `number`, from 0: the next `count` rows in the order of the epochs, which no other seed changes."""
        return [self.training[self._place(place)] for place in range(number * count, (number + 1) * count)]

    def heldout(self, count: int, seed: int) -> list[OwnTask]:
        """At most `count` held-out tasks; another seed takes others where there are more."""
        chosen = sorted(named_generator(seed, "heldout").sample(range(len(self._heldout)), min(count, len(self._heldout))))
        return [self._heldout[i] for i in chosen]

    def score(self, answers: Sequence[tuple[Any, Answer]]) -> list[float | None]:
        """A reward for each answer of a task; None where the function gave none, or took too long.

        Raises:
            DataError: the function raised an error, returned no finite number, or too few or too many; or no answer has a reward.
        """
        pairs = cast(Sequence[tuple[OwnTask, Answer]], answers)
        if self.source.reward.match is not None:
            found = self._process.each([self._match_arguments(task, answer) for task, answer in pairs])
        elif self.source.reward.batched:
            each = [self._arguments(task, answer) for task, answer in pairs]
            found = self._process.batch({name: [one.get(name) for one in each] for name in self._parameters}, len(each))
        else:
            found = self._process.each([self._arguments(task, answer) for task, answer in pairs])
        if pairs and all(value is None for value in found):
            late = f"within {self.source.reward.timeout_s:g} s" if self.late else "but None"
            raise DataError(f"{self._where}.reward", f"none of {len(pairs)} samples was given a reward {late}",
                            "raise timeout_s, or correct the function")  # fmt: skip
        return found

    def prompt_tokens(self, task: OwnTask, tokenizer: Any) -> tuple[int, ...]:
        """The token ids of a task's prompt."""
        return task.tokens

    def close(self) -> None:
        """Ends the process of the reward function."""
        self._process.close()

    def _place(self, place: int) -> int:
        epoch, row = divmod(place, len(self.training))
        if self._epoch[0] != epoch:
            order = list(range(len(self.training)))
            named_generator(self._seed, f"rows/{epoch}").shuffle(order)
            self._epoch = epoch, order
        return self._epoch[1][row]

    def _arguments(self, task: OwnTask, answer: Answer) -> dict[str, Any]:
        """What the function is given of one sample. A field that the row lacks is left out."""
        chat = isinstance(task.prompt, list) and isinstance(task.prompt[0], Mapping)
        completion = [{"role": "assistant", "content": answer.text}] if chat else answer.text
        given = dict(zip(_ONE, (task.prompt, completion, list(answer.tokens), answer.finish_reason), strict=True))
        return {name: task.row[name] if ours is None else given[ours] for name, ours in self._parameters.items()
                if ours is not None or name in task.row}

    def _match_arguments(self, task: OwnTask, answer: Answer) -> dict[str, Any]:
        reward = self.source.reward
        return {"completion": answer.text, "finish_reason": answer.finish_reason, "gold": _gold(task, reward.field),
                "after": reward.after}  # fmt: skip

    def _check_golds(self, tasks: Sequence[OwnTask]) -> None:
        """Raises DataError where a row's answer is missing, or no value to math-verify."""
        first = {_gold(task, self.source.reward.field): task for task in reversed(tasks)}
        if self.source.reward.match == "math":
            unended = Answer("", (), "length")
            for gold in self._process.each([self._match_arguments(task, unended) for task in first.values()]):
                if gold is None:
                    raise DataError(f"{self._where}.reward", "math-verify takes too long to read a row's answer",
                                    "raise timeout_s, or use match: exact")  # fmt: skip

    def _checked_function(self, parameters: Parameters, rows: Sequence[OwnTask]) -> dict[str, str | None]:
        """The parameters that the function is given: for each the name in _ONE, or None for a field of the row."""
        reward = self.source.reward
        wants_text = reward.match is not None or {"completion", "completions"} & parameters.named.keys()
        if wants_text and not self._has_text:
            raise ConfigError(f"{self._where}.reward", "looks at text, and this policy's directory has no tokenizer",
                              "give a function of completion_ids")  # fmt: skip
        if reward.function is None:
            return {}
        ours = dict(zip(_BATCH if reward.batched else _ONE, _ONE, strict=True))
        completion = "completions" if reward.batched else "completion"
        fields = dict.fromkeys(name for task in rows for name in task.row if name != self.source.prompt)
        for name in fields.keys() & ours.keys():
            if name in parameters.named or parameters.any_name:
                raise DataError(rows[0].place, f"has a field {name!r}, which is also what blockroll gives a reward function",
                                "rename the field")  # fmt: skip
        for name, has_default in parameters.named.items():
            lacking = None if name in ours or has_default else next((task for task in rows if name not in task.row), None)
            if lacking is not None:
                raise DataError(lacking.place, f"has no field {name!r}, which {reward.function} takes",
                                f"add it, or give the parameter a default; known here: {', '.join([*ours, *fields])}")
        wanted = [name for name in (*ours, *fields) if name in parameters.named or parameters.any_name]
        if not {completion, "completion_ids"} & set(wanted):
            problem = f"{reward.function} takes neither {completion} nor completion_ids"
            raise ConfigError(f"{self._where}.reward.function", problem, f"name a parameter {completion}")
        return {name: ours.get(name) for name in wanted}


def _held_out(task: OwnTask, share: float) -> bool:
    digest = hashlib.sha256(repr(task.tokens).encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _gold(task: OwnTask, name: str) -> str:
    value = task.row.get(name)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        problem = f"has no field {name!r}, only {', '.join(map(repr, task.row))}" if name not in task.row else \
            f"field {name!r}: {short(value)} is no text and no number"
        raise DataError(task.place, problem, "give the right answer, or name its field under reward.field")
    return str(value)
