"""The emulated device finds the faults that a captured step may have. Each is planted in a small captured call."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from graph_emulator import EmulatedDevice, GraphFault

from blockroll.kernels.graphs import GraphPool
from blockroll.kernels.transfer import Download, PinnedCopy

CUDA = torch.device("cuda", 0)


class Step:
    """A captured call that reads `here`, and what it leaves."""

    def __init__(self) -> None:
        self.here = torch.arange(4.0)
        self.copy = PinnedCopy([self.here], CUDA, [self.here])
        self.factor, self.out = 2.0, torch.zeros(1)

    def __call__(self) -> None:
        self.out = (self.copy.tree[0] * 3 + 1) * 2.0

    def step(self, graph, at: float) -> list[float]:
        self.here.fill_(at)
        self.copy.send()
        graph.replay()
        return self.out.cpu().tolist()


def test_replays_compute_with_the_present_inputs():
    with EmulatedDevice():
        step = Step()
        graph = GraphPool().capture(step)
        assert [step.step(graph, at) for at in (1.0, 5.0)] == [[8.0] * 4, [32.0] * 4]
        assert [node.name for node in graph.nodes] == ["mul", "add", "mul"]


def test_a_number_that_was_baked_in():
    class Baked(Step):
        def __call__(self) -> None:
            self.out = self.copy.tree[0] * self.factor

    with EmulatedDevice() as device:
        step = Baked()
        graph = GraphPool().capture(step)
        step.step(graph, 1.0)
        step.factor = 3.0
        with pytest.raises(GraphFault, match=r"recorded otherwise now, mul: 2.0 -> 3.0"):
            step.step(graph, 1.0)
        device.audits = False  # as a device does it
        assert step.step(graph, 1.0) == [2.0] * 4


def test_a_tensor_that_moved():
    class Moved(Step):
        def step(self, graph, at: float) -> list[float]:
            self.here = torch.full((4,), at)
            self.copy = PinnedCopy([self.here], CUDA, [self.here])
            graph.replay()
            return self.out.cpu().tolist()

    with EmulatedDevice() as device:
        step = Moved()
        graph, kept = GraphPool().capture(step), step.copy
        with pytest.raises(GraphFault, match=r"recorded otherwise now, mul: .* at \w+ -> .* at \w+"):
            step.step(graph, 5.0)
        device.audits = False
        assert step.step(graph, 5.0) != [32.0] * 4 and kept is not step.copy


def test_a_missing_upload():
    with EmulatedDevice():
        step, forgotten = Step(), torch.zeros(3)
        step.copy = PinnedCopy([step.here, forgotten], CUDA, [step.here])
        graph = GraphPool().capture(step)
        step.step(graph, 1.0)
        forgotten.fill_(9.0)
        with pytest.raises(GraphFault, match=r"of a tree is not sent again: \(3,\) torch.float32"):
            step.step(graph, 1.0)


@pytest.mark.parametrize("wait", [lambda x: x.tolist(), lambda x: x.item(), lambda x: x.cpu(), lambda x: x.nonzero()])
def test_a_wait_of_the_host(wait):
    with EmulatedDevice(), pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        here = torch.zeros(1, pin_memory=True).to(CUDA, non_blocking=True)
        pool = GraphPool()
        pool._record(torch.cuda.CUDAGraph(), lambda: wait(here))


def test_a_copy_from_memory_of_the_host():
    """Which will hold something else by then."""
    with EmulatedDevice(), pytest.raises(RuntimeError, match="a copy from memory of the host"):
        GraphPool().capture(lambda: torch.zeros(2, pin_memory=True).to(CUDA, non_blocking=True))


def test_a_launch_on_another_stream():
    with EmulatedDevice():
        here, other = torch.zeros(2, device=CUDA), torch.cuda.Stream()

        def call() -> None:
            with torch.cuda.stream(other):
                here.add_(1)

        with pytest.raises(GraphFault, match="is launched on stream"):
            GraphPool()._record(torch.cuda.CUDAGraph(), call)
        made = here + 1
        with torch.cuda.stream(other), pytest.raises(GraphFault, match="does not wait for stream"):
            made.add_(1)
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            made.add_(1)


def test_another_number_of_operations():
    class Longer(Step):
        def __call__(self) -> None:
            self.out = self.copy.tree[0] * 2
            if self.factor > 2:
                self.out = self.out + 1

    with EmulatedDevice():
        step = Longer()
        graph = GraphPool().capture(step)
        step.factor = 3.0
        with pytest.raises(GraphFault, match="a graph of 1 operations would now record 2"):
            step.step(graph, 1.0)


def test_memory_of_a_result_that_nobody_held_is_the_next_graphs():
    with EmulatedDevice(audits=False):
        pool, here = GraphPool(), torch.ones(4, device=CUDA)
        lost = []
        first = pool.capture(lambda: lost.append((here * 2).near))
        second = pool.capture(lambda: here * 7)
        first.replay()
        assert lost[-1].tolist() == [2.0] * 4
        second.replay()
        assert lost[-1].tolist() == [7.0] * 4


def test_a_download_comes_when_it_is_waited_for():
    with EmulatedDevice() as device:
        there = torch.arange(3, device=CUDA)
        copy = Download(CUDA)
        copy.pack([there, there > 1])
        copy.start()
        there.mul_(5)  # launched later
        before = len(device.waits)
        assert [x.tolist() for x in copy.wait()] == [[0, 1, 2], [False, False, True]]
        assert len(device.waits) == before + 1
