"""docs/models.md: methods that PEFT lacks, as edits of the loop that apply, train, resume and save."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from qlora.config import TrainConfig
from qlora.data.batch import collate
from qlora.model.demo import tiny_random_model
from qlora.run.signals import Signals
from tests.test_readme import applied, changed_loop, short_run

ROOT = Path(__file__).parents[1]
EDITS = dict(
    re.findall(r"^\*\*([\w -]+)\*\* .*?```diff\n(.*?)```", (ROOT / "docs" / "models.md").read_text(), re.MULTILINE | re.DOTALL)
)
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
    loop = changed_loop(applied(EDITS[name], (ROOT / "train_loop.py").read_text()), tmp_path, monkeypatch, "edited")
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
            assert torch.equal(weights[short], states[0][f"trained.{key}"])


def test_full_fine_tuning_begins_with_the_gradient_of_transformers(tiny, tmp_path, monkeypatch, samples):
    loop = changed_loop(
        applied(EDITS["Full fine-tuning"], (ROOT / "train_loop.py").read_text()), tmp_path, monkeypatch, "edited"
    )
    loop.main(settings("Full fine-tuning", tmp_path / "run", learning_rate=1e-5), Signals())
    first = events(tmp_path / "run", "step")[0]
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
