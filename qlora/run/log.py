"""What a run tells: metrics.jsonl and TensorBoard for machines, a progress bar or plain lines for people."""

import contextlib
import json
import math
import os
import shlex
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch.utils.tensorboard import SummaryWriter

from qlora.config import TrainConfig
from qlora.data.batch import Batch
from qlora.data.dataset import TokenizedDataset
from qlora.eval.generate import Completion
from qlora.eval.loss import EvalResult
from qlora.model.precision import described
from qlora.model.prompts import PROMPT_METHODS
from qlora.model.targets import Target
from qlora.run.files import cannot_write, whole_rows, write_file
from qlora.run.schema import eval_rows
from qlora.run.timing import PhaseClock
from qlora.speed.memory import peak_memory_gb
from qlora.terminal import printable, say

SAMPLE_LINES = 24  # of an answer, in the terminal; samples.jsonl has all
TRAIN_CURVES = {name: f"train/{name}" for name in ("loss", "learning_rate", "grad_norm", "tokens_per_s", "peak_memory_gb")}
EVAL_CURVES = {"eval_loss": "eval/loss", "perplexity": "eval/perplexity"}


def targets_table(targets: list[Target], total_parameters: int) -> Table:
    """The audit of LoRA targets: name, count, shape, adapter parameters, and their share of the model."""
    trained = sum(target.adapter_parameters for target in targets)
    table = Table(title="LoRA targets")
    for header in ("module", "layers", "shape (out x in)", "adapter parameters"):
        table.add_column(header, justify="left" if header == "module" else "right")
    for target in targets:
        shapes = ", ".join(f"{rows} x {columns}" for rows, columns in target.shapes)
        table.add_row(target.name, str(len(target.layers) or ""), shapes, f"{target.adapter_parameters:,}")
    table.caption = (
        f"{trained:,} trained, {100 * trained / (total_parameters + trained):.2f} % of {total_parameters + trained:,}"
    )
    return table


def sample_table(sample: Completion) -> Table:
    """Base and tuned answer to one prompt, side by side."""
    table = Table(title=Text(printable(sample.prompt)), title_justify="left", expand=True)
    cells = []
    for header, text in (("base", sample.base), ("tuned", sample.tuned)):
        table.add_column(header, ratio=1, overflow="fold")
        lines = printable(text).strip().splitlines()
        rest = [f"... {len(lines) - SAMPLE_LINES} more lines"] if len(lines) > SAMPLE_LINES else []
        cells.append(Text("\n".join(lines[:SAMPLE_LINES] + rest)))  # Text: a model's [brackets] are no markup
    table.add_row(*cells)
    return table


class Tracker:
    """Writes what happens to the run folder and shows it; use it as a context.

    Attributes:
        known_evaluations: step -> eval result, as far as earlier processes of this run have them.
    """

    def __init__(
        self, run_folder: Path, console: Console, clock: PhaseClock, step: int = 0, eval_set: TokenizedDataset | None = None
    ):
        """Open the files of a run that is about to train step `step` + 1; rows of later steps, which are to come again, go.

        Args:
            run_folder: of the run.
            console: for the progress bar and lines.
            clock: told when steps, evaluations and checkpoints end.
            step: the last one that was saved.
            eval_set: what evaluations are of: those of other data do not count as known.
        """
        self.run_folder = run_folder
        self.clock = clock
        self.eval_data = eval_set.sha256 if eval_set else None
        self.console = console
        metrics = run_folder / "metrics.jsonl"
        rows = [row for row in whole_rows(metrics) if row["step"] <= step and step > 0]
        write_file(metrics, b"".join(_line(row) for row in rows))
        self.known_evaluations = {row["step"]: _eval_result_of(row) for row in eval_rows(rows, self.eval_data)}
        self.metrics_file = metrics.open("ab")
        # What an earlier process wrote for this step and later ones is purged from TensorBoard, so the step is written again.
        used = any((run_folder / "tensorboard").glob("events.*"))
        self.board = SummaryWriter(str(run_folder / "tensorboard"), purge_step=step if used else None)
        for row in rows:
            if row["step"] == step or not used:  # or all of them, where a run branches off
                self._draw(row)
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
        with contextlib.suppress(OSError):  # of a full disk, which has ended the run already
            self.metrics_file.close()
        with contextlib.suppress(OSError):
            self.board.close()

    def begin(self, step: int, total_steps: int, logging_steps: int) -> None:
        """Start the progress bar after `step` steps; where there is none, every `logging_steps`-th step gets a line."""
        self.total_steps, self.logging_steps = total_steps, logging_steps
        self.task = self.progress.add_task("", total=total_steps, completed=step, metrics="")
        self.progress.start()

    def steps(self, rows: list[dict[str, Any]]) -> None:
        """Record finished steps, oldest first."""
        for row in rows:
            self._record({"event": "step", **row})
            step = row["step"]
            metrics = (  # a bar of 80 columns has room for these and seven more
                f"epoch {row['epoch']} loss {row['loss']:.4f} lr {row['learning_rate']:.1e} norm {row['grad_norm']:.2f} "
                f"{row['tokens_per_s']:.0f} tok/s {row['peak_memory_gb']:.1f} GB"
            )
            self.progress.update(self.task, completed=step, metrics=metrics)
            if not self.console.is_terminal and (step % self.logging_steps == 0 or step in (1, self.total_steps)):
                self.say(
                    f"step {step}/{self.total_steps}  epoch {row['epoch']}  loss {row['loss']:.4f}  "
                    f"lr {row['learning_rate']:.2e}  grad_norm {row['grad_norm']:.3f}  {row['tokens_per_s']:,.0f} tokens/s  "
                    f"peak {row['peak_memory_gb']:.2f} GB"
                )
        self.flush()

    def evaluation(self, step: int, epoch: int, result: EvalResult) -> None:
        """Record an evaluation after `step` steps."""
        row = {"event": "eval", "step": step, "epoch": epoch, "eval_loss": result.loss, "perplexity": result.perplexity}
        self._record({**row, "num_tokens": result.num_tokens, "eval_data": self.eval_data})
        self.flush()
        self.clock.end("evaluation")
        self.say(f"epoch {epoch}  eval loss {result.loss:.4f}  perplexity {result.perplexity:.3f}")

    def ended_early(self, step: int, patience: int | None) -> None:
        """Tell that `step` is the last step of the run, as the eval loss stopped falling."""
        self.total_steps = step
        self.progress.update(self.task, total=step)
        self.say(f"Ended early, after step {step}: the eval loss stopped falling (--early-stopping-patience {patience}).")

    def adapter_chosen(self, step: int, evaluations: dict[int, EvalResult]) -> None:
        """Tell which step early stopping took the adapter of, and how its eval loss compares."""
        losses = {at: result.loss for at, result in evaluations.items()}
        start, loss = losses.pop(0, math.inf), losses.get(step, math.nan)
        is_best = loss == min(losses.values(), key=lambda value: (math.isnan(value), value), default=math.nan)
        rank = "the checkpoint with the lowest eval loss" if is_best else "whose eval loss is not the lowest"
        line = f"adapter/ is that of step {step}, {rank}, {loss:.4f}."
        if start <= loss:
            line += f" It was {start:.4f} before training: no step made it lower."
        self.say(line)

    def samples(self, samples: list[Completion], of: str, step: int) -> None:
        """Record and show greedy answers of the adapter of `step`; `of` says which prompts they answer."""
        rows = [{"step": step, **sample._asdict()} for sample in samples]
        write_file(self.run_folder / "samples.jsonl", b"".join(map(_line, rows)))
        for index, sample in enumerate(samples):
            text = "\n\n".join(f"**{name}**\n\n```\n{value}\n```" for name, value in sample._asdict().items())
            self.board.add_text(f"samples/{index}", text, self.total_steps)
        self.progress.stop()
        self.say(f"Greedy answers to {of} prompts, without and with the adapter:")
        for sample in samples:
            self.console.print(sample_table(sample))

    def hyperparameters(self, config: TrainConfig, result: EvalResult | None) -> None:
        """Record the configuration beside what it led to, for TensorBoard's table of runs."""
        values = {
            name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in config.plain().items()
        }
        outcome = {"outcome/eval_loss": result.loss, "outcome/perplexity": result.perplexity} if result else {}
        self.board.add_hparams(values, outcome, run_name=".")

    def say(self, line: str) -> None:
        """Print one line, above the bar if there is one."""
        say(self.console, line)

    def flush(self) -> None:
        """See to it that all that was recorded is on disk: a checkpoint is written after the rows of its steps.

        Raises:
            CheckpointError: if the disk is full.
        """
        try:
            self.metrics_file.flush()
            os.fsync(self.metrics_file.fileno())
            self.board.flush()
        except OSError as error:
            raise cannot_write(self.run_folder / "metrics.jsonl", 0, error) from None

    def _record(self, row: dict[str, Any]) -> None:
        # JSON knows no NaN and no infinity.
        row = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()}
        try:
            self.metrics_file.write(_line(row))
        except OSError as error:
            raise cannot_write(self.run_folder / "metrics.jsonl", 0, error) from None
        self._draw(row)

    def _draw(self, row: dict[str, Any]) -> None:
        for name, curve in (EVAL_CURVES if row["event"] == "eval" else TRAIN_CURVES).items():
            if row[name] is not None:
                self.board.add_scalar(curve, row[name], row["step"])


class StepLog:
    """Rows of optimizer steps: collected without waiting for the device, then read together and written.

    Attributes:
        rows: those of the last flush, with numbers for loss and grad_norm.
        before: the last five that were written earlier.
    """

    def __init__(self, tracker: Tracker, device: torch.device) -> None:
        """Start the clock.

        Args:
            tracker: writes and shows the rows.
            device: of the model.
        """
        self.tracker, self.device = tracker, device
        self.pending: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.before: list[dict[str, Any]] = []
        self.restart_clock()

    def restart_clock(self) -> None:
        """Begin to count the seconds of the next steps: saving and evaluation are not training time."""
        self.tracker.clock.end("checkpoints")
        self.since = time.perf_counter()

    def add(
        self,
        step: int,
        epoch: int,
        learning_rate: float,
        loss: torch.Tensor,
        grad_norm: torch.Tensor,
        micro_batches: list[Batch],
    ) -> None:
        """Note a step that has been launched; `loss` and `grad_norm` are scalars on the device, and stay there."""
        row = {"step": step, "epoch": epoch, "learning_rate": learning_rate, "loss": loss, "grad_norm": grad_norm}
        row["num_tokens"] = sum(batch.num_tokens for batch in micro_batches)
        row["num_input_tokens"] = sum(batch.num_input_tokens for batch in micro_batches)
        row["lines"] = [line for batch in micro_batches for line in batch.lines]
        self.pending.append(row)

    def flush(self) -> None:
        """Read all pending steps from the device, in one wait however many they are, and write their rows."""
        pairs = torch.stack([torch.stack([row["loss"], row["grad_norm"]]) for row in self.pending]).tolist()  # sync; [steps, 2]
        seconds = time.perf_counter() - self.since
        tokens_per_s = sum(row["num_input_tokens"] for row in self.pending) / seconds
        measured = {"tokens_per_s": tokens_per_s, "peak_memory_gb": peak_memory_gb(self.device)}
        self.before = [*self.before, *self.rows][-5:]
        self.rows = [
            {**row, "loss": loss, "grad_norm": grad_norm, **measured}
            for row, (loss, grad_norm) in zip(self.pending, pairs, strict=True)
        ]
        self.pending = []
        self.tracker.steps(self.rows)
        self.tracker.clock.end("steps")


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _eval_result_of(row: dict[str, Any]) -> EvalResult:
    loss, perplexity = (math.nan if row[name] is None else row[name] for name in ("eval_loss", "perplexity"))
    return EvalResult(loss, perplexity, row["num_tokens"])


def closing_words(
    run_folder: Path, report: str, peak_gb: float, predicted_gb: float, clock: PhaseClock, config: TrainConfig
) -> str:
    """Where everything is and where the time went, and the commands to load it; on a GPU also peak memory and its prediction.

    Args:
        run_folder: of a run that is complete.
        report: where its report is, or why there is none.
        peak_gb: of memory in training.
        predicted_gb: the same as it was predicted, for a GPU.
        clock: told that the report has ended; where the time went.
        config: resolved; quantization and precision are read.
    """
    clock.end("report")
    adapter = run_folder / "adapter"
    memory = ""
    if torch.cuda.is_available():
        memory = f"GPU memory:   {peak_gb:.2f} GB at its peak, {predicted_gb:.2f} predicted\n"
    form, dtype, code = described(config.quantization, config.precision)
    as_trained = ""
    if code is not None:
        as_trained = f"""

or on the base in {form}, as it was trained:
  import torch
  from transformers import BitsAndBytesConfig
  config = {" ".join(code.split()).replace("( ", "(").replace(", )", ")")}
  model = AutoPeftModelForCausalLM.from_pretrained("{adapter}", quantization_config=config, dtype="{dtype}")"""
    load = f"""Load it on the base in 16 bits:
  from peft import AutoPeftModelForCausalLM
  model = AutoPeftModelForCausalLM.from_pretrained("{adapter}", dtype="{dtype}"){as_trained}"""
    if _kind_of(adapter) in PROMPT_METHODS:
        load = f"""Answer with it (PEFT's own generate is wrong for prefixes, and for batches of prompts; its forward is right):
  python -m qlora generate {shlex.quote(str(run_folder))}"""
    return f"""
{memory}Adapter:      {adapter}
Report:       {report}
Metrics:      {run_folder / "metrics.jsonl"}, samples.jsonl beside it
TensorBoard:  tensorboard --logdir {shlex.quote(str(run_folder / "tensorboard"))}
Time:         {clock.summary()}

{load}"""


def _kind_of(adapter: Path) -> str:
    """The method of PEFT that an adapter is of."""
    path = adapter / "adapter_config.json"
    return str(json.loads(path.read_text())["peft_type"]) if path.exists() else "LORA"
