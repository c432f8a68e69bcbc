"""Tool calls in the text of a sample.

Two forms are read between <tool_call> (or <zyphra_tool_call>) and its closing mark:

    {"name": "add", "arguments": {"a": 1}}                                        Hermes and Qwen
    <function=add><parameter=a>1</parameter></function>                           ZAYA and Qwen's coder

What is neither stays text.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

OPENINGS = ("<tool_call>", "<zyphra_tool_call>")
_BLOCK = re.compile(r"<(zyphra_)?tool_call>(.*?)(?:</(?:zyphra_)?tool_call>|\Z)", re.DOTALL)
# Time grows with the text alone: a name is bounded, and where one parameter has no end, none that follows has one.
_FUNCTION = re.compile(r"<function=([^>\s]{1,256})>(.*?)(?:</function>|\Z)", re.DOTALL)
_PARAMETER, _PARAMETER_END = re.compile(r"<parameter=([^>\s]{1,256})>"), "</parameter>"


@dataclass(frozen=True)
class ToolCall:
    """A call. `arguments`: a JSON object, as text."""

    name: str
    arguments: str

    def as_json(self, index: int | None = None) -> dict[str, Any]:
        """OpenAI's form; `index` in a stream."""
        call = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function",
                "function": {"name": self.name, "arguments": self.arguments}}  # fmt: skip
        return call if index is None else {"index": index, **call}


def parse_tool_calls(text: str, tools: Sequence[dict[str, Any]]) -> tuple[str, list[ToolCall]]:
    """The text before the calls, and the calls. Text whose marks hold no call of the tools is returned whole."""
    known = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
    blocks = list(_BLOCK.finditer(text))
    calls = [call for block in blocks for call in _calls(block[2], known)]
    return (text[: blocks[0].start()].rstrip(), calls) if calls else (text, [])


def _calls(block: str, known: dict[str, Any]) -> list[ToolCall]:
    try:
        found = json.loads(block)
    except (ValueError, RecursionError):
        return [ToolCall(name, json.dumps({key: _typed(value, known[name], key) for key, value in _parameters(inside)}))
                for name, inside in _FUNCTION.findall(block) if name in known]
    calls = []
    for call in found if isinstance(found, list) else [found]:
        if not isinstance(call, dict) or not isinstance(name := call.get("name"), str) or name not in known:
            continue
        arguments = call.get("arguments", call.get("parameters", {}))
        if isinstance(arguments, dict):
            calls.append(ToolCall(name, json.dumps(arguments)))
    return calls


def _parameters(text: str) -> Iterator[tuple[str, str]]:
    at = 0
    while (begin := _PARAMETER.search(text, at)) is not None and (end := text.find(_PARAMETER_END, begin.end())) >= 0:
        yield begin[1], text[begin.end() : end]
        at = end + len(_PARAMETER_END)


def _typed(text: str, parameters: Any, key: str) -> Any:
    """A parameter's value: text where the tool's schema says so, else what JSON reads in it."""
    value = text.removeprefix("\n").removesuffix("\n")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    schema = properties.get(key) if isinstance(properties, dict) else None
    if isinstance(schema, dict) and schema.get("type") == "string":
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
