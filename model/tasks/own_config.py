"""The section `source` of `tasks`: prompts from files of one's own, and what their answers are worth."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, model_validator

from ...errors import InvalidInput
from ...settings import Config

MAX_TIMEOUT_S = 86_400.0
"""Seconds of the longest call of a reward function: a day."""
_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


class Reward(Config):
    """What an answer is worth: a function of one's own, or a match with a field of the row."""

    function: str | None = Field(None, description="`module:function`, of a module in the working directory or an "
                                 "installed one")
    batched: bool = Field(True, description="true: one call for all samples of a step, lists in and a list of numbers out, as "
                          "TRL calls reward functions. false: one call per sample, one number out")
    match: Literal["exact", "math"] | None = Field(None, description="exact: 1 where the answer is the field's text, spaces "
        "around it left out. math: 1 where math-verify finds both equal. Both give 0 to an answer that did not end by itself")
    field: str = Field("answer", min_length=1, description="with match: the field that holds the right answer")
    after: str | None = Field(None, min_length=1, description="with match: the answer is what follows the last of these marks in "
                              "what the policy wrote; without the mark it is wrong. None takes all of it")
    timeout_s: float = Field(30.0, gt=0, le=MAX_TIMEOUT_S, description="seconds of one call. What takes longer is ended, and its "
                             "samples have no reward")

    @model_validator(mode="after")
    def _one_kind(self) -> Reward:
        if (self.function is None) == (self.match is None):
            given = "neither is given" if self.function is None else f"{self.function} beside match: {self.match}"
            raise InvalidInput("function", given, "give one of function and match")
        if self.function is not None and not _FUNCTION.fullmatch(self.function):
            raise InvalidInput("function", f"{self.function[:100]!r} names no function",
                               "write module:function, such as my_reward:reward")
        if self.function is not None and self.model_fields_set & {"field", "after"}:
            raise InvalidInput("field" if "field" in self.model_fields_set else "after", "given beside a function",
                               "leave it out: a function is given every field")
        return self


class TaskSource(Config):
    """Prompts of one's own, one per row of a file, with their rewards."""

    paths: tuple[str, ...] = Field(min_length=1, description=".jsonl, .json and .parquet files, patterns, or directories of "
                                   "them; or a directory that `datasets.save_to_disk` wrote")
    split: str | None = Field(None, description="of a data set saved with several splits")
    heldout_paths: tuple[str, ...] = Field((), description="rows that are evaluated on and never trained on; without them "
                                           "`heldout_share` of the rows of `paths`")
    heldout_split: str | None = Field(None, description="the same, as a split of the saved data set in `paths`")
    heldout_share: float = Field(0.1, gt=0, le=1, description="share of the rows that is held out, where nothing above says "
                                 "which: a prompt's hash decides, whatever its place. 1 for files that are only evaluated on")
    prompt: str = Field("prompt", min_length=1, description="the field with the prompt: text, a list of token ids, or a list of "
                        "chat messages, which pass through the tokenizer's chat template")
    completion: str | None = Field(None, min_length=1, description="a field with a reference answer as text; `eval` then gives "
                                   "the AR loss on it")
    family: str | None = Field(None, min_length=1, description="a field that names the kind of a task; figures are given by kind")
    reward: Reward
    right: float = Field(1.0, description="reward from which a sample counts as right, for pass@k")

    @model_validator(mode="after")
    def _one_heldout(self) -> TaskSource:
        ways = [name for name in ("heldout_paths", "heldout_split", "heldout_share") if name in self.model_fields_set]
        if len(ways) > 1:
            raise InvalidInput(ways[1], f"given beside {ways[0]}", "say in one way which rows are held out")
        return self
