"""docs/models.md: methods that PEFT lacks, as edits of the loop that apply, train, resume and save."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from benchmarks import methods
from qlora.config import TrainConfig
from qlora.data.batch import collate
from qlora.model.demo import tiny_random_model
from qlora.run.signals import Signals
from tests.test_readme import changed_loop, short_run

ROOT = Path(__file__).parents[1]
EDITS = methods.edits()
QUANTIZATION = {"Bottleneck adapters": "nf4", "Full fine-tuning": "none"}


def settings(name: str, folder: Path, **changes) -> TrainConfig:
    return dataclasses.replace(short_run(folder, 4), quantization=QUANTIZATION[name], lora_dropout=0.0, **changes)


def events(folder: Path, kind: str) -> list[dict]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["event"] == kind]


def test_there_are_two():
    assert EDITS.keys() == QUANTIZATION.keys()


@pytest.mark.parametrize("name", QUANTIZATION)
def test_each_applies_learns_resumes_bit_for_bit_and_saves(tiny, tmp_path, monkeypatch, name):
    loop = changed_loop(methods.edited(EDITS[name], (ROOT / "train_loop.py").read_text()), tmp_path, monkeypatch, "edited")
    run, resumed = tmp_path / "run", tmp_path / "resumed"
    loop.main(settings(name, run, learning_rate=2e-3), Signals())
    loop.main(settings(name, resumed, learning_rate=2e-3, resume=run / "checkpoints" / "step-000004"), Signals())
    losses = [row["eval_loss"] for row in events(run, "eval")]
    assert losses[-1] < losses[0] - 0.05
    states = [load_file(each / "checkpoints" / "step-000008" / "trainer_state.safetensors") for each in (run, resumed)]
    assert states[0].keys() == states[1].keys() and all(torch.equal(each, states[1][key]) for key, each in states[0].items())
    trained = {key.removeprefix("trained.") for key in states[0] if key.startswith("trained.")}
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    assert not any(tensor.any() for key, tensor in adapter.items() if "lora_B" in key)
    if name == "Bottleneck adapters":
        assert len(trained) == 8 and all("mlp.bottleneck" in key for key in trained)  # two layers, two products with biases
        saved = load_file(run / "bottlenecks" / "model.safetensors")
        assert saved.keys() == trained and all(torch.equal(saved[key], states[0][f"trained.{key}"]) for key in trained)
    else:
        assert len(trained) == 13  # two layers, four products and two norms each, and the last norm
        model = transformers.AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.bfloat16)
        weights = model.state_dict()
        for key in trained:
            short = key.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(weights[short], states[0][f"trained.{key}"].to(torch.bfloat16))


def test_full_fine_tuning_begins_with_the_gradient_of_transformers(tiny, tmp_path, monkeypatch, samples):
    loop = changed_loop(
        methods.edited(EDITS["Full fine-tuning"], (ROOT / "train_loop.py").read_text()), tmp_path, monkeypatch, "edited"
    )
    loop.main(settings("Full fine-tuning", tmp_path / "run", learning_rate=1e-5), Signals())
    first = events(tmp_path / "run", "step")[0]
    state = load_file(tmp_path / "run" / "checkpoints" / "step-000008" / "trainer_state.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_random_model(), dtype=torch.bfloat16).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("embed" not in name and "lm_head" not in name)
    batch = collate([sample for sample in samples if sample.line in first["lines"]])
    assert len(batch.lines) == len(first["lines"])
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=batch.input_ids, use_cache=False).logits.float()  # [B, T, V]
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())  # []
    loss.backward()
    norms = [parameter.grad.float().norm() for parameter in model.parameters() if parameter.requires_grad]
    assert first["loss"] == pytest.approx(loss.item(), rel=2e-3)
    assert first["grad_norm"] == pytest.approx(torch.stack(norms).norm().item(), rel=0.02)
    before = {f"trained.base_model.model.{name}": parameter for name, parameter in model.named_parameters()}
    moved = [
        (each != before[key.replace(".base_layer", "")].float()).float().mean().item()
        for key, each in state.items()
        if key.startswith("trained.")
    ]
    assert len(moved) == 13 and min(moved) > 0.9  # at this rate, in fp32; in bf16 most updates would round away


def test_a_method_is_trained_and_judged_in_processes_of_its_own(tiny):
    options = methods.Options(model="tiny-random", max_steps=1)
    row = methods.run("full fine-tuning, bf16", 1e-5, 0, options)
    assert "failed" not in row, row["failed"]
    assert row["trained_parameters"] > 200_000 and row["right"] == 0 and row["prompts"] == 8 and row["eval_loss"] > 1
    wrong = methods.run("LoRA, paged_adamw_8bit", 4e-4, 0, options)
    assert wrong.keys() == {"method", "learning_rate", "seed", "failed"} and "no CUDA GPU" in wrong["failed"]


def test_the_table_has_the_rate_with_the_lowest_mean_eval_loss(monkeypatch):
    def row(rate: float, seed: int, loss: float, right: int | None = 7) -> dict:
        costs = {"trained_parameters": 1000, "step_s": 0.5, "total_s": 60.0, "peak_gb": 1.5}
        return {"method": "LoRA", "learning_rate": rate, "seed": seed, "eval_loss": loss, "right": right, **costs}

    cells = [row(2e-4, 0, 0.01), row(2e-4, 1, 0.05), row(4e-4, 0, 0.02), row(4e-4, 1, 0.03, 8), row(8e-4, 0, float("nan"))]
    environment = {"device": "CPU", "packages": {"torch": "2"}, "commit": "abc", "device_memory_gb": None}
    record = {"environment": environment, "runs": [], "cells": [*cells, {**row(1e-4, 0, 0.0), "failed": "why"}]}
    monkeypatch.setattr(methods, "load", lambda pattern: ("methods.json", record))
    monkeypatch.setattr(methods, "source", lambda *_: "")
    (line,) = (line for line in methods.methods("methods_*.json").splitlines() if line.startswith("| LoRA "))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["LoRA", "1,000", "0.0004", "0.0250 (0.0200 to 0.0300)", "7.5 (7 to 8)", "0.500", "60", "1.50", "2"]
    record["cells"][2]["right"] = None  # which no command can judge
    assert "| - " in methods.methods("methods_*.json")


def test_a_hunk_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="these lines occur 2 times in the text"):
        methods.edited("@@\n-a\n+b\n", "a\na\n")
