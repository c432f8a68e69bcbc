"""`blockroll tradeoff`: what its report holds, and what it says of it."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from blockroll import cli
from blockroll.rollout.evaluation.tradeoff import TradeoffOptions, Way, levels_of, table, tradeoff
from blockroll.rollout.evaluation.tradeoff_plot import conclusion, draw, reach
from blockroll.rollout.machine import describe
from blockroll.rollout.plot_style import DPI, WIDTH
from blockroll.rollout.schedule import Schedule

ROOT = Path(__file__).resolve().parents[3]


def test_levels_are_spread_over_the_block() -> None:
    assert levels_of(3, 16) == (0, 4, 8)
    assert levels_of(5, 16) == (0, 3, 6, 9, 12)
    assert levels_of(8, 16) == tuple(range(0, 16, 2))
    assert levels_of(16, 16) == levels_of(64, 16) == tuple(range(16))
    assert levels_of(3, 4) == (0, 3)
    assert levels_of(1, 16) == (0,)


def test_the_seconds_to_reach_an_accuracy_are_interpolated() -> None:
    def way(*accuracy: float) -> dict:
        return {"majority_at": dict(zip("124", accuracy, strict=True))}

    slow, fast = way(0.5, 0.6, 0.8), way(0.4, 0.6, 0.7)
    assert reach(slow, slow, 1.0) == [{"k": k, "accuracy": a, "ratio": 1.0} for k, a in ((1, 0.5), (2, 0.6), (4, 0.8))]
    found = [row["ratio"] for row in reach(slow, fast, 0.5)]
    assert found[:2] == pytest.approx([1.5 * 1.0 / 2.0, 2 * 1.0 / 4.0]) and found[2] is None
    assert [row["ratio"] for row in reach(fast, slow, 2.0)] == pytest.approx([2.0, 2.0, 3 * 2.0 / 4.0])


def test_seconds_are_compared_round_by_round() -> None:
    """A round in which the machine is slower is so for all ways."""
    ar = Way("ar", Schedule("ar"), seconds={8: [1.0, 3.0, 1.0, 3.0, 3.0]})
    drafting = Way("lossless", Schedule("auto"), seconds={8: [0.4, 1.2, 0.4, 1.5, 0.9]})
    assert drafting.over(ar, 8) == pytest.approx(0.4) and ar.over(ar, 8) == 1.0


def test_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out" / "tradeoff.json"
    arguments = ["tiny-reasoner", "--tasks", 4, "--samples", 3, "--levels", "8", "--mix-weights", 0.5, "--batches", "1,2",
                 "--rounds", 3, "--clock-tasks", 1, "--batch", 12, "--no-planner", "--threads", 2, "--device", "cpu",
                 "--json", path]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["blockroll", "tradeoff", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    report = json.loads(path.read_text())
    ways = {way["name"]: way for way in report["ways"]}
    assert list(ways) == ["ar", "lossless, 8 levels", "coupled, 8 levels", "mixed(0.5), 8 levels"]
    assert ways["lossless, 8 levels"]["levels"] == list(range(0, 16, 2))
    assert report["machine"]["torch_threads"] == 2 != torch.get_num_threads()
    for figure in ("tokens", "pass_at", "majority_at"):  # the same tokens
        assert ways["coupled, 8 levels"][figure] == ways["ar"][figure]
    for name, way in ways.items():
        assert way["forwards"] == pytest.approx(way["tokens"]) if name == "ar" else way["forwards"] < way["tokens"]
        assert list(way["pass_at"]) == list(way["majority_at"]) == ["1", "2"] and set(way["seconds"]) == {"1", "2"}
        assert way["pass_at"]["1"] == pytest.approx(way["majority_at"]["1"])
        assert all(0 < seconds < 60 for seconds in way["seconds"].values())
        assert 0 < way["ratio_to_ar"]["1"] < 60 and ways["ar"]["ratio_to_ar"]["1"] == 1
        assert [row["k"] for row in way["reach"]["2"]] == [1, 2]
    assert ways["ar"]["tokens_per_forward"] == 1 < ways["lossless, 8 levels"]["tokens_per_forward"]
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert printed.splitlines() == [conclusion(report), *table(report)]
    assert "tokens per forward" in conclusion(report) and "speed of ar at batch 1" in conclusion(report)
    assert str(tmp_path) not in path.read_text()
    only = report | {"ways": report["ways"][:1]}
    draw(only, tmp_path / "ar.png")
    assert conclusion(only).startswith("ar: ")


def test_the_picture_has_the_style_of_all_and_says_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    save = Figure.savefig

    def kept(figure: Figure, *arguments: object, **options: object) -> None:
        drawn.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", kept)
    report = json.loads((ROOT / "docs/tradeoff.json").read_text())
    draw(report, tmp_path / "picture.png")
    width, height = struct.unpack(">II", (tmp_path / "picture.png").read_bytes()[16:24])
    assert width == round(WIDTH * DPI) and height < 1.3 * width
    titles = [axes.get_title(loc="left").replace("\n", " ") for axes in drawn[0].axes]
    assert titles == [
        "lossless, planner: 0.31 of ar's seconds, batch 1",
        "lossless, planner: 0.45 of ar's seconds, batch 8",
        "mixed(0.5), 3 levels: 0.14 of ar's forwards",
        "mixed(0.5), 8 levels: 8.1 tokens per forward",
        "lossless, planner: 3.2x at batch 1, 2.2x at batch 8",
        "mixed(0.5), 3 levels: -7.8 points of pass@1",
    ]
    clock = drawn[0].axes[4]
    marks = [tuple(point) for line in clock.lines if line.get_linestyle() == "None" for point in line.get_xydata()]
    assert len(marks) == len(set(marks)) == len(report["ways"]) * len(report["batches"])  # none hides another


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_tokens_per_forward_of_the_shipped_policy_on_400_tasks(tmp_path: Path, temperature: float) -> None:
    report = tradeoff("tiny-reasoner", TradeoffOptions(
        samples=2, samplers=("lossless", "mixed"), mix_weights=(0.5,), level_counts=(3, 8), planner=False, batches=(1,), rounds=3,
        clock_tasks=4, device="cpu", temperature=temperature,
    ), json_path=tmp_path / "tradeoff.json")  # fmt: skip
    found = {way["name"]: way["tokens_per_forward"] for way in report["ways"]}
    print("\n".join(table(report)))
    assert found["lossless, 3 levels"] >= 6.4
    assert found["lossless, 8 levels"] >= 7.4
    assert found["mixed(0.5), 8 levels"] >= 7.7


@pytest.mark.slow
def test_lossless_reaches_the_accuracies_of_ar_in_half_its_seconds() -> None:
    """For a quiet machine: seconds are by the clock, with a thread on each of its cores. Batch 8 is the narrowest: seen 0.42 to
    0.53 on Zen 4 in ten runs, of which one was above 0.49."""
    report = tradeoff("tiny-reasoner", TradeoffOptions(
        samples=4, samplers=("lossless",), level_counts=(3,), batches=(1, 2, 4, 8), clock_tasks=32, rounds=21, device="cpu",
        temperature=0.7, threads=describe()["cores"],
    ))  # fmt: skip
    print("\n".join(table(report)))
    reference, *lossless = report["ways"]
    for way in lossless:
        for name in ("pass_at", "majority_at"):
            for k, accuracy in way[name].items():
                error = way["standard_error"][name][k] + reference["standard_error"][name][k]
                assert abs(accuracy - reference[name][k]) <= 3 * error
    for batch in map(str, report["batches"]):
        assert min(way["ratio_to_ar"][batch] for way in lossless) <= 0.5, batch
