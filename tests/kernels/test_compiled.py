"""What numba keeps on disk."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("numba")

from blockroll.kernels import compiled, lanes, registers
from blockroll.kernels.linear.numba import product_of

HEAD = "from blockroll.kernels.compiled import compiled\n"
CALLER = HEAD + "from called_by_it import inner\n@compiled()\ndef outer(x):\n    return inner(x)\n"
CALLED = HEAD + "@compiled()\ndef inner(x):\n    return x + {}\n"


def test_a_function_is_compiled_again_after_an_edit_of_what_it_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where that stands in another file; without an edit it comes from disk."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "calls_another.py").write_text(CALLER)
    for number, hits in ((1, 0), (1, 1), (2000, 0)):
        if not hits:
            (tmp_path / "called_by_it.py").write_text(CALLED.format(number))
        for name in ("calls_another", "called_by_it"):
            sys.modules.pop(name, None)
        from calls_another import outer

        assert outer(1) == 1 + number
        assert sum(outer.stats.cache_hits.values()) == hits


def test_the_files_that_write_the_code_of_intrinsics_count() -> None:
    """`product_of` calls an intrinsic, whose code functions and classes of another file write."""
    files = compiled._files(product_of.py_func)
    assert {product_of.py_func.__code__.co_filename, registers.__file__} <= files
    assert compiled._files(lanes.turn.py_func) == {lanes.__file__}


def test_a_compiled_function_stands_below_those_that_it_calls() -> None:
    """Where one calls what is defined further down, that is not known yet when its stamp is made, and an edit goes unseen."""
    root, count = Path(compiled.__file__).parents[1], 0
    for folder in ("kernels", "model", "rollout"):
        for file in sorted((root / folder).rglob("*.py")):
            if "\n@compiled(" in file.read_text(encoding="utf-8"):
                module = import_module(".".join(("blockroll", *file.relative_to(root).with_suffix("").parts)))
                for name, value in vars(module).items():
                    stamp = getattr(getattr(getattr(value, "_cache", None), "_cache_file", None), "_source_stamp", None)
                    if stamp is not None and value.py_func.__module__ == module.__name__:
                        assert stamp[1] == compiled._stamp(value.py_func), f"{module.__name__}: {name}"
                        count += 1
    assert count > 30
