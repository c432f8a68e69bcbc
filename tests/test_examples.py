"""Every file in examples/ runs, and says what it promises."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SAYS = {
    "generate.py": ["Q:47+85-12", "120", "tokens per forward"],
    "constrained.py": ["'\\nA:", "stop"],
    "search.py": ["120", "samples", "tokens"],
    "policy_gradient.py": ["differ by at most", "version 1"],
}


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SAYS)


@pytest.mark.parametrize("name", SAYS)
def test_an_example(name, capsys):
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    printed = capsys.readouterr().out
    for text in SAYS[name]:
        assert text in printed
