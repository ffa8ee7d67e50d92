"""LoRA adapters: the audit of target modules, and a PEFT model with fp32 adapters."""

import copy
import dataclasses
import itertools
import json
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pydantic
import torch
from safetensors import SafetensorError, safe_open

from qlora.config import TrainConfig
from qlora.errors import CheckpointError, ConfigError
from qlora.model.coverage import ROUTER, UNCOVERED_LIMIT, linear_classes, linear_layers, quantized_layers, uncovered
from qlora.model.prompts import PROMPT_METHODS
from qlora.model.third_party import peft
from qlora.validation import STRICT, UNREADABLE, reason, validated

ADAPTER_CONFIG = "adapter_config.json"
LINEAR_METHODS = ("LORA", "IA3", "VERA", "OFT", "LOHA", "LOKR")  # of PEFT: those that act within linear layers
METHODS = (*LINEAR_METHODS, "ADAPTION_PROMPT", *PROMPT_METHODS)
ON_16_BITS = ("LOHA", "LOKR")  # those that PEFT has for layers without quantization only
# Starts that leave the base as it is. The others (PiSSA, OLoRA, ...) change it, and the adapter fits what they left.
HARMLESS_STARTS = (True, False, "gaussian", "eva", "orthogonal")
UNREAD = ("peft_type", "auto_mapping", "inference_mode", "peft_version", "eva_config")  # of no effect here

# -- adapters --------------------------------------------------------------------------------------------------------


class Target(NamedTuple):
    """The linear layers that one name of `target_modules` matches, and that no earlier name did."""

    name: str
    layers: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]  # distinct (out, in)
    adapter_parameters: int


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
    targets = audit_targets(meta_model, config) if config.peft_config is None else _targets_of_file(meta_model, config)
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
    _say_if_untied(meta_model, config, say)
    if rest.parameters:
        warning = "Warning: " if rest.share > UNCOVERED_LIMIT else ""
        say(f"{warning}{kind}: {rest}. They stay in bf16, frozen.")
    return targets


def _say_if_untied(meta_model: Any, config: TrainConfig, say: Callable[[str], None]) -> None:
    ends = meta_model.get_input_embeddings(), meta_model.get_output_embeddings()
    whole = (peft_settings(config) or {}).get("modules_to_save") or ()
    named = {name for name, module in meta_model.named_modules() if module in ends}
    if ends[0].weight is ends[1].weight and any(_matches(name, end) for name in named for end in whole):
        kind = type(meta_model).__name__
        say(f"{kind} ties its head to its embedding. What modules_to_save names of the two is trained as a weight of its own.")


def _peft_refusal(meta_model: Any, config: TrainConfig, targets: list[Target]) -> str | None:
    """Why PEFT refuses to adapt the targets, tried on a copy without weights; None if it does not."""
    try:
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):  # it warns again when the model is loaded
            add_lora(copy.deepcopy(meta_model), dataclasses.replace(config, init_adapter=None), targets, "")
    except (ValueError, TypeError, NotImplementedError) as error:
        return " ".join(str(error).split())[:300]
    return None


def audit_targets(model: Any, config: TrainConfig) -> list[Target]:
    """Match every target name against the model before PEFT does: it skips names without a match and says nothing.

    Phi-3 fuses its projections, so of the usual seven Llama names two match, which trains 35 % of what was meant.

    Args:
        model: the base model or the meta model, without adapters.
        config: target_modules, matched as PEFT does (the whole name or its end after a dot), None for all linear layers;
            and the rank, as a layer gets r * (in + out) parameters.

    Raises:
        ConfigError: if a name matches nothing; the text lists the names that exist.
    """
    layers = linear_layers(model)
    if not layers:
        own = ", ".join(linear_classes(model))
        text = f"{type(model).__name__} has no torch.nn.Linear layer in its decoder, so there is nothing to adapt in NF4."
        raise ConfigError(text, hint=f"It has {own}, which this loop cannot adapt." if own else "")
    available = sorted({name.rsplit(".", 1)[-1] for name in layers})
    targets: list[Target] = []
    seen: set[str] = set()
    for target in config.target_modules or available:
        matched = {name: layer for name, layer in layers.items() if _matches(name, target)}
        if not matched:
            where = f"--init-adapter {config.init_adapter}: target" if config.init_adapter else "--target-modules"
            text = f"{where} {target} matches no linear layer of {type(model).__name__}{_why_not(model, target)}. It has "
            advice = "leave the flag out to adapt them all. (The head cannot have one.)"
            raise ConfigError(f"{text}{', '.join(available)}; {advice}")
        fresh = {name: layer for name, layer in matched.items() if name not in seen}
        if fresh:
            shapes = tuple(sorted({(layer.out_features, layer.in_features) for layer in fresh.values()}))
            parameters = sum(config.lora_r * (layer.in_features + layer.out_features) for layer in fresh.values())
            targets.append(Target(target, tuple(fresh), shapes, parameters))
        seen |= fresh.keys()
    return targets


def _why_not(model: Any, target: str) -> str:
    """For a name that only matches layers that cannot have an adapter: which kind they are."""
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and _matches(n, target)]
    if any(ROUTER.search(name) for name, _ in found):
        return " but a router of experts, which is never adapted"
    classes = sorted({type(module).__name__ for _, module in found if type(module) is not torch.nn.Linear})
    return f" that is loaded in NF4, but {', '.join(classes)}, which bitsandbytes does not quantize" if classes else ""


def _matches(name: str, target: str) -> bool:
    """PEFT's rule for a list of target modules."""
    return name == target or name.endswith(f".{target}")


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
            adapted: Any = peft.get_peft_model(model, _config_of(values, _names_of(values, targets)))
    elif config.init_adapter is None:
        linear = (name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
        others = [name for name in linear if name not in set(audited)]
        elsewhere = any(_matches(name, target.name) for name in others for target in targets)
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
    kept = adapted.peft_config["default"]
    kept.base_model_name_or_path, kept.revision = base, getattr(model.config, "_commit_hash", None)
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    wanted = sum(target.adapter_parameters for target in targets)
    if trained != wanted:
        raise ValueError(f"it made adapters of {trained:,} parameters, and the audited layers get {wanted:,}.")
    return adapted


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
            _check_settings(folder, values)
        elif values.get("task_type") != "CAUSAL_LM" and kind not in LINEAR_METHODS:
            raise ConfigError(f"{folder} was trained for the task {values.get('task_type')}. Only CAUSAL_LM is known here.")
        elif values.get("modules_to_save"):
            raise ConfigError(f"{folder} sets modules_to_save, which is supported with LORA only.")
        with warnings.catch_warnings(action="ignore"):  # of starts, which are over
            return peft.PeftConfig.from_pretrained(str(folder))
    except UNREADABLE as error:
        raise CheckpointError(f"{path} cannot be read ({reason(error)}).", hint="Get the adapter again.") from None


# -- a file of --peft-config -------------------------------------------------------------------------------------------

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
            _check_settings(path, {"r": 8, "lora_alpha": 8} | values)
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
    lora = _config_of(values, names)
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


def _config_of(values: dict[str, Any], target_modules: Any) -> Any:
    """The peft.PeftConfig of a file's values, on these modules."""
    own = {name: value for name, value in values.items() if name not in UNREAD} | {"task_type": "CAUSAL_LM"}
    if values["peft_type"] not in PROMPT_METHODS:
        own["target_modules"] = target_modules
    return _config_class(values["peft_type"])(**own)


def _names_of(values: dict[str, Any], every: list[Target]) -> Any:
    """The target_modules of a file; where it names none, those of all targets, or None where PEFT knows them by model."""
    names = values.get("target_modules")
    if names == "all-linear" or (names is None and values["peft_type"] not in ("IA3", "ADAPTION_PROMPT")):
        return [target.name for target in every]
    return names


def _targets_of_file(meta_model: Any, config: TrainConfig) -> list[Target]:
    """The layers that PEFT adapts by the file of --peft-config, tried on a copy without weights, by the ends of their names.

    Virtual tokens, before the input or in attention, are one target without linear layers.

    Raises:
        ConfigError: if a listed name matches nothing, if PEFT refuses the file, or if it adapts a layer that is not quantized.
    """
    allowed, kind = linear_layers(meta_model), type(meta_model).__name__
    values, every = peft_settings(config) or {}, audit_targets(meta_model, config)
    try:
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            adapted = peft.get_peft_model(copy.deepcopy(meta_model), _config_of(values, _names_of(values, every)))
    except (re.error, OSError, ValueError, TypeError, NotImplementedError) as error:
        text = " ".join(str(error).split())[:300]
        raise ConfigError(f"--peft-config {config.peft_config}: PEFT refuses it for {kind}: {text}") from None
    if values["peft_type"] not in LINEAR_METHODS:
        method = adapted.active_peft_config
        count = method.adapter_len if method.is_adaption_prompt else method.num_virtual_tokens
        return [Target(f"{count} virtual tokens", (), (), sum(p.numel() for p in adapted.parameters() if p.requires_grad))]
    found: dict[str, dict[str, int]] = {}  # end of a name -> layer -> trained parameters
    _check_token_indices(values, meta_model, f"--peft-config {config.peft_config}")
    whole: dict[str, int] = {}  # end of the name of a module that is trained whole, or of which rows are -> trained parameters
    saved: list[str] = []  # names of modules that are trained whole
    for name, module in adapted.get_base_model().named_modules():
        if isinstance(module, peft.utils.ModulesToSaveWrapper):
            if name in allowed and config.quantization != "none":
                text = f"--peft-config {config.peft_config}: modules_to_save trains {name}, which is quantized."
                raise ConfigError(text, hint="Leave it to the adapter, or pass --quantization none.")
            saved.append(name)
            end = name.rsplit(".", 1)[-1]
            whole[end] = whole.get(end, 0) + sum(parameter.numel() for parameter in module.modules_to_save.parameters())
        if isinstance(module, peft.utils.other.TrainableTokensWrapper):
            end = f"{name.rsplit('.', 1)[-1]} (rows)"
            own = getattr(module.token_adapter, "tied_adapter", None) is None  # else its rows are those of the embedding
            whole[end] = sum(p.numel() for p in module.parameters() if p.requires_grad) if own else 0
        rows_alone = isinstance(module, peft.tuners.trainable_tokens.TrainableTokensLayer)  # inside the wrapper above
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) and not rows_alone:
            if name not in allowed:
                raise ConfigError(f"--peft-config {config.peft_config} adapts {name}, which cannot have an adapter here.")
            parameters: Any = module.parameters()  # type: ignore[attr-defined]  # of the torch.nn.Module that it is too
            trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
            found.setdefault(name.rsplit(".", 1)[-1], {})[name] = trained
    if missing := [end for end in values.get("modules_to_save") or () if not any(name.endswith(end) for name in saved)]:
        raise ConfigError(f"--peft-config {config.peft_config}: modules_to_save {missing[0]} matches no module of {kind}.")
    names = {end: end if end.endswith("(rows)") else f"{end} (whole)" for end in sorted(whole)}
    return [Target(names[end], (), (), whole[end]) for end in names if whole[end]] + [
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
    indices = values.get("trainable_token_indices") or []
    rows = meta_model.get_input_embeddings().weight.shape[0]
    for index in itertools.chain(*indices.values()) if isinstance(indices, dict) else indices:
        if type(index) is not int or not 0 <= index < rows:
            raise ConfigError(f"{where} has {index!r} in trainable_token_indices. It must be a row of the embedding's {rows}.")


def _check_settings(folder: Path, values: dict[str, Any]) -> None:
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
