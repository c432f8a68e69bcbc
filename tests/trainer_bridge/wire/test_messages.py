"""Messages and records: lossless, canonical, and cheap to refuse."""

from __future__ import annotations

import dataclasses
import math
import struct
import tracemalloc
from contextlib import suppress
from typing import Any

import msgpack
import numpy as np
import pytest
from bridge_parts import assert_same, make_manifest, make_trajectory, request
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_examples import EXAMPLES

from blockroll.errors import RequestError, TransportError
from blockroll.rollout.types import RolloutRequest, SamplingParams, StepTrace, Trajectory
from blockroll.trainer_bridge.wire import codec, limits, messages, records
from blockroll.trainer_bridge.wire.manifest import Manifest

requests = st.builds(
    RolloutRequest,
    id=st.text(st.characters(codec="utf-8"), min_size=1, max_size=40),
    prompt_tokens=st.lists(st.integers(0, 2**40), min_size=1, max_size=30).map(tuple),
    seed=st.integers(0, 2**63 - 1), samples=st.integers(1, 65536), priority=st.integers(-2**31, 2**31 - 1),
    cache_salt=st.text(st.characters(codec="utf-8"), max_size=60),
    params=st.builds(
        SamplingParams, sampler=st.sampled_from(["ar", "lossless", "coupled", "mixed"]),
        temperature=st.just(0.0) | st.floats(1e-6, 1e4, exclude_max=True), top_k=st.integers(0, 10**6),
        top_p=st.floats(0, 1, exclude_min=True), min_p=st.floats(0, 1, exclude_max=True), mix_weight=st.floats(0, 1),
        max_tokens=st.integers(1, 2**31 - 1), stop_token_ids=st.lists(st.integers(0, 2**31 - 1), max_size=5).map(tuple),
        ignore_eos=st.booleans(), routed_experts=st.booleans(), n=st.integers(1, 65536),
        seed=st.none() | st.integers(0, 2**63 - 1), include_stop_str_in_output=st.booleans(), min_tokens=st.just(0) | st.just(1),
        stop=st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=60), max_size=4),
        logit_bias=st.dictionaries(st.integers(0, 2**31 - 1), st.floats(-1e6, 1e6), max_size=4),
        repetition_penalty=st.floats(1e-3, 1e3), presence_penalty=st.floats(-2, 2),
        frequency_penalty=st.floats(-2, 2), logprobs=st.none() | st.integers(0, 32767),
        prompt_logprobs=st.none() | st.integers(0, 32767)))


def leaves(kind: type[messages.Message]) -> set[type[messages.Message]]:
    below = kind.__subclasses__()
    return set[type[messages.Message]]().union(*map(leaves, below)) if below else {kind}


def test_every_message_survives_and_every_kind_is_tried() -> None:
    assert {type(m) for m in EXAMPLES} == set(messages.KINDS.values()) == leaves(messages.Message)
    for message in EXAMPLES:
        assert messages.decode(messages.encode(message)) == message


@given(requests)
def test_requests_travel_losslessly_and_canonically(asked: RolloutRequest) -> None:
    record = records.encode_request(asked)
    arrived = records.decode_request(record)
    assert arrived == asked
    assert records.encode_request(arrived) == record
    assert math.copysign(1, arrived.params.temperature) == math.copysign(1, asked.params.temperature)


def test_every_field_of_the_public_types_travels() -> None:
    names = {f.name for f in dataclasses.fields(SamplingParams)}
    assert names == {*records.PARAMS, "stop_token_ids", "logits_processors"}
    assert {f.name for f in dataclasses.fields(RolloutRequest)} == {
        "id", "prompt_tokens", "params", "seed", "samples", "priority", "cache_salt"}
    scalars = {"request_id", "sample", "finish_reason", "forwards", "prompt_tokens", "tokens", "trace", "stop_reason",
               "stop_included"}
    assert {f.name for f in dataclasses.fields(Trajectory)} == {*records.ARRAYS, *scalars}


@pytest.mark.parametrize("asked", [request("a"), request("b", top_k=3), request("é" * 100, routed_experts=True)])
@pytest.mark.parametrize("reason", [None, 7, "é"])
def test_trajectories_travel_bit_for_bit(asked: RolloutRequest, reason: int | str | None) -> None:
    sent = make_trajectory(asked, 3, version=9)
    sent.logprobs[0] = np.float32(-0.0)
    sent.behavior_logprobs[-1] = np.frombuffer(struct.pack("<I", 0x7FC00123), "<f4")[0]
    sent.trace = (*sent.trace, StepTrace(2**40, 1, 1, 0, 2, 3))
    sent.stop_reason, sent.stop_included = reason, reason == "é"
    if reason is not None:
        n, p = len(sent.tokens), len(sent.prompt_tokens) - 1
        sent.top_tokens, sent.top_logprobs = np.arange(2 * n, dtype=np.int32).reshape(n, 2), np.zeros((n, 2), np.float32)
        sent.prompt_logprobs, sent.prompt_top_tokens = np.zeros(p, np.float32), np.zeros((p, 0), np.int32)
        sent.prompt_top_logprobs = np.zeros((p, 0), np.float32)
    arrived = records.decode_trajectory(records.encode_trajectory(sent))
    assert_same(sent, arrived)
    arrived.logprobs += 1


def test_trajectory_whose_arrays_do_not_fit_is_refused_when_written() -> None:
    sent = make_trajectory(request("a"), 0)
    for name, value in (("logprobs", sent.logprobs[:-1]), ("versions", sent.versions.astype(np.float32)),
                        ("from_draft", None), ("routed_experts", np.zeros((1, 2), np.int16))):
        with pytest.raises(TransportError, match=name):
            records.encode_trajectory(dataclasses.replace(sent, **{name: value}))


@pytest.mark.parametrize("change", [
    {"id": "x" * 257}, {"id": "\ud800"}, {"prompt_tokens": (2**70,)}, {"samples": 65537},
    {"prompt_tokens": (1,) * (limits.MAX_TOKENS + 1)}])
def test_request_that_cannot_travel_is_the_callers_error(change: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        records.encode_request(dataclasses.replace(request("a"), **change))


def test_functions_do_not_travel() -> None:
    asked = request("a", logits_processors=[lambda prefix, logits: logits])
    with pytest.raises(RequestError, match="^logits_processors: request 'a' has functions, which do not travel; use them with"):
        records.encode_request(asked)


def damage(data: bytes, place: int, mask: int, cut: int) -> bytes:
    changed = bytearray(data)
    changed[place % len(data)] ^= mask
    return bytes(changed[:len(data) - cut % len(data)])


scalars = st.none() | st.booleans() | st.integers(-2**63, 2**64 - 1) | st.floats() | st.text(max_size=5)
trees = st.recursive(
    scalars | st.binary(max_size=5),
    lambda c: st.lists(c, max_size=4) | st.dictionaries(st.text(max_size=3), c, max_size=3), max_leaves=12)
hostile = st.one_of(
    st.binary(max_size=300),
    trees.map(lambda v: msgpack.packb([codec.PROTOCOL, 10, v])),
    st.tuples(st.sampled_from(sorted(messages.KINDS)), st.lists(scalars, max_size=5)).map(
        lambda v: msgpack.packb([codec.PROTOCOL, v[0], *v[1]])))


@settings(max_examples=150, deadline=None)
@given(st.lists(hostile, max_size=4))
def test_hostile_frames_are_refused_with_transport_error(frames: list[bytes]) -> None:
    with suppress(TransportError):
        messages.decode(frames)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 255), st.one_of(st.just(0), st.integers(0, 10**6)), st.binary(max_size=64))
def test_damaged_records_are_refused_with_transport_error(place: int, mask: int, cut: int, noise: bytes) -> None:
    asked = request("a", routed_experts=True, top_k=2)
    sources = [(records.encode_request(asked), records.decode_request),
               (records.encode_trajectory(make_trajectory(asked, 0)), records.decode_trajectory),
               (make_manifest(1, 0, {"a": np.zeros((2, 3)), "b": np.zeros(())}).encode(), Manifest.decode)]
    for record, read in sources:
        head = damage(record[:60], place, mask, 0)
        for data in (damage(record, place, mask, cut), head + record[60:] + noise, noise):
            with suppress(TransportError):
                read(data)  # type: ignore[operator]


def nested(depth: int) -> bytes:
    return b"\x91" * depth + b"\xc0"


@pytest.mark.parametrize("frame", [
    b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", nested(100_000),
    nested(900), b"\xdc\x0f\xff" + b"\x80" * 4095, b"\xdc\x0f\xff" + b"\x90" * 4095, msgpack.packb({"a": 1}),
    msgpack.packb([3, 10, [[]] * 4000]), b"\x93\x03\x0a" + b"\xd6\xff\x00\x00\x00\x00",
    b"\x93\x03\x0a\xa2\xff\xff", b"\xc1", b"", b"\x80" * (4 << 20), msgpack.packb([4, 5])])
def test_bombs_cost_little(frame: bytes) -> None:
    record = struct.pack("<I", len(frame)) + frame
    tracemalloc.start()
    for read in (lambda: messages.decode([frame]), lambda: records.decode_request(record),
                 lambda: records.decode_trajectory(frame)):
        with pytest.raises(TransportError):
            read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20


def test_array_that_claims_more_than_it_brings_takes_no_memory() -> None:
    good = records.encode_trajectory(make_trajectory(request("a"), 0))
    header_size = struct.unpack_from("<I", good)[0]
    header = msgpack.unpackb(good[4:4 + header_size])
    for claim in ([2**40], [2**20, 2**20, 2**20], [2**40, 0, 2**40], [-1], ["x"]):
        header[3][2][1] = claim
        packed = msgpack.packb(header)
        tracemalloc.start()
        with pytest.raises(TransportError):
            records.decode_trajectory(struct.pack("<I", len(packed)) + packed + good[4 + header_size:])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 20


def test_request_below_the_limits_of_its_class_is_refused_as_transport_error() -> None:
    fields = ["a", 0, 1, 0, "", "ar", -1.0, 0, 1.0, 0.0, 0.5, 1, False, False, 1, None, [], False, 0, [], 1.0, 0.0, 0.0, None,
              None, []]
    record = codec.write_record(1, fields, [np.array([1], np.int32), np.array([], np.int32)])
    with pytest.raises(TransportError, match="temperature"):
        records.decode_request(record)


def test_another_protocol_is_named() -> None:
    with pytest.raises(TransportError, match="protocol 99"):
        messages.decode([msgpack.packb([99, 5])])


@pytest.mark.parametrize("message", [
    messages.Ack(1, (("r", 0),) * 129), messages.Hello("", False, 0, "", 0), messages.Hello("a", False, -1, "", 0),
    messages.PushChunk("p", 0, 0, (b"x" * (limits.MAX_CHUNK + 1),)), messages.Delivery(1, "r", 0, ()),
    messages.PushBegin("p", "maybe", (b"",))])
def test_writing_keeps_the_limits_of_reading(message: messages.Message) -> None:
    with pytest.raises(TransportError):
        messages.encode(message)
