"""A policy directory is one policy's, never a mix of two."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from random_zaya import large_policy
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import blockroll
from blockroll.errors import StorageError
from blockroll.model import checkpoint, tensor_files
from blockroll.model.checkpoint import save_policy
from blockroll.model.policy import Policy


def test_saving_over_a_policy_replaces_all_of_it_and_nothing_else(make_policy, tmp_path):
    path = save_policy(make_policy(torch.float32, seed=1), tmp_path / "policy")
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model-00001-of-00001.safetensors"}}')
    (path / "tokenizer.json").write_text("of the older policy")
    (path / "recipe.yaml").write_text("mine")
    newer = make_policy(torch.float32, seed=2)
    save_policy(newer, path)
    assert sorted(p.name for p in path.iterdir()) == ["config.json", "model.safetensors", "recipe.yaml"]
    loaded = blockroll.load_policy(path)
    assert torch.equal(loaded.model.embed_tokens.weight, newer.model.embed_tokens.weight)


def test_export_that_fails_half_way_leaves_the_older_policy(make_policy, tmp_path, monkeypatch):
    older = make_policy(torch.float32, seed=1)
    path = save_policy(older, tmp_path / "policy")
    newer = make_policy(torch.float32, seed=2, rope_theta=77.0)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(newer.config), "save_pretrained", fail)
    with pytest.raises(StorageError, match="full"):
        save_policy(newer, path)
    assert checkpoint.read_config(path).rope_parameters == older.config.rope_parameters
    assert torch.equal(blockroll.load_policy(path).lm_head.weight, older.lm_head.weight)
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]


def test_all_files_of_a_policy_have_the_usual_permissions(make_policy, tmp_path):
    path = save_policy(make_policy(torch.float32), tmp_path / "policy")
    mask = os.umask(0)
    os.umask(mask)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in path.iterdir()}
    assert modes == dict.fromkeys(("config.json", "model.safetensors"), 0o666 & ~mask)


def test_half_precision_keeps_the_buffers_whole(make_policy, tmp_path):
    """Rotary frequencies in bfloat16 would be off by an eighth of a per cent: radians, at far positions."""
    policy = make_policy(dtype=torch.float32)
    half = blockroll.load_policy(save_policy(policy, tmp_path / "policy"), "bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    for (name, mine), (_, theirs) in zip(half.named_buffers(), policy.named_buffers(), strict=True):
        assert mine.dtype == torch.float32, name
        if "inv_freq" in name:
            assert torch.equal(mine, theirs), name


def same(one: Policy, other: Policy) -> bool:
    return all(torch.equal(mine, theirs) for mine, theirs in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("tied", [False, True])
def test_shards_and_one_file_hold_the_same_policy(make_policy, tmp_path, tied):
    policy = make_policy(torch.float32, tie_word_embeddings=tied)
    most = 20_000
    path = save_policy(policy, tmp_path / "policy", max_shard_bytes=most)
    shards = sorted(path.glob("*.safetensors"))
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert len(shards) > 3 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    sizes = {shard.name: {name: x.nbytes for name, x in load_file(shard).items()} for shard in shards}
    assert all(sum(tensors.values()) <= most or len(tensors) == 1 for tensors in sizes.values())
    assert index["weight_map"] == {name: shard for shard, tensors in sizes.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(sum(tensors.values()) for tensors in sizes.values())
    assert same(blockroll.load_policy(path), policy)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert torch.equal(theirs.model.layers[2].mlp.experts.down_proj, policy.model.layers[2].mlp.experts.down_proj)
    save_policy(policy, path)
    assert sorted(p.name for p in path.iterdir()) == ["config.json", "model.safetensors"]
    assert same(blockroll.load_policy(path), policy)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.float64, torch.bfloat16])
def test_tensors_are_cast_once_whatever_their_size(make_policy, tmp_path, monkeypatch, stored, dtype):
    """Tensors of one number, of a part of a piece, and of several pieces."""
    monkeypatch.setattr(tensor_files, "PIECE", 100)
    policy = make_policy(stored, tie_word_embeddings=True)
    loaded = blockroll.load_policy(save_policy(policy, tmp_path / "policy"), dtype)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    kind = getattr(torch, dtype)
    for (name, mine), (_, theirs) in zip(loaded.named_parameters(), policy.named_parameters(), strict=True):
        assert torch.equal(mine, theirs.to(kind)), name
    assert not any(parameter.requires_grad for parameter in loaded.parameters()) and not loaded.training


LOAD = """
import sys
from pathlib import Path
import blockroll
from blockroll.model.checkpoint import load_policy

def kilobytes(file, name):
    return next(int(line.split()[1]) for line in Path(file).read_text().splitlines() if line.startswith(name))

idle = kilobytes("/proc/self/status", "VmRSS:")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
policy = load_policy(sys.argv[1], "float32")
size = sum(parameter.nbytes for parameter in policy.parameters()) // 1024
print(size, idle, kilobytes("/proc/self/status", "VmHWM:"), flush=True)
sys.stdin.readline()
print(kilobytes("/proc/self/smaps_rollup", "Pss:"))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize(("dtype", "shard"), [("float32", 5 * 10**9), ("float32", 3 * 10**8), ("bfloat16", 5 * 10**9)])
def test_loading_takes_the_memory_of_the_policy(tmp_path, dtype, shard):
    """A policy of 2 GB in float32. One process takes at most 1.25 times its size, Python and torch included; four take at
    most 4.1 times its size beside those."""
    policy = large_policy()
    directory = save_policy(policy, tmp_path / "policy", dtype, shard)
    del policy
    command = [sys.executable, "-c", LOAD, str(directory)]
    engines = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    read = [list(map(int, engine.stdout.readline().split())) for engine in engines]
    shared = [int(engine.communicate("\n")[0]) for engine in engines]
    size = read[0][0]
    assert size > 1.9 * 1024**2
    print([f"{peak / size:.3f}, {(peak - idle) / size:.3f} beside {idle >> 10} MiB" for _, idle, peak in read])
    print(f"{sum(shared) / size:.3f} of shared pages counted once")
    assert all(peak <= 1.25 * size for _, _, peak in read)
    assert sum(peak - idle for _, idle, peak in read) <= 4.1 * size
