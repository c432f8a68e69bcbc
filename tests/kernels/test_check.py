"""`blockroll kernels check`: every kernel compiles clean for every target, and what is wrong is seen.

Each check runs in a process of its own: this one interprets kernels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import ZayaConfig

pytest.importorskip("triton")

from blockroll import cli, kernels
from blockroll.kernels import isa
from blockroll.kernels.check import OPS
from blockroll.kernels.launch import Shape
from blockroll.kernels.shapes import TARGETS, TINY_REASONER, ZAYA1_8B
from blockroll.model.checkpoint import read_config, resolve


@pytest.mark.parametrize("shape, name", [(ZAYA1_8B, None), (TINY_REASONER, "tiny-reasoner")], ids=["zaya1-8b", "tiny"])
def test_shapes_are_those_of_the_policies(shape: Shape, name: str | None) -> None:
    config = ZayaConfig() if name is None else read_config(resolve(name))
    rope = config.rope_parameters["hybrid"]["partial_rotary_factor"]
    assert (shape.hidden, shape.heads, shape.kv_heads, shape.head_dim, shape.rotary) == (
        config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.head_dim * rope
    )  # fmt: skip
    assert (shape.experts, shape.ffn, shape.router, shape.vocab, shape.conv) == (
        config.num_experts, config.moe_intermediate_size, config.router_hidden_size, config.vocab_size,
        (config.cca_time0, config.cca_time1),
    )  # fmt: skip


def run(arguments: Sequence[object], folder: Path, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=timeout)


def check(folder: Path, *options: object, timeout: float = 280) -> list[dict]:
    path = folder / "check.json"
    done = run(["-m", "blockroll.cli", "kernels", "check", "--json", path, *options], folder, timeout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return json.loads(path.read_text())["launches"]


def test_the_largest_tile_of_every_kernel_is_clean(tmp_path: Path) -> None:
    """gfx950 has the compiler of gfx942; `test_every_launch_is_clean` compiles for it."""
    targets = ("gfx942", "sm_90")
    assert {*targets, "gfx950"} == set(TARGETS)
    launches = check(tmp_path, "--quick", "--target", ",".join(targets))
    seen = {(launch["target"], launch["op"]) for launch in launches}
    folder = Path(next(iter(kernels.__path__)))
    assert seen == {(target, op) for target in targets for op in OPS if (folder / op / "triton.py").is_file()}
    # Pools over 2 GiB are addressed otherwise on AMD, and products go through matrix units.
    assert any("large" in launch["case"] and launch["op"] == "attention" for launch in launches)
    assert all(launch["dots"] > 0 for launch in launches if launch["kernel"] == "paged")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_launch_is_clean(tmp_path: Path) -> None:
    assert len(check(tmp_path, timeout=3500)) > 300


@pytest.mark.slow
def test_faults_are_seen(tmp_path: Path) -> None:
    done = run([Path(__file__).with_name("faulty_kernels.py")], tmp_path)
    assert done.returncode == 0, done.stderr
    for target, seen in json.loads(done.stdout).items():
        faults = seen["faults"]
        assert faults["clean"] == []
        assert any("spilled" in fault or "stack" in fault for fault in faults["spills"]), target
        assert "bytes of shared memory" in faults["shared"][0]
        assert "no dot_rows" in faults["undeclared"][0]
        assert faults["no matrix instruction"] == ["no MFMA" if target == "gfx942" else "no wgmma"]
        assert faults["does not compile"][0].startswith("does not compile: ")
        figures = seen["figures"]
        bounds = figures.pop("clean")
        worse = {
            name: {figure for figure, value in each.items() if isa.bounds.worse(figure, value, bounds[figure])}
            for name, each in figures.items()
        }
        assert {"narrow", "small"} <= worse["2-byte loads"]
        assert "loop_barriers" in worse["barriers"]
        assert "waves" in worse["occupancy"]
        assert {"ahead", "exposed"} <= worse["wait right behind the load"]


def test_a_fault_is_exit_status_1_and_wrong_words_are_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    program = """
import sys
from dataclasses import replace
from blockroll import cli
from blockroll.kernels import check, shapes
from blockroll.kernels.isa import bounds
for entries in bounds.registered().values():
    for each in entries.values():
        each["waves"] = 65
shapes.TARGETS["sm_90"] = replace(shapes.TARGETS["sm_90"], shared=1)
sys.argv = ["blockroll", "kernels", "check", "--target", "sm_90", "--op", "residual", "--quick", "--workers", "1"]
cli.main()
"""
    done = run(["-c", program], tmp_path)
    assert done.returncode == 1, done.stderr
    assert "1 at most" in done.stdout
    # One line names kernel, device, figure and bound.
    line = next(line for line in done.stdout.splitlines() if "bound 65" in line)
    assert line.startswith("sm_90 residual._residual_kernel (zaya1-8b, ") and line.count("waves ") == 1
    monkeypatch.setattr(sys, "argv", ["blockroll", "kernels", "check", "--target", "gfx90"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: target: unknown target 'gfx90'") and said.count("\n") == 1
