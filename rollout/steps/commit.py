"""Commits a step: writes what it gave into its samples.

Invariant: only `commit` appends to a sample's tokens. Afterwards every row below the length of a sample's block table is the
clean row of a committed token.
"""

from __future__ import annotations

from ..types import StepTrace
from .plan import StepPlan
from .runner import StepOutput


def commit(plan: StepPlan, output: StepOutput, version: int) -> int:
    """Write tokens, the trace, cached positions and the next drafts. Returns the number of tokens.

    Args:
        version: the weight version that the tokens carry.
    """
    made, verdict = 0, output.verdict
    columns = verdict.token_SR, verdict.logprob_SR, verdict.behavior_logprob_SR, verdict.support_logmass_SR
    steps = plan.count_D.tolist(), plan.block_start_D, plan.block_length_D, output.draft_count_D, output.draft_level_D
    samples = zip(
        plan.batch.decoding, verdict.accepted_S.tolist(), *steps, *(column.tolist() for column in columns), strict=True
    )
    for d, (sample, accepted, drafted, start, length, waiting, level, *rows) in enumerate(samples):
        assert sample.block_table is not None
        before, anchor = len(sample.tokens), sample.anchor
        sample.note_step(StepTrace(anchor, drafted, accepted, start, length, plan.forwards if drafted else 1))
        sample.keep_drafts(output.drafts, d, waiting, anchor + level + 1, output.block)
        sample.commit(accepted, *rows, version=version)
        sample.block_table.length = sample.anchor
        made += len(sample.tokens) - before
    if verdict.top_token_SRK is not None and verdict.top_logprob_SRK is not None:
        tops = zip(plan.batch.decoding, verdict.top_token_SRK.tolist(), verdict.top_logprob_SRK.tolist(), strict=True)
        for sample, *top in tops:
            sample.record_top(*top)
    return made
