"""`blockroll eval`: the JSON's contract, a plot and a card that follow from it, and errors that come before the work."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from blockroll import cli
from blockroll.model.checkpoint import SHIPPED, load_policy, save_policy
from blockroll.model.conversion.config import Architecture, ConversionConfig, Stage
from blockroll.model.conversion.train import new_policy

SMALL = Architecture(
    hidden_size=32, layers=2, heads=2, kv_heads=1, head_dim=16, experts=2, expert_size=32, router_size=8,
    max_position_embeddings=256,
)  # fmt: skip
STAGE = {"name": "ar", "kind": "ar", "tokens": 2000, "pack_tokens": 512}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two untrained policies with one tokenizer, `policy` and `parent`; the former with a recipe of two families."""
    folder = tmp_path_factory.mktemp("eval")
    for seed, name in enumerate(("policy", "parent")):
        config = ConversionConfig(output="unused", architecture=SMALL, block_size=8, seed=seed, stages=(Stage(**STAGE),))
        save_policy(new_policy(config).requires_grad_(False).eval(), folder / name)
    recipe = {"output": "unused", "stages": [STAGE],
              "data": {"pool": 8, "sources": [{"kind": "tasks", "families": ["gcd", "count_bits"]}]}}  # fmt: skip
    (folder / "policy" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> object:
    monkeypatch.setattr(sys, "argv", ["blockroll", "eval", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_figures(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path, card = tmp_path / "out" / "eval.json", tmp_path / "card.md"
    options = ["--tasks", 8, "--k", "1,3", "--mix-weights", "0.5,0.75", "--temperatures", "1,0.3", "--levels", "0,2",
               "--block-sizes", "4,8", "--batch", 5, "--max-tokens", 20, "--seed", 3]  # fmt: skip
    options += ["--json", path, "--card", card, "--all"]
    assert run(monkeypatch, directory / "policy", "--parent", directory / "parent", *options) == 0
    figures = json.loads(path.read_text())
    assert (figures["tasks"], figures["samples"], figures["seed"], figures["families"]) == (8, 3, 3, ["count_bits", "gcd"])
    assert (figures["policy"], figures["parent"]) == ("policy", "parent")
    samplers = ["ar", "lossless", "mixed(0.5)", "mixed(0.75)"]
    for table in (figures["tokens_per_forward"], figures["standard_error"]["tokens_per_forward"]):
        assert {name: list(row) for name, row in table.items()} == {name: ["1.0", "0.3"] for name in samplers}
    for table in (figures["pass_at"], figures["standard_error"]["pass_at"]):
        assert {name: list(row) for name, row in table.items()} == {name: ["1", "3"] for name in ["parent", *samplers]}
    assert figures["tokens_per_forward"]["ar"]["1.0"] == 1.0 < figures["tokens_per_forward"]["lossless"]["1.0"]
    assert list(map(len, figures["acceptance_by_slot"].values())) == [4, 8]
    assert list(figures["acceptance_by_slot"]) == list(figures["tokens_per_forward_by_block_size"]) == ["4", "8"]
    assert all(0 < value < 1 for row in figures["acceptance_by_slot"].values() for value in row)
    assert set(figures["acceptance_by_kind"]) == {"digits", "letters", "punctuation_space", "newline", "eos"}
    assert sum(kind["share"] for kind in figures["acceptance_by_kind"].values()) == pytest.approx(1)
    # Untrained: about uniform over the vocabulary, whatever the temperature, and as bad as the parent, which is another one.
    for nats in (figures["ar_loss"], figures["ar_entropy"]["1.0"], figures["parent_ar_loss"]):
        assert 4 < nats < 8
    assert figures["ar_loss"] != figures["parent_ar_loss"]
    assert figures["disjoint"]["training_tasks_compared"] > 20
    assert figures["disjoint"]["overlap"] == 0
    check = figures["batch_1"]
    assert (check["tasks"], check["equal_samples"]) == (8, 8)
    assert check["tokens_per_forward"] == check["tokens_per_forward_in_batch"]
    assert {"processor", "cores", "torch_threads", "versions", "date"} <= set(figures["machine"])
    ways = [(way["policy"], way["name"], way["temperature"], way["samples"], way["block_size"], way["levels"])
            for way in figures["ways"]]  # fmt: skip
    assert ways == [("parent", "ar", 1.0, 3, 8, [])] + [
        ("policy", name, temperature, 3 if temperature == 1 else 1, 8, [] if name == "ar" else [0, 2])
        for temperature in (1.0, 0.3) for name in samplers
    ] + [("policy", "lossless", 1.0, 1, 4, [0, 2])]  # fmt: skip

    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    shown, written = capsys.readouterr().out, card.read_text()
    stored = json.loads((directory / "policy" / "config.json").read_text())["dtype"]
    assert f" MiB ({stored})." in written
    assert shown.strip() in written
    first = shown.splitlines()[0]
    assert re.fullmatch(r"\*\*policy, T=1: \S+, [\d.]+ tokens per forward; .* % right.* \(8 held-out tasks\)\*\*", first)
    assert "(out/eval.png)" in written
    assert "8 held-out tasks" in shown
    assert str(tmp_path) not in written + path.read_text()
    assert str(directory) not in written + path.read_text()


def test_shipped_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # Without the recipe: to draw millions of tokens again takes a minute, and that is not the point here.
    shutil.copytree(SHIPPED / "tiny-reasoner", tmp_path / "policy", ignore=shutil.ignore_patterns("recipe.yaml"))
    path = tmp_path / "eval.json"
    options = ["--tasks", 6, "--samples", 1, "--samplers", "lossless", "--temperatures", "1.0", "--block-sizes", 16,
               "--draft-temperatures", "2,0.5"]  # fmt: skip
    assert run(monkeypatch, tmp_path / "policy", *options, "--json", path) == 0
    figures = json.loads(path.read_text())
    assert figures["tokens_per_forward"]["lossless"]["1.0"] > 2
    drafts = figures["tokens_per_forward_by_draft_temperature"]
    assert figures["draft_temperature"] == 0.5 and list(drafts) == ["0.5", "2"]
    assert drafts["2"] < drafts["0.5"] == figures["tokens_per_forward"]["lossless"]["1.0"]
    assert figures["batch_1"]["equal_samples"] >= 5
    assert 0 < figures["ar_entropy"]["1.0"] < 1
    assert "no recipe.yaml" in figures["disjoint"]["not_compared"][0]
    out = capsys.readouterr().out
    assert "Not compared: no recipe.yaml" in out
    first = out.splitlines()[0]
    pattern = r"policy, T=1: lossless, [\d.]+ tokens per forward; lossless .* right; ar .* right \(6 held-out tasks\)"
    assert re.fullmatch(pattern, first)
    assert re.search(r"by the temperature of its drafts, .*: [\d.]+ ± [\d.]+ at 0\.5, [\d.]+ ± [\d.]+ at 2\.", out)
    assert "pass@k, T=" not in out and out.splitlines()[-1].startswith("--all: pass@k")


def test_another_seed_draws_other_tasks(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--tasks", 4, "--samplers", "", "--temperatures", "1.0", "--max-tokens", 4]
    losses = []
    for place, seed in enumerate((0, 1, 0)):
        path = tmp_path / f"{place}.json"
        assert run(monkeypatch, directory / "policy", *options, "--seed", seed, "--json", path) == 0
        figures = json.loads(path.read_text())
        assert "acceptance_by_slot" not in figures  # nothing was drafted
        losses.append(figures["ar_loss"])
    assert losses[0] == losses[2] != losses[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tasks", "0"], "tasks: 0 is less than 1; use a number from 1 to 100000"),
        (["--samples", "0"], "samples: 0 is less than 1"),
        (["--batch", "0"], "batch: 0 is less than 1"),
        (["--samples", "4", "--k", "1,8"], "k: 8 is more than the 4 sample(s) of a task; lower it, or raise `samples`"),
        (["--k", "0,1"], "k: [0, 1] holds"),
        (["--k", ","], "k: [] holds"),
        (["--k", "x"], "k: 'x' is not a list of whole numbers"),
        (["--samplers", "ar,best"], "sampler: unknown sampler 'best'; use one of ar, lossless, coupled, mixed"),
        (["--mix-weights", "2"], "mix_weight: 2.0 is outside 0..1"),
        (["--mix-weights", "half"], "mix-weights: 'half' is not a list of numbers"),
        (["--mix-weights", ""], "mix_weights: none are given"),
        (["--temperatures", "-1"], "temperature: -1.0 is neither 0 nor in"),
        (["--temperatures", ""], "temperatures: none are given"),
        (["--levels", "0,99"], "levels: (0, 99) holds a level outside 0..63"),
        (["--block-sizes", "1,8"], "block_size: 1 is outside 2..64"),
        (["--draft-temperatures", "0.5,0"], "draft_temperature: 0.0 is no number in 0.1..2.0"),
        (["--seed", "-1"], "seed: -1 is outside 0..2**63-1"),
        (["--tasks", "3", "--parent", "nowhere"], "policy: 'nowhere' is no"),
    ],
)
def test_bad_options(
    directory: Path, options: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, directory / "policy", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}"), error
    assert error.count("\n") == 1


def test_bad_policies(
    directory: Path, tmp_path: Path, make_policy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bare, path = tmp_path / "bare", tmp_path / "out.json"
    policy = load_policy(directory / "policy")
    policy.tokenizer = None
    save_policy(policy, bare)
    assert run(monkeypatch, bare, "--tasks", 3, "--json", path) == 2
    assert "policy: has no tokenizer; tasks are text" in capsys.readouterr().err
    save_policy(make_policy(), tmp_path / "other")
    assert run(monkeypatch, directory / "policy", "--parent", tmp_path / "other", "--tasks", 3, "--json", path) == 2
    assert "parent: its vocabulary has 40 tokens" in capsys.readouterr().err
    assert run(monkeypatch, directory / "policy", "--tasks", 3, "--json", bare / "config.json" / "x.json") == 2
    assert "config.json" in capsys.readouterr().err
    assert not path.exists()
