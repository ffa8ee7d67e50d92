"""The attention benchmark: one cell of each kind, merging, and that no kernel is timed under another one's name."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import attention as benchmark
from benchmarks import attention_kernels as kernels
from benchmarks import report
from tests.helpers import CPU

ROOT = Path(__file__).parents[2]
GRID = benchmark.grid_of(benchmark.Options(shape="tiny"), on_gpu=False)


def run(out: Path, *arguments: str) -> list[dict]:
    command = [sys.executable, "benchmarks/attention.py", "--shape", "tiny", "--lengths", "64", "--window", "63"]
    command += ["--backends", "sdpa", "flash_attention_2", "--steps", "3", "--out", str(out), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())["cells"]


def test_one_cell_of_each_kind_runs_on_a_cpu_and_runs_merge(tmp_path):
    out = tmp_path / "attention.json"
    first = run(out, "--levels", "kernel", "step")
    refused = [cell for cell in first if cell["backend"] == "flash_attention_2"]
    assert refused and all("it needs a CUDA GPU" in cell["unavailable"] for cell in refused)
    timed = {(cell["level"], cell.get("layout"), cell["window"]): cell for cell in first if cell["backend"] == "sdpa"}
    assert set(timed) == {
        ("kernel", None, None),
        ("kernel", None, 63),
        ("step", "full", "as trained"),
        ("step", "padded", "as trained"),
        ("step", "packed", "as trained"),
    }
    assert all(cell["ran"] == ["sdpa_flash"] for cell in timed.values())
    kernel, full = timed["kernel", None, None], timed["step", "full", "as trained"]
    assert kernel["forward_ms_p10"] <= kernel["forward_ms"] <= kernel["forward_ms_p90"]
    assert full["tokens"] == full["positions"] == 256 and full["step_ms"] > 0 and full["peak_gb"] > 0
    padded, packed = timed["step", "padded", "as trained"], timed["step", "packed", "as trained"]
    assert padded["tokens"] == packed["tokens"] < packed["positions"] < padded["positions"]
    assert padded["first_loss"] == pytest.approx(packed["first_loss"], rel=0.01)

    second = run(out, "--levels", "kernel", "parity", "--missing")
    assert [cell for cell in second if cell["level"] != "parity"] == first  # none was measured again
    parity = [cell for cell in second if cell["level"] == "parity" and cell["backend"] == "sdpa"]
    assert {(cell["length"], cell["layout"]) for cell in parity} == {
        (length, layout) for length in (62, 63, 64, 65, 128) for layout in ("unpadded", "right-padded", "packed")
    }
    assert all(cell["gradient_relative"] < 0.05 and abs(cell["loss_difference"]) < 0.01 for cell in parity)
    assert {cell.get("leak", 0.0) for cell in parity} == {0.0}
    assert [cell["same_bits_again"] for cell in parity if cell["length"] == 64] == [True] * 3
    record = json.loads(out.read_text())
    assert len(record["runs"]) == 2 and record["environment"]["packages"]["torch"] and record["matmul_tflops"] >= 0


def test_a_file_of_another_machine_is_not_merged_into(tmp_path):
    out = tmp_path / "attention.json"
    environment = {"device": "NVIDIA H100 80GB HBM3", "packages": {"torch": "2"}}
    out.write_text(json.dumps({"environment": environment, "runs": [], "cells": []}))
    options = benchmark.Options(out=out)
    assert benchmark.opened(options, environment, GRID)[1]["cells"] == []
    for other in ({**environment, "device": "x86_64 CPU"}, {**environment, "packages": {"torch": "3"}}):
        with pytest.raises(SystemExit, match="has another"):
            benchmark.opened(options, other, GRID)
    runs = [{"shape": "tiny", "window": 5, "kernel_tokens": 256}]
    out.write_text(json.dumps({"environment": environment, "runs": runs, "cells": []}))
    with pytest.raises(SystemExit, match="another window: 5"):
        benchmark.opened(options, environment, GRID)


def test_a_cell_measured_again_replaces_the_old_one_and_a_failed_one_is_not_known():
    cell = {"level": "step", "backend": "sdpa", "length": 64, "window": "as trained", "layout": "full", "checkpointing": "none"}
    others = [{**cell, "length": 128}, {**cell, "layout": "packed"}]
    before = [others[0], {**cell, "step_ms": 1.0}, others[1]]
    assert benchmark.merged(before, [{**cell, "step_ms": 2.0}]) == [others[0], {**cell, "step_ms": 2.0}, others[1]]
    assert benchmark.is_known(cell, before)
    assert not any(benchmark.is_known({**cell, **other}, before) for other in ({"rows": 4}, {"window": None}))
    assert not benchmark.is_known(cell, [{**cell, "failed": "NameError"}])
    whole = {"level": "parity", "backend": "sdpa", "lengths": [62]}
    row = {"level": "parity", "backend": "sdpa", "length": 62, "layout": "packed"}
    assert benchmark.is_known(whole, [row])
    assert benchmark.merged([{**whole, "failed": "late"}], [row]) == [row]


def test_a_cell_whose_process_dies_is_a_row_and_the_run_goes_on(tmp_path):
    (row,) = benchmark.Started({"level": "kernel", "backend": "no such"}, GRID, tmp_path).rows(60.0)
    assert row["failed"].startswith("KeyError")
    (row,) = benchmark.Started({"level": "environment", "backend": None}, GRID, tmp_path).rows(0.0)
    assert row["failed"] == "not done in 0 s"


def test_no_kernel_is_timed_under_the_name_of_another():
    q, k, v = (torch.randn(1, 16, 2, 32, requires_grad=True) for _ in range(3))  # [B, T, H, d] each
    for name in ("eager", "sdpa", "sdpa_flash", "sdpa_math"):
        attend = kernels.KERNEL_FUNCTIONS[name](1, 16, None, 2, CPU)
        ran = "sdpa_flash" if name == "sdpa" else name
        assert kernels.verified(name, lambda attend=attend: attend(q, k, v).sum().backward(), CPU)["ran"] == [ran]
        for wrong in {"eager", "sdpa_flash", "sdpa_math", "flash_attention_2"} - {ran}:
            with pytest.raises(kernels.Unavailable, match=f"ran {ran} instead"):
                kernels.verified(wrong, lambda attend=attend: attend(q, k, v), CPU)
    with pytest.raises(kernels.Unavailable, match="no attention kernel that is known"):
        kernels.verified("sdpa", lambda: q + k, CPU)


@pytest.mark.parametrize("window", [None, 5])
def test_all_kernels_compute_the_same(window):
    q, k, v = (torch.randn(2, 16, 2, 32) for _ in range(3))  # [B, T, H, d] each
    first, *others = (
        kernels.KERNEL_FUNCTIONS[name](2, 16, window, 2, CPU)(q, k, v) for name in ("sdpa_math", "eager", "sdpa", "sdpa_flash")
    )
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-4, atol=1e-5)


def test_what_cannot_run_or_runs_out_of_memory_is_a_row_and_a_mistake_is_not():
    def rows(error):
        yield {"level": "kernel"}
        raise error

    cell = {"level": "kernel", "backend": "eager"}
    assert kernels.measured(cell, lambda: rows(kernels.Unavailable("no"))) == [{**cell, "unavailable": "no"}]
    assert kernels.measured(cell, lambda: rows(torch.OutOfMemoryError("CUDA out of memory"))) == [
        {**cell, "unavailable": "out of memory"}
    ]
    with pytest.raises(RuntimeError, match="shapes"):
        kernels.measured(cell, lambda: rows(RuntimeError("shapes")))


def test_spread():
    assert kernels.spread("step_ms", [float(n) for n in range(11)]) == {"step_ms": 5.0, "step_ms_p10": 1.0, "step_ms_p90": 9.0}
    assert kernels.spread("step_ms", [3.0]) == {"step_ms": 3.0, "step_ms_p10": 3.0, "step_ms_p90": 3.0}


def test_the_share_of_attention_counts_layers_and_a_recomputed_forward(tmp_path, monkeypatch):
    step = {"level": "step", "layout": "full", "window": "as trained", "backend": "eager", "rows": 2}
    kernel = {"level": "kernel", "backend": "eager", "forward_ms": 1.0, "backward_ms": 2.0}
    cells = [
        {**step, "length": 2048, "checkpointing": "full", "step_ms": 100.0},
        {**step, "length": 2048, "checkpointing": "none", "step_ms": 100.0},
        {**step, "length": 4096, "checkpointing": "full", "step_ms": 100.0},
        {**kernel, "length": 2048, "window": None},
        {**kernel, "length": 2048, "window": 2047, "forward_ms": 50.0},  # the window does not act in such a row
        {**kernel, "length": 4096, "window": 2047},
    ]
    record = {"runs": [{"shape": "phi3-mini", "window": 2047, "kernel_tokens": 16384}], "cells": cells}
    (tmp_path / "attention_x_202601.json").write_text(json.dumps(record))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    shares = report.attention_shares("attention_x_*.json")
    quarter, half = 2 * 2048 / 16384, 2 * 4096 / 16384
    assert [part for _, part in shares] == [32 * 4 * quarter / 100, 32 * 3 * quarter / 100, 32 * 4 * half / 100]
    assert report.passes_half(shares) == "`eager` at 4,096 tokens"
