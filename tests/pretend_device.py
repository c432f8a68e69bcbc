"""An accelerator that is not there: tensors that say they are on `cuda:0`, compute on the CPU, and keep the device's rules.

    with PretendDevice() as device:  # or PretendDevice(1), which is cuda:1
        policy.to("cuda:0")
        ...
        device.waits

- Factories, `.to("cuda:0")` and operations on what they give make `Away` tensors; the data behind each is an ordinary tensor.
- An operation that meets an `Away` tensor and a tensor of the host with dimensions raises, as CUDA does. So does an index of
  the host, which CUDA would take, at the price of a copy.
- Whatever would make the host wait for the device is noted in `waits`, by name: values read back, sizes that depend on
  values, and copies to the device that are not both pinned and `non_blocking`.
- Kernels run in Triton's interpreter and refuse tensors of the host, and tensors of a device that is not the current one
  (`torch.cuda.device`): Triton launches on the current device.

Built as torch's own FakeTensorMode is, whose place among dispatch modes it takes: that is what lets `device="cuda:0"` through
on a build without CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

_aten = torch.ops.aten
_MOVES = {"_to_copy", "to", "copy_", "copy", "_copy_from", "lift_fresh", "cpu"}
_READS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "bincount", "unique_dim",
          "_unique2", "unique_consecutive", "allclose"}  # fmt: skip


class Away(torch.Tensor):
    """A tensor of the pretended device; `near` holds its data."""

    near: torch.Tensor
    memory: object

    @staticmethod
    def __new__(cls, near: torch.Tensor, device: torch.device | None = None) -> Away:
        with torch.inference_mode(near.is_inference()):
            away = torch.Tensor._make_wrapper_subclass(
                cls, near.shape, strides=near.stride(), storage_offset=near.storage_offset(), dtype=near.dtype,
                device=device or _entered().device, requires_grad=near.requires_grad,
            )  # fmt: skip
            away.near = near.detach()
        away.memory = _present[-1].memory_of(away.near) if _present else None
        return away

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, other: torch.Tensor) -> None:
        self.near = other.near

    def data_ptr(self) -> int:
        return self.near.data_ptr()

    def stride(self, dim: int | None = None) -> Any:
        """Of the data: other data may have been put in its place."""
        return self.near.stride() if dim is None else self.near.stride(dim)

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory.")

    # From here on: what Python's side of torch asks a guard of the device for, which a build without CUDA has none of.

    def tolist(self) -> Any:
        _entered().wait(f"tolist {tuple(self.shape)}")
        return self.near.tolist()

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        mode = _entered()
        mode.operations += 1
        if not isinstance(source, Away) and not (non_blocking and source.is_pinned()):
            mode.wait(f"copy_ to the device {tuple(source.shape)}")
        mode.execute("copy_", torch.Tensor.copy_, (self.near, _near(source)), {})
        return self

    def nonzero(self, *, as_tuple: bool = False) -> Any:
        _entered().wait("nonzero")
        found = self.near.nonzero(as_tuple=as_tuple)
        return tuple(map(Away, found)) if as_tuple else Away(found)

    def item(self) -> Any:
        _entered().wait("item")
        return self.near.item()

    def __invert__(self) -> torch.Tensor:
        return torch.bitwise_not(self)

    def __int__(self) -> int:
        return int(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def __getitem__(self, index: Any) -> torch.Tensor:
        return Away(_entered().execute("getitem", torch.Tensor.__getitem__, (self.near, _index(index)), {}))

    def __setitem__(self, index: Any, value: Any) -> None:
        near_index = _index(index)
        if isinstance(value, torch.Tensor) and not isinstance(value, Away):
            _entered().wait("an assignment from the host")
        _entered().execute("setitem", torch.Tensor.__setitem__, (self.near, near_index, _near(value)), {})

    def __repr__(self, **_: Any) -> str:
        return f"Away({self.near!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func}: the pretended device is only there inside `with PretendDevice()`")


class PretendDevice(TorchDispatchMode):
    """The device, while it is entered.

    Args:
        index: of the device, of as many as it takes to have one of that index; the one that is current at first is 0.
        free: bytes that `torch.cuda.mem_get_info` says are free.

    Attributes:
        device: where its tensors are. current: index of the current device.
        waits: what made the host wait for the device so far, in order.
        operations: how many operations were launched on it.
    """

    def __init__(self, index: int = 0, free: int = 1 << 37) -> None:
        super().__init__()
        self.device, self.current, self._free = torch.device("cuda", index), 0, free
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE
        self.waits: list[str] = []
        self.operations = 0
        self._pinned: dict[int, torch.Tensor] = {}
        self._under_way: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __enter__(self) -> PretendDevice:
        self._lifts = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        torch._C._ensureCUDADeviceGuardSet()
        # `Module.to` makes new parameters, not new data of the old ones, whose type would stay that of the host's.
        self._overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        self._interpreter = _interpreted(self)
        self._interpreter.__enter__()
        self._torch = _patched_torch(self)
        self._torch.__enter__()
        super().__enter__()
        _present.append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        _present.pop()
        super().__exit__(*error)
        self._torch.__exit__(None, None, None)
        self._interpreter.__exit__(None, None, None)
        torch.__future__.set_overwrite_module_params_on_conversion(self._overwrites)
        torch._C._set_only_lift_cpu_tensors(self._lifts)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name.split("::")[-1]
        if name in ("is_pinned", "_pin_memory", "pin_memory") or kwargs.get("pin_memory"):
            return self._pin(name, func, args, kwargs)
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        away = [x for x in given if isinstance(x, Away)]
        goal = self._goal(name, args, kwargs, bool(away))
        if away and name not in _MOVES:
            self._same_device(name, func, given)
        self._note_waits(name, func, args, kwargs, away, goal)
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        near_args, near_kwargs = tree_map(_near, (_on_cpu(args), kwargs))
        if goal == "host" and away and name == "copy_" and self._is_pinned(args[0]):
            self._under_way.append((args[0], away[0].near))
            return args[0]
        if name == "to" and (goal == "away") != bool(away):
            out = self.execute("to", _moved, (near_args, near_kwargs), {})
        elif away or goal == "away":
            out = self.execute(name, func, near_args, near_kwargs)
        else:
            out = func(*near_args, **near_kwargs)
        if goal == "host":
            return out
        self.operations += 1
        known = {id(x.near): x for x in away}

        def sent(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            return known[id(x)] if id(x) in known else Away(x, self.device)

        return tree_map(sent, out)

    def execute(self, name: str, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run one operation or kernel of the device over the data of its tensors; every one of them passes through here."""
        return call(*args, **kwargs)

    def wait(self, what: str) -> None:
        """Note that the host waits for the device."""
        self.waits.append(what)

    def memory_of(self, near: torch.Tensor) -> object:
        """Whose life the life of a tensor's memory depends on, where somebody keeps account of that."""

    @staticmethod
    def _goal(name: str, args: Any, kwargs: Any, away: bool) -> str:
        """Where the result lies."""
        asked = kwargs.get("device")
        if asked is None:
            asked = next((x for x in args if isinstance(x, torch.device)), None)
        if asked is not None:
            return "away" if torch.device(asked).type == "cuda" else "host"
        if name in ("copy_", "_copy_from"):
            return "away" if isinstance(args[0], Away) else "host"
        return "away" if away else "host"

    @staticmethod
    def _same_device(name: str, func: Any, given: list[torch.Tensor]) -> None:
        strangers = [x for x in given if not isinstance(x, Away) and (x.dim() or name in ("index_copy_", "index_select"))]
        if strangers:
            shapes = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in strangers)
            raise RuntimeError(f"Expected all tensors to be on the same device, but {func} met cuda:0 and cpu ({shapes})")

    def _note_waits(self, name: str, func: Any, args: Any, kwargs: Any, away: list[Any], goal: str) -> None:
        if name in _MOVES:
            source = args[1] if name == "copy_" else args[0]
            up, down = goal == "away" and not isinstance(source, Away), goal == "host" and isinstance(source, Away)
            free = kwargs.get("non_blocking", False) or any(x is True for x in args[1:])
            if down and free and name == "copy_" and self._is_pinned(args[0]):
                return  # the values are there when an event has come
            if down or (up and not (free and self._is_pinned(source))):
                self.wait(f"{name} {'to' if up else 'from'} the device {tuple(source.shape)}")
        elif away and (name in _READS or (name == "repeat_interleave" and func._overloadname != "self_int")):
            self.wait(name)
        elif away and name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            if any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
                self.wait(f"{name} by a mask")
            if name != "index" and not isinstance(args[2], Away):
                self.wait(f"{name} of a value of the host")

    def _pin(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        if name == "is_pinned":
            return self._is_pinned(args[0])
        if name in ("_pin_memory", "pin_memory"):
            out = args[0].clone()
        else:
            out = func(*args, **{**kwargs, "pin_memory": False})
        self._pinned[out.untyped_storage().data_ptr()] = out
        return out

    def _is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._pinned


_present: list[PretendDevice] = []
"""Devices that are entered. During a dispatch torch does not know the mode."""


def _entered() -> PretendDevice:
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    assert isinstance(mode, PretendDevice), "the pretended device is only there inside `with PretendDevice()`"
    return mode


def _index(index: Any) -> Any:
    """The same index over the data."""
    mode, parts = _entered(), index if isinstance(index, tuple) else (index,)
    tensors = [x for x in parts if isinstance(x, torch.Tensor)]
    if any(isinstance(x, list | np.ndarray) for x in parts) or any(not isinstance(x, Away) for x in tensors):
        raise RuntimeError("a tensor of cuda:0 is indexed by one of the host")
    if any(x.dtype in (torch.bool, torch.uint8) for x in tensors):
        mode.wait("an index by a mask")
    mode.operations += 1
    return tree_map(_near, index)


def _near(x: Any) -> Any:
    return x.near if isinstance(x, Away) else x


def _on_cpu(args: Any) -> Any:
    return tuple(torch.device("cpu") if isinstance(x, torch.device) else x for x in args)


def _moved(args: Any, kwargs: Any) -> torch.Tensor:
    """What `to` another device gives: always a copy, of the dtype asked for."""
    dtypes = [x for x in (*args[1:], *kwargs.values()) if isinstance(x, torch.dtype)]
    return args[0].to(dtypes[0] if dtypes else args[0].dtype, copy=True)


@contextmanager
def _interpreted(mode: PretendDevice) -> Iterator[None]:
    """Kernels see the data of `Away` tensors, and refuse others."""
    from triton.runtime.interpreter import InterpretedFunction

    run: Callable[..., Any] = InterpretedFunction.run

    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        if any(not isinstance(x, Away) for x in given):
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        if mode.current != mode.device.index:
            raise RuntimeError(f"a kernel over tensors of {mode.device} was launched on cuda:{mode.current}")
        mode.operations += 1
        near_args, near_kwargs = tree_map(_near, (args, kwargs))
        with _disable_current_modes():
            return mode.execute(self.fn.__name__, partial(run, self), near_args, near_kwargs)

    InterpretedFunction.run = guarded
    try:
        yield
    finally:
        InterpretedFunction.run = run


@contextmanager
def _patched_torch(mode: PretendDevice) -> Iterator[None]:
    """What a build without CUDA lacks: which device is current, and how much of its memory is free."""

    @contextmanager
    def device(chosen: torch.device | int) -> Iterator[None]:
        before, mode.current = mode.current, chosen if isinstance(chosen, int) else int(chosen.index or 0)
        try:
            yield
        finally:
            mode.current = before

    class Event:
        """Says that the copies to the host which were launched before it have come."""

        def record(self) -> None:
            self.copies = [(there, near.clone()) for there, near in mode._under_way]
            mode._under_way.clear()

        def synchronize(self) -> None:
            mode.wait("an event")
            for there, near in self.copies:
                there.copy_(near)

    new = {"device": device, "Event": Event, "current_device": lambda: mode.current,
           "mem_get_info": lambda _=None: (mode._free, 2 * mode._free)}
    old = {name: getattr(torch.cuda, name) for name in new}
    for name, value in new.items():
        setattr(torch.cuda, name, value)
    try:
        yield
    finally:
        for name, value in old.items():
            setattr(torch.cuda, name, value)
