"""A directory of CURVE keys: what a service and its clients need, one file each.

    server.key    the gateway's pair; it never leaves the service's machine
    server.pub    the gateway's public key, for clients
    data.key      a client's pair: requests and trajectories
    control.key   a client's pair for control sessions: weights, scale, down
    data.allowed, control.allowed    further public keys that the gateway admits, one a line; optional
"""

from __future__ import annotations

import os
from pathlib import Path

from ...errors import InvalidInput, StorageError
from ...files import make_directory, write_atomic
from .keys import ClientKeys, CurveKeys, ServerKeys

SERVER, SERVER_PUBLIC, DATA, CONTROL = "server.key", "server.pub", "data.key", "control.key"
AnyKeys = ClientKeys | str | os.PathLike[str] | None
"""Keys of a client, or the directory that holds them."""


def make_keys(directory: str | os.PathLike[str]) -> Path:
    """Makes the keys of a service where there are none; a directory that has keys stays as it is.

    Raises StorageError for a directory that holds some of the files, or cannot be written.
    """
    path = Path(directory)
    present = [name for name in (SERVER, DATA, CONTROL) if (path / name).exists()]
    if present and len(present) < 3:
        missing = next(name for name in (SERVER, DATA, CONTROL) if name not in present)
        raise StorageError(f"keys: {path} holds {present[0]} and no {missing}; restore the file, or name a new directory")
    if not present:
        make_directory(path)
        os.chmod(path, 0o700)
        for name in (SERVER, DATA, CONTROL):
            CurveKeys.generate().save(path / name)
    if not (path / SERVER_PUBLIC).exists():
        write_atomic(path / SERVER_PUBLIC, f"{CurveKeys.load(path / SERVER).public}\n".encode())
    return path


def load_server_keys(directory: str | os.PathLike[str]) -> ServerKeys:
    """What the gateway needs. Raises InvalidInput for a missing or broken file."""
    path = Path(directory)
    allowed = [frozenset({CurveKeys.load(path / name).public, *_allowed(path / other)})
               for name, other in ((DATA, "data.allowed"), (CONTROL, "control.allowed"))]  # fmt: skip
    return ServerKeys(CurveKeys.load(path / SERVER), *allowed)


def load_client_keys(directory: str | os.PathLike[str]) -> ClientKeys:
    """What a client needs; the control pair is optional. Raises InvalidInput for a missing or broken file."""
    path = Path(directory)
    try:
        server = (path / SERVER_PUBLIC).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput("keys", f"{path / SERVER_PUBLIC} cannot be read ({error})",
                           "name the directory of keys that `blockroll up` made") from error
    control = CurveKeys.load(path / CONTROL) if (path / CONTROL).exists() else None
    return ClientKeys(server, CurveKeys.load(path / DATA), control)


def client_keys(keys: AnyKeys) -> ClientKeys | None:
    """The keys, read from their directory where that is given. Raises InvalidInput as `load_client_keys`."""
    return load_client_keys(keys) if isinstance(keys, str | os.PathLike) else keys


def _allowed(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []
