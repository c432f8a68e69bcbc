"""`python -m blockroll.rollout.bench.gpu.predict`: writes `planning/predictions.json`, the predictions of all that the bench
measures, from the roofline and the rates that kernels are assumed to reach."""

from __future__ import annotations

import json
import re
from typing import Any

from ...planning import kernel_work
from ...planning.kernel_shares import step_shares
from ...planning.kernel_work import KernelWork
from ...planning.predictions import PATH
from ...planning.roofline import HARDWARE, Hardware, Roofline
from .sizes import DEVICE, Sizes


def predictions(sizes: Sizes = DEVICE) -> dict[str, Any]:
    """The content of the file."""
    roofline = Roofline.of(sizes.zaya)
    return {
        "policy": "ZAYA1-8B",
        "rule": "a kernel takes the longer of its bytes and FLOPs at the assumed shares of the peak rates, and its launches; a "
                "step takes its kernels one after another (planning/kernel_shares.py)",
        "devices": {name: _of(hardware, sizes, roofline) for name, hardware in HARDWARE.items()},
    }  # fmt: skip


def _of(hardware: Hardware, sizes: Sizes, roofline: Roofline) -> dict[str, Any]:
    config, block = roofline.config, roofline.block

    def row(work: KernelWork) -> dict[str, float]:
        seconds = work.seconds(hardware.achieved)
        return {"ms": _digits(1e3 * seconds), "of_roofline": _digits(work.seconds(hardware.peak) / seconds)}

    kernels: dict[str, Any] = {
        f"attention {batch} x {rows} at {context}": row(kernel_work.attention(config, batch, rows, context))
        for batch, rows, context in sizes.attention
    }
    for rows in sizes.kernel_rows:
        for kind in (kernel_work.experts, kernel_work.router, kernel_work.cca, kernel_work.residual, kernel_work.projections):
            kernels[f"{kind.__name__} {rows}"] = row(kind(config, rows))
    for batch in sizes.batches:
        parts = kernel_work.verification(config, batch, block - 1)
        kernels |= {f"verify {batch} {part}": row(work) for part, work in parts.items()}
        kernels[f"head {batch}"] = row(kernel_work.head(config, batch * block))
        kernels[f"cutoffs {batch}"] = row(kernel_work.cutoffs(config, batch * block))
    steps = {}
    for schedule in sizes.schedules:
        for batch in sizes.batches:
            for context in sizes.contexts:
                step = roofline.step(schedule, batch, context)
                shares = step_shares(roofline, schedule, batch, context, hardware)
                seconds = sum(shares.values())
                steps[f"{schedule.within(block).label} {batch} at {context}"] = {
                    "ms": _digits(1e3 * seconds), "of_roofline": _digits(step.seconds(hardware.peak) / seconds),
                    "launches": step.kernels, "parts_ms": {name: _digits(1e3 * part) for name, part in shares.items()},
                }  # fmt: skip
    names = "products", "copies", "attention_products", "attention_reads"
    assumed: dict[str, Any] = dict(zip(names, hardware.reached, strict=True))
    assumed |= {"launch_us": _digits(1e6 * hardware.launch), "basis": hardware.basis}
    return {"assumed": assumed, "kernels": kernels, "steps": steps}


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def text(made: dict[str, Any]) -> str:
    """The file, a row on a line."""
    rows: list[str] = []

    def folded(tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        if "ms" in tree:
            rows.append(json.dumps(tree))
            return f"row {len(rows) - 1}"
        return {name: folded(each) for name, each in tree.items()}

    whole = json.dumps(folded(made), indent=1)
    return re.sub(r'"row (\d+)"', lambda found: rows[int(found[1])], whole) + "\n"


if __name__ == "__main__":
    PATH.write_text(text(predictions()))
