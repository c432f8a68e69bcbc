"""Stop strings: across tokens, blocks and characters; what is kept of the tokens, and where the text is cut."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from transformers.generation import StopStringCriteria

import blockroll
from blockroll.model.tokenizer import train_tokenizer
from blockroll.rollout.engine import Engine, EngineConfig
from blockroll.rollout.schedule import Schedule
from blockroll.rollout.stop_strings import StopStrings, cut_text
from blockroll.rollout.types import RolloutRequest, SamplingParams

SCHEDULES = [Schedule("ar"), Schedule("two_pass"), Schedule("fused"), Schedule("fused", levels=(0,))]


@pytest.fixture(scope="module")
def policy():
    return blockroll.load_policy("tiny-reasoner")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["abab abba ääöü 漢字 stop STOP"] * 3, 290)


def by_hand(tokenizer, made, stops, min_tokens=0):
    """(tokens kept, string, text before it): the whole text decoded after each token."""
    before = ""
    for count in range(1, len(made) + 1):
        text = tokenizer.decode(made[:count], skip_special_tokens=True)
        if count > min_tokens:
            same = next((i for i, (a, b) in enumerate(zip(before, text)) if a != b), min(len(before), len(text)))
            ends = [(at, stop) for stop in stops for at in range(len(text))
                    if text.startswith(stop, at) and at + len(stop) > same]  # fmt: skip
            if ends:
                at, stop = min(ends)
                return made[:count], stop, text[:at]
        before = text
    return made, None, before


def test_against_whole_texts(tokenizer):
    """Random tokens, also such that are parts of characters; strings across any number of tokens; blocks of random length."""
    draw = random.Random(0)
    pieces = tokenizer.encode("abab abba ääöü 漢字 stop", add_special_tokens=False)
    found = 0
    for trial in range(400):
        made = [draw.choice(pieces) if trial % 2 else draw.randrange(2, len(tokenizer)) for _ in range(draw.randrange(1, 60))]
        text = tokenizer.decode(made, skip_special_tokens=True)
        stops = ["STOP"]
        for _ in range(2):
            start = draw.randrange(max(len(text) - 3, 1))
            stops.append(text[start : start + draw.randrange(1, 9)] or "x")
        stops = [stop for stop in stops if "�" not in stop]
        least = draw.choice([0, 0, 7])
        params = SamplingParams(stop=stops, min_tokens=least)
        search, tokens, result = StopStrings(tokenizer, params, 3), [9, 9, 9], None
        left = list(made)
        while left and result is None:
            new, left = left[: (size := draw.randrange(1, 9))], left[size:]
            result = search.first(tokens, new)
            tokens += new if result is None else new[: result[0]]
        kept, stop, cut = by_hand(tokenizer, made, stops, least)
        assert tokens[3:] == kept
        assert (result[1] if result else None) == stop
        assert cut_text(tokenizer, kept, stop, included=False) == cut
        assert cut_text(tokenizer, kept, stop, included=True) == cut + (stop or "")
        found += stop is not None
    assert found > 200


@pytest.mark.parametrize("sampler", ["lossless", "mixed", "coupled"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.kind}{len(s.levels)}")
def test_a_sample_ends_where_transformers_criterion_ends_it(policy, schedule, sampler):
    """Under one schedule a seed gives the same tokens with stop strings as without, up to the end."""
    prompt = tuple(policy.tokenizer.encode("Q:47+85-12+33\nS:", add_special_tokens=False))
    params = SamplingParams(sampler, max_tokens=40, seed=2)
    engine = Engine(policy, EngineConfig(schedule, block_size=8, max_batch=4))
    (free,) = engine.rollout([RolloutRequest("a", prompt, params)])
    text, ends = free.text(policy.tokenizer), set()
    for start in range(1, len(text) - 3, 7):
        stops = [text[start : start + 3], "never"]
        ended = StopStringCriteria(policy.tokenizer, stops)
        expected = next(n for n in range(1, 41) if ended(torch.tensor([free.tokens[:n]]), None).any())
        (sample,) = engine.rollout([RolloutRequest("a", prompt, replace(params, stop=stops))])
        assert sample.tokens == free.tokens[:expected]
        assert sample.logprobs.tobytes() == free.logprobs[:expected].tobytes()
        ends.add(expected)
    assert len(ends) > 2


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.kind}{len(s.levels)}")
def test_a_sample_ends_with_the_token_that_completes_the_string(policy, schedule):
    """Prefixes of the free sample, with its log-probabilities; the string may begin in one block and end in the next."""
    prompt = tuple(policy.tokenizer.encode("Q:47+85-12+33\nS:", add_special_tokens=False))
    params = SamplingParams("coupled", max_tokens=60)
    (free,) = Engine(policy).rollout([RolloutRequest("a", prompt, params, seed=1)])
    text = free.text(policy.tokenizer)
    assert len(text) > 40
    ends = set()
    for start in range(1, len(text) - 6, 5):
        stop = text[start : start + 5]
        request = RolloutRequest("a", prompt, replace(params, stop=[stop, "never"]), seed=1)
        (sample,) = Engine(policy, EngineConfig(schedule, block_size=8)).rollout([request])
        n = len(sample.tokens)
        assert (sample.finish_reason, sample.stop_reason) == ("stop", stop)
        assert sample.tokens == free.tokens[:n]
        assert sample.text(policy.tokenizer) == text[: text.index(stop)]
        assert stop not in policy.tokenizer.decode(sample.tokens[:-1])
        assert stop in policy.tokenizer.decode(sample.tokens)
        assert sample.logprobs.tobytes() == free.logprobs[:n].tobytes()
        assert len(sample.behavior_logprobs) == len(sample.versions) == len(sample.from_draft) == n
        ends.add(n)
    assert len(ends) > 5


def test_the_text_may_keep_the_string_and_min_tokens_delays_it(policy):
    prompt = tuple(policy.tokenizer.encode("Q:47+85-12\nS:", add_special_tokens=False))

    def sample(**changes):
        params = SamplingParams("coupled", temperature=0.0, max_tokens=60, **changes)
        return Engine(policy).rollout([RolloutRequest("a", prompt, params)])[0]

    free = sample().text(policy.tokenizer)
    first, second = free.index("1"), free.rindex("1")
    assert sample(stop="1").text(policy.tokenizer) == free[:first]
    assert sample(stop="1", include_stop_str_in_output=True).text(policy.tokenizer) == free[: first + 1]
    late = sample(stop="1", min_tokens=second)
    assert len(late.tokens) > second
    assert late.text(policy.tokenizer).count("1") > 0
    ended = sample()
    assert (ended.finish_reason, ended.stop_reason) == ("stop", policy.tokenizer.eos_token_id)
