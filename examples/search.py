"""Many samples of a question and one answer made of them: a majority vote that stops once more samples would not change it."""

import blockroll
from blockroll.model.tasks import question
from blockroll.model.tokenizer import encode_prompt
from blockroll.rollout.search.candidates import Question
from blockroll.rollout.search.config import SearchConfig
from blockroll.rollout.search.driver import search
from blockroll.rollout.search.engine_source import EngineSource

engine = blockroll.Engine("tiny-reasoner", max_batch=16, device="cpu")
texts = [question(text) for text in ("47 + 85 - 12", "gcd 75 12")]
asked = [Question(text, tuple(encode_prompt(engine.policy.tokenizer, text)), text) for text in texts]
config = SearchConfig(method="self_consistency", samples=16, budget_tokens=1000)
for result in search(EngineSource(engine), asked, config, blockroll.SamplingParams(temperature=0.7, max_tokens=64)):
    print(result.answer, dict(result.verdict.votes), result.verdict.reason)
    print(f"  {result.spent.samples} samples, {result.spent.tokens} tokens, {result.spent.seconds:.2f} s")
