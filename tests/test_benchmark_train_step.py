"""The profile of a step: kernels by kind, and the table that is made of it."""

import json

import pytest

from benchmarks import report, train_step


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT", "matrix products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu>", "matrix products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
        ("void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<96, 128, 64>>", "attention"),
        ("_dequantize", "dequantisation"),
        ("void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>", "dequantisation"),
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
        "dequantisation": 13.7,
        "attention": 40.7,
        "matrix products": 198.6,
        "elementwise and the rest": 46.6,
        "idle": 13.0,
    }
    cell = {"attn_implementation": "sdpa", "gradient_checkpointing": "none", "compile": "graphs", "step_ms": 312.6,
            "tokens_per_s": 26206.0, "peak_gib": 12.75, "profile_ms": profile}  # fmt: skip
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
