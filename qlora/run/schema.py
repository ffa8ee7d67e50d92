"""Types of the JSON and YAML files in a run folder; keys that no type names are ignored."""

import dataclasses
import functools
from typing import Annotated, Any, NotRequired

import pydantic
from pydantic import Field
from typing_extensions import TypedDict  # pydantic takes that of typing from Python 3.12 on alone

from qlora.config import AttnImplementation, Compile, GradientCheckpointing

# What an unreadable file raises when it is read: not there, no text, no JSON, of wrong types, out of range, nested without end.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError)


class Environment(TypedDict):
    """Of env.json, what a resumed run is compared with."""

    packages: dict[str, str | None]
    python: str
    device: str
    cuda: str | None
    commit: str | None


class State(TypedDict):
    """What state.json tells that going on from a checkpoint needs."""

    step: int
    epoch: int
    samples: int
    skipped: int
    optimizer_class: str
    optimizer: dict[str, Any]
    environment: Environment
    weights: str


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


def _scaled(value: Any, factor: float) -> Any:
    """A number, or all numbers in an object or array, times a factor; other values as they are."""
    if isinstance(value, dict):
        return {key: _scaled(item, factor) for key, item in value.items()}
    if isinstance(value, list):
        return [_scaled(item, factor) for item in value]
    return value * factor if isinstance(value, int | float) and not isinstance(value, bool) else value


checker = functools.cache(pydantic.TypeAdapter)


def check_types(schema: Any, values: object) -> None:
    """Refuse values, as JSON has them, of other types than a TypedDict names, or that lack one; the rest may be anything.

    Raises:
        ValueError: naming the first that is wrong, and its value.
    """
    try:
        checker(schema).validate_python(values, strict=True)
    except pydantic.ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in wrong["loc"]) or "the whole"
        value = "" if wrong["type"] == "missing" else f" ({place}: {repr(wrong['input'])[:60]})"
        raise ValueError(f"{place}: {wrong['msg']}{value}") from None


def reason(error: BaseException) -> str:
    """An error in some words, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


class Options(TypedDict, total=False):
    """Those of a run's options that are computed with, or taken over."""

    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    attn_implementation: AttnImplementation
    compile: Compile
    gradient_checkpointing: GradientCheckpointing


class ResumeInfo(TypedDict):
    """What run.json tells that going on needs."""

    config: Options
    data: str
    eval_data: str | None
    targets: list[str]
    device: str
    history: list[dict[str, Any]]
    origin: str | None
    date: NotRequired[str]


# -- the types of what is read; the rest of a file is free --------------------------------------------------------------

Count = Annotated[int, Field(ge=0, lt=2**63)]
Number = Annotated[float, Field(gt=-1e300, lt=1e300)]  # which NaN is not


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """What run.json and each checkpoint keep of a run: what a later process is compared with, and what the report shows."""

    config: dict[str, Any]  # as in config.yaml
    data: str  # SHA-256 of the ids and labels of the training data
    eval_data: str | None  # the same of the eval data
    targets: list[str]  # "qkv_proj x 32"
    device: str  # cpu or cuda
    environment: dict[str, Any]  # versions, commit, hardware
    parameters: int  # of the base model
    date: str  # ISO 8601, for chat templates that print the date
    counts: list[dict[str, int] | None]  # of the training data and the eval data
    total_steps: int
    predicted_gb: float  # peak memory in training
    predicted_terms_gb: dict[str, float]  # what it is made of
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # of resumes: step, overrides, environment
    origin: str | None = None  # checkpoint that this run branched off from
    weights: str | None = None  # fingerprint of the frozen base


class OfData(TypedDict):
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


class Change(TypedDict):
    """Options that a resumed run changed: name -> [old, new]."""

    step: Count
    overrides: dict[str, Annotated[list[Any], Field(min_length=2, max_length=2)]]


class RecordedRun(TypedDict):
    """run.json."""

    data: NotRequired[str | None]
    eval_data: NotRequired[str | None]
    targets: list[str]
    parameters: NotRequired[Count | None]
    predicted_gb: NotRequired[Number | None]
    predicted_terms_gb: NotRequired[dict[str, Number] | None]
    total_steps: NotRequired[Count | None]
    counts: NotRequired[Annotated[list[OfData | None], Field(min_length=2, max_length=2)] | None]
    history: list[Change]


class RecordedEnvironment(TypedDict):
    """env.json."""

    python: str
    device: str
    device_memory_gb: NotRequired[Number | None]
    packages: dict[str, str | None]
    command: NotRequired[list[str] | None]
    cuda: NotRequired[str | None]
    platform: NotRequired[str | None]
    commit: NotRequired[str | None]


class Row(TypedDict):
    """A line of metrics.jsonl."""

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


class Finished(TypedDict):
    """finished.json."""

    adapter_step: NotRequired[int]


class CompletionRow(TypedDict):
    """A line of samples.jsonl."""

    prompt: str
    base: str
    tuned: str
    reference: str


class Estimate(TypedDict):
    """scores.Estimate."""

    value: NotRequired[Number | None]
    low: NotRequired[Number | None]
    high: NotRequired[Number | None]


class Comparison(TypedDict):
    """scores.Comparison."""

    base: Estimate
    adapter: Estimate
    difference: Estimate


class Evaluation(TypedDict):
    """evaluation.json."""

    adapter_sha256: str
    eval_data_sha256: str
    num_examples: Count
    metrics: dict[str, Comparison]


class Config(TypedDict):
    """config.yaml."""

    model: str
    train_file: str
    prompt_format: str
    loss_on: str
    optimizer: str
    eval_file: NotRequired[str | None]
    revision: NotRequired[str | None]
    init_adapter: NotRequired[str | None]
    per_device_train_batch_size: Count
    gradient_accumulation_steps: Count
    lora_r: Count
    max_length: Count
    learning_rate: Number
    lora_alpha: Number
    lora_dropout: Number
    warmup_ratio: Number
    weight_decay: Number
    seed: Number
    max_grad_norm: NotRequired[Number | None]
    early_stopping_patience: NotRequired[Count | None]


class Settings(TypedDict):
    """adapter/adapter_config.json."""

    base_model_name_or_path: NotRequired[str | None]
    revision: NotRequired[str | None]
