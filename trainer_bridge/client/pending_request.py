"""One request of a client as a state machine: submitted, recorded, complete or failed, acknowledged. No sockets here.

    UNSUBMITTED --submit--> SUBMITTED --receipt--> RECORDED --last sample--> COMPLETE --last confirmation--> ACKNOWLEDGED

A failure leads to FAILED from every state but ACKNOWLEDGED. The last sample of a SUBMITTED request may arrive before
the receipt; it leads to COMPLETE as well. A new session leads from RECORDED back to SUBMITTED. FAILED and UNSUBMITTED
lead to ACKNOWLEDGED as COMPLETE does. `TRANSITIONS` lists every step.

A "life" of a client is one RolloutClient object. A trainer that crashed and connected again with the same client_id is
in its next life, and receives what an earlier life did not acknowledge.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from enum import Enum

from ..wire.records import FAILURE


class State(Enum):
    """Where a request stands."""

    UNSUBMITTED = "this life has not submitted the request; it receives what an earlier life did not acknowledge"
    SUBMITTED = "this life has submitted the request; the gateway has not confirmed in this session that it is recorded"
    RECORDED = "the gateway's ledger holds the request; samples are outstanding"
    COMPLETE = "every sample has arrived, or was acknowledged in an earlier life"
    FAILED = "the samples that are missing will not come"
    ACKNOWLEDGED = "the ledger holds an acknowledgement of all that arrived; the gateway sends none of it again"


TRANSITIONS = {
    State.UNSUBMITTED: {State.SUBMITTED, State.COMPLETE, State.FAILED, State.ACKNOWLEDGED},
    State.SUBMITTED: {State.RECORDED, State.COMPLETE, State.FAILED},
    State.RECORDED: {State.SUBMITTED, State.COMPLETE, State.FAILED},
    State.COMPLETE: {State.FAILED, State.ACKNOWLEDGED},
    State.FAILED: {State.ACKNOWLEDGED},
    State.ACKNOWLEDGED: set[State](),
}


_NONE: Set[int] = frozenset()
"""The set of a request of which nothing has come. All share it, since an empty set of its own takes 216 bytes."""


def _with(numbers: Set[int], number: int) -> Set[int]:
    """The set with one more number; a set that is a request's own is changed."""
    if not isinstance(numbers, set):
        return {number}
    numbers.add(number)
    return numbers


@dataclass(frozen=True, slots=True)
class Submission:
    """What this life has submitted: the request's record, its number of samples, the batch it went with."""

    record: bytes
    samples: int
    batch: str


@dataclass(slots=True)
class PendingRequest:
    """One request id.

    Attributes: submission: None until this life submits the request. arrived, handed_out, confirmed: sample numbers
        that arrived here, that the caller was given, and whose acknowledgement the gateway has confirmed. FAILURE
        stands among the last two for the failure. acks_sent: samples whose acknowledgement was sent in this life.
        acknowledged_before: samples that an earlier life acknowledged, as far as the gateway has said.
    """

    state: State = State.UNSUBMITTED
    submission: Submission | None = None
    arrived: Set[int] = _NONE
    handed_out: Set[int] = _NONE
    confirmed: Set[int] = _NONE
    acks_sent: int = 0
    acknowledged_before: int = 0

    @property
    def outstanding(self) -> bool:
        """Whether this life has submitted it and waits for samples or a failure."""
        return self.state in (State.SUBMITTED, State.RECORDED)

    @property
    def missing(self) -> int:
        """Samples that have arrived neither here nor in an earlier life; 0 before it is submitted."""
        return 0 if self.submission is None else self.submission.samples - self.acknowledged_before - len(self.arrived)

    @property
    def answered(self) -> bool:
        """Whether the caller was given all there will be of it."""
        return self._ends_with(self.handed_out)

    def submit(self, submission: Submission) -> None:
        """This life submits the request."""
        assert self.submission is None, "a request is submitted once in a life"
        self.submission = submission
        if self.state is State.UNSUBMITTED:
            self._enter(State.SUBMITTED if self.missing > 0 else State.COMPLETE)

    def restart(self) -> None:
        """A new session begins, in which the request is sent again."""
        if self.state is State.RECORDED:
            self._enter(State.SUBMITTED)

    def receipt(self, acknowledged_before: int) -> int:
        """The gateway has recorded the request; returns how many more samples an earlier life acknowledged than was
        known."""
        more = max(0, acknowledged_before - self.acknowledged_before)
        self.acknowledged_before += more
        if self.state is State.SUBMITTED:
            self._enter(State.RECORDED)
        self._complete()
        return more

    def arrive(self, sample: int) -> bool:
        """A sample has arrived; False when it had arrived before."""
        if sample in self.arrived:
            return False
        self.arrived = _with(self.arrived, sample)
        self._complete()
        return True

    def fail(self) -> bool:
        """The missing samples will not come; False when that was known."""
        if self.state is State.FAILED:
            return False
        self._enter(State.FAILED)
        return True

    def confirm(self, sample: int) -> None:
        """The gateway has recorded the acknowledgement of a sample, or of the failure."""
        self.confirmed = _with(self.confirmed, sample)
        if self._ends_with(self.confirmed):
            self._enter(State.ACKNOWLEDGED)

    def hand_out(self, sample: int) -> None:
        """The caller is given a sample, or the failure."""
        self.handed_out = _with(self.handed_out, sample)

    def take_back(self, sample: int) -> None:
        """The caller was not given the sample after all."""
        self.handed_out = set(self.handed_out) - {sample}

    def _complete(self) -> None:
        if self.outstanding and self.missing <= 0:
            self._enter(State.COMPLETE)

    def _ends_with(self, samples: Set[int]) -> bool:
        """Whether nothing is outstanding and `samples` holds all that arrived, and the failure if there is one."""
        return (not self.outstanding and self.arrived <= samples
                and (self.state is not State.FAILED or FAILURE in samples))

    def _enter(self, state: State) -> None:
        assert state in TRANSITIONS[self.state], f"a request went from {self.state.name} to {state.name}"
        self.state = state
