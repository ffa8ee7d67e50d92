"""The dtype of matrix products: bf16, or fp16 where a GPU has no bf16, or by request."""

from typing import Any

import torch

from qlora.config import TrainConfig


def has_bf16(device: torch.device) -> bool:
    """Whether a GPU computes in bf16; a CPU does in any case, with or without instructions for it."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def compute_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The dtype of matrix products, and of the base's weights outside quantized layers.

    Args:
        config: precision is read; auto is fp16 on a GPU that has no bf16, else bf16.
        device: where the model is to be.
    """
    if config.precision == "auto":
        return torch.bfloat16 if has_bf16(device) else torch.float16
    return torch.bfloat16 if config.precision == "bf16" else torch.float16


def autocast_dtype(model: Any) -> torch.dtype:
    """The dtype for autocast: fp16 for a base that was loaded in fp16, else bf16.

    Args:
        model: a model of transformers or its decoder, with or without adapters.
    """
    return torch.float16 if getattr(model, "dtype", None) == torch.float16 else torch.bfloat16


# What each --quantization stores, in words.
BASES = {
    "nf4": "NF4 with double quantization",
    "fp4": "FP4 with double quantization",
    "int8": "INT8 (LLM.int8)",
    "none": "16 bits",
}


def described(quantization: str, precision: str) -> tuple[str, str, str | None]:
    """A base and its precision for people.

    Args:
        quantization: a value of --quantization.
        precision: a value of --precision; auto is called bf16.

    Returns:
        The form of the base in words; the name of the dtype of matrix products; and Python code of the quantization config
        that loads the base so again, where torch and BitsAndBytesConfig are imported, or None for a base without one.
    """
    name = "float16" if precision == "fp16" else "bfloat16"
    code = None
    if quantization == "int8":
        code = "BitsAndBytesConfig(load_in_8bit=True)"
    elif quantization != "none":
        code = (
            f'BitsAndBytesConfig(\n    load_in_4bit=True,\n    bnb_4bit_quant_type="{quantization}",\n'
            f"    bnb_4bit_use_double_quant=True,\n    bnb_4bit_compute_dtype=torch.{name},\n)"
        )
    return BASES[quantization], name, code
