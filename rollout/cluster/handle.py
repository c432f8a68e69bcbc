"""One engine of a pool, seen from the pool: its process, the calls under way, and the samples it has.

Its states, by name:

    placing -> loading -> ready -> lost -> placing ...
                  |                 ^
                  +-----------------+

placing: its process was asked for and has not answered. loading: the process loads the policy, or takes the pool's weight
version. ready: it serves. lost: it has no process; the next one is started after a pause. An engine in any state may be draining.

Invariants:
- An engine that is ready has a process.
- What a process that was given up still says is not read.
- An engine without heartbeat is given up: while it has work its turns must move too, but one turn may take as long as loading
  does, since it may compile.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import ray
from ray.exceptions import RayError

from .actor import EngineActor
from .ray_errors import one_line
from .reports import Heartbeat, Home, Loaded, Part, Report
from .spec import EngineSpec, EngineState, EngineStatus
from .weight_transport import Ticket
from .work import Work

_log = logging.getLogger(__package__)
HEARTBEAT_S = 1.0
"""Seconds between two questions for a heartbeat."""
MOST_PAUSE_S = 30.0
"""Longest pause before the next process of an engine whose processes die before they have loaded; the first is 1 s."""


class EngineLost(Exception):
    """The process died, hangs or failed; the text says what happened. Never leaves the pool."""


class EngineHandle:
    """One engine.

    Args:
        answer_s: seconds a process may take to load, or to take, a weight version, and for one turn.
        silence_s: seconds it may be without a heartbeat.

    Attributes:
        samples: what it was given and has not handed out: per work, number -> expected tokens.
        count, outstanding: samples, and tokens expected of them. clients: samples by client, of those that have any.
        waits: Ray has no place for its process; reason says why.
        fresh: samples of its last report that had not begun. asked: it was asked to give samples back and has not answered.
        begun: it had none to give back, and has been given none since.
        steps: of its last report, those made with the work that it serves alone.
        reserved: it is given nothing but a work that has to be alone. draining: it leaves when it has ended its work.
        restarts: processes that were replaced.
    """

    def __init__(self, id: int, spec: EngineSpec, answer_s: float, silence_s: float) -> None:
        self.id, self._spec, self._answer_s, self._silence_s = id, spec, answer_s, silence_s
        self.phase: Literal["placing", "loading", "ready", "lost"] = "lost"
        self.reserved = self.draining = False
        self.reason, self.waits, self.restarts, self.version = "", False, 0, 0
        self.expected: Mapping[str, tuple[str, tuple[int, ...]]] = {}
        self.actor: Any = None
        self._failures, self._resume_at = 0, 0.0
        self._clear()

    def _clear(self) -> None:
        self.samples: dict[Work, dict[int, float]] = {}
        self.count, self.outstanding, self.fresh, self.steps = 0, 0.0, 0, 0
        self.asked = self.begun = False
        self.clients: Counter[str] = Counter()
        self.home: Home | None = None
        self.device, self.tokens_per_s = "", 0.0
        self._call: Any = None  # of the phase: home, load, stage or commit
        self._stream: Any = None
        self._beat: Any = None
        self._beat_at = self._turned_at = self._since = time.monotonic()
        self._last: Heartbeat | None = None
        self._step_s = 0.0
        self._figures: dict[str, float] = {}
        self._last_at = 0.0
        self._taking: tuple[int, Any] | None = None
        self._weights: Ticket | None = None  # keeps alive what the process reads

    def start(self, version: int, weights: Ticket | None) -> None:
        """Asks Ray for a process that will serve this weight version.

        Args: weights: ticket to its tensors; None for those of the policy's directory.
        """
        spec = self._spec
        self._clear()
        self._weights = weights
        options: dict[str, Any] = {"num_cpus": spec.num_cpus, "num_gpus": spec.num_gpus, "resources": dict(spec.resources),
                                   "scheduling_strategy": "SPREAD" if spec.placement == "spread" else "DEFAULT"}
        if spec.env:
            options["runtime_env"] = {"env_vars": dict(spec.env)}
        self.actor = EngineActor.options(**options).remote(spec, version, weights)  # type: ignore[attr-defined]
        self.phase, self.version, self._call = "placing", version, self.actor.home.remote()

    def lose(self, why: str) -> None:
        """Ends the process. What it had stays in `samples` until the next start."""
        self._failures = 0 if self.phase == "ready" else self._failures + 1
        self.stop()
        pause = 0.0 if not self._failures else min(MOST_PAUSE_S, 2.0 ** (self._failures - 1))
        self.reason, self._resume_at = why, time.monotonic() + pause
        self.restarts += 1
        self.reserved = False

    def stop(self) -> None:
        """Ends the process."""
        if self.actor is not None:
            ray.kill(self.actor)
        self.actor = self._call = self._stream = self._beat = None
        self.phase = "lost"

    @property
    def may_start(self) -> bool:
        """Whether it is time for the next process."""
        return self.phase == "lost" and time.monotonic() >= self._resume_at

    @property
    def serves(self) -> bool:
        """Whether it may be given work."""
        return self.phase == "ready" and not self.draining

    @property
    def loaded(self) -> bool:
        """Whether it has loaded and nothing is asked of it: it may be made ready, or given a version."""
        return self.phase == "loading" and self._call is None

    def calls(self) -> list[Any]:
        """What may bring news: references, and the stream of reports."""
        return [call for call in (self._call, self._stream, self._beat) if call is not None]

    def read(self, call: Any) -> Report | None:
        """Takes what has come of one of `calls`; the report, if it is one. Raises EngineLost."""
        try:
            if call is self._stream:
                report: Report = ray.get(next(self._stream))
                self.note(report)
                return report
            answer = ray.get(call)
        except StopIteration:
            raise EngineLost("it stopped serving") from None
        except RayError as error:
            raise EngineLost(one_line(error)) from error
        if call is self._beat:
            self._note_heartbeat(answer)
        elif isinstance(answer, Home):
            self.waits = False
            self.home, self.phase, self._call, self._since = answer, "loading", self.actor.load.remote(), time.monotonic()
        else:
            self._call = None
            if isinstance(answer, Loaded):
                self.version, self.device, self.expected = answer.version, answer.device, answer.expected
                self._stream = self.actor.serve.remote()
            elif self._taking is not None and answer is None:  # staged
                self._call = self.actor.commit.remote(self._taking[0], "keep")
            else:
                self.version = answer
        return None

    def note(self, report: Report) -> None:
        """Notes what a report says of the engine itself."""
        self.fresh, self.steps = report.fresh, report.steps
        if report.returned is not None:
            self.asked, self.begun = False, not report.returned
        if report.fresh:
            self.begun = False

    def take_version(self, version: int, weights: Ticket | None) -> None:
        """A process that has loaded takes the weight version that the pool serves by now."""
        self._taking, self._since = (version, weights), time.monotonic()
        self._call = self.actor.stage.remote(version, weights)

    def serve(self) -> None:
        """Makes a process that has loaded ready for work."""
        self.phase, self.reason, self._failures, self._weights, self._taking = "ready", "", 0, None, None
        self._beat_at = self._turned_at = time.monotonic()

    def send(self, work: Work, numbers: Sequence[int], cost: float) -> Part:
        """Notes samples as given to it; the caller sends the part."""
        first = work not in self.samples
        known = self.samples.setdefault(work, {})
        for i, number in enumerate(numbers):
            known[number] = cost + (work.prompt_cost if first and not i else 0.0)
            self.outstanding += known[number]
        self.count += len(numbers)
        self.clients[work.client] += len(numbers)
        self.begun = False
        return Part(work.request, list(numbers), work.epoch, work.client, work.order, self.reserved, work.watched)

    def ask_back(self, count: int) -> None:
        """Asks for up to `count` samples that have not begun, unless it was asked already, or has just said that it has none."""
        if count > 0 and not self.asked and not self.begun and self.phase == "ready":
            self.asked = True
            self.actor.give_back.remote(count)

    def done(self, work: Work, number: int) -> float:
        """Notes that it no longer has a sample; the tokens that were expected of it, 0 where it had not."""
        known = self.samples.get(work, {})
        if number not in known:
            return 0.0
        cost = known.pop(number)
        if not known:
            del self.samples[work]
        self.count, self.outstanding = self.count - 1, self.outstanding - cost
        self.clients[work.client] -= 1
        if not self.clients[work.client]:
            del self.clients[work.client]
        return cost

    def check(self, now: float, slept: float) -> None:
        """Asks for a heartbeat when it is time. Raises EngineLost for an engine that hangs.

        Args: slept: seconds in which the pool read nothing; nobody is blamed for them.
        """
        self._beat_at, self._since, self._turned_at = self._beat_at + slept, self._since + slept, self._turned_at + slept
        if self.phase == "loading" and self._call is not None and now - self._since > self._answer_s:
            raise EngineLost(f"it has not loaded its policy in {self._answer_s:g} s")
        if self.phase != "ready":
            return
        if self._beat is None and now - self._beat_at >= HEARTBEAT_S:
            self._beat, self._beat_at = self.actor.heartbeat.remote(), now
        if self._beat is not None and now - self._beat_at > self._silence_s:
            raise EngineLost(f"it was silent for {self._silence_s:g} s")
        if now - self._turned_at > self._answer_s:
            raise EngineLost(f"one step took more than {self._answer_s:g} s")

    def hangs(self, now: float) -> bool:
        """Whether its turns have not moved lately although it has work."""
        return self.phase == "ready" and now - self._turned_at > self._silence_s

    @property
    def placing_since(self) -> float:
        """The moment at which Ray was asked for its process."""
        return self._since

    def status(self) -> EngineStatus:
        """What is known of it."""
        states: dict[str, EngineState] = {"placing": "waiting" if self.waits else "loading", "loading": "loading",
                                          "ready": "busy" if self.count else "idle", "lost": "lost"}
        state, home = "draining" if self.draining else states[self.phase], self.home
        return EngineStatus(self.id, home.pid if home else None, home.node if home else "", self.device, state, self.version,
                            round(self.tokens_per_s, 1), self.reason, self._figures if home else {})

    def _note_heartbeat(self, beat: Heartbeat) -> None:
        now, self._beat = time.monotonic(), None
        if self._last is None or not beat.works or beat.turns != self._last.turns:
            self._turned_at = now
        if self._last is not None:
            seconds, steps = max(1e-3, now - self._last_at), beat.figures["forwards"] - self._last.figures["forwards"]
            self.tokens_per_s = (beat.decode_tokens - self._last.decode_tokens) / seconds
            if steps and self._last.works:
                self._step_s = seconds / steps
        self._last, self._last_at = beat, now
        self._figures = {**beat.figures, "step_seconds": self._step_s}
