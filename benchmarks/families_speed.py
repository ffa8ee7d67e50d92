"""What compiled and recorded layers bring to each model family: a training step at full width, beside layers as written.

    python -m benchmarks.families_speed                      # a CUDA GPU, NF4, four layers with random weights
    python -m benchmarks.families_speed --models qwen2.5-7b glm-4-9b --out FILE

A cell trains one model twice in its own process, with `--compile none` and with `--compile auto`, on the same full rows. Before
that, each model has been written and compiled by processes that run side by side, so that timing finds kernels in the cache.
Four layers have the embeddings and the head of the whole model, which nothing speeds up: whole models gain more.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import tyro

from benchmarks.harness import Cell, Output, ResultFile, Row
from benchmarks.shapes import SHAPES, write_shape
from benchmarks.tables import load, source, table
from benchmarks.train_step import time_cell
from qlora.config import Compile, TrainConfig
from qlora.data.batch import batched

AT_ONCE = 6  # models that are written and compiled side by side


@dataclasses.dataclass(frozen=True)
class Options:
    """Which models, and how much of them."""

    output: tyro.conf.OmitArgPrefixes[Output] = Output()
    models: tuple[str, ...] = tuple(SHAPES)
    """Names in benchmarks/shapes.py."""
    layers: int = 4
    """Of each model."""
    length: int = 2048
    """Tokens in a row; two rows in a micro-batch, two micro-batches per step."""
    steps: int = 6
    """Timed steps, after 3 to warm up."""


def train(folder: Path, compile: Compile, length: int, count: int) -> Row:
    """Time steps of a model without checkpointing on full rows, two micro-batches of two."""
    config = TrainConfig(
        model=str(folder), compile=compile, max_length=length, gradient_checkpointing="none", lora_r=32, lora_alpha=64,
        lora_dropout=0.0, per_device_train_batch_size=2, gradient_accumulation_steps=2,
    )  # fmt: skip
    return time_cell(config, count)


def both(folder: Path, length: int, count: int) -> Row:
    """The model with layers as written, and compiled."""
    import gc

    import torch

    rows: Row = {}
    ways: dict[str, Compile] = {"as written": "none", "compiled": "auto"}
    for name, compile in ways.items():
        torch._dynamo.reset()
        rows[name] = train(folder, compile, length, count)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    rows["ratio"] = round(rows["compiled"]["tokens_per_s"] / rows["as written"]["tokens_per_s"], 3)
    return rows


def write_and_compile(name: str, folder: Path, layers: int, length: int) -> Row:
    """Write the model, and train it for a few steps, which leaves its kernels in the cache."""
    changes: dict[str, Any] = {"num_hidden_layers": layers}
    if SHAPES[name]["family"] in ("Gemma2", "Gemma3Text", "Olmo3", "Cohere2"):  # a layer of each kind
        changes["layer_types"] = (["sliding_attention", "full_attention"] * layers)[:layers]
    write_shape(name, folder, **changes)
    train(folder, "auto", length, 1)
    return {}


def main(options: Options) -> None:
    """Measure the models, a few at a time, and write the file after each."""
    file = ResultFile("families_speed", options.output)
    file.begin_run({"layers": options.layers, "length": options.length}, steps=options.steps)
    for names in batched(options.models, AT_ONCE):
        with tempfile.TemporaryDirectory() as scratch:
            folders = {name: Path(scratch) / name for name in names}
            cells = {
                name: Cell(write_and_compile, name, folder, options.layers, options.length).start()
                for name, folder in folders.items()
            }
            ready = {name: cell.row("unavailable") for name, cell in cells.items()}
            for name, folder in folders.items():
                row = {"model": name, "commit": file.environment["commit"], **ready[name]}
                if "unavailable" not in row:
                    row |= Cell(both, folder, options.length, options.steps).row("unavailable")
                file.record["cells"] = [*(other for other in file.record["cells"] if other["model"] != name), row]
                file.write(row)


def speeds(pattern: str) -> str:
    """A row per model."""
    name, record = load(pattern)
    rows = []
    for cell in record["cells"]:
        family = SHAPES[cell["model"]]["family"]
        if "unavailable" in cell:
            rows.append([cell["model"], family, cell["unavailable"], "", "", "", "", ""])
            continue
        plain, fast = cell["as written"], cell["compiled"]
        rows.append(
            [cell["model"], family, f"{plain['tokens_per_s']:,.0f}", f"{fast['tokens_per_s']:,.0f}", f"{cell['ratio']:.2f}",
             fast["compile"], fast["attention"], f"{plain['peak_gb']:.2f}, {fast['peak_gb']:.2f}"]
        )  # fmt: skip
    headers = ["model", "family", "as written, tokens/s", "compiled, tokens/s", "ratio", "compiled as", "attention", "peak, GB"]
    return f"{table(headers, rows)}\n\n{source(name, record)}"


if __name__ == "__main__":
    main(tyro.cli(Options))
