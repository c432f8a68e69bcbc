"""PlainBackend: the network in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ...kernels.transfer import upload
from ..layout import TokenLayout
from ..plan import Plan
from ..state import SequenceState

if TYPE_CHECKING:
    from ..policy import Policy, Routing
    from . import DraftsBetween


class PlainBackend:
    """`Policy.forward` with plans for torch. See `backends.Backend`."""

    recurs = drafts_between = False
    threads: int | None = None

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.markov: Callable[[torch.Tensor], torch.Tensor] | None = policy.markov

    def prepare(self, layout: TokenLayout, state: SequenceState | None = None) -> tuple[TokenLayout, Plan]:
        """See `Backend.prepare`."""
        plan, device = self._policy.plain_plan(layout, state), self._policy.device
        return (layout.to(device), plan) if state is None else upload((layout, plan), device)

    def forward(
        self, layout: TokenLayout, plan: Plan, state: SequenceState | None = None, routing: Routing | None = None
    ) -> torch.Tensor:
        """See `Backend.forward`."""
        return self._policy(layout, state, routing, plan)

    def forward_twice(
        self, layout: TokenLayout, plan: Plan, state: SequenceState | None, routing: Routing | None, drawing: DraftsBetween
    ) -> None:
        """Passes run one by one."""
        raise NotImplementedError

    def head(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """See `Backend.head`."""
        logits = self._policy.head(hidden)
        return logits if out is None else out.copy_(logits)

    def fold(self, policy: Policy) -> Any:
        """See `Backend.fold`."""

    def refresh(self, folded: Any = None) -> None:
        """The policy's own weights are read."""
        self.markov = self._policy.markov
