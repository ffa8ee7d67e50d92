"""The model: tokenizer, NF4 loading, adapters, and the audit of what the adapters hang on."""

import contextlib
import copy
import dataclasses
import hashlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from qlora.config import ExitCode, TrainConfig, UserError
from qlora.guards import is_out_of_memory
from qlora.libraries import bitsandbytes, peft, transformers

Precision = Literal["nf4", "int8", "bf16"]  # of a base model's linear layers
# A part of a module's name by which it decides which experts see a token: router, router_mlp, gate, shared_expert_gate.
ROUTER = re.compile(r"(^|\.)(\w*router\w*|gate|\w*expert_gate)(\.|$)")
UNCOVERED_LIMIT = 0.1  # dense families are below 0.08, mixtures of experts above 0.5
LISTED = 5  # module names in a message


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
    wanted |= {"bnb_4bit_quant_storage": "uint8"}  # other dtypes serve FSDP only; the operators here read bytes
    told = wanted if found is None else {"bnb_4bit_quant_storage": "uint8", **found}
    seen = {name: getattr(value := told.get(name), "value", value) for name in wanted}
    if seen != wanted:
        text = f"{source} is quantised already, with {', '.join(f'{name} {value}' for name, value in seen.items())}."
        advice = (
            "This loop trains on NF4 with double quantization, stored as uint8. Name the model in bf16, or one saved that way."
        )
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
    if precision == "nf4" and not any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in model.modules()):
        text = f"No layer of {source} is in NF4 after loading. bitsandbytes quantizes torch.nn.Linear only, not"
        raise UserError(ExitCode.CONFIGURATION, f"{text} {', '.join(_linear_classes(model)) or 'other classes'}.")
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            # A checkpoint brings its own dtypes, often fp16 or fp32. Evaluation would compute in them, training never does,
            # and activations of 7e4 are infinite in fp16.
            module.compute_dtype, module.compute_type_is_set = torch.bfloat16, True
            packed: Any = module.weight
            _check_layout(source, packed.quant_state)
            packed.quant_state.stored_dtype, packed.quant_state.dtype = packed.quant_state.dtype, torch.bfloat16
            # On a CPU with AVX512-BF16 an eval forward would repack the weight in place, and every later backward would
            # read the repacked bytes as if they were not: gradients of relative error 1.0, under a loss that looks right.
            module.support_avx512bf16_for_cpu = False
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

    It takes about a second for 2 GB. Where the model came from, and adapters, do not count. Dtypes count as they were stored.
    """
    volatile = {"_name_or_path", "_commit_hash", "transformers_version"}
    shape = {name: value for name, value in model.config.to_dict().items() if name not in volatile}
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode())
    with _stored_dtypes(model):
        tensors = model.state_dict()
    for name, tensor in tensors.items():
        if "lora_" not in name:
            digest.update(name.encode())
            digest.update(tensor.contiguous().cpu().flatten().view(torch.uint8).numpy())  # [bytes]
    return digest.hexdigest()


@contextlib.contextmanager
def _stored_dtypes(model: Any) -> Iterator[None]:
    """A block in which NF4 weights name the dtype that the checkpoint named, which is a part of their state_dict."""
    states = [state for module in model.modules() if (state := getattr(getattr(module, "weight", None), "quant_state", None))]
    computed = [state.dtype for state in states]
    try:
        for state in states:
            state.dtype = getattr(state, "stored_dtype", state.dtype)
        yield
    finally:
        for state, dtype in zip(states, computed, strict=True):
            state.dtype = dtype


def _check_layout(source: str, state: Any) -> None:
    """Refuse NF4 bytes in another layout than the operators read, whatever config.json says of them."""
    seen = (state.quant_type, state.blocksize, state.nested and state.state2.blocksize)
    if seen != ("nf4", 64, 256):
        text = f"{source} holds a weight in {seen[0]}, in blocks of {seen[1]}, with scales in blocks of {seen[2] or 1}."
        text = f"{text} This loop reads nf4, 64 and 256. Name the model in bf16, or one that transformers saved in NF4"
        raise UserError(ExitCode.CONFIGURATION, f"{text} with double quantization.")


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
    if "unrecognized configuration class" in text:
        return "it is not a decoder-only language model, which is what this loop trains."
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


def nf4_layers(model: Any) -> dict[str, torch.nn.Linear]:
    """Name -> linear layer that is in NF4, or that will be once the model is loaded.

    Before loading it asks transformers' own rule: torch.nn.Linear and Conv1D only, so neither a subclass of the former, such as
    Falcon's, nor experts that are fused into one parameter; and neither the head nor what is tied to it.
    """
    if getattr(model, "is_loaded_in_4bit", False):
        return {name: module for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    from transformers.quantizers.base import HfQuantizer  # here, as qlora.libraries must be the first to import bitsandbytes
    from transformers.quantizers.quantizers_utils import should_convert_module

    own = getattr(model.config, "quantization_config", None) or {}  # of a checkpoint that is quantized already
    skip = own.get("llm_int8_skip_modules") if isinstance(own, dict) else own.llm_int8_skip_modules
    left_out = HfQuantizer.get_modules_to_not_convert(model, skip, model._keep_in_fp32_modules)
    kinds = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    plain = ((name, module) for name, module in model.named_modules() if type(module) in kinds)
    return {name: module for name, module in plain if should_convert_module(name, left_out)}


def linear_layers(model: Any) -> dict[str, torch.nn.Linear]:
    """Name -> linear layer of the decoder that can get an adapter: in NF4, and no router of experts.

    Nor the head, whose frozen weight the loss reads, nor layers of a vision tower, nor a Conv1D, whose weight is transposed.
    """
    inside = {id(module) for module in model.get_decoder().modules()} - {id(model.get_output_embeddings())}
    layers = nf4_layers(model).items()
    conv1d = transformers.pytorch_utils.Conv1D
    return {n: m for n, m in layers if id(m) in inside and not ROUTER.search(n) and not isinstance(m, conv1d)}


class Uncovered(NamedTuple):
    """The weights that are neither in NF4 nor adapted, embeddings, head, norms and biases aside."""

    parameters: int
    share: float  # of all weights but embeddings, head, norms and biases
    modules: tuple[str, ...]  # that hold them, the largest first; N stands for the number of a layer

    def __str__(self) -> str:
        """For messages."""
        names = ", ".join(self.modules[:LISTED]) + (", ..." if len(self.modules) > LISTED else "")
        return (
            f"{100 * self.share:.1f} % of the weights ({self.parameters:,} parameters), embeddings, head and norms aside, "
            f"are neither in NF4 nor adapted: {names}"
        )


def uncovered(model: Any) -> Uncovered:
    """What of a model QLoRA does not cover, such as the fused experts of a mixture of experts, which stay in bf16.

    Args:
        model: the base model or its skeleton, without adapters.
    """
    ends = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    ends += [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    aside = {id(parameter) for end in ends for parameter in end.parameters()}
    covered = {id(layer.weight) for layer in nf4_layers(model).values()}
    weights = [(n, p) for n, p in model.named_parameters() if p.dim() > 1 and id(p) not in aside]  # 1-D: norms, biases
    sizes: Counter[str] = Counter()
    for name, parameter in weights:
        if id(parameter) not in covered:
            sizes[re.sub(r"\.\d+\.", ".N.", name.rpartition(".")[0])] += parameter.numel()
    total = sum(parameter.numel() for _, parameter in weights)
    return Uncovered(sizes.total(), sizes.total() / max(total, 1), tuple(name for name, _ in sizes.most_common()))


def checked_targets(skeleton: Any, config: TrainConfig, say: Callable[[str], None]) -> list[Target]:
    """The audited targets of a model that QLoRA covers; what could only fail after loading fails here.

    Args:
        skeleton: the base model on the meta device.
        config: target_modules and what else audit_targets and PEFT read.
        say: for a line about what is not covered; a warning where that is much and target modules are named.

    Raises:
        UserError: exit 2 as audit_targets; if more than a tenth of the weights is neither in NF4 nor adapted and no target
            modules are named; or if PEFT refuses the targets.
    """
    targets = audit_targets(skeleton, config)
    if any(layer is skeleton.get_output_embeddings() for layer in nf4_layers(skeleton).values()):
        text = (
            f"The head of {type(skeleton).__name__} is in NF4 too (llm_int8_skip_modules in its config.json lacks it). The loss"
        )
        raise UserError(ExitCode.CONFIGURATION, f"{text} needs it in bf16. Name the model in bf16.")
    rest, kind = uncovered(skeleton), type(skeleton).__name__
    refusal = _peft_refusal(skeleton, config, targets)
    if rest.share > UNCOVERED_LIMIT and config.target_modules is None:
        attention = [target for target in targets if all("attn" in name or "attention" in name for name in target.layers)]
        names = " ".join(target.name for target in (attention if refusal else targets))
        text = f"{kind}: {rest}. They would stay in bf16, frozen, and that is not QLoRA."
        raise UserError(ExitCode.CONFIGURATION, f"{text} To train the other layers anyway, pass --target-modules {names}.")
    if refusal is not None:
        text = f"PEFT cannot adapt {', '.join(target.name for target in targets)} of {kind}: {refusal}"
        raise UserError(ExitCode.CONFIGURATION, f"{text} Name other layers with --target-modules.")
    if rest.parameters:
        warning = "Warning: " if rest.share > UNCOVERED_LIMIT else ""
        say(f"{warning}{kind}: {rest}. They stay in bf16, frozen.")
    return targets


def _peft_refusal(skeleton: Any, config: TrainConfig, targets: list[Target]) -> str | None:
    """Why PEFT refuses to adapt the targets, tried on a copy without weights; None if it does not."""
    try:
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):  # it warns again when the model is loaded
            add_adapters(copy.deepcopy(skeleton), dataclasses.replace(config, init_adapter=None), targets, "")
    except (ValueError, TypeError, NotImplementedError) as error:
        return " ".join(str(error).split())[:300]
    return None


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
        own = ", ".join(_linear_classes(model))
        text = f"{type(model).__name__} has no torch.nn.Linear layer in its decoder, so there is nothing to adapt in NF4."
        raise UserError(ExitCode.CONFIGURATION, text + (f" It has {own}, which this loop cannot adapt." if own else ""))
    available = sorted({name.rsplit(".", 1)[-1] for name in layers})
    targets: list[Target] = []
    seen: set[str] = set()
    for target in config.target_modules or available:
        matched = {name: layer for name, layer in layers.items() if _matches(name, target)}
        if not matched:
            where = f"--init-adapter {config.init_adapter}: target" if config.init_adapter else "--target-modules"
            text = f"{where} {target} matches no linear layer of {type(model).__name__}{_why_not(model, target)}. It has "
            advice = "leave the flag out to adapt them all. (The head cannot have one.)"
            raise UserError(ExitCode.CONFIGURATION, f"{text}{', '.join(available)}; {advice}")
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


def _linear_classes(model: Any) -> list[str]:
    """Names of the classes that are linear layers, but not torch's own."""
    linear = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    return sorted({type(m).__name__ for m in model.modules() if isinstance(m, linear) and type(m) is not torch.nn.Linear})


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
        UserError: exit 2 if init_adapter does not fit the model tensor by tensor, or if an audited layer of a loaded model is
            not in NF4.
    """
    audited = [name for target in targets for name in target.layers]
    if getattr(model, "is_loaded_in_4bit", False) and (plain := sorted(set(audited) - nf4_layers(model).keys())):
        text = (
            f"{len(plain)} of {len(audited)} layers that are to get an adapter are not in NF4 after loading, {plain[0]} first"
        )
        raise UserError(ExitCode.CONFIGURATION, f"{text} ({type(model.get_submodule(plain[0])).__name__}).")
    if config.init_adapter is None:
        linear = (name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
        others = [name for name in linear if name not in set(audited)]
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
    wanted = sum(target.adapter_parameters for target in targets)
    if trained != wanted:
        raise ValueError(f"it made adapters of {trained:,} parameters, and the audited layers get {wanted:,}.")
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
