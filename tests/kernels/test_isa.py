"""Figures of assembly, and their bounds: written programs whose figures are known, and a file that only tightens."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from blockroll.kernels.isa import amdgcn, bounds, figures, sass, tighten
from blockroll.kernels.isa.figures import Figures

AMD_LOOP = """
kernel:
\tbuffer_load_dwordx4 v[0:3], v9, s[0:3], 0 offen
\ts_waitcnt vmcnt(0)
.LBB0_1:
\tbuffer_load_dwordx4 v[4:7], v9, s[0:3], 0 offen
\tglobal_load_ushort v8, v[10:11], off
\ts_barrier
\tv_mfma_f32_32x32x8_bf16 v[16:31], v[4:5], v[6:7], v[16:31]
\tv_mfma_f32_16x16x16_bf16 v[16:19], v[4:5], v[6:7], v[16:19]
\tv_add_u32_e32 v1, v2, v3
\tv_exp_f32_e32 v1, v2
\ts_waitcnt vmcnt(1)
\tv_mfma_f32_32x32x8_bf16 v[16:31], v[4:5], v[6:7], v[16:31]
\ts_waitcnt vmcnt(0) lgkmcnt(0)
\ts_barrier
\ts_cbranch_scc1 .LBB0_1
\ts_endpgm
.LBB0_2:
\ts_barrier
\ts_endpgm
.Lfunc_end0:
\ts_barrier
"""


def test_figures_of_amd_assembly() -> None:
    program = amdgcn.parse(AMD_LOOP, "gfx942")
    assert figures.of(program, 3) == Figures(
        waves=3,
        # Of the loop's two loads one takes 2 bytes and the other 16.
        narrow=0.5, small=0.5,
        # A vector instruction takes 4 cycles, an exponential 16; the products 32, 16 and 32.
        vector_cycles=round(20 / 80, 3),
        # 16 bytes wait behind two products, 2 bytes behind three.
        ahead=round((16 * 2 + 2 * 3) / 18, 3), exposed=0.0,
        loop_barriers=2, barriers=3, full_waits=2,
    )  # fmt: skip


def test_a_load_may_be_waited_for_in_a_later_pass_of_its_loop() -> None:
    lines = [".LBB0_1:", "\ts_waitcnt vmcnt(1)", "\tbuffer_load_dwordx4 v[4:7], v9, s[0:3], 0 offen"]
    lines += ["\tv_mfma_f32_32x32x8_bf16 v[16:31], v[4:5], v[6:7], v[16:31]"] * 5 + ["\ts_cbranch_scc1 .LBB0_1"]
    for limit, passes in ((0, 1), (1, 2), (2, 3)):
        text = "\n".join(lines).replace("vmcnt(1)", f"vmcnt({limit})")
        assert figures.of(amdgcn.parse(text, "gfx950"), 1).ahead == 5 * passes


SASS_LOOP = """
.L_x_0:
        /*0d60*/                   DEPBAR.LE SB0, 0x1 ;
        /*0dd0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0e40*/                   HMMA.16816.F32.BF16 R36, R16.reuse, R40, R36 ;
        /*0e50*/                   LDGSTS.E.BYPASS.128 [R41], desc[UR8][R24.64] ;
        /*0e60*/                   LDGDEPBAR ;
        /*0e70*/              @!P0 LDG.E.U16 R60, desc[UR8][R2.64] ;
        /*0e80*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0e90*/                   UIADD3 UR4, UR4, 0x1, URZ ;
        /*0ea0*/                   IMAD.X R51, RZ, RZ, R13, P1 ;
        /*0eb0*/                   FADD R50, R60, R13 ;
        /*0ec0*/              @!P1 BRA `(.L_x_0) ;
        /*0ed0*/                   EXIT ;
.L_x_1:
        /*0ee0*/                   BRA `(.L_x_1);
"""


def test_figures_of_nvidia_assembly() -> None:
    assert figures.of(sass.parse(SASS_LOOP, "sm_90"), 16) == Figures(
        waves=16, narrow=0.5, small=0.5,
        # An integer instruction takes 2 cycles, a sum 1. A warp's product takes 4, a warp group's 32.
        vector_cycles=round(3 / 36, 3),
        # The asynchronous copy is waited for two passes later: behind HGMMA, a pass, and no more. The register load is read
        # behind HGMMA.
        ahead=round((16 * 3 + 2 * 1) / 18, 3), exposed=0.0,
        loop_barriers=1, barriers=1, full_waits=0,
    )  # fmt: skip


def test_occupancy() -> None:
    lds = 65536
    assert [amdgcn.waves(registers, 4, 0, lds) for registers in (24, 64, 65, 128, 178, 256, 257)] == [8, 8, 7, 4, 2, 2, 1]
    assert [amdgcn.waves(64, 4, shared, lds) for shared in (8192, 24576, 32768, 40960, 65537)] == [8, 2, 2, 1, 0]
    assert amdgcn.waves(128, 8, 32768, lds) == 4 and amdgcn.waves(160, 8, 16384, lds) == 2
    # As the occupancy calculator of CUDA has it for compute capability 9.0.
    assert [sass.warps(registers, 4, 0) for registers in (32, 40, 72, 128, 255)] == [64, 48, 28, 16, 8]
    assert sass.warps(72, 4, 98304) == 8 and sass.warps(32, 1, 0) == 32


def report(figure: Figures, version: str = "3.7.1", quick: bool = False, variant: str = "policy, 16-row tile") -> dict:
    launch = dict(target="gfx942", op="experts", kernel="_down_kernel", variant=variant, figures=asdict(figure))
    return {"versions": {"triton": version}, "quick": quick, "launches": [launch]}


GOOD = Figures(4, 0.0, 0.25, 0.1, 8.0, 0.0, 2, 7, 3)


def run(folder: Path, *reports: dict, loosen: bool = False) -> int:
    paths = []
    for i, each in enumerate(reports):
        paths.append(folder / f"report{i}.json")
        paths[-1].write_text(json.dumps(each))
    return tighten.main([*map(str, paths), *["--loosen"] * loosen], folder / "bounds.json")


def test_bounds_only_tighten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, name = tmp_path / "bounds.json", "gfx942 experts._down_kernel policy, 16-row tile"
    assert run(tmp_path, report(GOOD)) == 0
    better = replace(GOOD, waves=5, small=0.2, ahead=9.0)
    assert run(tmp_path, report(better)) == 0
    assert json.loads(path.read_text())["3.7"][name] == asdict(better)
    before = path.read_bytes()
    for figure, value in dict(waves=4, narrow=0.1, small=0.3, vector_cycles=0.2, ahead=8.0, exposed=0.1, loop_barriers=3).items():
        assert run(tmp_path, report(replace(better, waves=8), quick=True), report(replace(better, **{figure: value}))) == 1
        assert path.read_bytes() == before
        assert f"{name}: {figure} {value:g}, bound " in capsys.readouterr().out
    assert run(tmp_path, report(GOOD), loosen=True) == 0
    assert json.loads(path.read_text())["3.7"][name] == asdict(GOOD)


def test_variants_that_are_gone_leave_the_file_and_versions_stand_apart(tmp_path: Path) -> None:
    assert run(tmp_path, report(GOOD), report(GOOD, variant="other", quick=True), report(GOOD, version="3.6.0")) == 0
    content = json.loads((tmp_path / "bounds.json").read_text())
    assert {version: len(entries) for version, entries in content.items()} == {"3.6": 1, "3.7": 2}
    assert run(tmp_path, report(GOOD)) == 0
    assert len(json.loads((tmp_path / "bounds.json").read_text())["3.7"]) == 1


def test_excesses_name_figure_and_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"3.6": {"a b c": asdict(replace(GOOD, waves=2))}, "3.7": {"a b c": asdict(GOOD)}}
    monkeypatch.setattr(bounds, "registered", lambda: known)
    worse = replace(GOOD, waves=3, barriers=9)
    assert bounds.excesses("3.7.1", "a b c", GOOD) == []
    assert bounds.excesses("3.7.1", "a b c", worse) == ["waves 3, bound 4", "barriers 9, bound 7"]
    # Versions that the file does not know have the loosest bounds.
    assert bounds.excesses("3.8.0", "a b c", worse) == ["barriers 9, bound 7"]
    assert bounds.excesses("3.7.1", "a b d", GOOD)[0].startswith("no bounds for 'a b d' under Triton 3.7")


def test_the_file_is_as_the_command_writes_it() -> None:
    content = json.loads(bounds.PATH.read_text())
    assert bounds.PATH.read_text() == tighten.text(content)
    names = {field for entries in content.values() for each in entries.values() for field in each}
    assert names == set(asdict(GOOD))
