"""--peft-config: a configuration of PEFT from a file, its checks, and the layers and tokens that it trains."""

import copy
import dataclasses
import itertools
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qlora.config import TrainConfig
from qlora.errors import CheckpointError, ConfigError
from qlora.model.adapter_config import LINEAR_METHODS, METHODS, UNREAD, check_settings
from qlora.model.coverage import linear_layers
from qlora.model.prompts import PROMPT_METHODS
from qlora.model.targets import Target, audit_targets
from qlora.model.third_party import peft
from qlora.validation import UNREADABLE, reason

ON_16_BITS = ("LOHA", "LOKR")  # methods that PEFT has for layers without quantization only
OF_THE_MODEL = ("token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")  # which PEFT derives
NOT_TRAINED = ("lora_bias", "ensure_weight_tying", "fan_in_fan_out")  # what training cannot do


def peft_settings(config: TrainConfig) -> dict[str, Any] | None:
    """What the file of --peft-config holds, with its peft_type; None without one.

    Raises:
        ConfigError: if it is not a configuration of PEFT that this loop can train.
    """
    path = config.peft_config
    if path is None:
        return None
    try:
        values: dict[str, Any] = json.loads(path.read_bytes())
        values["peft_type"] = kind = values.get("peft_type", "LORA")
        if kind not in METHODS:
            raise ConfigError(f"--peft-config {path} is of PEFT's kind {kind}. Supported are {', '.join(METHODS)}.")
        known = {field.name for field in dataclasses.fields(_config_class(kind))} | {"auto_mapping"}
        if unknown := sorted(values.keys() - known):
            raise ConfigError(f"--peft-config {path} sets {', '.join(unknown)}, which PEFT's {kind} does not have.")
        if kind in ON_16_BITS and config.quantization != "none":
            text = f"--peft-config {path}: PEFT has no {kind} for quantized layers."
            raise ConfigError(text, hint="Pass --quantization none, or another method.")
        if values.get("use_dora") and config.quantization == "int8":
            text = f"--peft-config {path}: bitsandbytes cannot dequantize the weights in 8 bits that DoRA needs."
            raise ConfigError(text, hint="Pass --quantization nf4, or another method.")
        _check_virtual_tokens(path, values)
        if kind == "LORA":
            check_settings(path, {"r": 8, "lora_alpha": 8} | values)
        for name in ("modules_to_save", "trainable_token_indices"):
            if kind != "LORA" and values.get(name):
                raise ConfigError(f"--peft-config {path} sets {name}, which is supported with LORA only.")
        odd = [name for name in NOT_TRAINED if values.get(name)] + ["bias"] * (values.get("bias", "none") != "none")
        if odd:
            text = f"--peft-config {path} sets {', '.join(odd)}, which this loop cannot train."
            raise ConfigError(text, hint="Leave it out.")
    except (*UNREADABLE, CheckpointError) as error:
        raise ConfigError(f"--peft-config {path} cannot be read ({reason(error)}).") from None
    return values


def _check_virtual_tokens(path: Path, values: dict[str, Any]) -> None:
    kind = values["peft_type"]
    counts = ("num_virtual_tokens",) if kind in PROMPT_METHODS else ("adapter_len", "adapter_layers")
    for name in counts if kind not in LINEAR_METHODS else ():
        if type(count := values.get(name)) is not int or count < 1:
            raise ConfigError(f"--peft-config {path} has {name} {count!r}. It must be a number of 1 or more.")
    if derived := [name for name in OF_THE_MODEL if values.get(name) is not None]:
        raise ConfigError(f"--peft-config {path} sets {derived[0]}, which follows from the model.", hint="Leave it out.")
    if (start := values.get("prompt_tuning_init", "RANDOM")) not in ("RANDOM", "TEXT", "SAMPLE_VOCAB"):
        raise ConfigError(f"--peft-config {path} has prompt_tuning_init {start!r}. It must be RANDOM, TEXT or SAMPLE_VOCAB.")


def virtual_tokens(config: TrainConfig) -> int:
    """How many positions --peft-config puts before each row; 0 without, and for LLaMA-Adapter, whose tokens have none.

    Raises:
        ConfigError: as peft_settings.
    """
    values = peft_settings(config) or {"peft_type": "LORA"}
    return int(values["num_virtual_tokens"]) if values["peft_type"] in PROMPT_METHODS else 0


def with_peft_config(config: TrainConfig) -> TrainConfig:
    """The configuration with rank, alpha, scaling, dropout and targets of its --peft-config, if it has one.

    Raises:
        ConfigError: as peft_settings.
    """
    values = peft_settings(config)
    if values is None:
        return config
    names = values.get("target_modules")
    config = dataclasses.replace(config, target_modules=tuple(sorted(names)) if isinstance(names, list) else None)
    if values["peft_type"] in PROMPT_METHODS and config.packing:
        raise ConfigError(
            f"--packing cannot be used with {values['peft_type']}: only the first sample of a row would follow virtual tokens.",
            hint="Leave it out.",
        )
    if values["peft_type"] != "LORA":
        if config.lora_plus_ratio != 1.0:
            raise ConfigError("--lora-plus-ratio is for LoRA.", hint="Leave it out.")
        return dataclasses.replace(config, lora_dropout=0.0)
    lora = config_of(values, names)
    scale = {"lora_alpha": lora.lora_alpha, "lora_dropout": lora.lora_dropout, "use_rslora": lora.use_rslora}
    return dataclasses.replace(config, lora_r=lora.r, **scale)


def runs_as_peft_wrote_it(config: TrainConfig) -> str | None:
    """The name of a method that the fused operator cannot do; None if the adapter is plain LoRA."""
    values = peft_settings(config) or {"peft_type": "LORA"}
    if values["peft_type"] == "LORA":
        whole = [name for name in ("modules_to_save", "trainable_token_indices") if values.get(name)]
        return "DoRA" if values.get("use_dora") else whole[0] if whole else None
    return str(values["peft_type"])


def _config_class(kind: str) -> Any:
    return peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]


def config_of(values: dict[str, Any], target_modules: Any) -> Any:
    """The peft.PeftConfig of a file's values, on these modules."""
    own = {name: value for name, value in values.items() if name not in UNREAD} | {"task_type": "CAUSAL_LM"}
    if values["peft_type"] not in PROMPT_METHODS:
        own["target_modules"] = target_modules
    return _config_class(values["peft_type"])(**own)


def names_of(values: dict[str, Any], every: list[Target]) -> Any:
    """The target_modules of a file; where it names none, those of all targets, or None where PEFT knows them by model."""
    names = values.get("target_modules")
    if names == "all-linear" or (names is None and values["peft_type"] not in ("IA3", "ADAPTION_PROMPT")):
        return [target.name for target in every]
    return names


def targets_of_file(meta_model: Any, config: TrainConfig) -> list[Target]:
    """The layers that PEFT adapts by the file of --peft-config, tried on a copy without weights, by the ends of their names.

    Virtual tokens, before the input or in attention, are one target without linear layers.

    Raises:
        ConfigError: if a listed name matches nothing, if PEFT refuses the file, or if it adapts a layer that is not quantized.
    """
    allowed, kind = linear_layers(meta_model), type(meta_model).__name__
    values, every = peft_settings(config) or {}, audit_targets(meta_model, config)
    try:
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            adapted = peft.get_peft_model(copy.deepcopy(meta_model), config_of(values, names_of(values, every)))
    except (re.error, OSError, ValueError, TypeError, NotImplementedError) as error:
        text = " ".join(str(error).split())[:300]
        raise ConfigError(f"--peft-config {config.peft_config}: PEFT refuses it for {kind}: {text}") from None
    if values["peft_type"] not in LINEAR_METHODS:
        method = adapted.active_peft_config
        count = method.adapter_len if method.is_adaption_prompt else method.num_virtual_tokens
        return [Target(f"{count} virtual tokens", (), (), sum(p.numel() for p in adapted.parameters() if p.requires_grad))]
    _check_token_indices(values, meta_model, f"--peft-config {config.peft_config}")
    return _beside_layers(adapted, values, config, allowed) + _in_layers(adapted, config, allowed)


def _beside_layers(
    adapted: Any, values: dict[str, Any], config: TrainConfig, allowed: dict[str, torch.nn.Linear]
) -> list[Target]:
    """Modules that are trained whole (modules_to_save), or of which single rows are (trainable_token_indices)."""
    whole: dict[str, int] = {}  # end of a name, and how much of the module is trained -> trained parameters
    saved: list[str] = []  # names of modules_to_save
    check_rows_of_head(adapted, f"--peft-config {config.peft_config}")
    for name, module in adapted.get_base_model().named_modules():
        end = name.rsplit(".", 1)[-1]
        if isinstance(module, peft.utils.ModulesToSaveWrapper):
            inside = [layer for layer in allowed if layer == name or layer.startswith(f"{name}.")]
            if inside and config.quantization != "none":
                text = f"--peft-config {config.peft_config}: modules_to_save trains {inside[0]}, which is quantized."
                raise ConfigError(text, hint="Leave it to the adapter, or pass --quantization none.")
            saved.append(name)
            trained = sum(parameter.numel() for parameter in module.modules_to_save.parameters())
            whole[f"{end} (whole)"] = whole.get(f"{end} (whole)", 0) + trained
        elif isinstance(module, peft.utils.other.TrainableTokensWrapper) and module.token_adapter.tied_adapter is None:
            if module not in (adapted.get_input_embeddings(), adapted.get_output_embeddings()):
                text = f"--peft-config {config.peft_config}: trainable_token_indices trains rows of {name}."
                raise ConfigError(text, hint="Only rows of the embedding and the head can be trained.")
            whole[f"{end} (rows)"] = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    if missing := [end for end in values.get("modules_to_save") or () if not any(name.endswith(end) for name in saved)]:
        kind = type(adapted.get_base_model()).__name__
        raise ConfigError(f"--peft-config {config.peft_config}: modules_to_save {missing[0]} matches no module of {kind}.")
    return [Target(name, (), (), trained) for name, trained in sorted(whole.items())]


def _in_layers(adapted: Any, config: TrainConfig, allowed: dict[str, torch.nn.Linear]) -> list[Target]:
    """Linear layers with an adapter, by the ends of their names."""
    found: dict[str, dict[str, int]] = {}  # end of a name -> layer -> trained parameters
    for name, module in adapted.get_base_model().named_modules():
        rows = isinstance(module, peft.tuners.trainable_tokens.TrainableTokensLayer)
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) and not rows:
            if name not in allowed:
                raise ConfigError(f"--peft-config {config.peft_config} adapts {name}, which cannot have an adapter here.")
            parameters: Any = module.parameters()  # type: ignore[attr-defined]  # of the torch.nn.Module that it is too
            trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
            found.setdefault(name.rsplit(".", 1)[-1], {})[name] = trained
    return [
        Target(
            end,
            tuple(layers),
            tuple(sorted({(allowed[name].out_features, allowed[name].in_features) for name in layers})),
            sum(layers.values()),
        )
        for end, layers in sorted(found.items())
    ]


def _check_token_indices(values: dict[str, Any], meta_model: Any, where: str) -> None:
    """Refuse rows that the vocabulary does not have: on the meta device no index is out of range."""
    indices = values.get("trainable_token_indices")
    rows = meta_model.get_input_embeddings().weight.shape[0]
    lists = list(indices.values()) if isinstance(indices, dict) else [] if indices is None else [indices]
    if any(not each or len(set(each)) < len(each) for each in lists):
        raise ConfigError(f"{where} has an empty list in trainable_token_indices, or one that names a row twice.")
    for index in itertools.chain(*lists):
        if type(index) is not int or not 0 <= index < rows:
            raise ConfigError(f"{where} has {index!r} in trainable_token_indices. It must be a row of the embedding's {rows}.")


def check_rows_of_head(adapted: Any, where: str) -> None:
    """Refuse rows of a head that PEFT computes or merges otherwise than they were trained.

    Raises:
        ConfigError: if the head has a bias, which PEFT leaves out, or is one weight with an embedding whose rows are others.
    """
    head = adapted.get_output_embeddings()
    if not isinstance(head, peft.utils.other.TrainableTokensWrapper):
        return
    if getattr(head.original_module, "bias", None) is not None:
        raise ConfigError(f"{where} trains rows of a head with a bias, which PEFT leaves out.", hint="Train it whole.")
    if adapted.config.get_text_config().tie_word_embeddings and head.token_adapter.tied_adapter is None:
        raise ConfigError(
            f"{where} trains rows of a head that is one weight with the embedding.",
            hint="Give trainable_token_indices as a list: the rows are then those of both.",
        )


def say_if_untied(meta_model: Any, config: TrainConfig, say: Callable[[str], None]) -> None:
    """Log that modules_to_save separates a head from its embedding."""
    ends = meta_model.get_input_embeddings(), meta_model.get_output_embeddings()
    whole = (peft_settings(config) or {}).get("modules_to_save") or ()
    named = {name for name, module in meta_model.named_modules() if module in ends}
    if ends[0].weight is ends[1].weight and any(name.endswith(end) for name in named for end in whole):  # as PEFT matches them
        kind = type(meta_model).__name__
        say(f"{kind} ties its head to its embedding. Whichever of the two modules_to_save names becomes a separate weight.")
