"""`blockroll plan`: tables on the screen, everything in the JSON, one line for what is wrong."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from blockroll import cli


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> object:
    monkeypatch.setattr(sys, "argv", ["blockroll", "plan", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_zaya1_8b(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    assert run(monkeypatch, "--batch", "1,64", "--context", "16384", "--json", path, "--all") == 0
    out = capsys.readouterr().out
    assert "8.84B parameters" in out and "AMD Instinct MI300X data sheet" in out
    result = json.loads(path.read_text())
    (mi300x,) = [device for device in result["devices"] if device["name"] == "mi300x"]
    bound = mi300x["attention_compute_bound"]
    assert round(bound["peak"]["proposals"]) == 3 and bound["reached"]["proposals"] < 2
    large = mi300x["predicted"][1]
    assert (large["batch"], large["context"]) == (64, 16384)
    assert large["peak"]["best"]["schedule"].startswith("fused") and large["peak"]["best"]["ratio"] > 2
    # Never below AR: it is what runs where nothing pays.
    assert all(case[side]["best"]["ratio"] >= 1 for case in mi300x["predicted"] for side in ("peak", "reached"))
    assert {step["schedule"].partition("(")[0] for step in result["steps"]} == {"ar", "two_pass", "fused"}


def test_the_conclusion_comes_first_and_long_tables_on_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--batch", "1,8,16", "--context", "2048,16384") == 0
    short = capsys.readouterr().out
    first, *_ = short.splitlines()
    pays = r"fused 2\.\d(-\d\.\d)?x ar"
    assert re.fullmatch(f"batch 16, context 2k: mi300x {pays}; mi355x {pays}; h200 {pays}", first), first
    assert len(short.splitlines()) < 20 and max(map(len, short.splitlines())) <= 140
    assert run(monkeypatch, "--batch", "1,8,16", "--context", "2048,16384", "--all") == 0
    everything = capsys.readouterr().out
    assert everything.splitlines()[0] == first and len(everything.splitlines()) > 50


def test_a_shipped_policy_a_curve_and_measured_rates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured, path = tmp_path / "gpu.json", tmp_path / "plan.json"
    measured.write_text(json.dumps({"machine": {"device": "NVIDIA H200"}, "ceilings": {"copy_bytes_per_s": 4e12}}))
    options = ["--model", "tiny-reasoner", "--hardware", "h200", "--batch", "1", "--context", "100"]
    assert run(monkeypatch, *options, "--survival", "0.9,0.5", "--measured", measured, "--json", path) == 0
    result = json.loads(path.read_text())
    assert result["survival"] == [0.9, 0.5]
    (device,) = result["devices"]
    assert device["basis"] == "measured, gpu.json" and device["rates"]["reached"]["bytes"] == 4e12


@pytest.mark.parametrize("options, line", [
    (["--hardware", "a100"], "error: hardware: unknown hardware 'a100'"),
    (["--model", "nowhere"], "error: policy: 'nowhere' is no directory"),
    (["--batch", "0"], "error: batch: [0] holds no positive number"),
    (["--tpf", "40"], "error: tpf: 40.0 is outside 1..17"),
    (["--survival", "0.5,0.9"], "error: survival: [0.5, 0.9] is no falling curve"),
    (["--survival", "much"], "error: survival: 'much' is not a list of numbers"),
    (["--measured", "absent.json"], "error: absent.json: cannot be read (No such file"),
])  # fmt: skip
def test_one_line_says_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], line: str
) -> None:
    assert run(monkeypatch, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith(line) and error.count("\n") == 1
