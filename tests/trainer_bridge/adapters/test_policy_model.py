"""A policy as a transformers model: its numbers for padded batches, packed rows and shared prefixes, and its files."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from blockroll.errors import CheckpointError, InvalidInput
from blockroll.model.checkpoint import load_policy
from blockroll.model.conversion.config import DraftLoss
from blockroll.model.conversion.objective import draft_losses
from blockroll.model.layout import diffusion
from blockroll.model.scoring import score
from blockroll.trainer_bridge.adapters.policy_model import (
    PolicyModel,
    load_model,
    model_directory,
    trained_positions,
    tree_documents,
)
from blockroll.trainer_bridge.trainers.grpo.loss import mask_blocks

POLICY = "tiny-reasoner"
PAD = 0


@pytest.fixture(scope="module")
def model() -> PolicyModel:
    return load_model(POLICY)


def sequences(count: int = 5, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Prompts and completions of many lengths."""
    rng = np.random.default_rng(seed)
    return [(rng.integers(4, 270, rng.integers(1, 9)).tolist(), rng.integers(4, 270, rng.integers(1, 40)).tolist())
            for _ in range(count)]  # fmt: skip


def padded(pairs: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """input_ids and attention_mask as GRPOTrainer makes them: prompts padded on the left, completions on the right."""
    size, longest = max(len(p) for p, _ in pairs), max(len(c) for _, c in pairs)
    ids = torch.full((len(pairs), size + longest), PAD)
    mask = torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(pairs):
        ids[row, size - len(prompt) : size + len(answer)] = torch.tensor([*prompt, *answer])
        mask[row, size - len(prompt) : size + len(answer)] = 1
    return ids, mask, mask[:, size:], size


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_of_a_padded_batch_are_those_that_engines_record(model: PolicyModel, temperature: float) -> None:
    pairs = sequences()
    ids, mask, _, size = padded(pairs)
    logp = (model(ids, attention_mask=mask).logits / temperature).log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    recorded = score(model.policy, pairs, temperature)
    for row, (expected, (_, answer)) in enumerate(zip(recorded, pairs, strict=True)):
        assert np.abs(logp[row, size - 1 : size - 1 + len(answer)].detach().numpy() - expected).max() < 5e-5
    assert model.model(ids, mask).last_hidden_state[mask == 0].abs().max() == 0


def test_rows_of_samples_one_after_another_are_computed_apart(model: PolicyModel) -> None:
    """Without a mask each position 0 begins a sample, as verl packs them."""
    paths = [[5, 6, 7, 8], [9], [5, 6, 40, 41, 42]]
    flat = torch.tensor([[token for path in paths for token in path]])
    positions = torch.cat([torch.arange(len(path)) for path in paths])[None]
    hidden_ND = model.model(flat, position_ids=positions).last_hidden_state[0]
    alone_ND = torch.cat([model.model(torch.tensor([path])).last_hidden_state[0] for path in paths])
    assert torch.allclose(hidden_ND, alone_ND, atol=1e-5)
    assert not torch.allclose(hidden_ND, model.model(flat).last_hidden_state[0], atol=1e-2)
    mask = torch.ones_like(flat)  # a mask says what is padding, and positions say no more
    assert torch.equal(model.model(flat, mask, positions).last_hidden_state, model.model(flat, mask).last_hidden_state)


def tree(paths: list[list[int]]) -> dict[str, torch.Tensor]:
    """A packed row of TRL's."""
    packing = pytest.importorskip("trl.experimental.async_grpo.packing")
    row = packing.TreeRow()
    for path in paths:
        row.add({"input_ids": np.array(path), "completion_mask": np.array([0, *[1] * (len(path) - 1)]), "group_id": 0,
                 "old_log_probs": np.zeros(len(path)), "advantage": 1.0})  # fmt: skip
    return row.pack()


def test_samples_that_share_a_prefix_are_computed_apart(model: PolicyModel) -> None:
    """Of a row that TRL packs, each sample has the hidden states that it has alone, where siblings have the same positions."""
    stem = [5, 6, 7, 8]
    paths = [[*stem, 20, 21, 22], [*stem, 20, 31], [*stem, 40, 41, 42, 43], [9, 10, 11], [*stem, 20, 31]]
    packed = tree(paths)
    documents = tree_documents(*(packed[name] for name in ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k")))
    flat = packed["input_ids"].tolist()
    assert sorted([flat[place] for place in places] for places in documents) == sorted(paths[:4])  # equal samples are one
    assert len(flat) < sum(map(len, paths[:4]))
    kwargs = {name: packed[name] for name in ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k")}
    hidden_ND = model.model(packed["input_ids"][None], **kwargs).last_hidden_state[0]
    for places in documents:
        alone_ND = model.model(torch.tensor([[flat[place] for place in places]])).last_hidden_state[0]
        assert torch.allclose(hidden_ND[places], alone_ND, atol=1e-5)


def test_gradients_of_a_shared_prefix_are_those_of_its_samples(model: PolicyModel) -> None:
    paths = [[5, 6, 7, 20, 21], [5, 6, 7, 31, 32, 33]]
    packed = tree(paths)
    kwargs = {name: packed[name] for name in ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k")}
    terms = packed["token_index"]
    gradients = []
    for run in ("packed", "apart"):
        model.zero_grad()
        if run == "packed":
            logits = model(packed["input_ids"][None], **kwargs).logits[0]
            targets = packed["shift_labels"]
            loss = logits.log_softmax(-1)[terms].gather(1, targets[terms][:, None]).sum()
        else:
            loss = sum(model(torch.tensor([path])).logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(path[1:])[:, None]).sum()
                       for path in paths)  # fmt: skip
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=2e-4, rtol=1e-3), name


def test_the_draft_loss_is_that_of_the_grpo_trainer(model: PolicyModel) -> None:
    """Mask rows in the pass of TRL's rows give the losses of the same mask rows in a pack of the GRPO trainer, and leave the
    clean rows as they were."""
    pairs = sequences(4, seed=1)
    ids, mask, completion_mask, size = padded(pairs)
    draft = DraftLoss(ce=0.3, tv=1.0, slot_decay=0.9)
    plain = model.model(ids, mask).last_hidden_state
    with model.drafting(trained_positions(completion_mask, size), random.Random(3)) as drafting:
        drafted = model.model(ids, mask).last_hidden_state
    assert torch.allclose(plain, drafted, atol=2e-5)
    found = drafting.losses(draft, 0.8)
    draw = random.Random(3)
    order = draw.sample(range(4), 4)
    assert set(order) == set(range(4))
    blocks = [mask_blocks(len(p), len(p) + len(c), model.policy.block_size, draw) for p, c in pairs]
    layout, target_T = diffusion([[*p, *c] for p, c in pairs], blocks, model.policy.mask_token_id)
    expected = draft_losses(model.policy, model.policy(layout), layout, target_T, [len(p) for p, _ in pairs], draft, 0.8)
    assert found is not None and expected is not None and found.weight == expected.weight
    assert torch.allclose(found.loss, expected.loss, rtol=1e-4)
    inside = model.drafting(trained_positions(completion_mask, size), random.Random(3), inside=(draft, 0.8))
    with inside as drafting:  # within the pass, where parameters in shards are whole
        model(ids, mask)
    assert drafting.found is not None and torch.allclose(drafting.found.loss, found.loss, rtol=1e-6)
    found.loss.backward()
    assert model.model.drafting is None and model.policy.markov is not None
    assert model.policy.markov.next.weight.grad.abs().max() > 0


def test_without_gradients_or_completions_there_are_no_mask_rows(model: PolicyModel) -> None:
    ids, mask, completion_mask, size = padded(sequences(2))
    with model.drafting(trained_positions(completion_mask, size), random.Random(0)) as drafting, torch.no_grad():
        model.model(ids, mask)
    assert drafting.losses(DraftLoss(), 1.0) is None
    empty = torch.zeros_like(completion_mask)
    with model.drafting(trained_positions(empty, size), random.Random(0)) as drafting:
        model.model(ids[:, :size], mask[:, :size])
    assert drafting.losses(DraftLoss(), 1.0) is None


def test_recomputed_layers_give_the_same_gradients(model: PolicyModel) -> None:
    ids, mask, _, _ = padded(sequences(2))
    found = []
    model.train()
    for recompute in (False, True):
        model.model.gradient_checkpointing = recompute
        model.zero_grad()
        model(ids, attention_mask=mask).logits.square().mean().backward()
        found.append(model.policy.model.norm.weight.grad.clone())
    model.model.gradient_checkpointing = False
    model.eval()
    assert torch.allclose(*found, rtol=1e-4)


def test_names_and_files_are_the_policys_own(model: PolicyModel, tmp_path: Path) -> None:
    assert model.state_dict().keys() == model.policy.state_dict().keys() == load_policy(POLICY).state_dict().keys()
    model.save_pretrained(tmp_path / "saved")
    saved = load_policy(tmp_path / "saved")
    assert saved.converted and saved.markov is not None
    path = model_directory(tmp_path / "saved", tmp_path / "reference")
    assert not list(path.glob("*.safetensors"))
    again = AutoModelForCausalLM.from_pretrained(path)
    assert isinstance(again, PolicyModel) and all(p.requires_grad for p in again.parameters())
    for name, tensor in again.policy.state_dict().items():
        assert torch.equal(tensor, saved.state_dict()[name])
    hidden = again.config.hidden_size, again.config.get_text_config().num_hidden_layers
    assert hidden == (model.policy.config.hidden_size, model.policy.config.num_hidden_layers)


def test_a_place_that_holds_a_policy_is_not_written_over(model: PolicyModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    with pytest.raises(InvalidInput, match="holds a policy"):
        model_directory(POLICY, tmp_path)
    with pytest.raises(CheckpointError, match="nobody"):
        load_model("nobody")
    load_policy(tmp_path)
