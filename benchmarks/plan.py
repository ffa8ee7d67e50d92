"""What `python -m qlora plan` predicts beside the peaks of steps that run: policies, lengths, batches, ranks, backends.

    python -m benchmarks.plan                          # a CUDA GPU; Phi-3-mini's shape, 16 settings, 8 minutes
    python -m benchmarks.plan --minutes 4 --missing    # only what the file lacks

Each setting is a cell of benchmarks/train_step.py. One that runs out of memory is a row with the reason.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks import train_step
from benchmarks.harness import Cell, Output, Part, ResultFile, write_random_model
from benchmarks.tables import BLUE, ORANGE, load, save, source, table
from qlora.commands import plan
from qlora.commands.options import PlanOptions

Setting = dict[str, Any]
FLAGS = {"checkpointing": "gradient_checkpointing", "compile": "compile", "backend": "attn_implementation",
         "batch": "per_device_train_batch_size", "length": "max_length", "lora_r": "lora_r"}  # fmt: skip
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


def measured(shape: str, folder: str, setting: Setting) -> Setting:
    """The row of a setting with the peak that training would predict: one that ran has peak_gb, another `unavailable`."""
    flags = {FLAGS[name]: value for name, value in setting.items()}
    options = PlanOptions(model=None if shape == "phi3-mini" else folder, **flags)
    config = dataclasses.replace(plan.configuration(options), lora_dropout=0.0)
    predicted = plan.planned(plan.shape_meta_model(options, config), config)
    config = dataclasses.replace(config, model=folder, gradient_accumulation_steps=2)
    found = Cell(train_step.time_cell, config, 2).row("unavailable")
    kept = {name: found[name] for name in ("peak_gb", "unavailable") if name in found}
    return {**setting, "predicted_gb": round(predicted.total_gb, 3), **kept}


def main(
    output: tyro.conf.OmitArgPrefixes[Output] = Output(),
    part: tyro.conf.OmitArgPrefixes[Part] = Part(),
    shape: Literal["phi3-mini", "tiny"] = "phi3-mini",
    only: tuple[int, ...] | None = None,
) -> None:
    """Measure every setting and write the file after each.

    Args:
        shape: tiny: the model of the tests, a smoke test anywhere.
        only: numbers of settings, from 0. Unset: all.
    """
    file = ResultFile("plan", output)
    file.begin_run({"shape": shape})
    cells = file.record["cells"]
    known = [{name: row[name] for name in FIRST} for row in cells] if part.missing else []
    with tempfile.TemporaryDirectory() as folder:
        Cell(write_random_model, shape, Path(folder)).result()
        for setting in SETTINGS if only is None else [SETTINGS[number] for number in only]:
            if setting in known:
                continue
            if file.is_late(part.minutes):
                return
            row = measured(shape, folder, setting) | {"commit": file.environment["commit"]}
            cells[:] = [old for old in cells if any(old[name] != setting[name] for name in FIRST)] + [row]
            file.write(row)


# -- tables and the plot ---------------------------------------------------------------------------------------------


def predictions(pattern: str) -> str:
    """Predicted and measured peak of each setting that ran, and by how much they differ."""
    name, record = load(pattern)
    rows = []
    for cell in record["cells"]:
        result = [cell.get("unavailable", "").replace("|", "/"), ""]
        if "peak_gb" in cell:
            result = [f"{cell['peak_gb']:.2f}", f"{cell['predicted_gb'] / cell['peak_gb'] - 1:+.1%}"]
        rows.append([*(str(cell[name]) for name in FLAGS), f"{cell['predicted_gb']:.2f}", *result])
    headers = ["checkpointing", "compile", "attention", "rows", "tokens", "rank", "predicted GB", "measured GB", ""]
    plot = f"![Measured over predicted peak, one point per setting](results/plan_{pattern.split('_')[1]}.png)"
    return f"{table(headers, rows)}\n\n{plot}\n\n{source(name, record)}"


def fits() -> str:
    """The fastest settings that are predicted to fit cards of several sizes."""
    shape = plan.shape_meta_model(PlanOptions(), plan.configuration(PlanOptions()))

    def fastest(free_gb: float, batch: int) -> str:
        for policy in plan.POLICIES:
            for how in ("graphs", "layers"):
                options = PlanOptions(compile=how, gradient_checkpointing=policy, per_device_train_batch_size=batch)
                found = plan.planned(shape, plan.configuration(options))
                if found.fits(free_gb):
                    return f"`{plan.flags(found.config)}`, {found.total_gb:.2f} GB"
        return "-"

    rows = [[f"{card} GB", *(fastest(plan.card_free_gb(card), batch) for batch in (2, 1))] for card in (6, 8, 12, 16, 24)]
    name, record = load("plan_h100_*.json")
    off = [cell["predicted_gb"] / cell["peak_gb"] - 1 for cell in record["cells"] if "peak_gb" in cell]
    words = (
        "Predicted for Phi-3-mini at rank 32; a tenth of the card and 0.5 GB for CUDA stay free. No such card was there to "
        f"try; {len(off)} settings on an 80 GB H100 peaked within {max(map(abs, off)):.1%} of what is predicted for them "
        f"([table and plot](benchmarks/README.md#memory-predicted-and-measured)). {source(name, record)}"
    )
    return f"{table(['card', '2 x 2,048 tokens', '1 x 2,048 tokens'], rows)}\n\n{words}"


def plot(card: str) -> None:
    """Measured over predicted peak, one point per setting, with the tenth on either side that the prediction promises."""
    import matplotlib.pyplot as plt
    import matplotlib.ticker

    name, record = load(f"plan_{card}_*.json")
    cells = [cell for cell in record["cells"] if "peak_gb" in cell]
    figure, panel = plt.subplots(figsize=(4.8, 4.4), layout="constrained")
    ends = [0.9 * min(cell["predicted_gb"] for cell in cells), 1.1 * max(cell["predicted_gb"] for cell in cells)]
    panel.fill_between(ends, [0.9 * end for end in ends], [1.1 * end for end in ends], color="0.92", zorder=0)
    panel.plot(ends, ends, color="0.6", linewidth=1, zorder=1)
    for color, how in zip((BLUE, ORANGE, "#000000"), ("graphs", "layers", "none"), strict=True):
        points = [(cell["predicted_gb"], cell["peak_gb"]) for cell in cells if cell["compile"] == how]
        panel.scatter(*zip(*points, strict=True), color=color, s=24, label=f"--compile {how}", zorder=2)
    panel.set(xscale="log", yscale="log", xlabel="predicted GB", ylabel="measured GB", xlim=ends, ylim=ends)
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 3, 4, 5, 6, 8)))
        axis.set_major_formatter("{x:g}")
    panel.minorticks_off()
    panel.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{name}: {record['environment']['device']}. Gray: 10 %", x=0.01, ha="left", fontsize=8, color="0.4")
    save(figure, f"plan_{card}")


if __name__ == "__main__":
    tyro.cli(main)
