"""`blockroll doctor` finds what is planted, and finds nothing on a machine that works."""

from __future__ import annotations

import json
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from blockroll.service.config import ServiceConfig
from blockroll.service.doctor import Finding, examine, kernels, machine, packages, service
from blockroll.service.policy_files import find
from blockroll.settings import parse
from blockroll.trainer_bridge.gateway import ledger_policy
from blockroll.trainer_bridge.gateway.ledger import Ledger
from blockroll.trainer_bridge.wire.key_files import make_keys


def config(tmp_path: Path, **sections: object) -> ServiceConfig:
    delivery = {"ledger": str(tmp_path / "ledger.sqlite"), **sections.pop("delivery", {})}  # type: ignore[dict-item]
    return parse({"policy": "tiny-reasoner", "engines": {"count": 1}, **sections, "delivery": delivery}, ServiceConfig, "test")


def failing(findings: Iterator[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.state == "fail"]


def test_a_machine_that_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "service.yaml"
    path.write_text(f"policy: tiny-reasoner\nengines: {{count: 1}}\ndelivery: {{ledger: {tmp_path}/ledger.sqlite}}\n")
    good = examine(path, as_json=True)
    found = [Finding(**entry) for entry in json.loads(capsys.readouterr().out)]
    assert [str(finding) for finding in found if finding.state == "fail"] == [] and good
    checks = {finding.check for finding in found}
    assert {"processor", "gpu", "torch and triton", "ray", "visible devices", "open files", "shared memory", "clock", "disk",
            "pool", "port", "keys", "kernel philox", "kernel linear", "kernel verify"} <= checks  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["service.yaml"]


def planted_device_variable(tmp_path: Path, patch: pytest.MonkeyPatch) -> Iterator[Finding]:
    yield machine.visible_devices({"ROCR_VISIBLE_DEVICES": "0,1"})


def planted_triton(tmp_path: Path, patch: pytest.MonkeyPatch) -> Iterator[Finding]:
    """A torch that says it was built with another Triton, first on the path."""
    for name, version, needs in (("torch", "2.99.0", "Requires-Dist: triton==3.99.0\n"), ("triton", "3.1.0", "")):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
    patch.syspath_prepend(str(tmp_path))
    yield packages.triton()


def planted_keys(tmp_path: Path, patch: pytest.MonkeyPatch) -> Iterator[Finding]:
    folder = make_keys(tmp_path / "keys")
    (folder / "control.key").chmod(0o644)
    yield from service.keys(config(tmp_path, delivery={"keys": str(folder)}))


def planted_port(tmp_path: Path, patch: pytest.MonkeyPatch) -> Iterator[Finding]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield from service.check(config(tmp_path, delivery={"bind": f"tcp://127.0.0.1:{taken.getsockname()[1]}"}))


def planted_pool(tmp_path: Path, patch: pytest.MonkeyPatch) -> Iterator[Finding]:
    yield from service.check(config(tmp_path, engines={"count": 1, "pages": 10**9}))


def planted_policy(tmp_path: Path, patch: pytest.MonkeyPatch) -> Iterator[Finding]:
    yield from service.check(config(tmp_path, policy=str(tmp_path / "nothing")))


def planted_ledger(tmp_path: Path, patch: pytest.MonkeyPatch) -> Iterator[Finding]:
    ledger_policy.claim(tmp_path / "ledger.sqlite", "another", "0123")
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.record_version(1, b"x")
    ledger.close()
    yield from service.check(config(tmp_path))


def planted_disk(tmp_path: Path, patch: pytest.MonkeyPatch) -> Iterator[Finding]:
    yield machine.disk(tmp_path, needed=shutil.disk_usage(tmp_path).total)


def planted_shared_memory(tmp_path: Path, patch: pytest.MonkeyPatch) -> Iterator[Finding]:
    yield machine.shared_memory(tmp_path, needed=shutil.disk_usage(tmp_path).total)


def planted_open_files(tmp_path: Path, patch: pytest.MonkeyPatch) -> Iterator[Finding]:
    program = "from blockroll.service.doctor import machine; print(machine.open_files())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512)))  # fmt: skip
    state, _, rest = done.stdout.partition("  ")
    yield Finding("open files", rest.strip(), state.strip(), "raise the limit")  # type: ignore[arg-type]


def planted_clock(tmp_path: Path, patch: pytest.MonkeyPatch) -> Iterator[Finding]:
    yield machine.clock(tmp_path, now=lambda: time.time() + 3600)


def planted_ray_version(tmp_path: Path, patch: pytest.MonkeyPatch) -> Iterator[Finding]:
    yield packages.ray({"ray_version": "2.9.3", "python_version": sys.version.split()[0]})


def planted_ray_address(tmp_path: Path, patch: pytest.MonkeyPatch) -> Iterator[Finding]:
    yield service.ray_cluster("127.0.0.1:9")


def planted_gpu(tmp_path: Path, patch: pytest.MonkeyPatch) -> Iterator[Finding]:
    patch.setattr("blockroll.service.preflight.gpu_nodes", lambda: [])
    yield from service.check(config(tmp_path, engines={"count": 1, "device": "cuda", "num_gpus": 1}))


def planted_kernel(tmp_path: Path, patch: pytest.MonkeyPatch) -> Iterator[Finding]:
    from blockroll.kernels.linear import numba

    def one_row_wrong(x: np.ndarray, panels: np.ndarray, out: np.ndarray) -> None:
        numba.product_of(x, 0, len(x) - 1, panels, out)

    patch.setattr(numba, "product", one_row_wrong)
    yield from kernels.check()


FAULTS: dict[str, tuple[Callable[[Path, pytest.MonkeyPatch], Iterator[Finding]], str]] = {
    "visible devices": (planted_device_variable, "unset it, and set HIP_VISIBLE_DEVICES=0,1"),
    "torch and triton": (planted_triton, "pip install 'triton==3.99.0'"),
    "keys": (planted_keys, "chmod 600 "),
    "port": (planted_port, "choose a free port"),
    "pool": (planted_pool, "give fewer pages"),
    "policy": (planted_policy, "give one, or a shipped name"),
    "ledger": (planted_ledger, "name another ledger"),
    "disk": (planted_disk, "free some"),
    "shared memory": (planted_shared_memory, "--shm-size"),
    "open files": (planted_open_files, "raise the limit"),
    "clock": (planted_clock, "synchronise"),
    "ray": (planted_ray_version, "install Ray 2.9.3"),
    "ray cluster": (planted_ray_address, "ray start --head"),
    "device": (planted_gpu, "use device: cpu"),
    "kernel linear": (planted_kernel, "do not use this machine"),
}


@pytest.mark.parametrize("check", FAULTS)
def test_a_planted_fault_is_found_and_says_what_to_fix(check: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, fix = FAULTS[check]
    found = failing(plant(tmp_path, monkeypatch))
    # A policy that is missing also leaves the sizes of its pool unknown; a product is part of a forward pass.
    assert check in [finding.check for finding in found] and len(found) <= 1 + (check in ("policy", "kernel linear"))
    [fault] = [finding for finding in found if finding.check == check]
    assert fix in fault.fix and "\n" not in str(fault)


def test_the_shipped_policies_are_found() -> None:
    assert (find("tiny-reasoner") / "model.safetensors").is_file()


def test_settings_of_a_host_of_gpus(tmp_path: Path) -> None:
    numa = tmp_path / "numa_balancing"

    def said(hip: bool, environment: dict[str, str], value: str, *compilers: str) -> list[tuple[str, str]]:
        numa.write_text(value)
        found = machine.gpu_host(hip, environment, numa, lambda name: name if name in compilers else None)
        return [(each.check, each.state) for each in found]

    assert said(False, {}, "1\n", "gcc") == [("C compiler", "ok")]
    assert said(True, {"HIP_FORCE_DEV_KERNARG": "1", "CC": "amdclang"}, "0\n") == [("C compiler", "ok")]
    assert said(True, {}, "1\n") == [("C compiler", "fail"), ("kernel arguments", "warn"), ("NUMA balancing", "warn")]
