"""Training in fp16: the numbers of bf16, a loss scale that finds its size, and a run that resumes with it."""

import dataclasses
import functools
import json
import math

import pytest
import torch
from safetensors.torch import load_file

from qlora.cli import main as any_command
from qlora.cli import train as command_line
from qlora.config import TrainConfig
from qlora.data.batch import iter_batches
from qlora.errors import ExitCode, NonFiniteError
from qlora.model import attention, optimizer
from qlora.model.load import load_nf4_model
from qlora.model.lora import add_lora
from qlora.model.loss import read_head, token_loss_sum
from qlora.model.optimizer import build_optimizer, loss_scale, update_loss_scale
from qlora.model.precision import compute_dtype
from qlora.model.targets import audit_targets
from qlora.run.folder import RunFolder
from tests.helpers import CPU, SHORT_DATA, decoder_of, prepared, wake_adapters
from train_loop import train_step


def trainee(config, precision: str):
    config = dataclasses.replace(config, precision=precision, attn_implementation="sdpa", lora_dropout=0.0)
    torch.manual_seed(0)
    model = load_nf4_model(config.model, config, "sdpa", CPU)
    model = add_lora(model, config, audit_targets(model, config), config.model).train()
    wake_adapters(model)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return prepared(model, config, "none"), build_optimizer(parameters, config), config


def steps(config, samples, precision: str, scale: float | None = None):
    """Losses and gradient norms of three steps, and the adapters before and after."""
    model, optimizer, config = trainee(config, precision)
    if scale is not None:
        optimizer.param_groups[0]["loss_scale"] = scale
    loss_sum, found = functools.partial(token_loss_sum, head=read_head(model)), []
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in adapters]
    with attention.for_training(model, config):
        for rows in ([0, 1, 2], [3, 4], [5]):
            micro_batches = list(iter_batches(samples, rows, 2))
            loss, norm = train_step(decoder_of(model), optimizer, micro_batches, loss_sum, 1e-3, 1.0)
            found.append((loss.item(), norm.item()))
    return found, before, adapters, optimizer


def test_losses_and_gradients_are_those_of_bf16(config, samples):
    """fp16 has three bits more than bf16 to round to, so bf16's rounding is the tolerance."""
    in_bf16, _, _, _ = steps(config, samples, "bf16")
    in_fp16, before, after, optimizer = steps(config, samples, "fp16")
    for one, other in zip(in_fp16, in_bf16, strict=True):
        assert one == pytest.approx(other, rel=0.01) and one != other
    assert loss_scale(optimizer) == 2.0**16
    assert not any(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_a_power_of_two_changes_no_bit(config, samples):
    """As long as nothing is rounded to 0, the scale is exact."""
    one, _, adapters, _ = steps(config, samples, "fp16", scale=2.0**12)
    other, _, others, _ = steps(config, samples, "fp16", scale=2.0**13)
    assert [norm for _, norm in one] == pytest.approx([norm for _, norm in other], rel=1e-3)
    assert one[0][0] == other[0][0]
    assert max((a - b).abs().max().item() for a, b in zip(adapters, others, strict=True)) < 2e-4


def test_gradients_that_overflow_leave_the_weights_and_halve_the_scale(config, samples):
    found, before, after, optimizer = steps(config, samples, "fp16", scale=2.0**40)
    assert all(math.isfinite(loss) and not math.isfinite(norm) for loss, norm in found)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert loss_scale(optimizer) == 2.0**37


def test_the_scale_doubles_after_many_steps_and_never_falls_below_one(monkeypatch):
    monkeypatch.setattr(optimizer, "GROWTH_STEPS", 3)
    adamw = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    one, infinite = torch.tensor(1.0), torch.tensor(math.inf)
    update_loss_scale(adamw, one, infinite)  # has none
    assert loss_scale(adamw) == 1.0
    adamw.param_groups[0] |= {"loss_scale": 4.0, "steps_at_scale": 0}
    scales = []
    for finite in (True, True, False, True, True, True, True, False, False):
        update_loss_scale(adamw, one, one if finite else infinite)
        scales.append(loss_scale(adamw))
    assert scales == [4, 4, 2, 2, 2, 4, 4, 2, 1]
    with pytest.raises(NonFiniteError, match="overflow in fp16 even at a loss scale of 1"):
        update_loss_scale(adamw, one, infinite)
    update_loss_scale(adamw, infinite, infinite)  # which no scale mends


def test_auto_is_bf16_where_there_is_bf16(monkeypatch):
    gpu = torch.device("cuda", 0)
    for capability, dtype in (((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert compute_dtype(TrainConfig(), gpu) == dtype
        assert compute_dtype(TrainConfig(precision="bf16"), gpu) == torch.bfloat16
    assert compute_dtype(TrainConfig(), CPU) == torch.bfloat16
    assert compute_dtype(TrainConfig(precision="fp16"), CPU) == torch.float16


def test_a_run_in_fp16_skips_overflows_resumes_bit_for_bit_and_is_used(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(optimizer, "FIRST_LOSS_SCALE", 2.0**26)  # the first steps overflow
    flags = ["--model", "tiny-random", "--precision", "fp16", "--lora-r", "4", "--max-length", "300", *SHORT_DATA]
    flags += ["--max-steps", "12", "--save-steps", "3", "--save-total-limit", "9", "--learning-rate", "1e-2"]
    run, resumed = tmp_path / "run", tmp_path / "resumed"
    assert command_line([*flags, "--output-dir", str(run)]) == 0
    told = capsys.readouterr().out
    assert "Precision: fp16 (as asked)" in told and "Step 1 was skipped: its gradients overflow in fp16" in told
    for step in (3, 9):  # before and after the scale has been found
        half = run / "checkpoints" / f"step-{step:06d}"
        folder = resumed / str(step)
        assert command_line([*flags, "--output-dir", str(folder), "--resume", str(half)]) == 0
        ours, theirs = (load_file(each / "adapter" / "adapter_model.safetensors") for each in (run, folder))
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    states = [json.loads((run / "checkpoints" / f"step-{step:06d}" / "state.json").read_text()) for step in (3, 12)]
    first, last = (state["loss_scaling"] for state in states)
    assert first["loss_scale"] == 2.0**23 > last["loss_scale"] and last["steps_at_scale"] > 0
    losses = [row["loss"] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
    assert len(losses) == 12 and losses[-1] < losses[0]
    assert any_command(["evaluate", str(run), "--eval-file", SHORT_DATA[3], "--limit", "2", "--max-new-tokens", "2"]) == 0
    assert command_line([*flags, "--output-dir", str(run), "--precision", "bf16"]) == ExitCode.CONFIGURATION
    assert "precision" in capsys.readouterr().err


def test_auto_is_what_the_run_began_with(tiny, tmp_path):
    flags = [
        "--model",
        "tiny-random",
        "--lora-r",
        "4",
        "--max-length",
        "300",
        *SHORT_DATA,
        "--output-dir",
        str(tmp_path / "run"),
    ]
    assert command_line([*flags, "--max-steps", "1", "--precision", "fp16"]) == 0
    with RunFolder(tmp_path / "run", "auto") as run:
        assert run.as_before(TrainConfig()).precision == "fp16"
