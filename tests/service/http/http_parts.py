"""A live service with an HTTP face, and what its answers are compared with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from blockroll.service.config import ServiceConfig
from blockroll.service.lifecycle import Service, serve
from blockroll.settings import parse

MODEL = "tiny-reasoner"
KEY, CONTROL_KEY = "a-key", "another-key"
LISTED = "blockroll.model.tasks:answer"
"""The function that searches may name."""
TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    "{% for message in messages %}"
    "{% if message.role == 'forbidden' %}{{ raise_exception('no such role') }}{% endif %}"
    "{{ message.role }}: {{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function.name }}({{ call.function.arguments.a }}){% endfor %}"
    "{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@contextmanager
def live_service(directory: Path, **http: object) -> Iterator[Service]:
    """A service of one engine in this process, beyond loopback, with keys of both kinds: of HTTP and of the gateway. A second one
    joins the Ray of the first."""
    (directory / "api.key").write_text(f"{KEY}\n")
    (directory / "control.key").write_text(f"{CONTROL_KEY}\n")
    (directory / "chat.jinja").write_text(TEMPLATE)
    section = {"host": "0.0.0.0", "api_key": str(directory / "api.key"), "control_key": str(directory / "control.key"),
               "chat_template": str(directory / "chat.jinja"), "max_unfinished": 300, "search_functions": [LISTED],
               **http}  # fmt: skip
    config = parse({"policy": MODEL, "engines": {"count": 1, "batch": 16, "device": "cpu", "pages": 512, "num_cpus": 0.5},
                    "sampling": {"max_tokens": 48}, "http": section,
                    "delivery": {"ledger": str(directory / "ledger.sqlite"), "keys": str(directory / "keys")},
                    }, ServiceConfig, "test")  # fmt: skip
    with serve(config) as service:
        yield service


def url_of(service: Service) -> str:
    """The base URL, by loopback."""
    assert service.record.http is not None
    return service.record.http.replace("0.0.0.0", "127.0.0.1")


def wait_for(done: Callable[[], bool], seconds: float = 30.0) -> None:
    """Returns when `done()`."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)
