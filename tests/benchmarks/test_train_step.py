"""The profile of a step: kernels by kind, and the table that is made of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import plan, report, train_step

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT", "matrix products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu>", "matrix products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
        ("void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<96, 128, 64>>", "attention"),
        ("_dequantize", "dequantization"),
        ("void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>", "dequantization"),
        ("triton_poi_fused__scaled_dot_product_cudnn_attention_add_cat_mul", "elementwise and the rest"),
        ("triton_poi_fused__to_copy_mul_nf4_linear_backward_view_0", "elementwise and the rest"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "elementwise and the rest"),
        ("Memset (Device)", "elementwise and the rest"),
    ],
)
def test_kernels_are_told_apart(kernel, kind):
    assert train_step.kind_of(kernel) == kind


def test_the_table_has_a_row_for_each_cell_and_a_profile_where_there_is_one(tmp_path, monkeypatch):
    profile = {
        "dequantization": 13.7,
        "attention": 40.7,
        "matrix products": 198.6,
        "elementwise and the rest": 46.6,
        "idle": 13.0,
    }
    cell = {"attn_implementation": "sdpa", "gradient_checkpointing": "none", "compile": "graphs", "step_ms": 312.6,
            "tokens_per_s": 26206.0, "peak_gb": 12.75, "profile_ms": profile}  # fmt: skip
    old = {key: value for key, value in cell.items() if key not in ("compile", "profile_ms")}
    missing = {
        "attn_implementation": "eager",
        "gradient_checkpointing": "none",
        "compile": "none",
        "unavailable": "no room. At all",
    }
    flags = {"shape": "phi3-mini", "accumulation": 2, "batch": 2, "length": 2048, "dropout": 0.0, "steps": 8}
    packages = dict.fromkeys(("torch", "transformers", "peft", "bitsandbytes"), "1")
    environment = {"device": "a card", "packages": packages, "commit": "0123456789"}
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    record = {"environment": environment, "flags": flags, "cells": [cell, old, missing]}
    (tmp_path / "train_step_x_202611.json").write_text(json.dumps(record))
    text = report.train_step("train_step_*.json")
    assert "| `sdpa` | none | compiled, CUDA graphs | 313 | 26,206 | 12.75 |" in text
    assert (
        "| `sdpa` | none | as written | 313 | 26,206 | 12.75 |" in text and "| `eager` | none | as written | no room |" in text
    )
    assert text.count("| `sdpa` | none | compiled, CUDA graphs | 14 | 41 | 199 | 47 | 13 |") == 1


def test_a_setting_s_prediction_stands_beside_its_peak(tmp_path):
    command = [sys.executable, "benchmarks/plan.py", "--shape", "tiny", "--only", "6", "--out", str(tmp_path / "plan.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for more in ([], ["--missing"]):  # the second has nothing to do
        done = subprocess.run([*command, *more], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        record = json.loads((tmp_path / "plan.json").read_text())
        assert [cell["compile"] for cell in record["cells"]] == ["none"] and bool(more) == (not done.stdout)
    cell = record["cells"][0]
    assert 0.01 < cell["predicted_gb"] < 0.1 < cell["peak_gb"]  # on a CPU that of the process
    assert len(plan.SETTINGS) >= 12 and len({tuple(setting.items()) for setting in plan.SETTINGS}) == len(plan.SETTINGS)


def test_the_table_of_predictions_says_how_far_off_each_is(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.plan_measured("plan_h100_*.json") == "Not measured yet."
    cells = [plan.FIRST | {"predicted_gb": 11.0, "peak_gb": 10.0}]
    cells.append(plan.FIRST | {"predicted_gb": 99.0, "unavailable": "out of memory"})
    packages = dict.fromkeys(("torch", "transformers", "peft", "bitsandbytes"), "1")
    environment = {"device": "NVIDIA H100", "packages": packages, "commit": "x"}
    (tmp_path / "plan_h100_202601.json").write_text(json.dumps({"environment": environment, "runs": [], "cells": cells}))
    text = report.plan_measured("plan_h100_*.json")
    assert "| none | graphs | sdpa | 2 | 2048 | 32 | 11.00 | 10.00 | +10.0% |" in text
    assert "| 99.00 | out of memory |  |" in text
