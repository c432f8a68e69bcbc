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

from numba import types
from numba.extending import intrinsic

from blockroll.kernels.compiled import compiled
from blockroll.model.backends.packed import backend as packed
from blockroll.model.backends.packed import threads as packed_threads
from blockroll.model.backends.packed.backend import PackedBackend
from blockroll.model.backends.packed.threads import Threads, hand_over, in_threads
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
    policy = make_policy(
        torch.float32, seed=4, layer_types=["hybrid", "hybrid_sliding"], num_hidden_layers=2, sliding_window=4
    )
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
    desk = Threads.desk
    monkeypatch.setattr(Threads, "desk", lambda self, parts: (
        seen.append((parts, torch.get_num_threads())), desk(self, parts))[1])  # fmt: skip
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
    engine, seen, real = Engine(make_policy(torch.float32, seed=4), max_batch=4), [], Threads.desk
    for raises in (False, True):

        def desk(self: Threads, parts: int, raises: bool = raises) -> np.ndarray:
            thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
            thread.start()
            thread.join()
            seen.append(torch.get_num_threads())
            if raises:
                raise ArithmeticError
            return real(self, parts)

        monkeypatch.setattr(Threads, "desk", desk)
        engine.add(RolloutRequest("a", (5, 6), SamplingParams(max_tokens=1), 0, 1))
        torch.set_num_threads(2)
        try:
            with pytest.raises(ArithmeticError) if raises else nullcontext():
                engine.step()
            seen.append(torch.get_num_threads())
        finally:
            torch.set_num_threads(1)
        engine.abort()
    assert seen == [2, 1, 2] * 2  # the head of the one row takes no desk


@compiled(nogil=True)
def call(desk, parts, looks_P, raises_P, done_P, together_P):
    """A call of so many parts; returns how many raised."""
    hand_over(part, (looks_P, raises_P, done_P, together_P), desk)
    return in_threads(desk, parts)


@compiled(nogil=True)
def part(number, looks_P, raises_P, done_P, together_P):
    """Looks so often whether a later part runs at the same time, and notes its own end."""
    if raises_P[number]:
        raise ValueError("this part raises")
    for _ in range(looks_P[number]):
        for other in range(number + 1, len(looks_P)):
            if seen(done_P, other):
                together_P[number] = 1
                done_P[number] = 1
                return
    done_P[number] = 1


@intrinsic
def seen(typing_context, done_P, number):
    """done_P[number] as another thread may have changed it."""

    def generate(context, builder, signature, arguments):
        entry = builder.gep(context.make_array(done_P)(context, builder, arguments[0]).data, [arguments[1]])
        return builder.load_atomic(entry, "acquire", 8)

    return types.int64(done_P, types.intp), generate


LONG = 2**25
"""Looks that take some milliseconds."""


def run(desk: np.ndarray, looks: list[int], raises: tuple[int, ...] = ()) -> tuple[int, list[int], list[int]]:
    """How many parts raised, which ended, and which saw a later part end meanwhile."""
    raises_P, done_P, together_P = (np.zeros(len(looks), np.int64) for _ in range(3))
    raises_P[list(raises)] = 1
    failed = call(desk, len(looks), np.array(looks), raises_P, done_P, together_P)
    return failed, done_P.tolist(), together_P.tolist()


def run_together(threads: Threads, parts: int, pause: float = 0.0) -> bool:
    """Whether all parts come to run at the same time. On a busy machine threads may come too late for most calls."""
    for _ in range(100):
        time.sleep(pause)
        failed, done, together = run(threads.desk(parts), [LONG] * (parts - 1) + [0])
        assert not failed and done == [1] * parts
        if together == [1] * (parts - 1) + [0]:
            return True
    return False


def test_parts_run_side_by_side() -> None:
    """At once, while the thread looks, and after it went to sleep."""
    threads = Threads()
    assert all(run_together(threads, 2, pause) for pause in (0.0, 0.0, 0.05, 0.0, 0.05))


def test_the_caller_runs_the_parts_that_no_thread_begins() -> None:
    """Where there is no thread, and where it went to sleep after the caller had looked."""
    desk = packed_threads._desk()
    assert run(desk, [0, 0, 0, 0]) == (0, [1] * 4, [0] * 4)
    desk[packed_threads._LINE :: packed_threads._LINE] = packed_threads._SLEEPS
    assert run(desk, [0, 0, 0]) == (0, [1] * 3, [0] * 3)
    assert {*desk[packed_threads._LINE : 3 * packed_threads._LINE : packed_threads._LINE]} == {packed_threads._SLEEPS}


def test_parts_that_raise_are_counted_when_all_have_ended() -> None:
    threads = Threads()
    for raises in ((0,), (1,), (0, 1), (1, 2)):
        failed, done, _ = run(threads.desk(3), [0, 0, 0], raises)
        assert failed == len(raises) and done == [int(number not in raises) for number in range(3)]
    assert run(threads.desk(3), [0, 0, 0])[:2] == (0, [1] * 3)


def test_a_pass_that_fails_is_an_error(make_policy, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy(torch.float32, seed=4)
    backend, layout = PackedBackend(policy), decode([DecodeRows([5, 6], 0, (), 0)], policy.mask_token_id)
    monkeypatch.setattr(packed, "run", lambda *arguments: 1)
    with pytest.raises(MemoryError, match="pass"):
        backend.forward(*backend.prepare(layout))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own() -> None:
    threads = Threads()
    assert run_together(threads, 2)
    child = os.fork()
    if not child:
        os._exit(0 if run_together(threads, 2) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there are no timer signals here")
def test_an_interrupt_is_raised_when_all_parts_have_ended() -> None:
    """Ctrl-C during a pass, whose threads write into memory that the next pass uses."""
    threads, done_P, none_P = Threads(), np.zeros(2, np.int64), np.zeros(2, np.int64)
    run(threads.desk(2), [0, 0])

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with pytest.raises(KeyboardInterrupt):
            while True:
                done_P[:] = 0
                call(threads.desk(2), 2, np.array([0, 2**26]), none_P, done_P, none_P.copy())
        assert done_P.tolist() == [1, 1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_where_a_thread_cannot_be_started_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = Threads()
    start = threading.Thread.start

    def fail(self: threading.Thread) -> None:
        if threads._wake:
            raise RuntimeError("can't start new thread")
        start(self)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError, match="can't start"):
            threads.desk(3)
    assert run_together(threads, 3)


def test_threads_end_with_their_object() -> None:
    before = {*threading.enumerate()}
    threads = Threads()
    run(threads.desk(3), [0, 0, 0])
    started = {*threading.enumerate()} - before
    assert len(started) == 2
    del threads
    for thread in started:
        thread.join(10)
        assert not thread.is_alive()
