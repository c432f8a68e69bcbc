"""From logits to the distribution that is sampled: temperature, top-k, top-p, min-p, in that order.

Invariants:
- A row's result depends on that row alone, and on its own parameters.
- Temperature 0 is temperature 1 cut to the most probable token, so `logp = full_logp - support_logmass` holds for every
  kept token at every temperature.
- Ties go to the lower token id, in the greedy choice and at the edge of every cut.
- Arithmetic in float32, or in float64 for float64 logits; half-precision logits are widened first.

Legend: `...` = any leading shape (parameters broadcast against it), V = vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...kernels.cutoffs import edges, inside


class Processed(NamedTuple):
    """One distribution, before and after its cut-offs.

    Attributes:
        scaled: logits over the temperature, -inf outside the support: log p up to a constant per row.
        logp: normalised log-probabilities after the cut-offs, -inf outside the support.
        full_logp: normalised log-probabilities at the sampling temperature (temperature 0: at 1), nothing cut.
        support_logmass: [...], log of the mass of `full_logp` inside the support; 0 where nothing is cut.
    """

    scaled: torch.Tensor
    logp: torch.Tensor
    full_logp: torch.Tensor
    support_logmass: torch.Tensor


def widen(logits: torch.Tensor) -> torch.Tensor:
    """The logits in the dtype their arithmetic runs in: float64 stays, everything else becomes float32."""
    return logits if logits.dtype == torch.float64 else logits.to(torch.float32)


def scale(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Logits over the temperature (0 counts as 1), in float32 or wider; always a new tensor."""
    logits = widen(logits)
    temperature = torch.where(temperature > 0, temperature, torch.ones_like(temperature))
    return logits / temperature[..., None].to(logits.dtype)


def kept(scaled: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """Which tokens survive the cut-offs (`kernels.cutoffs`). top-p counts the probabilities left by top-k, renormalised; min-p
    compares with the most probable token. Values that cut nothing: top_k 0, top_p 1, min_p 0.

    Returns: bool[..., V], never all False.
    """
    rows = scaled.detach().reshape(-1, 1, scaled.shape[-1])
    each_N = [values.expand(scaled.shape[:-1]).reshape(-1) for values in (top_k, top_p, min_p)]
    found = edges(rows, torch.ones_like(each_N[1]), *each_N)
    return inside(rows, found).view(scaled.shape)


def processed(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    any_cut: bool | None = None,
    any_greedy: bool | None = None,
) -> Processed:
    """The distribution of each row and its support; greedy rows ignore the cut-offs, which never cut the best token.

    Args:
        logits: [..., V]; the parameters broadcast against [...], with the values `SamplingParams` allows.
        any_cut, any_greedy: whether some row has a cut-off, or temperature 0, where the caller knows; None: look.
    """
    greedy = temperature <= 0
    if any_greedy is None:
        any_greedy = bool(greedy.any())
    if any_cut is None:
        any_cut = bool((((top_k > 0) | (top_p < 1) | (min_p > 0)) & ~greedy).any())
    scaled = scale(logits, temperature)
    full_logp = torch.log_softmax(scaled, -1)
    if not any_cut and not any_greedy:
        return Processed(scaled, full_logp, full_logp, torch.zeros_like(full_logp[..., 0]))
    keep = kept(scaled, top_k, top_p, min_p) if any_cut else torch.ones_like(scaled, dtype=torch.bool)
    if any_greedy:
        best = torch.zeros_like(keep).scatter_(-1, scaled.argmax(-1, keepdim=True), True)
        keep = torch.where(greedy[..., None], best, keep)
    scaled = scaled.masked_fill_(keep.logical_not_(), -torch.inf)
    logp = torch.log_softmax(scaled, -1)
    # Both normalisers seen from the most probable token, which every cut keeps.
    return Processed(scaled, logp, full_logp, full_logp.amax(-1) - logp.amax(-1))


def process(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    """Normalised log-probabilities [..., V] after temperature and cut-offs; temperature 0 gives 0 at the most probable
    token and -inf elsewhere. See `processed` for the arguments."""
    return processed(logits, temperature, top_k, top_p, min_p).logp
