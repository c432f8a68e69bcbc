"""verl's platform for a machine without accelerators: its FSDP engine trains small policies on CPUs, over gloo.

    VERL_PLATFORM=blockroll_cpu python -m verl.trainer.main_ppo ... +ray_kwargs.ray_init.num_gpus=1

Ray is told of as many GPUs as there are training processes, because verl places workers by that resource. None is used.

What is changed in verl: one name, `get_device_name` in `verl.utils.distributed`, where this platform is chosen. It names the
second device of the process group `cpu:gloo,DEVICE:BACKEND`, and torch refuses a device that is named twice.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from verl.plugin.platform import get_platform
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

from .engine_vendor import VENDOR

NAME = "blockroll_cpu"
"""The value of VERL_PLATFORM."""


class _Device(types.ModuleType):
    """What verl calls of `torch.cuda`, for the CPU."""

    def __init__(self) -> None:
        super().__init__("cpu")
        for name in ("empty_cache", "synchronize", "set_device", "manual_seed", "manual_seed_all", "reset_peak_memory_stats",
                     "ipc_collect"):
            setattr(self, name, lambda *_, **__: None)
        for name in ("max_memory_allocated", "max_memory_reserved", "memory_allocated", "memory_reserved"):
            setattr(self, name, lambda *_, **__: 0)
        self.mem_get_info = lambda *_, **__: (0, 0)
        self.is_available = lambda: False
        self.get_device_name = lambda *_: "CPU"
        self.device_count = lambda: 1
        self.current_device = lambda: "cpu"

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)


@PlatformRegistry.register(platform=NAME)
class CpuPlatform(PlatformBase):
    """One device, `cpu`. Chosen by VERL_PLATFORM alone, never found by looking at the machine."""

    device_name = "cpu"
    vendor_name = VENDOR
    device_module = _Device()

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return False

    def current_device(self) -> Any:
        """The device to move tensors to."""
        return "cpu"

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        """Nothing: there is one device."""

    def synchronize(self, device_index: int | None = None) -> None:
        """Nothing: no operation is asynchronous."""

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        """Nothing: the settings are those of an accelerator's allocator."""

    def empty_cache(self) -> None:
        """Nothing."""

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        """Nothing."""

    def profiler_stop(self) -> None:
        """Nothing."""

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        """None."""


def complete() -> None:
    """Changes the name in verl where this platform was chosen."""
    if isinstance(get_platform(), CpuPlatform):
        from verl.utils import distributed

        distributed.get_device_name = lambda: "cuda"
