"""Seeds and generators by name: what is drawn depends on the run's seed and a name, never on order, process or neighbours.

`derived_seed` and `sample_seed` key the counter-based random numbers of decoding; `named_generator` draws everything else. This
module needs the standard library only, so a trainer's process derives the same seeds as an engine's.
"""

from __future__ import annotations

import hashlib
import random

MAX_SEED = 2**63 - 1
_WORD = (1 << 64) - 1


def derived_seed(seed: int, name: str) -> int:
    """The seed, in [0, 2^63), of what is called `name` in a run with seed `seed` >= 0.

    The first 63 bits of SHA-256 of "seed/name". So the seed of a request does not depend on its neighbours, on its place among
    them or on the process; and two requests share one with chance 2^-63, where sums such as `seed + number` make request 1 of
    seed 0 and request 0 of seed 1 the same.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1


def sample_seed(request_seed: int, sample: int) -> int:
    """The seed of one sample of a group, in [0, 2^63): SplitMix64 of the pair."""

    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) & _WORD
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _WORD
        return x ^ (x >> 31)

    return mix(mix(request_seed) ^ sample) >> 1


def named_generator(seed: int | str, name: str) -> random.Random:
    """Python's generator, seeded by the text "seed/name"."""
    return random.Random(f"{seed}/{name}")
