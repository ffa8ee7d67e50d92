"""What all benchmarks share: cells in processes of their own, models with random weights, and result files that grow.

A cell is one combination of what is compared. It runs in a new process, so that its peak memory, and running out of it, are
its own. The process that starts cells never touches the GPU.
"""

import dataclasses
import datetime
import functools
import importlib
import json
import math
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qlora.config import TrainConfig
from qlora.run.schema import in_gb

if TYPE_CHECKING:
    import torch

    from train_loop import Trainee

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# Imported once, by the process that all cells are forked from. None of these starts CUDA; bitsandbytes would.
PRELOADED = ["torch", "torch._inductor.compile_fx", "torch.utils.tensorboard", "transformers.models.phi3.modeling_phi3"]
Shape = Literal["phi3-mini", "demo", "tiny"]
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Output:
    """Options of every benchmark that writes a result file."""

    out: Path | None = None
    """Where the JSON is, or goes. Unset: benchmarks/results/NAME_CARD_YYYYMM.json."""
    commit: str | None = None
    """Commit of the code, where it runs without its repository."""


@dataclasses.dataclass(frozen=True)
class Part:
    """Options of benchmarks that are measured in several runs."""

    missing: bool = False
    """Only cells that the file lacks."""
    minutes: float | None = None
    """Start no further cell after this many minutes. A later run with --missing continues."""


# -- processes -------------------------------------------------------------------------------------------------------


class Failed(Exception):
    """Why a cell has no result."""


class Cell:
    """A function that runs in a process of its own. Imports start at once, the function with `start` or `result`.

    Args:
        function: of a module, so that the process finds it by name.
        arguments: of the function; they are pickled, as is what it returns.
        imports: modules that the process imports before it waits, while another cell is measured.
        site: a folder of packages that come before all others; such a process is a new interpreter.
        folder: working directory, for libraries that leave files there.
        log: file that the process's output is appended to. None: a temporary one.
        forks: whether the function starts processes; such a cell outlives this process if nobody asks for its result.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        imports: Iterable[str] = (),
        site: Path | None = None,
        folder: Path | None = None,
        log: Path | None = None,
        forks: bool = False,
    ):
        # After a fork CUDA starts only where it has not started before; with this variable torch asks the driver instead.
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        os.environ["HF_HUB_OFFLINE"] = "1"
        context = multiprocessing.get_context("forkserver" if site is None else "spawn")
        context.set_forkserver_preload(PRELOADED)
        self._connection, theirs = context.Pipe()
        self._log = tempfile.NamedTemporaryFile(prefix="cell", suffix=".log")  # noqa: SIM115  stop() closes it
        self._output = log or Path(self._log.name)
        job = (theirs, self._output, folder or ROOT, tuple(imports), function, arguments)
        self.process = context.Process(target=_serve, args=job, daemon=not forks)
        sys.path[:0] = [str(site.resolve())] if site else []  # a new interpreter gets this list
        try:
            self.process.start()
        finally:
            del sys.path[: bool(site)]
        theirs.close()
        self._started = False

    def start(self) -> "Cell":
        """Let the function begin."""
        self._connection.send("start")
        self._started = True
        return self

    def result(self, timeout_s: float = 600.0) -> Any:
        """What the function returns.

        Raises:
            Failed: with the last lines that the process wrote, or its exit code, or after `timeout_s` seconds.
        """
        try:
            if not self._started:
                self.start()
            if not self._connection.poll(timeout_s):
                raise Failed(f"not done in {timeout_s:g} s")
            return self._connection.recv()
        except (EOFError, OSError):
            self.process.join()
            told = reason(self._output.read_text(errors="replace"))
            raise Failed(told or f"ended with status {self.process.exitcode}") from None
        finally:
            self.stop()

    def row(self, key: str, timeout_s: float = 600.0) -> Row:
        """What the function returns, a row of a result file; where it fails, a row that says why under `key`."""
        try:
            return self.result(timeout_s)
        except Failed as failed:
            return {key: str(failed)}

    def stop(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.join()
        self._connection.close()
        self._log.close()  # which removes it


def _serve(
    connection: Connection, log: Path, folder: Path, imports: tuple[str, ...], function: Callable[..., Any], arguments: Any
) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(folder)
    try:
        for module in imports:
            importlib.import_module(module)
        connection.recv()  # the cell before has ended
        connection.send(function(*arguments))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def reason(output: str) -> str:
    """The last two lines of what a process wrote, without this machine's folders."""
    if "OutOfMemoryError" in output:
        return "out of memory"
    lines = [line.strip() for line in output.splitlines() if line.strip()][-2:]
    return re.sub(r"(?<![\w.:/])/(?:[^\s'\"/:]+/)+", "", " / ".join(lines))[-400:]


# -- machines and result files ---------------------------------------------------------------------------------------


def device() -> "torch.device":
    """The first GPU, or the CPU where there is none."""
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def describe() -> Row:
    """Versions, commit and hardware. Touches the GPU."""
    from qlora.run.environment import environment

    return environment(device())


class ResultFile:
    """A JSON file with the machine, its runs and its cells, written after each cell.

    Runs on one machine with one set of versions merge into one file.

    Attributes:
        environment: versions, commit and hardware.
        on_gpu: whether there is a GPU.
        record: what the file holds; `begin_run` reads it.
    """

    def __init__(self, benchmark: str, options: Output):
        self.began = time.perf_counter()
        self.environment: Row = Cell(describe).result()
        self.environment["commit"] = options.commit or self.environment["commit"] or "unknown"
        self.on_gpu = self.environment["device_memory_gb"] is not None
        self.path = options.out or result_path(benchmark, self.environment["device"])
        self.record: Row = {}

    def begin_run(self, fixed: Row, **settings: Any) -> None:
        """Read what the file holds, and note that the cells to come belong to a run of today.

        Args:
            fixed: settings that all runs of a file have in common.
            settings: others.
        """
        self.record = reopened(self.path, self.environment, fixed)
        about = {"date": f"{datetime.date.today()}", "commit": self.environment["commit"]}
        self.record["runs"].append({**about, **fixed, **settings})

    def is_late(self, minutes: float | None) -> bool:
        """Whether so many minutes have passed."""
        return minutes is not None and time.perf_counter() - self.began > 60 * minutes

    def write(self, shown: Row) -> None:
        """Write the record, and print a row of it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.record, indent=1) + "\n")
        print(json.dumps(shown), flush=True)


def result_path(benchmark: str, device_name: str) -> Path:
    """benchmarks/results/BENCHMARK_CARD_YYYYMM.json."""
    card = re.search(r"[HABLV]\d{2,3}|CPU", device_name)
    return RESULTS / f"{benchmark}_{card[0].lower() if card else 'gpu'}_{datetime.date.today():%Y%m}.json"


def reopened(path: Path, environment: Row, fixed: Row) -> Row:
    """What the file holds already.

    Raises:
        SystemExit: if it is of another machine or of other versions, or if its runs differ in `fixed`.
    """
    if not path.exists():
        return {"environment": environment, "runs": [], "cells": []}
    record: Row = json.loads(path.read_text(), object_hook=in_gb)
    pairs = [(name, record["environment"][name], environment[name]) for name in ("device", "packages")]
    pairs += [(name, run[name], value) for name, value in fixed.items() for run in record["runs"]]
    for name, before, now in pairs:
        if before != now:
            raise SystemExit(f"{path} has another {name}: {before}. Give another --out.")
    return record


# -- time ------------------------------------------------------------------------------------------------------------


class Clock:
    """When steps begin and end: CUDA events on a GPU, which do not wait for it; and memory, the warm-up's apart."""

    def __init__(self, warm_up: int = 0):
        import torch

        self.device, self.cuda, self.warm_up = device(), torch.cuda, warm_up
        self.on_gpu = self.device.type == "cuda"
        self.created = time.perf_counter()
        self.load_s = self.cold_peak_gb = self.timed_since = math.nan
        self.marks: list[Any] = []  # begin and end of each step
        self.losses: list[float] = []
        self.attention: str | None = None  # where the model's configuration does not tell

    def now(self) -> float:
        """Seconds, when the device has done all that it was given."""
        if self.on_gpu:
            self.cuda.synchronize()
        return time.perf_counter()

    def mark(self) -> None:
        """Note what time it is on the device."""
        self.marks.append(self.cuda.Event(enable_timing=True) if self.on_gpu else time.perf_counter())
        if self.on_gpu:
            self.marks[-1].record()

    def loaded(self) -> None:
        """All that comes before the first step is done."""
        self.load_s = self.now() - self.created

    def begin(self) -> None:
        """A step begins."""
        if len(self.marks) == 2 * self.warm_up:
            self.timed_since = self.now()
            self.cold_peak_gb = peak_gb()
            if self.on_gpu:
                self.cuda.reset_peak_memory_stats()
        self.mark()

    def end(self) -> None:
        """The step has ended."""
        self.mark()

    def milliseconds(self) -> list[float]:
        """How long each step took; waits for the last one."""
        self.now()
        pairs = zip(self.marks[::2], self.marks[1::2], strict=True)
        return [began.elapsed_time(ended) if self.on_gpu else 1000 * (ended - began) for began, ended in pairs]


def peak_gb() -> float:
    """Highest memory so far: allocated on the GPU, or resident in the process where there is none."""
    from qlora.speed.memory import peak_memory_gb  # which imports bitsandbytes

    return round(peak_memory_gb(device()), 3)


def spread(name: str, times: list[float]) -> dict[str, float]:
    """Median, and the 10th and 90th percentile, under names with their unit."""
    tenths = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times * 9
    return {name: round(statistics.median(times), 4), f"{name}_p10": round(tenths[0], 4), f"{name}_p90": round(tenths[8], 4)}


# -- models with random weights --------------------------------------------------------------------------------------


def write_random_model(shape: Shape, folder: Path, **changes: Any) -> None:
    """A checkpoint of exact shape with random weights in bf16, with a tokenizer, so that train_loop.py runs on it.

    Speed and memory do not depend on the values of weights. `changes` are of Phi3Config; the tiny shape has none.
    """
    import torch
    import transformers

    from qlora.commands.plan import SHAPES
    from qlora.model.demo import build_tiny_random

    build_tiny_random(folder)
    if shape == "tiny":
        return
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = transformers.Phi3Config(**{**SHAPES[shape], **ids, **changes}, dtype=torch.bfloat16)
    with device():
        torch.set_default_dtype(torch.bfloat16)
        model = transformers.Phi3ForCausalLM(config)
    model.save_pretrained(folder)


def _fail(warning: str) -> None:
    """What is measured as compiled must be compiled."""
    raise Failed(warning)


def build(config: TrainConfig) -> tuple[TrainConfig, "Trainee"]:
    """The model, decoder, loss and optimizer as train_loop.main makes them, in the same five calls.

    Args:
        config: as from the command line; `model` is a folder.

    Returns:
        The configuration, in which nothing is auto any more, and what is ready for its first step.
    """
    from qlora.model.attention import choose_attention
    from qlora.model.load import load_meta_model, load_nf4_model
    from qlora.model.lora import add_lora
    from qlora.model.loss import read_head, token_loss_sum
    from qlora.model.optimizer import build_optimizer
    from qlora.model.random_state import seed_generators
    from qlora.model.targets import audit_targets
    from qlora.run.prepare import resolve, set_up_torch
    from qlora.speed.accelerate import accelerate
    from qlora.speed.layers import choose_layers
    from train_loop import Trainee

    place = set_up_torch(config)
    config = resolve(config, place, lambda line: None)
    source = str(config.model)
    meta_model = load_meta_model(source, config)
    attention = choose_attention(config, place, meta_model)
    config = dataclasses.replace(config, attn_implementation=attention.implementation)
    targets = audit_targets(meta_model, config)
    config, _ = choose_layers(config, meta_model, targets, config.max_length, place)
    seed_generators(config.seed)
    model = load_nf4_model(source, config, attention.loaded_as, place)
    model = add_lora(model, config, targets, source)
    decoder = accelerate(model, config, _fail)
    loss_sum = functools.partial(token_loss_sum, head=read_head(model))
    optimizer = build_optimizer({name: each for name, each in model.named_parameters() if each.requires_grad}, config)
    return config, Trainee(model, decoder, loss_sum, optimizer)
