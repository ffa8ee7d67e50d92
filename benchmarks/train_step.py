"""One optimizer step, timed: the loop's own train_step on a model of exact shape and random weights.

    python benchmarks/train_step.py --shape phi3-mini                 # a CUDA GPU; writes benchmarks/results/
    python benchmarks/train_step.py --shape tiny --length 64 --backends sdpa eager   # anywhere, a smoke test

Speed and memory do not depend on the values of weights, so random ones do. Each cell (backend x checkpointing x compile) runs
in a process of its own, so that its peak memory is its own. All rows are full: every position but the first is a trained token.
On a GPU one more step is profiled: what of it went to matrix products, attention, dequantization, everything else that is
computed, and to waiting for the next kernel.
"""

import dataclasses
import functools
import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import tyro

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # run as a script, Python has only this file's folder there

from benchmarks.attention import result_file  # noqa: E402

WARM_UP_STEPS = 3


@dataclasses.dataclass(frozen=True)
class Options:
    """What to time."""

    shape: Literal["phi3-mini", "tiny"] = "phi3-mini"
    """phi3-mini: 3.8 billion parameters, 7.6 GB on disk while it runs. tiny: the two-layer model of the tests."""
    backends: tuple[str, ...] = ("sdpa", "flash_attention_2", "eager")
    """Values of --attn-implementation."""
    checkpointing: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")
    """Values of --gradient-checkpointing."""
    compile: tuple[Literal["none", "layers", "graphs"], ...] | None = None
    """Values of --compile. Unset: graphs and none on a GPU, none on a CPU."""
    length: int = 2048
    """Tokens in a row."""
    batch: tuple[int, ...] = (2,)
    """Rows in a micro-batch; a cell for each."""
    accumulation: int = 2
    """Micro-batches in a step."""
    cache_dequantized: bool = False
    """--cache-dequantized."""
    dropout: float = 0.1
    """--lora-dropout."""
    lora_r: int = 32
    """--lora-r."""
    steps: int = 8
    """Timed steps, after 3 to warm up."""
    out: Path | None = None
    """Where the JSON goes. Unset: benchmarks/results/train_step_CARD_YYYYMM.json."""
    commit: str | None = None
    """Commit of the code, where it runs without its repository."""
    cell: tuple[str, str, str, str] | None = None
    """Internal: folder, backend, checkpointing and compile of one cell, with one --batch; prints its JSON."""


def write_random_model(shape: str, folder: Path) -> None:
    """A checkpoint of exact shape with random weights in bf16, and a tokenizer beside it so that train_loop.py runs on it."""
    import torch
    import transformers

    from qlora.model.demo import build_tiny_random

    build_tiny_random(folder)
    if shape == "phi3-mini":
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        ids = {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        config = transformers.Phi3Config(sliding_window=2047, dtype=torch.bfloat16, **ids)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            torch.set_default_dtype(torch.bfloat16)
            model = transformers.Phi3ForCausalLM(config)
        model.save_pretrained(folder)
        del model
        torch.cuda.empty_cache()  # the cells run in other processes and want the whole card


def configuration(options: Options) -> Any:
    """The TrainConfig of a cell."""
    from qlora.config import TrainConfig

    folder, backend, checkpointing, how = options.cell
    return TrainConfig(
        model=folder,
        lora_r=options.lora_r,
        lora_dropout=options.dropout,
        max_length=options.length,
        per_device_train_batch_size=options.batch[0],
        attn_implementation=backend,
        gradient_checkpointing=checkpointing,
        compile=how,
        cache_dequantized=options.cache_dequantized,
    )


def time_cell(options: Options) -> dict:
    """Load, adapt and step one model; the row of its cell."""
    import torch

    from qlora.data.batch import iter_batches
    from qlora.data.template import TokenizedExample
    from qlora.model import attention
    from qlora.model.load import load_meta_model, load_nf4_model
    from qlora.model.lora import add_lora, audit_targets
    from qlora.model.loss import read_head, token_loss_sum
    from qlora.speed.accelerate import accelerate
    from qlora.speed.memory import leave_no_gaps, peak_memory_gb
    from train_loop import train_step

    folder, backend, checkpointing, how = options.cell
    leave_no_gaps()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    config = configuration(options)
    meta_model = load_meta_model(folder, config)
    chosen = attention.choose_attention(config, device, meta_model)
    torch.manual_seed(0)
    model = load_nf4_model(folder, config, chosen.loaded_as, device)
    model = add_lora(model, config, audit_targets(meta_model, config), folder).train()
    decoder = accelerate(model, config)
    head = read_head(model)
    vocabulary = len(head.weight)
    batch = config.per_device_train_batch_size
    rows = torch.randint(3, vocabulary, (options.accumulation * batch, options.length)).tolist()
    samples = [TokenizedExample(ids, ids, line) for line, ids in enumerate(rows, start=1)]
    micro_batches = list(iter_batches(samples, range(len(samples)), batch, device.type == "cuda", config.length_multiple))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, fused=True)
    step = functools.partial(
        train_step, decoder, optimizer, micro_batches, functools.partial(token_loss_sum, head=head), 5e-5, 1.0
    )
    clock = (lambda: torch.cuda.Event(enable_timing=True)) if device.type == "cuda" else None
    milliseconds, losses = [], []
    with attention.for_training(model, config):
        first_step_s, loss = timed(step, None)
        losses += [loss, *(step()[0].item() for _ in range(WARM_UP_STEPS - 1))]
        if clock:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(options.steps):
            seconds, loss = timed(step, clock)
            milliseconds.append(1000 * seconds)
            losses.append(loss)
        profile = profiled(step) if clock else None
    tokens = options.accumulation * batch * options.length
    median = statistics.median(milliseconds)
    return {
        "attn_implementation": backend,
        "gradient_checkpointing": checkpointing,
        "compile": how,
        "batch": batch,
        "first_step_s": round(first_step_s, 2),
        "step_ms": round(median, 2),
        "step_ms_min_max": [round(min(milliseconds), 2), round(max(milliseconds), 2)],
        "tokens_per_s": round(1000 * tokens / median, 1),
        "peak_gb": round(peak_memory_gb(device), 3),
        "profile_ms": None if profile is None else {**profile, "idle": round(max(0.0, median - sum(profile.values())), 2)},
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "finite": all(loss == loss and abs(loss) != float("inf") for loss in losses),
    }


def timed(step, clock) -> tuple[float, float]:
    """Seconds of one step, by CUDA events on a GPU, and its loss."""
    import time

    import torch

    if clock is None:
        start = time.perf_counter()
        loss = step()[0].item()
        return time.perf_counter() - start, loss
    start, end = clock(), clock()
    start.record()
    loss = step()[0]
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000, loss.item()


KINDS = {  # of kernels, by what is in their names; the first that matches
    "dequantization": "dequant",
    "attention": "sdpa|flash|fmha|attention|cudnn|softmax_warp",
    "matrix products": "gemm|nvjet|cutlass|cublas|splitk",
}
OTHER = "elementwise and the rest"


def kind_of(kernel: str) -> str:
    """What a kernel does; one that torch.compile made has the names of its neighbors in its own."""
    if kernel.startswith("triton_"):
        return OTHER
    return next((kind for kind, words in KINDS.items() if re.search(words, kernel.lower())), OTHER)


def profiled(step: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of one step that the GPU spent in each kind of kernel."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    spent = dict.fromkeys([*KINDS, OTHER], 0.0)
    for event in trace.key_averages():
        spent[kind_of(event.key)] += event.self_device_time_total / 1000
    return {kind: round(milliseconds, 2) for kind, milliseconds in spent.items()}


def spread(name: str, times: list[float]) -> dict[str, float]:
    """Median, and the 10th and 90th percentile, under names with their unit."""
    tenths = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times * 9
    return {name: round(statistics.median(times), 4), f"{name}_p10": round(tenths[0], 4), f"{name}_p90": round(tenths[8], 4)}


def run_cell(options: Options, folder: str, backend: str, checkpointing: str, how: str) -> dict:
    """The row of a cell from a process of its own; a cell that cannot run is a row with the reason."""
    arguments = [
        f"--{name.replace('_', '-')}={getattr(options, name)}"
        for name in ("shape", "length", "accumulation", "dropout", "lora_r", "steps")
    ]
    arguments.append(f"--batch={options.batch[0]}")
    arguments += ["--cache-dequantized"] if options.cache_dequantized else []
    done = subprocess.run(
        [sys.executable, __file__, *arguments, "--cell", folder, backend, checkpointing, how],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}"
    return {
        "attn_implementation": backend,
        "gradient_checkpointing": checkpointing,
        "compile": how,
        "batch": options.batch[0],
        "unavailable": reason[:300],
    }


def main(options: Options) -> None:
    """Time every cell and write the file after each."""
    if options.cell:
        print(json.dumps(time_cell(options)))
        return
    import torch

    from qlora.run.environment import environment

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    cells: list[dict[str, Any]] = []
    flags = {name: value for name, value in dataclasses.asdict(options).items() if name not in {"out", "cell", "commit"}}
    described = environment(device)
    described["commit"] = options.commit or described["commit"]
    record = {"environment": described, "flags": flags, "warm_up_steps": WARM_UP_STEPS, "cells": cells}
    out = options.out or result_file("train_step", described)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        write_random_model(options.shape, Path(folder))
        hows = options.compile or (("graphs", "none") if device.type == "cuda" else ("none",))
        for batch, *cell in itertools.product(options.batch, options.backends, options.checkpointing, hows):
            cells.append(run_cell(dataclasses.replace(options, batch=(batch,)), folder, *cell))
            print(json.dumps(cells[-1]), flush=True)
            out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
