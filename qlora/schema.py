"""Schemas of the files in a run folder, as far as they are read; the rest of them is free."""

from typing import Any


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # which NaN is not


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _null(value: Any) -> bool:
    return value is None


def _anything(value: Any) -> bool:
    return True


Schema = Any  # a test of a value; (either, or); [of each]; [first, second]; {name: of its value}; {ANY: of each value}
ANY = "any name"
MAYBE_COUNT, MAYBE_NUMBER, MAYBE_TEXT = (_count, _null), (_number, _null), (_text, _null)  # null or not there at all
OF_DATA = dict.fromkeys(
    ("read", "examples", "tokens", "input_tokens", "shortest", "median", "longest", "cut", "dropped"), _count
) | {"shared": MAYBE_COUNT}
FACTS = {
    "data": MAYBE_TEXT,
    "held_out": MAYBE_TEXT,
    "targets": [_text],
    "parameters": MAYBE_COUNT,
    "predicted_gib": MAYBE_NUMBER,
    "predicted_terms_gib": (_null, {ANY: _number}),
    "total_steps": MAYBE_COUNT,
    "counts": (_null, [OF_DATA, (OF_DATA, _null)]),
    "history": [{"step": _count, "overrides": {ANY: [_anything, _anything]}}],
}
ENVIRONMENT = {
    "python": _text,
    "device": _text,
    "device_memory_gib": MAYBE_NUMBER,
    "packages": {ANY: MAYBE_TEXT},
    "command": (_null, [_text]),
    **dict.fromkeys(("cuda", "platform", "commit"), MAYBE_TEXT),
}
ROW = {
    "event": _text,
    **dict.fromkeys(("step", "epoch", "num_tokens"), _count),
    "lines": (_null, [_count]),
    **dict.fromkeys(("loss", "grad_norm", "learning_rate", "tokens_per_s", "peak_memory_gib"), MAYBE_NUMBER),
    "held_out": MAYBE_TEXT,
    **dict.fromkeys(("eval_loss", "perplexity"), MAYBE_NUMBER),
}
SAMPLE = dict.fromkeys(("prompt", "base", "tuned", "reference"), _text)
ESTIMATE = dict.fromkeys(("value", "low", "high"), MAYBE_NUMBER)
COMPARED = {
    "adapter_sha256": _text,
    "held_out_sha256": _text,
    "num_examples": _count,
    "metrics": {ANY: dict.fromkeys(("base", "adapter", "difference"), ESTIMATE)},
}
CONFIG = {
    **dict.fromkeys(("model", "train_file", "prompt_format", "loss_on", "optimizer"), _text),
    **dict.fromkeys(("eval_file", "revision", "init_adapter"), MAYBE_TEXT),
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps", "lora_r", "max_length"), _count),
    **dict.fromkeys(("learning_rate", "lora_alpha", "lora_dropout", "warmup_ratio", "weight_decay", "seed"), _number),
    "max_grad_norm": MAYBE_NUMBER,
    "early_stopping_patience": MAYBE_COUNT,
}


def fits(value: Any, schema: Schema) -> bool:
    """Whether a value, as JSON or YAML has it, fits; what is missing from an object counts as null."""
    if isinstance(schema, tuple):
        return any(fits(value, each) for each in schema)
    if isinstance(schema, list):
        if not isinstance(value, list):
            return False
        wanted = schema if len(schema) > 1 else schema * len(value)
        return len(value) == len(wanted) and all(map(fits, value, wanted))
    if isinstance(schema, dict):
        return isinstance(value, dict) and misfit(value, schema) is None
    return bool(schema(value))


def misfit(values: dict[str, Any], fields: dict[str, Schema]) -> str | None:
    """The first name whose value does not fit; None where all do."""
    if ANY in fields:
        return next((name for name, value in values.items() if not fits(value, fields[ANY])), None)
    return next((name for name, schema in fields.items() if not fits(values.get(name), schema)), None)
