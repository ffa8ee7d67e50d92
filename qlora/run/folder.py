"""The run folder: one process at a time, the checkpoint it resumes from, and whether it may."""

import concurrent.futures
import contextlib
import dataclasses
import datetime
import json
import os
import re
import shlex
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora import distributed
from qlora.config import Overridable, TrainConfig
from qlora.distributed import Ranks
from qlora.errors import CheckpointError, ConfigError, EnvironmentProblem, NonFiniteError
from qlora.eval.loss import EvalResult
from qlora.run import checkpoint
from qlora.run.files import MANIFEST, remove_leftovers, require_space, sync_folder, whole_rows, write_file, write_folder
from qlora.run.schema import FORMAT, Environment, Finished, Resume, RunInfo, State, eval_rows, read_json
from qlora.run.signals import Stopped
from qlora.terminal import redact
from qlora.validation import UNREADABLE, reason

T = TypeVar("T")

LOCK, RUN, FINISHED, METRICS, SAMPLES = "run.lock", "run.json", "finished.json", "metrics.jsonl", "samples.jsonl"
LOCK_WAIT_S = 0.2  # is_going holds the lock for less than a millisecond
# Options that may differ without a word: they change no number of the training, or are compared by what they give.
FREE = {"output_dir", "resume", "override", "logging_steps", "save_steps", "save_total_limit", "skip_nonfinite", "debug",
        "explain", "trust_remote_code", "target_modules", "eval_file", "compile_cache", "peft_config"}  # fmt: skip
OF_THE_DATA = {"train_file", "columns", "ignore_columns", "prompt_format", "loss_on", "max_length", "on_long", "allow_drop"}
EARLIER = TrainConfig(compile="none", precision="bf16").plain()  # what an option was before there was that option
RESOLVED = ("attn_implementation", "compile", "gradient_checkpointing", "precision")  # from auto, by what the machine has
OF_A_STEP = ("per_device_train_batch_size", "gradient_accumulation_steps")
EVENTS = re.compile(r"events\.out\.tfevents\.(\d+)\.")  # seconds since 1970
SAVED_BYTES = 3 * 4  # of a trained parameter in a checkpoint: itself and AdamW's two moments, in fp32; less with 8 bits


class RunFolder:
    """A run folder that this process alone writes to, while it is entered as a context.

    Attributes:
        folder: where it is.
        checkpoint: what to resume from, verified; None at the start of a run.
        notes: lines for the log: what was found, and what was wrong with it.
    """

    def __init__(self, folder: Path, resume: str, follows: bool = False):
        """Lock the folder and find the checkpoint to resume from; only leftovers of dead processes are removed.

        Args:
            folder: made if it is not there.
            resume: auto, never, or the path of a checkpoint or run folder.
            follows: whether another rank has locked it and writes to it; this one only reads.

        Raises:
            CheckpointError: if it cannot be written, holds something else, is in use, or has no sound checkpoint left.
        """
        self.folder, self.checkpoints = folder, folder / "checkpoints"
        self.notes: list[str] = []
        self.info: RunInfo | None = None
        self._damaged: list[Path] = []
        self._taken_over = False
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[None] | None = None
        self._follows = follows
        self._lock = None if follows else _locked(folder)
        self.logs = Path(tempfile.mkdtemp()) if follows else folder  # where this rank writes metrics
        try:
            for place in () if follows else (folder, self.checkpoints, folder / "adapter"):
                remove_leftovers(place)
            self._known, self._finished = _read(folder / RUN, RunInfo), _read(folder / FINISHED, Finished)
            self.checkpoint = self._find(resume)
        except BaseException:
            self._close()
            raise

    @classmethod
    def open(cls, config: TrainConfig, ranks: Ranks = Ranks()) -> "RunFolder":  # noqa: B008  a tuple
        """The run folder of a resolved configuration, which one rank locks; errors are those of RunFolder itself."""
        assert config.output_dir is not None  # as resolved
        folder, resume = config.output_dir, config.resume
        return distributed.in_turn(lambda: cls(folder, resume, follows=not ranks.is_first))

    def _close(self) -> None:
        if self._lock is None:
            shutil.rmtree(self.logs, ignore_errors=True)
        else:
            self._lock.release()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            # The first error counts, but a signal is none.
            is_error = kind is not None and not issubclass(kind, Stopped)
            with contextlib.suppress(CheckpointError) if is_error else contextlib.nullcontext():
                self.wait_until_saved()
            # Where all ranks end together, none leaves before the first has written: torchrun would end that one too.
            if kind is None or issubclass(kind, Stopped | NonFiniteError):
                with contextlib.suppress(EnvironmentProblem):
                    distributed.largest(0)
        finally:
            self._writer.shutdown()
            self._close()

    def _find(self, resume: str) -> Path | None:
        own = checkpoint.by_step(self.checkpoints)
        if resume == "never":
            if own or self._finished:
                raise CheckpointError(
                    f"{self.folder} holds a run, and --resume never starts another.",
                    hint="Choose another --output-dir.",
                )
            return None
        if resume == "auto":
            return self._newest(self.checkpoints, of=self.folder)
        path = Path(resume)
        if not path.is_dir():
            raise CheckpointError(f"--resume {resume}: there is no such folder.")
        chosen = self._newest(path / "checkpoints", of=path) if (path / "checkpoints").is_dir() else path
        match = checkpoint.NAME.fullmatch(chosen.name) if chosen else None
        if chosen is None or match is None:
            raise CheckpointError(f"--resume {resume} is neither a checkpoint (step-...) nor a run folder that has one.")
        if problem := checkpoint.problem_of(chosen):
            raise CheckpointError(
                f"--resume {resume} is damaged: {problem}.",
                hint="--resume auto looks for an older one that is sound.",
            )
        if own and self._known and self._known.origin == str(chosen.resolve()):  # the branch is there already
            return self._newest(self.checkpoints, of=self.folder)
        sound = [step for step, folder in own.items() if folder not in self._damaged]
        if any(step > int(match[1]) for step in sound) or (own and not self._is_own(chosen)):
            raise CheckpointError(
                f"{self.folder} has checkpoints up to step {max(own)} already, which would be lost.",
                hint="To branch off, pass another --output-dir; to resume, --resume auto.",
            )
        return chosen

    def _is_own(self, folder: Path) -> bool:
        return folder.parent.resolve() == self.checkpoints.resolve()

    def _newest(self, checkpoints: Path, of: Path) -> Path | None:
        found, skipped = checkpoint.newest(checkpoints)
        self.notes += [f"Checkpoint {folder.name} is damaged: {problem}." for folder, problem in skipped.items()]
        if found is None and skipped:
            raise CheckpointError(
                f"{of}: none of its {len(skipped)} checkpoints is sound. {' '.join(self.notes)} Start again in another "
                "--output-dir.",
            )
        if checkpoints.resolve() == self.checkpoints.resolve():
            self._damaged = list(skipped)
        return found

    def _before(self) -> tuple[State | None, RunInfo | None]:
        """The state of the checkpoint, and the run.json of the folder; None where there is none."""
        there = checkpoint.read_state(self.checkpoint) if self.checkpoint else None
        return there, self._known if self._known and (there or self._finished) else there

    def as_before(self, config: TrainConfig) -> TrainConfig:
        """The configuration with what this run resolved `auto` to, if it has begun."""
        _, before = self._before()
        if before is None:
            return config
        known = {**EARLIER, **before.config}
        resolved: dict[str, Any] = {name: known[name] for name in RESOLVED if getattr(config, name) == "auto"}
        return dataclasses.replace(config, **resolved)

    @property
    def date(self) -> str | None:
        """When this run began (ISO 8601), which its chat template may print; None for a new run.

        Runs of older versions did not store it. Theirs is read from the name of TensorBoard's first file.
        """
        _, before = self._before()
        if before is None or before.date:
            return before.date if before else None
        run_folder = self.checkpoint.parent.parent if self.checkpoint else self.folder
        starts = [match[1] for path in run_folder.glob("tensorboard/events.*") if (match := EVENTS.match(path.name))]
        return datetime.datetime.fromtimestamp(min(map(int, starts))).isoformat() if starts else None

    def accept(self, config: TrainConfig, info: RunInfo) -> bool:
        """Compare this run with the one that the folder holds. Nothing is touched yet; see take_over.

        Args:
            config: resolved.
            info: of this run; data, eval_data, targets and device must be those of before.

        Returns:
            Whether there is anything left to do.

        Raises:
            ConfigError: if run or checkpoint has another format; or with a table of what differs and is not in `--override`.
        """
        self.info = info
        there, before = self._before()
        if before is None and not self._finished:
            return True
        if not self._finished:  # one that is complete says so first, whatever its format
            self._require_format(config.resume)
        at_step = there.step if there else self._finished.step if self._finished else 0
        overrides = _differences(before, info, config, at_step) if before else {}
        if self._finished and not overrides:
            return False
        self._require_format(config.resume)
        if before is None or there is None:
            raise CheckpointError(
                f"{self.folder} holds a finished run whose checkpoints are gone, so that it cannot be extended.",
                hint=f"--init-adapter {self.folder / 'adapter'} starts from its adapter.",
            )
        assert info.total_steps is not None and info.environment is not None  # as prepare made it
        if self.step > info.total_steps:
            raise ConfigError(
                f"{self.folder} is at step {self.step}, beyond the {info.total_steps} asked for.",
                hint="Ask for more, or choose another --output-dir.",
            )
        event = Resume(step=self.step, overrides=overrides, environment=there.environment)
        self.info = info.model_copy(update={"history": [*before.history, event], "origin": before.origin})
        changed = "".join(f"; {name}: {old} -> {new}" for name, (old, new) in overrides.items())
        on_gpu = info.device == "cuda"
        close = _exactness(there.environment, info.environment, config.deterministic, on_gpu, bool(overrides))
        self.notes.append(f"Resuming after step-{self.step:06d}{changed}. {close}")
        return True

    def _require_format(self, resume: str) -> None:
        """Refuse to resume what a version of another format saved.

        Args:
            resume: the option of that name.
        """
        there, before = self._before()
        if there is None or before is None or self.checkpoint is None:  # nothing to resume
            return
        other = there if there.format != FORMAT else before
        if other.format == FORMAT:
            return
        run_folder = self.checkpoint.parent.parent
        adapter = run_folder / "adapter" if (run_folder / FINISHED).exists() else self.checkpoint
        why = "Its dropout was drawn from a generator whose state this version does not keep."
        if other.format > FORMAT:
            why = "A newer version of this program wrote it."
        instead = "" if resume == "auto" else " instead of --resume"
        raise ConfigError(
            f"{self.checkpoint if other is there else self.folder} has format {other.format}, and this version resumes format "
            f"{FORMAT} only. {why}",
            hint=f"To start a new run from its adapter, pass --init-adapter {adapter}{instead} and a new --output-dir.",
        )

    def take_over(self, config: TrainConfig) -> None:
        """Make the folder that of this run: once all that can be checked has been, and before the first file is changed."""
        distributed.largest(0)  # waits until every rank has read what it resumes from
        if self._follows:
            return
        (self.folder / LOCK).write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        self.checkpoints.mkdir(exist_ok=True)
        for folder in (self.folder, self.folder.parent):
            sync_folder(folder)
        if self.checkpoint is not None and not self._is_own(self.checkpoint):
            self._branch_off(self.checkpoint)
        # A later process resumes without flags, and what was permitted once need not be permitted again.
        kept = dataclasses.replace(config, resume="auto", override=())
        assert self.info is not None  # as accepted
        assert self.info.environment is not None  # as prepare made it
        environment = self.info.environment.model_copy(update={"command": [redact(word) for word in sys.argv]})
        write_file(self.folder / "config.yaml", kept.to_yaml().encode())
        write_file(self.folder / "env.json", json.dumps(environment.model_dump(), indent=1).encode())
        write_file(self.folder / RUN, json.dumps(self.info.model_dump(), indent=1).encode())
        for folder in self._damaged:  # out of the way of the checkpoints to come, and kept
            folder.rename(_free_name(folder.with_name(f"{folder.name}.damaged")))
        for made_at_the_end in (FINISHED, SAMPLES):
            (self.folder / made_at_the_end).unlink(missing_ok=True)
        self._finished = None
        sync_folder(self.folder)
        self._taken_over = True

    def _branch_off(self, source: Path) -> None:
        assert self.info is not None  # as accepted
        metrics = source.parent.parent / METRICS
        if metrics.is_file():
            write_file(self.folder / METRICS, metrics.read_bytes())
        rows = eval_rows(whole_rows(metrics), self.info.eval_data)
        losses = {row["step"]: row["eval_loss"] for row in rows if row["step"] <= self.step and row["eval_loss"] is not None}
        self.checkpoint = self.checkpoints / source.name
        self.info = self.info.model_copy(update={"origin": str(source.resolve())})
        found = checkpoint.by_step(source.parent)
        # The best one before the branch is copied too, as early stopping may choose it. `source` is written last.
        for folder in dict.fromkeys([*(found[step] for step in checkpoint.lowest(losses, found)), source]):
            if folder == source or checkpoint.problem_of(folder) is None:
                names = json.loads((folder / MANIFEST).read_bytes())["files"]
                write_folder(self.checkpoints / folder.name, {name: (folder / name).read_bytes() for name in names})

    def require_space(self, trained_parameters: int, keep: int) -> None:
        """Refuse to begin if the disk has no room for the checkpoints kept, one more being written, and the adapter.

        Raises:
            CheckpointError: with the bytes needed and free.
        """
        if self._follows:
            return
        missing = max(keep + 1 - len(checkpoint.by_step(self.checkpoints)), 1)
        require_space(self.folder, trained_parameters * (SAVED_BYTES * missing + 4))

    def restore(self, model: Any, optimizer: torch.optim.Optimizer, weights: str) -> checkpoint.TrainState:
        """Put model and optimizer in the state of the checkpoint, if there is one.

        Args:
            model: with adapters.
            optimizer: over them.
            weights: fingerprint of the frozen base, kept in run.json.

        Raises:
            UserError: exit 2 if the base is another, 4 if the checkpoint does not fit.
        """
        assert self.info is not None  # as accepted
        self.info = self.info.model_copy(update={"weights": weights})
        state = self._restored(model, optimizer, weights)
        distributed.require_same(checkpoint.trained_tensors(model, optimizer), "adapters or moments")
        if not self._follows:
            self._writer.submit(checkpoint.reserve_host_memory, optimizer)
        return state

    def _restored(self, model: Any, optimizer: torch.optim.Optimizer, weights: str) -> checkpoint.TrainState:
        if self.checkpoint is None:
            return checkpoint.TrainState()
        if checkpoint.read_state(self.checkpoint).weights != weights:
            raise ConfigError(
                f"The base model is not the one of {self.checkpoint}: its weights or its config.json differ.",
                hint="Use that model, or start a new run with --init-adapter.",
            )
        return checkpoint.restore(self.checkpoint, model, optimizer)

    def save(
        self,
        model: Any,
        optimizer: torch.optim.Optimizer,
        state: checkpoint.TrainState,
        keep: int,
        evaluations: dict[int, EvalResult],
    ) -> None:
        """Copy the state, and write it while training continues: a checkpoint, verified before old ones are removed.

        One is written at a time: this waits for the one before. See checkpoint.snapshot, checkpoint.write and prune.

        Raises:
            CheckpointError: if the one before could not be written.
        """
        assert self.info is not None  # as accepted
        distributed.require_same(checkpoint.trained_tensors(model, optimizer), "adapters or moments")
        if self._follows:
            return
        self.wait_until_saved()
        taken = checkpoint.snapshot(model, optimizer, state, self.info)
        self._saving = self._writer.submit(self._write, taken, keep, dict(evaluations))

    def _write(self, taken: checkpoint.Snapshot, keep: int, evaluations: dict[int, EvalResult]) -> None:
        """What the worker does."""
        self.checkpoint = checkpoint.write(self.checkpoints, taken)
        self.prune(keep, evaluations)

    def wait_until_saved(self) -> None:
        """Wait until no checkpoint is being written.

        Raises:
            CheckpointError: if it could not be written.
        """
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()

    def raise_if_not_saved(self) -> None:
        """Raise the error of a checkpoint that could not be written, without waiting for one that still may be."""
        if self._saving is not None and self._saving.done():
            self.wait_until_saved()

    def prune(self, keep: int, evaluations: dict[int, EvalResult]) -> None:
        """Remove old checkpoints, by the evaluations before the newest of them; see checkpoint.prune.

        The evaluation of the newest comes after its save, so a process that resumes knows it and the one that saved did not.
        Both must keep the same checkpoints.
        """
        if self._follows:
            return
        losses = {step: result.loss for step, result in evaluations.items() if step < self.step}
        checkpoint.prune(self.checkpoints, keep, losses)

    def load_best(self, model: Any, evaluations: dict[int, EvalResult], say: Callable[[str], None]) -> int:
        """Give the model the adapter of the checkpoint with the lowest eval loss, for early stopping.

        Args:
            model: with the adapter of the newest checkpoint.
            evaluations: step -> result.
            say: for a warning about a damaged checkpoint.

        Returns:
            The step of the adapter. It is the newest if no other checkpoint has a finite loss and is sound.
        """
        folders = checkpoint.by_step(self.checkpoints)
        losses = {step: result.loss for step, result in evaluations.items()}
        while best := checkpoint.lowest(losses, folders):
            (step,) = best
            if step == self.step:
                break
            if not (problem := checkpoint.problem_of(folders[step])):
                checkpoint.load_adapter(folders[step], model)
                return step
            say(f"Warning: checkpoint {folders.pop(step).name}, which has the lowest loss, is damaged: {problem}.")
        return self.step

    def finish(self, adapter_step: int) -> None:
        """Mark the run as complete. Only sample answers, the report and the model card are written later.

        Args:
            adapter_step: step whose adapter is in adapter/; an earlier one after early stopping.
        """
        self._finished = Finished(step=self.step, adapter_step=adapter_step)
        write_file(self.folder / FINISHED, json.dumps(self._finished.model_dump()).encode())

    @property
    def step(self) -> int:
        """The last step of the checkpoint that the run resumes from; 0 without one."""
        return 0 if self.checkpoint is None else int(self.checkpoint.name.removeprefix("step-"))

    def advice(self) -> str:
        """The message of a run that ends early: what is safe, and the command that resumes it, in the same directory."""
        if self._saving is not None:
            concurrent.futures.wait([self._saving])
        if self._finished:
            text = f"The run is complete, and {self.folder / 'adapter'} is final."
            return f"{text} Its report may be missing: python -m qlora report {shlex.quote(str(self.folder))}"
        if self.checkpoint is None or not self._is_own(self.checkpoint):
            return "No checkpoint was due yet; the same command starts again."
        safe = f"All up to step {self.step} is safe in {self.checkpoint}."
        if not self._taken_over:
            return f"{safe} The same command resumes."
        program = Path(sys.argv[0])
        start = ["python", "-m", "qlora"] if program.name == "__main__.py" else [program.name]
        if program.name.endswith(".py") and program.name != "__main__.py":
            start = ["python", sys.argv[0]]
        if distributed.ranks().size > 1:
            start = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1"), sys.argv[0]]
        command = shlex.join([*start, "--config", str(self.folder / "config.yaml")])
        return f"{safe} Resume with:\n  {command}"


def _locked(folder: Path) -> FileLock:
    """The lock of a run folder, acquired; the death of the process releases it."""
    lock = _lock_of(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / LOCK).exists() and any(folder.iterdir()):
            raise CheckpointError(
                f"{folder} is not empty, and holds no run of this program.",
                hint="Choose another --output-dir.",
            )
        lock.acquire()
    except Timeout:
        owner = (folder / LOCK).read_text(errors="replace").strip()
        raise CheckpointError(
            f"{folder} is in use by another process ({owner or 'it is just starting'}).",
            hint="Wait for it, or choose another --output-dir.",
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"Run folder {folder} cannot be written: {error.strerror}.",
            hint="Choose another --output-dir.",
        ) from None
    return lock


def _lock_of(folder: Path) -> FileLock:
    # The file marks a run folder, so it must stay. The option also rules out filelock's fallback on a file system without
    # flock: a lock that outlives a killed process.
    return FileLock(folder / LOCK, timeout=LOCK_WAIT_S, preserve_lock_file=True)


def is_going(folder: Path) -> bool:
    """Whether a process is writing to a run folder at this moment."""
    if not (folder / LOCK).exists():  # acquiring the lock would create it
        return False
    try:
        with _lock_of(folder):
            return False
    except Timeout:
        return True
    except OSError:  # of another user, who alone can write there
        return False


def _read(path: Path, kind: type[T]) -> T | None:
    """A JSON file of the run folder; None where there is none."""
    if not path.exists():
        return None
    try:
        return read_json(path, kind)
    except UNREADABLE as error:
        raise CheckpointError(
            f"{path} cannot be read ({reason(error)}).",
            hint="Remove it to resume: the checkpoints hold the same information.",
        ) from None


def _differences(before: RunInfo, now: RunInfo, config: TrainConfig, at_step: int) -> dict[str, list[Any]]:
    """Option -> [old, new] of what differs and was permitted to."""
    old: dict[str, Any] = {**EARLIER, **before.config}
    new: dict[str, Any] = {**now.config}
    unused = FREE | (OF_THE_DATA if before.data == now.data else set())
    if new["packing"]:
        unused -= {"max_length"}  # the budget of a row
    if old["max_steps"] and new["max_steps"]:
        unused |= {"num_train_epochs"}  # which it replaces
    if not new["init_adapter"] or Path(str(old["init_adapter"])).resolve() == Path(new["init_adapter"]).resolve():
        unused |= {"init_adapter"}  # it gave the start, and the checkpoint is beyond that
    pairs = {name: [old[name], new[name]] for name in new if name not in unused}
    pairs |= {name: [getattr(before, name), getattr(now, name)] for name in ("data", "targets", "device")}
    pairs["peft_config"] = [before.peft_config, now.peft_config]  # by content
    pairs["eval_file"] = [before.eval_data, now.eval_data]  # by content, under the name that --override knows
    changed = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    same_product = old[OF_A_STEP[0]] * old[OF_A_STEP[1]] == new[OF_A_STEP[0]] * new[OF_A_STEP[1]]
    fixed = () if same_product else OF_A_STEP
    refused = {name: pair for name, pair in changed.items() if name not in config.override or name in fixed}
    if refused:
        text = f"{config.output_dir} holds another run, at step {at_step}. It differs in\n{_table(refused)}"
        advice = "Pass the old values to resume it, or choose another --output-dir (--init-adapter starts from a LoRA adapter)."
        raise ConfigError(f"{text}\n{advice}")
    return changed


def _table(refused: dict[str, list[Any]]) -> str:
    table = Table(box=None, padding=(0, 3, 0, 0))
    for header in ("option", "there", "here", ""):
        table.add_column(header)
    for name, pair in refused.items():
        permitted = f"--override {name} permits it" if name in get_args(Overridable) else ""
        permitted = "--override permits both if their product stays" if name in OF_A_STEP else permitted
        table.add_row(name, *(Text(_short(value)) for value in pair), permitted)
    console = Console(width=160, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(f"  {line.rstrip()}" for line in captured.get().splitlines())


def _short(value: Any) -> str:
    text = ", ".join(value) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else f"{text[:28]}...{text[-28:]}"


def _exactness(before: Environment, now: Environment, deterministic: bool, on_gpu: bool, overridden: bool) -> str:
    """How close the rest of the run will be to what it would have been."""
    pairs = {name: (version, now.packages.get(name)) for name, version in before.packages.items()}
    pairs |= {name: (getattr(before, name), getattr(now, name)) for name in ("python", "device", "cuda", "commit")}
    changed = [f"{name} {old} -> {new}" for name, (old, new) in pairs.items() if old != new]
    if changed:
        return f"State is restored bit for bit; later losses are only close, since {', '.join(changed)}."
    if on_gpu and not deterministic:
        return "State is restored bit for bit; later losses are only close: without --deterministic a GPU's sums vary."
    if overridden:
        return "State is restored bit for bit; the new values hold from here on."
    return "It resumes bit for bit as if it had not stopped."


def _free_name(path: Path) -> Path:
    candidates = [path, *(path.with_name(f"{path.name}-{number}") for number in range(2, 1000))]
    return next(candidate for candidate in candidates if not candidate.exists())
