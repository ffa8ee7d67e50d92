"""adapter_config.json: which methods of PEFT, and which settings of LoRA, are supported."""

import json
import math
import warnings
from pathlib import Path
from typing import Any, Literal

import pydantic

from qlora.errors import CheckpointError, ConfigError
from qlora.model.prompts import PROMPT_METHODS
from qlora.model.third_party import peft
from qlora.validation import STRICT, UNREADABLE, reason, validated

ADAPTER_CONFIG = "adapter_config.json"
LINEAR_METHODS = ("LORA", "IA3", "VERA", "OFT", "LOHA", "LOKR")  # of PEFT: those that act within linear layers
METHODS = (*LINEAR_METHODS, "ADAPTION_PROMPT", *PROMPT_METHODS)
# Starts that leave the base as it is. The others (PiSSA, OLoRA, ...) change it, and the adapter fits what they left.
HARMLESS_STARTS = (True, False, "gaussian", "eva", "orthogonal")
UNREAD = ("peft_type", "auto_mapping", "inference_mode", "peft_version", "eva_config")  # of no effect here


class PeftSettings(pydantic.BaseModel):
    """adapter_config.json: the settings that all methods of PEFT share."""

    model_config = STRICT

    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None


class AdapterSettings(PeftSettings):
    """adapter_config.json: the settings of peft.LoraConfig that are supported; an adapter that sets others is refused."""

    r: int
    lora_alpha: int | float
    lora_dropout: int | float = 0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, int | float] = {}
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False
    use_dora: bool = False
    use_rslora: bool = False
    fan_in_fan_out: bool | None = False
    ensure_weight_tying: bool = False
    init_lora_weights: bool | str = True


def read_adapter_config(folder: Path) -> Any:
    """The peft.PeftConfig of an adapter: supported methods and, of LoRA, supported settings in their range only.

    Raises:
        CheckpointError: if adapter_config.json is missing or damaged.
        ConfigError: if it is sound and of a kind that is not supported.
    """
    path = folder / ADAPTER_CONFIG
    try:
        values = json.loads(path.read_bytes())
        if not isinstance(values["peft_type"], str):
            raise TypeError(f"peft_type is {values['peft_type']!r}")
        if (kind := values["peft_type"]) not in METHODS:
            raise ConfigError(f"{folder} is an adapter of PEFT's kind {kind}. Supported are {', '.join(METHODS)}.")
        if kind == "LORA":
            check_settings(folder, values)
        elif values.get("task_type") != "CAUSAL_LM" and kind not in LINEAR_METHODS:
            raise ConfigError(f"{folder} was trained for the task {values.get('task_type')}. Only CAUSAL_LM is known here.")
        elif values.get("modules_to_save"):
            raise ConfigError(f"{folder} sets modules_to_save, which is supported with LORA only.")
        with warnings.catch_warnings(action="ignore"):  # of starts, which are over
            return peft.PeftConfig.from_pretrained(str(folder))
    except UNREADABLE as error:
        raise CheckpointError(f"{path} cannot be read ({reason(error)}).", hint="Get the adapter again.") from None


def check_settings(folder: Path, values: dict[str, Any]) -> None:
    """Refuse what is damaged (exit 4), and what is sound and not supported (exit 2)."""
    usual = vars(peft.LoraConfig())
    if unknown := [name for name in values if name not in usual and values[name]]:
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG} sets {', '.join(unknown)}, which the installed PEFT does not know. Is the file "
            f"damaged, or of a newer PEFT ({values.get('peft_version')})? Then upgrade it.",
        )
    settings = validated(AdapterSettings, values)
    Path(settings.base_model_name_or_path or "").is_dir()  # raises OSError on what is too long for a path
    ranks = [settings.r, *settings.rank_pattern.values()]
    scales = [settings.lora_alpha, *settings.alpha_pattern.values()]
    if min(ranks) < 1 or not all(map(math.isfinite, scales)) or not 0 <= settings.lora_dropout < 1:
        raise ValueError(f"ranks {ranks}, alphas {scales}, dropout {settings.lora_dropout}")
    if settings.init_lora_weights not in HARMLESS_STARTS:
        raise ConfigError(
            f"{folder} was begun with init_lora_weights {settings.init_lora_weights!r}, which changes the base.",
            hint="Convert it first, by PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...).",
        )
    if settings.task_type not in (None, "CAUSAL_LM"):
        raise ConfigError(f"{folder} was trained for the task {settings.task_type}. Only CAUSAL_LM is known here.")
    others = [name for name in values if name in usual and name not in (*AdapterSettings.model_fields, *UNREAD)]
    if odd := [name for name in others if values[name] and values[name] != usual[name]]:
        raise ConfigError(
            f"{folder} is LoRA of a kind that is not known here: it sets {', '.join(odd)}.",
            hint="Use PEFT itself for it.",
        )
