"""LoRA adapters: a PEFT model with fp32 adapters on audited layers, from the start or from an adapter."""

import copy
import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from qlora.config import TrainConfig
from qlora.errors import CheckpointError, ConfigError
from qlora.model.adapter_config import read_adapter_config
from qlora.model.coverage import UNCOVERED_LIMIT, quantized_layers, uncovered
from qlora.model.peft_config import config_of, names_of, peft_settings, say_if_untied, targets_of_file, virtual_tokens
from qlora.model.targets import Target, audit_targets, matches
from qlora.model.third_party import peft


def checked_targets(meta_model: Any, config: TrainConfig, say: Callable[[str], None]) -> list[Target]:
    """The audited targets of a model that QLoRA covers; what could only fail after loading fails here.

    Args:
        meta_model: the base model on the meta device.
        config: target_modules and what else audit_targets and PEFT read.
        say: for a line about what is not covered; a warning where that is much and target modules are named.

    Raises:
        ConfigError: as audit_targets; if more than a tenth of the weights is neither in NF4 nor adapted and no target
            modules are named; or if PEFT refuses the targets.
    """
    targets = audit_targets(meta_model, config) if config.peft_config is None else targets_of_file(meta_model, config)
    if any(layer is meta_model.get_output_embeddings() for layer in quantized_layers(meta_model).values()):
        raise ConfigError(
            f"The head of {type(meta_model).__name__} is quantized too (llm_int8_skip_modules in its config.json lacks it). "
            "The loss needs it in bf16.",
            hint="Name the model in bf16.",
        )
    rest, kind = uncovered(meta_model), type(meta_model).__name__
    positions = getattr(meta_model.config.get_text_config(), "max_position_embeddings", None)
    before = virtual_tokens(config)
    if positions is not None and config.max_length + before > positions:
        text = f"--max-length {config.max_length} and {before} virtual tokens are more than the {positions} positions of"
        raise ConfigError(f"{text} {kind}.", hint=f"Pass --max-length {positions - before}.")
    refusal = _peft_refusal(meta_model, config, targets)
    in_layers = config.target_modules is None and all(target.layers for target in targets)
    if rest.share > UNCOVERED_LIMIT and in_layers and config.quantization != "none":
        attention = [target for target in targets if all("attn" in name or "attention" in name for name in target.layers)]
        names = " ".join(target.name for target in (attention if refusal else targets))
        raise ConfigError(
            f"{kind}: {rest}. They would stay in bf16, frozen, and that is not QLoRA.",
            hint=f"To train the other layers anyway, pass --target-modules {names}.",
        )
    if refusal is not None:
        raise ConfigError(
            f"PEFT cannot adapt {', '.join(target.name for target in targets)} of {kind}: {refusal} Name other layers with "
            "--target-modules.",
        )
    say_if_untied(meta_model, config, say)
    if rest.parameters:
        warning = "Warning: " if rest.share > UNCOVERED_LIMIT else ""
        say(f"{warning}{kind}: {rest}. They stay in bf16, frozen.")
    return targets


def _peft_refusal(meta_model: Any, config: TrainConfig, targets: list[Target]) -> str | None:
    """Why PEFT refuses to adapt the targets, tried on a copy without weights; None if it does not."""
    try:
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):  # it warns again when the model is loaded
            add_lora(copy.deepcopy(meta_model), dataclasses.replace(config, init_adapter=None), targets, "")
    except (ValueError, TypeError, NotImplementedError) as error:
        return " ".join(str(error).split())[:300]
    return None


def add_lora(model: Any, config: TrainConfig, targets: list[Target], base: str) -> Any:
    """Hang LoRA adapters on the audited layers: A uniform, B zero, so that the start is the base model exactly.

    Adapters are fp32 masters, computed in bf16 under autocast: in bf16 most late updates round away.

    Args:
        model: the base model; it is changed in place.
        config: rank, alpha, dropout, and init_adapter to start from, as with_init_adapter gives them.
        targets: from audit_targets.
        base: hub id or absolute folder, kept in adapter_config.json, with the commit of a hub id, so that the base is found.

    Raises:
        ConfigError: if init_adapter does not fit the model tensor by tensor, or if an audited layer of a quantized model
            is not.
    """
    audited = [name for target in targets for name in target.layers]
    quantized = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    if quantized and (plain := sorted(set(audited) - quantized_layers(model).keys())):
        raise ConfigError(
            f"{len(plain)} of {len(audited)} layers that are to get an adapter are not quantized after loading, {plain[0]} "
            f"first ({type(model.get_submodule(plain[0])).__name__}).",
        )
    if config.peft_config is not None:
        values = peft_settings(config) or {}
        with warnings.catch_warnings():  # of tied weights; checked_targets has said what becomes of them
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`", category=UserWarning)
            adapted: Any = peft.get_peft_model(model, config_of(values, names_of(values, targets)))
    elif config.init_adapter is None:
        linear = (name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
        others = [name for name in linear if name not in set(audited)]
        elsewhere = any(matches(name, target.name) for name in others for target in targets)
        lora = peft.LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            use_rslora=config.use_rslora,
            # Whole names only where the short ones would match a vision tower too.
            target_modules=[name for t in targets for name in (t.layers if elsewhere else [t.name])],
            task_type="CAUSAL_LM",
        )
        adapted = peft.get_peft_model(model, lora)
    else:
        _check_adapter(config.init_adapter, model, targets, config.lora_r)
        adapted = peft.PeftModel.from_pretrained(model, str(config.init_adapter), is_trainable=True)
    for parameter in adapted.parameters():  # PEFT makes those of LLaMA-Adapter in the dtype of the base
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    keep_whole_in_fp32(adapted)
    kept = adapted.peft_config["default"]
    kept.base_model_name_or_path, kept.revision = base, getattr(model.config, "_commit_hash", None)
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    wanted = sum(target.adapter_parameters for target in targets)
    if trained != wanted:
        raise ValueError(f"it made adapters of {trained:,} parameters, and the audited layers get {wanted:,}.")
    return adapted


def keep_whole_in_fp32(model: Any) -> None:
    """Make fp32 masters of modules that are trained whole and of rows: in bf16 small updates of a norm's weights round to none.

    An embedding still gives the dtype of the base, which the layers behind it expect.

    Args:
        model: with adapters.
    """
    for module in model.modules():
        if isinstance(module, peft.utils.ModulesToSaveWrapper):
            module.modules_to_save.float()
            if isinstance(module.original_module, torch.nn.Embedding):
                dtype = module.original_module.weight.dtype
                module.register_forward_hook(lambda _, inputs, output, dtype=dtype: output.to(dtype))
        elif isinstance(module, peft.utils.other.TrainableTokensWrapper):
            module.token_adapter.trainable_tokens_delta.float()


def with_init_adapter(config: TrainConfig) -> TrainConfig:
    """The configuration with rank, alpha, scaling, dropout and targets of the adapter that it starts from, if it does.

    Raises:
        ConfigError: if it is not a LoRA adapter that this loop can continue to train.
    """
    if config.init_adapter is None:
        return config
    lora = _read_plain_adapter(config.init_adapter)
    return dataclasses.replace(
        config,
        lora_r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        use_rslora=lora.use_rslora,
        target_modules=tuple(sorted(lora.target_modules)),
    )


def _read_plain_adapter(folder: Path) -> Any:
    """The peft.LoraConfig of an adapter that this loop can continue to train."""
    try:
        lora = read_adapter_config(folder)
    except CheckpointError as error:
        raise ConfigError(f"--init-adapter: {error}") from None
    if lora.peft_type != "LORA":
        raise ConfigError(f"--init-adapter {folder} is not a plain LoRA adapter: it is {lora.peft_type.value}.")
    usual = peft.LoraConfig()
    # What may differ from PEFT's own defaults; anything else (DoRA, biases, other starts, ...) is not ours to continue.
    free = {"r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "task_type", "base_model_name_or_path",
            "revision", "inference_mode", "peft_version", "auto_mapping"}  # fmt: skip
    odd = []
    for name, value in vars(lora).items():
        harmless = name in free or (name == "init_lora_weights" and value in (True, False, "gaussian"))
        if not harmless and (value or None) != (getattr(usual, name, value) or None):
            odd.append(name)
    if odd or isinstance(lora.target_modules, str | None):
        seen = f"it sets {', '.join(odd)}" if odd else "its targets are no list"
        raise ConfigError(f"--init-adapter {folder} is not a plain LoRA adapter with a list of target modules: {seen}.")
    return lora


def _check_adapter(folder: Path, model: Any, targets: list[Target], rank: int) -> None:
    """Compare names and shapes by hand: PEFT loads what fits, leaves the rest at its start, and warns."""
    path = folder / "adapter_model.safetensors"
    try:
        with safe_open(path, "pt") as file:
            stored = {(name, *file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  not a dict
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"--init-adapter {folder}: {path.name} cannot be read: {error}.") from None
    layers = {name: model.get_submodule(name) for target in targets for name in target.layers}
    wanted = {(f"base_model.model.{name}.lora_A.weight", rank, layer.in_features) for name, layer in layers.items()}
    wanted |= {(f"base_model.model.{name}.lora_B.weight", layer.out_features, rank) for name, layer in layers.items()}
    if stored != wanted:
        name, *shape = min(stored ^ wanted)
        side = "only in the file" if (name, *shape) in stored else "not in the file"
        raise ConfigError(f"--init-adapter {folder} does not fit the model: {name} of shape {shape} is {side}.")
