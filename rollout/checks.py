"""What an engine is made with and asked to serve, checked once at its edge: types, sizes and names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from ..errors import RequestError
from ..model.arguments import is_list, is_number, is_whole, require, short
from ..model.config import DRAFT_TEMPERATURES
from .schedule import Schedule
from .types import RolloutRequest

if TYPE_CHECKING:
    from .engine import EngineConfig

MOST = 2**31 - 1
"""Largest size of an engine: places in its cache are int32 in kernels."""


def check_config(config: EngineConfig) -> None:
    """Raise RequestError where a field of the configuration is of another type or out of range."""
    require(isinstance(config.schedule, Schedule), "schedule", f"{short(config.schedule)} is no Schedule",
            "give Schedule(...), or its kind as an option of Engine")
    size = config.block_size
    require(size is None or (is_whole(size) and 2 <= size <= 64), "block_size", f"{short(size)} is outside 2..64",
            "use the policy's own, or 4 to 32")
    temperature, (least, most) = config.draft_temperature, DRAFT_TEMPERATURES
    require(temperature is None or (is_number(temperature) and least <= temperature <= most), "draft_temperature",
            f"{short(temperature)} is no number in {least}..{most}", "use the policy's own, or 0.3 to 1")
    for name in ("max_batch", "page_size", "prefill_rows", "pages"):
        value = getattr(config, name)
        optional = name in ("pages", "prefill_rows")
        require((is_whole(value) and 1 <= value <= MOST) or (optional and value is None), name,
                f"{short(value)} is no whole number in 1..{MOST}", "use a positive number")
    for name in ("enable_prefix_caching", "captured", "batch_invariant", "repeatable"):
        require(isinstance(getattr(config, name), bool), name, f"{short(getattr(config, name))} is neither True nor False",
                "give one of them")


def check_requests(requests: Iterable[RolloutRequest], serves: Callable[[str], bool]) -> None:
    """Raise RequestError where there is something else than a request, or two of one name.

    Args:
        serves: whether an unfinished request has a name.
    """
    # Messages are made only where there is an error: requests are checked one by one as they arrive.
    if not is_list(requests):
        raise RequestError("requests", f"{short(requests)} is no list of requests", "give a list of RolloutRequests")
    names = set[str]()
    for request in requests:
        if not isinstance(request, RolloutRequest):
            raise RequestError("requests", f"{short(request)} is no RolloutRequest",
                               "give RolloutRequest(id, prompt_tokens, ...)")  # fmt: skip
        if request.id in names or serves(request.id):
            raise RequestError("id", f"two unfinished requests are called {short(request.id)}", "give each request its own id")
        names.add(request.id)
