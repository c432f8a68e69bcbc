"""Our folder `kernels` and Hugging Face's package `kernels` do not meet, wherever Python is started.

transformers imports that package as soon as it finds a version it knows. Started in the repository, the working
directory comes first on `sys.path`, and the name finds our folder.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.utils import import_utils

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import transformers
from transformers import ZayaConfig, ZayaForCausalLM
from transformers.utils import is_kernels_available
import blockroll.kernels, kernels
from kernels.layer.mode import Mode
print(is_kernels_available(), kernels.__file__, blockroll.kernels.__file__)
"""


def _run(program: str, folder: Path, *search: Path) -> list[str]:
    path = os.pathsep.join(str(entry) for entry in search)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=folder, timeout=240,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture
def wanted_version(tmp_path: Path) -> Path:
    """A folder that makes the installed package's version one that transformers uses, whichever that is today."""
    info = tmp_path / f"kernels-{import_utils.KERNELS_MIN_VERSION}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: kernels\nVersion: {import_utils.KERNELS_MIN_VERSION}\n"
    )
    return tmp_path


@pytest.mark.parametrize("inside", [
    pytest.param(True, id="started-in-the-repository"),
    pytest.param(False, id="started-elsewhere", marks=pytest.mark.slow),  # where our folder is not on the path by itself
])
def test_transformers_uses_the_installed_package(inside: bool, wanted_version: Path, tmp_path: Path) -> None:
    installed = Path(str(importlib.metadata.distribution("kernels").locate_file("kernels/__init__.py"))).resolve()
    available, theirs, ours = _run(PROGRAM, ROOT if inside else tmp_path, wanted_version)
    assert available == "True"
    assert Path(theirs).resolve() == installed
    assert Path(ours).resolve() == ROOT / "kernels" / "__init__.py"


def test_transformers_imports_beside_the_version_installed() -> None:
    """Of a version it does not know, transformers makes no use; it must come to that conclusion without failing."""
    program = "import transformers; from transformers import ZayaForCausalLM; print(42)"
    assert _run(program, ROOT) == ["42"]
