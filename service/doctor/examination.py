"""Runs every check and prints the findings."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from ...settings import load_yaml
from ..config import ServiceConfig
from . import machine, packages, service
from .finding import Finding


def findings(config: ServiceConfig | None) -> Iterator[Finding]:
    """Every finding, each as soon as it is known; of a service where its configuration is given."""
    yield machine.processor()
    yield from machine.gpus()
    yield packages.triton()
    yield packages.ray()
    yield packages.ray_token(None if config is None else config.ray.address, os.environ)
    yield machine.visible_devices(os.environ)
    yield machine.open_files()
    yield machine.memory()
    yield machine.ray_disk()
    if config is None:
        yield machine.shared_memory()
        yield machine.clock(Path())
    else:
        yield from service.check(config)
    from . import kernels  # imports torch

    yield from kernels.check()


def examine(path: Path | None, *, as_json: bool) -> bool:
    """Prints one line per finding, or one JSON list; whether nothing fails. Raises ConfigError for a broken file."""
    config = None if path is None else load_yaml(path, ServiceConfig)
    found = []
    for finding in findings(config):
        found.append(finding)
        if not as_json:
            print(finding, flush=True)
    if as_json:
        print(json.dumps([asdict(finding) for finding in found], indent=2))
    return all(finding.state != "fail" for finding in found)
