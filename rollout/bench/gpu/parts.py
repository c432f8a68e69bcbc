"""What is measured: a policy with random weights over a filled cache, and the decode steps of a schedule on it.

Invariants:
- The policy, its layouts and plans, the cache and the kernels are the engine's own. Between the tensors it is given and the
  tokens it samples a step asks nothing of the host, so it can be captured.
- Acceptance is forced, by a tensor of accepted counts: random weights accept nothing worth measuring. So is the choice of
  experts, uniformly: random routers send alike rows to one expert.

Legend: S sequences, R rows per sequence, M drafts, B mask rows of a proposal, V vocabulary, T rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from transformers import ZayaConfig

from ....kernels.verify import Sampled, sample_cdf, sample_gumbel, verify_rejection
from ....model.cca import Plan
from ....model.layout import DecodeRows, TokenLayout, decode
from ....model.paged import PagedPlan
from ....model.policy import Layer, Policy
from ...cache import CacheView, Held, PagedCache
from ...schedule import Schedule


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def random_policy(config: ZayaConfig, dtype: torch.dtype, device: torch.device) -> Policy:
    """Random weights, made on the device."""
    with _default_dtype(dtype), torch.device(device):
        policy = Policy(config)
    for layer in layers(policy):  # buffers stay in float32, as `load_policy` keeps them
        router = layer.mlp.gate
        router.balancing_biases = torch.nn.Buffer(router.balancing_biases.float())
    policy.initialise(torch.Generator(device).manual_seed(0))
    policy.pack()
    return policy.requires_grad_(False).eval()


def layers(policy: Policy) -> list[Layer]:
    """The policy's layers."""
    return cast(list[Layer], list(policy.model.layers))


def force_experts(policy: Policy, most_rows: int) -> None:
    """Every row's expert drawn uniformly and layer by layer, whatever the router says; its work is still done."""
    device, experts = policy.device, policy.config.num_experts
    generator = torch.Generator(device).manual_seed(0)
    for layer in layers(policy):
        fixed_T = torch.randint(0, experts, (most_rows,), generator=generator, device=device)

        def uniform(_module: Any, _arguments: Any, chosen: Any, fixed_T: torch.Tensor = fixed_T) -> Any:
            expert_T, *rest = chosen
            return fixed_T[: len(expert_T)], *rest

        layer.mlp.gate.register_forward_hook(uniform)


class FilledCache:
    """A cache with random contents, dealt to sequences in shuffled pages."""

    def __init__(self, policy: Policy, positions: int, sequences: int, page_size: int, decode_rows: int) -> None:
        pages = -(-positions // page_size) + sequences
        self.sequences = sequences
        self.cache = PagedCache(policy, pages, page_size, sequences, decode_rows)
        for pool in (self.cache.k, self.cache.v, self.cache.x, self.cache.delayed):
            for layer in pool:
                layer.normal_()

    def held(self, contexts: Sequence[int], rows: int) -> list[Held]:
        """Sequences with so many cached positions each, and room for `rows` more."""
        size = self.cache.page_size
        free = torch.randperm(self.cache.total_pages, generator=torch.Generator().manual_seed(0)).tolist()
        out = []
        for slot, context in enumerate(contexts):
            count = -(-(context + rows) // size)
            if count > len(free) or len(contexts) > self.sequences:
                raise ValueError(f"{len(contexts)} sequences of {max(contexts)} positions do not fit the cache")
            out.append(Held(slot, np.array([free.pop() for _ in range(count)], dtype=np.int64), context))
        return out


@dataclass
class Pass:
    """One forward pass over a layout: `run` gives hidden_TD."""

    policy: Policy
    layout: TokenLayout
    view: CacheView
    plan: Plan | PagedPlan
    rows: int
    sequences: int

    @property
    def paged(self) -> PagedPlan:
        """Its plan, as kernels take it."""
        assert isinstance(self.plan, PagedPlan), "kernels are off here"
        return self.plan

    @classmethod
    def of(cls, policy: Policy, cache: PagedCache, held: Sequence[Held], plans: Sequence[DecodeRows]) -> Pass:
        """Everything the host prepares for a pass."""
        layout = decode(plans, policy.mask_token_id)
        view = cache.view(held, layout)
        plan = policy.plan(layout, view)
        return cls(policy, layout.to(policy.device), view, plan, layout.rows // len(plans), len(plans))

    def run(self) -> torch.Tensor:
        """hidden_TD."""
        return self.policy(self.layout, self.view, plan=self.plan)

    def logits(self, hidden_TD: torch.Tensor, row_SR: torch.Tensor) -> torch.Tensor:
        """logits_SRV of rows counted from the first of each sequence."""
        first_S = torch.arange(self.sequences, device=row_SR.device)[:, None] * self.rows
        return self.policy.head(hidden_TD[(first_S + row_SR).clamp_max(len(hidden_TD) - 1)])


class DecodeStep:
    """One decode step of `schedule` for sequences with `context` cached positions each.

    Attributes:
        passes: its forwards.
        run: the whole step on the device: forwards, heads, verification, drafts. Returns the tokens committed.
        forward: its forwards alone.
        host: what the host prepares for it anew.
    """

    def __init__(self, policy: Policy, filled: FilledCache, schedule: Schedule, batch: int, context: int) -> None:
        self.policy, self.schedule = policy, schedule.within(policy.block_size)
        self.cache, self.batch, self.context = filled.cache, batch, context
        drafts = self.schedule.drafts or 0
        self.held = filled.held([context] * batch, 2 * (policy.block_size + 1))
        device, vocab = policy.device, policy.config.vocab_size
        self.passes = self._passes()
        self.temperature_S = torch.ones(batch, dtype=torch.float64, device=device)
        self.seed_S = torch.arange(batch, device=device)
        self.anchor_S = torch.full((batch,), context, device=device)
        self.count_S = torch.full((batch,), drafts, device=device)
        self.accepted_S = torch.arange(batch, device=device) % (drafts + 1)
        self.level_L = torch.tensor(self.schedule.levels, device=device)
        run: dict[str, Callable[[], torch.Tensor]] = {
            "ar": self._ar, "fused": self._fused, "two_pass": self._two_pass,
        }  # fmt: skip
        self.run = run[self.schedule.kind]
        if self.schedule.kind == "fused":
            # What the last step left behind.
            self.q_logits_SMV = torch.randn(batch, drafts, vocab, device=device, dtype=policy.dtype)
            made = self._drafts(self.q_logits_SMV)
            self.draft_SM, self.q_lse_SM = made.token_SR, made.lse_SR

    @property
    def rows(self) -> int:
        """Rows per sequence, over both passes of `two_pass`."""
        return sum(each.rows for each in self.passes)

    def forward(self) -> None:
        """The forwards alone."""
        for each in self.passes:
            each.run()

    def host(self) -> list[Pass]:
        """Layouts and plans of the next step, moved to the device."""
        return self._passes()

    def _passes(self) -> list[Pass]:
        schedule, drafts = self.schedule, self.schedule.drafts or 0
        token = torch.randint(0, self.policy.mask_token_id, (self.batch, drafts + 1)).tolist()
        if schedule.kind == "two_pass":
            first = [DecodeRows(row[:1], self.context, (1,), drafts) for row in token]
            second = [DecodeRows(row[1:], self.context + 1, (), 0) for row in token]
            shapes = [first, second]
        elif schedule.kind == "fused":
            levels = tuple(level + 1 for level in schedule.levels)
            shapes = [[DecodeRows(row, self.context, levels, schedule.block or 0) for row in token]]
        else:
            shapes = [[DecodeRows(row[:1], self.context, (), 0) for row in token]]
        return [Pass.of(self.policy, self.cache, self.held, plans) for plans in shapes]

    def _line(self, count: int) -> torch.Tensor:
        return torch.arange(count, device=self.policy.device)[None]

    def _drafts(self, q_logits_SMV: torch.Tensor) -> Sampled:
        return sample_cdf(q_logits_SMV, self.temperature_S, self.seed_S, self.anchor_S, self.policy.mask_token_id)

    def _verify(
        self, p_logits_SRV: torch.Tensor, q_logits_SMV: torch.Tensor, q_lse_SM: torch.Tensor, draft_SM: torch.Tensor
    ) -> torch.Tensor:
        verdict = verify_rejection(
            p_logits_SRV, q_logits_SMV, q_lse_SM, draft_SM, self.count_S, self.temperature_S, self.seed_S, self.anchor_S,
            self.policy.mask_token_id,
        )  # fmt: skip
        return verdict.token_SR

    def _ar(self) -> torch.Tensor:
        (only,) = self.passes
        logits_SRV = only.logits(only.run(), self._line(1))
        return sample_gumbel(logits_SRV, self.temperature_S, self.seed_S, self.anchor_S).token_SR

    def _fused(self) -> torch.Tensor:
        (only,), schedule = self.passes, self.schedule
        drafts, block = schedule.drafts or 0, schedule.block or 0
        hidden_TD = only.run()
        p_logits_SRV = only.logits(hidden_TD, self._line(drafts + 1))
        token_SR = self._verify(p_logits_SRV, self.q_logits_SMV, self.q_lse_SM, self.draft_SM)
        # The proposal of the highest level reached, from the slot after the token that was sampled.
        which_S = (self.level_L <= self.accepted_S[:, None]).sum(1) - 1
        slot_S = drafts + 1 + which_S * block + self.accepted_S - self.level_L[which_S] + 1
        self._drafts(only.logits(hidden_TD, slot_S[:, None] + self._line(block - 1)))
        return token_SR

    def _two_pass(self) -> torch.Tensor:
        first, second = self.passes
        drafts = self.schedule.drafts or 0
        logits_SRV = first.logits(first.run(), self._line(drafts + 1))
        q_logits_SMV = logits_SRV[:, 1:]
        made = self._drafts(q_logits_SMV)
        second.layout.token_T.copy_(made.token_SR.flatten())
        p_logits_SMV = second.logits(second.run(), self._line(drafts))
        p_logits_SRV = torch.cat([logits_SRV[:, :1], p_logits_SMV], dim=1)
        return self._verify(p_logits_SRV, q_logits_SMV, made.lse_SR, made.token_SR)
