"""What differs between model families: what their layers ask of attention, and rotations that depend on the length."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import transformers
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora.model.precision import autocast_dtype

RECORDER = "recorder"  # name of an attention function that only records its arguments
# Arguments that the attention functions of this project read, or that change nothing in training.
READ = {"dropout", "scaling", "sliding_window", "softcap", "position_ids", "use_cache", "cu_seq_lens_q", "max_length_q"}
LENGTH = 8  # tokens of the recorded row


class AttentionUse(NamedTuple):
    """What the layers of a model ask of the attention function that they get from transformers' AttentionInterface."""

    problem: str | None  # why the functions of this project cannot replace it, as a clause; None if they can
    window: bool = True  # whether any layer has a sliding window; some configurations name one that no layer reads
    softcap: bool = False  # whether scores are capped, as in Gemma 2
    lengths: bool = True  # whether the lengths of packed samples reach it


class _Call(NamedTuple):
    """One call of the attention function."""

    causal: bool
    mask: Any
    options: dict[str, Any]  # arguments by name that are not None or False


def attention_use(model: Any) -> AttentionUse:
    """Run the decoder on one row, with an attention function that only records its arguments.

    So a model is judged by what it does, whatever its name: each layer has to call the function once, with the mask and the
    window of its kind, and with nothing that the functions of this project do not read.

    Args:
        model: the base model or the meta model, with or without adapters; nothing of it is changed.
    """
    decoder = model.get_decoder()
    kinds = getattr(decoder.config, "layer_types", None)
    device = model.get_input_embeddings().weight.device
    names = ("full_attention", "sliding_attention")
    masks = {name: torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool, device=device) for name in names}  # [1, 1, T, T] each
    try:
        calls = _recorded_calls(decoder, masks if kinds else masks["full_attention"], device)
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        return AttentionUse(f"its decoder does not run with masks that are given ({' '.join(repr(error).split())[:100]})")
    depth = sum(1 for _ in outermost_layers(decoder))
    if not calls or len(calls) != depth:
        return AttentionUse(f"its {depth} layers call the function of transformers' AttentionInterface {len(calls)} times")
    for call in calls:
        kind = "sliding_attention" if kinds and "sliding_window" in call.options else "full_attention"
        if not call.causal:
            return AttentionUse("its attention is not causal")
        if call.mask is not masks[kind]:
            return AttentionUse("its layers change the mask that they are given")
        if unknown := sorted(call.options.keys() - READ):
            return AttentionUse(f"its attention has {', '.join(unknown)}")
    named = [call.options.keys() for call in calls]
    window, softcap = (any(name in names for names in named) for name in ("sliding_window", "softcap"))
    return AttentionUse(None, window, softcap, all("cu_seq_lens_q" in names for names in named))


@torch.no_grad()
def _recorded_calls(decoder: Any, masks: Any, device: torch.device) -> list[_Call]:
    """The calls of the attention function in one forward pass of a row, in order."""
    calls: list[_Call] = []

    def record(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **_: Any
    ) -> tuple[torch.Tensor, None]:
        given = {name: option for name, option in _.items() if option is not None and option is not False}
        calls.append(_Call(bool(getattr(module, "is_causal", False)), attention_mask, given))
        heads = query.shape[1]
        if query.shape != (1, heads, LENGTH, query.shape[-1]):
            raise ValueError(f"queries of shape {[*query.shape]}")  # OPT, for one, counts its positions in the mask
        return query.new_zeros(1, LENGTH, heads, value.shape[-1]), None  # [B, T, H, d]

    transformers.AttentionInterface.register(RECORDER, record)
    config, training, before = decoder.config, decoder.training, decoder.config._attn_implementation
    ids = torch.zeros(1, LENGTH, dtype=torch.long, device=device)  # [1, T]
    lengths = torch.zeros(2, dtype=torch.int32, device=device)  # [2]; only its presence is checked
    try:
        config._attn_implementation = RECORDER
        decoder.eval()
        with _fixed_rotation(decoder), _autocast(device, autocast_dtype(decoder)):
            decoder(input_ids=ids, attention_mask=masks, use_cache=False, cu_seq_lens_q=lengths, max_length_q=LENGTH)
    finally:
        config._attn_implementation = before
        decoder.train(training)
    return calls


def _autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """As in training, where there is something to compute."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, dtype)


@contextlib.contextmanager
def _fixed_rotation(decoder: Any) -> Iterator[None]:
    """A block in which no rotation reads lengths from the device: the meta device has none."""
    rotations = [(module, module.rope_type) for module in decoder.modules() if hasattr(module, "rope_type")]
    try:
        for module, kind in rotations:
            module.rope_type = dict.fromkeys(kind, "default") if isinstance(kind, dict) else "default"
        yield
    finally:
        for module, kind in rotations:
            module.rope_type = kind


def mixed_rotation(config: Any, lengths: Sequence[int], before: int = 0) -> str | None:
    """What to know where samples of a longrope model lie on both sides of the length from which it rotates differently.

    Args:
        config: of the model.
        lengths: tokens of the samples.
        before: virtual tokens before each.

    Returns:
        A line for the log, or None.
    """
    text = config.get_text_config()
    rotation = getattr(text, "rope_parameters", None) or {}
    if rotation.get("rope_type") != "longrope":
        return None
    limit = rotation.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
    longer = sum(before + length > limit for length in lengths) if limit else 0
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
