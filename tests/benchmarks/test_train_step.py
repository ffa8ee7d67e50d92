"""The profile of a step: kernels by kind, and the table that is made of it."""

import json

import pytest

from benchmarks import plan, tables, train_step
from benchmarks.harness import Output, Part

PACKAGES = dict.fromkeys(("torch", "transformers", "peft", "bitsandbytes"), "1")
ENVIRONMENT = {"device": "a card", "packages": PACKAGES, "commit": "0123456789"}


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
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    record = {"environment": ENVIRONMENT, "flags": flags, "cells": [cell, old, missing]}
    (tmp_path / "train_step_x_202611.json").write_text(json.dumps(record))
    text = train_step.steps("train_step_*.json")
    assert "| `sdpa` | none | compiled, CUDA graphs | 313 | 26,206 | 12.75 |" in text
    assert (
        "| `sdpa` | none | as written | 313 | 26,206 | 12.75 |" in text and "| `eager` | none | as written | no room |" in text
    )
    assert text.count("| `sdpa` | none | compiled, CUDA graphs | 14 | 41 | 199 | 47 | 13 |") == 1


def test_each_backend_is_a_cell_and_one_that_cannot_run_says_why(tmp_path):
    out = tmp_path / "out.json"
    options = {"shape": "tiny", "length": 32, "steps": 2, "checkpointing": ("full",)}
    train_step.main(train_step.Options(output=Output(out), backends=("sdpa", "flash_attention_2"), **options))
    record = json.loads(out.read_text())
    sdpa, flash = record["cells"]
    assert (sdpa["attn_implementation"], sdpa["compile"], sdpa["batch"]) == ("sdpa", "none", 2)
    assert sdpa["finite"] and sdpa["step_ms"] > 0 and sdpa["profile_ms"] is None and sdpa["last_loss"] < sdpa["first_loss"]
    assert flash["attn_implementation"] == "flash_attention_2" and "needs a CUDA GPU" in flash["unavailable"]
    assert record["environment"]["packages"]["torch"] and record["flags"]["length"] == 32


def test_a_prediction_is_recorded_beside_its_peak(tmp_path, monkeypatch, capsys):
    assert len(plan.SETTINGS) >= 12 and len({tuple(setting.items()) for setting in plan.SETTINGS}) == len(plan.SETTINGS)
    monkeypatch.setattr(plan, "SETTINGS", (plan.FIRST, plan.FIRST | {"compile": "none", "batch": 1, "length": 64}))
    for missing in (False, True):  # the second run has nothing to do
        plan.main(Output(tmp_path / "plan.json"), Part(missing), shape="tiny", only=(1,))
        record = json.loads((tmp_path / "plan.json").read_text())
        assert [cell["compile"] for cell in record["cells"]] == ["none"] and missing == (not capsys.readouterr().out)
    cell = record["cells"][0]
    assert 0.001 < cell["predicted_gb"] < 0.1 < cell["peak_gb"]  # on a CPU that of the process


def test_the_table_of_predictions_says_how_far_off_each_is(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    cells = [plan.FIRST | {"predicted_gb": 11.0, "peak_gb": 10.0}]
    cells.append(plan.FIRST | {"predicted_gb": 99.0, "unavailable": "out of memory"})
    (tmp_path / "plan_h100_202601.json").write_text(json.dumps({"environment": ENVIRONMENT, "runs": [], "cells": cells}))
    text = plan.predictions("plan_h100_*.json")
    assert "| none | graphs | sdpa | 2 | 2048 | 32 | 11.00 | 10.00 | +10.0% |" in text
    assert "| 99.00 | out of memory |  |" in text


def test_the_table_of_tokens_says_what_each_costs(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    cell: dict = {"gradient_checkpointing": "full", "compile": "graphs", "tokens_per_s": 1000.0}
    cell["profile_ms"] = {"matrix products": 75.0, "idle": 25.0}
    cells = [cell | {"batch": 1, "step_ms": 100.0, "peak_gb": 3.0}, cell | {"batch": 2, "step_ms": 150.0, "peak_gb": 4.0}]
    flags = {"length": 1024, "batch": [1, 2, 4]}
    record = {"environment": ENVIRONMENT, "flags": flags, "cells": [*cells, {"unavailable": "no room"}]}
    (tmp_path / "tokens_h100_1.json").write_text(json.dumps(record))
    text = train_step.tokens("tokens_h100_*.json")
    assert "| 1,024 | 100 | 97.7 | 1,000 | 3.00 |  |" in text and "| 2,048 | 150 | 73.2 | 1,000 | 4.00 | 977 |" in text
    assert "| tokens | matrix products | idle |" in text and text.count("| 75 (75%) | 25 (25%) |") == 2
    assert "Not measured yet: 4,096 tokens." in text
