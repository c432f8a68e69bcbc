"""The directory of a run: its files, and how one run replaces another.

Invariants:
- At every moment the files of an earlier run lie whole in one place, or in two that `recover` joins again. A kill at any point
  loses none of them.
- An earlier run is given up when the run that replaces it has started, and not before.

    .replaced.part    files of the earlier run are on their way into it or out of it; nothing else was touched
    .replaced         the whole earlier run; beside it lie files of a run that has not started
    .discarded        an earlier run that was given up
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ....errors import ConfigError
from ....files import storing
from ....rollout.sample_lines import CONFIG, ROLLOUTS
from .attachment import ATTACHMENT
from .checkpoint import NAME
from .metrics import METRICS

SUMMARY, REPORT, POLICY, LEDGER = "summary.json", "report.png", "policy", "ledger.sqlite"
_PART, _REPLACED, _DISCARDED = ".replaced.part", ".replaced", ".discarded"


def run_files(output: Path) -> list[Path]:
    """The files and directories of a run that are in the directory."""
    names = (CONFIG, METRICS, ROLLOUTS, SUMMARY, REPORT, NAME, POLICY, ATTACHMENT)
    return [*(output / name for name in names if (output / name).exists()), *sorted(output.glob(f"{LEDGER}*"))]


def recover(output: Path) -> None:
    """Puts back what a killed start had set aside, and removes what a kill left half-written. Can be repeated."""
    with storing(output):
        for path in output.glob(".*-*.part*"):
            _remove(path)
        _remove(output / _DISCARDED)
        if (output / _REPLACED).exists():
            for path in run_files(output):
                _remove(path)
            (output / _REPLACED).rename(output / _PART)
        if (output / _PART).exists():
            for path in (output / _PART).iterdir():
                path.rename(output / path.name)
            (output / _PART).rmdir()


@contextmanager
def replacing(output: Path, overwrite: bool, kept: bool) -> Iterator[Callable[[], None]]:
    """Sets an earlier run aside. Puts it back when the block fails before it has called the function that is yielded.

    Args:
        kept: the earlier run is gone on with.

    Raises:
        ConfigError: there is an earlier run, and neither `overwrite` nor `kept` is set.
    """
    present = run_files(output)
    if present and kept:
        yield lambda: None
        return
    if present and not overwrite:
        raise ConfigError("output", f"{output} holds a run ({present[0].name})",
                          "go on with it (--resume), replace it (--overwrite) or give another directory")
    started = False

    def settle() -> None:
        nonlocal started
        started = True
        if present:
            (output / _REPLACED).rename(output / _DISCARDED)
            _remove(output / _DISCARDED)

    try:
        if present:
            with storing(output):
                (output / _PART).mkdir()
                for path in present:
                    path.rename(output / _PART / path.name)
                (output / _PART).rename(output / _REPLACED)
        yield settle
    finally:
        if not started:
            if not present:
                for path in run_files(output):
                    _remove(path)
            recover(output)


def _remove(path: Path) -> None:
    """Removes a file or a directory; what is not there is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
