"""Two GPUs of one host against one: tokens per second of the loop by torchrun, and what 20 steps differ by.

    python -m benchmarks.several_gpus                     # two CUDA GPUs, Phi-3-mini's shape, random weights; writes results/
    python -m benchmarks.several_gpus --shape tiny --steps 10   # anywhere, a smoke test: two CPU processes

Each cell is the real train_loop.py in new processes, its speed read from metrics.jsonl: the median of the log windows after
the first two. `one` is one GPU with 2 micro-batches of 2 x 2,048 tokens per step. `two` is two GPUs with 2 micro-batches each.
`same` is one GPU with all 4 micro-batches of `two`. TRL runs under `accelerate launch` on both GPUs.
"""

import dataclasses
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks.harness import ROOT, Cell, Output, ResultFile, Row, Shape, reason
from benchmarks.kill_resume import digests, newest_step
from benchmarks.peers.work import write_models
from benchmarks.tables import load, source, table, table_of

BATCH, ACCUMULATION, LENGTH, WINDOW = 2, 2, 2048, 5
NONE = ["--gradient-checkpointing", "none", "--compile", "graphs"]
FULL = ["--gradient-checkpointing", "full", "--compile", "layers"]
# name -> setting, how many processes (0: without torchrun), micro-batches of a step on all GPUs together, flags
CELLS: dict[str, tuple[str, int, int, list[str]]] = {
    "one": ("none", 0, ACCUMULATION, NONE),
    "one_rank": ("none", 1, ACCUMULATION, NONE),
    "two": ("none", 2, 2 * ACCUMULATION, NONE),
    "same": ("none", 0, 2 * ACCUMULATION, NONE),
    "one_full": ("full", 0, ACCUMULATION, FULL),
    "two_full": ("full", 2, 2 * ACCUMULATION, FULL),
    "two_sharded": ("full", 2, 2 * ACCUMULATION, [*FULL, "--shard-base"]),
    "same_full": ("full", 0, 2 * ACCUMULATION, FULL),
}
TRL = ("trl", "trl_no_checkpointing")
LABELS = {
    "one": "1 GPU", "one_rank": "1 GPU, by torchrun", "two": "2 GPUs", "same": "1 GPU, the same step",
    "one_full": "1 GPU", "two_full": "2 GPUs", "two_sharded": "2 GPUs, `--shard-base`", "same_full": "1 GPU, the same step",
    "trl": "TRL on 2 GPUs, as it comes", "trl_no_checkpointing": "TRL on 2 GPUs, tuned, no checkpointing",
}  # fmt: skip
Wanted = Literal["one", "one_rank", "two", "same", "one_full", "two_full", "two_sharded", "same_full", "trl",
                 "trl_no_checkpointing", "killed", "sums"]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    """Which cells."""

    output: tyro.conf.OmitArgPrefixes[Output] = Output()
    shape: Shape = "phi3-mini"
    """Of the model."""
    steps: int = 30
    """Of each run; the first 20 are compared."""
    cells: tuple[Wanted, ...] = (*CELLS, *TRL, "killed", "sums")  # type: ignore[assignment]
    """What is measured. killed: a rank killed in the middle, resumed, and compared bit for bit. sums: the message of a step."""
    models: Path | None = None
    """Folder for the model, which a later call finds there. Unset: a temporary one."""


def write_rows(path: Path, count: int, letters: int) -> None:
    """Rows of random letters, about one token each."""
    draw = random.Random(0)
    rows = [{"prompt": f"row {i}", "completion": "".join(draw.choices("abcdefgh", k=letters))} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def command_of(name: str, folder: Path, steps: int, more: list[str]) -> list[str]:
    """The command of a cell of this loop."""
    _, processes, accumulation, flags = CELLS[name]
    launch = [sys.executable]
    if processes:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    values = {"model": folder / "fused", "train-file": folder / "rows.jsonl", "max-steps": steps, "logging-steps": WINDOW,
              "per-device-train-batch-size": BATCH, "gradient-accumulation-steps": accumulation, "max-length": LENGTH,
              "on-long": "truncate", "output-dir": folder / name}  # fmt: skip
    words = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    return [*launch, "train_loop.py", *words, *flags, *more]


def metrics(folder: Path) -> list[Row]:
    """The rows of a run's steps."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == "step"]


def run(command: list[str], environment: dict[str, str]) -> str | None:
    """Run a command to its end; the last lines it wrote if it failed."""
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    return reason(done.stdout + done.stderr) if done.returncode else None


def measure_loop(name: str, folder: Path, steps: int, environment: dict[str, str], on_gpu: bool) -> Row:
    """A cell of this loop."""
    more = [] if on_gpu else ["--compile", "none"]
    if problem := run(command_of(name, folder, steps, more), environment):
        return {"unavailable": problem}
    rows = metrics(folder / name)
    windows = [row["tokens_per_s"] for row in rows[2 * WINDOW :: WINDOW]]
    speed = {"tokens_per_s": round(statistics.median(windows), 1), "windows": [round(value) for value in windows]}
    first = {key: [row[key] for row in rows[:20]] for key in ("loss", "grad_norm")}
    return {**speed, "peak_gb": round(rows[-1]["peak_memory_gb"], 3), **first}


def kill_and_compare(folder: Path, environment: dict[str, str], on_gpu: bool) -> Row:
    """Kill one of two ranks after a checkpoint, resume, and compare the last checkpoint with that of a run left alone."""
    flags = ["--deterministic", "--save-steps", "3", *([] if on_gpu else ["--compile", "none"])]
    command = command_of("two", folder, 12, flags)
    two = str(folder / "two")
    outputs = {name: [word.replace(two, str(folder / name)) for word in command] for name in ("alone", "killed")}
    if problem := run(outputs["alone"], environment):
        return {"unavailable": problem}
    with (folder / "killed.log").open("w") as log:
        started = subprocess.Popen(outputs["killed"], cwd=ROOT, env=environment, stdout=log, stderr=log)
        while newest_step(folder / "killed") < 3 and started.poll() is None:
            time.sleep(0.02)
        if started.poll() is not None:
            return {"unavailable": reason((folder / "killed.log").read_text())}
        ranks = subprocess.run(["pgrep", "-P", str(started.pid)], capture_output=True, text=True, check=False).stdout.split()
        os.kill(int(ranks[-1]), 9)
        began = time.perf_counter()
        started.wait(120)
        ended_s = time.perf_counter() - began
    at = newest_step(folder / "killed")
    if problem := run(outputs["killed"], environment):
        return {"unavailable": problem}
    last = [digests(folder / name / "checkpoints" / "step-000012") for name in ("alone", "killed")]
    rows = [[(row["loss"], row["grad_norm"]) for row in metrics(folder / name)] for name in ("alone", "killed")]
    equal = last[0] == last[1] and len(last[0]) == 2 and rows[0] == rows[1]
    return {"killed_after_step": at, "steps": 12, "ended_s": round(ended_s, 1), "equal": equal}


# -- what torchrun and accelerate start ------------------------------------------------------------------------------


def time_sums(parameters: int) -> None:
    """Print how long the message of a step takes, in ms: gradients of so many parameters in 256 tensors."""
    import torch

    from qlora import distributed

    on_gpu = torch.cuda.is_available()
    place = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(place)
    ranks = distributed.start()
    tensors = [torch.nn.Parameter(torch.zeros(parameters // 256, device=place)) for _ in range(256)]
    loss, times = torch.zeros((), device=place), []
    for _ in range(25):
        if on_gpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        distributed.sum_gradients(tensors, loss)
        if on_gpu:
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - began))
    if ranks.is_first:
        print("MS " + json.dumps(statistics.median(times[5:])))
    distributed.leave()


def train_trl(contender: str, folder: str, steps: int) -> None:
    """TRL on this process's GPU beside the others; prints when each step ended."""
    import datasets
    import peft
    import torch
    import transformers
    import trl

    from benchmarks.peers.contenders import LORA, trl_options
    from qlora.model.load import quantization_of
    from qlora.speed.memory import peak_memory_gb

    ends: list[float] = []

    class Ends(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    rows = datasets.load_dataset("json", data_files=f"{folder}/rows.jsonl", cache_dir=f"{folder}/datasets")["train"]
    arguments = trl.SFTConfig(
        output_dir=f"{folder}/{contender}", max_steps=steps, per_device_train_batch_size=BATCH, max_length=LENGTH,
        gradient_accumulation_steps=ACCUMULATION, optim="adamw_torch_fused", report_to="none", save_strategy="no",
        disable_tqdm=True, use_cpu=not torch.cuda.is_available(), **trl_options(contender),
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=f"{folder}/fused", args=arguments, train_dataset=rows, callbacks=[Ends()],
        quantization_config=quantization_of("nf4"), peft_config=peft.LoraConfig(lora_dropout=0.1, **LORA),
    )  # fmt: skip
    tokens = statistics.mean(len(ids) for ids in trainer.train_dataset["input_ids"])
    trainer.train()
    if trainer.accelerator.is_main_process:
        times = [after - before for before, after in itertools.pairwise(ends[9:])]
        per_step = tokens * BATCH * ACCUMULATION * trainer.accelerator.num_processes
        speed = {"tokens_per_s": per_step / statistics.median(times), "processes": trainer.accelerator.num_processes}
        print("RESULT " + json.dumps({**speed, "peak_gb": round(peak_memory_gb(trainer.model.device), 3)}))


def printed(call: str, mark: str, launcher: list[str], folder: Path, environment: dict[str, str]) -> Any:
    """What a call prints behind a mark on two processes, as JSON; or why it prints nothing."""
    script = folder / "script.py"
    script.write_text(f"from benchmarks.several_gpus import *\n{call}\n")
    done = subprocess.run([sys.executable, "-m", *launcher, str(script)], cwd=ROOT, env=environment, capture_output=True,
                          text=True, check=False, timeout=300)  # fmt: skip
    found = [line for line in done.stdout.splitlines() if line.startswith(f"{mark} ")]
    return json.loads(found[0].removeprefix(f"{mark} ")) if found else {"unavailable": reason(done.stdout + done.stderr)}


def main(options: Options) -> None:
    """Measure the cells, and write the file after each."""
    file = ResultFile("several_gpus", options.output)
    file.begin_run({"shape": options.shape, "steps": options.steps})
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    accelerate = ["accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
                  "--dynamo_backend", "no", "--multi_gpu" if file.on_gpu else "--cpu"]  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        models = options.models or folder / "models"
        if not models.exists():
            models.mkdir()
            Cell(write_models, options.shape, models, False).result()
        (folder / "fused").symlink_to((models / "fused").resolve())
        letters = 2 * LENGTH if file.on_gpu else 60  # all rows are cut to LENGTH tokens, or few
        Cell(write_rows, folder / "rows.jsonl", options.steps * BATCH * 2 * ACCUMULATION, letters).result()
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        environment |= {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "HF_HUB_OFFLINE": "1",
                        "PYTHONPYCACHEPREFIX": os.environ.get("PYTHONPYCACHEPREFIX", str(folder / "bytecode"))}  # fmt: skip
        measures: dict[str, Callable[[], Row]] = {
            "killed": lambda: kill_and_compare(folder, environment, file.on_gpu),
            "sums": lambda: {"ms": printed("time_sums(50_331_648)", "MS", torchrun, folder, environment)},
        }
        for name in options.cells:
            if name in CELLS:
                row = measure_loop(name, folder, options.steps, environment, file.on_gpu)
            elif name in TRL:
                call = f"train_trl({name!r}, {str(folder)!r}, {options.steps})"
                row = printed(call, "RESULT", accelerate, folder, environment)
            else:
                row = measures[name]()
            cell = {"cell": name, **row, "commit": file.environment["commit"]}
            file.record["cells"] = [*(other for other in file.record["cells"] if other["cell"] != name), cell]
            file.write({key: value for key, value in cell.items() if key not in ("loss", "grad_norm")})


def speeds(pattern: str) -> str:
    """Tokens per second and peak memory of each cell, and how far losses are from those of one GPU."""
    name, record = load(pattern)
    cells = {cell["cell"]: cell for cell in record["cells"]}
    rows: list[Row] = []
    for key in (*CELLS, *TRL):
        if key not in cells or "tokens_per_s" not in cells[key]:
            continue
        cell, setting = cells[key], CELLS[key][0] if key in CELLS else ""
        one = cells.get("one" if setting == "none" else "one_full", {}).get("tokens_per_s")
        row = {"setting": setting, "what": LABELS[key], "speed": cell["tokens_per_s"], "peak": cell["peak_gb"]}
        row["ratio"] = cell["tokens_per_s"] / one if one and setting else None
        same = cells.get("same" if setting == "none" else "same_full", {})
        row["same"] = cell["tokens_per_s"] / same["tokens_per_s"] if "tokens_per_s" in same and setting else None
        if key in ("two", "two_full", "two_sharded") and "loss" in same:
            pairs = zip(cell["loss"], same["loss"], strict=True)
            row["apart"] = max(abs(ours - theirs) / theirs for ours, theirs in pairs)
        rows.append(row)
    columns = {"checkpointing": "{setting}", "": "{what}", "tokens/s": "{speed:,.0f}", "x one GPU": "{ratio:.2f}",
               "x one GPU, the same step": "{same:.2f}",
               "peak GB per GPU": "{peak:.2f}", "losses of 20 steps differ by at most": "{apart:.1e}"}  # fmt: skip
    text = table_of(columns, rows)
    if "killed" in cells and cells["killed"].get("equal"):
        killed = cells["killed"]
        text += (
            f"\n\nOne of two ranks was killed after step {killed['killed_after_step']}, and torchrun ended "
            f"{killed['ended_s']:.1f} s later. Resumed with `--deterministic`, the run ended after {killed['steps']} steps "
            "bit for bit like one left alone."
        )
    if isinstance(cells.get("sums", {}).get("ms"), float):
        text += f" The message of a step, 0.2 GB, takes {cells['sums']['ms']:.1f} ms."
    note = f"{record['note']} " if "note" in record else ""
    return f"{text}\n\n{note}{source(name, record)}"


# -- on paper --------------------------------------------------------------------------------------------------------

LINKS = {"NVLink 4 (300 GB/s)": 300.0, "InfiniBand NDR (50 GB/s)": 50.0, "100 Gb/s Ethernet (12.5 GB/s)": 12.5,
         "10 Gb/s Ethernet (1.25 GB/s)": 1.25}  # fmt: skip
GPUS = (2, 8, 64, 512)
# What trained parameters at rank 32 follow from: (out, in) of the linear layers of a decoder layer; then how many layers.
LLAMA_70B = ([(8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192), (28672, 8192), (28672, 8192), (8192, 28672)], 80)


def _phi3(gradient_checkpointing: str, shard_base: bool) -> tuple[Any, list[Any], Any]:
    """Phi-3-mini's shape, its LoRA targets, and a configuration."""
    from qlora.commands import plan
    from qlora.commands.options import PlanOptions
    from qlora.model.targets import audit_targets

    options = PlanOptions()
    changes: dict[str, Any] = {"gradient_checkpointing": gradient_checkpointing, "shard_base": shard_base, "compile": "layers"}
    config = dataclasses.replace(plan.configuration(options), **changes)
    meta_model = plan.shape_meta_model(options, config)
    return meta_model, audit_targets(meta_model, config), config


def efficiency() -> str:
    """Predicted efficiency on more and more GPUs, by interconnect; data-parallel and with a sharded base."""
    from qlora.speed.scaling import step_time

    rows = []
    for shard_base in (False, True):
        meta_model, targets, config = _phi3("full" if shard_base else "none", shard_base)
        for link, gb_per_s in LINKS.items():
            times = [step_time(meta_model, targets, config, BATCH * LENGTH, gpus, gb_per_s) for gpus in GPUS]
            cells = [f"{100 * time.efficiency:.1f} %" for time in times]
            rows.append(["`--shard-base`, `full`" if shard_base else "whole base, `none`", link, *cells])
    return table(["mode, checkpointing", "interconnect", *(f"{gpus} GPUs" for gpus in GPUS)], rows)


def derivation() -> str:
    """The numbers that `efficiency` comes from, in words."""
    from qlora.model.coverage import quantized_layers
    from qlora.speed.scaling import reduced_bytes, step_time

    meta_model, targets, config = _phi3("none", False)
    message, tokens = reduced_bytes(targets), BATCH * LENGTH
    step = step_time(meta_model, targets, config, tokens, 2, 300.0)
    full_model, full_targets, full = _phi3("full", True)
    sharded = step_time(full_model, full_targets, full, tokens, 2, 300.0)
    packed = sum(layer.weight.numel() for layer in quantized_layers(meta_model).values()) / 2
    shapes, depth = LLAMA_70B
    large = 32 * depth * sum(rows + columns for rows, columns in shapes)
    gathered = 2 * full.gradient_accumulation_steps * packed
    return "\n".join([
        f"- **Gradients.** {message // 4:,} adapter parameters in fp32 are {message / 1e9:.2f} GB. A ring of N GPUs sends "
        f"2 (N - 1) / N times as much per GPU: {message / 1e9:.2f} GB for 2, {2 * message / 1e9:.2f} GB for many.",
        f"- **Compute.** {config.gradient_accumulation_steps} micro-batches of {tokens:,} tokens per GPU take "
        f"{1000 * step.compute_s:.0f} ms with `none` and {1000 * sharded.compute_s:.0f} ms with `full`, from the measured "
        "tokens per second of one H100.",
        f"- **Where the interconnect stops mattering.** Many GPUs lose 1 % of a step to the message at "
        f"{2 * message / step.compute_s / 0.01 / 1e9:.0f} GB/s, and 5 % at {2 * message / step.compute_s / 0.05 / 1e9:.0f} "
        "GB/s. Twice the micro-batches per step need half of that.",
        f"- **Gathers with `--shard-base`.** The packed weights are {packed / 1e9:.2f} GB, gathered twice per micro-batch: "
        f"{gathered / 1e9:.2f} GB per step, (N - 1) / N of it from others. They hide behind compute down to "
        f"{gathered / sharded.compute_s / 1e9:.0f} GB/s.",
        f"- **Moments.** Adam keeps two per adapter parameter: {2 * message / 1e9:.1f} GB for Phi-3-mini, "
        f"{8 * large / 1e9:.1f} GB for a Llama of 70 billion parameters ({large:,} at rank 32).",
    ])  # fmt: skip


def loop_lines() -> str:
    """The lines of train_loop.py that deal with other ranks."""
    lines = (ROOT / "train_loop.py").read_text().splitlines()
    found = [line.strip() for line in lines if re.search(r"\bdistributed\.|\branks\b", line.partition("#")[0])]
    shown = [line for line in dict.fromkeys(found) if not re.match(r"(if|with stop|with RunFolder|console)\b", line)]
    return "\n".join(["```python", *shown, "```"])


if __name__ == "__main__":
    main(tyro.cli(Options))
