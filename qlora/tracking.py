"""What a run tells: metrics.jsonl and TensorBoard for machines, a progress bar or plain lines for people."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch.utils.tensorboard import SummaryWriter

from qlora.config import TrainConfig
from qlora.evaluate import HeldOut, Sample
from qlora.model import Target

SAMPLE_LINES = 24  # of an answer, in the terminal; samples.jsonl has all
METRICS = ("loss", "learning_rate", "grad_norm", "tokens_per_s", "peak_memory_gib")


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, commit and hardware, for env.json and for benchmark files."""
    packages = ("torch", "transformers", "peft", "bitsandbytes", "tokenizers", "accelerate", "datasets", "flash-attn")
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    versions["torch"] = torch.__version__  # with its build: +cpu, +cu130
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": gpu.name if gpu else f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "device_memory_gib": round(gpu.total_memory / 2**30, 2) if gpu else None,
        "cuda": torch.version.cuda,
        "packages": versions,
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of this checkout; None where the code is installed without its repository."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or None


def targets_table(targets: list[Target], total_parameters: int) -> Table:
    """The audit of LoRA targets: name, count, shape, adapter parameters, and their share of the model."""
    trained = sum(target.adapter_parameters for target in targets)
    table = Table(title="LoRA targets")
    for header in ("module", "layers", "shape (out x in)", "adapter parameters"):
        table.add_column(header, justify="left" if header == "module" else "right")
    for target in targets:
        shapes = ", ".join(f"{rows} x {columns}" for rows, columns in target.shapes)
        table.add_row(target.name, str(len(target.layers)), shapes, f"{target.adapter_parameters:,}")
    table.caption = (
        f"{trained:,} trained, {100 * trained / (total_parameters + trained):.2f} % of {total_parameters + trained:,}"
    )
    return table


def sample_table(sample: Sample) -> Table:
    """Base and tuned answer to one prompt, side by side."""
    table = Table(title=Text(sample.prompt), title_justify="left", expand=True)
    cells = []
    for header, text in (("base", sample.base), ("tuned", sample.tuned)):
        table.add_column(header, ratio=1, overflow="fold")
        lines = text.strip().splitlines()
        rest = [f"... {len(lines) - SAMPLE_LINES} more lines"] if len(lines) > SAMPLE_LINES else []
        cells.append(Text("\n".join(lines[:SAMPLE_LINES] + rest)))  # Text: a model's [brackets] are no markup
    table.add_row(*cells)
    return table


def say(console: Console, line: str) -> None:
    """Print one line as it is, never wrapped, so that a path in it can be copied."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


class Tracker:
    """Writes what happens to the run folder and shows it; use it as a context."""

    def __init__(self, run_folder: Path, console: Console):
        self.run_folder = run_folder
        self.console = console
        self.metrics_file = (run_folder / "metrics.jsonl").open("a", encoding="utf-8")
        self.board = SummaryWriter(str(run_folder / "tensorboard"))
        columns = (
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeRemainingColumn(compact=True),
        )
        self.progress = Progress(*columns, console=console, expand=True, disable=not console.is_terminal)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
        self.metrics_file.close()
        self.board.close()

    def begin(self, total_steps: int, logging_steps: int) -> None:
        """Start the progress bar; where there is none, every `logging_steps`-th step gets a line."""
        self.total_steps, self.logging_steps = total_steps, logging_steps
        self.task = self.progress.add_task("", total=total_steps, metrics="")
        self.progress.start()

    def steps(self, rows: list[dict[str, Any]]) -> None:
        """Record finished steps, oldest first."""
        for row in rows:
            self._write({"event": "step", **row})
            for name in METRICS:
                self.board.add_scalar(f"train/{name}", row[name], row["step"])
            step = row["step"]
            metrics = (  # a bar of 80 columns has room for these and seven more
                f"epoch {row['epoch']} loss {row['loss']:.4f} lr {row['learning_rate']:.1e} norm {row['grad_norm']:.2f} "
                f"{row['tokens_per_s']:.0f} tok/s {row['peak_memory_gib']:.1f} GiB"
            )
            self.progress.update(self.task, completed=step, metrics=metrics)
            if not self.console.is_terminal and (step % self.logging_steps == 0 or step in (1, self.total_steps)):
                self.say(
                    f"step {step}/{self.total_steps}  epoch {row['epoch']}  loss {row['loss']:.4f}  "
                    f"lr {row['learning_rate']:.2e}  grad_norm {row['grad_norm']:.3f}  {row['tokens_per_s']:,.0f} tokens/s  "
                    f"peak {row['peak_memory_gib']:.2f} GiB"
                )
        self.metrics_file.flush()

    def held_out(self, step: int, epoch: int, result: HeldOut) -> None:
        """Record a held-out evaluation after `step` steps."""
        self._write(
            {
                "event": "eval",
                "step": step,
                "epoch": epoch,
                "eval_loss": result.loss,
                "perplexity": result.perplexity,
                "num_tokens": result.num_tokens,
            }
        )
        self.metrics_file.flush()
        self.board.add_scalar("eval/loss", result.loss, step)
        self.board.add_scalar("eval/perplexity", result.perplexity, step)
        self.say(f"epoch {epoch}  held-out loss {result.loss:.4f}  perplexity {result.perplexity:.3f}")

    def samples(self, samples: list[Sample], of: str) -> None:
        """Record and show greedy answers at the end of the run; `of` says which prompts they answer."""
        with (self.run_folder / "samples.jsonl").open("a", encoding="utf-8") as file:
            for index, sample in enumerate(samples):
                file.write(json.dumps({"step": self.total_steps, **sample._asdict()}, ensure_ascii=False) + "\n")
                text = "\n\n".join(f"**{name}**\n\n```\n{value}\n```" for name, value in sample._asdict().items())
                self.board.add_text(f"samples/{index}", text, self.total_steps)
        self.progress.stop()
        self.say(f"Greedy answers to {of} prompts, without and with the adapter:")
        for sample in samples:
            self.console.print(sample_table(sample))

    def hyperparameters(self, config: TrainConfig, result: HeldOut | None) -> None:
        """Record the configuration beside what it led to, for TensorBoard's table of runs."""
        values = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in dataclasses.asdict(config).items()
        }
        outcome = {"eval/loss": result.loss, "eval/perplexity": result.perplexity} if result else {}
        self.board.add_hparams(values, outcome, run_name=".")

    def say(self, line: str) -> None:
        """Print one line, above the bar if there is one."""
        say(self.console, line)

    def _write(self, row: dict[str, Any]) -> None:
        self.metrics_file.write(json.dumps(row) + "\n")


def closing_words(run_folder: Path) -> str:
    """Where everything is, and the commands to go on with."""
    adapter = run_folder / "adapter"
    return f"""
Adapter:      {adapter}
Metrics:      {run_folder / "metrics.jsonl"}, samples.jsonl beside it
TensorBoard:  tensorboard --logdir {shlex.quote(str(run_folder / "tensorboard"))}

Load it in bf16:
  from peft import AutoPeftModelForCausalLM
  model = AutoPeftModelForCausalLM.from_pretrained("{adapter}", dtype="bfloat16")

or on the NF4 base that it was trained against:
  import torch
  from transformers import BitsAndBytesConfig
  nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                           bnb_4bit_compute_dtype=torch.bfloat16)
  model = AutoPeftModelForCausalLM.from_pretrained("{adapter}", quantization_config=nf4, dtype="bfloat16")"""
