"""A policy directory is one policy's, never a mix of two."""

from __future__ import annotations

import os
import stat

import pytest
import torch

import blockroll
from blockroll.errors import StorageError
from blockroll.model import checkpoint
from blockroll.model.checkpoint import save_policy


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
