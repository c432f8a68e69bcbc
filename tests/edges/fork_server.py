"""The warm process of `harness.ForkServer`: reads one question per line, forks, answers with one line.

Invariants:
- A child that outlives its limits of time or memory is killed, with all its descendants; the answer then states SIGKILL.
- The server is the reaper of its descendants, so a process that a child leaves behind is found whatever session it is in.
- What the server imports it imports before the first fork, and it starts no thread.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from ctypes import CDLL
from math import inf, nan
from pathlib import Path
from typing import Any

WARM = (
    "numpy", "torch", "torch._dynamo", "transformers", "blockroll.cli", "blockroll.rollout.offline",
    "blockroll.rollout.evaluation.report", "blockroll.rollout.conversion.convert", "blockroll.rollout.conversion.ablation",
    "blockroll.rollout.bench.decode", "blockroll.rollout.bench.planner", "blockroll.rollout.bench.gpu.runner",
    "blockroll.rollout.planning.plan", "blockroll.trainer_bridge.client", "blockroll.trainer_bridge.trainers.grpo.run",
    "blockroll.service.lifecycle",
)  # fmt: skip
TICK_S = 0.02
LEFT_S = 2.0
"""Seconds that descendants of a child may take to end after it."""
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of <linux/prctl.h>


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a module prints at import is no answer
    CDLL(None).prctl(_SUBREAPER, 1)
    for name in WARM:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    sys.dont_write_bytecode = True  # what Python keeps of a user's modules is no file of the command
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    for line in sys.stdin:
        answers.write(json.dumps(serve(json.loads(line))) + "\n")
        answers.flush()


def serve(question: dict[str, Any]) -> dict[str, Any]:
    """Runs one input."""
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        child(question)
    peak = watch(pid, start, question)
    _, status, usage = os.wait4(pid, 0)
    seconds = time.monotonic() - start
    return {"status": os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status),
            "seconds": seconds, "peak": max(peak, usage.ru_maxrss * 1024), "left": left_behind()}  # fmt: skip


def child(question: dict[str, Any]) -> None:
    """Becomes the command; does not return."""
    status = 1
    try:
        os.setsid()
        atexit._clear()  # those of the modules imported before take 35 ms, and find nothing to do but for Ray's
        streams = question["streams"]
        discard = streams == "/dev/null"
        for number, path, flags in ((0, streams, os.O_RDONLY), (1, streams + ".out", os.O_WRONLY | os.O_CREAT),
                                    (2, streams + ".err", os.O_WRONLY | os.O_CREAT)):
            os.dup2(os.open("/dev/null" if discard else path, flags), number)
        os.chdir(question["directory"])
        os.environ |= question.get("environment", {})
        if user := question.get("user", 0):
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        status = command(question)
    except BaseException:
        traceback.print_exc()
    finally:
        # As the interpreter ends: threads that are no daemons, exit functions, streams.
        threading._shutdown()  # type: ignore[attr-defined]
        ray = sys.modules.get("ray")
        if ray is not None and ray.is_initialized():
            ray.shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def command(question: dict[str, Any]) -> int:
    """Runs the command line, or a program in its place; returns the exit status."""
    import numpy as np
    import torch

    import blockroll
    from blockroll import cli

    program = question.get("program")
    sys.argv = ["blockroll", *question["argv"]]
    if program is not None:
        names = {"blockroll": blockroll, "np": np, "torch": torch, "inf": inf, "nan": nan, "__name__": "__main__"}
        cli.app = lambda *_, **__: exec(compile(program, "<program>", "exec"), names)  # type: ignore[assignment]
    try:
        cli.main()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else (0 if ended.code is None else 1)
    return 0


def watch(pid: int, start: float, question: dict[str, Any]) -> int:
    """Waits for the child, sends it the signal that is asked for, and kills it beyond its limits; returns its peak in bytes."""
    descriptor, peak, send = os.pidfd_open(pid), 0, question.get("signal", 0)
    place, pattern = Path(question["directory"]), question.get("when", "")
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while not poll.poll(1000 * TICK_S):
        peak = max(peak, resident(pid))
        if send and (not pattern or next(place.glob(pattern), None) is not None):
            os.kill(pid, send)
            send = 0
        if time.monotonic() - start > question["seconds"] or peak > question["memory"]:
            os.kill(pid, signal.SIGKILL)
            break
    os.close(descriptor)
    return peak


def resident(pid: int) -> int:
    """Bytes in memory; 0 for a process that has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def left_behind() -> list[str]:
    """Command lines of descendants that do not end by themselves within LEFT_S; they are killed."""
    end = time.monotonic() + LEFT_S
    while (pids := descendants()) and time.monotonic() < end:
        time.sleep(TICK_S)
    names = []
    while pids := descendants():
        for pid in pids:
            try:
                names.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip())
                os.kill(pid, signal.SIGKILL)
            except OSError:
                continue
        time.sleep(TICK_S)
    return names


def descendants() -> list[int]:
    """Children of this process that run, once those that have ended are reaped."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return []
    return [int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]


if __name__ == "__main__":
    main()
