"""Commits a step: writes what it gave into its samples.

Invariant: only `commit` appends to a sample's tokens. Afterwards every row below the length of a sample's block table is the
clean row of a committed token.
"""

from __future__ import annotations

import numpy as np

from ..sample_log import StepRecord
from ..sampling.drafts import Verdict
from .plan import StepPlan
from .runner import StepOutput


def commit(plan: StepPlan, output: StepOutput, version: int) -> int:
    """Write tokens, the trace, cached positions and the next drafts. Returns the number of tokens.

    Args:
        version: the weight version that the tokens carry.
    """
    made, verdict, forwards, drafts = 0, output.verdict, plan.forwards, output.drafts
    record = StepRecord(
        plan.count_D.tolist(), verdict.accepted_S.numpy().tolist(), plan.block_start_D, plan.block_length_D, _kept(verdict),
        version, forwards,
    )  # fmt: skip
    samples = plan.batch.decoding
    steps = zip(samples, record.drafted, record.accepted, verdict.token_SR.numpy().tolist(), strict=True)
    for d, (sample, drafted, accepted, row) in enumerate(steps):
        table, anchor = sample.block_table, len(sample.tokens) - 1
        assert table is not None
        sample.forwards += forwards if drafted else 1
        if drafts is not None or sample.drafts is not None:
            sample.keep_drafts(drafts, d, output.draft_count_D[d], anchor + output.draft_level_D[d] + 1, output.block)
        count = sample.commit(accepted, row)
        sample.log.take(record, d, anchor, count)
        table.length = anchor + count
        made += count
    if verdict.top_token_SRK is not None and verdict.top_logprob_SRK is not None:
        tops = zip(samples, verdict.top_token_SRK.tolist(), verdict.top_logprob_SRK.tolist(), strict=True)
        for sample, *top in tops:
            sample.record_top(*top)
    return made


def _kept(verdict: Verdict) -> np.ndarray:
    """Its log-probabilities (`StepRecord.numbers_3DR`), copied: a verdict is valid until the next step."""
    columns = verdict.logprob_SR, verdict.behavior_logprob_SR, verdict.support_logmass_SR
    return np.array([column.numpy() for column in columns], dtype=np.float32)
