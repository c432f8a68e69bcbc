"""Names of devices become devices, or one line that says what is there."""

from __future__ import annotations

import pytest
import torch

from blockroll.errors import InvalidInput
from blockroll.model import device
from blockroll.model.conversion.distributed import device_of


@pytest.fixture
def gpus(monkeypatch):
    """gpus(count): torch sees so many."""

    def see(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    return see


@pytest.mark.parametrize(
    ("count", "name", "expected"),
    [(0, "auto", "cpu"), (0, None, "cpu"), (0, "cpu", "cpu"), (2, "auto", "cuda:0"), (2, None, "cuda:0"), (2, "cuda", "cuda:0"),
     (2, "cuda:1", "cuda:1"), (2, "cpu", "cpu"), (2, torch.device("cuda", 1), "cuda:1"), (1, torch.device("cpu"), "cpu")],
)  # fmt: skip
def test_names(gpus, count, name, expected):
    gpus(count)
    assert str(device.resolved(name)) == expected


@pytest.mark.parametrize(
    ("count", "name", "said"),
    [(0, "cuda", "device: cuda, and torch .* sees no GPU here; use cpu"), (0, "cuda:0", "sees no GPU"),
     (2, "cuda:3", "device: cuda:3, and torch sees 2 GPUs here; use cuda:0 to cuda:1"), (1, "cuda:1", "use cuda:0, or check"),
     (2, "gpu", "device: 'gpu' is unknown; use auto, cpu, cuda or cuda:N"), (2, "cuda:", "is unknown"), (2, "", "is unknown"),
     (2, "cuda:-1", "is unknown"), (2, "mps", "is unknown")],
)  # fmt: skip
def test_names_that_are_refused(gpus, count, name, said):
    gpus(count)
    with pytest.raises(InvalidInput, match=said):
        device.resolved(name)


def test_default_dtypes(gpus):
    gpus(1)
    assert device.placement("auto", None) == ("bfloat16", torch.device("cuda", 0))
    assert device.placement("cpu", None) == ("float32", torch.device("cpu"))
    assert device.placement("cuda", "float16")[0] == "float16"


@pytest.mark.parametrize(
    ("count", "rank", "processes", "name", "expected"),
    [(8, 3, 8, "auto", "cuda:3"), (8, 3, 16, "cuda", "cuda:3"), (1, 3, 8, "auto", "cuda:0"), (0, 3, 8, "auto", "cpu"),
     (8, 0, 1, "cuda:5", "cuda:5"), (8, 3, 8, "cpu", "cpu")],
)  # fmt: skip
def test_each_process_has_a_gpu_that_it_sees(gpus, count, rank, processes, name, expected):
    """A launcher may show each process one GPU only: its number is then 0, whatever the process's own."""
    gpus(count)
    assert str(device_of(name, rank, processes)) == expected


def test_processes_without_a_gpu_are_refused(gpus):
    gpus(4)
    with pytest.raises(InvalidInput, match=r"launcher.workers: process 5 here has no GPU of its own: 4 are visible"):
        device_of("auto", 5, 8)
    with pytest.raises(InvalidInput, match="device: cuda:1 for 8 processes; use cuda"):
        device_of("cuda:1", 1, 8)
