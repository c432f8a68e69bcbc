"""Requests and trajectories as self-contained records. Messages carry these bytes and the ledger stores them.

Invariants:
- Encoding is lossless: `decode_*(encode_*(x))` equals x field by field, floats bit for bit, arrays with their dtype.
- The encoding of a request is canonical: equal requests give equal bytes, so a digest of the bytes identifies the
  content.
- Decoding raises TransportError and nothing else, and takes memory in proportion to the bytes it is given.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from ...errors import RequestError, TransportError
from ...rollout.params import MAX_LISTED, MAX_STOP
from ...rollout.types import MAX_SALT, SAMPLERS, RolloutRequest, SamplingParams, StepTrace, Trajectory
from .codec import (
    Buffer,
    Choice,
    Field,
    Flag,
    Float,
    Int,
    Many,
    Optional,
    Row,
    Text,
    read_record,
    refuse,
    write_record,
)
from .limits import MAX_ID, MAX_REQUEST, MAX_SAMPLES, MAX_TOKENS, MAX_TRAJECTORY

FAILURE = -1
"""Sample number of the failure of a whole request."""

_REQUEST, _TRAJECTORY = 1, 2
_ID = Text(MAX_ID, empty=False)
_TRACE = StepTrace._fields
PARAMS: dict[str, Field[Any]] = {
    "sampler": Choice(SAMPLERS), "temperature": Float(), "top_k": Int(), "top_p": Float(), "min_p": Float(),
    "mix_weight": Float(), "max_tokens": Int(1), "ignore_eos": Flag(), "routed_experts": Flag(),
    "n": Int(1, MAX_SAMPLES), "seed": Optional(Int()), "stop": Many(Text(MAX_STOP, empty=False), 64),
    "include_stop_str_in_output": Flag(), "min_tokens": Int(), "logit_bias": Many(Row((Int(), Float())), 4096),
    "repetition_penalty": Float(), "presence_penalty": Float(), "frequency_penalty": Float(),
    "logprobs": Optional(Int()), "prompt_logprobs": Optional(Int()), "logprob_token_ids": Many(Int(), MAX_LISTED),
}
"""SamplingParams in the header of a request; `stop_token_ids` follows as an array, and `logits_processors` cannot travel."""
ARRAYS: dict[str, tuple[tuple[str, ...], int]] = {
    "logprobs": (("float32", "float64"), 1), "behavior_logprobs": (("float32", "float64"), 1),
    "versions": (("int32", "int64"), 1), "from_draft": (("bool",), 1), "support_logmass": (("float32", "float64"), 1),
    "routed_experts": (("int8", "uint8", "int16", "uint16", "int32"), 2),
    "top_tokens": (("int32", "int64"), 2), "top_logprobs": (("float32", "float64"), 2),
    "prompt_logprobs": (("float32", "float64"), 1), "prompt_top_tokens": (("int32", "int64"), 2),
    "prompt_top_logprobs": (("float32", "float64"), 2),
}
"""Arrays of a trajectory: the dtypes that travel, and the number of axes."""
OPTIONAL = ("support_logmass", "routed_experts", "top_tokens", "top_logprobs", "prompt_logprobs", "prompt_top_tokens",
            "prompt_top_logprobs")
_DTYPES = {name: frozenset(map(np.dtype, dtypes)) for name, (dtypes, _) in ARRAYS.items()}
_PRIORITY = 2**31
_REQUEST_FIELDS = Row((_ID, Int(), Int(1, MAX_SAMPLES), Int(-_PRIORITY, _PRIORITY - 1), Text(MAX_SALT), *PARAMS.values()))
_TRAJECTORY_FIELDS = Row((_ID, Int(0, MAX_SAMPLES - 1), Choice(("stop", "length", "abort")), Int(),
                          Optional(Int()), Optional(Text(MAX_STOP)), Flag()))


def encode_request(request: RolloutRequest) -> bytes:
    """The record of a request. Raises RequestError for one that is too large to travel."""
    if len(request.prompt_tokens) > MAX_TOKENS:
        raise RequestError("prompt_tokens", f"request {request.id[:MAX_ID]!r} has {len(request.prompt_tokens)} tokens",
                           f"at most {MAX_TOKENS} travel")
    if request.params.logits_processors:
        raise RequestError("logits_processors", f"request {request.id[:MAX_ID]!r} has functions, which do not travel",
                           "use them with an engine of this process, or logit_bias")
    values = [getattr(request.params, name) for name in PARAMS]
    try:
        header = _REQUEST_FIELDS.pack(
            [request.id, request.seed, request.samples, request.priority, request.cache_salt, *values], "request")
        ids = {"prompt_tokens": request.prompt_tokens, "stop_token_ids": request.params.stop_token_ids}
        return write_record(_REQUEST, header, [_ids(values, name) for name, values in ids.items()])
    except (TransportError, OverflowError, TypeError) as error:
        raise RequestError(f"request {request.id[:MAX_ID]!r}", str(error),
                           "keep within the limits of a message") from None


def decode_request(data: Buffer) -> RolloutRequest:
    """The request of a record."""
    header, (prompt, stops) = read_record(data, _REQUEST, 2, MAX_REQUEST)
    id_, seed, samples, priority, salt, *values = _REQUEST_FIELDS.unpack(header, "request")
    params = dict(zip(PARAMS, values, strict=True))
    try:
        return RolloutRequest(
            id=id_, prompt_tokens=_tokens(prompt, "prompt_tokens"), seed=seed, samples=samples, priority=priority,
            cache_salt=salt, params=SamplingParams(stop_token_ids=_tokens(stops, "stop_token_ids"), **params))
    except RequestError as error:
        raise refuse("request", str(error)) from None


def request_digest(record: bytes) -> bytes:
    """Digest of a request's record, which identifies its content; 32 bytes."""
    return hashlib.blake2b(record, digest_size=32).digest()


def encode_trajectory(trajectory: Trajectory) -> bytes:
    """The record of a trajectory. Raises TransportError for one whose arrays do not fit its tokens."""
    arrays = {name: getattr(trajectory, name) for name in ARRAYS}
    _check(arrays, len(trajectory.prompt_tokens), len(trajectory.tokens))
    trace = _ids(trajectory.trace, "trace", 2).reshape(-1, len(_TRACE))
    header = _TRAJECTORY_FIELDS.pack(
        [trajectory.request_id, trajectory.sample, trajectory.finish_reason, trajectory.forwards, *_stop_reason(trajectory)],
        "trajectory")
    record = write_record(_TRAJECTORY, header, [
        _ids(trajectory.prompt_tokens, "prompt_tokens"), _ids(trajectory.tokens, "tokens"), trace, *arrays.values()])
    if len(record) > MAX_TRAJECTORY:
        raise refuse("trajectory", f"{len(record)} bytes, at most {MAX_TRAJECTORY} travel")
    return record


def decode_trajectory(data: Buffer) -> Trajectory:
    """The trajectory of a record; its arrays are its own and writable."""
    header, (prompt, tokens, trace, *rest) = read_record(data, _TRAJECTORY, 3 + len(ARRAYS), MAX_TRAJECTORY)
    request_id, sample, finish_reason, forwards, stop_token, stop, included = _TRAJECTORY_FIELDS.unpack(header, "trajectory")
    prompt_tokens, token_list = _tokens(prompt, "prompt_tokens"), list(_tokens(tokens, "tokens"))
    arrays = dict(zip(ARRAYS, rest, strict=True))
    _check(arrays, len(prompt_tokens), len(token_list))
    if trace is None or trace.dtype.kind != "i" or trace.ndim != 2 or trace.shape[1] != len(_TRACE) \
            or len(trace) > len(token_list) + 1:
        raise refuse("trace", "not one row of six integers per decode step")
    steps = tuple(StepTrace(*row) for row in trace.tolist())
    return Trajectory(request_id=request_id, sample=sample, prompt_tokens=prompt_tokens, tokens=token_list,
                      finish_reason=finish_reason, forwards=forwards, trace=steps, stop_included=included,
                      stop_reason=stop_token if stop is None else stop, **arrays)  # type: ignore[arg-type]


def _stop_reason(trajectory: Trajectory) -> tuple[int | None, str | None, bool]:
    """What ended the sample, as a token and as a string."""
    reason = trajectory.stop_reason
    return (None, reason, trajectory.stop_included) if isinstance(reason, str) else (reason, None, trajectory.stop_included)


def _check(arrays: dict[str, np.ndarray | None], prompt: int, tokens: int) -> None:
    for name, (dtypes, axes) in ARRAYS.items():
        array = arrays[name]
        if array is None:
            if name not in OPTIONAL:
                raise refuse(name, "missing")
            continue
        rows = prompt + tokens - 1 if name == "routed_experts" else prompt - 1 if name.startswith("prompt_") else tokens
        if (array.dtype not in _DTYPES[name] and array.dtype.name not in dtypes) or array.ndim != axes or array.shape[0] != rows:
            raise refuse(name, f"{array.dtype}{list(array.shape)} where {axes} axes of {rows} rows, "
                               f"{' or '.join(dtypes)}, are expected")


def _ids(values: Any, where: str, axes: int = 1) -> np.ndarray:
    """Whole numbers as an array. A float is refused, never cut."""
    try:
        array = np.asarray(values)
    except ValueError:
        raise refuse(where, "not a list of whole numbers") from None
    if array.size and (array.dtype.kind not in "iu" or array.ndim != axes):
        raise refuse(where, f"{array.dtype} of {array.ndim} axes where whole numbers of 64 bits are expected")
    if array.size and array.dtype == np.uint64 and array.max() >= 2**63:
        raise refuse(where, "a number of more than 63 bits")
    return _narrow(array.astype(np.int64, copy=False))


def _narrow(array: np.ndarray) -> np.ndarray:
    """int32 where everything fits, else int64: a function of the values, so the encoding stays canonical."""
    narrow = array.astype(np.int32)
    return narrow if (narrow == array).all() else array


def _tokens(array: np.ndarray | None, where: str) -> tuple[int, ...]:
    if array is None or array.dtype.name not in ("int32", "int64") or array.ndim != 1 or len(array) > MAX_TOKENS:
        raise refuse(where, f"not a list of at most {MAX_TOKENS} token ids")
    return tuple(array.tolist())
