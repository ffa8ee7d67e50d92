"""Which attention runs, why, and what Phi-3's sliding window has to do with it."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from transformers.utils import is_flash_attn_2_available

from qlora.config import AttnImplementation, ExitCode, UserError


class Attention(NamedTuple):
    """The name transformers knows a backend by, and the reason for it, in words for the log."""

    implementation: AttnImplementation
    reason: str


def choose_attention(requested: AttnImplementation, device: torch.device, model_class: Any = None) -> Attention:
    """Resolve `--attn-implementation`: `auto` picks what can run, a name runs or fails, and nothing is downloaded.

    Args:
        requested: auto, flash_attention_2, sdpa or eager.
        device: where the model will be.
        model_class: of transformers; not every one has every backend (Gemma 2 has no sdpa, for its soft-capping). None, before
            it is known, to check the rest.

    Raises:
        UserError: exit 7 if a backend was asked for by name and cannot run here.
    """
    obstacles = {"flash_attention_2": _flash_obstacle(device, model_class), "sdpa": None, "eager": None}
    if not getattr(model_class, "_supports_sdpa", True):
        obstacles["sdpa"] = f"{model_class.__name__} does not support it"
    if requested != "auto":
        if obstacles[requested]:
            text = f"--attn-implementation {requested} cannot run here: {obstacles[requested]}. Use auto to take what can."
            raise UserError(ExitCode.ENVIRONMENT, text)
        return Attention(requested, "as asked")
    refused = "; ".join(f"{name} cannot run: {obstacle}" for name, obstacle in obstacles.items() if obstacle)
    if not obstacles["flash_attention_2"]:
        return Attention("flash_attention_2", "flash-attn is installed and the GPU can run it")
    return Attention("eager" if obstacles["sdpa"] else "sdpa", refused)


def _flash_obstacle(device: torch.device, model_class: Any) -> str | None:
    # Asked of the package itself: transformers would fetch a replacement from the hub where `kernels` is installed.
    if device.type != "cuda":
        return "it needs a CUDA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it needs compute capability 8.0 or newer, this GPU has {capability[0]}.{capability[1]}"
    if not is_flash_attn_2_available():
        return "package flash-attn is not installed (pip install flash-attn --no-build-isolation)"
    try:
        import flash_attn  # noqa: F401
    except ImportError as error:
        return f"package flash-attn does not fit this torch ({error})"
    return None if getattr(model_class, "_supports_flash_attn", True) else f"{model_class.__name__} does not support it"


def training_window(config: Any, max_length: int) -> int | None:
    """The sliding window to train with: None where it changes nothing and costs the fast kernel.

    A position sees w positions, itself included. In a row of w + 1 tokens only the last position loses a key, and nothing
    is predicted from it: loss and gradients are the same without the window. With it, transformers gives sdpa a dense mask
    from w positions on, and the flash kernel is gone. Only models that read the window from their configuration at each
    forward, the same for all layers (Phi-3, Mistral), can be told so; the others keep theirs.
    """
    window = getattr(config, "sliding_window", None)
    per_layer = getattr(config, "layer_types", None) is not None
    return None if window is not None and not per_layer and max_length <= window + 1 else window


@contextlib.contextmanager
def sliding_window(model: Any, window: int | None) -> Iterator[None]:
    """Run a block with the model's `config.sliding_window` set to `window`, and put back what was there."""
    config = model.config
    before = getattr(config, "sliding_window", None)
    if before == window:
        yield
        return
    config.sliding_window = window
    try:
        yield
    finally:
        config.sliding_window = before
