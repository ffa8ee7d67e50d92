"""How long the quantized model takes to load, from bf16 and from a folder that bitsandbytes saved in NF4, and what it needs.

    python benchmarks/loading.py                  # a CUDA GPU: Phi-3-mini's shape, random weights, 10 GB of disk while it runs
    python benchmarks/loading.py --shape tiny     # anywhere, a smoke test

Each folder is loaded in a process of its own, several times: what is timed is `load_nf4_model`, imports and the CUDA context
apart. The files lie in the page cache, since they have just been written: a disk comes on top.
"""

import dataclasses
import datetime
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import tyro

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # run as a script, Python has only this file's folder there

from benchmarks.attention import result_file  # noqa: E402
from benchmarks.train_step import write_random_model  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Options:
    """What to load."""

    shape: Literal["phi3-mini", "tiny"] = "phi3-mini"
    """tiny: the model of the tests."""
    loads: int = 3
    """Of each folder."""
    out: Path | None = None
    """Where the JSON goes. Unset: benchmarks/results/loading_CARD_YYYYMM.json."""
    commit: str | None = None
    """Commit of the code, where it runs without its repository."""
    cell: tuple[Path, Literal["bf16", "NF4"], Path] | None = None
    """Internal: folder to load, how it is stored, and where to save what was loaded in NF4; prints its JSON."""


def load_cell(options: Options) -> dict[str, Any]:
    """Load a folder several times; its row."""
    import torch

    from qlora.config import TrainConfig
    from qlora.model.load import load_nf4_model
    from qlora.speed.memory import peak_memory_gb

    assert options.cell is not None
    folder, stored, saved = options.cell
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    torch.zeros(1, device=device)  # [1]; the context
    took: list[float] = []
    for _ in range(options.loads):
        model = None
        gc.collect()  # the last one, which refers to itself
        began = time.perf_counter()
        model = load_nf4_model(str(folder), TrainConfig(model=str(folder)), "sdpa", device)
        if device.type == "cuda":
            torch.cuda.synchronize()
        took.append(round(time.perf_counter() - began, 2))
    assert model is not None
    if stored == "bf16":
        model.save_pretrained(saved)
    held = torch.cuda.memory_allocated() if device.type == "cuda" else model.get_memory_footprint()
    disk = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    largest = max(
        module.in_features * module.out_features * 2 for module in model.model.modules() if hasattr(module, "in_features")
    )
    return {"stored": stored, "load_s": took, "disk_gb": disk / 1e9, "model_gb": held / 1e9,
            "peak_gb": peak_memory_gb(device), "largest_layer_gb": largest / 1e9}  # fmt: skip


def main(options: Options) -> None:
    """Write the model, load it from both folders, and write the file."""
    if options.cell:
        print(json.dumps(load_cell(options)))
        return
    import torch

    from qlora.run.environment import environment

    described = environment(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
    described["commit"] = options.commit or described["commit"]
    cells = []
    with tempfile.TemporaryDirectory() as scratch:
        bf16, nf4 = Path(scratch, "bf16"), Path(scratch, "nf4")
        write_random_model(options.shape, bf16)
        for folder, stored in ((bf16, "bf16"), (nf4, "NF4")):
            command = [sys.executable, __file__, "--loads", str(options.loads), "--cell", str(folder), stored, str(nf4)]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            cells.append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(cells[-1]), flush=True)
    largest = {cell.pop("largest_layer_gb") for cell in cells}
    record = {"environment": described, "date": f"{datetime.date.today()}", "shape": options.shape, "loads": options.loads,
              "largest_layer_gb": largest.pop(), "cells": cells}  # fmt: skip
    path = options.out or result_file("loading", described)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
