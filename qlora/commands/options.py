"""What `python -m qlora COMMAND` offers: the options of each. Imports no torch, so that --help and a typo answer at once.

A command's options are a frozen dataclass whose docstring and field docstrings are its --help; the room that `COMMANDS` names
does the work in its function `run`, and is imported once the command line is understood.
"""

import dataclasses
import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from qlora.config import Compile, DataOptions, GradientCheckpointing, Optimizer, PromptFormat, Quantization
from qlora.errors import ConfigError, EnvironmentProblem


@dataclasses.dataclass(frozen=True)
class DoctorOptions:
    """Check this machine: Python, torch, the GPU, NF4 forward and backward, attention backends, memory, disk, versions.

    Ends with 0 where a run can start (a CPU will do) and with 7 where none can.
    """

    json: bool = False
    """Print one JSON object instead of a table."""


@dataclasses.dataclass(frozen=True)
class InspectDataOptions(DataOptions):
    """Look at the data as training would see it: lengths, what is cut or dropped, duplicates, leaks, padding, tokens.

    Of the model only its configuration and tokenizer are loaded.
    """

    model: str | None = None
    """Hub id, folder, `demo` or `tiny-random`, for its tokenizer. Unset: as in training."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    per_device_train_batch_size: int = 2
    """Samples in a micro-batch, which are padded to the longest of them."""
    seed: int = 42
    """Of the order, which decides what shares a micro-batch."""
    examples: int = 3
    """Samples shown as the model reads them, from the shortest to the longest."""
    tokens: bool = False
    """Show them token by token."""
    json: Path | None = None
    """Write what was found here too."""


@dataclasses.dataclass(frozen=True)
class AdapterOptions:
    """Which adapter, and on which base: the options of all commands that load one (qlora/commands/adapter.py)."""

    adapter: Path
    """Run folder, its adapter/, one of its checkpoints, or a folder with a LoRA adapter in PEFT's format."""
    model: str | None = None
    """Base: hub id, folder, `demo` or `tiny-random`. Unset: the one that the adapter names."""
    prompt_format: PromptFormat | None = None
    """plain or chat, as in training. Unset: that of the run; an adapter of another program needs it."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""


@dataclasses.dataclass(frozen=True)
class EvalDataOptions(AdapterOptions):
    """Which eval data a trained adapter is looked at with (evaluate.read_eval_data)."""

    eval_file: tuple[str, ...] | None = None
    """Files, patterns, folders, or hub data sets, as in training. Unset: those of the run."""
    columns: tuple[str, ...] | None = None
    """Names of columns in the file, as OUR_NAME=ITS_NAME. Unset: those of the run."""
    ignore_columns: tuple[str, ...] | None = None
    """Columns, or keys of messages (messages.KEY), to leave out. Unset: those of the run."""
    limit: int | None = None
    """Only this many examples, the first. Unset: all."""
    max_length: int | None = None
    """Longest sample, in tokens. Unset: that of the run, else 2048."""
    on_long: Literal["drop", "truncate", "error"] | None = None
    """What happens to longer samples. Unset: what the run did, else drop."""
    allow_drop: bool = False
    """Continue even if more than a fifth of the examples has to be dropped."""


@dataclasses.dataclass(frozen=True)
class EvaluateOptions(EvalDataOptions):
    """Compare base and adapter on eval data: loss, token accuracy, and greedy answers, with bootstrap intervals.

    Answers are scored by exact match, ROUGE-L, BLEU and chrF, and where all references are JSON or AVRO schemas by validity.
    """

    max_new_tokens: int | None = None
    """Longest answer. Unset: twice the longest that is wanted, 1,024 at most."""
    batch_size: int = 8
    """Samples, or prompts, at a time."""
    int8: bool = False
    """Base in 8 bits (LLM.int8) instead of NF4, which training saw."""
    seed: int = 42
    """Of the resampling, below 2**63."""
    json: Path | None = None
    """Also write all numbers and answers to this file."""


@dataclasses.dataclass(frozen=True)
class GenerateOptions(AdapterOptions):
    """Answer one prompt, a file of prompts, or, without either, in a chat at the terminal."""

    prompt: str | None = None
    """To be answered; the answer is shown while it grows."""
    prompts_file: tuple[str, ...] | None = None
    """Text with one prompt per line, or files in any form of training (answers may be missing)."""
    columns: tuple[str, ...] | None = None
    """Names of columns in the file, as OUR_NAME=ITS_NAME. Unset: those of the run."""
    ignore_columns: tuple[str, ...] | None = None
    """Columns, or keys of messages (messages.KEY), to leave out. Unset: those of the run."""
    compare: bool = False
    """The base's answer beside the adapter's."""
    temperature: float = 0.0
    """0: the likeliest token, always. From 0.001 on: tokens are drawn from the logits over the temperature."""
    top_p: float | None = None
    """Draw among the likeliest tokens that have this share of the probability together. Unset: among all."""
    top_k: int | None = None
    """Draw among this many likeliest tokens. Unset: among all."""
    max_new_tokens: int = 256
    """Longest answer. It ends earlier at the stop token."""
    seed: int = 42
    """Of what is drawn, below 2**63; a file's answers depend on --batch-size too."""
    batch_size: int = 8
    """Prompts of a file at a time."""
    int8: bool = False
    """Base in 8 bits (LLM.int8) instead of NF4, which training saw."""
    json: Path | None = None
    """Also write prompts and answers to this file, one JSON object per line."""


@dataclasses.dataclass(frozen=True)
class MergeOptions(EvalDataOptions):
    """Add the adapter to its base's weights, measure what that changes on eval data, and save the model in bf16.

    Into the base in bf16, or into its NF4 weights turned to bf16, which is what the adapter was trained beside. Not into NF4
    itself: the sum would be rounded to 4 bits again, which undoes much of the training.
    """

    into: Literal["bf16", "dequantized", "recommended"] | None = None
    """Which base the saved model is made of. recommended: the one that is measured to be closer. Unset: nothing is saved."""
    output_dir: Path | None = None
    """Folder to be made, with all that transformers needs. Unset: beside the adapter, as ADAPTER-merged-bf16."""
    onnx: bool = False
    """Save it as ONNX in fp32 too, in onnx/ of that folder, and compare it with torch; needs pip install -e ".[onnx]"."""


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """Predict the memory of a run on a GPU, term by term, and what to change where it does not fit.

    Only the shape of the model counts, so no weights are read; values of training's flags are those of a first run.
    """

    shape: Literal["phi3-mini", "phi3-medium", "demo"] | None = None
    """Built in, so that nothing is fetched: 3.8, 14.0 and 0.13 billion parameters. Unset: phi3-mini."""
    model: str | None = None
    """Hub id, folder, `demo` or `tiny-random`, whose config.json is read in place of a --shape."""
    gpu_memory: float | None = None
    """Size of the card in GB, as sold: 8, 24, 80. Unset: what is free on this machine's GPU, if there is one."""
    max_length: int = 2048
    """Longest row, in tokens."""
    per_device_train_batch_size: int = 2
    """Rows in one forward and backward."""
    quantization: Quantization = "nf4"
    """As in training."""
    lora_r: int = 32
    """Rank."""
    target_modules: tuple[str, ...] | None = None
    """Names of the linear layers that get an adapter. Unset: all but the head."""
    attn_implementation: Literal["sdpa", "varlen", "flash_attention_2", "eager"] = "sdpa"
    """eager keeps all scores of a row; the others need the same."""
    gradient_checkpointing: GradientCheckpointing = "auto"
    """auto: none, selective and full beside each other."""
    compile: Compile = "auto"
    """auto: graphs."""
    optimizer: Optimizer = "adamw"
    """As in training."""
    offload_checkpoints: bool = False
    """As in training; layers are compiled, without graphs."""
    cache_dequantized: bool = False
    """As in training."""
    gpus: int = 1
    """With more than one, also predict step time and memory, with the whole base on each GPU and with --shard-base."""
    interconnect: float = 300.0
    """Bandwidth per GPU, in GB/s: about 300 for NVLink, 50 for InfiniBand NDR, 12.5 for 100 Gb/s Ethernet."""
    gradient_accumulation_steps: int | None = None
    """Micro-batches of a step on all GPUs together, as in training; read for step time only. Unset: 2 per GPU."""
    json: Path | None = None
    """Also write all numbers to this file."""


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """Write report.html and plots/ of a run: curves, answers before and after, data, memory, configuration, and its limits.

    A run writes them when it ends. For a running or stopped run, the report shows the progress so far; nothing else changes.
    """

    run: Path
    """Run folder, as --output-dir named it."""


def refuse_below(least: int, options: Any, *names: str) -> None:
    """Refuse options below the least value that makes sense; None is unset.

    Raises:
        ConfigError: naming the flag and the value seen.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} {value} cannot be used: it must be at least {least}.")


def refuse_seed(seed: int) -> None:
    """Refuse a seed that torch's generators do not take.

    Raises:
        ConfigError.
    """
    if not 0 <= seed < 2**63:
        raise ConfigError(f"--seed {seed} cannot be used: it must be at least 0 and below 2**63.")


def require_packages(what: str, packages: Mapping[str, str], extra: str) -> None:
    """Refuse to begin without the packages of an extra.

    Args:
        what: needs them.
        packages: import name -> package.
        extra: of setup.cfg, which installs them.

    Raises:
        EnvironmentProblem.
    """
    missing = [package for name, package in packages.items() if importlib.util.find_spec(name) is None]
    if missing:
        raise EnvironmentProblem(
            f"{what} needs {', '.join(missing)}, which this Python lacks.",
            hint=f"Install the extra: pip install -e '.[{extra}]'",
        )
