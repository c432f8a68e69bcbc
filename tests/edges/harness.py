"""Runs inputs that are hostile or careless, each in a process forked from one warm server that has imported the package.

One input is a `Case`: arguments of `blockroll`, or a Python program whose errors are printed as the command line prints them, in
a fresh directory with the files it names. `ForkServer.run` gives an `Outcome`: exit status, streams, seconds, memory, files that
appeared or changed, processes left behind. `check` asserts what every input must keep:

- the exit status that the case states; for 2, exactly one line on stderr, `error: ...`, that holds every word of the case;
- no file that the case does not name in `makes`, and no file changed;
- no process left, at most 5 s, and at most 1 GB above `blockroll --version`.

A table of cases is one test, so that a test session starts few servers:

    CASES = [Case("n is text", ("generate", ..., "--n", "x"), {"in.jsonl": "..."}, says=("--n", "'x'")), ...]

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_arguments(case, edges, tmp_path):   # `edges`: the fixture of conftest.py
        edges.check(case, tmp_path)

A case of the library or the bridge gives `program` instead of `argv`: `program="blockroll.connect('x', timeout=nan)"`.
No case names a device or a file of the machine as an output: code at fault, run by root, would replace it.

Programs see `blockroll`, `np`, `torch`, `inf` and `nan`. Modules that a table needs beside `WARM` are imported by its programs.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECONDS = 5.0
"""Most seconds of one input."""
MEMORY = 1 << 30
"""Most bytes of one input above the idle command."""

File = bytes | str | Callable[[Path], object]
"""What a file holds, or a function that makes something else (a FIFO, a link, a directory) at the path."""


@dataclass(frozen=True)
class Case:
    """One input, and what must come of it.

    Attributes:
        argv: arguments of `blockroll`. program: Python text that runs in their place.
        files: by path relative to the case's directory, which is the working directory; parents are made.
        stdin: what the standard input holds.
        status: exit status; 128 + n where signal n is to end the process by the system's own hand.
        says: words that the line on stderr must hold. Text only: stdout is free.
        makes: paths of files that may appear, relative.
        signal, when: this signal is sent when a path that matches the pattern `when` appears, or at once for "".
        environment: variables of the process.
        user: user id that the process takes, where root runs the tests; 0 for none.
        seconds, memory: limits.
    """

    name: str
    argv: tuple[str, ...] = ()
    files: Mapping[str, File] = field(default_factory=dict)
    program: str | None = None
    stdin: bytes = b""
    status: int = 2
    says: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()
    signal: int = 0
    when: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    user: int = 0
    seconds: float = SECONDS
    memory: int = MEMORY

    def __str__(self) -> str:
        return self.name


def words(row: str) -> tuple[str, ...]:
    """What a row of a table says: `n:, 0, 1 to 65536` are three words."""
    return tuple(row.split(", "))


@dataclass(frozen=True)
class Outcome:
    """What became of one input.

    Attributes:
        status: exit status; 128 + n after signal n.
        memory: bytes at the peak above the idle command.
        appeared, changed: relative paths.
        left: command lines of processes that outlived it.
    """

    status: int
    stdout: str
    stderr: str
    seconds: float
    memory: int
    appeared: tuple[str, ...]
    changed: tuple[str, ...]
    left: tuple[str, ...]


class ForkServer:
    """A process that has imported the package and forks one child per input. One input at a time; not for threads."""

    def __init__(self) -> None:
        program = Path(__file__).with_name("fork_server.py")
        self._process = subprocess.Popen([sys.executable, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._idle = 0
        self._idle = self._ask({"argv": ["--version"], "directory": "/", "streams": "/dev/null", "seconds": 60.0,
                                "memory": 1 << 40})["peak"]

    def run(self, case: Case, directory: Path) -> Outcome:
        """Lays the case's files out under `directory`/case and runs it there."""
        place, streams = directory / "case", directory / "streams"
        place.mkdir()
        for name, content in case.files.items():
            path = place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if callable(content):
                content(path)
            else:
                path.write_bytes(content.encode() if isinstance(content, str) else content)
        streams.write_bytes(case.stdin)
        if case.user:
            for path in (directory, place, *place.rglob("*")):
                os.chown(path, case.user, case.user, follow_symlinks=False)
        before = _listing(place)
        answer = self._ask({
            "argv": list(case.argv), "program": case.program, "directory": str(place), "streams": str(streams),
            "seconds": 2 * case.seconds + 5, "memory": self._idle + 2 * case.memory, "signal": case.signal, "when": case.when,
            "environment": dict(case.environment), "user": case.user,
        })  # fmt: skip
        after = _listing(place)
        return Outcome(
            answer["status"], _text(directory / "streams.out"), _text(directory / "streams.err"), answer["seconds"],
            answer["peak"] - self._idle, tuple(sorted(after.keys() - before.keys())),
            tuple(sorted(path for path, kind in before.items() if after.get(path) != kind)), tuple(answer["left"]),
        )  # fmt: skip

    def check(self, case: Case, directory: Path) -> Outcome:
        """Runs a case and asserts what the module's docstring says."""
        outcome = self.run(case, directory)
        assert outcome.status == case.status, outcome
        assert "Traceback" not in outcome.stderr, outcome
        if case.status == 2:
            assert outcome.stderr.startswith("error: ") and outcome.stderr.count("\n") == 1, outcome
            assert len(outcome.stderr) < 2000, outcome
        for word in case.says:
            assert word in outcome.stderr, (word, outcome)
        unexpected = [path for path in outcome.appeared if path not in case.makes]
        assert not unexpected and not outcome.changed, outcome
        assert not outcome.left, outcome
        assert outcome.seconds <= case.seconds, outcome
        assert outcome.memory <= case.memory, outcome
        return outcome

    def close(self) -> None:
        """Ends the server."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the fork server ended with {self._process.poll()}"
        return json.loads(answer)


def ended_by(number: int) -> int:
    """The exit status of a process that signal `number` ended, as shells state it."""
    return 128 + number


def fifo(path: Path) -> None:
    """Makes a named pipe that nobody writes to."""
    os.mkfifo(path)


def link_to(target: str) -> Callable[[Path], object]:
    """Makes a symbolic link to `target`."""
    return lambda path: path.symlink_to(target)


def folder(path: Path) -> None:
    """Makes a directory."""
    path.mkdir()


def sparse(size: int) -> Callable[[Path], object]:
    """Makes a file of `size` zero bytes that takes no room on the disk."""

    def make(path: Path) -> None:
        with open(path, "wb") as file:
            file.truncate(size)

    return make


def _listing(place: Path) -> dict[str, object]:
    """Every path under `place`, with what would tell that it was changed."""
    found: dict[str, object] = {}
    for path in place.rglob("*"):
        about = path.lstat()
        kind: object = (stat.S_IFMT(about.st_mode), about.st_rdev)
        if stat.S_ISLNK(about.st_mode):
            kind = (kind, os.readlink(path))
        elif stat.S_ISREG(about.st_mode):
            kind = (kind, about.st_size, about.st_mtime_ns, about.st_ino)
        found[str(path.relative_to(place))] = kind
    return found


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


SIGTERM, SIGINT = signal.SIGTERM, signal.SIGINT
