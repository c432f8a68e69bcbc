"""verl's rollout server: an actor whose `generate` is a request to the service."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from verl.workers.rollout.replica import TokenOutput

from ....errors import RequestError, TransportError
from ....rollout.types import RolloutRequest, Trajectory
from ....seeds import derived_seed
from ...client import ServiceControl
from ...client.async_client import AsyncRolloutClient
from ...wire.key_files import client_keys
from .generations import Generations
from .sampling import longest_answer, sampling_params, token_output
from .settings import ServiceSettings
from .turns import Turns
from .weight_steps import weight_steps


class RolloutServer:
    """What verl's `LLMServerClient` and replicas call. An asyncio actor.

    Args:
        config: verl's RolloutConfig.
        settings: how to reach the service.
        replica_rank: which replica.
    """

    def __init__(self, config: Any, settings: ServiceSettings, replica_rank: int) -> None:
        self._config, self._settings, self._replica_rank = config, settings, replica_rank
        self._life, self._turns, self._steps = uuid.uuid4().hex[:12], Turns(), dict[int, int]()
        self._versions: Any = None

    async def launch(self) -> None:
        """Connects to the service. Raises TransportError when it cannot be reached."""
        settings = self._settings
        keys = client_keys(settings.keys or None)
        name = f"verl-{self._life}-{self._replica_rank}"
        client = await AsyncRolloutClient.connect(settings.address, client_id=name, keys=keys, timeout=settings.timeout)
        self._generations = Generations(client, lambda: ServiceControl(settings.address, keys=keys, timeout=settings.timeout),
                                        address=settings.address, patience=settings.timeout)
        self._versions = weight_steps()

    async def generate(self, prompt_ids: Sequence[int], sampling_params: dict[str, Any], request_id: str, image_data: Any = None,
                       video_data: Any = None, audio_data: Any = None, mm_processor_kwargs: Any = None, priority: int = 0,
                       **options: Any) -> TokenOutput:
        """One sample. `stop_reason` is `aborted` when it was ended by `abort_all_requests`: verl then asks for the rest.

        Args:
            request_id: of the sample; the seed of its tokens is made of it and `rollout.seed`.
            priority: requests with a smaller number go first.

        Raises RequestError for what the service cannot serve, naming it; TransportError when the service is gone.
        """
        options.pop("mm_processor_output", None)  # of what is refused below
        for name, value in {"image_data": image_data, "video_data": video_data, "audio_data": audio_data, **options}.items():
            if value is not None and value != []:
                raise RequestError(name, "given", "leave it out; the policy reads text alone")
        request = self._request([int(token) for token in prompt_ids], sampling_params, request_id, priority)
        trajectory = await self._generations.generate(request)
        if trajectory is None:
            return TokenOutput(token_ids=[], log_probs=[], stop_reason="aborted", num_preempted=0)
        return TokenOutput(**token_output(trajectory, await self._steps_of(trajectory)))

    def _request(self, prompt: list[int], given: dict[str, Any], request_id: str, priority: int) -> RolloutRequest:
        config = self._config
        longest = longest_answer(len(prompt), config.prompt_length, config.response_length, config.max_model_len)
        given = {"repetition_penalty": config.repetition_penalty, "ignore_eos": config.ignore_eos, **given}
        params = sampling_params(given, self._settings.sampler, longest)
        turn = self._turns.take(request_id)
        seed = derived_seed(config.seed, f"{request_id}/{turn}") if params.seed is None else params.seed
        return RolloutRequest(id=f"{self._life}/{request_id}/{turn}", prompt_tokens=tuple(prompt), params=params, seed=seed,
                              samples=1, priority=priority)  # fmt: skip

    async def _steps_of(self, trajectory: Trajectory) -> dict[int, int]:
        """verl's step of each version in the trajectory. Raises TransportError for a version that this run has not pushed."""
        versions = {int(version) for version in trajectory.versions}
        if not versions <= self._steps.keys():
            self._steps = await self._versions.steps.remote()
        if unknown := versions - self._steps.keys():
            raise TransportError(f"the service answered with weight version {min(unknown)}, which this run has not pushed; give "
                                 "each trainer a service of its own")
        return self._steps

    async def abort_all_requests(self, reject_request: bool = False) -> dict[str, Any]:
        """Closes the gate until `resume_generation`. Unless `in_flight` is `keep`, ends the requests that are inside; returns
        when they are answered.

        Args:
            reject_request: answer requests that arrive meanwhile with `aborted`, instead of letting them wait.
        """
        self._generations.close_gate(reject_request)
        ended = 0 if self._settings.in_flight == "keep" else await self._generations.abort()
        return {"aborted_count": ended, "request_ids": []}

    async def resume_generation(self) -> None:
        """Opens the gate."""
        self._generations.open_gate()

    async def clear_kv_cache(self) -> None:
        """Has the engines forget K/V of requests that have ended. An update of the weights does not need it."""
        await self._generations.reset_prefix_cache()

    async def wake_up(self, **_: Any) -> None:
        """Nothing: the service has its own memory."""

    async def sleep(self, **_: Any) -> None:
        """Nothing."""

    async def release_kv_cache(self) -> None:
        """Nothing."""

    async def resume_kv_cache(self) -> None:
        """Nothing."""

    async def start_profile(self, **_: Any) -> None:
        """Nothing: see the service's metrics."""

    async def stop_profile(self) -> None:
        """Nothing."""
