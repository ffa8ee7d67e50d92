"""The estimate, the probe, and what is said when memory does not suffice."""

import dataclasses
import functools
import re

import pytest
import torch
import transformers

import train_loop
from benchmarks.peers.contenders import OURS
from benchmarks.tables import load
from qlora.cli import train as command_line
from qlora.config import TrainConfig, parse
from qlora.data.batch import epoch_rows, row_length
from qlora.errors import ExitCode
from qlora.model.loss import read_head, token_loss_sum
from qlora.model.optimizer import build_optimizer
from qlora.model.targets import audit_targets
from qlora.speed import memory
from tests.helpers import CPU, adapted_model, decoder_of, wake_adapters

LADDERS = {
    "first": ("peft_none", "none", "selective", "full", "none8", "none512", "none_drop"),
    "second": (
        "none_written",
        "none_layers",
        "selective_layers",
        "full_layers",
        "none_graphs",
        "selective_graphs",
        "full_graphs",
        "none8_graphs",
    ),
}  # fmt: skip


def measured() -> list[tuple[TrainConfig, int, float]]:
    """Settings, tokens of a row and peak in GB of what ran on an H100 with Phi-3-mini's shape."""
    record = load("train_step_h100_202611.json")[1]
    batch, length = record["flags"]["batch"], record["flags"]["length"]
    found = [(c, c["attn_implementation"], "none", batch, length, {"lora_dropout": 0.1}) for c in record["cells"]]
    for name, kept in LADDERS.items():
        for c in load(f"{name}_ladder_h100_202611.json")[1]["cells"]:
            if c["name"] in kept:
                more = {"lora_dropout": c["lora_dropout"]}
                found.append((c, "sdpa", c["compile"], c["per_device_train_batch_size"], c["length"], more))
    for c in load("peers_h100_202611.json")[1]["cells"]:
        if c["contender"] in OURS and c["shape"][0].isdigit():
            more = OURS[c["contender"]] | {"lora_dropout": c["dropout"]}
            row = {"gradient_checkpointing": more.pop("gradient_checkpointing"), "peak_gb": c["peak_gb"]}
            how = more.pop("compile", "layers" if "offload_checkpoints" in more else "graphs")
            batch, length, _ = map(int, c["shape"].split("x"))
            found.append((row, "sdpa", how, batch, length, more))
    for c in load("plan_h100_202611.json")[1]["cells"]:
        row = {"gradient_checkpointing": c["checkpointing"], "peak_gb": c["peak_gb"]}
        found.append((row, c["backend"], c["compile"], c["batch"], c["length"], {"lora_r": c["lora_r"], "lora_dropout": 0.0}))
    record = load("tokens_h100_202611.json")[1]
    found += [(c, "sdpa", c["compile"], c["batch"], record["flags"]["length"], {"lora_dropout": 0.0}) for c in record["cells"]]
    return [
        (TrainConfig(attn_implementation=backend, compile=how, gradient_checkpointing=c["gradient_checkpointing"],
                     per_device_train_batch_size=batch, **more), length, c["peak_gb"])
        for c, backend, how, batch, length, more in found
    ]  # fmt: skip


def test_the_estimate_is_near_what_was_measured_on_a_gpu(phi3):
    """Phi-3-mini: what the constants were fitted to; others are further off, as the docstring says."""
    assert len(measured()) >= 40
    for config, length, peak_gb in measured():
        terms = memory.memory_terms(phi3, audit_targets(phi3, config), config, length)
        assert all(size >= 0 for size in terms.values())
        assert sum(terms.values()) == pytest.approx(peak_gb, rel=0.05), (config, length)


def test_the_peak_on_a_gpu_counts_what_graphs_hold_as_a_whole(monkeypatch):
    """What was allocated at most, and of the graphs' pools the part that the allocator takes to be free."""
    parts = [
        {"segment_pool_id": (0, 0), "total_size": 16e9, "allocated_size": 1e9},  # the common pool's free part is free
        {"segment_pool_id": (0, 1), "total_size": 3e9, "allocated_size": 1e9},
        {"segment_pool_id": (1, 0), "total_size": 1e9, "allocated_size": 5e8},
    ]
    asked = []
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: parts)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: asked.append(device) or 4e9)
    gpu = torch.device("cuda", 1)
    assert memory.peak_memory_gb(gpu) == 4 + 2 + 0.5 and asked == [gpu]
    parts[1:] = []
    assert memory.peak_memory_gb(gpu) == 4


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
        estimates[name] = memory.estimated_memory_gb(model, targets, changed, 100) * 1e9
        optimizer = build_optimizer(dict(enumerate(parameters)), changed)
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
    optimizer = build_optimizer({name: each for name, each in model.named_parameters() if each.requires_grad}, config)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    kind, groups = type(optimizer), [dict(group) for group in optimizer.param_groups]
    batches, kinds = [], []

    def step(optimizer, micro_batches):
        batches.append(micro_batches)
        kinds.append({state["state1"].dtype for state in optimizer.state.values() if "state1" in state})
        assert type(optimizer) is kind and optimizer.param_groups == groups
        loss_sum = functools.partial(token_loss_sum, head=head)
        return train_loop.train_step(decoder_of(model), optimizer, micro_batches, loss_sum, 0.0, None)

    line = memory.probe_memory(step, optimizer, samples, config, 1.5)
    assert re.fullmatch(r"Memory: the longest batch peaks at \d+\.\d\d GB, 1\.50 were predicted", line)
    longest = sorted(row_length(samples, row) for row in epoch_rows(samples, config, 2))[-2:]  # of any epoch
    assert len(batches[0]) == 2 and batches[0][0].num_input_tokens == sum(longest)
    assert (batches[0][0].cu_seqlens is not None) == packing and (sum(longest) > 800) == packing
    assert all(torch.equal(p, weights[name]) and p.grad is None for name, p in model.named_parameters())
    assert not optimizer.state and optimizer.param_groups == groups
    assert kinds == [set(), {torch.uint8, torch.float32} if config.optimizer == "adamw_8bit" else set()]


@pytest.mark.parametrize(
    ("compile", "size", "rows"), [("none", 4, 4), ("none", 50, 22), ("layers", 50, 50), ("graphs", 50, 50)]
)
def test_the_probe_takes_the_largest_batch_of_an_epoch(config, samples, compile, size, rows):
    """Compiled, each has that many rows, so that none needs memory or code of its own."""
    config = dataclasses.replace(config, compile=compile, per_device_train_batch_size=size)
    parameter = torch.nn.Parameter(torch.zeros(2))
    seen = []
    memory.probe_memory(
        lambda optimizer, micro_batches: seen.append([len(batch.input_ids) for batch in micro_batches]),
        torch.optim.AdamW([parameter]),
        samples,
        config,
        1.5,
    )
    assert seen == 2 * [2 * [rows]]


@pytest.mark.parametrize(("free_gb", "steps"), [(3.1, [1]), (2.9, [2, 2])])
def test_where_memory_is_ample_the_probe_is_one_micro_batch(config, samples, monkeypatch, free_gb, steps):
    monkeypatch.setattr(memory, "_free_gb", lambda _: free_gb)
    monkeypatch.setattr(memory, "peak_memory_gb", lambda _: 1.25)
    seen = []
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    line = memory.probe_memory(
        lambda optimizer, micro_batches: seen.append(len(micro_batches)), optimizer, samples, config, 1.5
    )
    assert seen == steps
    once = " (one step, as 3.1 GB are free)" if steps == [1] else ""
    assert line == f"Memory: the longest batch peaks at 1.25 GB, 1.50 were predicted{once}"


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
        ", or --optimizer adamw_8bit (6 bytes less for each trained parameter). (",
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
    with pytest.raises(RuntimeError, match="something else"), memory.oom_as_user_error(TrainConfig(), CPU, 1.0, 10):
        raise RuntimeError("something else")


def test_there_is_always_something_to_try_and_it_is_what_the_flags_say(phi3):
    def flags(config, longest):
        return [setting.flags.partition(" (")[0] for setting in memory.settings_to_try(config, longest)]

    config = TrainConfig(attn_implementation="eager", compile="graphs", per_device_train_batch_size=9, cache_dequantized=True)
    assert flags(config, 300) == [
        "--no-cache-dequantized",
        "--gradient-checkpointing full",
        "--attn-implementation sdpa",
        "--compile layers",
        "--per-device-train-batch-size 3 --gradient-accumulation-steps 6",
        "--optimizer adamw_8bit",
        "--max-length 150",
        "--lora-r 16",
        "--target-modules with fewer names",
    ]
    least = {"optimizer": "adamw_8bit", "lora_r": 4, "per_device_train_batch_size": 1, "gradient_checkpointing": "full"}
    assert flags(TrainConfig(attn_implementation="sdpa", compile="none", **least), 128) == ["--target-modules with fewer names"]
    longest, seen = 2048, []
    config = dataclasses.replace(config, gradient_checkpointing="none")
    while (found := memory.settings_to_try(config, longest))[0].changes:
        words, changes, same = found[0]
        assert same is not bool({"optimizer", "max_length", "lora_r"} & set(changes))
        assert [setting.same_training for setting in found] == sorted((each.same_training for each in found), reverse=True)
        parsed = parse(words.partition(" (")[0].split())
        assert {name: getattr(parsed, name) for name in changes} == changes
        before = memory.estimated_memory_gb(phi3, audit_targets(phi3, config), config, longest)
        config = dataclasses.replace(config, **changes)
        longest = min(longest, config.max_length)
        assert memory.estimated_memory_gb(phi3, audit_targets(phi3, config), config, longest) < before, words
        seen.append(words)
    assert len(seen) > 10 and longest == 128 and config.lora_r == 4
    assert flags(dataclasses.replace(config, lora_r=6), 200)[:2] == ["--max-length 128", "--lora-r 4"]
    assert flags(dataclasses.replace(config, lora_r=3), 100) == ["--target-modules with fewer names"]  # below it already


def test_graphs_are_predicted_at_the_length_they_run_at_and_a_cache_for_what_has_adapters(phi3):
    graphs = TrainConfig(compile="graphs", gradient_checkpointing="none", attn_implementation="sdpa")
    targets = audit_targets(phi3, graphs)
    at = {length: memory.estimated_memory_gb(phi3, targets, graphs, length) for length in (130, 256, 257)}
    assert at[130] == at[256] < at[257]
    some = audit_targets(phi3, dataclasses.replace(graphs, target_modules=("qkv_proj",)))
    for chosen, parameters in ((targets, 3_623_878_656), (some, 32 * 9216 * 3072)):
        cached = dataclasses.replace(graphs, cache_dequantized=True)
        more = memory.estimated_memory_gb(phi3, chosen, cached, 256) - memory.estimated_memory_gb(phi3, chosen, graphs, 256)
        assert more == pytest.approx(2 * parameters / 1e9)
    assert memory.settings_to_try(cached, 100)[0][:2] == ("--no-cache-dequantized", {"cache_dequantized": False})
    full = dataclasses.replace(graphs, gradient_checkpointing="full")
    assert memory.settings_to_try(full, 100)[0][:2] == ("--compile layers", {"compile": "layers"})
