"""What each kernel takes of a decode step: the step as the calls that it launches, kernel by kernel, one after another.

    seconds(step) = sum over kernels of  calls * seconds(one call)  +  launches of no kernel here * seconds(launch)

A kernel's call takes what `kernel_work` says of its bytes, FLOPs and launches at the device's rates. Verification and drafts are
those of `lossless`.
"""

from __future__ import annotations

from ..schedule import Schedule
from . import kernel_work
from .kernel_work import KernelWork
from .roofline import Hardware, Roofline


def calls(roofline: Roofline, schedule: Schedule, batch: int, context: int) -> dict[str, list[tuple[int, KernelWork]]]:
    """By kernel, (how many calls, work of one) of a step."""
    config, chosen = roofline.config, schedule.within(roofline.block)
    passes, heads = roofline.rows(chosen)
    layers = config.num_hidden_layers
    found: dict[str, list[tuple[int, KernelWork]]] = {}
    for rows in passes:
        T = batch * rows
        for call, count in roofline.attention_calls(batch, rows, context).items():
            found.setdefault("attention", []).append((count, kernel_work.attention(config, batch, rows, call.context)))
        for kind, each in ((kernel_work.experts, 1), (kernel_work.router, 1), (kernel_work.cca, 1), (kernel_work.residual, 2),
                           (kernel_work.projections, 1)):  # fmt: skip
            found.setdefault(kind.__name__, []).append((layers * each, kind(config, T)))
    found["head"] = [(1, kernel_work.head(config, batch * rows)) for rows in heads]
    sampling = kernel_work.verification(config, batch, chosen.drafts or 0)
    for name in ("ar",) if chosen.kind == "ar" else ("verify", "draft"):
        found[name] = [(1, sampling[name])]
    return found


def step_shares(roofline: Roofline, schedule: Schedule, batch: int, context: int, hardware: Hardware) -> dict[str, float]:
    """Seconds of each kernel in a step, at the rates that kernels reach on the device; `launches` are those of no kernel here."""
    made, rates = calls(roofline, schedule, batch, context), hardware.achieved
    seconds = {kernel: sum(count * work.seconds(rates) for count, work in each) for kernel, each in made.items()}
    launched = sum(count * work.launches for each in made.values() for count, work in each)
    others = roofline.step(schedule, batch, context).kernels - launched
    return seconds | {"launches": max(others, 0) * rates.launch}
