"""`python -m blockroll.rollout.bench.gpu`: the bench without the command line's own dependencies."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ....errors import BlockrollError
from .runner import SECTIONS, bench_gpu, child


def main() -> int:
    """Returns the exit status: 1 where a check failed, 2 for what cannot be run."""
    parser = argparse.ArgumentParser(prog="blockroll.rollout.bench.gpu", description="Measure kernels and decode steps.")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="written as it goes, a plot beside it")
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="which, in this order")
    parser.add_argument("--resume", action="store_true", help="keep what the file holds, run what it lacks")
    parser.add_argument("--dry-run", action="store_true", help="a few numbers on a CPU through Triton's interpreter")
    parser.add_argument("--all", action="store_true", help="print every table")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.section:
        return child(options.section, options.lines, options.deadline, options.dry_run)
    try:
        good = bench_gpu(options.json, options.minutes, options.dry_run, tuple(options.sections.split(",")), options.all,
                         options.resume)
    except BlockrollError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
