"""Wall-clock time of whole jobs, from the command to the saved adapter: this loop and a TRL script on the same files.

    python -m benchmarks.end_to_end                              # a CUDA GPU: Phi-3-mini's shape, random weights
    python -m benchmarks.end_to_end --shape tiny --jobs bundled  # anywhere, a smoke test

Jobs: `bundled` (22 examples, 20 epochs), `mixed` (600 samples of lognormal lengths, about 500 tokens on average, 1 epoch) and
`long` (200 samples of about 2,000 tokens, 1 epoch). Each evaluates and saves after every epoch, and each run is a new process.
A cold run finds no compiled kernels, a warm one those of the run before. TRL's script writes no sample answers and no report.
"""

import dataclasses
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks.harness import ROOT, Cell, Output, Part, ResultFile, Row, write_random_model
from benchmarks.tables import load, save, source, table

Job = Literal["bundled", "mixed", "long"]
Contender = Literal["ours_cold", "ours_warm", "trl", "trl_no_checkpointing"]
EPOCHS = {"bundled": 20, "mixed": 1, "long": 1}
EVAL_SAMPLES = 8
LABELS = {"ours_cold": "this loop, cold", "ours_warm": "this loop, warm", "trl": "TRL, as it comes",
          "trl_no_checkpointing": "TRL, tuned, no checkpointing"}  # fmt: skip
PHASES = ("start", "data and checks", "model", "compile and probe", "steps", "evaluation", "checkpoints", "answers", "report")


@dataclasses.dataclass(frozen=True)
class Options:
    """Which jobs, by whom."""

    output: tyro.conf.OmitArgPrefixes[Output] = Output()
    part: tyro.conf.OmitArgPrefixes[Part] = Part()
    shape: Literal["phi3-mini", "demo", "tiny"] = "phi3-mini"
    """Of the model, with random weights."""
    jobs: tuple[Job, ...] = ("bundled", "mixed", "long")
    """What is trained."""
    contenders: tuple[Contender, ...] = ("ours_cold", "ours_warm", "trl", "trl_no_checkpointing")
    """Who trains. ours_warm needs ours_cold before it."""


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
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
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


def trl_script(contender: str, job: str, folder: str) -> None:
    """A script as TRL's documentation has it. Prints its phases as JSON."""
    import datasets
    import peft
    import torch
    import transformers
    import trl

    from benchmarks.peers.contenders import LORA, trl_options
    from qlora.model.load import quantization_of
    from qlora.run.timing import PhaseClock

    clock = PhaseClock()

    class Phases(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end("steps")

        def on_evaluate(self, *_: Any, **__: Any) -> None:
            clock.end("evaluation")

        def on_save(self, *_: Any, **__: Any) -> None:
            clock.end("checkpoints")

    files = {name: f"{folder}/{job}/{name}.jsonl" for name in ("train", "eval")}
    data = datasets.load_dataset("json", data_files=files, cache_dir=f"{folder}/datasets")
    arguments = trl.SFTConfig(
        output_dir=f"{folder}/{job}-{contender}", num_train_epochs=EPOCHS[job], eval_strategy="epoch", save_strategy="epoch",
        per_device_train_batch_size=2, per_device_eval_batch_size=2, gradient_accumulation_steps=4, max_length=2048,
        learning_rate=2e-4, lr_scheduler_type="cosine", optim="adamw_torch_fused", logging_steps=5, report_to="tensorboard",
        disable_tqdm=True, save_total_limit=3, use_cpu=not torch.cuda.is_available(), **trl_options(contender),
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=f"{folder}/model", args=arguments, train_dataset=data["train"], eval_dataset=data["eval"],
        quantization_config=quantization_of("nf4"), peft_config=peft.LoraConfig(lora_dropout=0.05, **LORA),
        callbacks=[Phases()],
    )  # fmt: skip
    clock.end("model")  # and its data
    trainer.train()
    trainer.save_model()
    clock.end("checkpoints")
    print("PHASES " + json.dumps(clock.seconds))


def command_of(contender: str, job: str, folder: Path) -> tuple[list[str], Path]:
    """The command of a job, and where its adapter will be."""
    out = folder / f"{job}-{contender}"
    if contender in ("ours_cold", "ours_warm"):
        data = {f"{name}-file": folder / job / f"{name}.jsonl" for name in ("train", "eval")}
        chosen = {"num-train-epochs": EPOCHS[job], "max-length": 2048, "output-dir": out}
        flags = {"model": folder / "model", **data, **chosen}
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        return [sys.executable, "train_loop.py", *words], out / "adapter"
    call = f"from benchmarks.end_to_end import trl_script; trl_script({contender!r}, {job!r}, {str(folder)!r})"
    return [sys.executable, "-c", call], out


def time_job(contender: str, job: str, folder: Path) -> Row:
    """Run a job in a new process, and say how long its parts took."""
    command, adapter = command_of(contender, job, folder)
    kernels = folder / f"kernels-{job}-{contender.partition('_')[0]}"  # ours_warm finds those of ours_cold
    changes = {"TORCHINDUCTOR_CACHE_DIR": str(kernels), "TRITON_CACHE_DIR": str(kernels / "triton")}
    changes |= {"XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    began, clock = time.time(), time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=os.environ | changes, capture_output=True, text=True, check=False)
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
        folder = Path(scratch)
        Cell(write_random_model, options.shape, folder / "model").result()
        for job in options.jobs:
            Cell(write_data, job, folder).result()
        for job, contender in wanted:
            if file.is_late(options.part.minutes):
                break
            cell = {"job": job, "contender": contender, **time_job(contender, job, folder)}
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
