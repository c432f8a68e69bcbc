"""`connect`: a client of a gateway."""

from __future__ import annotations

from typing import Literal

from ..wire.key_files import AnyKeys, client_keys
from .rollout_client import RolloutClient


def connect(address: str, *, client_id: str | None = None, keys: AnyKeys = None, timeout: float = 30.0,
            ack: Literal["auto", "manual"] = "auto") -> RolloutClient:
    """Connects to a gateway; returns when it has answered.

    Args:
        address: the gateway's `address`, `tcp://HOST:PORT` or `ipc://PATH`; beyond loopback only with `keys`.
        client_id: the trainer's stable name: unfinished work belongs to it and survives both sides' restarts. A random
            one by default, which cannot be resumed. One live connection per client_id.
        keys: the gateway's public key, this client's pair, and one for control sessions; or the directory of these.
        timeout: seconds without a message from the gateway after which waiting ends with TransportError.
        ack: when trajectories are acknowledged; see RolloutClient.

    Raises TransportError when the gateway cannot be reached, does not admit the key, or speaks another protocol.
    """
    return RolloutClient(address, client_id=client_id, keys=client_keys(keys), timeout=timeout, ack=ack)
