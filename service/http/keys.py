"""The two keys of the HTTP face, and who has to show which.

- The API key: every route, once one is configured. Off loopback one must be.
- The control key: every route that changes the service's state, once one is configured; off loopback such a route is refused
  without one, and on loopback it then needs the API key. The control key opens the other routes too.
"""

from __future__ import annotations

import hmac
import os
from dataclasses import dataclass

from ...errors import ConfigError
from ...inputs import read_input
from ..config import Http
from .http_errors import HttpError

MAX_KEY_BYTES = 4096
"""Bytes of the longest key file."""


@dataclass(frozen=True, repr=False)
class HttpKeys:
    """The keys; None where none is configured. `local`: only this machine can reach the service."""

    api: str | None
    control: str | None
    local: bool

    @classmethod
    def of(cls, options: Http) -> HttpKeys:
        """The keys that the configuration names. Raises ConfigError for one that cannot be read."""
        return cls(read_key(options.api_key, "http.api_key"), read_key(options.control_key, "http.control_key"), options.is_local)

    def check(self, authorization: str | None, control: bool) -> None:
        """Raises HttpError where the header `Authorization` does not open a route.

        Args:
            control: the route changes the service's state.
        """
        if control and self.control is None and not self.local:
            raise HttpError(403, "this route changes the service and no http.control_key is configured", code="no_control_key")
        control = control and self.control is not None
        wanted = [self.control] if control else [self.api, self.control] if self.api is not None else []
        known = [key.encode() for key in wanted if key is not None]
        if not known:
            return
        scheme, _, shown = (authorization or "").partition(" ")
        given = shown.strip().encode("utf-8", "surrogateescape")
        if scheme.lower() != "bearer" or not any([hmac.compare_digest(given, key) for key in known]):
            what = "control key" if control else "API key"
            raise HttpError(401, f"this route needs the {what}: send the header `Authorization: Bearer KEY`",
                            code="invalid_api_key")


def read_key(source: str | None, field: str) -> str | None:
    """A key from `env:NAME` or from a file.

    Raises:
        ConfigError: there is none, or it is empty or no line of ASCII text.
    """
    if source is None:
        return None
    if source.startswith("env:"):
        text = os.environ.get(source[4:], "")
    else:
        try:
            text = read_input(source, MAX_KEY_BYTES).decode("ascii", "replace")
        except OSError as error:
            raise ConfigError(field, f"{source} cannot be read ({error.strerror})",
                              "name a file that holds the key, or env:NAME") from error
    key = text.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(field, f"{source} holds no key of printable ASCII characters", "write one line, without blanks")
    return key
