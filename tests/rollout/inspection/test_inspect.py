"""`blockroll inspect` as a file: what the page holds, what it refuses, and how it follows a run."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inspected_runs import directory, payload_of, sampled, write

from blockroll.errors import BlockrollError, DataError, InvalidInput
from blockroll.rollout.inspection import inspect as command
from blockroll.rollout.inspection import payload as packing
from blockroll.rollout.inspection.inspect import inspect
from blockroll.rollout.inspection.origins import ACCEPTED, ORIGINS
from blockroll.rollout.inspection.page import page
from blockroll.rollout.inspection.run import Run

GOOD: dict[str, Any] = {"id": "a", "prompt_tokens": [1, 20], "tokens": [30, 31, 2], "logprobs": [-0.5, -0.25, -1.0],
                        "trace": [[1, 0, 0, -1, 0, 1], [2, 2, 1, 3, 8, 1]]}  # fmt: skip


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    return sampled(4, 2)


def numbers(packed: str, kind: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(packed), dtype=kind)


def test_the_page_holds_the_run_and_nothing_that_loads(records, tmp_path: Path, capsys) -> None:
    page = inspect(directory(tmp_path / "run", records))
    assert page == tmp_path / "run" / "inspect.html" and "8 trajectories" in capsys.readouterr().out
    held, text = payload_of(page), page.read_text()
    tokens = [token for record in records for token in record["tokens"]]
    assert held["totals"] == {
        "trajectories": 8, "tokens": len(tokens), "forwards": sum(record["forwards"] for record in records),
        "accepted": int((numbers(held["tokens"]["origin"], "u1") == ACCEPTED).sum()),
    }  # fmt: skip
    ids = np.array(held["vocabulary"]["ids"])[numbers(held["tokens"]["piece"], "<u4")]
    assert ids.tolist() == tokens
    logprobs = [value for record in records for value in record["logprobs"]]
    np.testing.assert_array_equal(numbers(held["tokens"]["logprob"], "<f4"), np.array(logprobs, dtype=np.float32))
    texts = [held["vocabulary"]["texts"][i] for i in numbers(held["tokens"]["piece"], "<u4")[: len(records[0]["tokens"])]]
    assert "".join(texts).removesuffix("<eos>") == records[0]["text"]
    assert [curve["name"] for curve in held["curves"]][:3] == ["reward", "tokens_per_forward", "entropy"]
    # The one script and the one style sheet are those that the policy allows; nothing is fetched.
    for kind, opened in (("script", "<script>"), ("style", "<style>")):
        body = text.split(opened)[1].split(f"</{kind}>")[0]
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in text
    assert not re.search(r"""(src|href)\s*=\s*["']""", text)
    assert set(re.findall(r"http[^\s\"]*", text)) == {"http-equiv=", "http://www.w3.org/2000/svg"}


def test_text_of_a_run_stays_text(tmp_path: Path) -> None:
    bad = "</script><script>alert(1)</script><!--"
    page = inspect(write(tmp_path / "in.jsonl", [GOOD | {"id": bad, "text": bad, "finish_reason": bad}]))
    assert payload_of(page)["names"] == [bad]
    assert "alert(1)" in page.read_text() and "<script>alert" not in page.read_text()


def test_a_file_may_have_any_name(tmp_path: Path) -> None:
    run = Run.find(write(tmp_path / os.fsdecode(b"\xff.jsonl"), [GOOD]), 5)
    run.read()
    assert b"<title>?.jsonl" in page(packing.payload(run, None, None))


def test_entropies_only_where_the_policy_gives_the_recorded_log_probabilities(tmp_path: Path) -> None:
    records = sampled(3, 1, versions=False)
    records[1]["logprobs"] = [value - 0.5 for value in records[1]["logprobs"]]
    page = inspect(write(tmp_path / "in.jsonl", records), policy="tiny-reasoner", entropy=True)
    entropy = np.split(numbers(payload_of(page)["tokens"]["entropy"], "<f4"), np.cumsum([len(r["tokens"]) for r in records])[:-1])
    assert [bool(np.isfinite(part).all()) for part in entropy] == [True, False, True] and np.isnan(entropy[1]).all()
    assert min(part.min() for part in (entropy[0], entropy[2])) >= 0
    # A token's surprise is its entropy on average: the samples were drawn from p.
    surprise = -np.concatenate([records[0]["logprobs"], records[2]["logprobs"]])
    assert abs(surprise.mean() - np.concatenate([entropy[0], entropy[2]]).mean()) < 0.3


def test_the_newest_samples_are_shown_and_all_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "in.jsonl", [GOOD | {"id": str(i)} for i in range(20)])
    held = payload_of(inspect(path, most=6))
    assert held["names"] == [str(i) for i in range(14, 20)] and held["totals"]["trajectories"] == 20
    monkeypatch.setattr(packing, "MAX_TOKENS", 2 + 3 * 4)
    assert payload_of(inspect(path, most=6))["names"] == [str(i) for i in range(16, 20)]


def test_a_line_needs_only_tokens(tmp_path: Path) -> None:
    held = payload_of(inspect(write(tmp_path / "in.jsonl", [{"tokens": [5, 6]}, {"tokens": []}])))
    assert numbers(held["tokens"]["origin"], "u1").tolist() == [0, 0] and held["tokens"]["logprob"] is None
    assert held["names"] == ["1", "2"]


def test_a_conversation_with_an_environment(tmp_path: Path) -> None:
    """Tokens of the environment have no log-probability and no version, and do not count as a change of version."""
    line = GOOD | {"tokens": [30, 31, 2, 40, 41, 50, 2], "logprobs": [-0.5, -0.25, -1.0, 0, 0, -2.0, -0.1],
                   "versions": [3, 3, 3, -1, -1, 3, 4], "env_mask": [1, 1, 1, 0, 0, 1, 1],
                   "trace": [[1, 0, 0, -1, 0, 1], [2, 2, 1, 3, 8, 1], [6, 1, 1, 7, 8, 1]]}  # fmt: skip
    held = payload_of(inspect(write(tmp_path / "in.jsonl", [line])))
    assert [ORIGINS[i] for i in numbers(held["tokens"]["origin"], "u1")] == [
        "sampled", "accepted", "resampled", "environment", "environment", "accepted", "bonus"]  # fmt: skip
    assert np.isnan(numbers(held["tokens"]["logprob"], "<f4")).tolist() == [False, False, False, True, True, False, False]
    assert numbers(held["versions"]["start"], "<u4").tolist() == [0, 6]
    assert numbers(held["versions"]["version"], "<i4").tolist() == [3, 4]


def test_candidates_of_a_search(tmp_path: Path) -> None:
    candidates = [{"text": "12+3=15\nA:15", "answer": "15", "tokens": 9, "logprob": -1.5, "score": 1.0},
                  {"text": "A:4", "tokens": 3, "score": 0.0}]  # fmt: skip
    lines: list[dict[str, Any]] = [{"id": f"q{i}", "method": "best_of_n", "candidates": candidates} for i in range(2)]
    path = write(tmp_path / "in.jsonl", lines)
    held = payload_of(inspect(path, policy="tiny-reasoner"))
    assert held["totals"]["trajectories"] == 4 and held["names"] == ["q0", "q1"]
    assert numbers(held["samples"]["reward"], "<f8").tolist() == [1.0, 0.0, 1.0, 0.0]
    texts = [held["vocabulary"]["texts"][i] for i in numbers(held["tokens"]["piece"], "<u4")]
    assert "".join(texts) == 2 * "12+3=15\nA:15A:4"
    for record, says in ((lines[0], "candidates[0]: holds no list of tokens; name the policy"),
                         ({"id": "a", "candidates": 3}, "candidates: not a list of objects; write them with")):  # fmt: skip
        with pytest.raises(DataError) as raised:
            inspect(write(path, [record]))
        assert says in str(raised.value)


BAD = {
    "no tokens": ({"id": "a"}, "tokens: missing"),
    "tokens of text": ({"tokens": ["a"]}, "tokens: not a list of token ids"),
    "a negative token": ({"tokens": [-1]}, "tokens: not"),
    "a huge token": ({"tokens": [2**40]}, "tokens: not"),
    "truth for a token": ({"tokens": [True]}, "tokens: not"),
    "too few log-probabilities": (GOOD | {"logprobs": [0.0]}, "logprobs: 1 numbers for 3 tokens"),
    "log-probabilities of text": (GOOD | {"logprobs": ["a", "b", "c"]}, "logprobs: not"),
    "a log-probability beyond float32": (GOOD | {"logprobs": [1e300, 0, 0]}, "logprobs: a number beyond"),
    "a log-probability beyond float64": (GOOD | {"logprobs": [10**400, 0, 0]}, "logprobs: not"),
    "a version of -2": (GOOD | {"versions": [-2, 1, 1]}, "versions: not"),
    "versions of fractions": (GOOD | {"versions": [0.5, 1, 1]}, "versions: not"),
    "a version of 2**40": (GOOD | {"versions": [2**40, 1, 1]}, "versions: not"),
    "a trace of one number": (GOOD | {"trace": [1]}, "trace: a row"),
    "a trace of text": (GOOD | {"trace": "abc"}, "trace: not"),
    "a trace before the sample": (GOOD | {"trace": [[0, 0, 0, -1, 0, 1]]}, "trace: a row does not fit"),
    "a trace behind the sample": (GOOD | {"trace": [[9, 0, 0, -1, 0, 1]]}, "trace: a row does not fit"),
    "a trace that goes back": (GOOD | {"trace": [[2, 0, 0, -1, 0, 1], [1, 0, 0, -1, 0, 1]]}, "trace: a row does not fit"),
    "more accepted than drafted": (GOOD | {"trace": [[1, 1, 2, 2, 8, 1]]}, "trace: a row does not fit"),
    "a mask of twos": (GOOD | {"env_mask": [0, 1, 2]}, "env_mask: holds other numbers"),
    "a reward of text": (GOOD | {"reward": "1"}, "reward: no finite number"),
    "a step of a half": (GOOD | {"step": 0.5}, "step: no whole number"),
    "a name of a list": (GOOD | {"id": []}, "id: neither text"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_named(name: str, tmp_path: Path) -> None:
    record, says = BAD[name]
    path = write(tmp_path / "in.jsonl", [GOOD, record])
    with pytest.raises(DataError) as raised:
        inspect(path)
    assert f"in.jsonl line 2: {says}" in str(raised.value)
    assert not (tmp_path / "in.html").exists()


def test_options_and_places_that_cannot_be_used(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", [GOOD | {"text": "never of this policy"}])
    (tmp_path / "empty").mkdir()
    (tmp_path / "none.jsonl").write_text("")
    cases: list[tuple[Any, dict[str, Any], type[BlockrollError], str]] = [
        (path, {"most": 0}, InvalidInput, "most"),
        (path, {"entropy": True}, InvalidInput, "--policy"),
        (path, {"entropy": True, "policy": "tiny-reasoner", "live": True}, InvalidInput, "live"),
        (path, {"policy": "tiny-reasoner"}, InvalidInput, "other texts"),
        (path, {"policy": "nobody"}, BlockrollError, "nobody"),
        (path, {"output": path}, BlockrollError, "two files"),
        (tmp_path / "empty", {}, DataError, "rollouts.jsonl"),
        (tmp_path / "none.jsonl", {}, DataError, "no samples"),
        (tmp_path / "absent.jsonl", {}, DataError, "absent.jsonl"),
    ]
    before = sorted(tmp_path.iterdir())
    for place, options, kind, says in cases:
        with pytest.raises(kind) as raised:
            inspect(place, **options)
        assert says in str(raised.value)
    assert sorted(tmp_path.iterdir()) == before


def test_a_growing_file_is_read_on_from_its_last_whole_line(tmp_path: Path) -> None:
    path, line = tmp_path / "in.jsonl", json.dumps(GOOD) + "\n"
    path.write_text(line + line[:40])
    run = Run.find(path, 100)
    assert run.read() and run.totals.trajectories == 1
    assert not run.read()
    with open(path, "a") as file:
        file.write(line[40:] + line)
    assert run.read() and run.totals.trajectories == 3
    path.write_text(line)  # another run has taken its place
    assert run.read() and run.totals.trajectories == len(run.samples) == 1


def test_live_follows_a_run_until_its_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "LIVE_SECONDS", 0.02)
    run, page = tmp_path / "run", tmp_path / "run" / "inspect.html"
    run.mkdir()  # nothing is in it yet
    thread = threading.Thread(target=inspect, args=(run,), kwargs={"live": True})
    thread.start()
    while not page.exists():
        time.sleep(0.01)
    assert payload_of(page)["totals"]["trajectories"] == 0
    directory(run, [GOOD])
    seen: list[int] = []
    for count in (1, 2, 3):
        deadline = time.monotonic() + 20
        while not page.exists() or payload_of(page)["totals"]["trajectories"] < count:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        held = payload_of(page)
        assert held["live"] is not None and "frame-src" in page.read_text()
        seen.append(held["totals"]["trajectories"])
        with open(run / "rollouts.jsonl", "a") as file:
            file.write(json.dumps(GOOD | {"id": f"b{count}"}) + "\n")
    (run / "summary.json").write_text("{}")
    thread.join(20)
    assert not thread.is_alive() and seen == [1, 2, 3]
    held = payload_of(page)
    assert held["live"] is None and held["totals"]["trajectories"] == 4 and "frame-src" not in page.read_text()
