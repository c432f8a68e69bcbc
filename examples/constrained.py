"""A constraint on what is written, as a function of the tokens so far: the answer is given at once, without steps."""

import blockroll
from blockroll.model.tasks import question

engine = blockroll.Engine("tiny-reasoner", device="cpu")
tokenizer = engine.policy.tokenizer
start = tokenizer.encode("\nA:", add_special_tokens=False)
prompt = tokenizer.encode(question("47 + 85"), add_special_tokens=False)


def answer_at_once(prefix, logits):
    """The next token of "\\nA:", and then what the policy wants."""
    made = len(prefix) - len(prompt)
    if made < len(start):
        forced = logits[start[made]].clone()
        logits.fill_(-float("inf"))
        logits[start[made]] = forced
    return logits


params = blockroll.SamplingParams(temperature=0.0, max_tokens=16, logits_processors=[answer_at_once], logprobs=3)
(output,) = engine.generate([prompt], params)
(sample,) = output.samples
print(repr(sample.text), sample.finish_reason)
for token, found in zip(sample.tokens, sample.top_logprobs, strict=True):
    print(repr(tokenizer.decode(token)), {tokenizer.decode(other): round(value, 2) for other, value in found.items()})
