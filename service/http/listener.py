"""The socket that HTTP is served on. It is bound once, so the port that is announced is the one that answers."""

from __future__ import annotations

import socket

from ...errors import InvalidInput
from ..config import Http


def bind(options: Http) -> socket.socket:
    """The socket that HTTP is served on. Raises InvalidInput for an address that cannot be bound."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise InvalidInput("http.port", f"{options.host}:{options.port} cannot be bound ({error.strerror})",
                           "choose a free port of this machine, or 0") from error
    return listener
