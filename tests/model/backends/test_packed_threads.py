"""Passes of the packed backend that are divided among threads."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from contextlib import nullcontext

import numpy as np
import pytest
import torch

pytest.importorskip("numba")

from blockroll.kernels.compiled import compiled
from blockroll.model.backends.packed import backend as packed
from blockroll.model.backends.packed.backend import PackedBackend
from blockroll.model.backends.packed.threads import Threads, tell
from blockroll.model.layout import DecodeRows, decode
from blockroll.model.policy import Routing
from blockroll.rollout.cache import PagedCache
from blockroll.rollout.engine import Engine
from blockroll.rollout.types import RolloutRequest, SamplingParams

LENGTHS = 13, 1, 7, 1, 30


@torch.inference_mode()
def test_every_row_is_the_same_to_the_last_bit(make_policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clean rows and mask rows, experts and cache, however many threads share a pass; also with a thread for each sequence and
    more. Alone in a pass a sequence has the same rows too."""
    monkeypatch.setattr(packed, "_LEAST_ROWS", 1)
    policy = make_policy(torch.float32, seed=4, layer_types=["hybrid", "hybrid_sliding"], num_hidden_layers=2, sliding_window=4)
    cache = PagedCache(policy, 60, 4, len(LENGTHS), 40)
    held = [cache.open() for _ in LENGTHS]
    draw = random.Random(0)
    texts = [[draw.randrange(40) for _ in range(count + 3)] for count in LENGTHS]
    assert all(cache.reserve(table, count + 3) for table, count in zip(held, LENGTHS, strict=True))
    prefill = [DecodeRows(text[:count], 0, (), 0) for text, count in zip(texts, LENGTHS, strict=True)]
    step = [DecodeRows(text[-3:], count, (1, 3), 5) for text, count in zip(texts, LENGTHS, strict=True)]
    found = []
    for threads in (1, 2, 3, 8):
        backend = PackedBackend(policy)
        backend.threads = threads
        for pool in cache.all_pools:
            pool.zero_()
        of_pass = []
        for rows in (prefill, step):
            layout = decode(rows, policy.mask_token_id)
            view, routing = cache.view(held, layout), Routing([], [])
            of_pass += [backend.forward(*backend.prepare(layout, view), view, routing).clone(), *routing.expert_LT,
                        *routing.probs_LTE]  # fmt: skip
        found.append([*of_pass, *(pool.clone() for pool in cache.all_pools)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    whole, first = found[0][len(of_pass) // 2], 0
    for table, rows in zip(held, step, strict=True):
        layout = decode([rows], policy.mask_token_id)
        view = cache.view([table], layout)
        alone = backend.forward(*backend.prepare(layout, view), view)
        assert torch.equal(alone, whole[first : first + layout.rows])
        first += layout.rows


def test_an_engine_has_torch_threads(make_policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step divides its passes among as many threads as torch has, and torch has one meanwhile. The samples stay the same."""
    monkeypatch.setattr(packed, "_LEAST_ROWS", 1)
    seen: list[tuple[int, int]] = []
    each = Threads.each
    monkeypatch.setattr(Threads, "each", lambda self, function, calls: (
        seen.append((len(calls), torch.get_num_threads())), each(self, function, calls)))  # fmt: skip
    engine = Engine(make_policy(torch.float32, seed=4), max_batch=4)
    made = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            made.append(engine.rollout([
                RolloutRequest(f"{n}", (5, 6 + n), SamplingParams("lossless", max_tokens=20), n, 1) for n in range(6)
            ]))  # fmt: skip
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(1)
    assert {count for count, _ in seen} == {1, 2, 3} and {threads for _, threads in seen} == {1}
    for one, other in zip(*made, strict=True):
        assert list(one.tokens) == list(other.tokens) and list(one.logprobs) == list(other.logprobs)


def test_a_thread_that_begins_during_a_step_has_torch_threads(make_policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also afterwards, and whatever the step raises. The step's own thread has one meanwhile."""
    engine, seen = Engine(make_policy(torch.float32, seed=4), max_batch=4), []
    for raises in (False, True):

        def each(self: Threads, *call: object, raises: bool = raises) -> None:
            thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
            thread.start()
            thread.join()
            seen.append(torch.get_num_threads())
            if raises:
                raise ArithmeticError

        monkeypatch.setattr(Threads, "each", each)
        engine.add(RolloutRequest("a", (5, 6), SamplingParams(max_tokens=1), 0, 1))
        torch.set_num_threads(2)
        try:
            with pytest.raises(ArithmeticError) if raises else nullcontext():
                engine.step()
            seen.append(torch.get_num_threads())
        finally:
            torch.set_num_threads(1)
        engine.abort()
    assert seen == [2, 1, 2] * 2


def test_what_a_call_raises_is_raised_when_all_have_ended() -> None:
    threads, ended = Threads(), []

    def call(begun_1: object, ended_1: object, number: int, wait: threading.Event) -> None:
        if number == 2:
            raise ValueError("two")
        if number == 1:
            assert wait.wait(10)
            ended.append(number)
        else:
            wait.set()
            raise KeyError(number) if number == 3 else SystemError

    wait = threading.Event()
    with pytest.raises(SystemError):
        threads.each(call, [(0, wait), (1, wait), (2, wait)])
    assert ended == [1]
    with pytest.raises(ValueError, match="two"):
        threads.each(call, [(1, wait), (2, wait)])
    assert ended == [1, 1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own() -> None:
    threads, done = Threads(), []

    def call(begun_1: object, ended_1: object, number: int) -> None:
        done.append(number)

    threads.each(call, [(0,), (1,)])
    child = os.fork()
    if not child:
        threads.each(call, [(2,), (3,)])
        os._exit(0 if sorted(done) == [0, 1, 2, 3] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there are no timer signals here")
def test_an_interrupt_is_raised_when_all_calls_have_ended() -> None:
    """Ctrl-C while calls in other threads are awaited, which write into memory that the next pass uses."""
    threads, ended = Threads(), []

    def call(begun_1: object, ended_1: object, seconds: float) -> None:
        time.sleep(seconds)
        ended.append(seconds)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
        with pytest.raises(KeyboardInterrupt):
            threads.each(call, [(0.0,), (0.35,)])
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert ended == [0.0, 0.35]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_where_a_thread_cannot_be_started_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, ran = Threads(), []
    start = threading.Thread.start

    def fail(self: threading.Thread) -> None:
        if threads._workers:
            raise RuntimeError("can't start new thread")
        start(self)

    def call(begun_1: object, ended_1: object, number: int) -> None:
        ran.append(number)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError, match="can't start"):
            threads.each(call, [(0,), (1,), (2,)])
    assert ran == []
    threads.each(call, [(0,), (1,), (2,)])
    assert sorted(ran) == [0, 1, 2]


def test_threads_end_with_their_object() -> None:
    def call(begun_1: object, ended_1: object) -> None:
        running.add(threading.current_thread())

    threads, running = Threads(), set[threading.Thread]()
    threads.each(call, [(), (), ()])
    assert len(running) == 3
    del threads
    for thread in running - {threading.current_thread()}:
        thread.join(10)
        assert not thread.is_alive()


def test_a_thread_that_looks_and_one_that_sleeps_take_the_next_call() -> None:
    """Calls that tell, as compiled ones do, and calls that do not; at once, and after the threads went to sleep."""
    threads, ran = Threads(), []

    def call(begun_1: np.ndarray, ended_1: np.ndarray, number: int, tells: bool) -> None:
        if tells:
            begin(begun_1)
        ran.append(number)
        if tells:
            begin(ended_1)

    for number, (pause, tells) in enumerate([(0.0, True), (0.0, True), (0.05, True), (0.0, False), (0.05, False), (0.0, True)]):
        time.sleep(pause)
        threads.each(call, [(3 * number, tells), (3 * number + 1, tells), (3 * number + 2, tells)])
        assert sorted(ran) == list(range(3 * number + 3))


@compiled()
def begin(count_1):
    tell(count_1)
