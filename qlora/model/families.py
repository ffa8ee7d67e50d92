"""Model families whose attention this project replaces: compared with transformers, bit for bit."""

from typing import Any

FAMILIES = ("phi3", "llama", "mistral")  # in which the functions of this file were compared with transformers' own, bit by bit


def is_uniform(model: Any) -> bool:
    """Whether all layers attend alike, by nothing but the function that transformers' AttentionInterface has."""
    known = model.config.model_type in FAMILIES and type(model).__module__.startswith("transformers.models.")
    return known and getattr(model.config, "layer_types", None) is None
