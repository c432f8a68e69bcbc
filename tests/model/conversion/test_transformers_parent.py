"""An autoregressive checkpoint that transformers wrote: converted, decoded, and read by transformers again."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from conversion_parts import curve, recipe
from random_zaya import randomise, zaya_config
from transformers import AutoModelForCausalLM, ZayaForCausalLM

import blockroll
from blockroll.model.conversion.train import run
from blockroll.model.layout import causal
from blockroll.model.tasks import make_tasks
from blockroll.model.tokenizer import encode_prompt, train_tokenizer


def test_checkpoint_of_transformers_converts_decodes_and_loads_back(tmp_path: Path) -> None:
    sample = make_tasks("train", 64, seed=0)
    tokenizer = train_tokenizer((task.prompt + task.completion for task in sample), 300)
    model = ZayaForCausalLM(zaya_config(vocab_size=len(tokenizer), tie_word_embeddings=True))
    randomise(model, sharpness=0.1)
    parent = tmp_path / "parent"
    model.save_pretrained(parent)
    tokenizer.save_pretrained(parent)
    assert "diffusion" not in json.loads((parent / "config.json").read_text())

    stage = dict(name="diffusion", kind="diffusion", tokens=2400, draft=dict(ce=0.5, tv=1.0))
    run(recipe(tmp_path, stage, parent=str(parent)))
    losses = [row["draft_loss"] for row in curve(tmp_path)]
    assert losses[-1] < losses[0]

    policy = blockroll.load_policy(tmp_path / "policy")
    assert (policy.converted, policy.block_size, policy.mask_token_id) == (True, 8, tokenizer.mask_token_id)
    prompts = [tuple(encode_prompt(tokenizer, task.prompt)[:40]) for task in make_tasks("heldout", 3, seed=1)]
    answers = {}
    for sampler in ("ar", "coupled", "lossless"):
        params = blockroll.SamplingParams(sampler=sampler, max_tokens=24)
        requests = [blockroll.RolloutRequest(id=f"{i}", prompt_tokens=prompt, params=params, seed=i)
                    for i, prompt in enumerate(prompts)]  # fmt: skip
        answers[sampler] = [trajectory.tokens for trajectory in blockroll.Engine(policy).rollout(requests)]
        assert all(1 <= len(tokens) <= 24 for tokens in answers[sampler])
    assert answers["coupled"] == answers["ar"]

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.float32).eval()
    assert isinstance(again, ZayaForCausalLM)
    text = [*prompts[0], *answers["ar"][0]]
    with torch.no_grad():
        ours = policy.head(policy(causal([text])))
        theirs = again(torch.tensor([text])).logits[0]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert again.config.diffusion == {"block_size": 8, "mask_token_id": tokenizer.mask_token_id}
