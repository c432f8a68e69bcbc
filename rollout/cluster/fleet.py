"""The engines of a pool: as many as are wanted, each started, made ready, replaced and ended in time."""

from __future__ import annotations

from ...errors import ClusterError
from .handle import EngineHandle
from .placement import never_fits, unplaced
from .spec import EngineSpec
from .weight_transport import WeightTransport

LOOK_S = 0.5
"""Seconds between two looks at engines that are not ready."""
PLACING_S = 3.0
"""Seconds after which a process that has not answered may be one for which Ray has no place."""
_LEAVES_FIRST = {"lost": 0, "placing": 1, "loading": 2, "ready": 3}


class Fleet:
    """Engines of one spec.

    Args:
        answer_s, silence_s: see `EngineHandle`.

    Attributes:
        wanted: how many there should be; may be set by any thread.
        engines: those that there are, drained ones included.
    """

    def __init__(self, spec: EngineSpec, wanted: int, answer_s: float, silence_s: float) -> None:
        self._spec, self._answer_s, self._silence_s = spec, answer_s, silence_s
        self.wanted, self._next_id = wanted, 0
        self.engines: list[EngineHandle] = []

    def look(self, now: float, version: int, transport: WeightTransport, hold: bool) -> None:
        """Starts, readies and ends engines.

        Args:
            version: what the pool serves. transport: has a ticket to its tensors.
            hold: a version is being committed: engines that have loaded, and those that leave, wait for its end.
        """
        self._resize()
        self._look_for_places(now)
        for engine in list(self.engines):
            if engine.draining and not engine.count:
                if not hold:  # it may have staged the version
                    engine.stop()
                    self.engines.remove(engine)
            elif engine.draining and engine.fresh:
                engine.ask_back(engine.count)
            elif engine.may_start:
                engine.start(version, transport.serving)
            elif engine.loaded and not hold:
                if engine.version == version:
                    engine.serve()
                else:
                    engine.take_version(version, transport.serving)

    def started(self, late: bool, own_ray: bool) -> bool:
        """Whether every engine for which Ray has a place serves for the first time.

        Args:
            late: it has taken too long. own_ray: Ray was started here and will not grow.

        Raises:
            ClusterError: an engine cannot be started.
        """
        lost = next((engine for engine in self.engines if engine.restarts), None)
        if lost is not None:
            raise ClusterError(f"cluster: an engine did not start ({lost.reason}); see the logs of Ray")
        why = next((engine.reason for engine in self.engines if engine.waits), "")
        if why and own_ray and never_fits(self._spec):
            raise ClusterError(f"cluster: {why}; ask for less per engine, or give the address of a larger Ray")
        serve = [engine.phase == "ready" for engine in self.engines]
        if late and not any(serve):
            raise ClusterError(f"cluster: no engine has started in {self._answer_s:g} s ({why or 'they are loading'})")
        return any(serve) and all(ready or engine.waits for ready, engine in zip(serve, self.engines, strict=True))

    def _look_for_places(self, now: float) -> None:
        """Finds out which engines wait for a place. Ray serves who asked first."""
        placing = sorted((e for e in self.engines if e.phase == "placing"), key=lambda engine: engine.placing_since)
        if placing and now - placing[0].placing_since > PLACING_S:
            count, why = unplaced(self._spec)
            for i, engine in enumerate(placing):
                engine.waits = i >= len(placing) - count
                engine.reason = why if engine.waits else ""

    def _resize(self) -> None:
        """Brings the number of engines that do not drain to the number wanted."""
        staying = [engine for engine in self.engines if not engine.draining]
        for engine in [engine for engine in self.engines if engine.draining][: max(0, self.wanted - len(staying))]:
            engine.draining = False
            staying.append(engine)
        for _ in range(self.wanted - len(staying)):
            self.engines.append(EngineHandle(self._next_id, self._spec, self._answer_s, self._silence_s))
            self._next_id += 1
        leaving = sorted(staying, key=lambda engine: (_LEAVES_FIRST[engine.phase], engine.count, -engine.id))
        for engine in leaving[: max(0, len(staying) - self.wanted)]:
            engine.draining = True
            engine.ask_back(engine.count)
