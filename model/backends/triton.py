"""TritonBackend: the network with attention and CCA as kernels on the cache's pages."""

from __future__ import annotations

from ...kernels.transfer import upload
from ..layout import TokenLayout
from ..plan import Plan
from ..state import SequenceState
from .plain import PlainBackend


class TritonBackend(PlainBackend):
    """`Policy.forward` with plans for kernels. See `backends.Backend`."""

    recurs = True

    def prepare(self, layout: TokenLayout, state: SequenceState | None = None) -> tuple[TokenLayout, Plan]:
        """See `Backend.prepare`."""
        return upload((layout, self._policy.paged_plan(layout, state)), self._policy.device)
