"""`python -m blockroll.kernels.isa.tighten check.json`: enters the figures of `blockroll kernels check --json check.json` into
`bounds.json`, under the Triton version that compiled them.

Invariants:
- A figure that is worse than its bound stops the command before it writes anything. `--loosen` accepts it.
- A report of all variants of a kernel and target removes the bounds of variants that are gone. A report of `--quick` removes none.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .bounds import PATH, Entries, key, minor, worse
from .figures import MORE_IS_BETTER


def worst(launches: list[Mapping[str, Any]]) -> Entries:
    """The worst figures of each variant."""
    found: Entries = {}
    for launch in launches:
        if launch["figures"] is None:
            continue
        name, figures = key(launch["target"], f"{launch['op']}.{launch['kernel']}", launch["variant"]), launch["figures"]
        old = found.get(name, figures)
        found[name] = {
            each: (min if each in MORE_IS_BETTER else max)(old[each], figures[each]) for each in figures
        }
    return found


def tightened(
    before: Mapping[str, Entries], report: Mapping[str, Any], loosen: bool = False
) -> tuple[dict[str, Entries], list[str]]:
    """The file's new content, and the bounds that it would loosen or drop. Without `loosen` those keep their old value."""
    version = minor(report["versions"]["triton"])
    entries = dict(before.get(version, {}))
    seen = worst(report["launches"])
    looser = []
    for name, figures in seen.items():
        old = entries.get(name, {})
        for figure, value in figures.items():
            if figure in old and worse(figure, value, old[figure]):
                looser.append(f"{name}: {figure} {value:g}, bound {old[figure]:g}")
        entries[name] = {
            figure: old[figure] if figure in old and worse(figure, value, old[figure]) and not loosen else value
            for figure, value in figures.items()
        }
    if not report["quick"]:
        whole = {(each["target"], f"{each['op']}.{each['kernel']}") for each in report["launches"]}
        entries = {name: each for name, each in entries.items() if name in seen or tuple(name.split()[:2]) not in whole}
    return {**before, version: dict(sorted(entries.items()))}, looser


def text(content: Mapping[str, Entries]) -> str:
    """The file, an entry on a line."""
    blocks = []
    for version, entries in sorted(content.items()):
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(figures)}" for name, figures in entries.items())
        blocks.append(f" {json.dumps(version)}: {{\n{lines}\n }}")
    return "{\n" + ",\n".join(blocks) + "\n}\n" if blocks else "{}\n"


def main(arguments: list[str], path: Path = PATH) -> int:
    """Returns the exit status: 1 where bounds would have to be loosened."""
    loosen = "--loosen" in arguments
    before = json.loads(path.read_text()) if path.exists() else {}
    content = before
    for report in (each for each in arguments if each != "--loosen"):
        content, looser = tightened(content, json.loads(Path(report).read_text()), loosen)
        if looser and not loosen:
            print("\n".join(looser))
            print(f"{len(looser)} figures are worse than their bounds; nothing is written. --loosen accepts them.")
            return 1
    path.write_text(text(content))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
