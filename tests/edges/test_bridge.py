"""The edge of the bridge: hostile messages over a real socket, careless arguments, limits.

One gateway serves every row. A row may cost its own sender an error in one line; the gateway goes on, and a client that
was connected before all rows gets its work done after each.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq

sys.path.insert(0, str(Path(__file__).parents[1] / "trainer_bridge"))

from bridge_parts import ToyBackend, make_trajectory, request, weights

from blockroll.errors import BlockrollError, InvalidInput, TransportError
from blockroll.rollout.types import RolloutRequest
from blockroll.trainer_bridge.client import ClientKeys, CurveKeys, RolloutClient, connect
from blockroll.trainer_bridge.gateway import Gateway
from blockroll.trainer_bridge.wire import messages
from blockroll.trainer_bridge.wire.codec import PROTOCOL
from blockroll.trainer_bridge.wire.keys import ServerKeys
from blockroll.trainer_bridge.wire.records import decode_request, encode_request, encode_trajectory
from blockroll.trainer_bridge.wire.sockets import split_frames

NAN, INF = float("nan"), float("inf")
PAIR = CurveKeys("a" * 40, "b" * 40)
SECONDS = 5.0
"""Most seconds a row may take."""


class Served:
    """A gateway, a client that stays, and a raw socket beside them."""

    def __init__(self, folder: Path) -> None:
        self.gateway = Gateway(ToyBackend(), "tcp://127.0.0.1:*", folder / "ledger.sqlite", max_request_samples=64,
                               max_client_samples=1000).start()
        self.client = connect(self.gateway.address, client_id="stays", timeout=10)
        self.count = 0
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.connect(self.gateway.address)

    def still_serves(self) -> None:
        self.count += 1
        assert len(self.client.generate([request(f"ok-{self.count}", 2)], timeout=5)) == 2

    def answers(self, frames: list[bytes], session: bool, control: bool = False) -> list[messages.Message]:
        """What the gateway says to these frames, up to its answer to a Ping behind them."""
        name = f"row-{self.count}"
        for each in ([messages.encode(messages.Hello(name, control, 1 << 20, "", 0))] if session else []) + [frames]:
            self.socket.send_multipart([bytes(f) for f in each])
        self.socket.send_multipart([bytes(f) for f in messages.encode(messages.Ping())])
        found: list[messages.Message] = []
        while not found or not isinstance(found[-1], messages.Pong | messages.Reset):
            assert self.socket.poll(int(1000 * SECONDS)), f"no answer to a Ping behind {frames!r:.100}, after {found}"
            found.append(messages.decode(split_frames(self.socket.recv())))
        return found

    def close(self) -> None:
        self.socket.close()
        self.client.close()
        self.gateway.stop()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = Served(tmp_path_factory.mktemp("bridge"))
    yield made
    made.close()


def header(kind: int, *fields: Any, protocol: int = PROTOCOL) -> bytes:
    return bytes(msgpack.packb([protocol, kind, *fields]))


GOOD = encode_request(request("row"))
SUBMIT = messages.Submit.KIND
MESSAGES: dict[str, tuple[list[bytes], str]] = {
    "no bytes": ([b""], "not MessagePack"),
    "no message": ([b"\xc1"], "not MessagePack"),
    "a map": ([msgpack.packb({"a": 1})], "header"),
    "a number": ([msgpack.packb(7)], "no protocol version"),
    "an extension": ([b"\x93\x02\x0a\xd6\xff\x00\x00\x00\x00"], "not MessagePack"),
    "an array of 2**32": ([b"\xdd\xff\xff\xff\xff"], "not MessagePack"),
    "deep nesting": ([b"\x91" * 100_000 + b"\xc0"], "not MessagePack"),
    "a header of 1 MB": ([b"\x80" * (1 << 20)], "at most 131072 are read"),
    "another protocol": ([header(5, protocol=99)], "protocol 99"),
    "an unknown kind": ([header(250)], "unknown kind 250"),
    "a kind that is a float": ([header(5.0)], "no protocol version"),
    "frames too many": ([header(5), *[b"x"] * 40], "no frames"),
    "Hello without fields": ([header(1)], "0 fields, expected 5"),
    "Hello with a number for a name": ([header(1, 5, False, 0, "", 0)], "expected text"),
    "Hello with an endless name": ([header(1, "n" * 5000, False, 0, "", 0)], "text of 5000 bytes"),
    "Hello with a negative credit": ([header(1, "n", False, -1, "", 0)], "integer in 0"),
    "Hello with a float credit": ([header(1, "n", False, 1.5, "", 0)], "got float 1.5"),
    "Hello with surrogates": ([b"\x97\x02\x01\xa3\xed\xa0\x80\xc2\x00\xa0\x00"], "not MessagePack"),
    "Ping with a field": ([header(5, 1)], "1 fields, expected 0"),
    "Submit of a text index": ([header(SUBMIT, "b", "0", True), GOOD], "expected an integer"),
    "Submit of part 2**40": ([header(SUBMIT, "b", 2**40, True), GOOD], "expected an integer"),
    "Submit of bytes that are no request": ([header(SUBMIT, "b", 0, True), b"\x01\x02\x03"], "3 bytes"),
    "Submit of a request cut short": ([header(SUBMIT, "b", 0, True), GOOD[:-3]], "are left"),
    "Submit of a request with a tail": ([header(SUBMIT, "b", 0, True), GOOD + b"tail"], "too many"),
    "Submit of a trajectory": ([header(SUBMIT, "b", 0, True), encode_trajectory(make_trajectory(request("x"), 0))], "kind"),
    "Submit of a request of no length": ([header(SUBMIT, "b", 0, True), b"\xff\xff\xff\xff" + GOOD], "truncated header"),
    "Credit of -1": ([header(12, -1)], "integer in 0"),
    "Credit of nothing": ([header(12)], "0 fields"),
    "Ack of 129 keys": ([header(15, 1, [["r", 0]] * 129)], "at most 128 items"),
    "Ack of a float": ([header(15, 1, [["r", 0.0]])], "got float"),
    "Ack of sample -2": ([header(15, 1, [["r", -2]])], "integer in -1"),
    "Ack with an empty id": ([header(15, 1, [["", 0]])], "text of 0 bytes"),
    "Cancel of 129": ([header(19, 1, "why", ["r"] * 129)], "at most 128 items"),
    "Cancel of a number": ([header(19, 1, "why", [5])], "expected text"),
    "Cancel with an endless reason": ([header(19, 1, "w" * 5000, ["r"])], "text of 5000 bytes"),
    "StatusRequest of text": ([header(17, "x")], "expected an integer"),
    "Delivery from a client": ([header(13, 1, "r", 0), b"x"], "not a message of the data plane"),
    "Welcome from a client": ([header(2, "ledger", 0)], "not a message of the data plane"),
    "Shutdown in a data session": ([header(40)], "Shutdown is not a message of the data plane"),
    "PushBegin in a data session": ([header(30, "p", "finish"), b"m"], "PushBegin is not a message of the data plane"),
}
CONTROL: dict[str, tuple[list[bytes], str]] = {
    "PushBegin of an unknown policy": ([header(30, "p", "maybe"), b"m"], "expected one of"),
    "PushBegin without a manifest": ([header(30, "p", "finish")], "0 frames"),
    "PushBegin of bytes that are no manifest": ([header(30, "p", "finish"), b"\0" * 40], "malformed message"),
    "PushChunk of no push": ([header(31, "p", 0, 0), b"x"], "push p is not staged"),
    "PushChunk of 2 MB": ([header(31, "p", 0, 0), bytes(2 << 20)], "at most 1048576 are read"),
    "PushChunk at a negative offset": ([header(31, "p", 0, -1), b"x"], "integer in 0"),
    "PushCommit of no push": ([header(32, "p")], "push p is not staged"),
    "Submit in a control session": ([header(SUBMIT, "b", 0, True), GOOD], "not a message of the control plane"),
    "Cancel in a control session": ([header(19, 1, "why", ["r"])], "not a message of the control plane"),
}


@pytest.mark.parametrize(("control", "row"), [(False, row) for row in MESSAGES] + [(True, row) for row in CONTROL])
def test_a_hostile_message_is_refused_in_one_line(served: Served, control: bool, row: str) -> None:
    frames, why = (CONTROL if control else MESSAGES)[row]
    start = time.monotonic()
    found = served.answers(frames, session=True, control=control)
    refused = [m.text for m in found if isinstance(m, messages.Refused)]
    assert len(refused) == 1 and why in refused[0] and "\n" not in refused[0], (found, why)
    served.still_serves()
    assert time.monotonic() - start < SECONDS


def test_a_message_without_a_session_is_answered_with_reset(served: Served) -> None:
    other = zmq.Context.instance().socket(zmq.DEALER)
    mine, served.socket = served.socket, other
    try:
        other.linger = 0
        other.connect(served.gateway.address)
        for frames in ([header(SUBMIT, "b", 0, True), GOOD], [header(19, 1, "why", ["ok-1"])], [header(40)]):
            assert all(isinstance(m, messages.Reset) for m in served.answers(frames, session=False))
    finally:
        served.socket = mine
        other.close()
    served.still_serves()


def refused_in_one_line(call: Callable[[], object], why: str) -> None:
    start = time.monotonic()
    with pytest.raises(BlockrollError) as caught:
        call()
    text = str(caught.value)
    assert why in text and "\n" not in text and len(text) < 500, text
    assert time.monotonic() - start < SECONDS


CONNECT: dict[str, tuple[dict[str, Any], str]] = {
    "no address": ({"address": None}, "address: NoneType None is no text"),
    "a number for an address": ({"address": 5}, "address: int 5"),
    "an address without a port": ({"address": "tcp://localhost"}, "not an address of the bridge"),
    "an address elsewhere without keys": ({"address": "tcp://10.0.0.1:5"}, "no CURVE keys"),
    "timeout nan": ({"timeout": NAN}, "timeout: float nan"),
    "timeout inf": ({"timeout": INF}, "timeout: float inf"),
    "timeout -1": ({"timeout": -1}, "timeout: int -1"),
    "timeout 0": ({"timeout": 0}, "timeout: int 0"),
    "timeout 10**400": ({"timeout": 10**400}, "timeout: int 1000"),
    "timeout True": ({"timeout": True}, "timeout: bool True"),
    "timeout text": ({"timeout": "30"}, "timeout: str '30'"),
    "client_id of bytes": ({"client_id": b"me"}, "client_id: bytes"),
    "client_id on two lines": ({"client_id": "a\nb"}, "not printable"),
    "client_id of 101 bytes": ({"client_id": "x" * 101}, "too long"),
    "keys of a directory that is not there": ({"keys": "secret"}, "keys: secret"),
    "keys of a number": ({"keys": 5}, "keys: int"),
    "ack of None": ({"ack": None}, "ack: unknown mode"),
}


@pytest.mark.parametrize("row", CONNECT)
def test_bad_arguments_of_connect(served: Served, row: str) -> None:
    options, why = CONNECT[row]
    refused_in_one_line(lambda: connect(**{"address": served.gateway.address, **options}), why)


def with_tokens(*tokens: Any) -> RolloutRequest:
    """A request whose tokens were not checked when it was made."""
    made = request("tokens")
    object.__setattr__(made, "prompt_tokens", tokens)
    return made


def push(name: str, value: Any) -> Callable[[RolloutClient], object]:
    return lambda client: client.push_weights(1, {**weights(), name: value})


CALLS: dict[str, tuple[Callable[[Any], object], str]] = {
    "submit None": (lambda c: c.submit(None), "requests: NoneType"),
    "submit text": (lambda c: c.submit("abc"), "requests: str"),
    "submit a request": (lambda c: c.submit(request("a")), "requests: RolloutRequest"),
    "submit ids": (lambda c: c.submit(["a"]), "requests[0]: str 'a'"),
    "submit a mapping": (lambda c: c.submit({"a": request("a")}), "requests: dict"),
    "submit a float token": (lambda c: c.submit([with_tokens(1, 2.7)]), "float64 of 1 axes where whole numbers"),
    "submit a bool token": (lambda c: c.submit([with_tokens(True)]), "bool of 1 axes where whole numbers"),
    "submit a text token": (lambda c: c.submit([with_tokens("1")]), "where whole numbers"),
    "submit a token of 64 bits": (lambda c: c.submit([with_tokens(2**63)]), "more than 63 bits"),
    "submit a token of 70 bits": (lambda c: c.submit([with_tokens(2**70)]), "where whole numbers"),
    "submit tokens in uneven lists": (lambda c: c.submit([with_tokens((1, 2), (3,))]), "not a list of whole numbers"),
    "submit tokens in lists": (lambda c: c.submit([with_tokens((1, 2), (3, 4))]), "of 2 axes where whole numbers"),
    "submit an id of 300 bytes": (lambda c: c.submit([request("i" * 300)]), "300 bytes"),
    "submit an id with a surrogate": (lambda c: c.submit([request("\ud800")]), "not valid Unicode"),
    "submit 65,537 samples": (lambda c: c.submit([request("n", 65_537)]), "1..65536"),
    "submit a million tokens and more": (lambda c: c.submit([request("t", prompt=[1] * ((1 << 20) + 1))]), "at most 1048576"),
    "generate samples over the request's limit": (lambda c: c.generate([request("s", 65)]), "at most 64 are taken"),
    "generate one id twice": (lambda c: c.generate([request("d"), request("d")]), "share an id"),
    "generate with timeout nan": (lambda c: c.generate([request("x")], NAN), "timeout: float nan"),
    "generate with a negative deadline": (lambda c: c.generate([request("x")], deadline_seconds=-1), "deadline_seconds: int -1"),
    "generate with on_error": (lambda c: c.generate([request("x")], on_error="ignore"), "on_error: unknown value"),
    "results with timeout text": (lambda c: c.results("1"), "timeout: str '1'"),
    "results with a list for on_error": (lambda c: c.results(on_error=[]), "on_error: unknown value list"),
    "cancel text": (lambda c: c.cancel("abc"), "request_ids: str"),
    "cancel a number": (lambda c: c.cancel([5]), "request_ids[0]: int 5"),
    "cancel an empty id": (lambda c: c.cancel([""]), "no request id"),
    "cancel a long id": (lambda c: c.cancel(["x" * 300]), "no request id"),
    "cancel a surrogate": (lambda c: c.cancel(["\ud800"]), "no request id"),
    "acknowledge None": (lambda c: c.acknowledge(None), "done: NoneType"),
    "acknowledge keys": (lambda c: c.acknowledge([("a", 0)]), "done[0]: tuple"),
    "push version 0": (lambda c: c.push_weights(0, weights()), "version: int 0"),
    "push version 1.0": (lambda c: c.push_weights(1.0, weights()), "version: float 1.0"),
    "push version True": (lambda c: c.push_weights(True, weights()), "version: bool True"),
    "push version 2**40": (lambda c: c.push_weights(2**40, weights()), "version: int"),
    "push a list": (lambda c: c.push_weights(1, [1]), "tensors: list"),
    "push nothing": (lambda c: c.push_weights(1, {}), "tensors: empty"),
    "push a gap of 1": (lambda c: c.push_weights(1, weights(), allow_gap=1), "allow_gap: int 1"),
    "push with an unknown policy": (lambda c: c.push_weights(1, weights(), in_flight="drop"), "in_flight: unknown policy"),
    "push a number by name": (push("scale", 0.5), "tensors['scale']: a float"),
    "push NaN": (push("scale", np.array(NAN, np.float32)), "tensors['scale']: not finite at []"),
    "push infinity in half": (push("half", np.full((3, 5), -INF, np.float16)), "tensors['half']: not finite at [0, 0]"),
    "push a NaN at the end": (push("embed.weight", np.r_[np.zeros(255), NAN].reshape(32, 8).astype(np.float32)),
                              "tensors['embed.weight']: not finite at [31, 7]"),
    "push objects": (push("scale", np.array([object()])), "dtype object"),
    "push complex numbers": (push("scale", np.array(1j)), "dtype complex128"),
    "push a tensor of another shape": (push("scale", np.zeros(3, np.float32)), "push the same dtypes and shapes"),
}


@pytest.mark.parametrize("row", CALLS)
def test_bad_calls_of_a_client(served: Served, row: str) -> None:
    call, why = CALLS[row]
    before = served.client.delivery
    refused_in_one_line(lambda: call(served.client), why)
    counts = served.client.delivery
    assert counts["missing"] == before["missing"] == 0 and counts["unique"] == before["unique"]
    served.still_serves()


OWN = CurveKeys.generate()
MADE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a gateway without a backend": (lambda p: Gateway(None, "tcp://127.0.0.1:*", p), "cluster: NoneType None has no submit()"),
    "a gateway at a number": (lambda p: Gateway(ToyBackend(), 5, p), "address: int 5"),
    "a gateway with its ledger at None": (lambda p: Gateway(ToyBackend(), "tcp://127.0.0.1:*", None), "ledger_path: NoneType"),
    "a gateway with a NUL in its path": (lambda p: Gateway(ToyBackend(), "tcp://127.0.0.1:*", "a\0b"), "ledger_path: str"),
    "a gateway with a dict of keys": (lambda p: Gateway(ToyBackend(), "tcp://127.0.0.1:*", p, keys={}), "keys: dict"),
    **{f"a gateway with {name} {value!r}": (
        lambda p, name=name, value=value: Gateway(ToyBackend(), "tcp://127.0.0.1:*", p, **{name: value}),  # type: ignore[misc]
        f"{name}: {type(value).__name__}")
       for name, value in (("max_in_flight", 0), ("max_in_flight", 1.5), ("max_ledger_bytes", "1GB"), ("keep_requests", -1),
                           ("lease_seconds", NAN), ("disk_patience", -1), ("client_grace", INF), ("push_idle_seconds", None),
                           ("max_request_samples", 0), ("max_client_samples", True))},
    "ServerKeys of text": (lambda p: ServerKeys("own", frozenset()), "own: a str, not CurveKeys"),
    "ServerKeys with a text for a set": (lambda p: ServerKeys(OWN, OWN.public), "data: a str, not a set"),
    "ServerKeys with None": (lambda p: ServerKeys(OWN, None), "data: a NoneType"),
    "ServerKeys with a pair in the set": (lambda p: ServerKeys(OWN, [OWN]), "not a CURVE key"),
    "ServerKeys with a key in both": (lambda p: ServerKeys(OWN, {OWN.public}, {OWN.public}), "use separate keys"),
    "ClientKeys of bytes": (lambda p: ClientKeys(b"x" * 40, OWN), "server: not a CURVE key"),
    "ClientKeys with text for a pair": (lambda p: ClientKeys(OWN.public, "data"), "data: a str, not CurveKeys"),
    "CurveKeys of a number": (lambda p: CurveKeys(5, "b" * 40), "public: not a CURVE key"),
}


@pytest.mark.parametrize("row", MADE)
def test_bad_arguments_of_what_serves(tmp_path: Path, row: str) -> None:
    make, why = MADE[row]
    refused_in_one_line(lambda: make(tmp_path / "ledger"), why)
    assert list(tmp_path.iterdir()) == []


def test_a_client_over_its_limit_of_samples_is_refused_by_name_and_goes_on(served: Served) -> None:
    with connect(served.gateway.address, client_id="greedy") as client:
        backend: Any = served.gateway._cluster
        backend.rate = 0.0
        client.submit([request(f"g{i}", 50) for i in range(20)])
        refused_in_one_line(lambda: client.generate([request("more")]), "1001 unfinished, at most 1000 are taken")
        backend.rate = 1e9
        assert len(list(client.results(timeout=20))) == 1000


def test_an_output_that_is_not_finite_or_not_whole_is_a_failed_request(served: Served) -> None:
    backend: Any = served.gateway._cluster
    poll = type(backend).poll

    def spoiled(timeout: float) -> Any:
        for item in (found := poll(backend, timeout)):
            if item.request_id == "nan":
                item.trajectory.logprobs[-1] = NAN
            if item.request_id == "float":
                item.trajectory.tokens[0] = 1.5
        return found

    backend.poll = spoiled
    try:
        refused_in_one_line(lambda: served.client.generate([request("nan")]), "logprobs holds a number that is not finite")
        refused_in_one_line(lambda: served.client.generate([request("float")]), "float64 of 1 axes where whole numbers")
    finally:
        del backend.poll
    served.still_serves()


def test_requests_keep_every_token_id_they_were_given() -> None:
    whole = replace(request("a"), prompt_tokens=tuple(np.arange(5, dtype=np.uint16)))
    assert decode_request(encode_request(whole)).prompt_tokens == (0, 1, 2, 3, 4)
    with pytest.raises(InvalidInput):
        encode_request(with_tokens(np.float32(2.0)))
    with pytest.raises(TransportError):
        encode_trajectory(replace(make_trajectory(request("a"), 0), forwards=1.5))  # type: ignore[arg-type]
