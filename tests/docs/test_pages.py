"""Every code block of the README and of docs/ runs, page by page, in its order; every link leads somewhere.

Blocks of Python between two blocks of shell are one program. A page runs in a directory of its own, beside `configs` and
`examples`. A block behind `<!-- not run: REASON -->` is not run. A block of YAML must be a configuration, or a section of one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pytest
import yaml

from blockroll.errors import ConfigError
from blockroll.model.conversion.config import ConversionConfig
from blockroll.service import config
from blockroll.service.config import ServiceConfig
from blockroll.settings import Config, parse
from blockroll.trainer_bridge.trainers.grpo.config import GrpoConfig

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(str(page.relative_to(ROOT)) for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")))
QUICK = {"docs/index.md", "docs/glossary.md", "docs/operations.md"}
"""Pages whose code takes less than a few seconds; the others train, or start a service."""
REASONS = ("needs ", "is run by ")
BLOCK = re.compile(r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)")


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    reason: str | None


def blocks(page: str) -> Iterator[Block]:
    for found in BLOCK.finditer((ROOT / page).read_text()):
        yield Block(found["language"], found["text"], found["reason"])


def run(command: list[str], text: str, folder: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, text], cwd=folder, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", [pytest.param(page, marks=[pytest.mark.slow] * (page not in QUICK)) for page in PAGES])
def test_the_code_of_a_page_runs(page: str, tmp_path: Path) -> None:
    for name in ("configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    ran = [block for block in blocks(page) if block.reason is None and block.language in ("sh", "python")]
    for language, group in groupby(ran, key=lambda block: block.language):
        parts = [block.text for block in group]
        if language == "python":
            run([sys.executable, "-c"], "\n".join(parts), tmp_path)
        else:
            for part in parts:
                run(["bash", "-euo", "pipefail", "-c"], part, tmp_path)


@pytest.mark.parametrize("page", PAGES)
def test_what_is_not_run_has_its_reason_and_configurations_are_valid(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "cores", lambda: 256)  # pages describe larger machines
    for block in blocks(page):
        assert block.language in ("sh", "python", "yaml", "json", "jsonl", "text"), f"a block of {block.language!r}"
        assert block.reason is None or block.reason.startswith(REASONS), block.reason
        if block.language == "yaml":
            kinds = ServiceConfig, GrpoConfig, ConversionConfig
            assert any(accepts(yaml.safe_load(block.text), kind) for kind in kinds), block.text
        if block.language in ("json", "jsonl"):
            for line in block.text.splitlines() if block.language == "jsonl" else [block.text]:
                json.loads(line)


def accepts(values: dict[str, object], kind: type[Config]) -> bool:
    """Whether the values are a configuration of this kind, or a section of one."""
    least: dict[str, object] = {ServiceConfig: {"policy": "tiny-reasoner"}, GrpoConfig: {"output": "runs/x"}}.get(kind, {})
    try:
        parse({**least, **values}, kind, "page")
    except ConfigError as error:
        print(kind.__name__, error)
        return False
    return True


@pytest.mark.parametrize("page", [*PAGES, "ARCHITECTURE.md", "CONTRIBUTING.md", "kernels/README.md", "configs/cluster/README.md"])
def test_links_lead_somewhere(page: str) -> None:
    for target in LINK.findall((ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"


def test_the_site_is_built(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    (tmp_path / "mkdocs.yml").write_text((ROOT / "mkdocs.yml").read_text())
    command = [str(Path(sys.executable).parent / "zensical"), "build", "--strict", "--clean", "--config-file", "mkdocs.yml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    listed = (ROOT / "mkdocs.yml").read_text()
    for page in (path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")):
        assert str(page) in listed, f"{page} is not in the site's navigation"
        assert (tmp_path / "build/site" / page.with_suffix("").as_posix().removesuffix("index")).is_dir()
