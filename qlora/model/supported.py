"""Which models this loop trains, as far as a configuration and file names tell, before anything is loaded."""

from pathlib import Path
from typing import Any

from qlora.config import Quantization
from qlora.errors import ConfigError
from qlora.model.third_party import transformers

KINDS = "This loop trains decoder-only language models with attention, such as Phi-3, Llama, Qwen and Gemma"


def check_model(source: str, config: Any, quantization: Quantization = "nf4") -> None:
    """Refuse what is no decoder-only language model with attention, or is not stored as this loop reads it.

    Args:
        source: folder or hub id, for messages; of a folder the file names are looked at.
        config: of transformers.
        quantization: in which it is to be loaded.

    Raises:
        ConfigError: what it is, and what is supported.
    """
    names = getattr(config, "architectures", None) or []
    kind = names[0] if names else config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(f"{source} is an encoder-decoder model ({kind}). {KINDS}.")
    known = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    others = [name for name in names if name not in known.values() and not name.endswith("Model")]
    if others and not hasattr(config, "auto_map"):
        what = "an encoder" if config.model_type in known else "no causal language model"
        raise ConfigError(f"{source} is {what} ({kind}). {KINDS}.")
    text = config.get_text_config()
    if not any(hasattr(text, name) for name in ("num_attention_heads", "n_head", "n_heads", "num_heads")):
        raise ConfigError(f"{source} is a model without attention ({kind}). {KINDS}.")
    check_files(source)
    check_quantization(source, quantization_values(config), quantization)


def check_files(source: str) -> None:
    """Refuse a folder whose weights are in PyTorch's older format only: reading it may run code that is hidden there."""
    folder = Path(source)
    old = sorted(path.name for path in folder.glob("pytorch_model*.bin")) if folder.is_dir() else []
    if old and not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"{source} holds its weights in {old[0]}, a format that may run code when it is read. This loop reads safetensors "
            "only.",
            hint=(
                "If you trust the file, convert it: AutoModelForCausalLM.from_pretrained(FOLDER, use_safetensors=False)"
                ".save_pretrained(OTHER), and the tokenizer likewise."
            ),
        )


def quantization_values(config: Any) -> dict[str, Any] | None:
    """What the configuration of a model says of the quantization that it is stored in; None if nothing."""
    found = getattr(config, "quantization_config", None)
    values: dict[str, Any] | None = found if found is None or isinstance(found, dict) else found.to_dict()
    return values


def stored_4bit_kind(values: dict[str, Any]) -> str | None:
    """nf4 or fp4, which is bitsandbytes' default; None if the values are of another quantization."""
    return str(values.get("bnb_4bit_quant_type", "fp4")) if values.get("load_in_4bit") else None


def check_quantization(source: str, values: dict[str, Any] | None, quantization: Quantization) -> None:
    """Refuse a checkpoint that is quantized, but not in the 4 bits that are asked for.

    Args:
        source: of the model.
        values: from quantization_values.
        quantization: in which it is to be loaded.

    Raises:
        ConfigError.
    """
    if values is None:
        return
    method, kind = getattr(value := values.get("quant_method"), "value", value), stored_4bit_kind(values)
    if method != "bitsandbytes" or kind is None:
        raise ConfigError(
            f"{source} is quantized already, by {method}{' in 8 bits' if values.get('load_in_8bit') else ''}. This loop reads "
            "models in bf16, and in 4 bits of bitsandbytes.",
            hint="Name the model in bf16, or one that transformers saved in 4 bits.",
        )
    if kind != quantization:
        raise ConfigError(
            f"{source} is quantized already, in {kind}. It was to be loaded with quantization {quantization}.",
            hint=f"Name the model in bf16; or train on it as it is, with --quantization {kind}.",
        )
    storage = getattr(value := values.get("bnb_4bit_quant_storage", "uint8"), "value", value)
    if storage != "uint8":  # other dtypes serve FSDP only; the operators here read bytes
        raise ConfigError(
            f"{source} is quantized already, and stored as {storage}. This loop reads uint8.",
            hint="Name the model in bf16, or one that transformers saved in 4 bits with uint8 storage.",
        )
