"""Makes `random_zaya` importable, and random policies whose logits really depend on their context."""

from __future__ import annotations

import http.client  # noqa: F401  before pytest gives tests/service/http, a package, the name `http`
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Kernels run in Triton's interpreter here. It asks once, when triton is first imported, which transformers does.
os.environ["TRITON_INTERPRET"] = "1"

import pytest

if TYPE_CHECKING:
    import torch

    from blockroll.model.policy import Policy

sys.path.insert(0, str(Path(__file__).parent))
# More than a hundred processes import the package. Where they may not keep bytecode, each of them compiles it.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


@pytest.fixture(autouse=True)
def _logging_stays_as_it_was() -> Iterator[None]:
    """A command sends the package's log lines elsewhere, in this process too."""
    logger = logging.getLogger("blockroll")
    before = logger.propagate, logger.level, list(logger.handlers)
    yield
    logger.propagate, logger.handlers = before[0], before[2]
    logger.setLevel(before[1])


LONG = (
    "grpo/test_grpo.py", "cluster/live/", "service/http/", "service/test_commands.py", "test_check.py",
    "test_engine_distribution.py", "test_engine_device.py", "test_examples.py", "test_huggingface_kernels.py",
    "rollout/test_golden.py", "rollout/bench/test_gpu.py", "test_cli_bad_input.py",
    "test_distributed.py", "test_engine.py", "wire/test_sockets.py", "trainer_bridge/test_recovery.py",
)  # fmt: skip
"""The files and folders that take longest start first, so that no process is left alone with one at the end."""
ONE_PROCESS = ("tests/edges/", "tests/rollout/cluster/live/", "tests/service/http/")
"""Folders whose files run in one process, and so share what lives as long as the folder's package, or as the process."""


DECODE = """
import blockroll
engine = blockroll.Engine("tiny-reasoner")
for sampler in ("ar", "lossless", "coupled", "mixed"):
    engine.generate("Q:1+2\\nS:", blockroll.SamplingParams(sampler=sampler, max_tokens=8))
"""
COMPILING = pytest.StashKey[subprocess.Popen[bytes]]()
"""DECODE, where it is run."""


def pytest_sessionstart(session: pytest.Session) -> None:
    """Readies torch and Triton where tests run. The process that hands out tests runs none, and imports neither.

    On a machine that has not decoded yet numba compiles once, before several processes would each do so at the same time. It
    does while they collect the tests; they are given none until it is done.
    """
    root, several = Path(__file__).parents[1], session.config.pluginmanager.hasplugin("dsession")
    if not hasattr(session.config, "workerinput") and not any((root / "kernels").rglob("*.nbi")):
        session.config.stash[COMPILING] = subprocess.Popen([sys.executable, "-c", DECODE])
        if not several:
            _wait_until_compiled(session.config)
    if not several:
        import torch

        torch.set_num_threads(1)
        if find_spec("triton") is not None:
            import ordered_dot
            import quick_interpreter

            ordered_dot.install()
            quick_interpreter.install()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any) -> None:
    _wait_until_compiled(node.config)


def _wait_until_compiled(config: pytest.Config) -> None:
    if COMPILING in config.stash:
        assert config.stash[COMPILING].wait(600) == 0, "the program that makes numba compile failed"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is marked slow may take its time, beside another slow test on a slow machine too."""
    items.sort(key=lambda item: next((place for place, name in enumerate(LONG) if name in str(item.path)), len(LONG)))
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(1800))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Files go to whichever process is free, the folders of ONE_PROCESS each as if it were one file."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((folder for folder in ONE_PROCESS if nodeid.startswith(folder)), super()._split_scope(nodeid))

    return Scheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Step times that tests measure are kept apart from the user's."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def make_policy():
    """make_policy(dtype=, seed=, sharpness=, **config): a random policy."""
    import torch
    from random_zaya import randomise, zaya_config

    from blockroll.model.policy import Policy

    def make(dtype: torch.dtype = torch.float64, seed: int = 0, sharpness: float = 1.0, **changes) -> Policy:
        policy = Policy(zaya_config(**changes))
        randomise(policy, seed, sharpness)
        return policy.to(dtype).requires_grad_(False).eval()

    return make
