"""What is compared, which cells that makes, and what becomes of their rows."""

import concurrent.futures
import dataclasses
import functools
import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import tyro

from benchmarks.attention import kernels, model
from benchmarks.harness import Cell, Output, Part, ResultFile, Row, Shape, write_random_model

KEY = ("level", "backend", "length", "rows", "window", "layout", "checkpointing")  # tells cells apart
BACKENDS = ("sdpa", "flash_attention_2", "varlen", "eager")  # values of --attn-implementation
USUAL = {  # what is measured on a GPU, and on a CPU, unless an option says otherwise
    "shape": ("phi3-mini", "demo"),
    "kernels": (tuple(kernels.KERNELS), kernels.ON_A_CPU),
    "backends": (BACKENDS, ("eager", "sdpa")),
    "lengths": ((512, 1024, 2048, 4096, 8192, 16384), (64, 256)),
    "kernel_tokens": (16384, 256),
    "step_tokens": (4096, 256),  # in a micro-batch
    "batch": (None, None),
    "checkpointing": (("full", "none"), ("none",)),
    "window": (2047, 63),
    "around_window": ((-1, 0, 1), ()),  # where transformers' own masks are timed; a CPU loses no kernel to them
    "packing": (True, True),
    "samples": (16, 8),  # of a padded or packed step
    "timed_s": (3.0, 1.0),  # steps of a cell
    "parallel": (True, False),  # cells of parity: nothing is timed
    "steps": (8, 8),
}
LONGEST = {"none": 8192}  # tokens; without checkpointing longer rows do not fit 80 GB


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compare. What is unset depends on the machine: more on a GPU, a small grid in under two minutes on a CPU."""

    output: tyro.conf.OmitArgPrefixes[Output] = Output()
    part: tyro.conf.OmitArgPrefixes[Part] = Part()
    levels: tuple[Literal["kernel", "step", "parity"], ...] = ("kernel", "step", "parity")
    """kernel: attention alone. step: train_step on the NF4 model. parity: numbers against an fp32 reference."""
    shape: Shape | None = None
    """Exact shapes with random weights. Unset: phi3-mini on a GPU, demo on a CPU."""
    backends: tuple[str, ...] | None = None
    """Unset: all that there are for each level."""
    lengths: tuple[int, ...] | None = None
    """Tokens in a row, for kernel and step. Unset: 512 to 16384 on a GPU, 64 and 256 on a CPU."""
    kernel_tokens: int | None = None
    """Tokens in all rows of a kernel cell; a longer row is one row. Unset: 16384 on a GPU, 256 on a CPU."""
    batch: int | None = None
    """Rows in the micro-batch of a step. Unset: as many as make 4096 tokens on a GPU, 256 on a CPU."""
    checkpointing: tuple[Literal["full", "none"], ...] | None = None
    """Of a step. Unset: both on a GPU, none on a CPU."""
    window: int | None = None
    """The model's sliding window. Unset: Phi-3-mini-4k's 2047 on a GPU, 63 on a CPU."""
    packing: bool = True
    """Compare padded rows with packed ones, too."""
    steps: int = 8
    """Timed steps of a cell at most; long ones get fewer, never less than 3."""
    timeout_s: float = 120.0
    """For one cell."""


def grid_of(options: Options, on_gpu: bool) -> Row:
    """The options with nothing unset, and what depends on the machine alone."""
    given = {name: value for name, value in vars(options).items() if value is not None}
    grid = {name: given.get(name, usual[0 if on_gpu else 1]) for name, usual in USUAL.items()}
    if options.backends:
        grid["kernels"] = [name for name in options.backends if name in kernels.KERNELS]
        grid["backends"] = [name for name in options.backends if name in BACKENDS]
    return {**grid, "around_window": [grid["window"] + offset for offset in grid["around_window"]]}


def kernel_cells(grid: Row) -> Iterator[Row]:
    """Attention alone, without the window and, where it acts, with it."""
    for length in grid["lengths"]:
        for window in (None, grid["window"]) if length > grid["window"] else (None,):
            for backend in grid["kernels"]:
                rows = max(1, grid["kernel_tokens"] // length)
                yield {"level": "kernel", "backend": backend, "length": length, "window": window, "rows": rows}


def step_cells(grid: Row) -> Iterator[Row]:
    """One optimizer step: full rows of each length; lognormal lengths, padded and packed; and transformers' own masks."""
    tokens, longest, usual = grid["step_tokens"], grid["window"] + 1, grid["checkpointing"][0]
    for backend in grid["backends"]:
        found = [
            (length, tokens // length, "full", checkpointing, "as trained")
            for checkpointing, length in itertools.product(grid["checkpointing"], grid["lengths"])
            if length <= LONGEST.get(checkpointing, length)
        ]
        if grid["packing"]:  # in about the same memory
            found.append((longest, 4 * tokens // longest, "padded", usual, "as trained"))
            found.append((longest, 2 * tokens // longest, "packed", usual, "as trained"))
        around = {"sdpa": grid["around_window"], "varlen": []}  # transformers has no varlen
        for length in around.get(backend, grid["around_window"][-1:]):
            found.append((length, tokens // longest, "full", usual, "left to transformers"))
        for length, rows, layout, checkpointing, window in found:
            cell = {"level": "step", "backend": backend, "length": length, "rows": grid["batch"] or max(1, rows)}
            yield {**cell, "layout": layout, "checkpointing": checkpointing, "window": window}


def parity_cells(grid: Row) -> Iterator[Row]:
    """One process for each backend, which goes through all lengths and layouts."""
    window = grid["window"]
    for backend in grid["backends"]:
        yield {"level": "parity", "backend": backend, "lengths": [window - 1, window, window + 1, window + 2, 2 * window + 2]}


LEVELS = {"kernel": (kernel_cells, kernels.kernel), "step": (step_cells, model.step), "parity": (parity_cells, model.parity)}


def is_of(row: Row, cell: Row) -> bool:
    """Whether a row is of a cell. A cell of parity has many."""
    return all(row.get(name) == cell[name] for name in KEY if name in cell)


def rows_of(cell: Row, grid: Row, scratch: Path, timeout_s: float) -> list[Row]:
    """What a process of its own measures. One that crashes is a row that says `failed`."""
    began = time.perf_counter()
    found = Cell(kernels.measured, LEVELS[cell["level"]][1], cell, grid, scratch).row("failed", timeout_s)
    seconds = round(time.perf_counter() - began, 2)
    return [{**row, "seconds": seconds} for row in found.get("rows", [cell | found])]


def keep(file: ResultFile, cell: Row, rows: list[Row]) -> None:
    """Put the rows of a cell in the place of those that the file has of it, and write it."""
    others = [row for row in file.record["cells"] if not is_of(row, cell)]
    file.record["cells"] = others + [{**row, "commit": file.environment["commit"]} for row in rows]
    file.write({name: value for name, value in rows[-1].items() if name != "kernels"})


def main(options: Options) -> None:
    """Measure every cell and write the file after each."""
    file = ResultFile("attention", options.output)
    grid = grid_of(options, file.on_gpu)
    file.begin_run({name: grid[name] for name in ("shape", "window", "kernel_tokens")}, **grid)
    if "matmul_tflops" not in file.record:
        file.record["matmul_tflops"] = Cell(kernels.matmul_tflops).result()
    known = [row for row in file.record["cells"] if "failed" not in row] if options.part.missing else []
    every = [cell for level in options.levels for cell in LEVELS[level][0](grid)]
    wanted = [cell for cell in every if not any(is_of(row, cell) for row in known)]
    parity = [cell for cell in wanted if cell["level"] == "parity"]
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        measure = functools.partial(rows_of, grid=grid, scratch=scratch, timeout_s=options.timeout_s)
        if any(cell["level"] != "kernel" for cell in wanted):
            # Longer rows than the 4,096 of Phi-3-mini-4k are measured too.
            write = functools.partial(write_random_model, max_position_embeddings=32768)
            Cell(write, grid["shape"], scratch / "model").result()
        for cell in wanted:
            if cell not in parity and not file.is_late(options.part.minutes):
                keep(file, cell, measure(cell))
        if parity and not file.is_late(options.part.minutes):
            Cell(model.write_reference, parity[0], grid, scratch).result()
            with concurrent.futures.ThreadPoolExecutor(len(parity) if grid["parallel"] else 1) as threads:
                for cell, rows in zip(parity, threads.map(measure, parity), strict=True):
                    keep(file, cell, rows)
    if failed := [cell["failed"] for cell in file.record["cells"] if "failed" in cell]:
        raise SystemExit(f"{len(failed)} cells failed, the first with: {failed[0]}")


if __name__ == "__main__":
    main(tyro.cli(Options))
