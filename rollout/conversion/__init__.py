"""Conversions as commands: `model.conversion` trains, then engines measure. Engines exist only on this floor.

Knows recipes and `evaluation`. Does not know how a stage trains.

`convert`: `blockroll convert`, from a file to a policy with its figures and card. `ray_train`: its stages on Ray's workers.
`ablation`: `blockroll ablate`, variants of a stage from one parent; `ablation_report`: its table and plot.
"""
