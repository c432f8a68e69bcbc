"""The trainer's side of the bridge.

Knows requests, trajectories and weights as bytes. Does not know the gateway's ledger or its engines. Imports neither
torch, Ray nor an engine.

`rollout_client`: the public face, made by `connecting`; `async_client`: its asyncio twin, imported by name, since asyncio takes
50 ms. `arguments` checks what a caller gives. `message_loop` exchanges messages over a `connection`; `pending_requests` knows
what was submitted and what arrived, each as a `pending_request`; `collector` gathers one call's answers, `generate` orders
them; `handed_out` knows what waits for an acknowledgement. `conversation`: multi-turn rollouts over a client.
`control_session`: `weight_pusher` sends `host_weights`. `service_control`: what operators and trainers ask of a running
service, such as a pause; `async_control`: its asyncio twin.
"""

from ..wire.keys import ClientKeys, CurveKeys
from .connecting import connect
from .connection import RequestRefused
from .conversation import Conversation, converse, converse_async
from .rollout_client import RolloutClient
from .service_control import ServiceControl, ServiceStatus

__all__ = ["ClientKeys", "Conversation", "CurveKeys", "RequestRefused", "RolloutClient", "ServiceControl", "ServiceStatus",
           "connect", "converse", "converse_async"]
