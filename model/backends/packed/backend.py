"""PackedBackend: the network of `Policy.forward` with its weights folded for decoding on a CPU. A pass is one call of a function
that numba compiles (`network`), or one in each of several threads.

Invariants:
- Same results as `Policy.forward` over the same layout and cache, up to rounding; `tests/model/backends` compares.
- The result of a clean row depends on its prefix alone, to the last bit, so the log-probabilities of a sample are those of one
  causal pass over its tokens. Neither the pack, nor the number of threads, nor a library decides the order of its sums.
- A sequence is computed by one thread, and no sequence reads what another one of the same pass writes.
- The weights are copies, and `refresh` makes them again.

Legend: as in `cca` and `experts`; N = H + G heads, A ancestors, F inner size of an expert, I slots of sorted rows, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from ....kernels import cca
from ....kernels.linear import numba as linear
from ....kernels.verify import PairTable
from ...layout import TokenLayout
from ...state import SequenceState
from .attention import Lines, width_of
from .between import NOTHING_BETWEEN, Between
from .network import Angles, Network, Pools, Work, head, run
from .plan import PackedPlan
from .threads import MOST, Threads
from .weights import PackedLayer, floor, fold_layers, turned

if TYPE_CHECKING:
    from ...policy import Layer, Policy, Routing
    from .. import DraftsBetween

_MOST_PAIRS = 2**22
"""With fewer pairs of tokens, the Markov head is kept as their table."""
_MOST_SIZES = 256
"""Sizes of packs whose working memory is kept."""
_ROWS = 64
"""Working memory is made for multiples of so many rows."""
_ANGLES = 256
"""Positions whose angles are computed at once. The shape is fixed: a library's cosine may depend on the number of values."""
_LEAST_ROWS = 4
"""Rows of a pass for each thread. With fewer, each thread waits for the weights as long as one would for all rows."""


class _Memory:
    """Pieces of memory by name. A piece is as large as the largest request for it so far.

    Attributes:
        moved: how often a piece was replaced by a larger one.
    """

    def __init__(self) -> None:
        self._pieces: dict[str, torch.Tensor] = {}
        self.moved = 0

    def take(self, name: str, *shape: int) -> np.ndarray:
        """float32 of this shape, uninitialised. Requests under one name share their memory."""
        count = math.prod(shape)
        piece = self._pieces.get(name)
        if piece is None or len(piece) < count:
            self.moved += piece is not None
            piece = self._pieces[name] = torch.zeros(1 << (count - 1).bit_length(), dtype=torch.float32)
        return piece[:count].view(shape).numpy()


class _Workspace:
    """Where passes work."""

    def __init__(self, policy: Policy) -> None:
        config, self._memory = policy.config, _Memory()
        self._heads, self._kv_heads, self._size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self._works, self._lines = dict[int, Work](), dict[tuple[int, int], Lines]()

    def of(self, layers: PackedLayer, plan: PackedPlan, parts: int) -> tuple[Work, Lines]:
        """For a pass over this plan, and for each of its parts."""
        rows, width = -(-len(plan.position_T) // _ROWS) * _ROWS, width_of(plan.longest)
        take, moved = self._memory.take, self._memory.moved
        work = self._works.get(rows) or Work.of(layers, self._heads, self._kv_heads, rows, take)
        group = self._heads // self._kv_heads
        lines = self._lines.get((parts, width)) or Lines.of(parts, group, self._kv_heads, self._size, width, take)
        if moved != self._memory.moved or max(len(self._works), len(self._lines)) >= _MOST_SIZES:
            self._works.clear()  # memory that grew lies elsewhere
            self._lines.clear()
        self._works[rows], self._lines[parts, width] = work, lines
        return work, lines


@dataclass(frozen=True)
class _Folded:
    """The weights of one version: the network, the head and the Markov head."""

    network: Network
    head_bias: torch.Tensor | None
    head_PDW: np.ndarray
    markov: Callable[[torch.Tensor], torch.Tensor] | None


class PackedBackend:
    """Folded weights of a policy, and where passes over them work. See `backends.Backend`.

    Attributes:
        markov: looks its results up in a table where the vocabulary is small.
    """

    recurs = False

    def __init__(self, policy: Policy) -> None:
        self.threads: int | None = 1
        self._policy, self._vocabulary, self._hidden = policy, policy.config.vocab_size, policy.config.hidden_size
        self._angles: Angles | None = None
        self._pools: tuple[cca.Pools | None, Pools] | None = None
        self._workspace, self._threads = _Workspace(policy), Threads()
        self.refresh()

    @torch.inference_mode()
    def fold(self, policy: Policy) -> _Folded:
        """See `Backend.fold`."""
        trunk, size, vocabulary = policy.model, policy.config.hidden_size, policy.config.vocab_size
        markov: Callable[[torch.Tensor], torch.Tensor] | None = policy.markov
        if policy.markov is not None and vocabulary**2 <= _MOST_PAIRS:
            markov = PairTable(policy.markov(torch.arange(vocabulary)))
        bias = policy.lm_head.bias
        embedded_VD = (trunk.embed_tokens.weight + trunk.input_hidden_states_bias) * trunk.input_hidden_states_scale
        return _Folded(
            network=Network(
                embedded_VD.contiguous().numpy(), fold_layers(cast("Iterable[Layer]", trunk.layers), list(policy.windows)),
                (trunk.norm.weight * size**0.5).numpy(), np.float32(floor(size, trunk.norm.eps)),
            ),
            head_bias=None if bias is None else bias.detach().clone(),
            head_PDW=linear.pack(turned(policy.lm_head.weight)),
            markov=markov,
        )  # fmt: skip

    def refresh(self, folded: _Folded | None = None) -> None:
        """See `Backend.refresh`."""
        weights = self.fold(self._policy) if folded is None else folded
        self._network, self._head_bias, self._head_PDW = weights.network, weights.head_bias, weights.head_PDW
        self.markov = weights.markov

    def prepare(self, layout: TokenLayout, state: SequenceState | None = None) -> tuple[TokenLayout, PackedPlan]:
        """See `Backend.prepare`. Without a cache, of clean rows from the start of their documents."""
        return layout, PackedPlan.of(layout, state, self._policy.hops, self._policy.windows)

    @property
    def drafts_between(self) -> bool:
        """See `Backend`."""
        return isinstance(self.markov, PairTable) and self._head_bias is None

    @torch.inference_mode()
    def forward(
        self, layout: TokenLayout, plan: PackedPlan, state: SequenceState | None = None, routing: Routing | None = None
    ) -> torch.Tensor:
        """See `Backend.forward`."""
        hidden = torch.empty(len(plan.token_T), self._hidden)
        self._run(plan, state, routing, (self._parts(len(plan.token_T)), 0), NOTHING_BETWEEN, hidden.numpy())
        return hidden

    def forward_twice(
        self, layout: TokenLayout, plan: PackedPlan, state: SequenceState | None, routing: Routing | None,
        drawing: DraftsBetween,
    ) -> None:  # fmt: skip
        """See `Backend.forward_twice`."""
        rows = int(plan.first_S1[drawing.sequences])
        parts = self._parts(rows), self._parts(len(plan.token_T) - rows)
        self._run(plan, state, routing, parts, Between.of(drawing))

    def _run(
        self, plan: PackedPlan, state: SequenceState | None, routing: Routing | None, most_P: tuple[int, int],
        between: Between, hidden_TD: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """The rows of one pass over the plan, or of two. Args: most_P, most parts of each; hidden_TD, to be written."""
        network, rows, parts = self._network, len(plan.token_T), max(most_P)
        angles, pools = self._angles_of(plan.longest), self._pools_of(state)
        work, lines = self._workspace.of(network.layers, plan, parts)
        desk, final_TD = self._threads.desk(parts), work.final_TD if hidden_TD is None else hidden_TD
        if run(desk, most_P, plan, network, angles, pools, work, lines, final_TD, self._head_PDW, between):
            raise MemoryError("a pass has failed")
        if routing is not None:
            routing.expert_LT.extend(torch.from_numpy(work.expert_LT[:, :rows].copy()))
            routing.probs_LTE.extend(torch.from_numpy(work.probs_LTC[:, :rows].copy()))

    def head(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """See `Backend.head`."""
        logits = torch.empty(*hidden.shape[:-1], self._vocabulary) if out is None else out
        hidden_RD, logits_RV = hidden.flatten(0, -2).contiguous().numpy(), logits.view(-1, self._vocabulary).numpy()
        parts = self._parts(len(hidden_RD))
        if parts == 1:
            linear.product(hidden_RD, self._head_PDW, logits_RV)
        elif head(self._threads.desk(parts), parts, hidden_RD, self._head_PDW, logits_RV):
            raise MemoryError("the head of a pass has failed")
        return logits if self._head_bias is None else logits.add_(self._head_bias)

    def _parts(self, rows: int) -> int:
        """Among how many threads so many rows are divided."""
        return max(1, min(self.threads or 1, rows // _LEAST_ROWS, MOST))

    def _pools_of(self, state: SequenceState | None) -> Pools:
        """The arrays of `SequenceState.all_pools`, made anew only for another cache; without one, arrays of no entry."""
        tensors = None if state is None else state.all_pools()
        if self._pools is None or self._pools[0] is not tensors:
            config, layers = self._policy.config, self._network.layers
            kv = config.num_key_value_heads, config.head_dim
            shapes = kv, kv, (layers.convolution_bias_NO[0].size,), layers.before.shape[1:]
            nothing = (np.zeros((len(layers.window), 0, *shape), np.float32) for shape in shapes)
            self._pools = tensors, Pools(*(nothing if tensors is None else (x.numpy() for x in tensors)))
        return self._pools[1]

    def _angles_of(self, positions: int) -> Angles:
        """For at least so many positions."""
        if self._angles is None or self._angles.cos_WPO.shape[1] < positions:
            lines = torch.arange(max(_ANGLES, 2 ** (positions - 1).bit_length())).view(-1, 1, _ANGLES)
            cos, sin, half = [], [], []
            for kind in self._policy.windows:
                parts = zip(*(self._policy.model.rotary_emb(torch.zeros(1), line, kind) for line in lines), strict=True)
                cos_PO, sin_PO = (torch.cat([part[0] for part in some]) for some in parts)
                half.append(cos_PO.shape[1] // 2)
                cos.append(cos_PO)
                sin.append(torch.cat([-sin_PO[:, : half[-1]], sin_PO[:, half[-1] :]], dim=1))
            self._angles = Angles(_padded(cos), _padded(sin), np.array(half))
        return self._angles


def _padded(angles_WPO: list[torch.Tensor]) -> np.ndarray:
    """Side by side. Windows whose heads turn fewer features have zeros after them."""
    most = max(angles_PO.shape[1] for angles_PO in angles_WPO)
    return torch.stack([torch.nn.functional.pad(x_PO, (0, most - x_PO.shape[1])) for x_PO in angles_WPO]).numpy()
