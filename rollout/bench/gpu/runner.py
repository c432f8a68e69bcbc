"""Runs the sections, each in processes of its own, and writes what is known so far after every item.

Invariants:
- The parent never touches the device. A child announces an item, runs it, and writes its row whole; an item that was
  announced and has no row when its child ends is what ended it.
- A child that hangs is ended at its item's limit. One that lost the device ends itself; a fresh one takes the next item.
"""

from __future__ import annotations

import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from ....errors import InvalidInput
from ....files import append_jsonl, check_output, write_json
from .report import summarise, text, write_plot

_WEIGHTS = {"ceilings": 1, "host": 0.5, "compile": 2, "correctness": 1.5, "kernels": 1.5, "training": 1.5, "steps": 4}
"""Sections, and how the whole time is shared among those that run. What one leaves is the next one's."""
SECTIONS = tuple(_WEIGHTS)
_ITEM_SECONDS = 100.0
"""Most seconds of one item, compilation included."""
_START_SECONDS = 120.0
"""Most seconds until a child announces its first item."""
_CLOSING_SECONDS = 5.0
MAX_MINUTES = 10_080
"""A week."""
_LOST = 3
"""Exit status of a child whose device is lost."""


def items(section: str, dry: bool) -> tuple[list[str], Callable[[str], dict[str, Any]]]:
    """Names of a section's items, and what runs one. Imports torch."""
    import torch

    from . import compilation
    from .checks import CHECKS, checked
    from .kernels import KernelBench
    from .sizes import DEVICE, DRY
    from .steps import StepBench
    from .timing import CEILINGS

    sizes, device = (DRY, torch.device("cpu")) if dry else (DEVICE, torch.device("cuda"))
    if section == "ceilings":
        return list(CEILINGS), lambda name: CEILINGS[name](sizes, device)
    if section == "host":
        from .host import items as host_items

        host = host_items(dry)
        return list(host), lambda name: host[name]()
    if section == "compile":
        ahead = compilation.items(dry)
        return list(ahead), lambda name: ahead[name]()
    if section == "correctness":
        return list(CHECKS), lambda name: checked(name, sizes, device)
    if section == "kernels":
        kernels = KernelBench(sizes, device)
        return list(kernels.items), lambda name: kernels.items[name]()
    if section == "training":
        from .training import TrainingBench  # asks for more than the others (see the package)

        training = TrainingBench(sizes, device)
        return list(training.items), training.run
    steps = StepBench(sizes, device)
    return steps.order, steps.run


def child(section: str, path: Path, deadline: float, dry: bool) -> int:
    """Run the items of a section that `path` has no line for; returns the exit status."""
    import torch

    from ....kernels.dispatch import using

    names, run = items(section, dry)
    lines, here = _lines(path), machine(dry)
    if lines and lines[0].get("resumed") and not _same(lines[0]["machine"], here):
        path.unlink()  # another device, or other versions
        lines = []
    if not any("items" in line and "resumed" not in line for line in lines):
        append_jsonl(path, {"items": names, "machine": here})
    known = {line["item"] for line in _lines(path) if "item" in line}
    for name in names:
        if name in known:
            continue
        if time.time() > deadline:
            append_jsonl(path, {"item": name, "skipped": "no time left"})
            continue
        append_jsonl(path, {"item": name})
        try:
            with torch.inference_mode(), using("triton" if dry else "auto"):
                row = run(name)
        except Exception as error:  # recorded, and the next item goes on
            row = {"error": f"{type(error).__name__}: {error}"[:2000], "traceback": traceback.format_exc()[-3000:]}
            if isinstance(error, torch.cuda.OutOfMemoryError):
                torch.cuda.empty_cache()
            elif any(said in str(error) for said in ("CUDA error", "HIP error", "[CUDA]", "[HIP]")):  # torch's words, Triton's
                append_jsonl(path, {"item": name, "row": row})
                return _LOST
        append_jsonl(path, {"item": name, "row": _plain(row)})
    return 0


def _same(mine: dict[str, Any], its: dict[str, Any]) -> bool:
    """Whether two runs had the same machine."""
    return {**mine, "date": ""} == {**its, "date": ""}


def _plain(value: Any) -> Any:
    """The value as JSON can hold it; NaN and infinities as text."""
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, bool | int | float | str) or value is None else str(value)


def machine(dry: bool) -> dict[str, Any]:
    """Device, versions and date (UTC)."""
    import torch
    import transformers
    import triton

    return {
        "device": platform.machine() if dry else torch.cuda.get_device_name(0),
        "dry_run": dry,
        "versions": {
            "torch": torch.__version__, "triton": triton.__version__, "transformers": transformers.__version__,
            "python": platform.python_version(), "cuda": torch.version.cuda, "hip": torch.version.hip,
        },
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }  # fmt: skip


def _lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines only: the child may be writing the next one."""
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def _finished(output: Path) -> dict[str, Any]:
    """{"machine", "sections"} of an earlier run's file: the items that gave a result. Empty where there is no such file."""
    try:
        found = json.loads(output.read_text())
        sections = {
            section: {name: row for name, row in rows.items() if not {"error", "skipped"} & row.keys()}
            for section, rows in found["sections"].items()
        }
        return {"machine": found["machine"], "sections": sections}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {"machine": {}, "sections": {}}


def bench_gpu(output: Path, minutes: float = 9.0, dry: bool = False, sections: tuple[str, ...] = SECTIONS,
              everything: bool = False, resume: bool = False) -> bool:
    """The whole bench; writes `output` as it goes, a plot beside it, and prints the tables. Returns whether all checks were made
    and hold.

    Args:
        minutes: of the clock, start and compilation included.
        resume: keep what `output` holds of an earlier run on the same device with the same versions; run the rest.
        dry: the same code on a CPU through Triton's interpreter, on a few numbers.
        everything: print every table.
    Raises:
        InvalidInput: no accelerator, or an unknown section.
    """
    import torch

    if unknown := set(sections) - set(SECTIONS):
        raise InvalidInput("sections", f"unknown section {min(unknown)!r}", f"use {', '.join(SECTIONS)}")
    if not 0 < minutes <= MAX_MINUTES:
        raise InvalidInput("minutes", f"{minutes} is outside 0..{MAX_MINUTES}", "use a number such as 9")
    check_output(output)
    check_output(output.with_suffix(".png"), output)
    if not dry and not torch.cuda.is_available():
        raise InvalidInput("device", "torch sees no accelerator here", "run it on one, or give --dry-run")
    start, earlier = time.time(), _finished(output) if resume else {"machine": {}, "sections": {}}
    result: dict[str, Any] = {"machine": {}, "minutes": minutes, "sections": {}}
    whole, done = sum(_WEIGHTS[section] for section in sections), 0.0
    for section in sections:
        path = output.with_name(f".{output.name}.{section}.jsonl")
        path.unlink(missing_ok=True)
        if known := earlier["sections"].get(section):
            append_jsonl(path, {"items": list(known), "machine": earlier["machine"], "resumed": True})
            for name, row in known.items():
                append_jsonl(path, {"item": name, "row": row})
        done += _WEIGHTS[section]
        limit = start + 60 * minutes * done / whole - _CLOSING_SECONDS
        try:
            _section(section, path, limit, dry, partial(_collect, result, section, path, output))
        finally:
            _collect(result, section, path, output)
            path.unlink(missing_ok=True)
    result["seconds"] = time.time() - start
    made = _write(result, output)
    if "summary_error" not in made:
        print(text(made, everything), flush=True)
        write_plot(made, output.with_suffix(".png"))
    return all(row.get("ok", False) for row in result["sections"].get("correctness", {}).values())


def _section(section: str, path: Path, deadline: float, dry: bool, collect: Callable[[], None]) -> None:
    """Children until every item has its line, or no time is left."""
    environment = dict(os.environ)
    if dry:
        environment["TRITON_INTERPRET"] = "1"
    else:
        environment.pop("TRITON_INTERPRET", None)
    barren = 0
    while time.time() < deadline and barren < 2:
        before = len(_lines(path))
        command = [sys.executable, "-m", __package__, "--section", section, "--lines", str(path), "--deadline", str(deadline)]
        with tempfile.TemporaryFile("w+") as said:
            command += ["--dry-run"] if dry else []
            process = subprocess.Popen(command, env=environment, stderr=said, start_new_session=True)
            try:
                why = _watch(process, path, deadline, collect)
            finally:
                _end(process)
            said.seek(0)
            last = said.read()[-1500:].strip()
        if process.returncode == 0:
            return
        lines = _lines(path)
        if lines and lines[-1].keys() == {"item"}:
            why = why or f"the process ended with status {process.returncode}: {last}"
            append_jsonl(path, {"item": lines[-1]["item"], "row": {"error": why}})
        barren = barren + 1 if len(_lines(path)) == before else 0
        if barren:
            print(f"{section}: {last}", file=sys.stderr, flush=True)


def _watch(process: subprocess.Popen[bytes], path: Path, deadline: float, collect: Callable[[], None]) -> str:
    """Wait until the child ends. Returns why it was ended, or an empty text if it ended by itself."""
    before = seen = len(_lines(path))
    since = time.time()
    while process.poll() is None:
        time.sleep(0.2)
        count = len(_lines(path))
        if count != seen:
            seen, since = count, time.time()
            collect()
        late = time.time() > deadline + _CLOSING_SECONDS / 2
        limit = _ITEM_SECONDS if count > before else _START_SECONDS
        if late or time.time() - since > limit:
            _end(process)
            return "the time of its section was over" if late else f"took more than {limit:.0f} s"
    return ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the child, and every process that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _collect(result: dict[str, Any], section: str, path: Path, output: Path) -> None:
    """The section's lines into the result, and the result into `output`."""
    lines = _lines(path)
    found: dict[str, Any] = {}
    for line in lines:
        if "machine" in line:
            result["machine"] = result["machine"] or line["machine"]
            found = {name: {"skipped": "no time left"} for name in line["items"]} | found
        elif "row" in line:
            found[line["item"]] = line["row"]
    result["sections"][section] = found
    _write(result, output)


def _write(result: dict[str, Any], output: Path) -> dict[str, Any]:
    """The summary as JSON; what was measured must not be lost to a fault in it."""
    try:
        made = summarise(result)
    except Exception:
        made = {**result, "summary_error": traceback.format_exc()}
    write_json(output, made)
    return made
