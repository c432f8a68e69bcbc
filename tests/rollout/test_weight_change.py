"""A weight version in the middle of work: what samples keep, what they prefill again, and which samples end."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from blockroll.model.backends.packed.backend import PackedBackend
from blockroll.model.checkpoint import load_policy
from blockroll.model.scoring import score
from blockroll.rollout.engine import Engine, EngineConfig
from blockroll.rollout.schedule import Schedule
from blockroll.rollout.types import RolloutRequest, SamplingParams


def changed(policy):
    """Other weights for the policy."""
    noise = torch.Generator().manual_seed(3)
    return {name: x + 0.02 * torch.randn(x.shape, generator=noise) if x.ndim == 2 else x.clone()
            for name, x in policy.state_dict().items() if name != "lm_head.weight"}  # fmt: skip


def group(name, length, seed=0, samples=4, **params):
    tokens = tuple(np.random.default_rng(seed).integers(5, 60, length).tolist())
    return RolloutRequest(name, tokens, SamplingParams("coupled", max_tokens=12, ignore_eos=True, **params), seed, samples)


def rest(engine):
    done = []
    while engine.has_work:
        done += engine.step()
    return done


@pytest.mark.parametrize("schedule", ["ar", "two_pass", "fused"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 9])
def test_keep_gives_samples_of_one_version_the_bits_of_scoring(schedule, steps):
    """Also where the version comes in the middle of a prompt that samples share."""
    policy = load_policy("tiny-reasoner-terse")
    engine = Engine(policy, EngineConfig(Schedule(schedule), max_batch=3, prefill_rows=16))
    for request in (group("long", 60), group("short", 9, 1), group("later", 40, 2)):
        engine.add(request)
    done = [sample for _ in range(steps) for sample in engine.step()]
    engine.load_weights(changed(policy), 1, "keep")
    done += rest(engine)
    assert len(done) == 12
    new = [sample for sample in done if set(sample.versions.tolist()) == {1}]
    assert len(new) >= 6
    for sample, scores in zip(new, score(policy, [(s.prompt_tokens, s.tokens) for s in new]), strict=True):
        assert np.array_equal(sample.logprobs, scores), (sample.request_id, sample.sample)


@pytest.mark.parametrize("sizes", [dict(prefill_rows=16), dict(prefill_rows=16, pages=14, page_size=8)])
@pytest.mark.parametrize("steps", [0, 1, 3, 5, 8, 12, 16])
def test_samples_without_a_token_outlive_an_abort_of_those_that_have_begun(sizes, steps):
    """Running, prefilling, waiting and preempted ones. The later version serves the rest as a new engine would."""
    policy = load_policy("tiny-reasoner-terse")
    engine = Engine(policy, EngineConfig(Schedule("ar"), max_batch=5, **sizes))
    requests = [group("a", 9), group("long", 60, 1), group("b", 30, 2)]
    for request in requests:
        engine.add(request)
    before = [sample for _ in range(steps) for sample in engine.step()]
    ended = engine.abort_begun()
    engine.load_weights(changed(policy), 1)
    after = rest(engine)
    assert engine.cache.free_pages == engine.cache.total_pages
    assert all(sample.finish_reason == "abort" and 0 < len(sample.tokens) < 12 for sample in ended)
    assert all(sample.finish_reason == "length" and set(sample.versions.tolist()) == {1} for sample in after)
    names = sorted((sample.request_id, sample.sample) for sample in (*before, *ended, *after))
    assert names == [(name, i) for name in ("a", "b", "long") for i in range(4)]
    anew = {(s.request_id, s.sample): s.tokens for s in Engine(policy, schedule="ar").rollout(requests)}
    assert all(sample.tokens == anew[sample.request_id, sample.sample] for sample in after)


@pytest.mark.parametrize("steps", [0, 1, 3, 8])
def test_a_cancelled_request_ends_and_the_others_keep_their_tokens(steps):
    """Running, prefilling, waiting and preempted samples of the cancelled request."""
    policy = load_policy("tiny-reasoner-terse")
    engine = Engine(policy, EngineConfig(Schedule("ar"), block_size=2, max_batch=4, pages=14, page_size=4))
    requests = [group("a", 9), group("b", 9), group("c", 9)]
    for request in requests:
        engine.add(request)
    before = [sample for _ in range(steps) for sample in engine.step()]
    ended = engine.cancel(["b", "unknown"])
    assert {sample.request_id for sample in ended} == {"b"} and not engine.scheduler.serves("b")
    after = [*before, *ended, *rest(engine)]
    assert engine.cache.free_pages == engine.cache.total_pages
    assert sorted((s.request_id, s.sample) for s in after) == [(name, i) for name in "abc" for i in range(4)]
    anew = {(s.request_id, s.sample): s.tokens for s in Engine(policy, schedule="ar").rollout(requests)}
    assert all(s.tokens == anew[s.request_id, s.sample] for s in after if s.request_id != "b")
    engine.add(group("b", 9))
    assert len(rest(engine)) == 4


def test_abort_begun_ends_samples_that_wait_after_preemption():
    policy = load_policy("tiny-reasoner-terse")
    engine = Engine(policy, EngineConfig(Schedule("ar"), block_size=2, max_batch=4, pages=10, page_size=4))
    engine.add(group("a", 9))
    while engine.has_work and not any(len(sample.tokens) > 9 for sample in engine.scheduler.waiting):
        engine.step()
    waiting = [sample.number for sample in engine.scheduler.waiting if len(sample.tokens) > 9]
    assert waiting
    assert {*waiting} <= {sample.sample for sample in engine.abort_begun()}
    assert engine.scheduler.pending == len(engine.scheduler.waiting)
    assert all(len(sample.tokens) == 9 for sample in engine.scheduler.waiting)
    rest(engine)
    assert engine.cache.free_pages == engine.cache.total_pages


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_staged_version_gives_the_samples_of_one_that_is_loaded(dtype):
    """Packed and plain. What was staged is read where it lies, may be read-only, and is not written to later."""
    policy, other = (load_policy("tiny-reasoner-terse", dtype) for _ in range(2))
    engine, reference = Engine(policy, EngineConfig(max_batch=3)), Engine(other, EngineConfig(max_batch=3))
    new = changed(policy)
    reference.load_weights(new, 1)
    own = policy.state_dict()
    staged = engine.stage_weights({name: tensor.to(own[name].dtype) for name, tensor in new.items()}, 1)
    was = engine.rollout([group("before", 9)])
    engine.load_weights(staged, 1)
    now, truth = engine.rollout([group("now", 9)]), reference.rollout([group("now", 9)])
    assert [sample.tokens for sample in now] != [sample.tokens for sample in was]
    for a, b in zip(now, truth, strict=True):
        assert a.tokens == b.tokens
        assert np.array_equal(a.logprobs, b.logprobs)
        assert set(a.versions.tolist()) == {1}
    weight = "model.embed_tokens.weight"
    if dtype == "float32":
        assert policy.state_dict()[weight].data_ptr() == staged.tensors[weight].data_ptr()
    kept = staged.tensors[weight].clone()
    engine.load_weights({name: tensor * 0.5 for name, tensor in new.items()}, 2)
    assert torch.equal(staged.tensors[weight], kept)
    norm = {"model.norm.weight": new["model.norm.weight"] * 0.5}
    engine.load_weights(new, 3)
    engine.load_weights(engine.stage_weights(norm, 4, changed=norm.keys()), 4)
    reference.load_weights({**new, **norm}, 4)
    for a, b in zip(engine.rollout([group("delta", 9)]), reference.rollout([group("delta", 9)]), strict=True):
        assert a.tokens == b.tokens
        assert np.array_equal(a.logprobs, b.logprobs)


def test_weights_are_folded_when_they_are_staged_not_when_they_are_taken(monkeypatch):
    engine = Engine(load_policy("tiny-reasoner-terse"), EngineConfig(max_batch=3))
    staged = engine.stage_weights(changed(engine.policy), 1)
    monkeypatch.setattr(PackedBackend, "fold", lambda *_: pytest.fail("the weights were folded between two steps"))
    engine.load_weights(staged, 1)
    assert len(engine.rollout([group("a", 9)])) == 4
