"""The harness itself sees what it is to see: memory, time, files, and processes that are left."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Case, ForkServer, ended_by

FAULTS = [
    Case("a traceback", program="raise KeyError('x')"),
    Case("an answer of no error", program="print(1)"),
    Case("another word", ("--nonsense",), says=("no such word",)),
    Case("too slow", program="import time; time.sleep(1); raise blockroll.errors.InvalidInput('a', 'b', 'c')", seconds=0.5),
    Case("too large", program="x = b'x' * (1 << 28); raise blockroll.errors.InvalidInput('a', 'b', 'c')", memory=1 << 27),
    Case("a file", program="open('new', 'w'); raise blockroll.errors.InvalidInput('a', 'b', 'c')"),
    Case("a changed file", files={"old": "1"}, program="open('old', 'w'); raise blockroll.errors.InvalidInput('a', 'b', 'c')"),
    Case("a process", program="import subprocess; subprocess.Popen(['sleep', '60'], start_new_session=True);"
                              "raise blockroll.errors.InvalidInput('a', 'b', 'c')"),
]  # fmt: skip


@pytest.mark.parametrize("case", FAULTS, ids=str)
def test_faults_are_found(case: Case, edges: ForkServer, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        edges.check(case, tmp_path)


def test_one_line_with_its_words_passes(edges: ForkServer, tmp_path: Path) -> None:
    program = "raise blockroll.errors.InvalidInput('field', 'value', 'remedy')"
    outcome = edges.check(Case("good", program=program, says=("field", "value", "remedy")), tmp_path)
    assert outcome.seconds < 2 and outcome.memory < 1 << 27


def test_a_process_that_hangs_is_killed_and_says_so(edges: ForkServer, tmp_path: Path) -> None:
    outcome = edges.run(Case("hang", program="import time; time.sleep(60)", seconds=-2.25), tmp_path)
    assert outcome.status == ended_by(9)
