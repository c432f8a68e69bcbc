"""The section `blockroll` of verl's `rollout.engine_kwargs` and `rollout.checkpoint_engine.engine_kwargs`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from ....errors import ConfigError
from ....rollout.params import SamplerName
from ....settings import Config, parse

NAME = "blockroll"
"""What verl's configuration calls the rollout, the checkpoint engine and their sections."""


class ServiceSettings(Config):
    """How verl's workers reach the service.

    Attributes:
        address: of the gateway, as `blockroll status` shows it.
        keys: directory of the client's keys; empty on loopback.
        sampler: of training and validation. With `ar` and `coupled` tokens depend on seed, prompt and weights alone.
        timeout: a call fails when the gateway has been silent for so many seconds, or twice as many.
        in_flight: what an update of the weights does to requests that have begun, where trainer and rollouts are apart. `abort`
            ends them with the tokens that they have, and verl's asynchronous trainers ask for the rest; `keep` lets them go on,
            each token with its version.
    """

    address: str
    keys: str = ""
    sampler: SamplerName = "coupled"
    timeout: float = Field(default=60.0, gt=0)
    in_flight: Literal["abort", "keep"] = "abort"


def service_settings(engine_kwargs: Mapping[str, Any], place: str = "rollout.engine_kwargs") -> ServiceSettings:
    """The settings among `engine_kwargs`. Raises ConfigError, which names the key."""
    section = engine_kwargs.get(NAME)
    if section is None:
        raise ConfigError(f"{place}.{NAME}", "missing", f"add +actor_rollout_ref.{place}.{NAME}.address=tcp://HOST:PORT, as "
                          "`blockroll status CONFIG` shows it")
    return parse(_plain(section), ServiceSettings, f"{place}.{NAME}")


def _plain(value: Any) -> Any:
    """Mappings as dictionaries: verl gives sections of OmegaConf, too."""
    return {str(key): _plain(each) for key, each in value.items()} if isinstance(value, Mapping) else value
