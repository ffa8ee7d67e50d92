"""What is particular to model families: whose attention this project replaces, and rotations that depend on the length."""

from collections.abc import Iterator, Sequence
from typing import Any

from transformers.modeling_layers import GradientCheckpointingLayer

FAMILIES = ("phi3", "llama", "mistral")  # in which the functions of this file were compared with transformers' own, bit by bit


def is_uniform(model: Any) -> bool:
    """Whether all layers attend alike, by nothing but the function that transformers' AttentionInterface has."""
    known = model.config.model_type in FAMILIES and type(model).__module__.startswith("transformers.models.")
    return known and getattr(model.config, "layer_types", None) is None


def mixed_rotation(config: Any, lengths: Sequence[int]) -> str | None:
    """What to know where samples of a longrope model lie on both sides of the length from which it rotates differently.

    Args:
        config: of the model.
        lengths: tokens of the samples.

    Returns:
        A line for the log, or None.
    """
    text = config.get_text_config()
    rotation = getattr(text, "rope_parameters", None) or {}
    if rotation.get("rope_type") != "longrope":
        return None
    limit = rotation.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
    longer = sum(length > limit for length in lengths) if limit else 0
    if not 0 < longer < len(lengths):
        return None
    return (
        f"Warning: {longer:,} of {len(lengths):,} samples are longer than {limit:,} tokens, where longrope changes its "
        "rotation. A shorter sample that shares a micro-batch or a packed row with one of them is rotated likewise, which "
        "changes its loss slightly. --per-device-train-batch-size 1 without --packing avoids that."
    )


def outermost_layers(module: Any) -> Iterator[tuple[Any, str, Any]]:
    """(holder, name there, layer) of each decoder layer that is not inside another one.

    One inside another, as in Zamba 2, is recomputed with it. In the backward pass no training layer replaces it.
    """
    for name, child in module._modules.items():
        if isinstance(child, GradientCheckpointingLayer):
            yield module, name, child
        elif child is not None:
            yield from outermost_layers(child)
