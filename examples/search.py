"""Many samples of a question and one answer made of them: a majority vote that stops once more samples would not change it."""

import blockroll
from blockroll.model.tasks import question

engine = blockroll.Engine("tiny-reasoner", max_batch=16, device="cpu")
prompts = [question(text) for text in ("47 + 85 - 12", "gcd 75 12")]
config = blockroll.SearchConfig(method="self_consistency", samples=16, budget_tokens=1000)
for result in blockroll.search(engine, prompts, config, blockroll.SamplingParams(temperature=0.7, max_tokens=64)):
    print(result.answer, dict(result.verdict.votes), result.verdict.reason)
    print(f"  {result.spent.samples} samples, {result.spent.tokens} tokens, {result.spent.seconds:.2f} s")
