"""`blockroll plan`: what a decode step costs on paper, and which schedule should pay, before any device is rented."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import ZayaConfig

from ...errors import DataError, InvalidInput
from ...files import check_output, write_json
from ...inputs import read_input, unreadable
from ...model.backends import check_for_kernels
from ...model.checkpoint import read_config, resolve
from ..schedule import Schedule
from .plan_tables import show
from .predictions import device_in, step_seconds
from .roofline import HARDWARE, Hardware, Rates, Roofline, Step, expected_tokens, geometric_survival, measured_rates

ZAYA1_8B = "zaya1-8b"
PUBLISHED_TOKENS_PER_FORWARD = 4.6
"""ZAYA1-8B-Diffusion-Preview's lossless sampler, as its authors state it (mixed logits: 7.7)."""

MAX_MEASURED = 64 << 20
"""Bytes of a file of measurements; a whole bench writes less than a thousandth."""
SHOWN = (
    Schedule("ar"), Schedule("two_pass"), Schedule("fused", levels=(0,)), Schedule("fused", levels=(0, 4, 8)),
)  # fmt: skip
CANDIDATES = (
    *(Schedule("two_pass", drafts) for drafts in (4, 8, 16)),
    *(Schedule("fused", levels=(0,), block=block) for block in (4, 8, 16)),
    *(Schedule("fused", levels=levels) for levels in ((0, 4), (0, 4, 8), (0, 2, 4, 8, 12))),
)


def plan(
    model: str,
    hardware: Sequence[str],
    batches: Sequence[int],
    contexts: Sequence[int],
    *,
    tokens_per_step: float = PUBLISHED_TOKENS_PER_FORWARD,
    survival: Sequence[float] = (),
    measured: Path | None = None,
    output: Path | None = None,
    everything: bool = False,
) -> dict[str, Any]:
    """Print the roofline and write it to `output` as JSON; returns it.

    Args:
        model: `zaya1-8b`, a shipped policy or a policy directory.
        tokens_per_step: of a step that drafts a whole block, when each draft is accepted alike.
        survival: P(at least k drafts are accepted), k = 1, 2, ..; in place of `tokens_per_step`.
        measured: JSON of `blockroll bench gpu`; its device is added to `hardware`.
        everything: print the long tables too.
    Raises:
        InvalidInput: unknown hardware, a number out of range. CheckpointError: no such policy, or none for an accelerator.
    """
    if output is not None:
        check_output(output, *([] if measured is None else [measured]))
    config = ZayaConfig() if model == ZAYA1_8B else read_config(resolve(model))
    check_for_kernels(config)
    roofline = Roofline.of(config)
    devices = _devices(hardware, measured)
    for name, values in (("batch", batches), ("context", contexts)):
        if not values or min(values) < 1:
            raise InvalidInput(name, f"{list(values)} holds no positive number", "use whole numbers from 1")
    if not survival:
        most = 1.0 + roofline.block
        if not 1 <= tokens_per_step <= most:
            raise InvalidInput("tpf", f"{tokens_per_step} is outside 1..{most:g}", "a step commits at most a block and one")
        survival = geometric_survival(tokens_per_step, roofline.block)
    elif sorted(survival, reverse=True) != list(survival) or not 0 <= survival[-1] <= survival[0] <= 1:
        raise InvalidInput(
            "survival", f"{list(survival)} is no falling curve in 0..1", "give P(at least k accepted), k = 1, 2, .."
        )

    result = {
        "model": {
            "name": model, "parameters": roofline.parameters, "weight_bytes": 2 * roofline.parameters,
            "kv_bytes_per_token": roofline.kv_bytes, "block_size": roofline.block,
        },
        "survival": list(survival),
        "steps": [
            _step_row(roofline.step(schedule, batch, context), batch, context)
            for context in contexts for batch in batches for schedule in SHOWN
        ],
        "devices": [
            _device_rows(roofline, *device, batches, contexts, survival, model == ZAYA1_8B) for device in devices
        ],
    }  # fmt: skip
    show(result, everything)
    if output is not None:
        write_json(output, result)
    return result


def _devices(names: Sequence[str], measured: Path | None) -> list[tuple[Hardware, Rates, str]]:
    """Device, the rates it reaches, and where those come from."""
    for name in names:
        if name not in HARDWARE:
            raise InvalidInput("hardware", f"unknown hardware {name!r}", f"use {', '.join(HARDWARE)}")
    devices = [(HARDWARE[name], HARDWARE[name].achieved, HARDWARE[name].basis) for name in names]
    if measured is None:
        return devices
    try:
        figures = json.loads(read_input(measured, MAX_MEASURED))
        title = str(figures["machine"]["device"])
    except OSError as error:
        raise unreadable(measured, error) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError("measured", f"{os.fspath(measured)} is no JSON of `blockroll bench gpu` ({error!r})",
                        "give the file that its --json wrote") from error  # fmt: skip
    found = device_in(title)
    if found is None:
        raise DataError("measured", f"{title!r} is no known hardware", f"measure on {', '.join(HARDWARE)}")
    rates = measured_rates(figures, HARDWARE[found].achieved)
    kept = [device for device in devices if device[0].name != found]
    return [*kept, (HARDWARE[found], rates, f"measured, {measured.name}")]


def _step_row(step: Step, batch: int, context: int) -> dict[str, Any]:
    total = step.total
    return {
        "batch": batch, "context": context, "schedule": step.schedule.label, "rows": step.rows, "passes": step.passes,
        "experts_touched": step.experts, "bytes": total.bytes, "flops": total.flops,
        "parts": {name: {"bytes": work.bytes, "flops": work.flops} for name, work in step.parts.items()},
    }  # fmt: skip


def _device_rows(
    roofline: Roofline, device: Hardware, reached: Rates, basis: str, batches: Sequence[int], contexts: Sequence[int],
    survival: Sequence[float], registers: bool,
) -> dict[str, Any]:  # fmt: skip
    """`registers`: predictions of this policy's steps are registered."""

    def seconds_of(schedule: Schedule, rates: Rates, batch: int, context: int) -> float:
        known = None
        if registers and rates == device.achieved:
            known = step_seconds(device.name, schedule.within(roofline.block).label, batch, context)
        return roofline.step(schedule, batch, context).seconds(rates) if known is None else known

    def compared(rates: Rates, batch: int, context: int) -> dict[str, Any]:
        ar = seconds_of(Schedule("ar"), rates, batch, context)
        rows: list[dict[str, Any]] = []
        for schedule in CANDIDATES:
            seconds = seconds_of(schedule, rates, batch, context)
            tokens = expected_tokens(schedule, survival, roofline.block)
            label = schedule.within(roofline.block).label
            rows.append({"schedule": label, "seconds": seconds, "tokens": tokens, "ratio": tokens * ar / seconds})
        best = max(rows, key=lambda row: row["ratio"])
        if best["ratio"] < 1:
            best = {"schedule": "ar", "seconds": ar, "tokens": 1.0, "ratio": 1.0}
        return {"ar_seconds": ar, "ar_tokens_per_s": batch / ar, "best": best, "schedules": rows}

    both = {"peak": device.peak, "reached": reached}
    bounds = {}
    for name, rates in both.items():
        rows, proposals = roofline.proposals_until_compute_bound(rates)
        bounds[name] = {"rows": rows, "proposals": proposals}
    return {
        "name": device.name, "source": device.source, "basis": basis,
        "rates": {name: vars(rates) for name, rates in both.items()},
        "attention_compute_bound": bounds,
        "predicted": [
            {"batch": batch, "context": context} | {name: compared(rates, batch, context) for name, rates in both.items()}
            for context in contexts for batch in batches
        ],
    }  # fmt: skip
