"""A folder imports only from the floors below it, and light parts stay importable without the heavy ones."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import grimp
import pytest
from importlinter.application import use_cases
from importlinter.configuration import configure

ROOT = Path(__file__).resolve().parents[2]
FLOORS = ["kernels", "model", "rollout", "trainer_bridge", "service", "cli"]
KERNELS_MAY_IMPORT = {"numpy", "torch", "triton", "numba", "llvmlite"}


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("blockroll", include_external_packages=True, cache_dir=None)


def test_import_contracts_hold(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))  # import-linter adds the working directory
    configure()
    kept = use_cases.lint_imports(config_filename=str(ROOT / "pyproject.toml"), cache_dir=None)
    assert kept, capsys.readouterr().out


def test_contracts_speak_of_every_folder_and_root_module(graph: grimp.ImportGraph) -> None:
    """A new folder or root module must be given a floor, or the contracts would pass it over."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    placed = {name.strip() for layer in layers for name in layer.split("|")}
    assert placed == graph.find_children("blockroll")


def test_kernels_know_tensors_only(graph: grimp.ImportGraph) -> None:
    outside = {
        imported
        for module in {"blockroll.kernels", *graph.find_descendants("blockroll.kernels")}
        for imported in graph.find_modules_directly_imported_by(module)
        if not imported.startswith("blockroll.kernels")
    }
    assert outside - KERNELS_MAY_IMPORT - sys.stdlib_module_names == set()


def test_errors_import_nothing(graph: grimp.ImportGraph) -> None:
    assert graph.find_modules_directly_imported_by("blockroll.errors") <= {"__future__"}


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("blockroll", {"torch", "transformers", "ray", "zmq", "pydantic", "numpy"}),
        ("blockroll.errors", {"torch", "numpy", "pydantic"}),
        ("blockroll.files", {"torch", "numpy", "pydantic"}),
        ("blockroll.cli", {"torch", "transformers", "ray", "zmq", "pydantic", "numpy"}),
        ("blockroll.rollout.types", {"torch", "ray", "zmq", "pydantic"}),
        ("blockroll.trainer_bridge.client", {"ray", "torch", "transformers", "trl", "blockroll.rollout.engine"}),
        ("blockroll.trainer_bridge.adapters", {"torch", "transformers", "trl"}),
        ("blockroll.trainer_bridge.client.sample_source", {"ray", "torch", "transformers", "blockroll.rollout.engine"}),
        ("blockroll.rollout.search.driver", {"ray", "zmq", "torch", "transformers", "pydantic"}),
    ],
)
def test_light_parts_import_without_heavy_ones(module: str, unwanted: set[str], tmp_path: Path) -> None:
    program = f"import sys, {module}; print(*({unwanted!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


HEAVY = {
    "blockroll.rollout.bench.gpu.runner": {"ray", "zmq", "pydantic", "typer", "rich"},
    "blockroll.rollout.engine": {"ray", "zmq", "pydantic"},
    "blockroll.trainer_bridge.adapters.policy_model": {"trl"},
}
"""Each imports torch, which takes seconds, so one process imports all of them in this order."""


def test_heavy_parts_import_without_what_they_do_not_use(tmp_path: Path) -> None:
    lines = [f"import {module}; print({module!r}, *({unwanted!r} & sys.modules.keys()))" for module, unwanted in HEAVY.items()]
    program = "\n".join(["import sys", *lines])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == list(HEAVY)


def test_no_import_cycles() -> None:
    """No two modules import each other, directly or through others. Imports inside functions count; names that only annotations
    use do not."""
    graph = grimp.build_graph("blockroll", exclude_type_checking_imports=True, cache_dir=None)
    ours = {module for module in graph.modules if module.split(".")[0] == "blockroll"}
    imports = {module: graph.find_modules_directly_imported_by(module) & ours for module in ours}
    while leaves := {module for module, imported in imports.items() if not imported}:
        imports = {module: imported - leaves for module, imported in imports.items() if module not in leaves}
    # What is left is in a cycle, or imports one.
    cycles = {module for module in imports if any(graph.find_shortest_chain(other, module) for other in imports[module])}
    assert sorted(cycles) == []


def test_no_source_file_over_350_lines() -> None:
    folders = [ROOT / name for name in FLOORS]
    sources = [*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources}
    assert {name: length for name, length in lengths.items() if length > 350} == {}
