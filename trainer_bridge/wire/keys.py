"""CURVE keys: they identify a client, and a gateway admits only those it lists.

Invariants:
- Control sessions have keys of their own: a data key cannot push weights, a control key cannot take trajectories.
- A secret is never printed, and only its owner can read a file of keys.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from ...errors import InvalidInput, StorageError

_KEY = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")


@dataclass(frozen=True)
class CurveKeys:
    """A CURVE key pair, Z85 text of 40 characters each."""

    public: str
    secret: str = field(repr=False)

    def __post_init__(self) -> None:
        _check_key("public", self.public)
        _check_key("secret", self.secret)

    @classmethod
    def generate(cls) -> CurveKeys:
        public, secret = zmq.curve_keypair()
        return cls(public.decode(), secret.decode())

    @classmethod
    def load(cls, path: str | Path) -> CurveKeys:
        """Keys written by `save`. Raises InvalidInput for a file that does not hold a pair."""
        try:
            lines = Path(path).read_text().split()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInput("keys", f"{path} cannot be read ({error})",
                               "name a file written by CurveKeys.save") from error
        if len(lines) != 2:
            raise InvalidInput("keys", f"{path} holds {len(lines)} words", "name a file written by CurveKeys.save")
        return cls(*lines)

    def save(self, path: str | Path) -> None:
        """Writes the pair, readable by its owner alone; an existing file is never overwritten."""
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "w") as file:
                file.write(f"{self.public}\n{self.secret}\n")
        except OSError as error:
            raise StorageError(f"cannot write keys to {path}: {error.strerror}; "
                               "name a new file in a writable folder") from error


@dataclass(frozen=True)
class ClientKeys:
    """The keys of a client: the gateway's public key, its own pair, and a pair for control sessions, which push
    weights."""

    server: str
    data: CurveKeys
    control: CurveKeys | None = None

    def __post_init__(self) -> None:
        _check_key("server", self.server)
        _check_pair("data", self.data)
        if self.control is not None:
            _check_pair("control", self.control)


@dataclass(frozen=True)
class ServerKeys:
    """The gateway's pair, and the public keys it admits to data sessions and to control sessions."""

    own: CurveKeys
    data: frozenset[str]
    control: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        _check_pair("own", self.own)
        for name in ("data", "control"):
            keys = getattr(self, name)
            if isinstance(keys, str | bytes) or not isinstance(keys, Collection):
                raise InvalidInput(name, f"a {type(keys).__name__}, not a set of public keys",
                                   "list the public keys of the clients that are admitted")
            for key in keys:
                _check_key(name, key)
            object.__setattr__(self, name, frozenset(keys))
        if self.data & self.control:
            raise InvalidInput("control", "a key is listed for data and for control", "use separate keys")

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether this public key (Z85) is listed. pyzmq calls it at each handshake."""
        return key.decode("ascii", "replace") in self.data | self.control


def _check_pair(name: str, value: object) -> None:
    if not isinstance(value, CurveKeys):
        raise InvalidInput(name, f"a {type(value).__name__}, not CurveKeys", "make pairs with CurveKeys.generate()")


def _check_key(name: str, value: str) -> None:
    if not isinstance(value, str) or not _KEY.fullmatch(value):
        raise InvalidInput(name, "not a CURVE key of 40 Z85 characters", "make pairs with CurveKeys.generate()")
