"""The dtype of matrix products: bf16, or fp16 where a GPU has no bf16, or by request."""

from typing import Any

import torch

from qlora.config import TrainConfig


def compute_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The dtype of matrix products, and of the base's weights outside quantized layers.

    Args:
        config: precision is read; auto is fp16 on a GPU that has no bf16, else bf16.
        device: where the model is to be.
    """
    if config.precision == "auto":
        has_bf16 = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if has_bf16 else torch.float16
    return torch.bfloat16 if config.precision == "bf16" else torch.float16


def autocast_dtype(model: Any) -> torch.dtype:
    """The dtype for autocast: fp16 for a base that was loaded in fp16, else bf16.

    Args:
        model: a model of transformers or its decoder, with or without adapters.
    """
    return torch.float16 if getattr(model, "dtype", None) == torch.float16 else torch.bfloat16
