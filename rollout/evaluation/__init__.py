"""Measures a policy on held-out tasks, for `blockroll eval`, `convert` and `ablate`. Nothing else measures one.

Knows tasks, engines and the records they leave. Does not know how a policy was trained, beyond the recipe beside it.

`counts`: figures of finished samples. `decoding`: one way to decode, and the AR loss. `places`: acceptance by slot at block
sizes that are to be compared. `training`: whether tasks were trained on. `documents`: the AR loss on files. `report`: all of it,
as the JSON of `blockroll eval`. `card` and `plots`: the JSON as Markdown and as a picture.
"""

from .decoding import Evaluation, evaluate, evaluate_ar_loss

__all__ = ["Evaluation", "evaluate", "evaluate_ar_loss"]
