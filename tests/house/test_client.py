"""The client is small, light, documented and typed: what a trainer's process meets first."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import blockroll
from blockroll.trainer_bridge import client
from blockroll.trainer_bridge.client.async_client import AsyncRolloutClient
from blockroll.trainer_bridge.client.async_control import AsyncServiceControl

ROOT = Path(__file__).resolve().parents[2]
MOST_NAMES = 12
MOST_SECONDS = 0.3
HEAVY = {"torch", "transformers", "ray", "pydantic", "numba", "triton", "asyncio", "sqlite3"}
FACE = ("AsyncRolloutClient", "Conversation", "RolloutClient", "RolloutRequest", "SamplingParams", "Trajectory", "connect",
        "converse", "converse_async")  # fmt: skip
"""What of `blockroll` a trainer in another process needs."""


def test_the_client_has_few_names_and_each_is_documented() -> None:
    assert len(client.__all__) <= MOST_NAMES and len(FACE) <= MOST_NAMES
    assert set(FACE) <= set(blockroll.__all__)
    for name in (*FACE, *client.__all__):
        thing = getattr(blockroll, name, None) or getattr(client, name)
        assert inspect.getdoc(thing), name
        for method, function in inspect.getmembers(thing, inspect.isfunction) if inspect.isclass(thing) else ():
            assert method.startswith("_") or inspect.getdoc(function), f"{name}.{method}"


@pytest.mark.parametrize("name", ["submit", "results", "generate", "cancel", "acknowledge", "push_weights", "status", "close"])
def test_the_asyncio_twin_has_the_same_calls(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(each, name)) for each in (AsyncRolloutClient, client.RolloutClient))
    assert ours.parameters == theirs.parameters


def test_the_asyncio_twin_of_control_has_its_calls() -> None:
    for name in ("status", "scale", "pause", "resume", "paused", "abort", "reset_prefix_cache", "push_weights", "load_weights",
                 "label_version"):  # fmt: skip
        ours, theirs = (inspect.signature(getattr(each, name)) for each in (AsyncServiceControl, client.ServiceControl))
        assert ours.parameters == theirs.parameters


def test_the_client_is_imported_fast_and_alone() -> None:
    program = ("import sys, time; began = time.process_time(); from blockroll import Conversation, RolloutClient, connect; "
               f"print(time.process_time() - began, *({HEAVY!r} & sys.modules.keys()))")  # fmt: skip
    seconds = []
    for _ in range(3):  # the first one may compile
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        spent, *heavy = done.stdout.split()
        assert heavy == []
        seconds.append(float(spent))
    assert min(seconds) < MOST_SECONDS


def test_a_typed_program_passes_strict_checks(tmp_path: Path) -> None:
    """As a user's checker sees the package: with its types, without those of the libraries that the client does not need."""
    (tmp_path / "blockroll").symlink_to(ROOT)
    (tmp_path / "mypy.ini").write_text("[mypy]\nstrict = true\n[mypy-torch.*,transformers.*,numba.*,triton.*,ray.*,safetensors.*,"
                                       "pydantic.*]\nfollow_imports = skip\nignore_missing_imports = true\n")  # fmt: skip
    program = (ROOT / "tests/house/typed_client.py").read_text()
    mistakes = {"client.submit([1])": "RolloutRequest", "client.generate(timeout='1')": '"timeout"',
                "client.results(on_error='ignore')": '"on_error"', "client.nothing()": '"nothing"'}  # fmt: skip
    for wrong in ({}, mistakes):
        lines = "".join(f"    {line}\n" for line in wrong) or "    pass\n"
        (tmp_path / "program.py").write_text(f"{program}\n\ndef wrong(client: RolloutClient) -> None:\n{lines}")
        command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", "cache", "program.py"]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == bool(wrong), done.stdout + done.stderr
        for says in wrong.values():
            assert says in done.stdout


def test_the_typed_program_uses_every_call() -> None:
    program = ast.parse((ROOT / "tests/house/typed_client.py").read_text())
    used = {node.attr for node in ast.walk(program) if isinstance(node, ast.Attribute)}
    for name in ("submit", "results", "generate", "cancel", "acknowledge", "push_weights", "status", "delivery", "version",
                 "control", "pause", "resume", "paused", "abort"):  # fmt: skip
        assert name in used
