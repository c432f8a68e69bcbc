"""How a run appears to the service it trains against, and the file that keeps it across restarts.

A service of its own serves this run alone: request ids need no prefix, and its version 0 is the starting policy. A service that
runs already has a ledger with other requests and may serve any weights. There the run has a client id and a prefix of its own,
and first pushes its starting policy.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ....errors import ConfigError
from ....files import storing, write_json
from ...client import ClientKeys

ATTACHMENT = "service.json"


@dataclass(frozen=True)
class Endpoint:
    """A service to train against.

    Attributes:
        keys: of the client; None on loopback.
        shared: the service was there before the run and stays after it.
    """

    address: str
    keys: ClientKeys | None = None
    shared: bool = False


@dataclass(frozen=True)
class Attachment:
    """One run at its service.

    Attributes:
        client: client id. prefix: what request ids begin with.
        version: weight version of the starting policy; None before it is pushed.
    """

    client: str = "grpo"
    prefix: str = ""
    version: int | None = 0

    def at(self, version: int, output: Path) -> Attachment:
        """The same run once its starting policy is this version; written to the run's directory."""
        found = replace(self, version=version)
        write_json(output / ATTACHMENT, asdict(found))
        return found


def attach(output: Path, shared: bool, resume: bool) -> Attachment:
    """The attachment of the run in the directory; a run that begins gets a new one, and what another run left there goes.

    Raises ConfigError when a run is to go on at a service of the other kind: its requests lie in the ledger it began with.
    """
    path = output / ATTACHMENT
    if resume and path.exists() != shared:
        began, now = ("a service that ran already", "its own") if path.exists() else ("a service of its own", "another one")
        raise ConfigError("address", f"the run in {output} began with {began} and is to go on with {now}",
                          "resume with the service it began with, or give another output")
    if not shared:
        with storing(path):
            path.unlink(missing_ok=True)
        return Attachment()
    if path.exists():
        return Attachment(**json.loads(path.read_text()))
    name = uuid.uuid4().hex[:12]
    attachment = Attachment(f"grpo-{name}", f"{name}/", None)
    write_json(path, asdict(attachment))
    return attachment
