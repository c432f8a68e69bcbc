"""Runs uvicorn in a thread for as long as a block lasts."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from ...errors import ClusterError
from ...rollout.search.functions import load_function
from ...trainer_bridge.client import ServiceControl
from ...trainer_bridge.gateway import Gateway
from ...trainer_bridge.wire.key_files import load_client_keys
from ..config import Http, ServiceConfig
from .app import ROUTERS, create_app
from .direct_routes import DirectRoutes
from .dispatch import Dispatch
from .keys import HttpKeys
from .listener import bind
from .search_threads import SearchThreads
from .state import HttpState, read_policy, read_template
from .trainer_control import TrainerControl

_log = logging.getLogger(__package__)
START_S, CLOSE_S = 30.0, 5
"""Seconds that uvicorn may take to start, and that open connections may take to end."""
BACKLOG = 2048
"""Connections that wait to be accepted."""


@contextmanager
def serving_http(config: ServiceConfig, options: Http, gateway: Gateway) -> Iterator[str]:
    """Answers HTTP while the block runs; yields the base URL.

    Raises:
        InvalidInput: the port is taken, a key cannot be read, or there is no such function.
    """
    keys = HttpKeys.of(options)
    listener = bind(options)
    with listener:
        (tokenizer, sizes), template = read_policy(config), read_template(options)
        bridge_keys = load_client_keys(config.delivery.keys) if config.delivery.keys else None
        for reference in options.search_functions:
            load_function(reference, "http.search_functions")
        dispatch = Dispatch(gateway, bridge_keys, options.max_unfinished)
        try:
            with ServiceControl(gateway.address, keys=bridge_keys, timeout=5.0) as control:
                trainer = TrainerControl(gateway, bridge_keys, dispatch)
                state = HttpState(config, options, gateway, dispatch, control, keys, tokenizer, template, sizes,
                                  int(time.time()), trainer, SearchThreads())
                with _running(state, listener):
                    host, port = listener.getsockname()[:2]
                    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
                    _log.info("HTTP is served at %s", url)
                    try:
                        yield url
                    finally:
                        dispatch.close()
                        trainer.close()
        finally:
            dispatch.close()


@contextmanager
def _running(state: HttpState, listener: socket.socket) -> Iterator[None]:
    app = DirectRoutes(create_app(state), ROUTERS)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", backlog=BACKLOG,
                                           loop="asyncio", http="httptools", proxy_headers=False, server_header=False,
                                           timeout_graceful_shutdown=CLOSE_S))
    thread = threading.Thread(target=server.run, args=([listener],), name="blockroll-http", daemon=True)
    thread.start()
    try:
        end = time.monotonic() + START_S
        while not server.started:
            if not thread.is_alive() or time.monotonic() > end:
                raise ClusterError("http: uvicorn does not start; see the service's log")
            time.sleep(0.01)
        yield
    finally:
        server.should_exit = True
        thread.join()
