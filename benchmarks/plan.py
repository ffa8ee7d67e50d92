"""What `python -m qlora plan` predicts, held against the peaks of steps that run: policies, lengths, batches, ranks, backends.

    python benchmarks/plan.py                                 # a CUDA GPU; Phi-3-mini's shape, 16 settings, 8 minutes
    python benchmarks/plan.py --minutes 4 --missing           # only what the file lacks
    python benchmarks/report.py                               # the table and the plot

Each setting runs in a process of its own (benchmarks/train_step.py), so that its peak is its own. One that runs out of memory
is a row with the reason.
"""

import dataclasses
import datetime
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import tyro

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # run as a script, Python has only this file's folder there

from benchmarks import train_step  # noqa: E402
from benchmarks.attention import reopened, result_file  # noqa: E402

Setting = dict[str, Any]
FIRST: Setting = {"checkpointing": "none", "compile": "graphs", "backend": "sdpa", "batch": 2, "length": 2048, "lora_r": 32}
SETTINGS: tuple[Setting, ...] = tuple(
    FIRST | changed
    for changed in (
        {},
        {"checkpointing": "selective"},
        {"checkpointing": "full"},
        {"compile": "layers"},
        {"compile": "layers", "checkpointing": "selective"},
        {"compile": "layers", "checkpointing": "full"},
        {"compile": "none", "checkpointing": "full"},
        {"lora_r": 8, "checkpointing": "full"},
        {"lora_r": 128, "checkpointing": "selective"},
        {"batch": 1, "length": 512},
        {"batch": 4, "length": 1024, "checkpointing": "selective"},
        {"batch": 1, "length": 4096, "checkpointing": "full"},
        {"batch": 8, "checkpointing": "full", "compile": "layers"},
        {"batch": 1, "backend": "eager", "checkpointing": "full"},
        {"backend": "varlen", "checkpointing": "full"},
        {"backend": "flash_attention_2", "checkpointing": "selective"},
    )
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    shape: Literal["phi3-mini", "tiny"] = "phi3-mini"
    """tiny: the model of the tests, a smoke test anywhere."""
    only: tuple[int, ...] | None = None
    """Numbers of settings, from 0. Unset: all."""
    missing: bool = False
    """Only what the file does not have yet."""
    minutes: float | None = None
    """Start no further setting after so long."""
    out: Path | None = None
    """Where the JSON is, or goes. Unset: benchmarks/results/plan_CARD_YYYYMM.json."""
    commit: str | None = None
    """Commit of the code, where it runs without its repository."""


def predicted_gb(shape: str, folder: str, setting: Setting) -> float:
    """What training would predict for it."""
    from qlora.commands import plan
    from qlora.commands.options import PlanOptions

    options = PlanOptions(
        model=None if shape == "phi3-mini" else folder,
        max_length=setting["length"],
        per_device_train_batch_size=setting["batch"],
        lora_r=setting["lora_r"],
        attn_implementation=setting["backend"],
        gradient_checkpointing=setting["checkpointing"],
        compile=setting["compile"],
    )
    config = dataclasses.replace(plan.configuration(options), lora_dropout=0.0)
    return plan.planned(plan.shape_meta_model(options, config), config).total_gb


def measured(shape: str, folder: str, setting: Setting) -> dict[str, Any]:
    """The row of a setting: one that ran has peak_gb, one that did not `unavailable`."""
    chosen = {"batch": (setting["batch"],), "length": setting["length"], "lora_r": setting["lora_r"]}
    options = train_step.Options(shape=shape, accumulation=2, dropout=0.0, steps=2, **chosen)  # type: ignore[arg-type]
    cell = train_step.run_cell(options, folder, setting["backend"], setting["checkpointing"], setting["compile"])
    kept = {name: cell[name] for name in ("peak_gb", "unavailable") if name in cell}
    return {**setting, "predicted_gb": round(predicted_gb(shape, folder, setting), 3), **kept}


def main(options: Options) -> None:
    """Measure every setting and write the file after each."""
    import torch

    from qlora.run.environment import environment

    began = time.perf_counter()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    described = environment(device)
    described["commit"] = options.commit or described["commit"]
    path = options.out or result_file("plan", described)
    record = reopened(path, described, {"shape": options.shape})
    record["runs"].append({"date": f"{datetime.date.today()}", "shape": options.shape, "commit": described["commit"]})
    numbers = range(len(SETTINGS)) if options.only is None else options.only
    known = [{name: row[name] for name in FIRST} for row in record["cells"]] if options.missing else []
    with tempfile.TemporaryDirectory() as folder:
        train_step.write_random_model(options.shape, Path(folder))
        for setting in (SETTINGS[number] for number in numbers):
            if setting in known:
                continue
            if options.minutes is not None and time.perf_counter() - began > 60 * options.minutes:
                return
            row = measured(options.shape, folder, setting) | {"commit": described["commit"]}
            others = [old for old in record["cells"] if any(old[name] != setting[name] for name in FIRST)]
            record["cells"] = [*others, row]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record, indent=1) + "\n")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
