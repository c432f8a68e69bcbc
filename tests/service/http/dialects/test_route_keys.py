"""Every route is listed here with the key that it needs, so that a route without a line fails."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from blockroll.service.config import Http, ServiceConfig
from blockroll.service.http.app import create_app
from blockroll.service.http.http_errors import HttpError
from blockroll.service.http.routes import ApiRoute, check_link
from blockroll.service.http.server import serving_http
from blockroll.settings import parse
from blockroll.trainer_bridge.gateway import Gateway

sys.path.insert(0, str(Path(__file__).parents[3] / "trainer_bridge"))
from bridge_parts import ToyBackend

CONTROL = [
    "POST /pause", "POST /resume", "POST /abort_requests", "POST /reset_prefix_cache", "POST /start_weight_update",
    "POST /update_weights", "POST /finish_weight_update", "POST /update_weight_version", "POST /areal_pause_generation",
    "POST /areal_continue_generation", "POST /areal_update_weights", "POST /update_weights_from_disk", "GET /flush_cache",
    "POST /flush_cache", "POST /pause_generation", "POST /continue_generation", "POST /abort_request",
]  # fmt: skip
"""They change the state of the service."""
API = [
    "GET /health", "GET /metrics", "GET /openapi.json", "GET /v1/models", "GET /v1/models/{name:path}", "POST /v1/completions",
    "POST /v1/chat/completions", "POST /tokenize", "POST /detokenize", "POST /inference/v1/generate", "POST /skyrl/v1/generate",
    "GET /is_paused", "GET /weight_info", "GET /get_world_size", "GET /server_info", "GET /get_server_info", "POST /generate",
    "GET /health_generate", "GET /get_weight_version", "GET /get_model_info", "GET /v1/loads",
]  # fmt: skip


def routes() -> dict[str, Any]:
    """Every route of the application, by method and path."""
    found, left = {}, list(create_app(cast(Any, None)).routes)
    while left:
        route: Any = left.pop()
        if (router := getattr(route, "original_router", None)) is not None:
            left += router.routes
            continue
        for method in route.methods:
            assert f"{method} {route.path}" not in found, route.path
            found[f"{method} {route.path}"] = route
    return found


def test_every_route_is_listed_once_and_guarded_as_the_list_says() -> None:
    found = routes()
    assert sorted(found) == sorted([*CONTROL, *API])
    for name, route in found.items():
        assert isinstance(route, ApiRoute) and route.control == (name in CONTROL), name


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A service with both keys on loopback; its engines are absent."""
    folder = tmp_path_factory.mktemp("keys")
    (folder / "api").write_text("the-api-key")
    (folder / "control").write_text("the-control-key")
    options = {"api_key": str(folder / "api"), "control_key": str(folder / "control")}
    config = parse({"policy": "tiny-reasoner", "http": options, "delivery": {"ledger": str(folder / "l.sqlite")}}, ServiceConfig,
                   "test")
    with (Gateway(ToyBackend(), "tcp://127.0.0.1:*", config.delivery.ledger) as gateway,
          serving_http(config, cast(Http, config.http), gateway) as url,
          httpx.Client(base_url=url, timeout=30) as found):  # fmt: skip
        yield found


@pytest.mark.parametrize("name", [*CONTROL, *API])
def test_the_key_is_needed(name: str, client: httpx.Client) -> None:
    method, path = name.split()
    answers = {}
    for key in ("", "wrong", "the-api-key", "the-control-key"):
        headers = {"authorization": f"Bearer {key}"} if key else {}
        answers[key] = client.request(method, path.replace("{name:path}", "x"), json={} if method == "POST" else None,
                                      headers=headers).status_code  # fmt: skip
    assert answers[""] == answers["wrong"] == 401
    assert (answers["the-api-key"] == 401) == (name in CONTROL)
    assert answers["the-control-key"] != 401 and all(status < 500 or status == 503 for status in answers.values()), answers


def test_a_page_cannot_have_a_browser_change_the_service_by_a_link(client: httpx.Client) -> None:
    """A browser sends an image's GET without an `Origin`. A name that was pointed at this machine looks like the page's own."""
    key = {"authorization": "Bearer the-control-key"}
    for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 503), ("none", 503)):
        found = client.get("/flush_cache", headers={**key, "sec-fetch-site": site})
        assert found.status_code == status, found.text  # 503: these engines are absent
    assert client.get("/is_paused", headers={**key, "sec-fetch-site": "cross-site"}).status_code == 200


@pytest.mark.parametrize(("site", "host", "keyless", "keyed"), [
    (None, "localhost:8000", True, True), ("none", "127.0.0.1:8000", True, True), ("same-origin", "[::1]:80", True, True),
    (None, "evil.example:8000", False, True), ("same-origin", "evil.example", False, True), (None, None, False, True),
    ("cross-site", "localhost:8000", False, False), ("same-site", "localhost", False, False),
])
def test_links_that_change_the_service(site: str | None, host: str | None, keyless: bool, keyed: bool) -> None:
    for unguarded, wanted in ((True, keyless), (False, keyed)):
        try:
            check_link(site, host, unguarded)
        except HttpError as error:
            assert error.status == 403 and error.code == "foreign_origin" and not wanted
        else:
            assert wanted


def test_no_names_abort_nothing(client: httpx.Client) -> None:
    """This backend cannot abort, so whatever does is refused."""
    headers = {"authorization": "Bearer the-control-key"}
    for body, status, answer in (({"request_ids": []}, 200, {"status": "aborted", "aborted": 0}), ({}, 503, None)):
        found = client.post("/abort_requests", json=body, headers=headers)
        assert found.status_code == status and (answer is None or found.json() == answer), found.text
