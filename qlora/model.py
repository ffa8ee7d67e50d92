"""The model: tokenizer, NF4 loading, adapters, and the audit of what the adapters hang on."""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from qlora.config import ExitCode, TrainConfig, UserError


@contextlib.contextmanager
def _without_kernels_package() -> Iterator[None]:
    """Hide the package `kernels`: where it is installed, importing bitsandbytes on a CPU downloads native code through it."""
    hidden = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]  # makes `import kernels` fail
    try:
        yield
    finally:
        del sys.modules["kernels"]
        if hidden is not None:
            sys.modules["kernels"] = hidden


# Harmless lines of others, each filtered by its own text: bitsandbytes on the missing kernel above, PEFT on an old name.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
with _without_kernels_package():
    import bitsandbytes
import peft  # noqa: E402  after bitsandbytes, which it imports
import transformers  # noqa: E402

transformers.utils.logging.disable_progress_bar()


# -- loading ---------------------------------------------------------------------------------------------------------


def load_tokenizer(source: str, config: TrainConfig) -> Any:
    """The tokenizer of a folder or hub id, with a pad token; padding itself is done by length in data.collate.

    Raises:
        UserError: exit 7 if it is not there.
    """
    with _environment_errors(source):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model_config(source: str, config: TrainConfig) -> Any:
    """The configuration of a folder or hub id: a small file that tells whether the model is there and fits the flags.

    Raises:
        UserError: exit 7 if it is not there, 2 if --max-length is more than the model was built for.
    """
    with _environment_errors(source):
        model_config = transformers.AutoConfig.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    longest = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and config.max_length > longest:
        raise UserError(
            ExitCode.CONFIGURATION, f"--max-length {config.max_length} is more than the {longest} positions of {source}."
        )
    return model_config


def load_nf4_model(source: str, config: TrainConfig, attn_implementation: str, device: torch.device) -> Any:
    """The base model: linear layers in NF4 with double quantisation, the rest in bf16, all frozen, on one device.

    Not `prepare_model_for_kbit_training`: it casts embeddings, norms and head to fp32, which costs 0.4 GB on Phi-3-mini and
    makes the residual stream fp32.

    Args:
        source: folder or hub id.
        config: revision and trust_remote_code are read.
        attn_implementation: a name from attention.choose_attention.
        device: CPU or one GPU.

    Raises:
        UserError: exit 7 if the weights are not there or are broken.
    """
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",  # 16 levels at the quantiles of a normal distribution; Dettmers et al., 2023, section 3
        bnb_4bit_use_double_quant=True,  # 4.5 -> 4.127 bits a parameter: the scales themselves become 8-bit
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    load: Any = transformers.AutoModelForCausalLM.from_pretrained  # Any: its stub knows no output_loading_info
    with _environment_errors(source):
        model, loaded = load(
            source,
            output_loading_info=True,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            quantization_config=quantization,
            dtype=torch.bfloat16,
            attn_implementation=attn_implementation,
            device_map={"": device},
        )
    if missing := sorted(loaded["missing_keys"]):  # transformers would make them up
        raise UserError(ExitCode.ENVIRONMENT, f"Model {source} lacks {len(missing)} tensors, {missing[0]} first. Get it again.")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            # On a CPU with AVX512-BF16 an eval forward would repack the weight in place, and every later backward would
            # read the repacked bytes as if they were not: gradients of relative error 1.0, under a loss that looks right.
            module.support_avx512bf16_for_cpu = False
    return model


@contextlib.contextmanager
def _environment_errors(source: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            ExitCode.ENVIRONMENT,
            f"Model {source} cannot be loaded: {_advice(error, source)} ({type(error).__name__}: {reason[:300]})",
        ) from error


def _advice(error: BaseException, source: str) -> str:
    text = f"{error} {error.__cause__}".lower()
    if "trust_remote_code" in text:
        return "it comes with Python code of its own. Read that code, then pass --trust-remote-code; Phi-3 needs none."
    if Path(source).is_dir():
        return "the folder is not a complete model. It needs config.json, the weights as safetensors, and a tokenizer."
    if "gated" in text or "401" in text or "403" in text:
        return "the hub wants a login. Accept the licence on the model's page and set the environment variable HF_TOKEN."
    if "offline" in text or "connect" in text or "internet" in text:
        return "the hub cannot be reached and the model is not in its cache. Go online, name a folder, or use --model demo."
    return "no such folder, and no such model on the hub. Check the spelling, and HF_TOKEN if the model is private."


# -- adapters --------------------------------------------------------------------------------------------------------


class Target(NamedTuple):
    """The linear layers that one name of `target_modules` matches."""

    name: str
    num_layers: int
    shapes: tuple[tuple[int, int], ...]  # distinct (out, in)
    adapter_parameters: int


def linear_layers(model: Any) -> dict[str, Any]:
    """Name -> linear layer of the base model, without the head (the loss reads its frozen weight directly)."""
    head = model.get_output_embeddings()
    return {
        name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head
    }


def audit_targets(model: Any, config: TrainConfig) -> list[Target]:
    """Match every target name against the model before PEFT does: it skips names without a match and says nothing.

    Phi-3 fuses its projections, so of the usual seven Llama names two match, which trains 35 % of what was meant.

    Args:
        model: the base model, without adapters.
        config: target_modules, matched as PEFT does (the whole name or its end after a dot), None for all linear layers;
            and the rank, as a layer gets r * (in + out) parameters. init_adapter, if given, brings its own.

    Raises:
        UserError: exit 2 if a name matches nothing; the text lists the names that exist.
    """
    requested, rank = config.target_modules, config.lora_r
    if config.init_adapter is not None:
        lora = read_adapter_config(config.init_adapter)
        requested, rank = tuple(sorted(lora.target_modules)), lora.r
    layers = linear_layers(model)
    available = sorted({name.rsplit(".", 1)[-1] for name in layers})
    targets = []
    for target in requested or available:
        matched = [layer for name, layer in layers.items() if name == target or name.endswith(f".{target}")]
        if not matched:
            raise UserError(
                ExitCode.CONFIGURATION,
                f"--target-modules {target} matches no linear layer of {type(model).__name__}. It has {', '.join(available)}; "
                "leave the flag out to adapt them all. (The head cannot have an adapter.)",
            )
        shapes = tuple(sorted({(layer.out_features, layer.in_features) for layer in matched}))
        parameters = sum(rank * (layer.in_features + layer.out_features) for layer in matched)
        targets.append(Target(target, len(matched), shapes, parameters))
    return targets


def parameter_count(model: Any) -> int:
    """Parameters of the base model as the paper counts them. `numel` of a packed NF4 weight counts bytes: half of them."""
    count = 0
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            continue
        state = getattr(parameter, "quant_state", None)
        count += state.shape.numel() if state is not None else parameter.numel()
    return count


def add_adapters(model: Any, config: TrainConfig, targets: list[Target], base: str) -> Any:
    """Hang LoRA adapters on the audited layers: A uniform, B zero, so that the start is the base model exactly.

    Adapters are fp32 masters, computed in bf16 under autocast: in bf16 most late updates round away.

    Args:
        model: the base model; it is changed in place.
        config: rank, alpha, dropout, and init_adapter to start from.
        targets: from audit_targets.
        base: hub id or absolute folder, kept in adapter_config.json, with the commit of a hub id, so that the base is found.

    Raises:
        UserError: exit 2 if init_adapter does not fit the model tensor by tensor.
    """
    model.name_or_path = base
    commit = getattr(model.config, "_commit_hash", None)
    if config.init_adapter is None:
        lora = peft.LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=[target.name for target in targets],
            task_type="CAUSAL_LM",
        )
        adapted = peft.get_peft_model(model, lora, revision=commit)
    else:
        adapted = _load_adapter(model, config.init_adapter)
        adapted.peft_config["default"].base_model_name_or_path = base
        adapted.peft_config["default"].revision = commit
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert trained == sum(target.adapter_parameters for target in targets), "the adapters are not those of the audit"
    return adapted


def read_adapter_config(folder: Path) -> Any:
    """The LoRA configuration of a PEFT adapter folder.

    Raises:
        UserError: exit 2 if it is no LoRA adapter that this loop can go on with.
    """
    lora = peft.PeftConfig.from_pretrained(str(folder))
    plain = isinstance(lora, peft.LoraConfig) and not (
        lora.modules_to_save or lora.use_dora or lora.rank_pattern or lora.bias != "none"
    )
    if not plain or isinstance(lora.target_modules, str | None):
        raise UserError(
            ExitCode.CONFIGURATION, f"--init-adapter {folder} is not a plain LoRA adapter with a list of target modules."
        )
    return lora


def _load_adapter(model: Any, folder: Path) -> Any:
    path = folder / "adapter_model.safetensors"
    try:
        with safe_open(path, "pt") as file:
            stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  not a dict
    except (OSError, SafetensorError) as error:
        raise UserError(ExitCode.CONFIGURATION, f"--init-adapter {folder}: {path.name} cannot be read: {error}.") from None
    # Compared by hand: PEFT loads what fits, leaves the rest at its start, and warns.
    fresh = peft.get_peft_model(model, read_adapter_config(folder))
    wanted = {
        name: tuple(tensor.shape) for name, tensor in peft.get_peft_model_state_dict(fresh, save_embedding_layers=False).items()
    }
    if stored != wanted:
        odd = sorted(stored.items() ^ wanted.items())[0]
        raise UserError(
            ExitCode.CONFIGURATION,
            f"--init-adapter {folder} does not fit the model: {odd[0]} of shape {odd[1]} is on one side only.",
        )
    base = fresh.unload()
    return peft.PeftModel.from_pretrained(base, str(folder), is_trainable=True)


def enable_gradient_checkpointing(model: Any) -> None:
    """Keep only the input of each layer and recompute the rest in backward (Chen et al., 2016, arXiv 1604.06174).

    Non-reentrant, so inputs need no gradient of their own; transformers switches that on anyway, at the price of a
    product in the first layer.
    """
    base = model.get_base_model()
    base.activation_checkpointing_enable({"use_reentrant": False})
    base.disable_input_require_grads()
