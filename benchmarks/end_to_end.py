"""Wall-clock time of whole jobs, from the command to the saved adapter: this loop and a TRL script on the same files.

    python -m benchmarks.end_to_end                              # a CUDA GPU: Phi-3-mini's shape, random weights
    python -m benchmarks.end_to_end --unsloth-site FOLDER --contenders unsloth unsloth_none   # and the packages it pins
    python -m benchmarks.end_to_end --shape demo --jobs bundled --contenders ours_warm trl trl_no_checkpointing   # a CPU
    python -m benchmarks.end_to_end --shape tiny --jobs bundled  # anywhere, a smoke test

Jobs: `bundled` (22 examples, 20 epochs), `mixed` (600 samples of lognormal lengths, about 500 tokens on average, 1 epoch) and
`long` (200 samples of about 2,000 tokens, 1 epoch). Each evaluates and saves after every epoch, and each run is a new process.
A cold run finds no compiled kernels, a warm one those of earlier runs, of any job. The scripts of TRL and unsloth write no
sample answers and no report. Python's bytecode is cached for all, as it is where packages were installed in the usual way.
"""

import dataclasses
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks.harness import ROOT, Cell, Output, Part, ResultFile, Row, Shape
from benchmarks.peers.work import write_models
from benchmarks.tables import load, save, source, table

Job = Literal["bundled", "mixed", "long"]
Contender = Literal["ours_cold", "ours_warm", "trl", "trl_no_checkpointing", "unsloth", "unsloth_none"]
EPOCHS = {"bundled": 20, "mixed": 1, "long": 1}
EVAL_SAMPLES = 8
LABELS = {"ours_cold": "this loop, cold", "ours_warm": "this loop, warm", "trl": "TRL, as it comes",
          "trl_no_checkpointing": "TRL, tuned, no checkpointing", "unsloth": "unsloth, as it comes",
          "unsloth_none": "unsloth, no checkpointing"}  # fmt: skip
BATCH, ACCUMULATION, MAX_LENGTH, RATE = 2, 4, 2048, 2e-4
PHASES = ("start", "data and checks", "model", "compile and probe", "steps", "evaluation", "checkpoints", "answers", "report")


@dataclasses.dataclass(frozen=True)
class Options:
    """Which jobs, by whom."""

    output: tyro.conf.OmitArgPrefixes[Output] = Output()
    part: tyro.conf.OmitArgPrefixes[Part] = Part()
    shape: Shape = "phi3-mini"
    """Of the model. demo has its pretrained weights, the others random ones."""
    jobs: tuple[Job, ...] = ("bundled", "mixed", "long")
    """What is trained."""
    contenders: tuple[Contender, ...] = ("ours_cold", "ours_warm", "trl", "trl_no_checkpointing")
    """Who trains. ours_warm finds the kernels of ours_cold, and of other jobs, if those ran before it."""
    epochs: int | None = None
    """Of each job. Unset: 20 of bundled, 1 of the others."""
    unsloth_site: Path | None = None
    """Folder with unsloth and what it pins."""
    scratch: Path | None = None
    """Folder for models, data and runs, which stay for a later call. Unset: a temporary one."""


# -- data ------------------------------------------------------------------------------------------------------------


def write_data(job: Job, folder: Path) -> None:
    """train.jsonl and eval.jsonl of a job in `folder`/`job`, which both sides read; prompts take a fifth of a sample."""
    import transformers

    from qlora.config import BUNDLED_EVAL, BUNDLED_TRAIN

    place = folder / job
    place.mkdir()
    if job == "bundled":
        for name, path in (("train", BUNDLED_TRAIN), ("eval", BUNDLED_EVAL)):
            rows = map(json.loads, path.read_text().splitlines())
            texts = [{"prompt": row["instruction"], "completion": row["response"]} for row in rows]
            (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
        return
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "fused")
    pieces = [tokenizer.decode([index]) for index in range(len(tokenizer))]
    words = [piece.strip() for piece in pieces if piece.strip().isalpha() and piece.isascii()]
    draw = random.Random(0)

    def text(tokens: int) -> str:
        found = " ".join(draw.choices(words, k=tokens))
        return str(tokenizer.decode(tokenizer(found, add_special_tokens=False).input_ids[:tokens]))

    for name, count in (("train", 600 if job == "mixed" else 200), ("eval", EVAL_SAMPLES)):
        with (place / f"{name}.jsonl").open("w") as file:
            for _ in range(count):
                length = min(2000, max(20, round(draw.lognormvariate(math.log(380), 0.75)))) if job == "mixed" else 1990
                row = {"prompt": text(length // 5), "completion": text(length - length // 5)}
                file.write(json.dumps(row) + "\n")


# -- contenders ------------------------------------------------------------------------------------------------------


def trainer_arguments(job: str, out: str, epochs: int) -> dict[str, Any]:
    """What the scripts of TRL and unsloth share: what this loop does, and no progress bar."""
    import torch

    return {
        "output_dir": out, "num_train_epochs": epochs, "eval_strategy": "epoch", "save_strategy": "epoch",
        "per_device_train_batch_size": BATCH, "per_device_eval_batch_size": BATCH, "gradient_accumulation_steps": ACCUMULATION,
        "max_length": MAX_LENGTH, "learning_rate": RATE, "lr_scheduler_type": "cosine", "optim": "adamw_torch_fused",
        "logging_steps": 5, "report_to": "tensorboard", "disable_tqdm": True, "save_total_limit": 3,
        "use_cpu": not torch.cuda.is_available(),
    }  # fmt: skip


def phases_of(train: Callable[[Any], Any]) -> None:
    """Call `train` with a callback, save the trainer that it makes, and print the phases as JSON."""
    import transformers

    from qlora.run.timing import PhaseClock

    clock = PhaseClock()

    class Phases(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end("steps")

        def on_evaluate(self, *_: Any, **__: Any) -> None:
            clock.end("evaluation")

        def on_save(self, *_: Any, **__: Any) -> None:
            clock.end("checkpoints")

    trainer = train(Phases())
    clock.end("model")  # and its data
    trainer.train()
    trainer.save_model()
    clock.end("checkpoints")
    print("PHASES " + json.dumps(clock.seconds))


def load_data(contender: str, job: str, folder: str) -> Any:
    """train and eval of a job, as datasets."""
    import datasets

    files = {name: f"{folder}/{job}/{name}.jsonl" for name in ("train", "eval")}
    return datasets.load_dataset("json", data_files=files, cache_dir=f"{folder}/datasets-{contender}")


def trl_script(contender: str, job: str, folder: str, epochs: int) -> None:
    """A script as TRL's documentation has it."""
    import peft
    import trl

    from benchmarks.peers.contenders import LORA, trl_options
    from qlora.model.load import quantization_of

    def train(phases: Any) -> Any:
        data, arguments = load_data(contender, job, folder), trainer_arguments(job, f"{folder}/{job}-{contender}", epochs)
        return trl.SFTTrainer(
            model=f"{folder}/fused", args=trl.SFTConfig(**arguments, **trl_options(contender)),
            train_dataset=data["train"], eval_dataset=data["eval"], callbacks=[phases],
            quantization_config=quantization_of("nf4"), peft_config=peft.LoraConfig(lora_dropout=0.05, **LORA),
        )  # fmt: skip

    phases_of(train)


def unsloth_script(contender: str, job: str, folder: str, epochs: int) -> None:
    """A script as unsloth's notebooks have it: prompts and completions are one text."""
    import unsloth  # noqa: I001  before trl, which it patches
    import trl

    from benchmarks.peers.contenders import ALPHA, SPLIT
    from benchmarks.peers.work import RANK

    def train(phases: Any) -> Any:
        checkpointing: Any = "unsloth" if contender == "unsloth" else False
        model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
            f"{folder}/split", max_seq_length=MAX_LENGTH, load_in_4bit=True, use_gradient_checkpointing=checkpointing
        )
        model = unsloth.FastLanguageModel.get_peft_model(
            model, r=RANK, lora_alpha=ALPHA, lora_dropout=0, target_modules=SPLIT, use_gradient_checkpointing=checkpointing
        )
        data = load_data(contender, job, folder).map(
            lambda row: {"text": row["prompt"] + row["completion"] + tokenizer.eos_token}
        )
        data = data.remove_columns(["prompt", "completion"])
        chosen = {} if checkpointing else {"gradient_checkpointing": False}
        arguments = trainer_arguments(job, f"{folder}/{job}-{contender}", epochs) | chosen
        return trl.SFTTrainer(
            model=model, processing_class=tokenizer, args=trl.SFTConfig(**arguments, dataset_text_field="text"),
            train_dataset=data["train"], eval_dataset=data["eval"], callbacks=[phases],
        )  # fmt: skip

    phases_of(train)


def command_of(contender: str, job: str, folder: Path, epochs: int) -> tuple[list[str], Path]:
    """The command of a job, and where its adapter will be."""
    out = folder / f"{job}-{contender}"
    if contender in ("ours_cold", "ours_warm"):
        data = {f"{name}-file": folder / job / f"{name}.jsonl" for name in ("train", "eval")}
        chosen = {"num-train-epochs": epochs, "max-length": MAX_LENGTH, "learning-rate": RATE, "output-dir": out}
        step = {"per-device-train-batch-size": BATCH, "gradient-accumulation-steps": ACCUMULATION}
        flags = {"model": folder / "fused", **data, **chosen, **step}
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        return [sys.executable, "train_loop.py", *words], out / "adapter"
    script = f"{contender.partition('_')[0]}_script"
    call = f"from benchmarks.end_to_end import {script}; {script}({contender!r}, {job!r}, {str(folder)!r}, {epochs})"
    return [sys.executable, "-c", call], out


def environment_of(contender: str, folder: Path, site: Path | None) -> dict[str, str]:
    """The variables of a job's process: caches of its side, and cached bytecode."""
    side = contender.partition("_")[0]
    kernels = folder / f"kernels-{side}"
    # unsloth pins packages that others have in newer versions.
    own = str(site.resolve()) if site and side == "unsloth" else os.environ.get("PYTHONPATH", "")
    changes = {"XDG_CACHE_HOME": str(kernels), "TRITON_CACHE_DIR": str(kernels / "triton"), "PYTHONPATH": f"{own}:{ROOT}"}
    changes |= {"PYTHONPYCACHEPREFIX": str(folder / f"bytecode-{side}"), "UNSLOTH_DISABLE_STATISTICS": "1"}
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"} | changes


def time_job(contender: str, job: str, folder: Path, epochs: int, site: Path | None = None) -> Row:
    """Run a job in a new process, and say how long its parts took."""
    command, adapter = command_of(contender, job, folder, epochs)
    environment = environment_of(contender, folder, site)
    if contender == "ours_cold":
        shutil.rmtree(environment["XDG_CACHE_HOME"], ignore_errors=True)
    if not Path(environment["PYTHONPYCACHEPREFIX"]).exists():
        imports = {"ours": "train_loop", "trl": "trl.trainer.sft_trainer, peft", "unsloth": "unsloth"}
        first = [sys.executable, "-c", f"import {imports[contender.partition('_')[0]]}"]
        subprocess.run(first, cwd=ROOT, env=environment, capture_output=True, check=False)
    began, clock = time.time(), time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    total_s = time.perf_counter() - clock
    if done.returncode:
        return {"unavailable": " / ".join((done.stdout + done.stderr).strip().splitlines()[-3:])[-400:]}
    saved_s = max(path.stat().st_mtime for path in adapter.glob("adapter_model.safetensors")) - began
    if match := re.search(r"^PHASES (.*)$", done.stdout, re.MULTILINE):
        phases = json.loads(match[1])
    else:
        (words,) = re.findall(r"^Time: .*\((.*)\)$", done.stdout, re.MULTILINE)
        phases = {name: float(value) for name, value in (part.rsplit(" ", 1) for part in words.split(", "))}
    return {
        "total_s": round(total_s, 1),
        "adapter_s": round(saved_s, 1),
        "phases_s": {k: round(v, 1) for k, v in phases.items()},
    }


def main(options: Options) -> None:
    """Measure all cells that were asked for, and write the file after each."""
    file = ResultFile("end_to_end", options.output)
    file.begin_run({"shape": options.shape})
    wanted = [(job, contender) for job in options.jobs for contender in options.contenders]
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.scratch or Path(scratch)
        folder.mkdir(exist_ok=True)
        if not (folder / "fused").exists():
            Cell(write_models, options.shape, folder, options.unsloth_site is not None).result()
        for job in options.jobs:
            if not (folder / job).exists():
                Cell(write_data, job, folder).result()
        for job, contender in wanted:
            if file.is_late(options.part.minutes):
                break
            epochs = options.epochs or EPOCHS[job]
            row = time_job(contender, job, folder, epochs, options.unsloth_site)
            cell = {"job": job, "contender": contender, "epochs": epochs, **row}
            cell["commit"] = file.environment["commit"]
            kept = [other for other in file.record["cells"] if (other["job"], other["contender"]) != (job, contender)]
            file.record["cells"] = [*kept, cell]
            file.write(cell)


# -- table and plot --------------------------------------------------------------------------------------------------


def jobs(pattern: str) -> str:
    """Seconds of each job, and the ratio to TRL as it comes."""
    name, record = load(pattern)
    cells = {(cell["job"], cell["contender"]): cell for cell in record["cells"]}
    rows = []
    for (job, contender), cell in cells.items():
        peer = cells.get((job, "trl"), {}).get("total_s")
        if "total_s" not in cell:
            rows.append([job, LABELS[contender], cell["unavailable"], "", "", ""])
            continue
        parts = ", ".join(f"{phase} {cell['phases_s'][phase]:.1f}" for phase in PHASES if phase in cell["phases_s"])
        ratio = f"{cell['total_s'] / peer:.2f}" if peer else ""
        rows.append([job, LABELS[contender], f"{cell['adapter_s']:.0f}", f"{cell['total_s']:.0f}", ratio, parts])
    headers = ["job", "", "to the adapter, s", "to the end, s", "of TRL's time", "phases, s"]
    note = f"{record['note']} " if "note" in record else ""
    return f"{table(headers, rows)}\n\n{note}{source(name, record)}"


def plot(pattern: str) -> None:
    """Stacked bars: the phases of each job."""
    import matplotlib.pyplot as plt

    name, record = load(pattern)
    cells = [cell for cell in record["cells"] if "total_s" in cell]
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(cells) + 1.5))
    colors = plt.get_cmap("tab10")
    left = [0.0] * len(cells)
    for index, phase in enumerate(PHASES):
        widths = [cell["phases_s"].get(phase, 0.0) for cell in cells]
        axes.barh(range(len(cells)), widths, left=left, color=colors(index), label=phase)
        left = [before + width for before, width in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(cells)), [f"{cell['job']}: {LABELS[cell['contender']]}" for cell in cells])
    axes.invert_yaxis()
    axes.set_xlabel("wall-clock seconds from the command")
    axes.legend(ncols=3, fontsize="small", frameon=False, loc="upper center", bbox_to_anchor=(0.4, -0.12))
    save(figure, Path(name).stem)


if __name__ == "__main__":
    main(tyro.cli(Options))
