"""torch, Triton and Ray beside each other."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping
from importlib import metadata

from packaging.requirements import Requirement

from .finding import Finding

_TRITON = re.compile(r"(pytorch-)?triton(-rocm)?$")
LEAST_RAY = (2, 52)
"""First Ray with token authentication."""


def triton() -> Finding:
    """Whether the Triton is the one that the installed torch was built with."""
    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return Finding("torch and triton", "torch is not installed", "fail", "pip install -c constraints.txt -e .")
    wanted = [r for r in map(Requirement, metadata.requires("torch") or []) if _TRITON.match(r.name)]
    installed = {name: version for name in ("triton", "triton-rocm", "pytorch-triton", "pytorch-triton-rocm")
                 if (version := _version(name)) is not None}  # fmt: skip
    have = ", ".join(f"{name} {version}" for name, version in installed.items()) or "no triton"
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        version = installed.get(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wants = f"{requirement.name}{requirement.specifier}"
            return Finding("torch and triton", f"torch {torch} needs {wants}, and {have} is installed", "fail",
                           f"pip install '{wants}'")
    return Finding("torch and triton", f"torch {torch} with {have}")


def ray(cluster: Mapping[str, str] | None = None) -> Finding:
    """Whether this Ray and Python are those of a cluster, which says `ray_version` and `python_version`. None: Ray is ours."""
    mine = {"ray_version": _version("ray") or "none", "python_version": platform.python_version()}
    text = f"Ray {mine['ray_version']}, Python {mine['python_version']}"
    if cluster is not None:
        for name, what in (("ray_version", "Ray"), ("python_version", "Python")):
            if cluster.get(name) != mine[name]:
                return Finding("ray", f"{text} here, and the cluster has {what} {cluster.get(name)}", "fail",
                               f"install {what} {cluster.get(name)} here, or the same image on every node")  # fmt: skip
    numbers = tuple(int(part) for part in re.findall(r"\d+", mine["ray_version"])[:2])
    if numbers < LEAST_RAY:
        return Finding("ray", text, "warn", "install Ray 2.52 or newer, which authenticates by tokens")
    return Finding("ray", text)


def ray_token(address: str | None, environment: Mapping[str, str]) -> Finding:
    """Whether a Ray that other machines can reach asks for a token."""
    if address is None or environment.get("RAY_AUTH_MODE") == "token":
        return Finding("ray token", "not needed: Ray is this service's own" if address is None else "RAY_AUTH_MODE=token")
    return Finding("ray token", f"{address} is used without a token: whoever reaches it runs programs there", "warn",
                   "set RAY_AUTH_MODE=token on every node, and make a token with `ray get-auth-token --generate`")  # fmt: skip


def cluster_versions(address: str) -> dict[str, str]:
    """What a Ray cluster says of itself. Raises RuntimeError where it does not answer. Imports Ray."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled

    text = GcsClient(address=address).internal_kv_get(b"CLUSTER_METADATA", b"cluster", timeout=10)
    return dict(json.loads(text)) if text else {}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None

