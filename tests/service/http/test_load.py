"""Many clients at once, and what a tool makes of the OpenAPI document. Both take minutes."""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

import blockroll
from blockroll.service.lifecycle import Service

sys.path.insert(0, str(Path(__file__).parent))

from http_parts import CONTROL_KEY, KEY, MODEL, url_of

CONTROL = "pause|resume|abort|reset|flush|continue|update_weight|weight_update"
"""Paths of the routes that change the service."""
CLIENTS, REQUESTS, TOKENS = 64, 2000, 64
PROMPT = tuple(range(5, 25))
GROUP, GROUPS = 8, 500
"""Samples of a request, as GRPO asks for them, and requests."""
LOCAL = Path(blockroll.__file__).parent / "configs" / "cluster" / "local.yaml"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_64_clients_and_2000_requests_beside_the_bridge(service: Service) -> None:
    """Each in a process of its own, in turn; every request asks for 64 tokens with temperature 1 (`coupled`)."""
    found = {}
    for name, address in (("bridge", service.address), ("http", url_of(service)), ("bridge again", service.address)):
        command = [sys.executable, __file__, name.split()[0], address, str(service.keys)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        found[name] = json.loads(done.stdout)
        print(name, found[name])
    assert found["http"]["errors"] == 0 and all(each["tokens"] == REQUESTS * TOKENS for each in found.values())
    bridge = statistics.mean(found[name]["tokens_per_s"] for name in ("bridge", "bridge again"))
    assert found["http"]["tokens_per_s"] >= 0.9 * bridge


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_groups_of_eight_over_http_beside_the_bridge(tmp_path: Path) -> None:
    """Against `blockroll up` with the settings of local.yaml, twice in turn: 64 connections, groups of 8 samples of 64 tokens.
    OpenAI's client is measured beside it; of what it adds, most is its own work."""
    config = tmp_path / "local.yaml"
    config.write_text(LOCAL.read_text().replace("runs/local/", f"{tmp_path}/"))
    command = [sys.executable, "-m", "blockroll.cli"]
    subprocess.run([*command, "up", str(config), "--detach"], check=True, timeout=600)
    try:
        status = json.loads(subprocess.check_output([*command, "status", str(config), "--json"]))
        rates = dict[str, list[float]]()
        for kind in ("bridge", "plain", "openai") * 2:
            where = status["address" if kind == "bridge" else "http"]
            done = subprocess.run([sys.executable, __file__, kind, where, "", str(GROUPS), str(GROUP)],
                                  capture_output=True, text=True, timeout=900)  # fmt: skip
            assert done.returncode == 0, done.stderr
            found = json.loads(done.stdout)
            print(kind, found)
            assert not found.get("errors") and found["tokens"] == GROUPS * GROUP * TOKENS
            rates.setdefault(kind, []).append(found["tokens_per_s"])
    finally:
        subprocess.run([*command, "down", str(config)], check=True, timeout=120)
    assert statistics.mean(rates["plain"]) >= 0.9 * statistics.mean(rates["bridge"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("which", ["exclude", "include"])
def test_what_fits_the_openapi_document_is_answered_as_it_says(which: str, service: Service, tmp_path: Path) -> None:
    """Never with a 500. The routes that change the service go apart from the others, which a pause would hold."""
    headers = {"Authorization": f"Bearer {CONTROL_KEY}"}
    document = tmp_path / "openapi.json"
    document.write_text(httpx.get(f"{url_of(service)}/openapi.json", headers=headers).text)
    done = subprocess.run(
        ["schemathesis", "run", str(document), "--url", url_of(service), "-H", f"Authorization: Bearer {CONTROL_KEY}", "--checks",
         "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
         "--max-examples", "60", "--seed", "1", "--request-timeout", "60", "--suppress-health-check", "all",
         "--phases", "examples,coverage,fuzzing", f"--{which}-path-regex", CONTROL],
        capture_output=True, text=True, timeout=1700, cwd=tmp_path)  # fmt: skip
    httpx.post(f"{url_of(service)}/resume", headers=headers).raise_for_status()
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def bridge(address: str, keys: str, count: int, samples: int) -> dict[str, Any]:
    """All requests through one client of the bridge."""
    from blockroll import connect
    from blockroll.rollout.types import RolloutRequest, SamplingParams

    params = SamplingParams("coupled", max_tokens=TOKENS, ignore_eos=True, n=samples)
    requests = [RolloutRequest(f"bridge-{time.time_ns()}-{i}", PROMPT, params, i) for i in range(count)]
    with connect(address, keys=keys or None) as client:
        start = time.perf_counter()
        done = client.generate(requests)
        seconds = time.perf_counter() - start
    tokens = sum(len(sample.tokens) for sample in done)
    return {"tokens": tokens, "seconds": round(seconds, 1), "tokens_per_s": round(tokens / seconds)}


async def openai_clients(address: str, count: int, samples: int) -> dict[str, Any]:
    """64 clients, each of which asks again as soon as it is answered."""
    import openai

    latencies: list[float] = []
    left, errors, tokens = list(range(count)), 0, 0

    async def client() -> None:
        nonlocal errors, tokens
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=600) as own:
            while left:
                seed, start = left.pop(), time.perf_counter()
                try:
                    done = await own.completions.create(model=MODEL, prompt=list(PROMPT), max_tokens=TOKENS, seed=seed,
                                                        n=samples, extra_body={"ignore_eos": True})  # fmt: skip
                    tokens += done.usage.completion_tokens if done.usage else 0
                except openai.OpenAIError as error:
                    errors += 1
                    print(error, file=sys.stderr)
                latencies.append(time.perf_counter() - start)

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    seconds = time.perf_counter() - start
    cuts = statistics.quantiles(latencies, n=100)
    return {"tokens": tokens, "seconds": round(seconds, 1), "tokens_per_s": round(tokens / seconds), "errors": errors,
            "p50_ms": round(1e3 * cuts[49]), "p99_ms": round(1e3 * cuts[98])}


async def plain_clients(address: str, count: int, samples: int) -> dict[str, Any]:
    """64 connections with no more than HTTP needs: the load generator takes next to nothing of the machine."""
    host, _, port = address.removeprefix("http://").rpartition(":")
    left, tokens = list(range(count)), 0

    async def client() -> None:
        nonlocal tokens
        reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 24)
        while left:
            body = json.dumps({"model": MODEL, "prompt": PROMPT, "max_tokens": TOKENS, "seed": left.pop(), "n": samples,
                               "ignore_eos": True}).encode()  # fmt: skip
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
                         b"Content-Length: %d\r\n\r\n" % len(body) + body)  # fmt: skip
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            size = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
            answer = json.loads(await reader.readexactly(size))
            assert head.startswith(b"http/1.1 200"), answer
            tokens += answer["usage"]["completion_tokens"]
        writer.close()

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    seconds = time.perf_counter() - start
    return {"tokens": tokens, "seconds": round(seconds, 1), "tokens_per_s": round(tokens / seconds)}


if __name__ == "__main__":
    kind, where, its_keys, *counts = sys.argv[1:]
    requested, group = map(int, counts or (REQUESTS, 1))
    if kind == "bridge":
        print(json.dumps(bridge(where, its_keys, requested, group)))
    else:
        call = plain_clients if kind == "plain" else openai_clients
        print(json.dumps(asyncio.run(call(where, requested, group))))
