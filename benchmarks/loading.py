"""How long the quantized model takes to load, from bf16 and from a folder that bitsandbytes saved in NF4, and what it needs.

    python -m benchmarks.loading                  # a CUDA GPU: Phi-3-mini's shape, random weights, 10 GB of disk while it runs
    python -m benchmarks.loading --shape tiny     # anywhere, a smoke test

Each folder is loaded several times by one process. Imports and the CUDA context do not count. The files are in the page cache,
since they have just been written: a disk comes on top.
"""

import datetime
import gc
import statistics
import tempfile
from pathlib import Path
from typing import Literal

import tyro

from benchmarks.harness import Cell, Clock, Output, ResultFile, Row, peak_gb, write_random_model
from benchmarks.tables import load, source, table


def load_cell(folder: Path, saved: Path | None, loads: int) -> Row:
    """Load a folder several times, and save it in NF4 to `saved`; what is measured."""
    import torch

    from qlora.config import TrainConfig
    from qlora.model.load import load_nf4_model

    clock = Clock()
    torch.zeros(1, device=clock.device)  # [1]; the context
    took: list[float] = []
    for _ in range(loads):
        model = None
        gc.collect()  # the last one, which refers to itself
        began = clock.now()
        model = load_nf4_model(str(folder), TrainConfig(model=str(folder)), "sdpa", clock.device)
        took.append(round(clock.now() - began, 2))
    if saved:
        model.save_pretrained(saved)
    held = torch.cuda.memory_allocated() if clock.on_gpu else model.get_memory_footprint()
    disk = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    linear = [module for module in model.model.modules() if hasattr(module, "in_features")]
    largest = max(2 * module.in_features * module.out_features for module in linear)
    return {"load_s": took, "disk_gb": disk / 1e9, "model_gb": held / 1e9, "peak_gb": peak_gb(),
            "largest_layer_gb": largest / 1e9}  # fmt: skip


def main(
    output: tyro.conf.OmitArgPrefixes[Output] = Output(), shape: Literal["phi3-mini", "tiny"] = "phi3-mini", loads: int = 3
) -> None:
    """Write the model, load it from both folders, and write the file.

    Args:
        shape: tiny: the model of the tests.
        loads: of each folder.
    """
    file = ResultFile("loading", output)
    with tempfile.TemporaryDirectory() as scratch:
        bf16, nf4 = Path(scratch, "bf16"), Path(scratch, "nf4")
        Cell(write_random_model, shape, bf16).result()
        cells = [{"stored": "bf16"} | Cell(load_cell, bf16, nf4, loads).result()]
        cells.append({"stored": "NF4"} | Cell(load_cell, nf4, None, loads).result())
    largest = max(cell.pop("largest_layer_gb") for cell in cells)
    file.record = {"environment": file.environment, "date": f"{datetime.date.today()}", "shape": shape,
                   "loads": loads, "largest_layer_gb": largest, "cells": cells}  # fmt: skip
    file.write(file.record)


def load_times(pattern: str) -> str:
    """How long a model takes to load, in bf16 and as it was saved in NF4, and the most memory on the way."""
    name, record = load(pattern)
    rows = [[cell["stored"], f"{cell['disk_gb']:.2f}", f"{cell['load_s'][0]:.1f}", f"{statistics.median(cell['load_s']):.1f}",
             f"{cell['model_gb']:.2f}", f"{cell['peak_gb']:.2f}" if cell["peak_gb"] else "not measured"]
            for cell in record["cells"]]  # fmt: skip
    headers = ["stored as", "on disk, GB", "first load, s", "median, s", "loaded, GB", "peak on the way, GB"]
    what = f"The largest linear layer is {record['largest_layer_gb']:.2f} GB in bf16. Loaded {record['loads']} times in a "
    what += f"process of its own, files in the page cache. {record.get('note', '')}".strip()
    return f"{table(headers, rows)}\n\n{what} {source(name, record)}"


if __name__ == "__main__":
    tyro.cli(main)
