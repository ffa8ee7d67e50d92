"""The attention benchmark: one cell of each kind, merging, and that no kernel is timed under another one's name."""

import json

import pytest
import torch

from benchmarks.attention import __main__ as benchmark
from benchmarks.attention import kernels, model, tables
from benchmarks.harness import Output, Part
from qlora.errors import ConfigError

# 64 tokens in a step.
SMALL = {"shape": "tiny", "lengths": (16,), "window": 15, "kernel_tokens": 64, "batch": 4, "steps": 3}
STEP = {"level": "step", "backend": "sdpa", "length": 16, "window": "as trained", "layout": "full", "checkpointing": "none"}


def run(out, missing=False, **options):
    output, part = Output(out=out, commit="c" * 40), Part(missing=missing)
    benchmark.main(benchmark.Options(output=output, part=part, **SMALL | options))
    return json.loads(out.read_text())


def test_a_cell_of_each_level_runs_on_a_cpu_and_runs_merge(tmp_path):
    out = tmp_path / "attention.json"
    first = run(out, levels=("kernel", "step"), backends=("sdpa", "flash_attention_2"), packing=False)["cells"]
    refused = [cell for cell in first if cell["backend"] == "flash_attention_2"]
    assert {cell["level"] for cell in refused} == {"kernel", "step"}
    assert all("it needs a CUDA GPU" in cell["unavailable"] for cell in refused)
    timed = {(cell["level"], cell["window"]): cell for cell in first if cell["backend"] == "sdpa"}
    assert set(timed) == {("kernel", None), ("kernel", 15), ("step", "as trained")}
    assert all(cell["ran"] == ["sdpa_flash"] and cell["commit"] == "c" * 40 for cell in timed.values())
    kernel, step = timed["kernel", None], timed["step", "as trained"]
    assert kernel["forward_ms_p10"] <= kernel["forward_ms"] <= kernel["forward_ms_p90"] and kernel["rows"] == 4
    assert step["tokens"] == step["positions"] == 64 and step["step_ms"] > 0 and step["peak_gb"] > 0

    record = run(out, levels=("kernel", "parity"), backends=("sdpa",), missing=True)
    assert [cell for cell in record["cells"] if cell["level"] != "parity"] == first  # none was measured again
    parity = [cell for cell in record["cells"] if cell["level"] == "parity"]
    assert {(cell["length"], cell["layout"]) for cell in parity} == {
        (length, layout) for length in (14, 15, 16, 17, 32) for layout in ("unpadded", "right-padded", "packed")
    }
    assert all(0 < cell["gradient_relative"] < 0.05 and abs(cell["loss_difference"]) < 0.01 for cell in parity)
    assert all(0 < cell["logits_relative"] < 0.05 for cell in parity)
    assert {cell.get("leak", 0.0) for cell in parity} == {0.0}
    assert [cell["same_bits_again"] for cell in parity if cell["length"] == 16] == [True] * 3
    assert len(record["runs"]) == 2 and record["runs"][1]["backends"] == record["runs"][1]["kernels"] == ["sdpa"]
    assert record["environment"]["packages"]["torch"] and record["matmul_tflops"] > 0


def test_padded_and_packed_steps_train_on_the_same_samples(tiny, tmp_path):
    (tmp_path / "model").symlink_to(tiny)
    grid = benchmark.grid_of(benchmark.Options(**SMALL | {"window": 23}, backends=("sdpa",)), on_gpu=False)
    cells = {cell["layout"]: cell for cell in benchmark.step_cells(grid)}
    assert set(cells) == {"full", "padded", "packed"}
    [padded], [packed] = (list(model.step(cells[layout], grid, tmp_path)) for layout in ("padded", "packed"))
    assert padded["tokens"] == packed["tokens"] < packed["positions"] < padded["positions"]
    assert padded["first_loss"] == pytest.approx(packed["first_loss"], rel=0.01)


def test_a_gpu_gets_more_cells_than_a_cpu():
    grid = benchmark.grid_of(benchmark.Options(), on_gpu=True)
    steps = list(benchmark.step_cells(grid))
    assert len(steps) == len({json.dumps(cell) for cell in steps}) == 4 * (2 * 6 - 1 + 2) + 3 + 1 + 1
    theirs = [(cell["backend"], cell["length"]) for cell in steps if cell["window"] == "left to transformers"]
    around = [("sdpa", 2046), ("sdpa", 2047), ("sdpa", 2048)]
    assert theirs == [*around, ("flash_attention_2", 2048), ("eager", 2048)]
    assert {(cell["rows"], cell["layout"]) for cell in steps if cell["layout"] != "full"} == {(8, "padded"), (4, "packed")}
    # Beyond the window, each length is measured with it and without.
    assert len(list(benchmark.kernel_cells(grid))) == (6 + 4) * len(kernels.KERNELS)


def test_a_cell_measured_again_replaces_the_old_one_and_a_failed_one_is_measured_again(tmp_path, monkeypatch, capsys):
    out, options = tmp_path / "attention.json", {"levels": ("kernel",), "backends": ("sdpa",), "window": 63}
    rows = iter(({"forward_ms": 1.0}, {"failed": "NameError"}, {"forward_ms": 2.0}, {"forward_ms": 3.0}))
    monkeypatch.setattr(benchmark, "rows_of", lambda cell, **_: [{**cell, **next(rows)}])
    with pytest.raises(SystemExit, match="1 cells failed, the first with: NameError"):
        run(out, **options | {"lengths": (16, 32)})
    known = run(out, **options | {"lengths": (16, 32)}, missing=True)["cells"]
    assert [cell["forward_ms"] for cell in known] == [1.0, 2.0]
    assert [cell["forward_ms"] for cell in run(out, **options)["cells"]] == [2.0, 3.0]
    assert [json.loads(line)["length"] for line in capsys.readouterr().out.splitlines()] == [16, 32, 32, 16]


def test_rows_belong_to_the_cell_that_they_were_measured_for():
    assert benchmark.is_of({**STEP, "rows": 4, "step_ms": 1.0}, {**STEP, "rows": 4})
    assert not any(benchmark.is_of(STEP, {**STEP, **other}) for other in ({"rows": 4}, {"window": None}, {"length": 32}))
    whole = {"level": "parity", "backend": "sdpa", "lengths": [62]}
    assert benchmark.is_of({"level": "parity", "backend": "sdpa", "length": 62, "layout": "packed"}, whole)
    assert benchmark.is_of({**whole, "failed": "late"}, whole)
    assert not benchmark.is_of({"level": "parity", "backend": "eager", "length": 62, "layout": "packed"}, whole)


def test_a_cell_whose_process_dies_is_a_row(tmp_path):
    cell = {"level": "kernel", "backend": "eager", "length": 16, "window": None, "rows": 1}
    [row] = benchmark.rows_of(cell, {"shape": "no such"}, tmp_path, 60.0)
    assert row.pop("failed").endswith("KeyError: 'no such'") and row.pop("seconds") > 0 and row == cell


def test_no_kernel_is_timed_under_the_name_of_another():
    q, k, v = (torch.randn(1, 16, 2, 32, requires_grad=True) for _ in range(3))  # [B, T, H, d] each
    for name in kernels.ON_A_CPU:
        attend = kernels.KERNELS[name](q, None)
        ran = "sdpa_flash" if name == "sdpa" else name
        assert kernels.verified(name, lambda attend=attend: attend(q, k, v).sum().backward())["ran"] == [ran]
        for wrong in {"eager", "sdpa_flash", "sdpa_math", "flash_attention_2"} - {ran}:
            with pytest.raises(kernels.Unavailable, match=f"ran {ran} instead"):
                kernels.verified(wrong, lambda attend=attend: attend(q, k, v))
    with pytest.raises(kernels.Unavailable, match="no attention kernel that is known"):
        kernels.verified("sdpa", lambda: q + k)


@pytest.mark.parametrize("window", [None, 5])
def test_all_kernels_compute_the_same(window):
    q, k, v = (torch.randn(2, 16, 2, 32) for _ in range(3))  # [B, T, H, d] each
    first, *others = (kernels.KERNELS[name](q, window)(q, k, v) for name in ("sdpa_math", "eager", "sdpa", "sdpa_flash"))
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-4, atol=1e-5)


def test_what_cannot_run_or_runs_out_of_memory_is_a_row_and_a_mistake_is_not(tmp_path):
    cell = {"level": "kernel", "backend": "eager"}

    def measured(error):
        def level(cell, grid, scratch):
            yield cell
            raise error

        return kernels.measured(level, cell, {}, tmp_path)

    assert measured(kernels.Unavailable("no")) == {"unavailable": "no"}
    assert measured(ConfigError("no")) == {"unavailable": "no"}
    assert measured(torch.OutOfMemoryError("CUDA out of memory")) == {"unavailable": "out of memory"}
    with pytest.raises(RuntimeError, match="shapes"):
        measured(RuntimeError("shapes"))


def test_a_kernel_that_is_not_installed_is_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "ON_A_CPU", ("flash_attention_4",))
    cell = {"level": "kernel", "backend": "flash_attention_4", "length": 16, "window": None, "rows": 1}
    found = kernels.measured(kernels.kernel, cell, {"shape": "tiny"}, tmp_path)
    assert found == {"unavailable": "No module named 'flash_attn'"}


def test_the_share_of_attention_counts_layers_and_a_recomputed_forward():
    step = {**STEP, "backend": "eager", "rows": 2, "step_ms": 100.0}
    kernel = {"level": "kernel", "backend": "eager", "forward_ms": 1.0, "backward_ms": 2.0}
    cells = [
        {**step, "length": 2048, "checkpointing": "full"},
        {**step, "length": 2048, "checkpointing": "none"},
        {**step, "length": 4096, "checkpointing": "full"},
        {**kernel, "length": 2048, "window": None},
        {**kernel, "length": 2048, "window": 2047, "forward_ms": 50.0},  # the window does not act in such a row
        {**kernel, "length": 4096, "window": 2047},
    ]
    shares = tables.shares({"runs": [{"shape": "phi3-mini", "window": 2047, "kernel_tokens": 16384}], "cells": cells})
    quarter, half = 2 * 2048 / 16384, 2 * 4096 / 16384
    assert [cell["share"] for cell in shares] == [32 * 4 * quarter / 100, 32 * 3 * quarter / 100, 32 * 4 * half / 100]
    assert tables.passes_half(shares) == "`eager` at 4,096 tokens"


def test_a_table_says_what_was_not_measured_and_why():
    cells = [
        {"backend": "eager", "length": 512, "window": None, "unavailable": "out of memory"},
        {"backend": "eager", "length": 1024, "window": None, "ms": 2.0},
        {"backend": "varlen", "length": 512, "window": None, "failed": "late. Later than that"},
        {"backend": "varlen", "length": 1024, "window": 511, "ms": 1.0},
    ]
    lines = tables.pivot(cells, {"tokens": "length", "window": "window"}, "{ms:.1f} ms").splitlines()
    assert [[text.strip() for text in line.split("|")[1:-1]] for line in lines[2:5]] == [
        ["512", "none", "out of memory", "-"],
        ["1,024", "none", "2.0 ms", "not measured"],
        ["1,024", "511", "not measured", "1.0 ms"],
    ]
    assert lines[5:] == ["", "`varlen`: late"]
