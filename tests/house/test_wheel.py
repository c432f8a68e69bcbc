"""The wheel holds exactly what the tree holds: a forgotten package or data file fails here, not at a user's."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLOORS = ["kernels", "model", "rollout", "trainer_bridge", "service", "cli"]
BUILD_FILES = ["pyproject.toml", "README.md", "LICENSE"]


def _shipped() -> set[str]:
    """Paths, relative to the root, of everything that an installed blockroll needs."""
    files = {path.name for path in ROOT.glob("*.py")} | {"py.typed"}
    for floor in FLOORS:
        files |= {
            path.relative_to(ROOT).as_posix()
            for path in (ROOT / floor).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
    return files


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built without network or isolation, from a copy: old build folders of the checkout must not count."""
    copy = tmp_path_factory.mktemp("tree")
    for name in [*_shipped(), *BUILD_FILES]:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    # What must stay out of the wheel although it lies beside the packages.
    for name in ["tests/test_x.py", "runs/x/metrics.jsonl", "configs/x.yaml"]:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("")
    out = copy / "dist"
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out.parent, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "would be ignored" not in done.stdout + done.stderr, "setuptools sees a package that is not listed"
    return zipfile.ZipFile(next(out.glob("blockroll-*.whl")))


def test_wheel_holds_the_tree(wheel: zipfile.ZipFile) -> None:
    held = {name.removeprefix("blockroll/") for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == _shipped()


def test_wheel_installs_the_command_and_the_licence(wheel: zipfile.ZipFile) -> None:
    info = next(name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt")).rpartition("/")[0]
    assert "blockroll = blockroll.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
    assert "Apache License" in wheel.read(f"{info}/licenses/LICENSE").decode()


def test_installed_files_import_from_outside_the_tree(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    program = "import blockroll, blockroll.kernels, blockroll.cli; print(blockroll.__file__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).parent == tmp_path / "blockroll"


def test_an_image_keeps_its_torch_and_triton() -> None:
    """ROCm's Triton has another name on PyPI: nothing that a user of an image installs may ask for `triton`, or for a torch that
    is newer than an image's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for wanted in (project["dependencies"], extras["checks"], extras["data"]):
        assert not [each for each in wanted if each.startswith("triton")]
    assert "torch>=2.9,<3" in project["dependencies"]
    assert extras["test"] == ["blockroll[checks,triton]"]
