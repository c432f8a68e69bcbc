"""Calls a live service with a trainer's own client, or reads answers with its own parser; prints what that found as JSON.

Run by the Python of an environment in which that trainer is installed: `own_clients.py TRAINER URL`.
"""

from __future__ import annotations

import asyncio
import json
import sys
import typing
from types import SimpleNamespace
from typing import Any
from urllib.request import Request, urlopen


def post(url: str, body: Any) -> bytes:
    return urlopen(Request(url, json.dumps(body).encode(), {"content-type": "application/json"}), timeout=60).read()


def prime_rl(url: str) -> Any:
    """renderers: the client library of prime-rl's environments."""
    from renderers.client import _parse_completion_logprobs, parse_generate_response

    params = {"max_tokens": 12, "temperature": 1.0, "stop_token_ids": [], "logprobs": 1, "skip_special_tokens": False}
    body = {"model": "tiny-reasoner", "token_ids": [5, 6, 7], "sampling_params": params | {"routed_experts": True}}
    answer = parse_generate_response(post(f"{url}/inference/v1/generate", body))
    choice = answer["choices"][0]
    return {"tokens": choice["token_ids"], "logprobs": _parse_completion_logprobs(choice, choice["token_ids"])}


def skyrl(url: str) -> Any:
    import typing_extensions

    typing.TypedDict = typing_extensions.TypedDict  # type: ignore[misc]  # SkyRL asks for Python 3.12; pydantic, for this on 3.11
    from skyrl.backends.skyrl_train.inference_servers.remote_inference_client import RemoteInferenceClient

    async def run() -> Any:
        tokenizer = SimpleNamespace(batch_decode=lambda ids, **more: ["" for _ in ids], decode=lambda ids, **more: "")
        async with RemoteInferenceClient(url, [url], 1, "tiny-reasoner", tokenizer=tokenizer) as client:
            world = await client.get_world_size()
            params = {"max_tokens": 12, "temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "logprobs": 1, "stop": None,
                      "min_tokens": 1, "skip_special_tokens": True, "include_stop_str_in_output": True}  # fmt: skip
            batch = {"prompt_token_ids": [[5, 6, 7], [8, 9]], "sampling_params": params}
            await client.pause("keep")
            pending = asyncio.ensure_future(client.generate(batch))
            await asyncio.sleep(0.3)
            waited = not pending.done()
            await client.resume()
            found = await pending
            await client.reset_prefix_cache()
            client.enable_return_routed_experts = True
            routed = await client.generate(batch)
            return {"world": world, "waited": waited, "tokens": found["response_ids"], "logprobs": found["response_logprobs"],
                    "reasons": found["stop_reasons"], "experts": routed["rollout_expert_indices"]}  # fmt: skip

    return asyncio.run(run())


def areal(url: str) -> Any:
    from areal.engine.vllm_remote import VLLMBackend

    backend = VLLMBackend()
    settings = SimpleNamespace(top_p=1.0, top_k=100_000_000, max_new_tokens=12, greedy=False, temperature=1.0, stop_token_ids=[],
                               ignore_eos=True, skip_special_tokens=True, use_beam_search=False)  # fmt: skip
    asked = SimpleNamespace(gconfig=settings, vision_msg_vllm=None, input_ids=[5, 6, 7], image_data=[])
    request = backend.build_generation_request(asked, with_lora=False, version=0)
    found = backend.parse_generation_response(json.loads(post(url + request.endpoint, request.payload)))
    calls = [backend.get_pause_request(), backend.get_resume_request()]
    said = [json.loads(post(url + call.endpoint, call.payload))["success"] for call in calls]
    return {"tokens": found.output_tokens, "logprobs": found.output_logprobs, "reason": found.stop_reason, "said": said}


if __name__ == "__main__":
    print("RESULT " + json.dumps({"prime-rl": prime_rl, "skyrl": skyrl, "areal": areal}[sys.argv[1]](sys.argv[2])))
