"""Cells in processes of their own, result files, and that the harness builds the model of the loop."""

import functools
import json
import os
import signal
import sys
import time

import pytest
import safetensors.torch
import torch

import train_loop
from benchmarks import harness
from qlora.config import TrainConfig
from qlora.data.batch import batched, epoch_rows, training_batches
from qlora.model.loss import read_head, token_loss_sum
from qlora.model.optimizer import build_optimizer
from qlora.run.signals import Signals
from qlora.speed.accelerate import accelerate
from tests.helpers import SHORT_EVAL, SHORT_TRAIN, adapted_model


def test_a_cell_runs_in_another_process_and_gives_back_what_the_function_returns(tmp_path):
    assert harness.Cell(os.getpid).result() != os.getpid()
    assert harness.Cell(os.getcwd, folder=tmp_path).result() == str(tmp_path)
    assert harness.Cell(sum, [1, 2, 3], imports=["json"]).result() == 6


def test_packages_of_a_site_come_first(tmp_path):
    (tmp_path / "tabulate.py").write_text("def tabulate(rows):\n    return 'of the site'\n")
    assert harness.Cell(import_and_call, "tabulate", "tabulate", site=tmp_path).result() == "of the site"


def import_and_call(module: str, function: str):
    import importlib

    return getattr(importlib.import_module(module), function)([])


def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n3 GB")


def killed():
    print("no room", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def silent():
    os._exit(3)


@pytest.mark.parametrize(
    ("function", "arguments", "told"),
    [
        (killed, (), "no room"),
        (silent, (), "ended with status 3"),
        (out_of_memory, (), "out of memory"),
        (os.listdir, ("/no/such/place",), "FileNotFoundError.*'place'"),
        (sys.exit, ("refused",), "SystemExit: refused"),
    ],
)
def test_a_cell_that_fails_says_why_without_a_folder_of_this_machine(function, arguments, told):
    with pytest.raises(harness.Failed, match=told) as failure:
        harness.Cell(function, *arguments).result()
    assert "/no/such" not in str(failure.value)


def test_what_a_cell_writes_to_a_log_of_the_caller_says_why_it_failed(tmp_path):
    with pytest.raises(harness.Failed, match="no room"):
        harness.Cell(killed, log=tmp_path / "log").result()
    assert (tmp_path / "log").read_text() == "no room\n"


def test_an_import_that_fails_and_a_cell_that_takes_too_long_are_failures():
    with pytest.raises(harness.Failed, match="No module named 'no_such'"):
        harness.Cell(os.getpid, imports=["no_such"]).result()
    cell = harness.Cell(time.sleep, 600)
    with pytest.raises(harness.Failed, match=r"not done in 0\.1 s"):
        cell.result(0.1)
    assert cell.process.exitcode == -signal.SIGKILL


def test_a_reason_is_the_last_two_lines():
    assert harness.reason('one\ntwo\n  File "/home/me/site/trl/x.py", line 3\nValueError: no /home/me/model\n\n') == (
        'File "x.py", line 3 / ValueError: no model'
    )
    assert harness.reason("\n") == ""


def test_a_file_of_another_machine_is_not_merged_into(tmp_path):
    path, environment = tmp_path / "x.json", {"device": "NVIDIA H100 80GB HBM3", "packages": {"torch": "2"}}
    assert harness.reopened(path, environment, {})["cells"] == []
    record = {"environment": environment, "runs": [{"shape": "tiny"}], "cells": [{"step_ms": 1, "peak_gib": 1.0}]}
    path.write_text(json.dumps(record))
    assert harness.reopened(path, environment, {"shape": "tiny"})["cells"] == [{"step_ms": 1, "peak_gb": 1.073741824}]
    for other in ({**environment, "device": "x86_64 CPU"}, {**environment, "packages": {"torch": "3"}}):
        with pytest.raises(SystemExit, match="has another"):
            harness.reopened(path, other, {})
    with pytest.raises(SystemExit, match="another shape: tiny"):
        harness.reopened(path, environment, {"shape": "demo"})


def test_a_result_file_grows_by_runs_and_cells(tmp_path, capsys):
    output = harness.Output(out=tmp_path / "new" / "x.json", commit="c" * 40)
    for number in range(2):
        file = harness.ResultFile("x", output)
        file.begin_run({"shape": "tiny"}, steps=number)
        file.record["cells"].append({"cell": number})
        file.write(file.record["cells"][-1])
    record = json.loads((tmp_path / "new" / "x.json").read_text())
    assert [run["steps"] for run in record["runs"]] == [0, 1] and record["cells"] == [{"cell": 0}, {"cell": 1}]
    assert {run["commit"] for run in record["runs"]} == {"c" * 40} and record["environment"]["packages"]["torch"]
    assert capsys.readouterr().out == '{"cell": 0}\n{"cell": 1}\n'
    assert file.is_late(0.0) and not file.is_late(None) and not file.is_late(60.0) and not file.on_gpu


def test_names_of_result_files():
    assert [harness.result_path("x", name).name[:-12] for name in ("NVIDIA H200", "x86_64 CPU, 2 cores", "RTX")] == [
        "x_h200",
        "x_cpu",
        "x_gpu",
    ]


def test_spread():
    assert harness.spread("step_ms", [float(n) for n in range(11)]) == {"step_ms": 5.0, "step_ms_p10": 1.0, "step_ms_p90": 9.0}
    assert harness.spread("step_ms", [3.0]) == {"step_ms": 3.0, "step_ms_p10": 3.0, "step_ms_p90": 3.0}


def test_loop_harness_and_helpers_build_and_train_the_same_adapters(tiny, tmp_path, samples):
    """The same five calls, written three times: for people, for benchmarks, for tests."""
    flags = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "learning_rate": 1e-3, "max_steps": 2}
    files = {"train_file": str(SHORT_TRAIN), "eval_file": str(SHORT_EVAL)}
    config = TrainConfig(model="tiny-random", output_dir=tmp_path / "run", warmup_ratio=0.0, **files, **flags)
    train_loop.main(config, Signals())
    loop = safetensors.torch.load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")

    def trained(config, trainee):
        batches = training_batches(samples, epoch_rows(samples, config, 1), config, pin=False)
        trainee.model.train()
        for step, micro_batches in zip(range(2), batched(batches, config.gradient_accumulation_steps), strict=False):
            rate = config.learning_rate * train_loop.lr_multiplier(step, 0, 2)
            train_loop.train_step(
                trainee.decoder, trainee.optimizer, micro_batches, trainee.loss_sum, rate, config.max_grad_norm
            )
        named = trainee.model.named_parameters()
        return {name.replace(".default", ""): parameter.detach() for name, parameter in named if parameter.requires_grad}

    config, trainee = harness.build(TrainConfig(model=str(tiny), warmup_ratio=0.0, **flags))
    ours = trained(config, trainee)
    model = adapted_model(config)
    loss_sum = functools.partial(token_loss_sum, head=read_head(model))
    optimizer = build_optimizer({name: each for name, each in model.named_parameters() if each.requires_grad}, config)
    theirs = trained(config, train_loop.Trainee(model, accelerate(model, config), loss_sum, optimizer))
    assert loop.keys() == ours.keys() == theirs.keys()
    assert all(torch.equal(loop[name], ours[name]) and torch.equal(loop[name], theirs[name]) for name in loop)
    assert all(value.any() for value in loop.values())  # B has moved
