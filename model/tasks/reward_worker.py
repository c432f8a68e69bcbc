"""The process in which a reward function runs. Run as a script; the standard library alone.

The function is the user's, and what it judges was written by a policy: it may take for ever or take the process down. So it has
a process and a session of its own, which `reward_process` ends. Lines of JSON pass through the standard input and the former
standard output; what the function prints goes to standard error. The process ends when its input does.

    {"path", "function", "timeout"}   ->  {"parameters": {name: has a default}, "any": takes any name, "together": calls run side
                                          by side} or {"refused": why}
    {"arguments": {..}}               ->  {"values": [..]}, {"error": why} or {"late": true}
    {"calls": [{..}, ..]}             ->  for each, in any order: {"call": i, "value": v}, or as above
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from numbers import Real
from typing import Any


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then ends this process
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()

    def tell(**answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")

    first = json.loads(lines.get())
    sys.path[:] = first["path"]
    try:
        function = _load(first["function"])
        parameters, any_name = _parameters(function)
    except _Refused as error:
        tell(refused=str(error))
        return
    together = inspect.iscoroutinefunction(function)
    tell(parameters=parameters, any=any_name, together=together)
    while True:
        message = json.loads(lines.get())
        if "arguments" in message:
            tell(**_called(function, message["arguments"], _values, first["timeout"]))
        elif together:
            asyncio.run(_together(function, message["calls"], first["timeout"], tell))
        else:
            for i, arguments in enumerate(message["calls"]):
                tell(call=i, **_called(function, arguments, _value, first["timeout"]))


class _Refused(Exception):
    """The function cannot be used."""


def _read(lines: queue.Queue[str]) -> None:
    for line in sys.stdin:
        lines.put(line)
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)  # also what the function has started
    os._exit(0)


def _load(name: str) -> Any:
    module_name, _, path = name.partition(":")
    try:
        found = module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise _Refused(f"there is no module {error.name!r} in {os.getcwd()} or among the installed packages") from error
        raise _Refused(f"its module cannot be imported ({_line(error)})") from error
    except BaseException as error:  # whatever a module of the user's does
        raise _Refused(f"its module cannot be imported ({_line(error)})") from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise _Refused(f"{getattr(module, '__file__', None) or module_name} has no {path!r}")
        found = getattr(found, part)
    if not callable(found):
        raise _Refused(f"it is no function but of type {type(found).__name__}")
    return found


def _parameters(function: Any) -> tuple[dict[str, bool], bool]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise _Refused(f"its parameters are unknown ({error})") from error
    for p in parameters:
        if p.kind is p.POSITIONAL_ONLY:
            raise _Refused(f"its parameter {p.name!r} has no name to callers")
    named = {p.name: p.default is not p.empty for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _called(function: Any, arguments: dict[str, Any], read: Any, timeout: float) -> dict[str, Any]:
    """One call. A coroutine that waits too long is cancelled."""
    began = time.monotonic()
    try:
        found = function(**arguments)
        return read(asyncio.run(_within(found, timeout)) if inspect.isawaitable(found) else found)
    except BaseException as error:  # the function is the user's; SystemExit included
        return _raised(error, began, timeout)


async def _within(found: Any, timeout: float) -> Any:
    return await asyncio.wait_for(found, timeout)


async def _together(function: Any, calls: list[dict[str, Any]], timeout: float, tell: Any) -> None:
    """Calls of a coroutine function, side by side."""

    async def call(i: int, arguments: dict[str, Any]) -> None:
        began = time.monotonic()
        try:
            answer = _value(await asyncio.wait_for(function(**arguments), timeout))
        except BaseException as error:
            answer = _raised(error, began, timeout)
        tell(call=i, **answer)

    await asyncio.gather(*(call(i, arguments) for i, arguments in enumerate(calls)))


def _raised(error: BaseException, began: float, timeout: float) -> dict[str, Any]:
    late = isinstance(error, TimeoutError) and time.monotonic() - began >= timeout
    return {"late": True} if late else {"error": f"raised {_line(error)}"}


def _values(found: Any) -> dict[str, Any]:
    if hasattr(found, "tolist"):
        found = found.tolist()
    if not isinstance(found, list | tuple):
        return {"error": f"returned {_shown(found)}, no list"}
    values = []
    for i, each in enumerate(found):
        value = _value(each)
        if "error" in value:
            return {"error": f"{value['error']} at place {i}"}
        values.append(value["value"])
    return {"values": values}


def _value(found: Any) -> dict[str, Any]:
    if hasattr(found, "item") and not isinstance(found, Real):  # a tensor of one number
        try:
            found = found.item()
        except (ValueError, RuntimeError, TypeError):
            pass
    if found is None:
        return {"value": None}
    if not isinstance(found, Real):
        return {"error": f"returned {_shown(found)}, no number"}
    return {"value": float(found)}


def _shown(value: Any) -> str:
    text = " ".join(repr(value)[:200].split())
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:60] + '...'}"


def _line(error: BaseException) -> str:
    """An error and the place in the user's code that it comes from, on one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__ and "importlib" not in f.filename]
    return f"{text}, {frames[-1].filename} line {frames[-1].lineno}" if frames else text


if __name__ == "__main__":
    main()
