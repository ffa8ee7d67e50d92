"""The estimate, the probe, and what is said when memory does not suffice."""

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import torch
import transformers

import train_loop
from qlora import checkpoint, data, memory
from qlora.__main__ import train as command_line
from qlora.config import ExitCode, TrainConfig
from qlora.loss import read_head, token_loss_sum
from qlora.model import audit_targets
from qlora.optimizer import build_optimizer
from tests.conftest import CPU, adapted_model, wake_adapters

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def test_the_estimate_is_near_what_was_measured_on_a_gpu(phi3):
    """Phi-3-mini: what the constants were fitted to; others are further off, as the docstring says."""
    targets = audit_targets(phi3, TrainConfig())
    record = json.loads((RESULTS / "train_step_h100_202611.json").read_text())
    batch, length = record["flags"]["batch"], record["flags"]["length"]
    cells = [(cell, cell["attn_implementation"], "none", batch, length) for cell in record["cells"]]
    trial = json.loads((RESULTS / "first_ladder_h100_202611.json").read_text())
    compiled = {"none", "selective", "full", "none8", "none512", "none_drop"}
    cells += [
        (cell, "sdpa", "layers", cell["per_device_train_batch_size"], cell["length"])
        for cell in trial["cells"]
        if cell["name"] in compiled
    ]
    assert len(cells) == 11
    for cell, backend, compile, batch, length in cells:
        config = TrainConfig(
            attn_implementation=backend,
            compile=compile,
            gradient_checkpointing=cell["gradient_checkpointing"],
            per_device_train_batch_size=batch,
        )
        estimate = memory.estimated_memory_gib(phi3, targets, config, length)
        assert estimate == pytest.approx(cell["peak_gib"], rel=0.04), cell


def test_the_estimate_counts_the_moments_of_the_optimizer(config, model):
    """One that has stepped is asked for the bytes of its moments; its maps are the same few for any size."""
    config = dataclasses.replace(
        config, lora_r=64, gradient_checkpointing="full"
    )  # so that each tensor has 4,096 elements and more
    targets = audit_targets(model.get_base_model(), config)
    size = sum(target.adapter_parameters for target in targets)
    parameters = [torch.nn.Parameter(torch.ones(size))]
    estimates, moments = {}, {}
    for name in ("adamw", "adamw_8bit"):
        changed = dataclasses.replace(config, optimizer=name)
        estimates[name] = memory.estimated_memory_gib(model, targets, changed, 100) * 2**30
        optimizer = build_optimizer(parameters, changed)
        parameters[0].grad = torch.ones(size)
        optimizer.step()
        state = optimizer.state[parameters[0]]
        moments[name] = sum(value.nbytes for kind, value in state.items() if kind != "step" and "qmap" not in kind)
    saved = estimates["adamw"] - estimates["adamw_8bit"]
    assert saved == pytest.approx(moments["adamw"] - moments["adamw_8bit"], rel=1e-3) and saved / size == pytest.approx(6, 0.01)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize(("woken", "packing"), [(False, False), (True, False), (True, True)])
def test_the_probe_leaves_nothing_behind(config, samples, woken, packing, optimizer):
    config = dataclasses.replace(config, lora_dropout=0.1, packing=packing, max_length=500, lora_r=16, optimizer=optimizer)
    model = adapted_model(config)
    head = read_head(model)
    if woken:
        wake_adapters(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1  # so that it draws
    optimizer = build_optimizer([p for p in model.parameters() if p.requires_grad], config)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    kind, groups = type(optimizer), [dict(group) for group in optimizer.param_groups]
    generators = checkpoint.random_state()
    batches, kinds = [], []

    def step(optimizer, window):
        batches.append(window)
        kinds.append({state["state1"].dtype for state in optimizer.state.values() if "state1" in state})
        assert type(optimizer) is kind and optimizer.param_groups == groups
        loss_sum = functools.partial(token_loss_sum, head=head)
        return train_loop.train_step(model.get_decoder(), optimizer, window, loss_sum, 0.0, None)

    memory.probe_memory(step, optimizer, samples, config)
    longest = sorted(data.row_length(samples, row) for row in data.epoch_rows(samples, config, 2))[-2:]  # of any epoch
    assert len(batches[0]) == 2 and batches[0][0].num_input_tokens == sum(longest)
    assert (batches[0][0].cu_seqlens is not None) == packing and (sum(longest) > 800) == packing
    assert all(torch.equal(p, weights[name]) and p.grad is None for name, p in model.named_parameters())
    assert all(torch.equal(value, generators[name]) for name, value in checkpoint.random_state().items())
    assert not optimizer.state and optimizer.param_groups == groups
    assert kinds == [set(), {torch.uint8, torch.float32} if config.optimizer == "adamw_8bit" else set()]


@pytest.mark.parametrize(("compile", "steps"), [("graphs", [[4, 4], [4, 4], [2]]), ("layers", [[4, 4], [4, 4]])])
def test_the_probe_takes_a_smaller_last_batch_beside_the_graphs(config, samples, compile, steps):
    config = dataclasses.replace(config, compile=compile, per_device_train_batch_size=4)
    parameter = torch.nn.Parameter(torch.zeros(2))
    seen = []
    memory.probe_memory(
        lambda optimizer, window: seen.append([len(batch.input_ids) for batch in window]),
        torch.optim.AdamW([parameter]),
        samples,
        config,
    )
    assert seen == steps


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("no"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])  # fmt: skip
@pytest.mark.parametrize("where", ["load_nf4_model", "train_step"])
def test_out_of_memory_is_exit_6_with_peak_estimate_and_three_ways_out(tiny, tmp_path, monkeypatch, capsys, error, where):
    def too_large(*_, **__):
        raise error

    monkeypatch.setattr(train_loop, where, too_large)
    assert command_line(["--model", "tiny-random", "--output-dir", str(tmp_path / "run")]) == ExitCode.MEMORY
    err = capsys.readouterr().err
    for words in (
        "the peak so far was ",
        "the estimate for these settings 0.",
        "Try --gradient-checkpointing full, or --per-device-train-batch-size 1 --gradient-accumulation-steps 4 (the same step)",
        ", or --max-length 114 (the longest row has 228 tokens). (",
    ):
        assert words in err, err
    assert err.count("\n") == 1


@pytest.mark.parametrize("text", ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"])
def test_memory_that_runs_out_within_transformers_is_exit_6_too(tiny, tmp_path, monkeypatch, capsys, text):
    def too_large(*_, **__):
        raise RuntimeError(text)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", too_large)
    assert command_line(["--model", "tiny-random", "--output-dir", str(tmp_path / "run")]) == ExitCode.MEMORY
    assert "ran out of memory" in capsys.readouterr().err


def test_another_runtime_error_is_not_taken_for_one():
    with pytest.raises(RuntimeError, match="something else"), memory.explained(TrainConfig(), CPU, 1.0, 10):
        raise RuntimeError("something else")


def test_three_settings_are_named_whatever_has_been_tried_already():
    small = TrainConfig(gradient_checkpointing="full", attn_implementation="sdpa", per_device_train_batch_size=1, lora_r=1)
    assert len(memory.settings_to_try(dataclasses.replace(small, lora_r=8), 100)) == 3
    shorter = "--max-length 1 (the longest row has 1 tokens)"
    eight_bit = "--optimizer adamw_8bit (6 bytes less for each trained parameter)"
    assert memory.settings_to_try(small, 1) == [shorter, eight_bit, "--target-modules with fewer names"]
    small = dataclasses.replace(small, optimizer="adamw_8bit")
    assert memory.settings_to_try(small, 1) == [shorter, "--target-modules with fewer names"]
    odd = dataclasses.replace(small, per_device_train_batch_size=9, attn_implementation="eager")
    assert memory.settings_to_try(odd, 100)[:2] == [
        "--attn-implementation sdpa",
        "--per-device-train-batch-size 3 --gradient-accumulation-steps 6 (the same step)",
    ]


def test_graphs_are_predicted_at_the_length_they_run_at_and_a_cache_for_what_has_adapters(phi3):
    graphs = TrainConfig(compile="graphs", gradient_checkpointing="none", attn_implementation="sdpa")
    targets = audit_targets(phi3, graphs)
    at = {length: memory.estimated_memory_gib(phi3, targets, graphs, length) for length in (130, 256, 257)}
    assert at[130] == at[256] < at[257]
    some = audit_targets(phi3, dataclasses.replace(graphs, target_modules=("qkv_proj",)))
    for chosen, parameters in ((targets, 3_623_878_656), (some, 32 * 9216 * 3072)):
        cached = dataclasses.replace(graphs, cache_dequantized=True)
        more = memory.estimated_memory_gib(phi3, chosen, cached, 256) - memory.estimated_memory_gib(phi3, chosen, graphs, 256)
        assert more == pytest.approx(2 * parameters / 2**30)
    assert memory.settings_to_try(cached, 100)[0] == "--no-cache-dequantized"
    full = dataclasses.replace(graphs, gradient_checkpointing="full")
    assert memory.settings_to_try(full, 100)[0] == "--compile layers --offload-checkpoints"
