"""One request's states: every way from its submission to its last acknowledgement, and no other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockroll.trainer_bridge.client.pending_request import TRANSITIONS, PendingRequest, State, Submission
from blockroll.trainer_bridge.wire.records import FAILURE


def submitted(samples: int = 2) -> PendingRequest:
    pending = PendingRequest()
    pending.submit(Submission(b"record", samples, "batch"))
    return pending


def test_from_submission_to_acknowledgement() -> None:
    pending = PendingRequest()
    assert (pending.state, pending.outstanding, pending.missing) == (State.UNSUBMITTED, False, 0)
    pending.submit(Submission(b"record", 2, "batch"))
    assert (pending.state, pending.outstanding, pending.missing) == (State.SUBMITTED, True, 2)
    assert pending.receipt(0) == 0
    assert (pending.state, pending.outstanding) == (State.RECORDED, True)
    assert pending.arrive(0) and not pending.arrive(0)
    assert (pending.state, pending.missing, pending.answered) == (State.RECORDED, 1, False)
    assert pending.arrive(1)
    assert (pending.state, pending.outstanding, pending.answered) == (State.COMPLETE, False, False)
    pending.handed_out |= {0, 1}
    assert pending.answered
    pending.confirm(1)
    assert pending.state is State.COMPLETE
    pending.confirm(0)
    assert pending.state is State.ACKNOWLEDGED


@pytest.mark.parametrize(("samples", "events"), [
    pytest.param(1, [("arrive", 0, "COMPLETE"), ("receipt", 0, "COMPLETE")], id="samples before the receipt"),
    pytest.param(2, [("receipt", 0, "RECORDED"), ("restart", "SUBMITTED"), ("fail", "FAILED"), ("restart", "FAILED")],
                 id="a new session awaits the receipt again"),
    pytest.param(2, [("arrive", 0, "SUBMITTED"), ("confirm", 0, "SUBMITTED"), ("arrive", 1, "COMPLETE")],
                 id="an acknowledgement of part of it is not its end"),
])  # fmt: skip
def test_state_after_each_event(samples: int, events: list[tuple[str | int, ...]]) -> None:
    pending = submitted(samples)
    for event, *arguments, state in events:
        getattr(pending, str(event))(*arguments)
        assert pending.state is State[str(state)], event


def test_what_an_earlier_life_left_counts() -> None:
    pending = PendingRequest()
    pending.arrive(3)
    assert pending.state is State.UNSUBMITTED
    pending.submit(Submission(b"record", 4, "batch"))
    assert (pending.state, pending.missing) == (State.SUBMITTED, 3)
    assert pending.receipt(2) == 2
    assert (pending.state, pending.missing) == (State.RECORDED, 1)
    assert pending.receipt(2) == 0
    assert pending.receipt(3) == 1
    assert (pending.state, pending.missing) == (State.COMPLETE, 0)
    whole = PendingRequest()
    whole.arrive(0)
    whole.submit(Submission(b"record", 1, "batch"))
    assert whole.state is State.COMPLETE


def test_a_failed_request_ends_with_its_failures_acknowledgement() -> None:
    pending = submitted(3)
    pending.arrive(0)
    assert pending.fail() and not pending.fail()
    assert (pending.state, pending.outstanding, pending.missing) == (State.FAILED, False, 2)
    assert pending.arrive(1)
    assert pending.state is State.FAILED
    pending.confirm(0)
    pending.confirm(1)
    assert pending.state is State.FAILED
    pending.confirm(FAILURE)
    assert pending.state is State.ACKNOWLEDGED


def test_a_step_that_is_not_in_the_table_is_a_bug() -> None:
    pending = submitted(1)
    pending.arrive(0)
    pending.confirm(0)
    with pytest.raises(AssertionError, match="from ACKNOWLEDGED to FAILED"):
        pending.fail()


EVENTS = st.one_of(
    st.tuples(st.just("arrive"), st.integers(0, 3)), st.tuples(st.just("receipt"), st.integers(0, 4)),
    st.tuples(st.just("confirm"), st.integers(-1, 3)), st.just(("fail",)), st.just(("restart",)), st.just(("submit",)))


@given(st.lists(EVENTS, max_size=20))
def test_any_order_of_events_stays_in_the_table(events: list[tuple[object, ...]]) -> None:
    pending, state = PendingRequest(), State.UNSUBMITTED
    for name, *arguments in events:
        if name == "submit":
            if pending.submission is not None:
                continue
            arguments = [Submission(b"record", 4, "batch")]
        getattr(pending, str(name))(*arguments)
        # One event may take two steps: a receipt records a request and completes it.
        assert pending.state is state or any(
            pending.state in {step, *TRANSITIONS[step]} for step in TRANSITIONS[state])
        assert pending.outstanding == (pending.submission is not None and pending.state is not State.FAILED
                                       and pending.missing > 0 and pending.state is not State.ACKNOWLEDGED)
        state = pending.state
        if state is State.ACKNOWLEDGED:
            break
