"""How a graph is captured, on a pretended torch: which stream, which memory, and what keeps still meanwhile."""

from __future__ import annotations

import gc
import types
import weakref
from contextlib import contextmanager

import pytest
import torch

from blockroll.kernels import graphs
from blockroll.kernels.launch import compute_units, record
from blockroll.rollout.bench.gpu import timing
from blockroll.rollout.bench.gpu.sizes import DRY


class Stream:
    def wait_stream(self, other):
        assert other is not self


@pytest.fixture
def cuda(monkeypatch):
    """What was recorded: (stream, pool, mode, garbage collection enabled) of each capture; `on` is the present stream."""
    state = types.SimpleNamespace(captures=[], on=Stream(), error=None)
    state.default = state.on

    @contextmanager
    def stream(chosen):
        before, state.on = state.on, chosen
        yield
        state.on = before

    @contextmanager
    def graph(captured, pool=None, stream=None, capture_error_mode="global"):
        state.captures.append((stream, pool, capture_error_mode, gc.isenabled()))
        before, state.on = state.on, stream
        try:
            yield
        finally:
            state.on = before
        if state.error:
            raise state.error

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            pass

        def elapsed_time(self, other):
            return 1.0

    graphs._stream.cache_clear()
    timing.graph_pool.cache_clear()
    for name, value in dict(
        Stream=lambda device: Stream(), stream=stream, graph=graph, Event=Event, current_device=lambda: 0,
        current_stream=lambda: state.on, graph_pool_handle=lambda: object(), synchronize=lambda: None,
        CUDAGraph=lambda: types.SimpleNamespace(replay=lambda: None),
    ).items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    yield state
    graphs._stream.cache_clear()
    timing.graph_pool.cache_clear()


def test_one_stream_and_one_memory_and_no_garbage_collection(cuda):
    """Of warm-up and capture, and of all captures; an empty graph keeps the memory."""
    on, pool = [], graphs.GraphPool()
    for _ in range(2):
        pool.capture(lambda: on.append((cuda.on, gc.isenabled())))
    streams, handles, modes, collects = zip(*cuda.captures, strict=True)
    assert len(cuda.captures) == 3  # the first one is empty
    assert {*streams} == {stream for stream, _ in on} and len({*streams}) == 1 and streams[0] is not cuda.default
    assert len({*handles}) == 1 and {*modes} == {"thread_local"}
    assert not any(collects) and not any(enabled for _, enabled in on) and gc.isenabled()
    assert len(on) == 2 * (graphs._WARM_UP + 1)


def test_garbage_is_collected_before_a_capture(cuda):
    class Ring:
        pass

    gone, ring = [], Ring()
    ring.ring = ring
    pool = graphs.GraphPool()
    weakref.finalize(ring, gone.append, True)
    del ring
    pool.capture(lambda: gone or pytest.fail("the garbage is still there"))


def test_a_capture_that_fails_leaves_nothing_behind(cuda):
    pool, cuda.error = graphs.GraphPool(), RuntimeError("operation not permitted when stream is capturing")
    with pytest.raises(RuntimeError, match="not permitted"):
        pool.capture(lambda: None)
    assert gc.isenabled() and cuda.on is cuda.default
    cuda.error = None
    pool.capture(lambda: None)


def test_the_bench_times_what_it_cannot_capture(cuda, caplog):
    for error, captured in ((None, True), (RuntimeError("no capture"), False)):
        timing.graph_pool.cache_clear()
        timing.graph_pool()
        cuda.error = error
        row = timing.timed(lambda: None, DRY, torch.device("cuda", 0))
        assert (row["captured"], row["seconds"]) == (captured, 1e-3)
    assert "timed without a graph: no capture" in caplog.text


def test_compute_units_are_the_devices_own(monkeypatch):
    """A partition of an MI300X, or an H20, has fewer than others of its architecture. Without a device a table is read."""
    from blockroll.kernels import launch
    from blockroll.kernels.attention.tiles import choose

    launch._units.cache_clear()
    launch._machine.cache_clear()
    tile = choose("cpu", torch.bfloat16, 16, 1, False)
    assert tile.units == 132 and tile.programs == tile.held * 132
    properties = types.SimpleNamespace(multi_processor_count=38, major=9, minor=0, gcnArchName="gfx942:sramecc+")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    try:
        assert choose("sm_90", torch.bfloat16, 16, 1, False).units == 38
        with record("gfx942"):
            assert compute_units({"gfx942": 304}, "gfx942") == 304
            assert choose("gfx942", torch.bfloat16, 16, 1, False).units == 304
    finally:
        launch._units.cache_clear()
        launch._machine.cache_clear()
