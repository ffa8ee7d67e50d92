"""The benchmark of peers: what a token costs, the same mathematics for all, and ratios within one run alone."""

import json
import re
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from benchmarks import tables
from benchmarks.harness import Output
from benchmarks.peers import __main__ as benchmark
from benchmarks.peers import contenders, work
from benchmarks.peers.tables import by_shape
from qlora.model.coverage import linear_layers
from qlora.model.demo import build_tiny_random
from qlora.model.load import load_meta_model

PHI3_MINI = {"num_hidden_layers": 32, "hidden_size": 3072, "num_attention_heads": 32, "num_key_value_heads": 32,
             "intermediate_size": 8192, "vocab_size": 32064, "sliding_window": 2047}  # fmt: skip


def run(out: Path, *shapes: str, contenders: tuple[str, ...]) -> dict:
    options = {"shape_of_model": "tiny", "warm_up": 1, "steps": 2, "dropout": 0.0}
    benchmark.main(benchmark.Options(output=Output(out), shapes=shapes, contenders=contenders, **options))
    return json.loads(out.read_text())


def test_a_token_of_phi_3_mini_takes_16_6_gflop_at_2048():
    adapters = 50_331_648
    assert work.quantized_parameters(PHI3_MINI) == 3_623_878_656
    assert work.flops_per_token(PHI3_MINI, [2048, 2048], adapters) == pytest.approx(16.6e9, rel=1e-3)
    assert work.flops_per_token(PHI3_MINI, [4096], adapters) == pytest.approx(17.31e9, rel=1e-3)  # the window acts
    mixed = work.flops_per_token(PHI3_MINI, [500, 1500], adapters)  # sums of squares: as one of 1250
    assert mixed == work.flops_per_token(PHI3_MINI, [1250], adapters)


def test_what_is_counted_is_in_the_model(config):
    meta_model = load_meta_model(config.model, config)
    shape = meta_model.config.to_dict()
    weights = sum(layer.weight.numel() for layer in linear_layers(meta_model).values())
    assert weights == work.quantized_parameters(shape)


def test_the_split_checkpoint_computes_the_same_logits(tmp_path):
    build_tiny_random(tmp_path / "fused")
    work.write_split(tmp_path / "fused", tmp_path / "split")
    fused, split = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        for name in ("fused", "split")
    )
    assert type(fused).__name__ == "Phi3ForCausalLM" and type(split).__name__ == "MistralForCausalLM"
    ids = torch.randint(4, fused.config.vocab_size, (2, 48), generator=torch.Generator().manual_seed(0))  # [2, 48]
    with torch.no_grad():
        torch.testing.assert_close(split(ids).logits, fused(ids).logits, rtol=1e-4, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "split")
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


def test_the_samples_are_the_same_each_time_and_packed_rows_are_even(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PHI3_MINI))
    full = work.draw("2x32x3", tmp_path, 0, 1, 2)
    assert full == work.draw("2x32x3", tmp_path, 0, 1, 2) != work.draw("2x32x3", tmp_path, 1, 1, 2)
    assert full.samples_of_steps == [list(range(6)), list(range(6, 12)), list(range(12, 18))]
    assert full.tokens_of_steps == [192] * 3
    padded, packed = (work.draw(shape, tmp_path, 0, 1, 2) for shape in ("mixed", "mixed_packed"))
    assert padded.input_ids == packed.input_ids and padded.tokens_of_steps == packed.tokens_of_steps
    lengths = [len(ids) for ids in padded.input_ids]
    assert len(lengths) == 64 and max(lengths) <= 2048 and 500 < sum(lengths) / 64 < 700
    assert padded.batch * padded.accumulation == 64 and packed.packing and not padded.packing


def test_contenders_train_the_same_and_one_that_fails_is_a_row(tmp_path):
    wanted = ("ours_none", "ours_full", "trl_liger")
    record = run(tmp_path / "peers.json", "2x32x2", contenders=wanted)
    rows = {row["contender"]: row for row in record["cells"]}
    assert set(rows) == {"trl", "ours_none", "ours_full", "trl_liger"}  # the baseline is there unasked
    assert re.search("No module named|liger-kernel", rows["trl_liger"]["failed"])  # trl, liger or, for the CPU, triton
    none, full, trl = rows["ours_none"], rows["ours_full"], rows["trl"]
    assert none["first_loss"] == pytest.approx(full["first_loss"], abs=1e-2) == pytest.approx(trl["first_loss"], abs=1e-2)
    assert none["tokens"] == full["tokens"] == trl["tokens"] == 2 * 4 * 32
    assert none["adapter_dtype"] == "float32" and trl["adapter_dtype"] == "bfloat16"
    assert none["ratio_to_trl"] == pytest.approx(none["tokens_per_s"] / trl["tokens_per_s"], abs=1e-3)
    assert none["step_ms_p10"] <= none["step_ms"] <= none["step_ms_p90"] and none["peak_gb"] > 0
    assert none["mfu"] is None and none["version"] == f"commit {record['environment']['commit'][:9]}"
    assert "/tmp" not in json.dumps(record["cells"])
    assert [run["run"] for run in record["runs"]] == [0] and record["runs"][0]["shape_of_model"] == "tiny"


def test_trl_trains_the_same_packed_rows(tmp_path):
    record = run(tmp_path / "peers.json", "mixed_packed", contenders=("ours_none",))
    theirs, ours = record["cells"]
    assert (theirs["contender"], ours["contender"], theirs["ratio_to_trl"]) == ("trl", "ours_none", 1.0)
    assert theirs["first_loss"] == pytest.approx(ours["first_loss"], abs=1e-2) and theirs["tokens"] == ours["tokens"]


@pytest.fixture
def hand(monkeypatch):
    """A clock that is turned by hand, and a GPU's events that read it."""
    time_of_it = SimpleNamespace(seconds=10.0)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.seconds = time_of_it.seconds

        def elapsed_time(self, other):
            return 1000 * (other.seconds - self.seconds)

    monkeypatch.setattr(time, "perf_counter", lambda: time_of_it.seconds)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", list)
    for name, size in (("max_memory_allocated", 3), ("max_memory_reserved", 5)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, size=size: size * 1e9)
    return time_of_it


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_cell_tells_the_median_of_the_timed_steps_alone(monkeypatch, tmp_path, hand, on_gpu):
    """The two steps of the warm-up take longest; what lies between steps is in the window, and in no step."""
    given = work.Work([[1] * 50] * 6, [[1] * 50] * 6, 1, 2, 64, packing=False, warm_up=2, steps=4)
    (tmp_path / "fused").mkdir()
    (tmp_path / "fused" / "config.json").write_text(json.dumps(PHI3_MINI))
    model = torch.nn.Linear(3, 5)
    model.config = SimpleNamespace(_attn_implementation="sdpa")

    def contender(name, samples, folder, dropout, clock):
        assert (name, samples, folder, dropout) == ("ours_none", given, tmp_path, 0.1)
        hand.seconds += 7.0
        clock.loaded()
        for taken in (60.0, 30.0, 0.001, 0.004, 0.002, 0.008):
            clock.begin()
            hand.seconds += taken
            clock.end()
            hand.seconds += 0.25
        clock.losses.append(1.5)
        return model

    monkeypatch.setitem(contenders.RUNS, "ours", contender)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    told = contenders.measure("ours_none", given, tmp_path, 0.1)
    rate = statistics.median(100 / taken for taken in (0.001, 0.004, 0.002, 0.008))
    assert (told["step_ms"], told["tokens"], told["first_loss"]) == (3, 400, 1.5)
    assert told["tokens_per_s"] == pytest.approx(rate, abs=0.1)
    assert told["tokens_per_s_of_window"] == pytest.approx(400 / 1.015, abs=0.1)
    assert (told["load_s"], told["first_step_s"], told["adapter_parameters"]) == (7.0, 60.0, 20)
    flops = work.flops_per_token(PHI3_MINI, [50], 20)
    assert told["gflop_per_token"] == pytest.approx(flops / 1e9, abs=1e-3)
    assert told["mfu"] == (pytest.approx(flops * rate / 790e12, abs=1e-4) if on_gpu else None)
    assert told["reserved_gb"] == (5 if on_gpu else None) and (told["peak_gb"] == 3) == on_gpu


def row(contender: str, run: int, rate: float | None = None, shape: str = "mixed") -> dict:
    measured = {"failed": "out of memory"} if rate is None else {"tokens_per_s": rate}
    return {"contender": contender, "shape": shape, "dropout": 0.0, "run": run, **measured}


def test_a_ratio_is_formed_within_one_run_alone():
    rows: list[dict] = []
    for new in (row("trl", 0, 100.0), row("ours_none", 0, 200.0), row("ours_full", 0), row("trl", 1, 50.0)):
        rows = benchmark.with_ratios(benchmark.merged(rows, new))
    assert [old.get("ratio_to_trl") for old in rows] == [1.0, 2.0, None, 1.0]  # the first baseline stays for the second row
    rows = benchmark.with_ratios(benchmark.merged(rows, row("ours_none", 1, 150.0)))
    assert [(old["run"], old.get("ratio_to_trl")) for old in rows] == [(0, 1.0), (0, None), (1, 1.0), (1, 3.0)]
    assert "ratio_to_trl" not in rows[1]  # it did not fit
    rows = benchmark.merged(rows, row("ours_full", 1, 10.0))
    assert [old["run"] for old in rows] == [1, 1, 1]  # nothing is left that the first baseline was for
    assert benchmark.with_ratios([row("ours_none", 2, 1.0)])[0]["ratio_to_trl"] is None


def test_missing_cells_bring_their_baseline_and_the_order_turns():
    contenders = ("trl", "ours_none", "ours_full")
    assert benchmark.planned(contenders, ("a", "b", "c", "d"), 0.0, []) == {
        "a": ["trl", "ours_none", "ours_full"],
        "b": ["ours_none", "ours_full", "trl"],
        "c": ["ours_full", "trl", "ours_none"],
        "d": ["trl", "ours_none", "ours_full"],
    }
    known = benchmark.with_ratios([row("trl", 0, 1.0, "a"), row("ours_none", 0, 2.0, "a"), row("ours_full", 0, None, "a")])
    assert benchmark.planned(contenders, ("a",), 0.0, known) == {}
    assert benchmark.planned(contenders, ("a",), 0.1, known) == {"a": list(contenders)}
    known = benchmark.with_ratios([row("trl", 0, 1.0, "b"), row("ours_none", 1, 2.0, "b")])
    assert benchmark.planned(contenders, ("b",), 0.0, known) == {"b": ["trl", "ours_none", "ours_full"]}


def test_what_is_not_there_is_refused_and_unset_options_follow_the_machine():
    gpu, cpu = (benchmark.resolved(benchmark.Options(), on_gpu) for on_gpu in (True, False))
    assert gpu.contenders == tuple(name for name in benchmark.CONTENDERS if not name.startswith("unsloth"))
    assert (gpu.shapes, gpu.shape_of_model, gpu.dropout) == (benchmark.WORKS, "phi3-mini", 0.0)
    assert (cpu.contenders, cpu.shapes, cpu.shape_of_model, cpu.dropout) == (benchmark.ON_A_CPU, ("avro",), "demo", 0.1)
    with_unsloth = benchmark.resolved(benchmark.Options(unsloth_site=Path()), on_gpu=True)
    assert with_unsloth.contenders == benchmark.CONTENDERS
    for options in (benchmark.Options(contenders=("axolotl",)), benchmark.Options(shapes=("2x2048",))):
        with pytest.raises(SystemExit, match="There is no"):
            benchmark.resolved(options, on_gpu=True)


def test_the_table_shows_the_newest_and_says_why_a_cell_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    with pytest.raises(SystemExit, match=r"There is no peers_h100_\*.json"):
        by_shape("peers_h100_*.json", "h100")
    measured = {"version": "trl 1.16.0", "adapter_dtype": "bfloat16", "step_ms": 5.0, "step_ms_p10": 4.0, "step_ms_p90": 6.0,
                "peak_gb": 4.0, "mfu": 0.25, "first_loss": 10.5, "commit": "0123456789"}  # fmt: skip
    rows: list[dict] = []
    for new in (row("trl", 0, 100.0), row("ours_none", 0, 200.0), row("ours_full", 1), row("trl", 1, 50.0)):
        rows = benchmark.with_ratios(benchmark.merged(rows, new if "failed" in new else {**measured, **new}))
    packages = dict.fromkeys(("torch", "transformers", "peft", "bitsandbytes"), "1")
    environment = {"device": "NVIDIA H100", "packages": packages, "commit": "x"}
    runs = [{"shape_of_model": "phi3-mini", "steps": steps, "warm_up": 3} for steps in (8, 5)]
    (tmp_path / "peers_h100_202601.json").write_text(json.dumps({"environment": environment, "runs": runs, "cells": rows}))
    text = by_shape("peers_h100_*.json", "h100")
    assert "| `ours_none` | trl 1.16.0 | bfloat16 | 200 | 5 (4-6) | 2.00 | 4.00 | 25.0% | 10.500 |" in text
    assert text.count("| `trl` |") == 1 and "| 50 | 5 (4-6) | 1.00 |" in text
    assert (
        "| `ours_full` |  |  | out of memory |" in text
        and "the median of 5 to 8 steps (10th to 90th percentile) after 3;" in text
    )
    rows.append({**measured, **row("trl", 1, 25.0), "dropout": 0.5, "ratio_to_trl": 1.0})
    (tmp_path / "peers_h100_202601.json").write_text(json.dumps({"environment": environment, "runs": runs, "cells": rows}))
    without, _, dropped = by_shape("peers_h100_*.json", "h100").partition("`, dropout ")
    assert "| 50 | 5" in without and "| 25 | 5" not in without and "| 25 | 5" in dropped and "| 50 | 5" not in dropped


@pytest.mark.parametrize(("ahead", "order"), [(0, "a A b B c C"), (1, "a b A c B C")])
def test_a_cell_imports_while_the_one_before_it_runs_on_a_gpu_alone(monkeypatch, tmp_path, ahead, order):
    seen, stopped = [], []

    class Cell:
        def __init__(self, function, contender, shape, *rest, imports, **places):
            assert function is contenders.measure and imports == contenders.IMPORTS["trl"]
            self.shape = shape
            seen.append(shape)

        def row(self, key, timeout_s):
            seen.append(self.shape.upper())
            return {key: "out of memory"} if self.shape == "b" else {"tokens_per_s": 1.0}

        def stop(self):
            stopped.append(self.shape)

    monkeypatch.setattr(benchmark, "Cell", Cell)
    job = ([("trl", shape) for shape in "abc"], dict(zip("abc", "abc", strict=True)), tmp_path, benchmark.Options(), ahead)
    rows = list(benchmark.measured(*job))
    assert [(row["shape"], row.get("failed")) for row in rows] == [("a", None), ("b", "out of memory"), ("c", None)]
    assert seen == order.split() and not stopped
    rows = benchmark.measured(*job)
    next(rows)
    rows.close()  # as when the time is up
    assert len(stopped) == ahead
