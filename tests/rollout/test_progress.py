"""What long work shows."""

from __future__ import annotations

import pytest

from blockroll.rollout.progress import TrainingMeter, _short


@pytest.mark.parametrize(("count", "text"), [
    (0, "0"), (999, "999"), (1000, "1.00k"), (9960, "10.0k"), (60_180, "60.2k"), (999_600, "1.00M"), (12e6, "12.0M"),
    (6e11, "600B"), (1.2e12, "1200B"),
])  # fmt: skip
def test_counts_are_short(count: float, text: str) -> None:
    assert _short(count) == text


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
