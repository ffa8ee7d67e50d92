"""What a run folder tells, read without changing anything: for the report and the model card."""

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import Any, Literal, TypeVar

from qlora.errors import CheckpointError, UserError
from qlora.model.adapter_config import ADAPTER_CONFIG, PeftSettings
from qlora.model.precision import described
from qlora.run import checkpoint
from qlora.run.files import size_and_sha256, whole_rows
from qlora.run.folder import EARLIER, FINISHED, METRICS, RUN, SAMPLES, is_going
from qlora.run.schema import CompletionRow, Environment, Evaluation, Finished, Row, RunConfig, RunInfo, eval_rows, read_json
from qlora.terminal import redact
from qlora.validation import validated

T = TypeVar("T")

EVALUATION = "evaluation.json"


# -- a run -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Record:
    """A run as its folder tells it; what an older version did not write is an empty dict, an empty list or None."""

    folder: Path
    status: Literal["finished", "going", "stopped"]
    config: dict[str, Any]  # resolved, as in config.yaml
    environment: Environment | None  # env.json
    run_info: RunInfo | None  # run.json
    settings: PeftSettings | None  # adapter_config.json of its adapter, once it has ended
    rows: list[dict[str, Any]]  # metrics.jsonl
    samples: list[dict[str, Any]]  # samples.jsonl, of a run that has ended
    evaluation: Evaluation | None  # evaluation.json by python -m qlora evaluate, where it is of the adapter the run ended with
    evaluation_of_another: bool  # whether there is one that is not
    trained_parameters: int | None  # of the adapter, or of the newest checkpoint
    adapter_step: int | None = None  # whose adapter is in adapter/, once the run has ended; early stopping takes the best

    @property
    def peft_config(self) -> dict[str, Any]:
        """What the file of --peft-config held; nothing without one."""
        return (self.run_info and self.run_info.peft_config) or {}

    @property
    def base_form(self) -> tuple[str, str, str | None]:
        """The base in words, the name of its dtype, and code that quantizes it again; see precision.described."""
        return described(self.config["quantization"], self.config["precision"])

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The rows of optimizer steps, oldest first."""
        return [row for row in self.rows if row["event"] == "step"]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The rows of evaluations on the eval data of the end of the run, oldest first; loss is finite in each."""
        rows = [row for row in self.rows if row["event"] == "eval"]
        rows = eval_rows(rows, self.run_info.eval_data) if self.run_info else rows
        return [row for row in rows if None not in (row.get("eval_loss"), row.get("perplexity"))]

    @property
    def of_the_adapter(self) -> dict[str, Any] | None:
        """The evaluation of the adapter that the run handed over, or the last one; None if there is none."""
        own = [row for row in self.evaluations if row["step"] == self.adapter_step]
        return next(iter([*own, *self.evaluations[-1:]]), None)

    @property
    def last_step(self) -> int:
        """Steps taken so far."""
        return max((row["step"] for row in self.steps), default=0)

    @property
    def total_steps(self) -> int | None:
        """Steps that the run was to take."""
        return self.run_info.total_steps if self.run_info else None

    @property
    def counts(self) -> tuple[dict[str, int], dict[str, int]]:
        """What was counted of the training data and of the eval data; empty where there is none."""
        train, eval_counts = (self.run_info and self.run_info.counts) or (None, None)
        return dict(train or {}), dict(eval_counts or {})  # type: ignore[arg-type]  # `shared` is left out where it is None

    @property
    def eval_data(self) -> str | None:
        """SHA-256 of the eval data; None without any."""
        return self.run_info.eval_data if self.run_info else None

    @property
    def predicted_gb(self) -> float | None:
        """Peak memory in training, as predicted for a GPU."""
        return self.run_info.predicted_gb if self.run_info else None

    @property
    def times_seen(self) -> Counter[int]:
        """Line of the training data -> how often it was trained on."""
        return Counter(line for row in self.steps for line in row.get("lines") or [])

    def curve(self, name: str) -> list[float]:
        """A number of each step; NaN where it was not finite or was not recorded."""
        return [math.nan if row.get(name) is None else row[name] for row in self.steps]

    def peak_memory_gb(self) -> float | None:
        """The highest peak of all steps, in GB."""
        return max((value for value in self.curve("peak_memory_gb") if value == value), default=None)

    def on_gpu(self) -> bool:
        """Whether the run was on a GPU."""
        return self.environment is not None and self.environment.device_memory_gb is not None


def read(folder: Path) -> Record:
    """Read a run folder, of a finished run or of any other.

    Args:
        folder: as --output-dir named it.

    Raises:
        CheckpointError: if there is no such folder, it holds no run, or one of its files cannot be read.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder.", hint="Give that of a run, as in runs/demo-avro.")
    if not (folder / "config.yaml").is_file():
        raise CheckpointError(
            f"{folder} holds no run: it has no config.yaml, which a run writes before its first step.",
            hint="Give a folder that --output-dir named.",
        )
    status, evaluation = _status(folder), _json(folder / EVALUATION, Evaluation)
    finished = _json(folder / FINISHED, Finished)
    is_own = evaluation is not None and status == "finished" and evaluation.adapter_sha256 == sha256_of(folder / "adapter")
    return Record(
        folder=folder,
        status=status,
        config=_config(folder / "config.yaml"),
        environment=_json(folder / "env.json", Environment),
        run_info=_json(folder / RUN, RunInfo),
        settings=_json(folder / "adapter" / ADAPTER_CONFIG, PeftSettings),
        rows=_rows(folder / METRICS, Row),
        samples=_rows(folder / SAMPLES, CompletionRow),
        evaluation=evaluation if is_own else None,
        evaluation_of_another=evaluation is not None and not is_own,
        trained_parameters=_trained_parameters(folder),
        adapter_step=finished.adapter_step if finished else None,
    )


def sha256_of(adapter: Path) -> str | None:
    """SHA-256 of the weights in an adapter's folder; None where there are none."""
    path = adapter / checkpoint.ADAPTER
    return size_and_sha256(path)["sha256"] if path.is_file() else None


def _rows(path: Path, schema: Any) -> list[dict[str, Any]]:
    """All rows of a JSONL file; only its last line may be torn, by the death of a process, or as it is just being written."""
    try:
        written = path.read_bytes().count(b"\n") if path.exists() else 0  # first, as a run that is going adds to it
        rows = whole_rows(path, keys=set())
    except OSError as error:
        raise _unreadable(path, error) from None
    if len(rows) < written:
        raise _unreadable(path, f"its line {len(rows) + 1} is not whole")
    for line, row in enumerate(rows, start=1):
        _checked(path, schema, row, f"in line {line} ")
    return rows


def _status(folder: Path) -> Literal["finished", "going", "stopped"]:
    if (folder / FINISHED).exists():
        return "finished"
    return "going" if is_going(folder) else "stopped"


def _config(path: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise _unreadable(path, error) from None
    if not isinstance(values, dict) or "model" not in values:
        raise _unreadable(path, "it has no `model:` line")
    return dict(_checked(path, RunConfig, EARLIER | values))


def _json(path: Path, kind: type[T]) -> T | None:
    """A JSON file of the run folder; None where there is none."""
    if not path.exists():
        return None
    try:
        return read_json(path, kind)
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from None


def _checked(path: Path, kind: type[T], values: object, where: str = "") -> T:
    try:
        return validated(kind, values)
    except ValueError as error:
        raise _unreadable(path, f"{where}{error}") from None


def _unreadable(path: Path, why: object) -> UserError:
    advice = "The report is made of it; restore the file, or run again."
    if path.name == EVALUATION:
        advice = f"Remove it, or write it again: python -m qlora evaluate {path.parent} --json {path}"
    by = "python -m qlora evaluate" if path.name == EVALUATION else "a run"
    text = f"{path} cannot be read as what {by} writes: {' '.join(str(why).split())}."
    return CheckpointError(redact(text), hint=advice)


def _trained_parameters(folder: Path) -> int | None:
    """Elements of all tensors of the adapter; None where there is none yet, or none that is sound."""
    import safetensors

    for place in (folder / "adapter", *sorted((folder / "checkpoints").glob("step-*"), reverse=True)):
        try:
            with safetensors.safe_open(place / checkpoint.ADAPTER, framework="np") as file:
                return sum(int(math.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118
        except (OSError, safetensors.SafetensorError):
            continue
    return None
