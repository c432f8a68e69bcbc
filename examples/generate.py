"""Answers of the shipped policy to a few questions: several samples each, with text, log-probability and speed."""

import blockroll
from blockroll.model.tasks import answer, question

engine = blockroll.Engine("tiny-reasoner", max_batch=32, device="cpu")
params = blockroll.SamplingParams(sampler="coupled", n=4, temperature=0.8, max_tokens=64, seed=7)
prompts = [question(text) for text in ("47 + 85 - 12", "gcd 75 12", "7 * 8")]
for output in engine.generate(prompts, params):
    print(output.prompt)
    for sample in output.samples:
        speed = f"{sample.tokens_per_forward:.1f} tokens per forward"
        print(f"  {answer(sample.text)}  log p {sample.cumulative_logprob:.2f}, {speed}")
