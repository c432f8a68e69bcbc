"""What an engine takes it takes whole: requests, weight versions; and whatever ends a call early leaves it empty."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch

from blockroll.errors import RequestError
from blockroll.rollout.engine import Engine, EngineConfig
from blockroll.rollout.offline import serve
from blockroll.rollout.sampling.drafts import Drafts
from blockroll.rollout.schedule import Schedule
from blockroll.rollout.types import RolloutRequest, SamplingParams

PARAMS = SamplingParams("lossless", max_tokens=12, ignore_eos=True)
GOOD, LONG, ALIEN = (RolloutRequest(name, prompt, PARAMS) for name, prompt in
                     (("good", (5, 6, 7)), ("long", (5,) * 160), ("alien", (5, 40))))


@pytest.fixture(scope="module")
def policy(make_policy):
    return make_policy(torch.float32, sharpness=0.6)


def tokens(samples):
    return [(sample.request_id, sample.sample, sample.tokens) for sample in samples]


@pytest.fixture
def engine(policy):
    return Engine(policy, EngineConfig(max_batch=4, page_size=8, pages=24))


def is_as_new(engine):
    cache = engine.cache
    return not engine.has_work and cache.free_pages == cache.total_pages and cache.free_slots == 8 and not any(cache._users)


@pytest.mark.parametrize("bad", [LONG, ALIEN, RolloutRequest("good", (8, 9), PARAMS)], ids=lambda request: request.id)
def test_a_call_with_a_request_that_cannot_be_served_queues_none(policy, engine, bad):
    expected = tokens(Engine(policy, engine.config).rollout([GOOD]))
    with pytest.raises(RequestError):
        engine.rollout([GOOD, bad])
    assert is_as_new(engine)
    assert tokens(engine.rollout([GOOD])) == expected
    with pytest.raises(RequestError):
        list(serve(engine, [GOOD, bad], 1))
    assert is_as_new(engine)


def test_an_id_is_taken_until_its_samples_have_ended(engine):
    engine.add(GOOD)
    with pytest.raises(RequestError, match="id: two unfinished requests are called 'good'; give each request its own id"):
        engine.add(RolloutRequest("good", (9,), PARAMS))
    with pytest.raises(RequestError, match="holds 1 samples of earlier requests; serve them with step"):
        engine.rollout([RolloutRequest("other", (9,), PARAMS)])
    engine.add(RolloutRequest("other", (9,), PARAMS, samples=2))
    done = []
    while engine.has_work:
        done += engine.step()
    assert sorted(sample.key for sample in done) == [("good", 0), ("other", 0), ("other", 1)]
    assert len(engine.rollout([GOOD])) == 1


@pytest.mark.parametrize("where", ["on_finish", "release", "forward", "commit"])
def test_an_interrupted_call_leaves_the_engine_as_it_was(policy, engine, where, monkeypatch):
    """Ctrl-C in a callback, between two lines of the scheduler, in the network, and before a sample's record is whole."""
    requests = [RolloutRequest(str(i), (5, 6, 7 + i), PARAMS, samples=3) for i in range(4)]
    expected = tokens(Engine(policy, engine.config).rollout(requests))
    calls = []

    def interrupt(*_, **__):
        calls.append(where)
        if len(calls) == 3:
            raise KeyboardInterrupt

    target, name = {"release": (engine.cache, "release"), "forward": (engine.runner.model, "run"),
                    "commit": (engine, "_commit"), "on_finish": (None, "")}[where]  # fmt: skip
    if target is not None:
        real = getattr(target, name)
        monkeypatch.setattr(target, name, lambda *a, **k: interrupt() or real(*a, **k))
    with pytest.raises(KeyboardInterrupt):
        engine.rollout(requests, interrupt if target is None else None)
    monkeypatch.undo()
    assert is_as_new(engine)
    assert tokens(engine.rollout(requests)) == expected


def test_files_served_half_way_leave_the_engine_empty(engine):
    served = serve(engine, [RolloutRequest(str(i), (5, 6), PARAMS) for i in range(6)], 3)
    next(served)
    assert engine.has_work
    served.close()
    assert is_as_new(engine)


def wrapped(tensors):
    return {f"module.{name}": tensor for name, tensor in tensors.items()}


def changed(name, change):
    def apply(tensors):
        return {**tensors, name: change(tensors[name])}

    return apply


def holding(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[3] = value
        return tensor

    return change


NORM, HEAD = "model.norm.weight", "lm_head.weight"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (wrapped, r"version 3 lacks \d+ of the policy's tensors, first '[\w.]+', .*; take the state_dict of the bare model"),
        (lambda t: {k: v for k, v in t.items() if k != NORM}, rf"lacks 1 of the policy's tensors, first '{NORM}'; export"),
        (lambda t: {}, r"lacks \d+ of the policy's tensors"),
        (lambda t: {**t, "extra": t[NORM]}, r"has 1 tensor that the policy has not, first 'extra'"),
        (changed(NORM, holding(torch.nan)), rf"{NORM} in version 3 holds NaN or infinity"),
        (changed(NORM, holding(torch.inf)), rf"{NORM} in version 3 holds NaN or infinity"),
        (changed(NORM, lambda t: t.double().fill_(1e300)), rf"{NORM} in version 3 holds numbers that float32 does not reach"),
        (changed(NORM, lambda t: t[:-1]), rf"{NORM} in version 3 has shape \(\d+,\), the policy's has \(\d+,\)"),
        (changed(NORM, lambda t: t.long()), rf"{NORM} in version 3 is torch.int64; use float32"),
        (changed(NORM, lambda t: t.numpy()), rf"{NORM} in version 3 is ndarray; use float32"),
        (changed(HEAD, holding(0.25)), rf"{HEAD} in version 3 differs from model.embed_tokens.weight"),
    ],
)
def test_a_version_that_is_not_the_policy_s_changes_nothing(make_policy, change, problem):
    policy, other = (make_policy(torch.float32, seed=seed, tie_word_embeddings=True) for seed in (0, 5))
    engine, before = Engine(policy), {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    with pytest.raises(RequestError, match=f"^weights: .*{problem}"):
        engine.load_weights(change(dict(other.state_dict())), 3)
    assert engine.version == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.policy.state_dict().items())


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_whole_version_is_taken(make_policy, head, dtype):
    tied = dict(tie_word_embeddings=True)
    engine, other = Engine(make_policy(torch.float32, **tied)), make_policy(dtype, seed=5, **tied)
    tensors = dict(other.state_dict())
    if not head:
        del tensors[HEAD]
    engine.load_weights(tensors, 3)
    assert engine.version == 3
    assert all(torch.equal(tensor, tensors.get(name, tensor).float()) for name, tensor in engine.policy.state_dict().items())
    engine.rollout([GOOD])


def test_versions_are_numbers_and_what_happens_in_flight_is_known(policy):
    engine = Engine(policy)
    for version in (-1, 2**31, 1.0, "1", None, True):
        with pytest.raises(RequestError, match="version: .* is no whole number"):
            engine.load_weights(policy.state_dict(), version)
    with pytest.raises(RequestError, match="in_flight: unknown value 'finish'; use keep or recompute"):
        engine.load_weights(policy.state_dict(), 1, "finish")
    assert engine.version == 0


def test_a_sample_that_waits_or_has_ended_keeps_no_batch_of_drafts(policy, monkeypatch):
    """What is kept of q: the batch that runs, and of each preempted sample its own row."""
    engine = Engine(policy, EngineConfig(Schedule("fused", levels=(0,)), block_size=8, max_batch=8, pages=12, page_size=8))
    batches, join = weakref.WeakSet(), Drafts.__init__

    def noted(self, *args, **kwargs):
        join(self, *args, **kwargs)
        for name in ("logq_SMV", "q_logits_SMV"):
            x = getattr(self, name)
            if x is not None and len(x) > 1:
                batches.add(x.untyped_storage())

    monkeypatch.setattr(Drafts, "__init__", noted)
    params = SamplingParams("lossless", max_tokens=30, ignore_eos=True)
    requests = [RolloutRequest(str(i), (5, 6, 7 + i), params) for i in range(8)]
    most = 0
    for request in requests:
        engine.add(request)
    while engine.has_work:
        engine.step()
        waiting = [sample for sample in engine.scheduler.waiting if sample.drafts is not None]
        for sample in waiting:
            q = sample.drafts.logq_SMV if sample.drafts.logq_SMV is not None else sample.drafts.q_logits_SMV
            assert q.untyped_storage().nbytes() == q[:1, : sample.draft_count].numel() * q.element_size()
        most = max(most, len(waiting))
    assert engine.scheduler.preemptions and most
    del sample, waiting
    engine.runner.forget_samples()
    gc.collect()
    assert not len(batches)


def test_a_sample_that_prefills_again_keeps_no_batch_of_drafts(policy):
    engine = Engine(policy, EngineConfig(prefill_rows=4))
    for name in "abc":
        engine.add(RolloutRequest(name, (5, 6), SamplingParams("lossless", max_tokens=60, ignore_eos=True)))
    engine.step()
    engine.load_weights(policy.state_dict(), 1, "recompute")
    drafts = [sample.drafts for sample in engine.scheduler.running if sample.drafts is not None]
    assert len(drafts) > 1
    for each in drafts:
        assert len(each.token_SM) == 1
        assert each.token_SM.untyped_storage().nbytes() == 8 * each.token_SM.numel()


def test_a_finished_sample_drops_its_drafts(policy):
    """Those that were drawn in its last step are in a batch with its neighbour's."""
    engine = Engine(policy)
    for name, length in (("short", 6), ("long", 60)):
        engine.add(RolloutRequest(name, (5, 6), SamplingParams("lossless", max_tokens=length, ignore_eos=True)))
    engine.step()
    short, long = engine.scheduler.running
    while short.finish is None:
        engine.step()
    assert long.drafts is not None
    assert short.drafts is None
    assert np.isfinite(short.trajectory().logprobs).all()
