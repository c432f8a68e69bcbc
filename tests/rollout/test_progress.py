"""What long work shows."""

from __future__ import annotations

import pytest

from blockroll.rollout import progress
from blockroll.rollout.progress import ItemMeter, Meter, TrainingMeter, _short, sample_meter


@pytest.mark.parametrize(("count", "text"), [
    (0, "0"), (999, "999"), (1000, "1.00k"), (9960, "10.0k"), (60_180, "60.2k"), (999_600, "1.00M"), (12e6, "12.0M"),
    (6e11, "600B"), (1.2e12, "1200B"),
])  # fmt: skip
def test_counts_are_short(count: float, text: str) -> None:
    assert _short(count) == text


def test_where_there_is_no_terminal_plain_lines_are_written_at_intervals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Meter("generate", 40) as meter:
        for _ in range(30):
            now[0] += 1
            meter.advance(5, 2)
        lines = capsys.readouterr().err.splitlines()
        assert [line.split()[:2] for line in lines] == [["generate:", f"{i}/40"] for i in (10, 20, 30)]
        assert all(line.endswith("tokens/s  2.50 tokens/forward") and "\x1b" not in line for line in lines)
        meter.advance(5, 2)
    assert capsys.readouterr().err.startswith("generate: 31/40")
    with TrainingMeter() as training:
        training(dict(stage="ar", tokens=1, of=2, tokens_per_s=3, ar_loss=1, draft_loss=0))
        now[0] += 11
        training(dict(stage="convert", tokens=1, of=2, tokens_per_s=3, ar_loss=1, draft_loss=0))
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == ["ar", "convert"]


def test_items_are_lines_in_a_file_and_a_bar_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    for total, expected in ((3, ["cells: 2/3  mix, seed 0", "cells: 3/3  mix, seed 1"]), (None, ["cells: 2/3  mix, seed 0"])):
        with ItemMeter("cells", total) as meter:
            for seed in range(len(expected) + 1):
                now[0] += 6
                meter.advance(f"mix, seed {seed - 1}", 3)
        assert capsys.readouterr().err.splitlines() == expected
    monkeypatch.setenv("FORCE_COLOR", "1")
    with ItemMeter("cells", 3):
        pass
    shown = capsys.readouterr().err
    assert "0/3" in shown and "\x1b" in shown


def test_a_bar_is_drawn_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for terminal, wanted in ((True, True), (True, False), (False, True)):
        monkeypatch.setenv("FORCE_COLOR" if terminal else "NO_COLOR", "1")
        with sample_meter("generate", 4, wanted) as meter:
            for _ in range(4):
                meter.advance(5, 2)
        shown = capsys.readouterr().err
        assert ("4/4" in shown) == (terminal and wanted)
        monkeypatch.delenv("FORCE_COLOR" if terminal else "NO_COLOR")


def test_a_training_shows_tokens_speed_losses_and_acceptance_in_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    row = dict(tokens=1_234_567, of=600_000_000_000, tokens_per_s=99_349, ar_loss=1.2345, overlap=0.664)
    with TrainingMeter() as meter:
        meter(dict(row, stage="ar", draft_loss=0.0))
        meter(dict(row, stage="convert_32k", draft_loss=2.0151))
    first, second = capsys.readouterr().err.strip().splitlines()
    assert "99.3k/s  AR 1.234" in first and "draft" not in first
    for shown in ("convert_32k", "1.23M/600B tokens", "99.3k/s  AR 1.234  draft 2.015  accepted 0.66"):
        assert shown in second
