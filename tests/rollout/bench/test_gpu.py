"""`blockroll bench gpu`: its items on a few numbers through the interpreter, and what becomes of items that fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from blockroll.errors import InvalidInput
from blockroll.kernels.dispatch import using
from blockroll.kernels.launch import record
from blockroll.model.policy import Policy
from blockroll.rollout.bench.gpu import checks, compilation, host, kernels, predict, runner
from blockroll.rollout.bench.gpu.kernels import KernelBench
from blockroll.rollout.bench.gpu.parts import FilledCache, passes
from blockroll.rollout.bench.gpu.report import summarise, text, write_plot
from blockroll.rollout.bench.gpu.sizes import DEVICE, DRY
from blockroll.rollout.bench.gpu.steps import StepBench
from blockroll.rollout.bench.gpu.training import TrainingBench
from blockroll.rollout.kv_memory import page_bytes
from blockroll.rollout.planning import kernel_work, predictions
from blockroll.rollout.planning.roofline import expected_tokens
from blockroll.rollout.schedule import Schedule

CPU = torch.device("cpu")


@pytest.fixture
def interpreted():
    with torch.inference_mode(), using("triton"):
        yield


@pytest.mark.parametrize("name", [name for name in checks.CHECKS if name not in ("batch", "coupled", "whole runs")])
def test_checks_hold(interpreted, name: str) -> None:
    row = checks.checked(name, DRY, CPU)
    assert row["ok"], row
    assert runner._plain(row)


def test_a_wrong_kernel_fails_its_check(interpreted, monkeypatch: pytest.MonkeyPatch) -> None:
    from blockroll.kernels.attention import triton as fast

    right = fast.paged_attend
    monkeypatch.setattr(fast, "paged_attend", lambda *arguments: right(*arguments) * 1.01)
    assert not checks.checked("attention", DRY, CPU)["ok"]
    # Not written at all: fresh memory is no result.
    monkeypatch.setattr(fast, "paged_attend", lambda q, *arguments: torch.empty(q.shape, dtype=q.dtype))
    row = checks.checked("attention", DRY, CPU)
    assert not row["ok"] and row["worst"] != row["worst"]


def test_kernels_have_times_bytes_and_flops(interpreted) -> None:
    bench = KernelBench(DRY, CPU)
    for name in ("attention 2 x 5 at 9", "experts 5", "router 5", "cca 5", "residual 5", "projections 5", "head 2", "verify 2"):
        row = bench.items[name]()
        for part in row.get("parts", {"": row}).values():
            assert part["seconds"] > 0 and part["bytes"] > 0 and part["flops"] >= 0


@pytest.mark.slow
def test_steps_are_the_engines_by_the_clock(interpreted) -> None:
    bench = StepBench(DRY, CPU)
    assert len(bench.items) == len(DRY.schedules) * len(DRY.batches) * len(DRY.contexts)
    for name in bench.items:
        row = bench.run(name)
        assert row["rows"] == {"ar": 1, "fused": 4 + 2 * 4, "two_pass": 3 + 2}[row["kind"]]
        assert row["passes"] == {"ar": 1, "fused": 1, "two_pass": 2}[row["kind"]]
        assert row["seconds"] == pytest.approx(row["host_seconds"] + row["waited_seconds"]) and row["waited_seconds"] > 0
        assert row["tokens_per_s"] == pytest.approx(2 * row["tokens_per_step"] / row["seconds"])
        assert 1 <= row["tokens_per_step"] <= (1 if row["kind"] == "ar" else 4) and row["forced_tokens"] == 4


def test_what_does_not_fit_a_device_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, gib = StepBench(DRY, CPU), 1 << 30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (25 * gib, 100 * gib))
    page, size = page_bytes(bench.policy, DRY.page_size), DRY.page_size
    bench._must_fit(2, gib // 2 // (2 * page) * size)
    with pytest.raises(InvalidInput, match="batch: a cache of 2 x .* takes 2 GB, and of the 27 GB that are free 26 are kept"):
        bench._must_fit(2, 2 * gib // (2 * page) * size)


def test_on_a_device_the_whole_policy_is_measured_first_where_the_claims_are() -> None:
    names = list(StepBench(DEVICE, CPU).items)
    assert names[0] == "ar 16 at 2048" and len(names) == 60
    assert [name.partition(" ")[0].partition("(")[0] for name in names[:3]] == ["ar", "fused", "two_pass"]
    assert DEVICE.zaya.num_hidden_layers == 40 and DEVICE.zaya.vocab_size == 262272


@pytest.mark.parametrize("schedule", DEVICE.schedules, ids=lambda schedule: schedule.label)
def test_a_forward_asks_nothing_of_the_host(schedule: Schedule) -> None:
    """On `meta` tensors there is nothing to ask for: what reads a value back fails. So the step can be captured."""
    config = {**DEVICE.config, "num_hidden_layers": 1, "layer_types": ["hybrid"]}
    with torch.inference_mode(), using("triton"):
        with torch.device("meta"):
            policy = Policy(replace(DEVICE, config=config).zaya).to(DEVICE.dtype).requires_grad_(False)
        policy.pack()
        filled = FilledCache(policy, 64 * 16384, 64, DEVICE.page_size, policy.block_size + 1)
        with record("sm_90") as launches:
            forwards = passes(policy, filled.cache, filled.held([16384] * 32, 34), schedule.within(policy.block_size))
            prepared = len(launches)
            for forward in forwards:
                forward.run()
    kernels = [launch.kernel.__name__ for launch in launches[prepared:]]
    assert kernels.count("paged") == kernels.count("_cca_kernel") == len(forwards)
    assert len(kernels) >= 10


def test_a_training_step_of_each_kind_over_the_same_document(interpreted) -> None:
    bench = TrainingBench(DRY, CPU)
    ar, diffusion = (bench.run(name) for name in bench.items)
    assert (ar["kind"], diffusion["kind"]) == ("ar", "diffusion")
    assert ar["tokens"] == ar["rows"] == 64 < 2 * 64 <= diffusion["rows"]
    assert ar["draft_loss"] == 0 < min(ar["ar_loss"], diffusion["ar_loss"], diffusion["draft_loss"])
    assert ar["tokens_per_s"] == pytest.approx(64 / ar["seconds"])


def test_on_a_device_the_documents_have_128k_tokens() -> None:
    layers = {name: make().num_hidden_layers for name, make in DEVICE.trained.items()}
    assert layers == {"tiny-reasoner": 4, "ZAYA1-8B, 1 layer": 1} and DEVICE.trained_tokens == 128 * 1024
    assert DEVICE.trained["ZAYA1-8B, 1 layer"]().vocab_size == 262272


def made_up() -> dict[str, Any]:
    """Rows as a device would give them."""
    steps = {}
    for schedule, seconds, tokens in (("ar", 0.01, 1.0), ("fused(15, {0}, 16)", 0.02, 5.5), ("two_pass(16)", 0.03, 6.9)):
        for batch in (16, 64):
            steps[f"{schedule} {batch}"] = {
                "schedule": schedule, "kind": schedule.partition("(")[0], "batch": batch, "context": 2048, "rows": 1,
                "seconds": seconds, "host_seconds": 0.001, "waited_seconds": seconds - 0.001, "forced_tokens": 6.8,
                "tokens_per_step": tokens, "tokens_per_s": batch * tokens / seconds,
            }  # fmt: skip
    attention = {"kind": "attention", "batch": 1, "rows": 1, "context": 9, "seconds": 1e-3, "bytes": 2e9, "flops": 1e9}
    return {
        "machine": {"device": "NVIDIA H200", "versions": {}},
        "sections": {
            "ceilings": {"copy": {"copy_bytes_per_s": 4e12}, "matmul": {"matmul_flops_per_s": 8e14}},
            "correctness": {"philox": {"ok": True, "worst": 0.0}, "cca": {"error": "RuntimeError: out of luck"}},
            "kernels": {"attention": attention, "router": {"skipped": "no time left"}},
            "training": {
                kind: {"policy": "tiny", "kind": kind, "tokens": 9, "tokens_per_s": rate}
                for kind, rate in (("ar", 50.0), ("diffusion", 22.0))
            } | {"other ar": {"policy": "other", "kind": "ar", "tokens": 9, "tokens_per_s": 1.0}},
            "steps": steps | {"ar 128": {"error": "out of memory"}},
        },
    }


def test_the_summary_gives_fractions_rooflines_and_ratios(tmp_path: Path) -> None:
    made = summarise(made_up())
    assert made["ceilings"] == {"copy_bytes_per_s": 4e12, "matmul_flops_per_s": 8e14}
    assert made["sections"]["kernels"]["attention"]["of_copy"] == pytest.approx(0.5)
    assert made["attention"]["best_bytes_per_s"] == pytest.approx(2e12)
    rows = {(row["kind"], row["batch"]): row for row in made["decode"]}
    fused = rows["fused", 16]
    assert fused["forced"]["6.8"]["ratio_to_ar_if_exactly"] == pytest.approx(6.8 / 2)
    tokens = fused["forced"]["6.8"]["tokens_per_step"]
    assert 5 < tokens < 6.8
    assert fused["measured"] == {"tokens_per_step": 5.5, "tokens_per_s": 16 * 5.5 / 0.02, "ratio_to_ar": pytest.approx(5.5 / 2)}
    assert fused["forced"]["6.8"]["tokens_per_s"] == pytest.approx(16 * tokens / 0.02)
    assert rows["two_pass", 64]["forced"]["6.8"]["tokens_per_step"] == pytest.approx(6.8)
    assert fused["of_roofline"] == pytest.approx(0.02 / fused["roofline_seconds"])
    (trained,) = made["training"]
    assert trained["policy"] == "tiny" and trained["diffusion_over_ar"] == pytest.approx(0.44)
    printed = text(made)
    assert "RuntimeError: out of luck" in printed and "Random weights" in printed and "H100" in printed
    assert printed.startswith("NVIDIA H200: batch 16, 2k: fused(15, {0}, 16), 2.8x ar; 1 of 2 checks hold\n")
    short = text(made, everything=False)
    assert short.splitlines()[0] == printed.splitlines()[0] and "RuntimeError: out of luck" in short and "of copy" not in short
    assert write_plot(made, tmp_path / "gpu.png") and (tmp_path / "gpu.png").stat().st_size > 5000
    json.dumps(made, allow_nan=False)


def test_what_the_host_and_the_oracle_took_is_printed() -> None:
    rows = made_up()
    rows["sections"]["host"] = {"captured 16": {"seconds": 4.1e-4, "fastest": 3.9e-4}, "eager 16": {"skipped": "no time left"}}
    rows["sections"]["steps"]["oracle fused 16"] = {
        "seconds": 0.01, "ar_seconds": 0.005, "tokens_per_step": 8.5, "tokens_per_s": 13600.0, "ratio_to_ar": 4.25, "diverged": 1,
        "samples": 16,
    }  # fmt: skip
    made = summarise(rows)
    assert len(made["decode"]) == 6
    printed = text(made)
    assert "0.41" in printed and "13,600" in printed and "1 of 16" in printed


CHILD = """
import os, sys, time
from pathlib import Path
from blockroll.rollout.bench.gpu import runner

def run(name):
    if name == "dies":
        os.abort()
    if name == "hangs":
        time.sleep(600)
    return {"seconds": 1.0}

runner.items = lambda section, dry: (["good", "dies", "hangs", "last"], run)
sys.exit(runner.child("ceilings", Path(sys.argv[sys.argv.index("--lines") + 1]), time.time() + 600, True))
"""


@pytest.mark.timeout(600)  # three processes import torch
def test_an_item_that_dies_or_hangs_costs_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = tmp_path / "child.py"
    child.write_text(CHILD)
    real = subprocess.Popen
    monkeypatch.setattr(
        runner.subprocess, "Popen", lambda command, **options: real([command[0], str(child), *command[3:]], **options)
    )
    monkeypatch.setattr(runner, "_ITEM_SECONDS", 2.0)
    monkeypatch.setattr(runner, "_START_SECONDS", 300.0)
    lines, output = tmp_path / "lines.jsonl", tmp_path / "gpu.json"
    result: dict[str, Any] = {"machine": {}, "sections": {}}

    def collect() -> None:
        runner._collect(result, "ceilings", lines, output)

    runner._section("ceilings", lines, time.time() + 500, True, collect)
    collect()
    rows = json.loads(output.read_text())["sections"]["ceilings"]
    assert rows["good"] == rows["last"] == {"seconds": 1.0}
    assert f"status {-signal.SIGABRT}" in rows["dies"]["error"]
    assert "took more than" in rows["hangs"]["error"]


def test_an_error_is_a_row_and_a_lost_device_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = {"raises": ValueError("as told"), "lost": RuntimeError("CUDA error: an illegal memory access")}

    def run(name: str) -> dict[str, Any]:
        if name in errors:
            raise errors[name]
        return {"error_of": float("nan")}

    monkeypatch.setattr(runner, "items", lambda section, dry: (["raises", "nan", "lost", "last"], run))
    lines = tmp_path / "lines.jsonl"
    assert runner.child("steps", lines, time.time() + 60, True) == runner._LOST
    assert runner.child("steps", lines, time.time() - 1, True) == 0  # a fresh one, when the time is over
    result: dict[str, Any] = {"machine": {}, "sections": {}}
    runner._collect(result, "steps", lines, tmp_path / "gpu.json")
    rows = result["sections"]["steps"]
    assert rows["raises"]["error"] == "ValueError: as told" and "illegal memory" in rows["lost"]["error"]
    assert rows["nan"] == {"error_of": "nan"} and rows["last"] == {"skipped": "no time left"}
    assert result["machine"]["dry_run"] is True


@pytest.mark.parametrize("made", [("philox",), ("philox", "cca")])
def test_a_check_that_was_not_made_does_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: tuple[str, ...]) -> None:
    def section(name: str, lines: Path, *_: Any) -> None:
        runner.append_jsonl(lines, {"items": ["philox", "cca"], "machine": {"dry_run": True}})
        for item in made:
            runner.append_jsonl(lines, {"item": item, "row": {"ok": True}})

    monkeypatch.setattr(runner, "_section", section)
    assert runner.bench_gpu(tmp_path / "gpu.json", dry=True, sections=("correctness",)) == (len(made) == 2)


def test_a_fault_of_the_summary_costs_no_row(tmp_path: Path) -> None:
    output, row = tmp_path / "gpu.json", {"seconds": 1.0}  # a kernel's row without its bytes
    made = runner._write({"machine": {}, "sections": {"kernels": {"odd": row}}}, output)
    assert "KeyError: 'bytes'" in made["summary_error"]
    assert json.loads(output.read_text())["sections"]["kernels"]["odd"] == row


def test_without_an_accelerator_one_line_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(InvalidInput, match="device: torch sees no accelerator here; run it on one"):
        runner.bench_gpu(tmp_path / "gpu.json")
    with pytest.raises(InvalidInput, match="unknown section 'step'"):
        runner.bench_gpu(tmp_path / "gpu.json", dry=True, sections=("step",))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_whole_command(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "blockroll.cli", "bench", "gpu", "--dry-run", "--json", "gpu.json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=280, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    made = json.loads((tmp_path / "gpu.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu.png"]
    rows = [row for section in made["sections"].values() for row in section.values()]
    assert rows and not any("error" in row or "skipped" in row for row in rows)
    assert len(made["decode"]) == len(DRY.schedules)


def test_a_bare_machine_can_run_it() -> None:
    """Of what blockroll installs, the bench imports nothing beyond what its package names."""
    code = """
import sys
for name in ("ray", "zmq", "reasoning_gym", "typer", "datasets", "pandas", "matplotlib", "pydantic"):
    sys.modules[name] = None
import blockroll.rollout.bench.gpu.steps, blockroll.rollout.bench.gpu.kernels, blockroll.rollout.bench.gpu.checks
import blockroll.rollout.bench.gpu.host, blockroll.rollout.bench.gpu.whole_runs, blockroll.rollout.bench.gpu.runner
del sys.modules["pydantic"]
import blockroll.rollout.bench.gpu.training
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_that_was_cut_short_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What gave a result stays; what failed or did not fit runs. On another machine, or with other versions, everything runs."""
    output, ran, versions = tmp_path / "gpu.json", [], {"torch": "1"}

    def run(name: str) -> dict[str, Any]:
        ran.append(name)
        if name == "late" and len(ran) < 3:
            raise ValueError("not yet")
        return {"ok": True}

    monkeypatch.setattr(runner, "items", lambda section, dry: (["early", "late"], run))
    monkeypatch.setattr(runner, "machine", lambda dry: {"device": "a", "versions": dict(versions), "date": str(len(ran))})
    monkeypatch.setattr(
        runner, "_section", lambda section, path, deadline, dry, collect: runner.child(section, path, deadline, dry)
    )
    assert not runner.bench_gpu(output, dry=True, sections=("correctness",))
    assert ran == ["early", "late"]
    assert runner.bench_gpu(output, dry=True, sections=("correctness",), resume=True)
    assert ran == ["early", "late", "late"]
    versions["torch"] = "2"
    assert runner.bench_gpu(output, dry=True, sections=("correctness",), resume=True)
    assert ran[3:] == ["early", "late"]
    output.write_text("no JSON")
    assert runner.bench_gpu(output, dry=True, sections=("correctness",), resume=True) and len(ran) == 7


def test_predictions_are_those_of_the_roofline_and_stand_beside_what_is_measured() -> None:
    assert predictions.PATH.read_text() == predict.text(predict.predictions())
    bench = KernelBench(DEVICE, CPU)
    named = {name for name in bench.items if not name.startswith("verify")}
    named |= {f"verify {batch} {part}" for batch in DEVICE.batches for part in ("verify", "draft", "ar")}
    for device in predictions.registered()["devices"].values():
        assert device["kernels"].keys() == named and device["steps"].keys() == StepBench(DEVICE, CPU).items.keys()
        every = [*device["kernels"].values(), *device["steps"].values()]
        assert all(0 < row["of_roofline"] < 1 and row["ms"] > 0 for row in every)
    rows = made_up()
    rows["sections"]["kernels"]["cca 16"] = {"seconds": 1e-5, "bytes": 1.0, "flops": 1.0}
    made = summarise(rows)
    known = predictions.predicted("NVIDIA H200")
    step = next(row for row in made["decode"] if row["kind"] == "ar" and row["batch"] == 16)
    assert step["of_prediction"] == pytest.approx(10 / known["steps"]["ar 16 at 2048"]["ms"])
    kernel = made["sections"]["kernels"]["cca 16"]
    assert kernel["of_prediction"] == pytest.approx(1e-2 / known["kernels"]["cca 16"]["ms"])
    assert f"{kernel['of_prediction']:.2f}" in text(made) and f"{step['of_prediction']:.2f}" in text(made)
    assert predictions.predicted("some other device") == {}


def test_work_of_kernels_is_counted_on_the_network() -> None:
    with torch.device("meta"):
        policy = Policy(replace(DEVICE, config={"num_hidden_layers": 1, "layer_types": ["hybrid"]}).zaya)
    attention, config = policy.model.layers[0].self_attn, policy.config
    weights = attention.qkv_proj.weights(attention.qk_norm.temp)
    assert kernel_work.cca(config, 0).bytes == 2 * sum(each.numel() for each in weights if each is not None)
    assert kernel_work.cca(config, 3).flops == 2 * 3 * weights.grouped_weight.numel()
    matrices = [module.weight.numel() for module in attention.modules() if isinstance(module, torch.nn.Linear)]
    assert kernel_work.projections(config, 0).bytes == 2 * sum(matrices)
    assert kernel_work.head(config, 1).flops == 2 * policy.lm_head.weight.numel()


def test_the_host_is_measured_where_there_is_no_device() -> None:
    rows = {captured: host.host_seconds(2, captured, context=64, steps=4, layers=2) for captured in (True, False)}
    assert 0 < rows[True]["seconds"] < rows[False]["seconds"]
    assert 2 < rows[True]["tokens_per_step"] == rows[False]["tokens_per_step"]
    assert list(host.items(False)) == ["captured 16", "eager 16", "captured 64", "eager 64"]


def test_the_oracle_accepts_every_draft() -> None:
    with torch.inference_mode(), using("reference"):
        bench = StepBench(replace(DRY, steps=6), CPU)
        (name,) = bench.oracles
        row = bench.run(name)
    # Every draft stands: three of a block of 4, then none is left, for level 2 has drafted a block for two accepted ones.
    tokens = expected_tokens(DRY.schedules[1], [1.0] * 4, 4)
    assert row["diverged"] == 0 and row["tokens_per_step"] == pytest.approx(tokens, abs=0.35)
    assert name in bench.order and len(bench.order) == len(bench.items) + 1


def test_compilers_are_few_on_a_large_node(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 384)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(384)), raising=False)
    assert compilation.compilers() == 16
    asked = []
    monkeypatch.setattr(compilation, "check", lambda targets, workers: asked.append(workers) or [])
    monkeypatch.setattr(compilation, "architecture", lambda: "gfx942")
    compilation.compile_kernels()
    assert asked == [16]


def test_every_timed_call_of_cut_offs_finds_the_same_edges(monkeypatch):
    found = []
    edges = kernels.edges
    monkeypatch.setattr(kernels, "edges", lambda *arguments: found.append(edges(*arguments)) or found[-1])
    KernelBench(replace(DRY, repeats=3), CPU).cutoffs(2)
    assert len(found) > 1 and all(torch.equal(part, first) for each in found for part, first in zip(each, found[0], strict=True))
