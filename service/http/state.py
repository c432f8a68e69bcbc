"""What every route is given: the gateway behind it, the policy's tokenizer and sizes, keys and limits."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from ...errors import CheckpointError, ConfigError
from ...inputs import read_input
from ...model.tokenizer_files import read_tokenizer
from ...trainer_bridge.client import ServiceControl, ServiceStatus
from ...trainer_bridge.gateway import Gateway
from .. import policy_files
from ..config import Http, ServiceConfig
from .dispatch import Dispatch
from .keys import HttpKeys
from .request_names import RequestNames
from .search_threads import SearchThreads
from .trainer_control import TrainerControl

MAX_TEMPLATE_BYTES = 1 << 20
"""Bytes of the longest chat template."""


@dataclass(frozen=True)
class PolicySizes:
    """What bounds a prompt. `positions`: most tokens of a prompt and its completion."""

    vocabulary: int
    positions: int


@dataclass(frozen=True)
class HttpState:
    """One service, as its routes see it.

    Attributes:
        dispatch: sends requests to the gateway, as a client of it.
        gateway: for what no client message says.
        control: a control session; use `status`, which takes turns.
        trainer: what trainers change. names: the names that clients gave to requests.
        search_threads: where searches compute between their samples.
        tokenizer: the policy's; None where it has none. chat_template: in place of its own; None for that.
        created: when the service came up, seconds since the epoch.
    """

    config: ServiceConfig
    options: Http
    gateway: Gateway
    dispatch: Dispatch
    control: ServiceControl
    keys: HttpKeys
    tokenizer: Any
    chat_template: str | None
    sizes: PolicySizes
    created: int
    trainer: TrainerControl
    search_threads: SearchThreads
    names: RequestNames = field(default_factory=RequestNames)
    _turn: threading.Lock = field(default_factory=threading.Lock)

    @property
    def policy(self) -> str:
        """The policy's name, which clients give as `model`."""
        return self.options.model_name or self.config.policy

    @property
    def version(self) -> int:
        """The weight version that serves."""
        return self.dispatch.version

    async def status(self) -> ServiceStatus:
        """Figures and engines. Raises TransportError where the gateway does not answer."""

        def ask() -> ServiceStatus:
            with self._turn:
                return self.control.status()

        return await asyncio.to_thread(ask)


async def state_of(request: Request) -> HttpState:
    """The state of the application that serves a request; a dependency of routes. A coroutine, because FastAPI calls a plain
    function in another thread."""
    state: HttpState = request.app.state.http
    return state


def read_template(options: Http) -> str | None:
    """The chat template that the configuration names. Raises ConfigError."""
    if options.chat_template is None:
        return None
    try:
        return read_input(options.chat_template, MAX_TEMPLATE_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("http.chat_template", f"{options.chat_template} cannot be read ({error})",
                          "name a file of a Jinja template") from error


def read_policy(config: ServiceConfig) -> tuple[Any, PolicySizes]:
    """The policy's tokenizer (None where it has none) and its sizes. Raises CheckpointError."""
    directory = policy_files.find(config.policy)
    try:
        found = json.loads((directory / "config.json").read_text())
        sizes = PolicySizes(int(found["vocab_size"]), int(found["max_position_embeddings"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError("policy", f"{directory / 'config.json'} does not say how large the policy is ({error!r})",
                              "restore the file") from error
    return read_tokenizer(directory), sizes
