"""The size of the K/V pool: what it is, what is set aside, and what is refused before anything is allocated."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from memory_meter import MemoryMeter

from blockroll.errors import RequestError
from blockroll.kernels.attention.splits import Cut
from blockroll.kernels.attention.tiles import choose
from blockroll.kernels.dispatch import using
from blockroll.model.checkpoint import load_policy
from blockroll.rollout import kv_memory
from blockroll.rollout.cache import pages_for
from blockroll.rollout.engine import Engine, EngineConfig
from blockroll.rollout.host_memory import host_memory
from blockroll.rollout.offline import pool_size
from blockroll.rollout.planning.step_costs import rows
from blockroll.rollout.schedule import Schedule
from blockroll.rollout.steps.recurring import bucket
from blockroll.rollout.steps.shapes import power_of_two
from blockroll.rollout.types import RolloutRequest, SamplingParams
from blockroll.service import policy_files

GB = 10**9


@pytest.fixture(scope="module")
def policy(make_policy):
    return make_policy(torch.float32)


@pytest.fixture
def free(monkeypatch):
    """free(bytes): so many are free, of twice as many."""
    return lambda size: monkeypatch.setattr(kv_memory, "memory", lambda device: (size, 2 * size))


def pages(policy, **config):
    return Engine(policy, EngineConfig(**config)).cache.total_pages


def test_by_default_on_a_cpu_a_full_batch_of_short_samples(policy, free):
    free(GB)
    assert pages(policy, max_batch=3, page_size=16) == 3 * 160 // 16  # the policy's maximum is 160
    assert pages(policy, pages=7) == 7


@pytest.mark.parametrize("wanted, share", [(0.5, 0.5), (1.0, 1.0), ("20MB", None), ("1.5 MiB", None)])
def test_a_fraction_or_a_size(policy, free, caplog, wanted, share):
    """keys and values of 3 layers, 2 heads of 8 numbers: 384 bytes a position; and a page's tail."""
    free(GB // 10)
    config = EngineConfig(max_batch=2, prefill_rows=32, page_size=16, kv_memory=wanted)
    aside = kv_memory.set_aside(policy, config, 16, 0)
    with caplog.at_level("INFO"):
        got = Engine(policy, config).cache
    size = {"20MB": 20 * 10**6, "1.5 MiB": 3 * 2**19}.get(wanted) or share * (GB // 10 - sum(aside.values()))
    page = kv_memory.page_bytes(policy, 16)
    assert got.total_pages == int(size) // page
    assert got.k.nbytes + got.v.nbytes == got.total_pages * 16 * 384
    pools = (got.k, got.v, got.x, got.delayed)
    assert sum(pool.nbytes for pool in pools) == got.total_pages * page + aside["tails"]
    (line,) = [record.getMessage() for record in caplog.records if "K/V pool" in record.getMessage()]
    assert f"{got.total_pages} pages of 16 = {got.total_pages * 16} tokens" in line and "of 0.10 GB that are free" in line


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (dict(pages=10**9), "pages: 1000000000 of 32 positions, 13632.0 GB, and of 0.10 GB that are free, "),
        (dict(kv_memory="20GB"), "kv_memory: '20GB', and of 0.10 GB .* use at most [0-9]+ pages"),
        (dict(kv_memory=1e-9), r"kv_memory: 1e-09 of what is left is 0 pages, and a sample needs 1: .* lower max_batch"),
        (dict(max_batch=5000), "max_batch: 5000 samples of 160 positions, .* set aside .logits .* lower max_batch and prefill"),
        (dict(kv_memory=0.5, max_batch=5000), "kv_memory: 0.5 of what is left is 0 pages"),
        (dict(kv_memory=1.5), "kv_memory: 1.5 is outside 0..1; use a fraction"), (dict(kv_memory=0.0), "outside 0..1"),
        (dict(kv_memory=float("nan")), "outside 0..1"), (dict(kv_memory=True), "outside 0..1"),
        (dict(kv_memory="much"), "kv_memory: 'much' is no size of memory"), (dict(kv_memory="0GB"), "no size of memory"),
        (dict(kv_memory=0.5, pages=3), "kv_memory: 0.5 is given beside 3 pages"), (dict(pages=0), "pages: 0 is no whole number"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_it_is_allocated(policy, free, monkeypatch, config, said):
    free(GB // 10)
    monkeypatch.setattr("blockroll.rollout.engine.PagedCache", lambda *_: pytest.fail("allocated"))
    with pytest.raises(RequestError, match=said):
        Engine(policy, **config)


def test_a_gpu_gives_nine_tenths_of_what_is_left(policy):
    pytest.importorskip("triton")
    from pretend_device import PretendDevice

    away = copy.deepcopy(policy)
    with PretendDevice(free=GB):
        config = EngineConfig(max_batch=1, prefill_rows=8, captured=False)
        aside = sum(kv_memory.set_aside(away.to("cuda:0"), config, 16, 2 * GB).values())
        most = int(0.9 * (GB - aside)) // kv_memory.page_bytes(policy, 32)
        assert pages(away, max_batch=1, prefill_rows=8, captured=False) == most
        captured = kv_memory.set_aside(away, EngineConfig(), 16, 64 * GB)
        assert (captured["graphs"], captured["libraries"]) == (2 * GB, 512 << 20)
        # q of fifteen drafts of each sample, and prompts in large chunks: each costs the host a whole eager step.
        assert captured["drafts"] == 4 * 32 * 15 * policy.config.vocab_size
        assert [kv_memory.prefill_rows(EngineConfig(prefill_rows=rows), away) for rows in (None, 7)] == [2048, 7]
    assert kv_memory.prefill_rows(EngineConfig(), policy) == 512


def test_a_gpu_has_no_more_pages_than_its_kernels_address(policy):
    """A small policy on a large GPU: offsets into the tail of a layer have 32 bits."""
    pytest.importorskip("triton")
    from pretend_device import PretendDevice

    away, z = copy.deepcopy(policy), policy.config
    channels = (z.num_attention_heads + z.num_key_value_heads) * z.head_dim
    config = EngineConfig(max_batch=2, page_size=16, captured=False)
    with PretendDevice(free=1000 * GB):
        away.to("cuda:0")
        entries = 2 * 2 * (16 + 1 + policy.hops) + kv_memory.pool_pages(away, config, 16) * policy.hops
        assert 0.99 * 2**31 < entries * channels <= 2**31
        with pytest.raises(RequestError, match="pages: .* use at most"):
            kv_memory.pool_pages(away, EngineConfig(max_batch=2, page_size=16, captured=False, pages=10**8), 16)


def test_a_file_of_long_prompts_takes_the_pages_there_are(policy, free):
    """More would be welcome: then no sample would wait for another's pages."""
    config = EngineConfig(max_batch=8, page_size=16)
    free(GB)
    assert pool_size(152, policy, config) == 9 * 10
    free(sum(kv_memory.set_aside(policy, config, 16, 0).values()) + 40 * kv_memory.page_bytes(policy, 16))
    assert pool_size(152, policy, config) == 36


@pytest.mark.parametrize(
    ("samplers", "params"),
    [("lossless coupled mixed ar", {}), ("mixed", dict(top_p=0.9, top_k=50)), ("coupled", dict(top_p=0.9))],
)  # fmt: skip
def test_a_step_takes_no_more_than_is_set_aside_for_it(make_policy, samplers, params):
    """What logits take, with and without cut-offs, where the vocabulary is most of it. Plain operations hold the most."""
    policy = make_policy(torch.float32, vocab_size=10000, num_hidden_layers=1, layer_types=["hybrid"])
    config = EngineConfig(Schedule("fused", levels=(0, 4)), max_batch=4, prefill_rows=8, pages=64)
    names = samplers.split()
    with using("reference"):
        engine = Engine(policy, config)
        for i in range(4):
            chosen = SamplingParams(names[i % len(names)], max_tokens=40, ignore_eos=True, **params)
            engine.add(RolloutRequest(str(i), (3 + i, 4), chosen, seed=i))
        with MemoryMeter() as meter:
            for _ in range(3):
                engine.step()
    aside = kv_memory.set_aside(policy, config, engine.block_size, 0)
    assert 0.3 * aside["logits"] < meter.peak < aside["logits"] + aside["activations"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_set_aside(make_policy, dtype):
    """Of a prefill in which layers are most of it."""
    sizes = dict(hidden_size=128, head_dim=16, moe_intermediate_size=128, router_hidden_size=32)
    policy = make_policy(torch.float32, vocab_size=16, num_hidden_layers=1, layer_types=["hybrid"], **sizes)
    for parameter in policy.parameters():
        parameter.data = parameter.data.to(dtype)
    config = EngineConfig(Schedule("ar"), max_batch=1, prefill_rows=128, pages=64)
    with using("reference"):
        engine = Engine(policy, config)
        engine.add(RolloutRequest("a", (3,) * 128, SamplingParams("ar", max_tokens=1, routed_experts=True)))
        with MemoryMeter() as meter:
            engine.step()
    activations = kv_memory.set_aside(policy, config, engine.block_size, 0)["activations"]
    assert 0.3 * activations < meter.peak < activations


@pytest.mark.parametrize(("limit", "batch", "levels", "heads"), [
    (512, 8, None, 4), (3000, 8, None, 4), (5000, 8, None, 4),
    pytest.param(3000, 9, (0, 4, 8), 8, id="padding of captured steps"),
    pytest.param(3000, 32, (0, 4, 8), 66, id="tiles with rows to spare"),
])  # fmt: skip
def test_partial_results_under_batch_invariant_are_set_aside(make_policy, limit, batch, levels, heads):
    """Of captured steps, whose batches and tables of pages are larger than those of the samples."""
    pytest.importorskip("triton")
    from pretend_device import PretendDevice

    schedule = Schedule("ar") if levels is None else Schedule("fused", None, levels).within(16)
    config = EngineConfig(schedule, max_batch=batch, prefill_rows=8, page_size=16, batch_invariant=True)
    policy = make_policy(torch.float32, max_position_embeddings=limit, num_attention_heads=heads, num_key_value_heads=2)
    z, width = policy.config, power_of_two(pages_for(limit, 16))
    with PretendDevice(free=GB):
        aside = kv_memory.set_aside(policy.to("cuda:0"), config, 16, GB)["attention"]
    tile = choose("sm_90", torch.float32, rows(schedule), heads // 2, True)
    cut = Cut.of(np.arange(bucket(batch) + 1) * rows(schedule), tile, heads, 2, True)
    assert cut.capacity(width * 16) * 2 * tile.m * 4 * (z.head_dim + 1) <= aside


def test_memory_of_this_machine():
    free, total = kv_memory.memory(torch.device("cpu"))
    assert 0 < free <= total


def test_memory_of_a_container_counts_what_the_system_would_give_up(tmp_path):
    for name, text in (("proc/meminfo", "MemTotal: 9000 kB\nMemFree: 1000 kB\nMemAvailable:    8000 kB\n"),
                       ("v2/memory.max", "5000000\n"), ("v2/memory.current", "4000000\n"),
                       ("v2/memory.stat", "anon 1\ninactive_file 2500000\nactive_file 7\n"),
                       ("v1/memory/memory.limit_in_bytes", "5000000\n"), ("v1/memory/memory.usage_in_bytes", "4000000\n"),
                       ("v1/memory/memory.stat", "inactive_file 5\ntotal_inactive_file 1500000\n"),
                       ("none/memory.max", "max\n"), ("none/memory.current", "4000000\n")):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    groups = tmp_path / "sys/fs/cgroup"
    groups.parent.mkdir(parents=True)
    for version, expected in (("v2", 3_500_000), ("v1", 2_500_000), ("none", 8000 * 1024)):
        groups.symlink_to(tmp_path / version)
        assert host_memory(tmp_path)[0] == expected, version
        groups.unlink()


@pytest.mark.parametrize("page_size", [1, 16, 32])
def test_a_service_counts_the_pool_as_the_engine_does(page_size):
    directory = policy_files.find("tiny-reasoner")
    policy = load_policy(directory, "float32", "cpu")
    counted = policy_files.pool_bytes(directory, "float32", 100, page_size, 8)
    assert counted == 100 * kv_memory.page_bytes(policy, page_size)
