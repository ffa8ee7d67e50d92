"""Loading from bf16 and from NF4: the smoke test, and the tables of the figures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import report

ROOT = Path(__file__).parents[2]
PACKAGES = dict.fromkeys(("torch", "transformers", "peft", "bitsandbytes"), "1")
ENVIRONMENT = {"device": "a card", "packages": PACKAGES, "commit": "x"}


def test_both_folders_are_loaded_and_the_saved_one_is_smaller(tmp_path, monkeypatch):
    command = [
        sys.executable,
        "benchmarks/loading.py",
        "--shape",
        "tiny",
        "--loads",
        "2",
        "--out",
        str(tmp_path / "loading_h100_1.json"),
    ]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    bf16, nf4 = json.loads((tmp_path / "loading_h100_1.json").read_text())["cells"]
    assert (bf16["stored"], nf4["stored"]) == ("bf16", "NF4") and len(nf4["load_s"]) == 2
    assert nf4["disk_gb"] < 0.5 * bf16["disk_gb"] and nf4["model_gb"] == pytest.approx(bf16["model_gb"])
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    text = report.loading("loading_h100_*.json")
    assert "not measured" not in text
    assert text.count("\n| bf16 |") == 1 and text.count("\n| NF4 |") == 1


def test_the_table_of_tokens_says_what_each_costs(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.tokens("tokens_h100_*.json") == "Not measured yet." == report.loading("loading_h100_*.json")
    cell: dict = {"gradient_checkpointing": "full", "compile": "graphs", "tokens_per_s": 1000.0}
    cell["profile_ms"] = {"matrix products": 75.0, "idle": 25.0}
    cells = [cell | {"batch": 1, "step_ms": 100.0, "peak_gb": 3.0}, cell | {"batch": 2, "step_ms": 150.0, "peak_gb": 4.0}]
    record = {
        "environment": ENVIRONMENT,
        "flags": {"length": 1024, "batch": [1, 2, 4]},
        "cells": [*cells, {"unavailable": "no room"}],
    }
    (tmp_path / "tokens_h100_1.json").write_text(json.dumps(record))
    text = report.tokens("tokens_h100_*.json")
    assert "| 1,024 | 100 | 97.7 | 1,000 | 3.00 |  |" in text and "| 2,048 | 150 | 73.2 | 1,000 | 4.00 | 977 |" in text
    assert "| tokens | matrix products | idle |" in text and text.count("| 75 (75%) | 25 (25%) |") == 2
    assert "Not measured yet: 4,096 tokens." in text
