"""What guards a route before it does anything: keys, origin, and the size and form of the body.

A router is made with `route_class=ApiRoute`, or `ControlRoute` where its routes change the service's state.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.requests import ClientDisconnect

from ...trainer_bridge.wire.sockets import is_local
from .http_errors import HttpError, client_gone
from .state import HttpState


class BoundedRequest(Request):
    """A request whose body is read up to a limit and parsed strictly: UTF-8, no NaN, at most 200 levels of nesting."""

    most: int

    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            said = self.headers.get("content-length", "")
            if said.isdecimal() and int(said) > self.most:
                raise self._too_large()
            kept = bytearray()
            try:
                async for chunk in self.stream():
                    kept += chunk
                    if len(kept) > self.most:
                        raise self._too_large()
            except ClientDisconnect:
                raise client_gone() from None
            self._body = bytes(kept)
        return self._body

    async def parse(self) -> None:
        """Parses a JSON body, which `json` then returns. FastAPI would turn an error of `json` into one without a reason."""
        try:
            self._json = from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise HttpError(400, f"the body is no JSON: {error}", code="invalid_json") from None

    def _too_large(self) -> HttpError:
        return HttpError(413, f"the body is larger than {self.most} bytes (http.max_body_bytes)", code="body_too_large")


Handler = Callable[[BoundedRequest], Awaitable[Response]]


class ApiRoute(APIRoute):
    """A route that needs the API key."""

    control = False

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        return self.guarded(super().get_route_handler())

    def guarded(self, handle: Handler) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Calls `handle` with a request that this route's guards have let through."""

        async def guarded(request: Request) -> Response:
            state: HttpState = request.app.state.http
            unguarded = state.keys.local and state.keys.api is None
            if self.control and request.method == "GET":
                check_link(request.headers.get("sec-fetch-site"), request.headers.get("host"), unguarded)
            check_origin(request.headers.get("origin"), request.headers.get("host"), unguarded)
            state.keys.check(request.headers.get("authorization"), self.control)
            bounded = BoundedRequest(request.scope, request.receive)
            bounded.most = state.options.max_body_bytes
            if request.method in ("POST", "PUT", "PATCH") and await bounded.body():
                kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
                if kind != "application/json":
                    raise HttpError(415, f"content-type {kind[:60]!r} is not read; send application/json")
                await bounded.parse()
            return await handle(bounded)

        return guarded


class ControlRoute(ApiRoute):
    """A route that changes the service's state, and needs the control key."""

    control = True


def check_link(site: str | None, host: str | None, unguarded: bool) -> None:
    """Raises HttpError for a GET that changes the service and that a web page may have a browser send without an `Origin`: by an
    image, by a link, or to a name that was pointed at this machine after the browser had loaded its page.

    Args: site: the header `Sec-Fetch-Site`, which browsers send. host, unguarded: as for `check_origin`.
    """
    if site not in (None, "same-origin", "none"):
        raise HttpError(403, "a page of another host may not call this service", code="foreign_origin")
    check_origin(f"http://{host or ''}", host or "", unguarded)


def check_origin(origin: str | None, host: str | None, unguarded: bool) -> None:
    """Raises HttpError for a request that a web page of another host has a browser send.

    Args:
        unguarded: no key keeps others out, but the address does. Then the page has to be of this machine: any other name may
            have been pointed at this address after the browser had loaded its page.
    """
    if origin is None:
        return
    place = origin.partition("://")[2]
    name = re.sub(r":\d+$", "", place)
    if place != host or (unguarded and not is_local(f"tcp://{name}:0")):
        raise HttpError(403, f"a page of {origin[:100]} may not call this service", code="foreign_origin")
