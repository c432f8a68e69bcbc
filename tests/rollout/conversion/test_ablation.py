"""Ablations: cells that are run once, figures that follow from them, and errors that name the variant."""

from __future__ import annotations

import json

import pytest
import yaml

from blockroll.errors import ConfigError
from blockroll.model.checkpoint import save_policy
from blockroll.model.conversion.config import Architecture, ConversionConfig, Stage
from blockroll.model.conversion.train import new_policy
from blockroll.rollout.conversion.ablation import AblationConfig, ablate, cells_of
from blockroll.rollout.conversion.ablation_report import table
from blockroll.settings import load_yaml

SMALL = Architecture(
    hidden_size=32, layers=1, heads=2, kv_heads=1, head_dim=16, experts=2, expert_size=32, router_size=8,
    max_position_embeddings=256,
)
RECIPE = {
    "seeds": [0, 1],
    "data": {"pool": 16},
    "block_size": 4,
    "stage": {"name": "d", "kind": "diffusion", "tokens": 1500, "pack_tokens": 512, "random_offset": False,
              "block_length": [4, 4], "autocast": "float32", "draft": {"ce": 0.5}},
    "variants": {"published": {}, "mix": {"markov_rank": 2, "draft": {"tv": 1.0}}},
    "decoding": {"tasks": 4, "levels": [0, 2], "batch": 4, "max_tokens": 12},
}  # fmt: skip


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    stages = (Stage(name="ar", kind="ar", tokens=1),)
    policy = new_policy(ConversionConfig(output="unused", architecture=SMALL, block_size=4, stages=stages))
    return save_policy(policy.requires_grad_(False).eval(), tmp_path_factory.mktemp("parent") / "policy")


@pytest.fixture
def recipe(parent, tmp_path):
    path = tmp_path / "ablation.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "output": str(tmp_path / "cells"), "parent": str(parent)}, sort_keys=False))
    return path


def test_every_cell_is_run_once(recipe, capsys):
    ran = []
    written = ablate(recipe, on_cell=lambda row: ran.append((row["variant"], row["seed"])))
    assert ran == [("published", 0), ("mix", 0), ("published", 1), ("mix", 1)]
    shown = capsys.readouterr().err  # stderr is no terminal: lines, and no bar
    assert shown.endswith("cells: 4/4  mix, seed 1\n") and "\u2501" not in shown
    first = json.loads(written.read_text())
    assert [(row["variant"], row["seed"]) for row in first["cells"]] == ran
    mix = first["cells"][1]
    assert mix["stage"]["draft"] == {**first["cells"][0]["stage"]["draft"], "tv": 1.0}
    assert [(way["sampler"], way["temperature"]) for way in mix["ways"]] == [
        ("lossless", 1.0), ("lossless", 0.3), ("mixed", 1.0), ("mixed", 0.3)
    ]  # fmt: skip
    assert {way["levels"][1] for way in mix["ways"]} == {2}
    assert recipe.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    markdown = recipe.with_suffix(".md").read_text()
    assert markdown == table(first)
    assert "| mix | 2 |" in markdown

    # A finished cell is kept; one whose figures are gone, or whose recipe has changed, is run; others are not.
    ablate(recipe, on_cell=lambda row: ran.append((row["variant"], row["seed"])))
    assert len(ran) == 4
    gone = next((recipe.parent / "cells").glob("mix-1-*/figures.json"))
    before = json.loads(gone.read_text())
    gone.unlink()
    changed = yaml.safe_load(recipe.read_text())
    changed["variants"]["published"] = {"alpha": 0.5}
    changed["seeds"] = [1]
    recipe.write_text(yaml.safe_dump(changed, sort_keys=False))
    ablate(recipe, on_cell=lambda row: ran.append((row["variant"], row["seed"])))
    assert ran[4:] == [("published", 1), ("mix", 1)]
    after = json.loads(gone.read_text())
    assert [way["tokens_per_forward"] for way in after["ways"]] == [way["tokens_per_forward"] for way in before["ways"]]


@pytest.mark.parametrize(("change", "words"), [
    ({"variants": {"published": {}, "mix": {"draft": {"tvv": 1}}}}, ("variant 'mix'", "draft.tvv", "`tv`")),
    ({"variants": {"mix": {"block_length": [9, 3]}}}, ("variant 'mix'", "block_length")),
    ({"variants": {"mix": {"draft": {"slots": "some"}}}}, ("draft.slots", "some")),
    ({"variants": {"mix": {"markov_rank": -1}}}, ("markov_rank", "-1")),
    ({"seeds": [1, 1]}, ("seeds",)),
])  # fmt: skip
def test_what_cannot_be_run_is_refused_before_anything_is(recipe, change, words):
    recipe.write_text(yaml.safe_dump({**yaml.safe_load(recipe.read_text()), **change}))
    with pytest.raises(ConfigError) as error:
        ablate(recipe)
    assert all(word in str(error.value) for word in words), error.value
    assert not (recipe.parent / "cells").exists()


def test_the_committed_recipe_covers_every_extra():
    """Each part of the objective that can be switched on is switched on by some variant."""
    config = load_yaml("configs/conversion/ablation.yaml", AblationConfig)
    cells = {cell.variant: cell.stage for cell in cells_of(config, "ablation.yaml") if cell.seed == config.seeds[0]}
    assert len(config.seeds) == 3
    base = cells["published"]
    assert (base.random_offset, base.block_length, base.markov_rank, base.masked_copies) == (False, (16, 16), 0, 1)
    assert base.draft == type(base.draft)()
    # One budget of rows, clean and mask.
    assert {stage.tokens * (1 + stage.masked_copies) for stage in cells.values()} == {2 * base.tokens}
    for part in ("random_offset", "block_length", "markov_rank", "masked_copies"):
        assert any(getattr(stage, part) != getattr(base, part) for stage in cells.values()), part
    for part in ("tv", "kl", "slot_decay", "slots", "sampled"):
        assert any(getattr(stage.draft, part) != getattr(base.draft, part) for stage in cells.values()), part
