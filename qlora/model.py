"""The model: tokenizer, NF4 loading, adapters, and the audit of what the adapters hang on."""

import contextlib
import dataclasses
import hashlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from qlora.config import ExitCode, TrainConfig, UserError
from qlora.guards import is_out_of_memory
from qlora.libraries import bitsandbytes, peft, transformers

Precision = Literal["nf4", "int8", "bf16"]  # of a base model's linear layers


# -- loading ---------------------------------------------------------------------------------------------------------


def load_skeleton(source: str, config: TrainConfig) -> Any:
    """The model of a folder or hub id without its weights: a small file to fetch, and enough to check the flags against.

    Returns:
        A transformers model on the meta device.

    Raises:
        UserError: exit 7 if it is not there, 2 if --max-length is more than the model was built for or if it is quantised in
            another way than load_nf4_model does.
    """
    origin = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    with _environment_errors(source):
        model_config = transformers.AutoConfig.from_pretrained(source, **origin)
        with torch.device("meta"):
            skeleton = transformers.AutoModelForCausalLM.from_config(
                model_config, trust_remote_code=config.trust_remote_code, dtype=torch.bfloat16, attn_implementation="eager"
            )
    check_quantization(source, getattr(model_config, "quantization_config", None))
    longest = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and config.max_length > longest:
        text = f"--max-length {config.max_length} is more than the {longest} positions of {source}."
        raise UserError(ExitCode.CONFIGURATION, text)
    return skeleton


def check_quantization(source: str, found: dict[str, Any] | None) -> None:
    """Refuse a checkpoint that is quantised otherwise than in NF4 with double quantisation; one that is so loads faster.

    Args:
        source: of the model.
        found: what its config.json says of quantisation, if it does.

    Raises:
        UserError: exit 2.
    """
    wanted = {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    seen = {name: getattr(value := (found or wanted).get(name), "value", value) for name in wanted}
    if seen != wanted:
        text = f"{source} is quantised already, with {', '.join(f'{name} {value}' for name, value in seen.items())}."
        advice = "This loop trains on NF4 with double quantisation: name the model in bf16, or one that bitsandbytes saved so."
        raise UserError(ExitCode.CONFIGURATION, f"{text} {advice}")


def load_tokenizer(source: str, skeleton: Any, config: TrainConfig) -> Any:
    """The tokenizer of a folder or hub id.

    Raises:
        UserError: exit 7 if it is not there, 2 if it has more tokens than the model has embeddings.
    """
    with _environment_errors(source):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    rows = skeleton.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        text = (
            f"The tokenizer of {source} has {len(tokenizer)} tokens, its model {rows} embeddings. They do not belong together."
        )
        raise UserError(ExitCode.CONFIGURATION, text)
    return tokenizer


def load_nf4_model(source: str, config: TrainConfig, attn_implementation: str, device: torch.device) -> Any:
    """The base model to train on: linear layers in NF4 with double quantisation, the rest in bf16, all frozen, on one device.

    Not `prepare_model_for_kbit_training`: it casts embeddings, norms and head to fp32, which costs 0.4 GB on Phi-3-mini and
    makes the residual stream fp32. Arguments and errors are those of load_base_model.
    """
    return load_base_model(source, config, attn_implementation, device, "nf4")


def load_base_model(
    source: str, config: TrainConfig, attn_implementation: str, device: torch.device, precision: Precision
) -> Any:
    """The base model, all frozen, on one device; only NF4 is trained against, the others are for inference.

    Args:
        source: folder or hub id, in bf16 or, for NF4, saved from such a model (save_pretrained): a third of the disk.
        config: revision and trust_remote_code are read.
        attn_implementation: a name from attention.choose_attention.
        device: CPU or one GPU.
        precision: of the linear layers but the head; the rest is bf16.

    Raises:
        UserError: exit 7 if the weights are not there or are broken.
    """
    load: Any = transformers.AutoModelForCausalLM.from_pretrained  # Any: its stub knows no output_loading_info
    with _environment_errors(source), warnings.catch_warnings():
        # A checkpoint that is quantised already is loaded as it is; check_quantization saw that it is what is asked for.
        warnings.filterwarnings("ignore", message="You passed `quantization_config`", category=UserWarning)
        model, loaded = load(
            source,
            output_loading_info=True,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            quantization_config=quantization_of(precision),
            dtype=torch.bfloat16,
            attn_implementation=attn_implementation,
            device_map={"": device},
        )
    if missing := sorted(loaded["missing_keys"]):  # transformers would make them up
        raise UserError(ExitCode.ENVIRONMENT, f"Model {source} lacks {len(missing)} tensors, {missing[0]} first. Get it again.")
    if surplus := sorted(name for name in loaded["unexpected_keys"] if ".layers." in name):  # and leave these out
        text = f"Model {source} has {len(surplus)} tensors that its config.json does not know, {surplus[0]} first."
        raise UserError(ExitCode.ENVIRONMENT, f"{text} The two do not belong together.")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            # On a CPU with AVX512-BF16 an eval forward would repack the weight in place, and every later backward would
            # read the repacked bytes as if they were not: gradients of relative error 1.0, under a loss that looks right.
            module.support_avx512bf16_for_cpu = False
            packed: Any = module.weight
            stored, wanted = tuple(packed.quant_state.shape), (module.out_features, module.in_features)
            if stored != wanted:  # packed weights are all of one shape, so that loading cannot tell
                text = f"Model {source} has a weight of shape {stored} where its config.json says {wanted}."
                raise UserError(ExitCode.ENVIRONMENT, f"{text} The two do not belong together.")
    return model


def quantization_of(precision: Precision) -> transformers.BitsAndBytesConfig | None:
    """What transformers is told to load a base in that precision; None is bf16."""
    if precision == "bf16":
        return None
    if precision == "int8":  # LLM.int8: activations too, but for outliers; Dettmers et al., 2022 (arXiv 2208.07339)
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",  # 16 levels at the quantiles of a normal distribution; Dettmers et al., 2023, section 3
        bnb_4bit_use_double_quant=True,  # 4.5 -> 4.127 bits a parameter: the scales themselves become 8-bit
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def prepare_inference(model: Any) -> None:
    """Let bitsandbytes repack NF4 weights for a CPU with AVX512-BF16 at their first forward: several times as fast.

    Only for a model that is neither trained nor dequantised afterwards: whoever else reads the repacked bytes reads garbage.
    """
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = bitsandbytes.functional.has_avx512bf16()


def fingerprint(model: Any) -> str:
    """A digest of the frozen base: configuration, weights as they lie in memory, NF4 bytes with their scales.

    It takes about a second for 2 GB. Where the model came from, and adapters, do not count.
    """
    volatile = {"_name_or_path", "_commit_hash", "transformers_version"}
    shape = {name: value for name, value in model.config.to_dict().items() if name not in volatile}
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        if "lora_" not in name:
            digest.update(name.encode())
            digest.update(tensor.contiguous().cpu().flatten().view(torch.uint8).numpy())  # [bytes]
    return digest.hexdigest()


@contextlib.contextmanager
def _environment_errors(source: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())
        raise UserError(
            ExitCode.ENVIRONMENT,
            f"Model {source} cannot be loaded: {_advice(error, source)} ({type(error).__name__}: {reason[:300]})",
        ) from error


def _advice(error: BaseException, source: str) -> str:
    text = f"{error} {error.__cause__}".lower()
    if "trust_remote_code" in text:
        return "it comes with Python code of its own. Read that code, then pass --trust-remote-code; Phi-3 needs none."
    if isinstance(error, RuntimeError):
        return "its weights and its config.json do not belong together."
    if Path(source).is_dir():
        return "the folder is not a complete model. It needs config.json, the weights as safetensors, and a tokenizer."
    if "gated" in text or "401" in text or "403" in text:
        return "the hub wants a login. Accept the licence on the model's page and set the environment variable HF_TOKEN."
    if "offline" in text or "connect" in text or "internet" in text:
        return "the hub cannot be reached and the model is not in its cache. Go online, name a folder, or use --model demo."
    return "no such folder, and no such model on the hub. Check the spelling, and HF_TOKEN if the model is private."


# -- adapters --------------------------------------------------------------------------------------------------------


class Target(NamedTuple):
    """The linear layers that one name of `target_modules` matches, and that no earlier name did."""

    name: str
    layers: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]  # distinct (out, in)
    adapter_parameters: int


def linear_layers(model: Any) -> dict[str, torch.nn.Linear]:
    """Name -> linear layer of the decoder: not the head, whose frozen weight the loss reads, nor a vision tower."""
    decoder = model.get_decoder()
    inside = {id(module) for module in decoder.modules()} - {id(model.get_output_embeddings())}
    named = model.named_modules()
    return {name: module for name, module in named if id(module) in inside and isinstance(module, torch.nn.Linear)}


def audit_targets(model: Any, config: TrainConfig) -> list[Target]:
    """Match every target name against the model before PEFT does: it skips names without a match and says nothing.

    Phi-3 fuses its projections, so of the usual seven Llama names two match, which trains 35 % of what was meant.

    Args:
        model: the base model or its skeleton, without adapters.
        config: target_modules, matched as PEFT does (the whole name or its end after a dot), None for all linear layers;
            and the rank, as a layer gets r * (in + out) parameters.

    Raises:
        UserError: exit 2 if a name matches nothing; the text lists the names that exist.
    """
    layers = linear_layers(model)
    if not layers:
        text = f"{type(model).__name__} has no torch.nn.Linear layer in its decoder, so there is nothing to adapt."
        raise UserError(ExitCode.CONFIGURATION, text)
    available = sorted({name.rsplit(".", 1)[-1] for name in layers})
    targets: list[Target] = []
    seen: set[str] = set()
    for target in config.target_modules or available:
        matched = {name: layer for name, layer in layers.items() if _matches(name, target)}
        if not matched:
            where = f"--init-adapter {config.init_adapter}: target" if config.init_adapter else "--target-modules"
            text = f"{where} {target} matches no linear layer of {type(model).__name__}. It has {', '.join(available)}; "
            raise UserError(ExitCode.CONFIGURATION, text + "leave the flag out to adapt them all. (The head cannot have one.)")
        fresh = {name: layer for name, layer in matched.items() if name not in seen}
        if fresh:
            shapes = tuple(sorted({(layer.out_features, layer.in_features) for layer in fresh.values()}))
            parameters = sum(config.lora_r * (layer.in_features + layer.out_features) for layer in fresh.values())
            targets.append(Target(target, tuple(fresh), shapes, parameters))
        seen |= fresh.keys()
    return targets


def _matches(name: str, target: str) -> bool:
    """PEFT's rule for a list of target modules."""
    return name == target or name.endswith(f".{target}")


def add_adapters(model: Any, config: TrainConfig, targets: list[Target], base: str) -> Any:
    """Hang LoRA adapters on the audited layers: A uniform, B zero, so that the start is the base model exactly.

    Adapters are fp32 masters, computed in bf16 under autocast: in bf16 most late updates round away.

    Args:
        model: the base model; it is changed in place.
        config: rank, alpha, dropout, and init_adapter to start from, as with_init_adapter gives them.
        targets: from audit_targets.
        base: hub id or absolute folder, kept in adapter_config.json, with the commit of a hub id, so that the base is found.

    Raises:
        UserError: exit 2 if init_adapter does not fit the model tensor by tensor.
    """
    if config.init_adapter is None:
        audited = {name for target in targets for name in target.layers}
        others = (name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name not in audited)
        elsewhere = any(_matches(name, target.name) for name in others for target in targets)
        lora = peft.LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            # Whole names only where the short ones would match a vision tower too.
            target_modules=[name for t in targets for name in (t.layers if elsewhere else [t.name])],
            task_type="CAUSAL_LM",
        )
        adapted: Any = peft.get_peft_model(model, lora)
    else:
        _check_adapter(config.init_adapter, model, targets, config.lora_r)
        adapted = peft.PeftModel.from_pretrained(model, str(config.init_adapter), is_trainable=True)
    kept = adapted.peft_config["default"]
    kept.base_model_name_or_path, kept.revision = base, getattr(model.config, "_commit_hash", None)
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert trained == sum(target.adapter_parameters for target in targets), "the adapters are not those of the audit"
    return adapted


def with_init_adapter(config: TrainConfig) -> TrainConfig:
    """The configuration with rank, alpha, dropout and targets of the adapter that it starts from, if it does.

    Raises:
        UserError: exit 2 if it is no LoRA adapter that this loop can go on with.
    """
    if config.init_adapter is None:
        return config
    lora = _read_adapter_config(config.init_adapter)
    return dataclasses.replace(
        config,
        lora_r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=tuple(sorted(lora.target_modules)),
    )


def _read_adapter_config(folder: Path) -> Any:
    try:
        lora = peft.PeftConfig.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError, OSError) as error:
        text = f"--init-adapter {folder}: adapter_config.json cannot be read ({type(error).__name__}: {error})."
        raise UserError(ExitCode.CONFIGURATION, text) from None
    usual = peft.LoraConfig()
    # What may differ from PEFT's own defaults; anything else (DoRA, biases, other starts, ...) is not ours to continue.
    free = {"r", "lora_alpha", "lora_dropout", "target_modules", "task_type", "base_model_name_or_path", "revision",
            "inference_mode", "peft_version", "auto_mapping"}  # fmt: skip
    odd = []
    for name, value in vars(lora).items():
        harmless = name in free or (name == "init_lora_weights" and value in (True, False, "gaussian"))
        if not harmless and (value or None) != (getattr(usual, name, value) or None):
            odd.append(name)
    if not isinstance(lora, peft.LoraConfig) or odd or isinstance(lora.target_modules, str | None):
        seen = f"it sets {', '.join(odd)}" if odd else "its targets are no list"
        text = f"--init-adapter {folder} is not a plain LoRA adapter with a list of target modules: {seen}."
        raise UserError(ExitCode.CONFIGURATION, text)
    return lora


def _check_adapter(folder: Path, model: Any, targets: list[Target], rank: int) -> None:
    """Compare names and shapes by hand: PEFT loads what fits, leaves the rest at its start, and warns."""
    path = folder / "adapter_model.safetensors"
    try:
        with safe_open(path, "pt") as file:
            stored = {(name, *file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  not a dict
    except (OSError, SafetensorError) as error:
        raise UserError(ExitCode.CONFIGURATION, f"--init-adapter {folder}: {path.name} cannot be read: {error}.") from None
    layers = {name: model.get_submodule(name) for target in targets for name in target.layers}
    wanted = {(f"base_model.model.{name}.lora_A.weight", rank, layer.in_features) for name, layer in layers.items()}
    wanted |= {(f"base_model.model.{name}.lora_B.weight", layer.out_features, rank) for name, layer in layers.items()}
    if stored != wanted:
        name, *shape = min(stored ^ wanted)
        side = "only in the file" if (name, *shape) in stored else "not in the file"
        text = f"--init-adapter {folder} does not fit the model: {name} of shape {shape} is {side}."
        raise UserError(ExitCode.CONFIGURATION, text)
