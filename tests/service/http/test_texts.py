"""Text of a stream, tool calls, keys and errors, without a service."""

from __future__ import annotations

import json
import random
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from blockroll.errors import ConfigError, InvalidInput, StorageError, TransportError
from blockroll.model.tokenizer import train_tokenizer
from blockroll.rollout.types import SamplingParams, Trajectory
from blockroll.service.config import Http
from blockroll.service.http.http_errors import HttpError, as_http_error
from blockroll.service.http.keys import HttpKeys
from blockroll.service.http.listener import bind
from blockroll.service.http.pieces import weight_versions
from blockroll.service.http.routes import check_origin
from blockroll.service.http.sampling_fields import vllm_params
from blockroll.service.http.text import TextStream, whole_text
from blockroll.service.http.tool_calls import OPENINGS, parse_tool_calls

TOKENIZER = train_tokenizer(["12 + 34 = 46\n", "é∑ and 日本語 and 🙂"])
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "add", "parameters": {
        "properties": {"a": {"type": "integer"}, "s": {"type": "string"}}}}},
    {"type": "function", "function": {"name": "now"}},
]


def sample(tokens: list[int], stop: str | None = None, included: bool = False) -> Trajectory:
    n = len(tokens)
    return Trajectory("a", 0, (5,), tokens, np.zeros(n, np.float32), np.zeros(n, np.float32), np.zeros(n, np.int32),
                      np.zeros(n, bool), "stop", n, stop_reason=stop, stop_included=included)  # fmt: skip


def streamed(tokens: list[int], cuts: list[int], done: Trajectory, held: list[str], skip: bool = True) -> list[str]:
    stream = TextStream(TOKENIZER, held, skip)
    parts = [stream.push(tokens[start:end]) for start, end in zip([0, *cuts], cuts)]
    return [*parts, stream.finish(whole_text(TOKENIZER, done, skip))]


@pytest.mark.parametrize("seed", range(20))
def test_pieces_of_text_add_up_wherever_they_are_cut(seed: int) -> None:
    """Random bytes hold broken characters; whole ones are cut between their bytes."""
    draw = random.Random(seed)
    tokens = [draw.randrange(4, len(TOKENIZER)) for _ in range(40)] if seed % 2 else TOKENIZER.encode("é∑日本語🙂 12<eos>" * 3)
    if seed % 2:
        tokens.insert(draw.randrange(len(tokens)), TOKENIZER.eos_token_id)
    cuts = sorted(draw.sample(range(len(tokens)), 12))
    for skip in (True, False):
        whole = TOKENIZER.decode(tokens, skip_special_tokens=skip)
        parts = streamed(tokens, cuts, sample(tokens), [], skip)
        assert "".join(parts) == whole
        if not seed % 2:
            assert "\N{REPLACEMENT CHARACTER}" not in whole and all("\N{REPLACEMENT CHARACTER}" not in part for part in parts)


def test_a_tokenizer_that_replaces_whole_runs_of_bytes_sends_whole_characters() -> None:
    """As SentencePiece with byte fallback: one byte too few makes every character of a run of byte tokens a replacement."""
    words = ["<unk>", "\u2581", "a", "\u2581the", ".", *(f"<0x{byte:02X}>" for byte in range(256))]
    own = Tokenizer(BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], byte_fallback=True, unk_token="<unk>"))
    own.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, unk_token="<unk>")
    for seed in range(40):
        draw = random.Random(seed)
        pieces = [[5 + byte for byte in draw.choice("\U0001f642\u65e5\u00e9").encode()] if draw.random() < 0.7 else
                  [draw.randrange(1, 5)] for _ in range(60)]  # fmt: skip
        tokens = [token for piece in pieces for token in piece]
        stream, cuts = TextStream(tokenizer, [], True), sorted(draw.sample(range(len(tokens)), 30))
        parts = [stream.push(tokens[start:end]) for start, end in zip([0, *cuts], cuts)]
        parts.append(stream.finish(tokenizer.decode(tokens)))
        assert "".join(parts) == tokenizer.decode(tokens)
        assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)


def test_bytes_that_are_no_text_take_no_longer_than_text() -> None:
    broken = [token for token in range(4, len(TOKENIZER)) if TOKENIZER.decode([token]) == "\N{REPLACEMENT CHARACTER}"]
    tokens = [*[broken[0]] * 8000, *TOKENIZER.encode("\U0001f642 12", add_special_tokens=False) * 400]
    began = process_time()
    parts = streamed(tokens, list(range(1, len(tokens) + 1)), sample(tokens), [])
    assert process_time() - began < 3  # it runs in the event loop
    assert "".join(parts) == TOKENIZER.decode(tokens) and sum(map(bool, parts)) > 200


@pytest.mark.parametrize("included", [False, True])
@pytest.mark.parametrize("stop", ["46", "= 46\n", "é"])
def test_nothing_of_a_stop_string_is_sent_before_it_is_known_not_to_be_one(stop: str, included: bool) -> None:
    text = "12 = 4; 12 = 46\n" if stop != "é" else "12 ∑é"
    tokens = TOKENIZER.encode(text, add_special_tokens=False)
    while stop in TOKENIZER.decode(tokens[:-1]):
        tokens.pop()
    done = sample(tokens, stop, included)
    parts = streamed(tokens, list(range(1, len(tokens))), done, [] if included else [stop])
    assert "".join(parts) == text[: text.index(stop) + len(stop) * included]
    assert sum(map(bool, parts)) > 3


def test_text_before_a_tool_call_is_sent_and_nothing_behind_it() -> None:
    text = 'let me < see <tool_call>{"name": "now", "arguments": {}}</tool_call>'
    stream = TextStream(TOKENIZER, [], True, OPENINGS)
    sent = "".join(stream.push([token]) for token in TOKENIZER.encode(text, add_special_tokens=False))
    content, calls = parse_tool_calls(text, TOOLS)
    assert (sent, content, [call.name for call in calls]) == ("let me < see", "let me < see", ["now"])
    assert stream.finish(content) == ""


@pytest.mark.parametrize(("text", "content", "calls"), [
    ('<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>', "", [("add", {"a": 1})]),
    ('hm\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n<tool_call>{"name": "now", "arguments": {}}', "hm",
     [("add", {"a": 1}), ("now", {})]),
    ("<tool_call><function=add><parameter=a>\n1\n</parameter><parameter=s>2</parameter></function></tool_call>", "",
     [("add", {"a": 1, "s": "2"})]),
    ("x <zyphra_tool_call><function=now></function></zyphra_tool_call>", "x", [("now", {})]),
    ('<tool_call>{"name": "rm", "arguments": {}}</tool_call>', None, []), ("<tool_call>{broken</tool_call>", None, []),
    ('<tool_call>{"name": "add", "arguments": "1"}</tool_call>', None, []), ("<tool_call>" + "[" * 100_000, None, []),
    ('<tool_call>{"name": ["add"], "arguments": {}}</tool_call>', None, []), ("no call", None, []),
])
def test_tool_calls_are_read_in_both_forms(text: str, content: str | None, calls: list[tuple[str, Any]]) -> None:
    found, parsed = parse_tool_calls(text, TOOLS)
    assert found == (text if content is None else content)
    assert [(call.name, json.loads(call.arguments)) for call in parsed] == calls
    assert all({*call.as_json(0)} == {"index", "id", "type", "function"} for call in parsed)


@pytest.mark.parametrize("repeated", ["<function=add><parameter=a>", "<function=", "<function=add><parameter="])
def test_marks_without_an_end_take_no_longer_than_other_text(repeated: str) -> None:
    first, _, again = repeated.rpartition("<")
    began = process_time()
    parse_tool_calls("<tool_call>" + first + f"<{again}" * 8000, TOOLS)
    assert process_time() - began < 1  # it runs in the event loop


def test_weight_versions_are_runs_of_tokens() -> None:
    done = sample([5] * 6)
    done.versions[:] = [3, 3, 4, 4, 4, 3]
    assert weight_versions(done) == [{"version": 3, "start": 0, "end": 2}, {"version": 4, "start": 2, "end": 5},
                                     {"version": 3, "start": 5, "end": 6}]  # fmt: skip


def opens(keys: HttpKeys, key: str | None, control: bool) -> bool:
    try:
        keys.check(None if key is None else f"Bearer {key}", control)
    except HttpError as error:
        assert error.status in (401, 403)
        return False
    return True


def test_which_key_opens_which_route() -> None:
    """(no key, the API key, the control key) on a route that changes nothing, and on one that does."""
    for keys, reads, changes in (
        (HttpKeys(None, None, True), (True, True, True), (True, True, True)),
        (HttpKeys("a", None, True), (False, True, False), (False, True, False)),
        (HttpKeys(None, "c", True), (True, True, True), (False, False, True)),
        (HttpKeys("a", "c", True), (False, True, True), (False, False, True)),
        (HttpKeys("a", "c", False), (False, True, True), (False, False, True)),
        (HttpKeys("a", None, False), (False, True, False), (False, False, False)),
    ):
        assert tuple(opens(keys, key, False) for key in (None, "a", "c")) == reads, keys
        assert tuple(opens(keys, key, True) for key in (None, "a", "c")) == changes, keys


@pytest.mark.parametrize(("origin", "host", "keyless", "keyed"), [
    (None, "evil.example", True, True), ("http://localhost:8000", "localhost:8000", True, True),
    ("http://127.0.0.1", "127.0.0.1", True, True), ("http://[::1]:80", "[::1]:80", True, True),
    ("https://runs.example", "runs.example", False, True),  # a name may be pointed at this machine; a key it has not
    ("http://evil.example:8000", "evil.example:8000", False, True), ("http://evil.example", "localhost:8000", False, False),
    ("http://[", "localhost:8000", False, False), ("null", "localhost:8000", False, False), ("", "", False, True),
])
def test_pages_of_other_hosts_may_not_call(origin: str | None, host: str, keyless: bool, keyed: bool) -> None:
    for unguarded, wanted in ((True, keyless), (False, keyed)):
        try:
            check_origin(origin, host, unguarded)
        except HttpError as error:
            assert error.status == 403 and not wanted
        else:
            assert wanted


def test_keys_come_from_files_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("from-a-file\n")
    monkeypatch.setenv("KEY_OF_A_TEST", "from-there")
    keys = HttpKeys.of(Http(api_key=str(tmp_path / "key"), control_key="env:KEY_OF_A_TEST"))
    assert (keys.api, keys.control, keys.local) == ("from-a-file", "from-there", True)
    assert "from" not in repr(keys)
    for source, content in (("absent", None), ("empty", ""), ("two words", "a b"), ("env:NO_SUCH_KEY_HERE", None)):
        path = tmp_path / source
        if content is not None:
            path.write_text(content)
        with pytest.raises(ConfigError, match=r"^http.control_key: .*(cannot be read|holds no key)"):
            HttpKeys.of(Http(control_key=source if source.startswith("env:") else str(path)))
    with pytest.raises(ValueError, match="api_key: missing"):
        Http(host="0.0.0.0")


def test_a_sampling_field_that_cannot_be_served_is_refused_unless_it_means_none() -> None:
    none = {"length_penalty": 1.0, "best_of": 1, "use_beam_search": False, "bad_words": [], "structured_outputs": None}
    assert vllm_params({**none, "top_k": 3, "detokenize": True}, 10, "ar") == SamplingParams("ar", top_k=3, max_tokens=10)
    for name, value in (("use_beam_search", True), ("best_of", 2), ("bad_words", ["x"]), ("length_penalty", 0.5), ("", "")):
        with pytest.raises(HttpError, match=f"^sampling_params.{name}: this service cannot serve it") as error:
            vllm_params({name: value}, 10, "ar")
        assert error.value.status == 400


def test_a_port_that_is_taken_is_refused_by_name() -> None:
    with bind(Http()) as taken:
        taken.listen()
        with pytest.raises(InvalidInput, match=r"^http.port: 127.0.0.1:\d+ cannot be bound \(Address already in use\); choose"):
            bind(Http(port=taken.getsockname()[1]))
    with pytest.raises(InvalidInput, match=r"^http.port: no.such.host.invalid:0 cannot be bound"):
        bind(Http(host="no.such.host.invalid", api_key="k"))


def test_errors_have_a_status() -> None:
    cases: list[tuple[Exception, int, str | None]] = [
        (InvalidInput("top_p", "2 is outside (0, 1]", "use 1"), 400, "top_p"), (TransportError("the gateway is away"), 503, None),
        (StorageError("the disk is full"), 507, None), (HttpError(429, "too many"), 429, None)]  # fmt: skip
    for error, status, param in cases:
        found = as_http_error(error)
        assert (found.status, found.param) == (status, param)
    with pytest.raises(KeyError):
        as_http_error(KeyError("a bug"))
