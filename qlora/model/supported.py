"""Which models this loop trains, as far as a configuration and file names tell, before anything is loaded."""

from pathlib import Path
from typing import Any

from qlora.errors import ConfigError
from qlora.model.third_party import transformers

KINDS = "This loop trains decoder-only language models with attention, such as Phi-3, Llama, Qwen and Gemma"


def check_model(source: str, config: Any) -> None:
    """Refuse what is no decoder-only language model with attention, or is not stored as this loop reads it.

    Args:
        source: folder or hub id, for messages; of a folder the file names are looked at.
        config: of transformers.

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
    check_quantization(source, getattr(config, "quantization_config", None))


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


def check_quantization(source: str, found: Any) -> None:
    """Refuse a checkpoint that is quantized, but not in NF4 with double quantization.

    Args:
        source: of the model.
        found: what its config.json says of quantization, a dict or an object of transformers; None if nothing.

    Raises:
        ConfigError.
    """
    if found is None:
        return
    values: dict[str, Any] = found if isinstance(found, dict) else found.to_dict()
    advice = "Name the model in bf16, or one that transformers saved in NF4 with double quantization."
    method = getattr(value := values.get("quant_method"), "value", value)
    if method != "bitsandbytes":
        raise ConfigError(f"{source} is quantized already, by {method}. This loop trains on NF4 only.", hint=advice)
    wanted = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    wanted |= {"bnb_4bit_quant_storage": "uint8"}  # other dtypes serve FSDP only; the operators here read bytes
    stored = {"bnb_4bit_quant_storage": "uint8", **values}
    seen = {name: getattr(value := stored.get(name), "value", value) for name in wanted}
    if seen != wanted:
        text = f"{source} is quantized already, with {', '.join(f'{name} {value}' for name, value in seen.items())}."
        raise ConfigError(f"{text} This loop trains on NF4 with double quantization, stored as uint8.", hint=advice)
