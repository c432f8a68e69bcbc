"""The machine: processor, GPUs, limits of the process, memory, disk, clock. Nothing here imports torch, but `gpus`."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from ...rollout.host_memory import host_memory
from ..config import cores
from ..preflight import gpu_nodes
from .finding import Finding

OPEN_FILES = 4096
"""Least limit of open files: Ray and its workers hold some hundred sockets per engine."""
SHARED_GB = 0.25
"""Least free shared memory, GB: Ray's object store takes a weight version from there."""
DISK_GB = 2.0
"""Least free disk under the ledger and under Ray's temporary files, GB."""
RAY_FULL = 0.95
"""Share of a full disk from which on Ray stops creating objects."""
CLOCK_S = 5.0
"""Largest difference between this machine's clock and that of a file system, seconds: leases and logs are compared by time."""


def processor() -> Finding:
    """Architecture, cores and vector instructions."""
    flags: set[str] = set()
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "flags":
                flags = set(value.split())
            if name.strip() == "model name":
                model = value.strip()
    vectors = next((name for name in ("avx512f", "avx2", "sse2", "asimd") if name in flags), "none known")
    text = f"{model}, {platform.machine()}, {cores()} cores of {os.cpu_count()}, vector instructions: {vectors}"
    if platform.machine() not in ("x86_64", "AMD64", "aarch64", "arm64"):
        return Finding("processor", text, "warn", "engines are tested on x86-64 and ARM64")
    return Finding("processor", text)


def gpus() -> Iterator[Finding]:
    """Every GPU that torch sees, with its compute units; or why it sees none. Imports torch."""
    import torch

    nodes = gpu_nodes()
    if not torch.cuda.is_available():
        if not nodes:
            yield Finding("gpu", "none; engines run on the CPU")
            return
        makers = (("ROCm", torch.version.hip), ("CUDA", torch.version.cuda))
        built = next((f"{maker} {version}" for maker, version in makers if version), "CPUs only")
        yield Finding("gpu", f"{nodes[0]} is here and torch {torch.__version__}, built for {built}, sees no GPU", "fail",
                      "install the torch of the GPU's maker (configs/cluster/requirements-rocm.txt), or check the driver and "
                      "that this user may open the device files")  # fmt: skip
        return
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        architecture = getattr(found, "gcnArchName", "").partition(":")[0] or f"sm_{found.major}{found.minor}"
        units = "compute units" if torch.version.hip else "multiprocessors"
        free, total = torch.cuda.mem_get_info(number)
        text = (f"cuda:{number} {found.name}, {architecture}, {found.multi_processor_count} {units}, {free / 1e9:.0f} of "
                f"{total / 1e9:.0f} GB free")  # fmt: skip
        if architecture not in ("gfx942", "gfx950", "sm_90"):
            yield Finding("gpu", text, "warn", "kernels are compiled and checked for gfx942, gfx950 and sm_90")
        else:
            yield Finding("gpu", text)
    yield from gpu_host(torch.version.hip is not None, os.environ)


def visible_devices(environment: Mapping[str, str]) -> Finding:
    """The variables by which GPUs are hidden. Ray sets them for each engine and refuses ROCR_VISIBLE_DEVICES."""
    check = "visible devices"
    if (value := environment.get("ROCR_VISIBLE_DEVICES")) is not None:
        return Finding(check, f"ROCR_VISIBLE_DEVICES={value} is set, which Ray refuses", "fail",
                       f"unset it, and set HIP_VISIBLE_DEVICES={value} before Ray starts")  # fmt: skip
    hip, cuda = (environment.get(name) for name in ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"))
    if hip is not None and cuda is not None and hip != cuda:
        return Finding(check, f"HIP_VISIBLE_DEVICES={hip} and CUDA_VISIBLE_DEVICES={cuda} differ", "fail",
                       "unset CUDA_VISIBLE_DEVICES: on AMD the other one alone is used")  # fmt: skip
    seen = hip if hip is not None else cuda
    if seen is not None and not seen.strip(", ") and gpu_nodes():
        return Finding(check, "every GPU is hidden", "fail", "unset HIP_VISIBLE_DEVICES and CUDA_VISIBLE_DEVICES")
    return Finding(check, "all GPUs" if seen is None else f"GPUs {seen}")


def gpu_host(
    hip: bool, environment: Mapping[str, str], numa: Path = Path("/proc/sys/kernel/numa_balancing"),
    which: Callable[[str], str | None] = shutil.which,
) -> Iterator[Finding]:  # fmt: skip
    """What a host of GPUs is set to: the C compiler that Triton calls; on AMD where kernel arguments lie, and NUMA balancing,
    which stalls GPUs while it moves pages."""
    compiler = environment.get("CC") or next((name for name in ("cc", "gcc", "clang") if which(name)), None)
    if compiler is None:
        yield Finding("C compiler", "none", "fail", "install gcc or clang: Triton compiles a launcher for every kernel")
    else:
        yield Finding("C compiler", compiler)
    if not hip:
        return
    if environment.get("HIP_FORCE_DEV_KERNARG") != "1":
        yield Finding("kernel arguments", "in host memory: a launch takes 2 to 3 us longer", "warn",
                      "set HIP_FORCE_DEV_KERNARG=1")  # fmt: skip
    if numa.is_file() and numa.read_text().strip() not in ("", "0"):
        yield Finding("NUMA balancing", "on", "warn", f"turn it off on the host: echo 0 > {numa}")


def open_files() -> Finding:
    """The limit of open files. Ray raises the soft limit to the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{soft:,} now, {hard:,} at most"
    if hard != resource.RLIM_INFINITY and hard < OPEN_FILES:
        return Finding("open files", text, "fail", f"raise the limit to {OPEN_FILES:,} or more (limits.conf, or --ulimit nofile)")
    return Finding("open files", text)


def shared_memory(place: Path = Path("/dev/shm"), needed: float = SHARED_GB * 1e9) -> Finding:
    """Free shared memory, in bytes `needed`."""
    if not place.is_dir():
        return Finding("shared memory", f"{place} is not there: Ray keeps objects in files", "warn", "mount a tmpfs there")
    free = shutil.disk_usage(place).free
    text = f"{free / 1e9:.2f} GB free in {place}"
    if free < needed:
        return Finding("shared memory", text, "fail", f"give it {needed / 1e9:.2f} GB or more (--shm-size, or an emptyDir of "
                       "medium Memory)")  # fmt: skip
    return Finding("shared memory", text)


def disk(place: Path, needed: float = DISK_GB * 1e9) -> Finding:
    """Free disk under the nearest folder of `place` that is there, in bytes `needed`."""
    present = next(folder for folder in (place, *place.absolute().parents) if folder.is_dir())
    usage = shutil.disk_usage(present)
    text = f"{usage.free / 1e9:.1f} of {usage.total / 1e9:.1f} GB free under {place}"
    if usage.free < needed:
        return Finding("disk", text, "fail", f"free some: {needed / 1e9:.1f} GB are needed")
    if not os.access(present, os.W_OK):
        return Finding("disk", f"{present} cannot be written", "fail", "change its permissions or write somewhere else")
    return Finding("disk", text)


def ray_disk(place: Path = Path("/tmp")) -> Finding:
    """The disk of Ray's temporary files."""
    usage = shutil.disk_usage(place)
    if usage.used / usage.total > RAY_FULL:
        text = f"{place} is {usage.used / usage.total:.0%} full, and Ray creates no objects above {RAY_FULL:.0%}"
        return Finding("disk", text, "fail",
                       "free some, or set RAY_TMPDIR to another disk")  # fmt: skip
    return disk(place)


def memory() -> Finding:
    """Memory that processes may still take."""
    free = host_memory()[0]
    text = f"{free / 1e9:.1f} GB free"
    if free < 1e9:
        return Finding("memory", text, "warn", "an engine alone takes half a GB with torch")
    return Finding("memory", text)


def clock(place: Path, now: Callable[[], float] = time.time) -> Finding:
    """This machine's clock against that of the file system under `place`, which may be another machine's."""
    present = next(folder for folder in (place, *place.absolute().parents) if folder.is_dir())
    try:
        with tempfile.NamedTemporaryFile(dir=present) as file:
            file.write(b"x")
            file.flush()
            difference = now() - os.fstat(file.fileno()).st_mtime
    except OSError as error:
        return Finding("clock", f"cannot be compared with the file system under {present} ({error.strerror})", "warn",
                       "make it writable")  # fmt: skip
    if abs(difference) > CLOCK_S:
        return Finding("clock", f"{difference:+.0f} s from that of the file system under {present}", "fail",
                       "synchronise both machines (chrony or NTP)")  # fmt: skip
    return Finding("clock", f"within {CLOCK_S:g} s of the file system under {present}")
