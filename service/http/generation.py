"""Runs a request of a trainer's route to its end."""

from __future__ import annotations

from ...rollout.params import SamplingParams
from ...rollout.types import RolloutRequest, Trajectory
from .http_errors import HttpError
from .state import HttpState


def check_model(state: HttpState, model: str | None) -> None:
    """Raises HttpError (404) for a model that is not the policy."""
    if model is not None and model != state.policy:
        raise HttpError(404, f"model {model[:200]!r} is not served; use {state.policy!r}", "model", "model_not_found")


def room_behind(state: HttpState, token_ids: list[int], field: str) -> int:
    """Tokens that fit behind a prompt. Raises HttpError for a prompt that does not fit, or ids out of range."""
    room = state.sizes.positions - len(token_ids)
    if room < 1:
        raise HttpError(400, f"{field}: {len(token_ids)} tokens leave no room in {state.sizes.positions} positions; shorten the "
                        "prompt", field, "context_length_exceeded")
    if any(not 0 <= token < state.sizes.vocabulary for token in token_ids):
        raise HttpError(400, f"{field}: token ids must be in 0..{state.sizes.vocabulary - 1}", field)
    return room


async def generate(state: HttpState, token_ids: list[int], params: SamplingParams, name: str | None) -> list[Trajectory]:
    """The samples of one prompt, in order, whatever ended them.

    Args: name: the client's own name for the request, by which it may be aborted.
    """
    if params.n > state.options.max_samples:
        raise HttpError(400, f"n: {params.n} samples, at most {state.options.max_samples} are taken (http.max_samples)", "n")
    request = RolloutRequest(state.dispatch.new_id(), tuple(token_ids), params)
    found = []
    with state.names.named(name, request.id):
        async with state.dispatch.open([request]) as answers:
            async for item in answers:
                if isinstance(item, Trajectory):
                    found.append(item)
    return sorted(found, key=lambda trajectory: trajectory.sample)


def version_spans(trajectory: Trajectory) -> list[dict[str, int | str]]:
    """Which weight version made which tokens, as runs over the generated tokens, in vLLM's form."""
    spans: list[dict[str, int | str]] = []
    for place, version in enumerate(trajectory.versions.tolist()):
        if spans and spans[-1]["version"] == str(version):
            spans[-1]["end"] = place + 1
        else:
            spans.append({"version": str(version), "start": place, "end": place + 1})
    return spans
