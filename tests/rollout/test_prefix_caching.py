"""K/V reused across requests: the same tokens and log-probabilities, fewer prefilled rows, nothing of an older version."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch

from blockroll.errors import RequestError
from blockroll.kernels.dispatch import using
from blockroll.model.checkpoint import load_policy
from blockroll.rollout.engine import Engine, EngineConfig
from blockroll.rollout.prefix_cache import PrefixCache
from blockroll.rollout.schedule import Schedule
from blockroll.rollout.types import RolloutRequest, SamplingParams

SIZE = EngineConfig().page_size


def tokens(length, seed):
    return tuple(np.random.default_rng(seed).integers(5, 40, length).tolist())


def same(samples, expected, bits=True):
    """The tokens are equal, and so are the log-probabilities, in every bit or up to rounding."""
    for one, other in zip(samples, expected, strict=True):
        assert (one.key, one.tokens, one.finish_reason) == (other.key, other.tokens, other.finish_reason)
        for mine, its in ((one.logprobs, other.logprobs), (one.behavior_logprobs, other.behavior_logprobs)):
            if bits:
                assert mine.tobytes() == its.tobytes(), one.key
            else:
                np.testing.assert_allclose(mine, its, rtol=0, atol=1e-4)
        assert [step.accepted for step in one.trace] == [step.accepted for step in other.trace]


def whole(cache):
    """Every page is free, exactly once, and kept pages are free ones."""
    free = [*cache._free, *cache._prefixes._unused]
    assert sorted(free) == list(range(cache.total_pages)) and cache.free_pages == cache.total_pages
    assert not any(cache._users) and cache.cached_pages == len(cache._prefixes._page) == len(cache._prefixes._node)
    return True


@pytest.fixture(scope="module")
def policy():
    return load_policy("tiny-reasoner")


@pytest.mark.parametrize(
    ("sampler", "kind"),
    [("ar", "ar"), *((sampler, kind) for sampler in ("lossless", "coupled", "mixed") for kind in ("two_pass", "fused"))],
)
def test_the_second_turn_prefills_only_what_is_new(policy, sampler, kind):
    """32 conversations. Of each one at most one page is prefilled again, the one that the first turn did not fill."""
    params = SamplingParams(sampler, max_tokens=16, ignore_eos=True)
    first = [RolloutRequest(f"a{i}", tokens(20 + 3 * i, i), params, i) for i in range(32)]
    keeps, forgets = (
        Engine(policy, schedule=kind, pages=400, enable_prefix_caching=keeps) for keeps in (True, False)
    )
    turns = [keeps.rollout(first), forgets.rollout(first)]
    same(*turns)
    rows = keeps.prefilled_tokens
    assert rows == forgets.prefilled_tokens == sum(len(request.prompt_tokens) - 1 for request in first)
    second = [
        RolloutRequest(f"b{i}", (*sample.prompt_tokens, *sample.tokens, *tokens(1 + i, 99 + i)), params, i)
        for i, sample in enumerate(turns[0])
    ]
    turns = [engine.rollout(second) for engine in (keeps, forgets)]
    same(*turns)
    # The last token of a text is never in the cache: the first turn's is prefilled now, and the second turn's last one is not.
    again = [(len(request.prompt_tokens) + 16 - 1) % SIZE for request in first]
    assert keeps.prefilled_tokens - rows == sum(1 + i for i in range(32)) + sum(again)
    assert keeps.prefilled_tokens + keeps.cached_tokens == forgets.prefilled_tokens and not forgets.cached_tokens
    assert whole(keeps.cache) and whole(forgets.cache) and keeps.cache.cached_pages and not forgets.cache.cached_pages


@pytest.mark.parametrize("in_flight", ["keep", "recompute"])
def test_nothing_outlives_its_weight_version(policy, in_flight):
    """Neither what is kept, nor what running samples had computed partly under the old weights."""
    params = SamplingParams("coupled", max_tokens=70, ignore_eos=True)
    own, noise = load_policy("tiny-reasoner"), torch.Generator().manual_seed(3)
    changed = {name: x + 0.02 * torch.randn(x.shape, generator=noise) if x.ndim == 2 else x.clone()
               for name, x in own.state_dict().items() if name != "lm_head.weight"}  # fmt: skip
    engine = Engine(own, schedule="fused", max_batch=4)
    done = engine.rollout([RolloutRequest("old", tokens(70, 0), params, 0)])
    running = [RolloutRequest(f"running {i}", tokens(70, 1 + i), params, 1) for i in range(4)]
    for request in running:
        engine.add(request)
    for _ in range(4):
        engine.step()
    begun = {sample.request.id for sample in engine.scheduler.running if len(sample.tokens) > 70}
    assert engine.cache.cached_pages and begun
    engine.load_weights(changed, 1, in_flight)
    assert not engine.cache.cached_pages
    while engine.has_work:
        done += engine.step()
    rows, cached = engine.prefilled_tokens, engine.cached_tokens
    asked = [
        RolloutRequest(f"again {sample.key}", (*sample.prompt_tokens, *sample.tokens), params, 5) for sample in done
        if sample.request_id == "old" or (in_flight == "keep" and len(set(sample.versions.tolist())) == 2)
    ]  # fmt: skip
    assert len(asked) > 1 or in_flight == "recompute"
    again = engine.rollout(asked)
    assert engine.cached_tokens == cached and engine.prefilled_tokens - rows == sum(len(r.prompt_tokens) - 1 for r in asked)
    same(again, Engine(own, schedule="fused", enable_prefix_caching=False).rollout(asked))
    later = engine.rollout([RolloutRequest("later", (*again[0].prompt_tokens, 5, 6), params, 5)])
    assert engine.cached_tokens - cached == len(again[0].prompt_tokens) // SIZE * SIZE  # of this version everything is reused
    assert later and whole(engine.cache)


@pytest.mark.parametrize("kind", ["ar", "two_pass", "fused"])
def test_a_small_pool_evicts_and_changes_nothing(policy, kind):
    """Beginnings shared by many requests, more of them than the pool holds; samples are preempted and come back."""
    params = [SamplingParams("ar" if kind == "ar" else sampler, max_tokens=9, ignore_eos=True)
              for sampler in ("coupled", "lossless", "mixed")]  # fmt: skip
    sizes = dict(schedule=kind, block_size=8, max_batch=5, page_size=8, prefill_rows=24)
    engine = Engine(policy, pages=16, **sizes)
    plain = Engine(policy, pages=16, enable_prefix_caching=False, **sizes)
    draw = np.random.default_rng(0)
    for turn in range(6):
        requests = []
        for i in range(8):
            length = int(draw.integers(1, 50))
            text = (*tokens(50, int(draw.integers(3)))[:length], *tokens(int(draw.integers(0, 20)), int(draw.integers(99))))
            requests.append(RolloutRequest(f"{turn} {i}", text, params[i % 3], i, int(draw.integers(1, 4))))
        same(engine.rollout(requests), plain.rollout(requests))
        assert whole(engine.cache) and engine.cache.free_slots == 10
    assert engine.scheduler.preemptions and plain.scheduler.preemptions
    assert engine.cached_tokens > 200 and engine.prefilled_tokens < 0.8 * plain.prefilled_tokens


def test_requests_that_begin_alike_prefill_their_beginning_once(policy):
    """Also when they come together. What one step prefilled the next step finds."""
    params = SamplingParams("coupled", max_tokens=4, ignore_eos=True)
    requests = [RolloutRequest(f"{i}", (*tokens(3 * SIZE + 5, 0), *tokens(9, 1 + i)), params, i) for i in range(8)]
    engine, plain = (Engine(policy, prefill_rows=4 * SIZE, enable_prefix_caching=keeps) for keeps in (True, False))
    same(engine.rollout(requests), plain.rollout(requests), bits=True)
    each = 3 * SIZE + 5 + 9 - 1
    assert plain.prefilled_tokens == 8 * each
    # The first request leaves some rows of its step to the second one, which does not know the beginning yet.
    assert engine.prefilled_tokens == 2 * each + 6 * (each - 3 * SIZE)


def test_a_group_finds_its_prompt_and_decodes_at_once(policy):
    """A prompt whose rows are all kept runs none, and its samples need not wait for one another."""
    params = SamplingParams("coupled", max_tokens=6, ignore_eos=True)
    engine = Engine(policy, schedule="ar")
    asked = [RolloutRequest(name, tokens(2 * SIZE + 1, 0), params, 3, 4) for name in ("a", "b")]
    expected, rows = engine.rollout(asked[:1]), engine.prefilled_tokens
    engine.add(asked[1])
    steps, done = 0, []
    while engine.has_work:
        done += engine.step()
        steps += 1
    assert engine.prefilled_tokens == rows and steps == 7
    assert [sample.tokens for sample in sorted(done, key=lambda s: s.sample)] == [sample.tokens for sample in expected]


def test_the_least_recently_used_pages_go_first(policy):
    """And of one text the last ones: its beginning still serves."""
    params = SamplingParams("coupled", max_tokens=2, ignore_eos=True)
    engine = Engine(policy, max_batch=1, pages=12, page_size=8)

    def cached(name, text):
        before = engine.cached_tokens
        engine.rollout([RolloutRequest(name, text, params, 0)])
        return engine.cached_tokens - before

    one, two, three = (tokens(40, i) for i in range(3))  # 5 full pages and, at the end, a part of a sixth
    assert [cached("1", one), cached("2", two), cached("1 again", (*one, 5))] == [0, 0, 40]
    assert cached("3", three[:30]) == 0  # 3 full pages and a part: 2 pages are free, and 2 of the second text are evicted
    assert cached("2 again", (*two, 5)) == 24  # 3 pages more: one is free, and 2 of the first text are evicted
    assert cached("1 once more", (*one, 5)) == 24
    assert whole(engine.cache)


def test_what_is_recorded_of_prompts_is_whole(policy):
    """Experts need every row to run; prompt log-probabilities have a pass of their own. Samples of a group share both."""
    wanted = SamplingParams("coupled", max_tokens=5, ignore_eos=True, routed_experts=True, prompt_logprobs=2)
    engine = Engine(policy, max_batch=3)
    asked = [RolloutRequest(name, tokens(80, 0), wanted, 3, 4) for name in ("a", "b")]
    expected = Engine(policy, enable_prefix_caching=False).rollout([RolloutRequest("c", tokens(80, 0), wanted, 3)])
    engine.rollout([RolloutRequest("first", tokens(80, 0), SamplingParams(max_tokens=3), 0)])
    for sample in engine.rollout(asked):
        assert sample.routed_experts.min() >= 0
        assert np.array_equal(sample.routed_experts[:80], expected[0].routed_experts[:80])
        assert np.array_equal(sample.prompt_logprobs, expected[0].prompt_logprobs)
    assert engine.cached_tokens == 0


@pytest.mark.parametrize("page_size", [1, 2, 3, 8])
def test_in_torch(make_policy, page_size):
    """Pages shorter than what the convolutions look back, and windows."""
    random = make_policy(layer_types=["hybrid", "hybrid_sliding"], num_hidden_layers=2, sliding_window=6, sharpness=0.6)
    for kind in ("two_pass", "fused"):
        twice(random, Schedule(kind), block_size=4, page_size=page_size, pages=300)


@pytest.mark.slow
def test_on_kernels(make_policy):
    pytest.importorskip("triton")
    random = make_policy(torch.float32, head_dim=16, moe_intermediate_size=16, num_hidden_layers=1, layer_types=["hybrid"])
    with using("triton"):
        twice(random, Schedule("fused", levels=(0,)), conversations=1, block_size=2, page_size=4, pages=40)


def twice(policy, schedule, conversations=2, **sizes):
    """Two turns, the second one with and without reuse."""
    params = SamplingParams("coupled", max_tokens=3, ignore_eos=True)
    made = {}
    for keeps in (True, False):
        engine = Engine(policy, schedule=schedule, enable_prefix_caching=keeps, **sizes)
        first = engine.rollout([RolloutRequest(f"a{i}", tokens(6 + i, i), params, i) for i in range(conversations)])
        second = [RolloutRequest(f"b{s.request_id}", (*s.prompt_tokens, *s.tokens, 7, 8, 9), params, 1) for s in first]
        made[keeps] = [*first, *engine.rollout(second)]
        assert bool(engine.cached_tokens) == keeps and whole(engine.cache)
    same(made[True], made[False], bits=False)


def test_the_index_beside_a_plain_one():
    """Random texts over two tokens, pages of two, a pool of six pages: what is found is what the plain index holds."""
    draw, index, plain = np.random.default_rng(1), PrefixCache(2), OrderedDict()
    free = list(range(6))
    hits = evictions = 0
    for _ in range(4000):
        text = draw.integers(0, 2, int(draw.integers(2, 9))).tolist()
        pages = len(text) // 2
        found = index.find(text, pages)
        beginnings = [tuple(text[: 2 * n + 2]) for n in range(pages)]
        known = next((n for n, beginning in enumerate(beginnings) if beginning not in plain), pages)
        assert found == [plain[beginning] for beginning in beginnings[:known]]
        hits += known
        for page in found:
            index.use(page)
        lacking = pages - known
        while len(free) < lacking and index.unused:
            evictions += 1
            page = index.evict()
            # The least recently used of the texts, whose longer ones are gone already.
            oldest = next(beginning for beginning, its in plain.items() if its not in found)
            assert plain.pop(oldest) == page and not any(other[: len(oldest)] == oldest for other in plain)
            free.append(page)
        assert len(free) >= lacking
        own = [*found, *(free.pop() for _ in range(lacking))]
        index.add(text, own)
        for beginning, page in list(zip(beginnings, own, strict=True))[::-1]:
            plain[beginning] = page
            plain.move_to_end(beginning)
            index.put_away(page)
        assert index.unused == len(plain) and all(page in index for page in plain.values())
    assert hits > 1000 and evictions > 1000
    assert sorted([*index.clear(), *free]) == list(range(6)) and not index.unused and not index.find([0, 0], 1)


def test_a_page_whose_beginning_was_evicted_is_found_again():
    """Two texts that begin alike were computed at once; the beginning that the index knew goes first."""
    index = PrefixCache(1)
    index.add([5], [0])
    index.add([5, 6], [1, 2])  # page 1 holds what page 0 holds
    assert index.find([5, 6], 2) == [0, 2] and 1 not in index
    index.put_away(0)
    assert index.evict() == 0 and index.find([5, 6], 2) == []
    index.add([5, 6], [1, 2])
    assert index.find([5, 6], 2) == [1, 2]
    index.put_away(2)
    index.put_away(1)
    assert [index.evict(), index.evict()] == [2, 1] and index.find([5, 6], 2) == []


def test_a_version_that_comes_before_a_sample_is_prefilled_again(policy):
    """Samples whose K/V was given up for one version have none when the next one comes."""
    engine = Engine(load_policy("tiny-reasoner"), max_batch=8, prefill_rows=8)
    weights = {name: tensor.clone() for name, tensor in engine.policy.state_dict().items()}
    params = SamplingParams("coupled", max_tokens=40, ignore_eos=True)
    for i in range(4):
        engine.add(RolloutRequest(f"r{i}", tokens(20, i), params, i))
    done = [sample for _ in range(8) for sample in engine.step()]
    engine.load_weights(weights, 1, "recompute")
    engine.step()  # prefills 8 rows of the oldest
    engine.load_weights(weights, 2, "keep")
    while engine.has_work:
        done += engine.step()
    assert sorted(sample.request_id for sample in done) == ["r0", "r1", "r2", "r3"] and whole(engine.cache)


def test_a_salt_keeps_prefixes_apart_and_changes_no_token(policy):
    """The first page is what the salt keys; the pages behind it follow."""
    params = SamplingParams("coupled", max_tokens=8, ignore_eos=True)
    prompt = tokens(3 * SIZE + 5, 1)
    engine = Engine(policy, pages=200)

    def cached(name, salt):
        before = engine.cached_tokens
        (done,) = engine.rollout([RolloutRequest(name, prompt, params, 3, cache_salt=salt)])
        return engine.cached_tokens - before, done.tokens

    found = [cached("a", "s"), cached("b", "t"), cached("c", "s"), cached("d", ""), cached("e", "t"), cached("f", "")]
    assert [count for count, _ in found] == [0, 0, 3 * SIZE, 0, 3 * SIZE, 3 * SIZE]
    assert len({tuple(made) for _, made in found}) == 1
    assert whole(engine.cache)


@pytest.mark.parametrize("salt", ["x" * 257, 7, None, "\ud800"])
def test_a_salt_that_cannot_be_a_key_is_refused_by_name(salt):
    with pytest.raises(RequestError, match="^cache_salt: "):
        RolloutRequest("a", (5,), cache_salt=salt)
