"""flash, sdpa and eager compared: kernels alone, the loop's own step, and whether the numbers are the same.

    python benchmarks/attention.py                        # this machine: a GPU at Phi-3-mini's shape, a CPU at the demo's
    python benchmarks/attention.py --levels kernel --lengths 2048 8192
    python benchmarks/report.py                           # the tables and plots from what was measured

Each cell runs in a process of its own, so that its peak memory, and running out of it, are its own (on a CPU the peak is that
of the process, loading included). A cell that cannot run is a row with the reason. Which kernel ran is read from the profiler,
never from the configuration, and a cell whose kernel is another than its name says is refused. Several runs on one card merge
into one file: a cell measured again replaces the old.
"""

import dataclasses
import datetime
import functools
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import tyro

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # run as a script, Python has only this file's folder there

from benchmarks.kill_resume import fork, wait  # noqa: E402
from qlora.run.schema import in_gb  # noqa: E402

Level = Literal["kernel", "step", "parity"]
KERNELS = ("eager", "sdpa", "sdpa_cudnn", "sdpa_flash", "sdpa_efficient", "sdpa_math", "flash_attention_2", "varlen",
           "flex_attention", "flash_attention_4")  # fmt: skip
BACKENDS = ("sdpa", "flash_attention_2", "varlen", "eager")  # values of --attn-implementation
ON_A_CPU = ("eager", "sdpa", "sdpa_flash", "sdpa_math")
MEASURED_UP_TO = {"none": 8192}  # tokens; without checkpointing longer rows do not fit 80 GB
KEY = ("level", "backend", "length", "rows", "window", "layout", "checkpointing")


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compare. What is unset depends on the machine: more on a GPU, a small grid in under two minutes on a CPU."""

    levels: tuple[Level, ...] = ("kernel", "step", "parity")
    """kernel: attention alone. step: train_step on the NF4 model. parity: numbers against an fp32 reference."""
    shape: Literal["phi3-mini", "demo", "tiny"] | None = None
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
    missing: bool = False
    """Only cells that the file does not have yet."""
    minutes: float | None = None
    """Start no further cell after this many minutes; a later run with --missing continues."""
    out: Path | None = None
    """Where the JSON is, or goes. Unset: benchmarks/results/attention_CARD_YYYYMM.json."""
    commit: str | None = None
    """Commit of the code, where it runs without its repository."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """The options with nothing unset."""

    shape: str
    kernels: tuple[str, ...]
    backends: tuple[str, ...]
    lengths: tuple[int, ...]
    kernel_tokens: int
    step_tokens: int
    batch: int | None
    checkpointing: tuple[str, ...]
    window: int
    around_window: tuple[int, ...]  # tokens at which transformers' own masks are timed; a CPU loses no kernel to them
    packing: bool
    samples: int  # of a padded or packed step
    timed_s: float  # steps of a cell
    parallel: bool  # what is not timed
    steps: int


def grid_of(options: Options, on_gpu: bool) -> Grid:
    """Fill in what depends on the machine."""
    wanted = options.backends
    window = options.window or (2047 if on_gpu else 63)
    kernels = KERNELS if on_gpu else ON_A_CPU
    return Grid(
        shape=options.shape or ("phi3-mini" if on_gpu else "demo"),
        kernels=tuple(name for name in wanted if name in KERNELS) if wanted else kernels,
        backends=tuple(name for name in wanted or (BACKENDS if on_gpu else ON_A_CPU) if name in BACKENDS),
        lengths=options.lengths or ((512, 1024, 2048, 4096, 8192, 16384) if on_gpu else (64, 256)),
        kernel_tokens=options.kernel_tokens or (16384 if on_gpu else 256),
        step_tokens=4096 if on_gpu else 256,
        batch=options.batch,
        checkpointing=options.checkpointing or (("full", "none") if on_gpu else ("none",)),
        window=window,
        around_window=(window - 1, window, window + 1) if on_gpu else (),
        packing=options.packing,
        samples=16 if on_gpu else 8,
        timed_s=3.0 if on_gpu else 1.0,
        parallel=on_gpu,
        steps=options.steps,
    )


def kernel_cells(grid: Grid) -> Iterator[dict[str, Any]]:
    """Attention alone, without the window and, where it acts, with it."""
    for length in grid.lengths:
        for window in (None, grid.window) if length > grid.window else (None,):
            for backend in grid.kernels:
                rows = max(1, grid.kernel_tokens // length)
                yield {"level": "kernel", "backend": backend, "length": length, "window": window, "rows": rows}


def step_cells(grid: Grid) -> Iterator[dict[str, Any]]:
    """One optimizer step: full rows of each length; lognormal lengths, padded and packed; and transformers' own masks."""
    for backend in grid.backends:
        common = {"level": "step", "backend": backend}
        for checkpointing in grid.checkpointing:
            for length in grid.lengths:
                if length <= MEASURED_UP_TO.get(checkpointing, length):
                    rows = grid.batch or max(1, grid.step_tokens // length)
                    cell = {"length": length, "rows": rows, "layout": "full", "checkpointing": checkpointing}
                    yield {**common, **cell, "window": "as trained"}
        longest = grid.window + 1
        for layout in ("padded", "packed") if grid.packing else ():
            rows = grid.batch or max(1, 2 * grid.step_tokens // longest) * (2 if layout == "padded" else 1)  # about one memory
            cell = {"length": longest, "rows": rows, "layout": layout, "checkpointing": grid.checkpointing[0]}
            yield {**common, **cell, "window": "as trained"}
        if backend == "varlen":  # transformers has no such name
            continue
        for length in grid.around_window if backend == "sdpa" else grid.around_window[-1:]:
            rows = grid.batch or max(1, grid.step_tokens // longest)
            cell = {"length": length, "rows": rows, "layout": "full", "checkpointing": grid.checkpointing[0]}
            yield {**common, **cell, "window": "left to transformers"}


def parity_cells(grid: Grid) -> Iterator[dict[str, Any]]:
    """One process for each backend, which goes through all lengths and layouts; the reference first."""
    lengths = [grid.window - 1, grid.window, grid.window + 1, grid.window + 2, 2 * grid.window + 2]
    for backend in ("reference", *grid.backends):
        yield {"level": "parity", "backend": backend, "lengths": lengths}


class Started:
    """A cell that is being measured, in a process of its own."""

    def __init__(self, cell: dict[str, Any], grid: Grid, scratch: Path):
        self.cell, self.began = cell, time.perf_counter()
        self.result, self.log = (scratch / f"{cell['level']}-{cell.get('backend')}.{suffix}" for suffix in ("json", "log"))
        for path in (self.result, self.log):
            path.unlink(missing_ok=True)
        self.child = fork(functools.partial(_work, cell, dataclasses.asdict(grid), scratch, self.result), self.log)

    def rows(self, timeout_s: float) -> list[dict[str, Any]]:
        """Wait for it, not longer than that; a process that crashes is a row that says `failed`."""
        while (waited := os.waitpid(self.child, os.WNOHANG))[0] == 0:
            if time.perf_counter() - self.began > timeout_s:
                os.kill(self.child, signal.SIGKILL)
                wait(self.child)
                return [{**self.cell, "failed": f"not done in {timeout_s:g} s"}]
            time.sleep(0.005)
        seconds = round(time.perf_counter() - self.began, 2)
        if self.result.exists():
            return [{**row, "seconds": seconds} for row in json.loads(self.result.read_text())]
        lines = self.log.read_text().strip().splitlines() if self.log.exists() else []
        reason = lines[-1][:300] if lines else f"ended with status {waited[1]}"
        return [{**self.cell, "failed": reason, "seconds": seconds}]  # a mistake of this file, or of a library


def _work(cell: dict[str, Any], grid: dict[str, Any], scratch: Path, result: Path) -> int:
    import torch

    from benchmarks import attention_kernels

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

    def rows() -> Iterator[dict[str, Any]]:
        if cell["level"] == "kernel":
            yield {**cell, **attention_kernels.kernel(cell, grid, device)}
            return
        from benchmarks.attention_cells import measure  # imports bitsandbytes, which touches the GPU

        yield from measure(cell, grid, scratch, device)

    result.write_text(json.dumps(attention_kernels.measured(cell, rows)))
    return 0


def key(cell: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two cells the same."""
    return tuple(cell.get(name) for name in KEY)


def is_known(cell: dict[str, Any], cells: list[dict[str, Any]]) -> bool:
    """Whether there is a row of this cell; the cell of parity has many."""
    named = [name for name in KEY if name in cell]
    return any(all(other.get(name) == cell[name] for name in named) and "failed" not in other for other in cells)


def merged(before: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cells of a file with new ones in the place of old ones of the same key."""
    new = {key(row): row for row in rows}
    kept = [new.pop(key(cell), cell) for cell in before]
    done = {(row["level"], row["backend"]) for row in rows if "failed" not in row}
    # What stands for all of a backend's parity is gone when its rows are there.
    kept = [cell for cell in kept if "lengths" not in cell or (cell["level"], cell["backend"]) not in done]
    return [*kept, *new.values()]


def opened(options: Options, environment: dict[str, Any], grid: Grid) -> tuple[Path, dict[str, Any]]:
    """The file and what it holds already; one of another machine, other versions, shape or window is refused."""
    path = options.out or result_file("attention", environment)
    return path, reopened(path, environment, {name: getattr(grid, name) for name in ("shape", "window", "kernel_tokens")})


def result_file(benchmark: str, environment: dict[str, Any]) -> Path:
    """benchmarks/results/BENCHMARK_CARD_YYYYMM.json."""
    card = re.search(r"[HABLV]\d{2,3}|CPU", environment["device"])
    name = f"{benchmark}_{card[0].lower() if card else 'gpu'}_{datetime.date.today():%Y%m}.json"
    return ROOT / "benchmarks" / "results" / name


def reopened(path: Path, environment: dict[str, Any], fixed: dict[str, Any]) -> dict[str, Any]:
    """What the file holds already; one of another machine or other versions, or whose runs differ in `fixed`, is refused."""
    if not path.exists():
        return {"environment": environment, "runs": [], "cells": []}
    record = json.loads(path.read_text(), object_hook=in_gb)
    for name in ("device", "packages"):
        if record["environment"][name] != environment[name]:
            raise SystemExit(f"{path} has another {name}: {record['environment'][name]}. Give another --out.")
    for name, value in fixed.items():
        if any(run[name] != value for run in record["runs"]):
            raise SystemExit(f"{path} has another {name}: {record['runs'][0][name]}. Give another --out.")
    return record


def main(options: Options) -> None:
    """Measure every cell and write the file after each."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # imports ask for a GPU; asked otherwise, CUDA would not survive the fork
    import torch
    import torch._inductor.compile_fx
    import torch.utils.tensorboard
    import transformers.models.phi3.modeling_phi3  # noqa: F401  for the children, as the lines around it

    import benchmarks.attention_kernels  # noqa: F401

    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        none = grid_of(options, on_gpu=False)
        described = Started({"level": "environment"}, none, scratch).rows(300.0)[0]  # this process stays off the GPU
        if "failed" in described:
            raise SystemExit(f"the machine could not be described: {described['failed']}")
        environment = {**described["environment"], "commit": options.commit or described["environment"]["commit"]}
        grid = grid_of(options, on_gpu=environment["cuda_device"])
        path, record = opened(options, environment, grid)
        record["matmul_tflops"] = described["matmul_tflops"]
        record["runs"].append({"commit": environment["commit"], "date": f"{datetime.date.today()}", **dataclasses.asdict(grid)})
        cells = {"kernel": kernel_cells, "step": step_cells, "parity": parity_cells}
        known = record["cells"] if options.missing else []
        wanted = [cell for level in options.levels for cell in cells[level](grid) if not is_known(cell, known)]
        if {cell["level"] for cell in wanted} - {"kernel"}:
            written = Started({"level": "model"}, grid, scratch).rows(300.0)[0]
            if "failed" in written:
                raise SystemExit(f"the model could not be written: {written['failed']}")
        untimed = [cell for cell in wanted if grid.parallel and cell["level"] == "parity" and cell["backend"] != "reference"]
        for group in [[cell] for cell in wanted if cell not in untimed] + [untimed]:  # those at once, behind their reference
            if options.minutes is not None and time.perf_counter() - began > 60 * options.minutes:
                break
            for started in [Started(cell, grid, scratch) for cell in group]:
                rows = started.rows(options.timeout_s)
                rows = [{**row, "commit": environment["commit"]} for row in rows]
                record["cells"] = merged(record["cells"], [row for row in rows if row["backend"] != "reference"])
                path.write_text(json.dumps(record, indent=1) + "\n")
                print(json.dumps({name: value for name, value in rows[-1].items() if name != "kernels"}), flush=True)
    assert not torch.cuda.is_initialized(), "this process must not touch the GPU"
    if failed := [cell for cell in record["cells"] if "failed" in cell]:
        raise SystemExit(f"{len(failed)} cells failed, the first with: {failed[0]['failed']}")


if __name__ == "__main__":
    main(tyro.cli(Options))
