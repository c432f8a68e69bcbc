"""Commands of a service as a user runs them: in processes, in a directory of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

RUN = """
output: run
policy: tiny-reasoner
steps: 4
tasks: {families: [products, chain_sum], prompts_per_step: 6, samples_per_prompt: 4}
rollouts: {max_tokens: 64}
evaluation: {tasks: 6}
save_policy: false
"""
"""A short run of `blockroll grpo`."""
MARK = "BLOCKROLL_TEST_SERVICE"
PROGRAM = "import sys; from blockroll.cli import main; sys.argv[0] = 'blockroll'; main()"


class Commands:
    """Runs commands in a directory; every process that comes of them has a mark in its environment."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = os.environ | {MARK: str(directory)}

    def start(self, *arguments: object, program: str = PROGRAM) -> subprocess.Popen[str]:
        """A command that goes on."""
        return subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)], cwd=self.directory, env=self.environment,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip

    def run(self, *arguments: object, status: int = 0, program: str = PROGRAM) -> str:
        """Standard output of a command that ends with `status`; the one line of its error where that is 2."""
        done = self.start(*arguments, program=program)
        out, err = done.communicate(timeout=300)
        assert done.returncode == status, (arguments, done.returncode, out, err)
        if status == 2:
            assert err.startswith("error: ") and len(err.splitlines()) == 1, err
            return err.strip()
        return out

    def status(self, config: Path) -> dict[str, Any]:
        """The object of `status --json`."""
        return json.loads(self.run("status", config, "--json"))

    def processes(self) -> list[psutil.Process]:
        """Every living process with the mark."""
        found = []
        for process in psutil.process_iter(["environ", "status"]):
            marked = (process.info["environ"] or {}).get(MARK) == str(self.directory)
            if marked and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found

    def end(self) -> None:
        """Ends whatever a failed test has left."""
        for process in self.processes():
            process.kill()

    def wait_until_none_is_left(self, seconds: float = 30.0) -> None:
        """Every process has ended within `seconds`."""
        end = time.monotonic() + seconds
        while left := self.processes():
            assert time.monotonic() < end, [process.cmdline() for process in left]
            time.sleep(0.2)
