"""Whole jobs: what a process printed becomes a row, and rows become a table."""

import json
import sys

import pytest

from benchmarks import end_to_end, tables

ENVIRONMENT = {
    "device": "card",
    "commit": "0" * 40,
    "packages": dict.fromkeys(("torch", "transformers", "peft", "bitsandbytes"), "1"),
}
OURS = "Time:         3.0 s (start 1.0, data and checks 0.5, steps 1.5)"
THEIRS = 'PHASES {"start": 1.04, "steps": 4.0}'


@pytest.mark.parametrize(
    ("output", "phases"),
    [(OURS, {"start": 1.0, "data and checks": 0.5, "steps": 1.5}), (THEIRS, {"start": 1.0, "steps": 4.0})],
)
def test_what_a_job_prints_becomes_its_phases(tmp_path, monkeypatch, output, phases):
    script = f"import pathlib; pathlib.Path('adapter_model.safetensors').touch(); print('before'); print({output!r})"
    script = f"import os; os.chdir({str(tmp_path)!r}); {script}"
    monkeypatch.setattr(end_to_end, "command_of", lambda *_: ([sys.executable, "-c", script], tmp_path))
    row = end_to_end.time_job("trl", "bundled", tmp_path, 1)
    assert row["phases_s"] == phases and 0 <= row["adapter_s"] <= row["total_s"]


def test_a_job_that_fails_says_why(tmp_path, monkeypatch):
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    monkeypatch.setattr(end_to_end, "command_of", lambda *_: (command, tmp_path))
    assert end_to_end.time_job("trl", "bundled", tmp_path, 1) == {"unavailable": "no such model"}


def test_the_table_has_the_ratio_to_trl_and_the_reason_of_what_failed(tmp_path, monkeypatch):
    cells = [
        {
            "job": "long",
            "contender": "ours_warm",
            "total_s": 30.0,
            "adapter_s": 20.0,
            "phases_s": {"start": 10.0, "steps": 20.0},
        },
        {"job": "long", "contender": "trl", "total_s": 60.0, "adapter_s": 58.0, "phases_s": {"start": 10.0, "steps": 50.0}},
        {"job": "long", "contender": "trl_no_checkpointing", "unavailable": "out of memory"},
    ]
    record = {"environment": ENVIRONMENT, "cells": cells, "note": "Both on one machine."}
    (tmp_path / "end_to_end_card_202601.json").write_text(json.dumps(record))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    text = end_to_end.jobs("end_to_end_card_*.json")
    assert "| long | this loop, warm | 20 | 30 | 0.50 | start 10.0, steps 20.0 |" in text
    assert "| TRL, tuned, no checkpointing | out of memory |" in text and "Both on one machine. `end_to_end_card" in text


@pytest.mark.parametrize("contender", ["ours_warm", "trl", "unsloth_none"])
def test_bytecode_is_cached_and_only_unsloth_sees_its_packages(tmp_path, monkeypatch, contender):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    found = end_to_end.environment_of(contender, tmp_path, tmp_path / "site")
    assert "PYTHONDONTWRITEBYTECODE" not in found and found["PYTHONPYCACHEPREFIX"].startswith(str(tmp_path))
    assert found["PYTHONPATH"].startswith(str(tmp_path / "site")) == (contender == "unsloth_none")
    cold = end_to_end.environment_of("ours_cold", tmp_path, None)
    assert (found["XDG_CACHE_HOME"] == cold["XDG_CACHE_HOME"]) == (contender == "ours_warm")


def test_both_sides_are_asked_for_the_same_steps(tmp_path):
    command, adapter = end_to_end.command_of("ours_cold", "long", tmp_path, 3)
    flags = dict(zip(command[2::2], command[3::2], strict=True))
    arguments = end_to_end.trainer_arguments("long", str(tmp_path), 3)
    for name in (
        "num_train_epochs",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "max_length",
        "learning_rate",
    ):
        assert float(flags["--" + name.replace("_", "-")]) == arguments[name]
    assert adapter == tmp_path / "long-ours_cold" / "adapter"
    command, _ = end_to_end.command_of("unsloth_none", "mixed", tmp_path, 1)
    assert command[-1].endswith(f"unsloth_script('unsloth_none', 'mixed', '{tmp_path}', 1)")
