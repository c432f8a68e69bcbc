"""The network against `transformers.ZayaForCausalLM`, through files of either library."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from random_zaya import randomise, zaya_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, ZayaConfig, ZayaForCausalLM

import blockroll
from blockroll.errors import CheckpointError
from blockroll.model.layout import DecodeRows, causal, decode
from blockroll.model.policy import Policy, Routing
from blockroll.rollout.cache import PagedCache

SHAPES = {
    "plain": dict(layer_types=None, sliding_window=None, tie_word_embeddings=True),
    "sliding": dict(sliding_window=5),
    "long-kernels": dict(cca_time0=3, cca_time1=3, attention_bias=True, lm_head_bias=True),
    "wide": dict(num_attention_heads=6, num_key_value_heads=2, num_experts=5, hidden_size=48, num_hidden_layers=3),
}
LENGTHS = (1, 2, 3, 17, 41)


@pytest.fixture(params=SHAPES, scope="module")
def pair(request, tmp_path_factory):
    """A transformers model and the policy loaded from its files."""
    model = ZayaForCausalLM(zaya_config(**SHAPES[request.param])).eval()
    randomise(model)
    directory = tmp_path_factory.mktemp("parity") / request.param
    model.save_pretrained(directory)
    return model, blockroll.load_policy(directory)


def documents(vocabulary, lengths=LENGTHS):
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(0, vocabulary, (n,), generator=draw).tolist() for n in lengths]


@torch.no_grad()
def reference(model, texts):
    return torch.cat([model(torch.tensor([text])).logits[0] for text in texts])


@torch.no_grad()
def test_causal_logits(pair):
    model, policy = pair
    texts = documents(policy.config.vocab_size)
    routing = Routing([], [])
    logits = policy.head(policy(causal(texts), routing=routing))
    assert (logits - reference(model, texts)).abs().max() <= 1e-4
    skipped = torch.stack(routing.expert_LT) == policy.config.num_experts
    assert 0 < skipped.float().mean() < 0.9
    assert logits.std(0).mean() > 0.1, "the logits must depend on the context"


@torch.no_grad()
def test_step_by_step_through_the_cache(pair):
    model, policy = pair
    texts = documents(policy.config.vocab_size, (29, 23))
    cache = PagedCache(policy, pages=20, page_size=4, slots=2, decode_rows=4)
    held = [cache.open() for _ in texts]
    logits = [[], []]
    sizes = [7, 1, 3, 1, 1, 4, 2]
    while any(h.length < len(t) for h, t in zip(held, texts, strict=True)):
        size = sizes.pop(0) if sizes else 1
        live = [i for i in range(2) if held[i].length < len(texts[i])]
        plans = [DecodeRows(texts[i][held[i].length : held[i].length + size], held[i].length, (), 0) for i in live]
        for i, plan in zip(live, plans, strict=True):
            assert cache.reserve(held[i], held[i].length + len(plan.clean))
        layout = decode(plans, policy.mask_token_id)
        out = policy.head(policy(layout, cache.view([held[i] for i in live], layout)))
        for i, part in zip(live, out.split([len(p.clean) for p in plans]), strict=True):
            logits[i].append(part)
            held[i].length += len(part)
    assert (torch.cat([*logits[0], *logits[1]]) - reference(model, texts)).abs().max() <= 1e-4


@torch.no_grad()
def test_saved_policy_loads_in_transformers(pair, tmp_path):
    model, policy = pair
    policy.converted = True
    directory = blockroll.save_policy(policy, tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(directory).eval()
    texts = documents(policy.config.vocab_size)
    assert (reference(again, texts) - reference(model, texts)).abs().max() <= 1e-4
    again.save_pretrained(tmp_path / "again")
    back = blockroll.load_policy(tmp_path / "again")
    assert (back.block_size, back.mask_token_id) == (policy.block_size, policy.mask_token_id)
    assert back.converted
    assert torch.equal(policy.head(policy(causal(texts))), back.head(back(causal(texts))))


@pytest.fixture
def directory(make_policy, tmp_path):
    return blockroll.save_policy(make_policy(torch.float32), tmp_path / "policy")


def edit(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_missing_tensor_is_named(directory):
    edit(directory, lambda t: t.pop("model.layers.1.mlp.experts.down_proj"))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.down_proj"):
        blockroll.load_policy(directory)


def test_misshapen_tensor_is_named(directory):
    edit(directory, lambda t: t.update({"model.norm.weight": torch.ones(5)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*\(5,\)"):
        blockroll.load_policy(directory)


def test_other_architecture_is_refused(directory):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(CheckpointError, match="llama"):
        blockroll.load_policy(directory)


def test_corrupt_file_is_refused(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="corrupt"):
        blockroll.load_policy(directory)


def test_unknown_policy_names_the_shipped_ones():
    with pytest.raises(CheckpointError, match="no directory"):
        blockroll.load_policy("no-such-policy")


def test_bfloat16_on_disk_is_exact_in_float32(make_policy, tmp_path):
    policy = make_policy(torch.float32)
    loaded = blockroll.load_policy(blockroll.save_policy(policy, tmp_path / "half", "bfloat16"))
    weight = loaded.model.norm.weight
    assert loaded.dtype == torch.float32
    assert np.array_equal(weight, policy.model.norm.weight.bfloat16().float())
    assert isinstance(loaded, Policy)
    assert isinstance(loaded.config, ZayaConfig)
