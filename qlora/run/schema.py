"""One pydantic model per file of a run folder; those of older versions are read under the keys of this one."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypeVar

import pydantic
from pydantic import BaseModel, Field
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from qlora.config import AttnImplementation, Compile, GradientCheckpointing, LossOn, Precision, PromptFormat, Quantization
from qlora.validation import STRICT, validated

T = TypeVar("T")

Count = Annotated[int, Field(ge=0, lt=2**63)]
Number = Annotated[float, Field(gt=-1e300, lt=1e300)]  # which NaN is not
Names = Annotated[
    list[str], Field(min_length=1), pydantic.BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
]
# Of run.json and state.json; to be raised when earlier runs can no longer be resumed. 2: each micro-batch seeds its dropout.
# Format 1 drew it from generators and saved their states.
FORMAT = 2
RENAMED = {"held_out": "eval_data", "held_out_sha256": "eval_data_sha256"}  # old key -> key


def in_gb(values: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with what older versions stored in GiB (`..._gib`) in GB (`..._gb`); an `object_hook` of `json.loads`."""
    current = {key: value for key, value in values.items() if not key.endswith("_gib")}
    for key in values.keys() - current.keys():
        current.setdefault(key.removesuffix("_gib") + "_gb", _scaled(values[key], 2**30 / 1e9))
    return current


def with_current_keys(values: dict[str, Any]) -> dict[str, Any]:
    """A JSON object of a run folder under the keys of this version; an `object_hook` of `json.loads`."""
    current = in_gb(values)
    for old, new in RENAMED.items():
        if old in current:
            current.setdefault(new, current.pop(old))
    return current


def read_json(path: Path, kind: type[T]) -> T:
    """A JSON file of a run folder as its model, under the keys of this version.

    Raises:
        any of UNREADABLE: if it is missing or damaged.
    """
    return validated(kind, json.loads(path.read_bytes(), object_hook=with_current_keys))


def eval_rows(rows: list[dict[str, Any]], eval_data: str | None) -> list[dict[str, Any]]:
    """Of the rows of metrics.jsonl, the evaluations on the eval data of this digest."""
    return [row for row in rows if row["event"] == "eval" and row.get("eval_data") == eval_data]


def _scaled(value: Any, factor: float) -> Any:
    """A number, or all numbers in an object or array, times a factor; other values as they are."""
    if isinstance(value, dict):
        return {key: _scaled(item, factor) for key, item in value.items()}
    if isinstance(value, list):
        return [_scaled(item, factor) for item in value]
    return value * factor if isinstance(value, int | float) and not isinstance(value, bool) else value


# -- config.yaml, env.json, run.json -----------------------------------------------------------------------------------


class RunConfig(TypedDict, total=False):
    """config.yaml, and `config` of run.json: options of TrainConfig, those that are used after the run with their types."""

    __pydantic_config__ = pydantic.ConfigDict(strict=True, extra="allow")  # type: ignore[misc]  # as pydantic documents it

    model: str
    revision: str | None
    train_file: Names  # older versions stored one as text
    eval_file: Names | None
    prompt_format: PromptFormat
    loss_on: LossOn
    columns: list[str]
    ignore_columns: list[str]
    max_length: Count
    on_long: Literal["drop", "truncate", "error"]
    allow_drop: bool
    init_adapter: str | None
    per_device_train_batch_size: Count
    gradient_accumulation_steps: Count
    attn_implementation: AttnImplementation
    quantization: Quantization
    precision: Precision
    compile: Compile
    gradient_checkpointing: GradientCheckpointing
    optimizer: str
    lora_r: Count
    lora_alpha: int | float
    lora_dropout: Number
    learning_rate: Number
    warmup_ratio: Number
    weight_decay: Number
    max_grad_norm: Number | None
    early_stopping_patience: Count | None
    seed: Count


class Environment(BaseModel):
    """env.json: versions and hardware of a process."""

    model_config = STRICT

    python: str
    device: str
    packages: dict[str, str | None]
    cuda: str | None = None
    commit: str | None = None
    platform: str | None = None
    device_memory_gb: Number | None = None
    command: list[str] | None = None


class DataCounts(TypedDict):
    """What was counted of a data set."""

    read: Count
    examples: Count
    tokens: Count
    input_tokens: Count
    shortest: Count
    median: Count
    longest: Count
    cut: Count
    dropped: Count
    shared: NotRequired[Count | None]


class Resume(BaseModel):
    """A resume of a run: the step it resumed from, and the options that it changed."""

    model_config = STRICT

    step: Count
    overrides: dict[str, Annotated[list[Any], Field(min_length=2, max_length=2)]]  # name -> [old, new]
    environment: Environment | None = None  # of the process before


class RunInfo(BaseModel):
    """run.json, and part of each checkpoint: what a later process is compared with, and what the report shows."""

    model_config = STRICT

    format: Count = 1  # FORMAT of the version that wrote it; versions before 2 did not store it
    config: RunConfig
    data: str  # SHA-256 of the ids and labels of the training data
    eval_data: str | None  # the same of the eval data
    targets: list[str]  # "qkv_proj x 32"
    device: str  # cpu or cuda
    history: list[Resume]
    origin: str | None  # checkpoint that this run branched off from
    environment: Environment | None = None
    parameters: Count | None = None  # of the base model
    date: str | None = None  # ISO 8601, for chat templates that print the date
    counts: Annotated[list[DataCounts | None], Field(min_length=2, max_length=2)] | None = None  # training and eval data
    total_steps: Count | None = None
    predicted_gb: Number | None = None  # peak memory in training
    predicted_terms_gb: dict[str, Number] | None = None  # what it is made of
    weights: str | None = None  # fingerprint of the frozen base
    peft_config: dict[str, Any] | None = None  # what the file of --peft-config holds


# -- the other files ---------------------------------------------------------------------------------------------------


class State(RunInfo):
    """state.json of a checkpoint: the run, and where it is."""

    step: Count
    epoch: Count
    samples: Count
    skipped: Count
    optimizer_class: str
    optimizer: dict[str, Any]
    loss_scaling: dict[str, Number] = {}  # of fp16
    environment: Environment
    weights: str


class Finished(BaseModel):
    """finished.json."""

    model_config = STRICT

    step: Count
    adapter_step: Count | None = None  # whose adapter is in adapter/; older versions did not store it


class Row(TypedDict):
    """A line of metrics.jsonl: a step or an evaluation."""

    event: str
    step: Count
    epoch: Count
    num_tokens: Count
    lines: NotRequired[list[Count] | None]
    loss: NotRequired[Number | None]
    grad_norm: NotRequired[Number | None]
    learning_rate: NotRequired[Number | None]
    tokens_per_s: NotRequired[Number | None]
    peak_memory_gb: NotRequired[Number | None]
    eval_data: NotRequired[str | None]
    eval_loss: NotRequired[Number | None]
    perplexity: NotRequired[Number | None]


class CompletionRow(TypedDict):
    """A line of samples.jsonl."""

    prompt: str
    base: str
    tuned: str
    reference: str


class Estimate(BaseModel):
    """A metric with its interval."""

    model_config = STRICT

    value: Number | None = None
    low: Number | None = None
    high: Number | None = None


class Comparison(BaseModel):
    """A metric of base and adapter, and of their difference."""

    model_config = STRICT

    base: Estimate
    adapter: Estimate
    difference: Estimate


class Evaluation(BaseModel):
    """evaluation.json, as far as the report reads it."""

    model_config = STRICT

    adapter_sha256: str
    eval_data_sha256: str
    num_examples: Count
    metrics: dict[str, Comparison]
