"""The loop of one stage: packs that add up, rates, loads, and what it refuses."""

from __future__ import annotations

import json
import random

import pytest
import torch
from conversion_parts import curve, recipe

from blockroll.errors import CheckpointError, ConfigError, DataError, InvalidInput
from blockroll.model.conversion.config import Stage
from blockroll.model.conversion.data import Document
from blockroll.model.conversion.distributed import Group
from blockroll.model.conversion.stage import Pack, cut_log, learning_rate, make_optimizer, train_step
from blockroll.model.conversion.train import run, starting_policy
from blockroll.model.policy import Policy

DRAFT = dict(ce=0.5, tv=1.0, slot_decay=0.8)
DOCUMENTS = [
    Document((1, 5, 9, 12, 7, 33, 8, 2), 3), Document((1, 21, 14, 6, 30, 2), 2),
    Document((1, 9, 4, 4, 8, 17, 25, 3, 11, 6, 2), 1), Document((1, 30, 31, 2), 2),
]  # fmt: skip


def stage(**changes) -> Stage:
    fields = dict(name="s", kind="diffusion", tokens=100, autocast="float32", draft=DRAFT, alpha=0.7, block_length=(4, 4),
                  random_offset=False, warmup_steps=0)  # fmt: skip
    return Stage.model_validate({**fields, **changes})


@pytest.mark.parametrize(
    "draft",
    [{}, dict(slots="reached"), dict(slots="accepted"), dict(slots="accepted", sampled=0.7)],
    ids=["all", "reached", "accepted", "sampled"],
)
def test_packs_of_one_step_are_one_pack(make_policy, draft):
    """Losses, gradient, norm and expert loads of two packs are those of one pack that holds their documents."""
    results = []
    for groups in ([DOCUMENTS], [DOCUMENTS[:1], DOCUMENTS[1:]]):
        policy = make_policy(torch.float64, seed=3, sharpness=0.6).requires_grad_(True)
        one = stage(packs_per_step=len(groups), clip=0.5, balance_rate=0.01, draft={**DRAFT, **draft})
        optimizer = make_optimizer(policy, one)
        packs = [Pack.of(group, one, policy.mask_token_id, random.Random(0)) for group in groups]
        figures = [train_step(policy, optimizer, one, packs, Group()) for _ in range(3)]
        results.append((figures, policy.state_dict()))
    for whole, parts in zip(*(figures for figures, _ in results), strict=True):
        assert whole.tokens == parts.tokens == 29
        for name in ("ar", "draft", "overlap"):
            assert getattr(parts, name) == pytest.approx(getattr(whole, name), abs=1e-6)
    before = make_policy(torch.float64, seed=3, sharpness=0.6).state_dict()
    for name, tensor in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], tensor, atol=1e-5, rtol=0, msg=name)
        if name.endswith("balancing_biases"):
            assert not torch.equal(tensor[:-1], before[name][:-1]) and torch.equal(tensor[-1], before[name][-1])


def test_products_are_those_the_device_is_fast_at():
    """float32 on a CPU, bfloat16 on an accelerator, unless the recipe says."""
    plain = Stage(name="s", kind="diffusion", tokens=100)
    assert [plain.on(device).autocast for device in ("cpu", "cuda")] == ["float32", "bfloat16"]
    assert [stage(autocast="bfloat16").on(device).autocast for device in ("cpu", "cuda")] == ["bfloat16"] * 2


def test_a_stage_without_autocast_computes_in_float32_here(tmp_path, monkeypatch):
    """And a stage that was trained in bfloat16 is not taken for it."""
    seen = set()
    head = Policy.head
    monkeypatch.setattr(Policy, "head", lambda self, x: seen.add((out := head(self, x)).dtype) or out)
    ar = dict(name="ar", kind="ar", tokens=1200, autocast=None)
    run(recipe(tmp_path, ar))
    assert seen == {torch.float32}
    saved = tmp_path / "policy.ar" / "stage.json"
    assert json.loads(saved.read_text())["autocast"] == "float32"
    with pytest.raises(ConfigError, match=r"stages\.ar\.autocast: 'bfloat16' is not what .* \('float32'\)"):
        run(recipe(tmp_path, {**ar, "autocast": "bfloat16"}))


def test_a_policy_keeps_its_block_size_unless_another_is_given(tmp_path):
    stages = dict(name="ar", kind="ar", tokens=600)
    run(recipe(tmp_path / "parent", stages, block_size=8))
    parent = str(tmp_path / "parent" / "policy")
    for given, expected in ((None, 8), (4, 4)):
        assert starting_policy(recipe(tmp_path, stages, parent=parent, block_size=given)).block_size == expected
    assert starting_policy(recipe(tmp_path, stages, block_size=None)).block_size == 16


def test_the_temperature_of_drafts_is_written_beside_the_policy_and_kept(tmp_path):
    stages = dict(name="ar", kind="ar", tokens=600)
    run(recipe(tmp_path / "parent", stages, draft_temperature=0.5))
    parent = tmp_path / "parent/policy"
    assert json.loads((parent / "config.json").read_text())["diffusion"]["draft_temperature"] == 0.5
    for given, expected in ((None, 0.5), (0.7, 0.7)):
        policy = starting_policy(recipe(tmp_path, stages, parent=str(parent), draft_temperature=given))
        assert policy.draft_temperature == expected
    assert starting_policy(recipe(tmp_path, stages)).draft_temperature == 1


def test_no_step_where_the_data_ended(make_policy):
    policy = make_policy(torch.float32).requires_grad_(True)
    two = stage(packs_per_step=2)
    pack = Pack.of(DOCUMENTS, two, policy.mask_token_id, random.Random(0))
    assert train_step(policy, make_optimizer(policy, two), two, [pack], Group()) is None


def test_pack_without_loss_is_refused():
    with pytest.raises(DataError, match="nothing to learn"):
        Pack.of([Document((1, 5, 9), 3)], stage(), 39, random.Random(0))


@pytest.mark.parametrize(("schedule", "middle"), [("cosine", 0.55), ("linear", 0.55), ("constant", 1.0)])
def test_learning_rate(schedule, middle):
    s = stage(schedule=schedule, learning_rate=1.0, final_learning_rate=0.1, warmup_steps=4)
    assert [learning_rate(s, step, 0) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert learning_rate(s, 9, 50) == pytest.approx(middle)
    assert learning_rate(s, 9, 100) == pytest.approx(1.0 if schedule == "constant" else 0.1)


def test_sgd_trains_and_vectors_do_not_decay(make_policy):
    policy = make_policy(torch.float32).requires_grad_(True)
    sgd = make_optimizer(policy, stage(optimizer="sgd", betas=(0.5, 0.0), weight_decay=0.3))
    assert isinstance(sgd, torch.optim.SGD) and sgd.defaults["momentum"] == 0.5
    assert [(group["weight_decay"], {p.ndim > 1 for p in group["params"]}) for group in sgd.param_groups] == \
        [(0.3, {True}), (0.0, {False})]


def test_log_is_cut_where_a_stage_goes_on(tmp_path):
    log = tmp_path / "log.jsonl"
    rows = [dict(stage=s, step=i) for s, i in (("a", 1), ("a", 2), ("b", 1), ("b", 2), ("b", 3))]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cut_log(log, "b", 3)
    cut_log(log, "b", 1)
    assert [json.loads(line) for line in log.read_text().splitlines()] == rows[:3]
    cut_log(log, "a", 0)
    assert log.read_text() == ""


def test_what_cannot_be_trained_is_refused_before_anything_is_replaced(tmp_path):
    run(recipe(tmp_path))
    weights, rows = (tmp_path / "policy" / "model.safetensors").read_bytes(), curve(tmp_path)
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "config.json").write_text('{"model_type": "gpt2"}')
    for name, line in {"cut": '{"text": "cut o', "long": json.dumps({"text": "long " * 700}), "empty": '{"text": ""}'}.items():
        (tmp_path / f"{name}.jsonl").write_text(line)

    def reading(name: str) -> dict:
        sources = [dict(kind="jsonl", paths=[str(tmp_path / f"{name}.jsonl")])]
        return dict(parent=str(tmp_path / "policy"), data=dict(pool=1, sources=sources))

    for problem, changes in {
        r"cut.jsonl line 1: not valid JSON": reading("cut"),
        r"long.jsonl line 1: a document of \d+ tokens, more than the 600 of stage 'more'": reading("long"),
        r"empty.jsonl line 1 field 'text': an empty document": reading("empty"),
        "'gpt2' model": dict(parent=str(tmp_path / "gpt")),
        "is no directory": dict(parent=str(tmp_path / "nowhere")),
        "outside the parent's vocabulary": dict(parent=str(tmp_path / "policy"), mask_token=100_000),
        "1 process": dict(launcher=dict(kind="torchrun", workers=2)),
    }.items():
        with pytest.raises((CheckpointError, ConfigError, DataError), match=problem):
            run(recipe(tmp_path, dict(name="more", kind="diffusion", tokens=600), **changes))
    with pytest.raises(InvalidInput, match=r"stages\.wild\.learning_rate: the loss is (nan|inf)"):
        run(recipe(tmp_path, dict(name="wild", kind="ar", tokens=60_000, learning_rate=1.0, weight_decay=1e30, warmup_steps=0)))
    tokenizer = tmp_path / "policy" / "tokenizer_config.json"
    tokenizer.write_text(json.dumps({**json.loads(tokenizer.read_text()), "mask_token": None}))
    config = json.loads((tmp_path / "policy" / "config.json").read_text())
    del config["diffusion"]
    (tmp_path / "policy" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="no mask token; name an id"):
        run(recipe(tmp_path, dict(name="more", kind="diffusion", tokens=600), parent=str(tmp_path / "policy")))
    assert (tmp_path / "policy" / "model.safetensors").read_bytes() == weights
    assert curve(tmp_path)[: len(rows)] == rows
