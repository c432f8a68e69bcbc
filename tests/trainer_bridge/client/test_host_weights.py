"""Weights leave their device once per push."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from bridge_parts import ToyBackend

from blockroll.trainer_bridge.client import connect
from blockroll.trainer_bridge.client.host_weights import HostWeights
from blockroll.trainer_bridge.gateway import Gateway

COPIES: Counter[tuple[int, ...]] = Counter()


class OnDevice(torch.Tensor):
    """A tensor that counts how often it is copied to the host, by shape."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cpu:
            COPIES[tuple(args[0].shape)] += 1
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_push_copies_each_tensor_to_the_host_once(serve: Callable[..., Gateway]) -> None:
    COPIES.clear()
    shapes = {"a": (600, 1000), "b": (7,), "c": (3, 2)}
    backend = ToyBackend(expected={name: ("float32", shape) for name, shape in shapes.items()})
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    with connect(serve(backend).address) as client:
        client.push_weights(1, {name: tensor.as_subclass(OnDevice) for name, tensor in tensors.items()})
    assert {shape: COPIES[shape] for shape in shapes.values()} == {shape: 1 for shape in shapes.values()}
    assert all(np.array_equal(backend.arrays[name], tensor.numpy()) for name, tensor in tensors.items())


def test_what_is_in_host_memory_is_not_copied() -> None:
    array, tensor = np.zeros((3, 4), np.float32), torch.zeros(3, 4)
    weights = HostWeights.copy_of({"array": array, "tensor": tensor})
    assert [np.shares_memory(a, b) for (_, _, a), b in zip(weights.tensors, (array, tensor.numpy()))] == [True, True]


@pytest.mark.parametrize("size", [1, 5, 100])
def test_chunks_are_the_bytes_of_the_manifest(size: int) -> None:
    tensors = {"a": np.arange(6, dtype=np.int32).reshape(2, 3).T, "none": np.zeros((0, 2)), "b": np.float16(2)}
    weights = HostWeights.copy_of(tensors)
    found = [b"", b"", b""]
    for index, offset, data in weights.chunks(size):
        assert offset == len(found[index]) and 0 < len(data) <= size
        found[index] += bytes(data)
    assert found == [np.ascontiguousarray(t).tobytes() for t in tensors.values()]
    assert [t.size for t in weights.manifest(1, 0).tensors] == [len(f) for f in found]
