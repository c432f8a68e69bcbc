"""verl's replica `blockroll`: a door to a service that is up. It starts no engine."""

from __future__ import annotations

from typing import Any

import ray
from verl.workers.rollout.replica import RolloutReplica

from ....errors import InvalidInput
from .server import RolloutServer
from .settings import NAME, service_settings
from .weight_steps import weight_steps


class ServiceReplica(RolloutReplica):
    """Launches one server actor. Several replicas reach one service, which spreads their requests over its engines."""

    async def launch_servers(self) -> None:
        """Launches the server and connects it. Raises ConfigError or TransportError."""
        config = self.config
        if self.is_reward_model or self.is_teacher_model:
            raise InvalidInput("rollout.name", f"{NAME} for a reward model or a teacher", "use another rollout for it")
        if config.enable_rollout_routing_replay:
            raise InvalidInput("rollout.enable_rollout_routing_replay", "True",
                               "set it to False; verl's trainer replays no routes of this policy")
        settings = service_settings(config.engine_kwargs)
        self._steps = weight_steps()  # belongs to the process that owns the replicas, which outlives a server
        options: dict[str, Any] = {"num_cpus": 0, "max_concurrency": self.max_concurrency,
                                   "name": f"{NAME}_server_{self.replica_rank}{self.name_suffix}"}
        server = ray.remote(RolloutServer).options(**options).remote(config, settings, self.replica_rank)
        await server.launch.remote()
        self.servers, self._server_handle = [server], server
        # verl tells servers apart by their addresses.
        address = settings.address.removeprefix("tcp://")
        self._server_address = f"replica-{self.replica_rank}@{address}" if self.replica_rank else address

    def rollout_worker_use_gpu(self) -> bool:
        return False
