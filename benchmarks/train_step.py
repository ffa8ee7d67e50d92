"""One optimizer step, timed: the loop's own train_step on a model of exact shape with random weights.

    python -m benchmarks.train_step                            # a CUDA GPU, Phi-3-mini's shape; writes benchmarks/results/
    python -m benchmarks.train_step --shape tiny --length 64   # anywhere, a smoke test

A cell is a combination of backend, checkpointing, compilation and rows of a micro-batch. All rows are full: every position but
the first is supervised. On a GPU one more step is profiled: what of it went to matrix products, attention, dequantization, all
else that is computed, and to waiting for the next kernel.
"""

import dataclasses
import functools
import itertools
import math
import re
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks.harness import Cell, Clock, Output, ResultFile, Row, build, peak_gb, write_random_model
from benchmarks.tables import COMPILE_LABELS, load, source, table, table_of
from qlora.config import TrainConfig

WARM_UP_STEPS = 3


@dataclasses.dataclass(frozen=True)
class Options:
    """What to time."""

    output: tyro.conf.OmitArgPrefixes[Output] = Output()
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


def time_cell(config: TrainConfig, count: int) -> Row:
    """Build one model and time so many steps over full rows."""
    import torch

    from qlora.data.batch import iter_batches
    from qlora.data.template import TokenizedExample
    from qlora.model import attention
    from train_loop import train_step

    config, trainee = build(config)
    clock, batch = Clock(WARM_UP_STEPS), config.per_device_train_batch_size
    shape = (batch * config.gradient_accumulation_steps, config.max_length)  # of a step
    rows = torch.randint(3, trainee.model.config.vocab_size, shape).tolist()
    samples = [TokenizedExample(ids, ids, line) for line, ids in enumerate(rows, start=1)]
    micro_batches = list(iter_batches(samples, range(len(rows)), batch, clock.on_gpu, config.length_multiple))
    step = functools.partial(
        train_step, trainee.decoder, trainee.optimizer, micro_batches, trainee.loss_sum, learning_rate=5e-5, max_grad_norm=1.0
    )
    with attention.for_training(trainee.model.train(), config):
        for _ in range(WARM_UP_STEPS + count):
            clock.begin()
            loss, _ = step()
            clock.end()
            clock.losses.append(loss.item())  # waits
        profile = profiled(step) if clock.on_gpu else None
    first_ms, *milliseconds = clock.milliseconds()
    milliseconds = milliseconds[WARM_UP_STEPS - 1 :]
    median = statistics.median(milliseconds)
    return {
        "compile": config.compile,
        "attention": config.attn_implementation,
        "first_step_s": round(first_ms / 1000, 2),
        "step_ms": round(median, 2),
        "step_ms_min_max": [round(min(milliseconds), 2), round(max(milliseconds), 2)],
        "tokens_per_s": round(1000 * math.prod(shape) / median, 1),
        "peak_gb": peak_gb(),
        "profile_ms": profile and {**profile, "idle": round(max(0.0, median - sum(profile.values())), 2)},
        "first_loss": clock.losses[0],
        "last_loss": clock.losses[-1],
        "finite": all(map(math.isfinite, clock.losses)),
    }


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


def main(options: Options) -> None:
    """Time every cell and write the file after each."""
    file = ResultFile("train_step", options.output)
    flags = {name: value for name, value in vars(options).items() if name != "output"}
    cells: list[Row] = []
    file.record = {"environment": file.environment, "flags": flags, "warm_up_steps": WARM_UP_STEPS, "cells": cells}
    hows = options.compile or (("graphs", "none") if file.on_gpu else ("none",))
    with tempfile.TemporaryDirectory() as folder:
        Cell(write_random_model, options.shape, Path(folder)).result()
        shared: Any = {"model": folder, "max_length": options.length, "gradient_accumulation_steps": options.accumulation,
                       "lora_r": options.lora_r, "lora_dropout": options.dropout,
                       "cache_dequantized": options.cache_dequantized}  # fmt: skip
        for batch, *values in itertools.product(options.batch, options.backends, options.checkpointing, hows):
            cell = dict(zip(("attn_implementation", "gradient_checkpointing", "compile"), values, strict=True))
            config = TrainConfig(per_device_train_batch_size=batch, **cell, **shared)
            cells.append({"batch": batch, **cell, **Cell(time_cell, config, options.steps).row("unavailable")})
            file.write(cells[-1])


# -- tables ----------------------------------------------------------------------------------------------------------


def steps(pattern: str) -> str:
    """One step by backend, checkpointing and how layers run; where it went, if it was profiled."""
    name, record = load(pattern)
    flags, rows, profiles = record["flags"], [], []
    [batch] = flags["batch"] if isinstance(flags["batch"], list) else [flags["batch"]]
    for cell in record["cells"]:
        layers = COMPILE_LABELS[cell.get("compile", "none")]
        which = [f"`{cell['attn_implementation']}`", cell["gradient_checkpointing"], layers]
        if "unavailable" in cell:
            rows.append([*which, cell["unavailable"].split(". ")[0], "", ""])
        else:
            rows.append([*which, f"{cell['step_ms']:.0f}", f"{cell['tokens_per_s']:,.0f}", f"{cell['peak_gb']:.2f}"])
        if profile := cell.get("profile_ms"):
            profiles.append([*which, *(f"{milliseconds:.0f}" for milliseconds in profile.values())])
            kinds = list(profile)
    what = (
        f"{flags['shape']}, random weights, {flags['accumulation']} micro-batches of {batch} x {flags['length']} "
        f"tokens, LoRA dropout {flags['dropout']}, median of {flags['steps']} steps. "
    )
    headers = ["attention", "gradient checkpointing", "layers"]
    text = table([*headers, "ms per step", "tokens/s", "peak GB allocated"], rows) + "\n\n" + what + source(name, record)
    return text + ("\n\nWhere the step went, in ms:\n\n" + table([*headers, *kinds], profiles) if profiles else "")


def tokens(pattern: str) -> str:
    """Time and memory of a micro-batch from few tokens to many, in rows of one length."""
    name, record = load(pattern)
    length, cells = record["flags"]["length"], [cell for cell in record["cells"] if "step_ms" in cell]
    rows, profiles, before = [], [], None
    for cell in cells:
        count = cell["batch"] * length
        grown = "" if before is None else f"{(cell['peak_gb'] - before[1]) * 1e6 / (count - before[0]):.0f}"
        rows.append([f"{count:,}", f"{cell['step_ms']:,.0f}", f"{1000 * cell['step_ms'] / count:.1f}",
                     f"{cell['tokens_per_s']:,.0f}", f"{cell['peak_gb']:.2f}", grown])  # fmt: skip
        before = (count, cell["peak_gb"])
        profile = cell["profile_ms"]
        profiles.append([f"{count:,}", *(f"{taken:.0f} ({taken / sum(profile.values()):.0%})" for taken in profile.values())])
    headers = ["tokens", "ms", "us per token", "tokens/s", "peak GB", "KB per additional token"]
    chosen = f"`--gradient-checkpointing {cells[0]['gradient_checkpointing']} --compile {cells[0]['compile']}`"
    what = f"A step of one micro-batch of rows of {length:,} tokens, {chosen}, no dropout, sdpa. "
    measured = [cell["batch"] for cell in cells]
    if missing := [f"{size * length:,}" for size in record["flags"]["batch"] if size not in measured]:
        what += f"Not measured yet: {', '.join(missing)} tokens. "
    where = f"Where that time goes, in ms:\n\n{table(['tokens', *profile], profiles)}"
    return f"{table(headers, rows)}\n\n{where}\n\n{what}{source(name, record)}"


def ladder(pattern: str) -> str:
    """The means of speed, tried one by one."""
    name, record = load(pattern)

    def layers(cell: Row) -> str:
        parts = [cell["linear"], COMPILE_LABELS[cell["compile"]]]
        if cell.get("dynamic"):
            parts.append(f"T dynamic ({cell['step_ms_min_max'][0]:.0f} ms at best)")
        return ", ".join(parts + [f"{word} {cell[word]}" for word in ("kept", "weights") if word in cell])

    columns = {
        "layers": "{layers}",
        "gradient checkpointing": "{gradient_checkpointing}",
        "dropout": "{lora_dropout:g}",
        "tokens in a step": "{gradient_accumulation_steps} x {per_device_train_batch_size} x {length:,}",
        "ms per step": "{step_ms:.0f}",
        "tokens/s": "{tokens_per_s:,.0f}",
        "peak GB": "{peak_gb:.2f}",
        "first step, s": "{first_step_s:.0f}",
    }
    rows = table_of(columns, [{**cell, "layers": layers(cell)} for cell in record["cells"]])
    return f"{rows}\n\n{record['what'][0].upper()}{record['what'][1:]}. {source(name, record)}"


if __name__ == "__main__":
    main(tyro.cli(Options))
