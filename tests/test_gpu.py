"""What needs a CUDA GPU: pytest -m gpu."""

import functools
import importlib.util
import json
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from qlora import attention, data
from qlora.__main__ import train as command_line
from qlora.config import ExitCode
from qlora.loss import read_head, token_loss_sum
from qlora.model import add_adapters, audit_targets, enable_gradient_checkpointing, load_nf4_model
from tests.conftest import adapted_model, gradients, relative_error, wake_adapters
from tests.faults.harness import rows as metrics
from tests.faults.harness import tensors
from tests.test_model import adapter_gradients, fp32_twin
from train_loop import train_step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
GPU = torch.device("cuda", 0)
ROOT = Path(__file__).parents[1]
FLASH = pytest.param(
    "flash_attention_2", marks=pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="no flash-attn")
)
BACKENDS = ["sdpa", "eager", FLASH]


def gpu_model(config, backend: str):
    torch.manual_seed(config.seed)
    model = load_nf4_model(config.model, config, backend, GPU)
    model = add_adapters(model, config, audit_targets(model, config), config.model).train()
    model.load_state_dict({n: p for n, p in adapted_model(config).named_parameters() if "lora_" in n}, strict=False)
    wake_adapters(model)
    return model


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_an_fp32_model_on_the_cpu(config, samples, backend, checkpointing):
    cpu = adapted_model(config)
    wake_adapters(cpu)
    twin = fp32_twin(cpu, config)
    batch = data.collate(samples[:4])
    loss, expected = adapter_gradients(twin, batch, read_head(twin), autocast=False)
    model = gpu_model(config, backend)
    head = read_head(model)
    if checkpointing:
        enable_gradient_checkpointing(model)
    moved = batch.to(GPU)
    with torch.autocast("cuda", torch.bfloat16):
        hidden = model.get_decoder()(input_ids=moved.input_ids, use_cache=False).last_hidden_state
        ours = token_loss_sum(hidden, moved, head) / batch.num_tokens
    ours.backward()
    found = {name: gradient.cpu() for name, gradient in gradients(model).items()}
    assert ours.item() == pytest.approx(loss, rel=0.01)
    assert relative_error(found, expected) < 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_waits_for_the_device_only_where_transformers_looks_for_packed_rows(config, samples, backend):
    model = gpu_model(config, backend)
    enable_gradient_checkpointing(model)
    loss_sum = functools.partial(token_loss_sum, head=read_head(model))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, fused=True)
    window = list(data.micro_batches(samples, range(4), 2, pin=True))
    assert window[0].input_ids.is_pinned()
    with attention.sliding_window(model, None), warnings.catch_warnings(record=True) as waits:
        step = functools.partial(train_step, model.get_decoder(), optimizer, window, loss_sum, 1e-3, 1.0)
        step()
        warnings.simplefilter("always")
        waits.clear()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            loss, norm = step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [Path(wait.filename).name for wait in waits if "called a synchronizing" in str(wait.message)]
    assert waits == ["masking_utils.py"] * len(window), waits  # once a forward; nothing of ours
    assert torch.isfinite(loss) and torch.isfinite(norm) and loss.device == GPU


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_the_command_line_trains_on_the_gpu(tiny, tmp_path, capsys, backend):
    flags = ["--model", "tiny-random", "--lora-r", "4", "--learning-rate", "1e-2", "--num-train-epochs", "3"]
    assert command_line([*flags, "--attn-implementation", backend, "--output-dir", str(tmp_path / "run")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"] - 0.2
    assert 0 < rows[-2]["peak_memory_gib"] < 1
    out = capsys.readouterr().out
    assert "gradient checkpointing: full" in out and "Memory: the longest batch peaks at 0." in out


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_killed_run_goes_on_bit_for_bit_with_the_deterministic_flag(tiny, tmp_path, backend):
    """Each in a process of its own, as CUBLAS_WORKSPACE_CONFIG is read when CUDA starts."""
    flags = f"--model tiny-random --lora-r 4 --max-steps 9 --save-steps 1 --deterministic --attn-implementation {backend}"
    command = [sys.executable, str(ROOT / "train_loop.py"), *flags.split(), "--learning-rate", "1e-2", "--output-dir"]
    subprocess.run([*command, str(tmp_path / "straight")], check=True)
    process = subprocess.Popen([*command, str(tmp_path / "killed")])
    while not (tmp_path / "killed" / "checkpoints" / "step-000003").exists() and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = subprocess.run([*command, str(tmp_path / "killed")], check=True, capture_output=True, text=True)
    assert "It goes on bit for bit as if it had not stopped." in done.stdout
    last = "checkpoints/step-000009"
    assert tensors(tmp_path / "killed" / last) == tensors(tmp_path / "straight" / last)
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "straight")


def test_without_that_flag_the_state_comes_back_and_the_log_says_what_to_expect(tiny, tmp_path, capsys):
    flags = ["--model", "tiny-random", "--lora-r", "4", "--max-steps", "4", "--attn-implementation", "sdpa", "--output-dir"]
    assert command_line([*flags, str(tmp_path / "run")]) == 0
    more = ["--max-steps", "6", "--override", "max_steps"]
    assert command_line([*flags, str(tmp_path / "run"), *more]) == 0
    assert "later losses are only close: without --deterministic a GPU's sums vary." in capsys.readouterr().out


def test_out_of_gpu_memory_is_exit_6(tiny, tmp_path, capsys):
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(60e6 / torch.cuda.get_device_properties(GPU).total_memory)
    try:
        flags = [
            "--model",
            "tiny-random",
            "--per-device-train-batch-size",
            "22",
            "--attn-implementation",
            "eager",
            "--output-dir",
        ]
        assert command_line([*flags, str(tmp_path / "run")]) == ExitCode.MEMORY
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    err = capsys.readouterr().err
    assert "The GPU ran out of memory: the peak so far was" in err and "Try --attn-implementation sdpa" in err
    assert not (tmp_path / "run" / "checkpoints").exists()  # it was found out by the probe
