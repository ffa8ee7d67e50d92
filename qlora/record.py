"""What a run folder tells, read without changing anything: for the report and the model card."""

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from qlora import run_folder
from qlora.config import ExitCode, UserError, redact


@dataclasses.dataclass(frozen=True)
class Record:
    """A run as its folder tells it; what an older version did not write is an empty dict, an empty list or None."""

    folder: Path
    status: Literal["finished", "going", "stopped"]
    config: dict[str, Any]  # resolved, as in config.yaml
    environment: dict[str, Any]  # env.json
    facts: dict[str, Any]  # run.json
    rows: list[dict[str, Any]]  # metrics.jsonl
    samples: list[dict[str, Any]]  # samples.jsonl, of a run that has ended
    evaluation: dict[str, Any]  # evaluation.json, where python -m qlora evaluate was told to write it there
    trained_parameters: int | None  # of the adapter, or of the newest checkpoint

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The rows of optimizer steps, oldest first."""
        return [row for row in self.rows if row["event"] == "step"]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The rows of evaluations on the held-out data that the run ended with, oldest first; loss is finite in each."""
        rows = [row for row in self.rows if row["event"] == "eval" and row.get("eval_loss") is not None]
        return [row for row in rows if row.get("held_out") == self.facts.get("held_out", row.get("held_out"))]

    @property
    def last_step(self) -> int:
        """Steps taken so far."""
        return max((row["step"] for row in self.steps), default=0)

    @property
    def total_steps(self) -> int | None:
        """Steps that the run was to take."""
        return self.facts.get("total_steps")

    @property
    def counts(self) -> tuple[dict[str, int], dict[str, int]]:
        """What was counted of the training data and of the held-out data; empty where there is none."""
        train, held_out = self.facts.get("counts") or (None, None)
        return train or {}, held_out or {}

    @property
    def times_seen(self) -> Counter[int]:
        """Line of the training data -> how often it was trained on."""
        return Counter(line for row in self.steps for line in row.get("lines", []))

    def curve(self, name: str) -> list[float]:
        """A number of each step; NaN where it was not finite or was not recorded."""
        return [math.nan if row.get(name) is None else row[name] for row in self.steps]

    def peak_memory_gib(self) -> float | None:
        """The highest peak of all steps, in GiB."""
        return max((value for value in self.curve("peak_memory_gib") if value == value), default=None)

    def on_gpu(self) -> bool:
        """Whether the run was on a GPU."""
        return self.environment.get("device_memory_gib") is not None


def read(folder: Path) -> Record:
    """Read a run folder, of a finished run or of any other.

    Args:
        folder: as --output-dir named it.

    Raises:
        UserError: exit 4 if there is no such folder, it holds no run, or one of its files cannot be read.
    """
    if not folder.is_dir():
        raise UserError(ExitCode.CHECKPOINT, f"{folder}: there is no such folder. Give that of a run, as in runs/demo-avro.")
    if not (folder / "config.yaml").is_file():
        text = f"{folder} holds no run: it has no config.yaml, which a run writes before its first step. "
        raise UserError(ExitCode.CHECKPOINT, text + "Give a folder that --output-dir named.")
    return Record(
        folder=folder,
        status=_status(folder),
        config=run_folder.EARLIER | _config(folder / "config.yaml"),
        environment=_json(folder / "env.json"),
        facts=_json(folder / run_folder.RUN),
        rows=whole_rows(folder / run_folder.METRICS),
        samples=whole_rows(folder / "samples.jsonl", keys={"prompt", "base", "tuned", "reference"}),
        evaluation=_json(folder / "evaluation.json"),
        trained_parameters=_trained_parameters(folder),
    )


def whole_rows(path: Path, keys: set[str] | None = None) -> list[dict[str, Any]]:
    """The rows of a JSONL file up to the first that is not whole, as the last is if the process died while writing it.

    Args:
        path: a file; where there is none, there are no rows.
        keys: that a row has at least; None: event and step, those of metrics.jsonl.
    """
    rows = []
    for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict) or not (keys or {"event", "step"}) <= row.keys():
            break
        rows.append(row)
    return rows


def _status(folder: Path) -> Literal["finished", "going", "stopped"]:
    if (folder / run_folder.FINISHED).exists():
        return "finished"
    return "going" if run_folder.is_going(folder) else "stopped"


def _config(path: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise _unreadable(path, error) from None
    if not isinstance(values, dict) or "model" not in values:
        raise _unreadable(path, "it has no `model:` line")
    return values


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    if not isinstance(values, dict):
        raise _unreadable(path, "it is not a JSON object")
    return values


def _unreadable(path: Path, why: object) -> UserError:
    text = f"{path} cannot be read as what a run writes: {' '.join(str(why).split())}. "
    return UserError(ExitCode.CHECKPOINT, redact(text) + "The report is made of it; restore the file, or run again.")


def _trained_parameters(folder: Path) -> int | None:
    """Elements of all tensors of the adapter; None where there is none yet, or none that is sound."""
    import safetensors

    for place in (folder / "adapter", *sorted((folder / "checkpoints").glob("step-*"), reverse=True)):
        try:
            with safetensors.safe_open(place / "adapter_model.safetensors", framework="np") as file:
                return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        except (OSError, safetensors.SafetensorError):
            continue
    return None
