"""Acceptance by slot at several block sizes, on the same places of the same texts.

Where a decode step begins depends on how far the one before it came, so slots of different block sizes do not meet the
same places when each decodes for itself, and their acceptance cannot be compared. Here they do:

    reached_i = prod over j < i of r_j,   r_j = min(1, q_j(x_j) / p_j(x_j)),
    acceptance_i = E[reached_i * r_i] / E[reached_i]

for a fresh block after a place of a text x that was drawn from p. A token of such a text, where a draft stood, came from
that draft with chance min(p, q)(x) / p(x): so this is, without a draw, the chance that a lossless step which begins there
accepts the draft of slot i after all before it, every one drawn from q. Slot 1 is the first token after the place.

Legend: T rows, M mask rows that stand for a token of the text, B block size, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ...kernels.transfer import upload
from ...model.layout import diffusion
from ...model.packing import packs
from ...model.policy import Policy
from ...model.vocabulary import rows_at_once
from ...seeds import named_generator
from ..types import Trajectory
from .counts import ratio

_ROWS = 4096
"""Rows of a pass: enough to fill it, few enough for memory."""


@torch.inference_mode()
def acceptance_at_places(
    policy: Policy,
    samples: Sequence[Trajectory],
    block_sizes: Sequence[int],
    temperature: float,
    places: int = 4,
    seed: int = 0,
) -> dict[int, list[tuple[float, float]]]:
    """By block size, (acceptance, standard error over tasks) of slot 1, 2, ...; lists end where no text goes so far.

    Args:
        samples: drawn from p at `temperature`, without cut-offs.
        places: most places of each sample, drawn at random: any alignment of blocks is as likely as another.
    """
    passed: dict[tuple[int, int], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    reached: dict[tuple[int, int], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    masks = places * sum(block_sizes)
    for pack in packs(samples, lambda sample: len(sample.prompt_tokens) + len(sample.tokens) + masks, _ROWS):
        starts = [_places(sample, places, seed) for sample in pack]
        blocks = [[(start, size) for size in block_sizes for start in mine] for mine in starts]
        documents = [[*sample.prompt_tokens, *sample.tokens] for sample in pack]
        logr = iter(_log_ratios(policy, documents, blocks, temperature))
        for sample, mine in zip(pack, blocks, strict=True):
            for _, size in mine:
                before = 0.0
                for slot, value in enumerate(next(logr)):
                    reached[size, slot][sample.request_id] += np.exp(before)
                    before += value
                    passed[size, slot][sample.request_id] += np.exp(before)
    return {size: [ratio(list(passed[size, slot].values()), list(reached[size, slot].values()))
                   for slot in range(size) if (size, slot) in reached] for size in block_sizes}  # fmt: skip


def _places(sample: Trajectory, most: int, seed: int) -> list[int]:
    """Positions of the text where blocks begin."""
    first, count = len(sample.prompt_tokens), len(sample.tokens)
    draw = named_generator(seed, f"{sample.request_id}/{sample.sample}")
    return sorted(draw.sample(range(first, first + count), min(most, count)))


def _log_ratios(
    policy: Policy, documents: Sequence[Sequence[int]], blocks: Sequence[Sequence[tuple[int, int]]], temperature: float
) -> Iterator[np.ndarray]:
    """log r of the slots of each block that stand for a token of their document, in the order of the blocks."""
    layout, _ = diffusion(documents, blocks, policy.mask_token_id)
    mask_M, clean_M, counts = [], [], []
    row = 0
    for document, mine in zip(documents, blocks, strict=True):
        first = row
        row += len(document)
        for start, size in mine:
            inside = min(size, len(document) - start)
            mask_M.append(row + np.arange(inside))
            clean_M.append(first + start - 1 + np.arange(inside))
            counts.append(inside)
            row += size
    plan = policy.plan(layout)
    index = tuple(torch.from_numpy(np.concatenate(rows)) for rows in (mask_M, clean_M))
    layout, (mask, clean) = upload((layout, index), policy.device)
    hidden_TD = policy(layout, plan=plan)
    at_once = rows_at_once(policy.config.vocab_size, 4, policy.device)
    logr_M = torch.cat([
        _log_ratio(policy, hidden_TD[m], hidden_TD[c], layout.token_T[c], layout.token_T[c + 1], temperature)
        for m, c in zip(mask.split(at_once), clean.split(at_once), strict=True)
    ]).double().cpu().numpy()  # fmt: skip
    yield from np.split(logr_M, np.cumsum(counts)[:-1])


def _log_ratio(
    policy: Policy,
    mask_MD: torch.Tensor,
    clean_MD: torch.Tensor,
    previous_M: torch.Tensor,
    token_M: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """log min(1, q / p) of the tokens, where `clean` and `mask` rows predict them; at temperature 0, whether q's most
    probable token is the text's."""
    q_MV = policy.draft_head(mask_MD, previous_M).float()
    q_MV[:, policy.mask_token_id] = -torch.inf
    if temperature == 0:
        return torch.where(q_MV.argmax(-1) == token_M, 0.0, -torch.inf)
    p_MV = policy.head(clean_MD).float() / temperature
    index_M1, cold = token_M[:, None], temperature * policy.draft_temperature
    logq_M, logp_M = ((x_MV.log_softmax(-1)).gather(-1, index_M1)[:, 0] for x_MV in (q_MV / cold, p_MV))
    return (logq_M - logp_M).clamp_max(0.0)
