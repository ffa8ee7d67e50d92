"""Tokenizer and base model: checks before the weights, loading, and the fingerprint of the frozen base."""

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from qlora import distributed
from qlora.checksum import checksum
from qlora.config import Quantization, TrainConfig
from qlora.errors import ConfigError, EnvironmentProblem, is_out_of_memory
from qlora.model.coverage import linear_classes
from qlora.model.precision import compute_dtype
from qlora.model.sharded_nf4 import ShardedNF4Config, as_sharded
from qlora.model.shards import shard_of
from qlora.model.supported import check_model, quantization_values, stored_4bit_kind
from qlora.model.third_party import bitsandbytes, transformers

ASYNC_OFF = "HF_DEACTIVATE_ASYNC_LOAD"  # a variable of transformers


# -- loading ---------------------------------------------------------------------------------------------------------


def load_meta_model(source: str, config: TrainConfig) -> Any:
    """The model of a folder or hub id without its weights: a small file to fetch, and enough to check the flags against.

    Returns:
        A transformers model on the meta device.

    Raises:
        UserError: exit 7 if it is not there, 2 if check_model refuses it or --max-length is more than it was built for.
    """
    origin = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    with _environment_errors(source):
        model_config = transformers.AutoConfig.from_pretrained(source, **origin)
        check_model(source, model_config, config.quantization)
        with torch.device("meta"):
            meta_model = transformers.AutoModelForCausalLM.from_config(
                model_config, trust_remote_code=config.trust_remote_code, dtype=torch.bfloat16, attn_implementation="eager"
            )
    longest = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and config.max_length > longest:
        raise ConfigError(f"--max-length {config.max_length} is more than the {longest} positions of {source}.")
    return meta_model


def stored_quantization(source: str, config: TrainConfig) -> Quantization | None:
    """The 4 bits that a model is stored in, by its config.json; None if it is not, or not by bitsandbytes.

    Raises:
        EnvironmentProblem: if it is not there.
    """
    with _environment_errors(source):
        model_config = transformers.AutoConfig.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    kind = stored_4bit_kind(quantization_values(model_config) or {})
    return cast(Quantization, kind) if kind in ("nf4", "fp4") else None


def load_tokenizer(source: str, meta_model: Any, config: TrainConfig) -> Any:
    """The tokenizer of a folder or hub id.

    Raises:
        UserError: exit 7 if it is not there, 2 if it has more tokens than the model has embeddings.
    """
    with _environment_errors(source):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    rows = meta_model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ConfigError(
            f"The tokenizer of {source} has {len(tokenizer)} tokens, its model {rows} embeddings. They do not belong together.",
        )
    return tokenizer


def load_nf4_model(source: str, config: TrainConfig, attn_implementation: str, device: torch.device) -> Any:
    """The base model to train on: linear layers in NF4 or as --quantization selects, the rest in bf16, all frozen, one device.

    Not `prepare_model_for_kbit_training`: it casts embeddings, norms and head to fp32, which costs 0.4 GB on Phi-3-mini and
    makes the residual stream fp32. Arguments and errors are those of load_base_model. With shard_base on several ranks each
    keeps a part of the bytes (shards.py).
    """
    shared = config.shard_base and distributed.ranks().size > 1
    return load_base_model(source, config, attn_implementation, device, config.quantization, shared)


def load_base_model(
    source: str,
    config: TrainConfig,
    attn_implementation: str,
    device: torch.device,
    quantization: Quantization,
    sharded: bool = False,
) -> Any:
    """The base model, all frozen, on one device.

    Args:
        source: folder or hub id, in bf16 or, for 4 bits, saved from such a model (save_pretrained): a third of the disk.
        config: revision, trust_remote_code and precision are read.
        attn_implementation: a name from attention.choose_attention.
        device: CPU or one GPU.
        quantization: of the linear layers but the head; the rest is in the dtype of compute_dtype.
        sharded: keep a part of the bytes of NF4 only; see shards.py.

    Raises:
        EnvironmentProblem: if the weights are not there or are broken.
    """
    dtype = compute_dtype(config, device)
    load: Any = transformers.AutoModelForCausalLM.from_pretrained  # Any: its stub knows no output_loading_info
    origin = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    in_turn = _one_tensor_at_a_time() if sharded else contextlib.nullcontext()
    with _environment_errors(source), warnings.catch_warnings(), in_turn:
        # A checkpoint that is quantized already is loaded as it is; check_model saw that it is what is asked for.
        warnings.filterwarnings("ignore", message="You passed `quantization_config`", category=UserWarning)
        model_config = transformers.AutoConfig.from_pretrained(source, **origin)
        stored = getattr(model_config, "quantization_config", None)
        model, loaded = load(
            source,
            **origin,
            config=as_sharded(model_config) if sharded else model_config,
            output_loading_info=True,
            quantization_config=quantization_of(quantization, dtype, sharded),
            dtype=dtype,
            attn_implementation=attn_implementation,
            device_map={"": device},
            use_safetensors=True,  # the older format may run code when it is read
        )
    _check_names(source, loaded)
    if sharded:  # from here on it is the same base
        nf4: Any = transformers.BitsAndBytesConfig
        model.config.quantization_config = quantization_of("nf4", dtype) if stored is None else nf4.from_dict(stored)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    kind = {"int8": bitsandbytes.nn.Linear8bitLt, "none": torch.nn.Linear}.get(quantization, bitsandbytes.nn.Linear4bit)
    quantized = [module for module in model.modules() if isinstance(module, kind)]
    if not quantized:
        raise ConfigError(
            f"No layer of {source} is in {quantization.upper()} after loading. bitsandbytes quantizes torch.nn.Linear only, "
            f"not {', '.join(linear_classes(model)) or 'other classes'}.",
        )
    for module in quantized if quantization in ("nf4", "fp4") else ():
        _prepare_4bit(module, source, dtype, quantization)
    return model


def _check_names(source: str, loaded: dict[str, Any]) -> None:
    """Refuse weights that do not belong to their config.json: transformers would make up the one and leave out the other."""
    if missing := sorted(loaded["missing_keys"]):
        raise EnvironmentProblem(f"Model {source} lacks {len(missing)} tensors, {missing[0]} first.", hint="Download it again.")
    if surplus := sorted(name for name in loaded["unexpected_keys"] if ".layers." in name):
        raise EnvironmentProblem(
            f"Model {source} has {len(surplus)} tensors that its config.json does not know, {surplus[0]} first. The two do "
            "not belong together.",
        )


def _prepare_4bit(module: Any, source: str, dtype: torch.dtype, quantization: Quantization) -> None:
    """Let a layer compute in `dtype`, keep its weights as they are packed, and check that they are of its shape."""
    # A checkpoint brings its own dtypes, often fp16 or fp32. Evaluation would compute in them, training never does,
    # and activations of 7e4 are infinite in fp16.
    module.compute_dtype, module.compute_type_is_set = dtype, True
    packed: Any = module.weight
    _check_layout(source, packed.quant_state, quantization)
    packed.quant_state.stored_dtype, packed.quant_state.dtype = packed.quant_state.dtype, dtype
    # On a CPU with AVX512-BF16 an eval forward would repack the weight in place, and every later backward would
    # read the repacked bytes as if they were not: gradients of relative error 1.0, under a loss that looks right.
    module.support_avx512bf16_for_cpu = False
    stored, wanted = tuple(packed.quant_state.shape), (module.out_features, module.in_features)
    if stored != wanted:  # packed weights are all of one shape, so that loading cannot tell
        raise EnvironmentProblem(
            f"Model {source} has a weight of shape {stored} where its config.json says {wanted}. The two do not "
            "belong together.",
        )


def quantization_of(
    quantization: Quantization, dtype: torch.dtype = torch.bfloat16, sharded: bool = False
) -> transformers.BitsAndBytesConfig | None:
    """The configuration with which transformers loads a base in that quantization, computing in `dtype`; None for none."""
    if quantization == "none":
        return None
    if quantization == "int8":  # LLM.int8: activations too, except outliers; Dettmers et al., 2022 (arXiv 2208.07339)
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    kind: Any = ShardedNF4Config if sharded else transformers.BitsAndBytesConfig
    settings: transformers.BitsAndBytesConfig = kind(
        load_in_4bit=True,
        # nf4: 16 levels at the quantiles of a normal distribution; Dettmers et al., 2023, section 3. fp4: a 4-bit float.
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=True,  # 4.5 -> 4.127 bits a parameter: the scales themselves become 8-bit
        bnb_4bit_compute_dtype=dtype,
    )
    return settings


def prepare_inference(model: Any) -> None:
    """Let bitsandbytes repack NF4 weights for a CPU with AVX512-BF16 at their first forward: several times as fast.

    Only for a model that is neither trained nor dequantized afterward: whoever else reads the repacked bytes reads garbage.
    """
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            fits = module.out_features % 32 == 0 and module.in_features % 64 == 0  # else repacking fails
            module.support_avx512bf16_for_cpu = fits and bitsandbytes.functional.has_avx512bf16()


def fingerprint(model: Any) -> str:
    """A digest of the frozen base: configuration, weights as they lie in memory, NF4 bytes with their scales.

    On a GPU the weights enter by their checksums, as copying 2 GB to the host and hashing them takes two seconds; a digest is
    compared with those of the same kind of device only. Where the model came from, and adapters, do not count. Dtypes count as
    they were stored.
    """
    volatile = {"_name_or_path", "_commit_hash", "transformers_version"}
    shape = {name: value for name, value in model.config.to_dict().items() if name not in volatile}
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode())
    with _stored_dtypes(model):
        tensors = model.state_dict()
    sums = [torch.zeros((), dtype=torch.int64, device=model.device)]  # [] each
    shards = {f"{name}.": module.shard for name, module in model.named_modules() if shard_of(module)}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if "default" not in parts and not parts[-1].startswith("adaption_"):  # PEFT's name of the adapter; or LLaMA-Adapter's
            for shard in (shard for prefix, shard in shards.items() if name.startswith(prefix)):
                shard.base.gather(shard.number)
            digest.update(name.encode())
            if tensor.is_cuda:
                digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
                sums.append(checksum(tensor))
            else:
                digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())  # [bytes]
    if len(sums) > 1:
        digest.update(torch.stack(sums).cpu().numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _one_tensor_at_a_time() -> Iterator[None]:
    """A block in which transformers reads one tensor after the other: threads that read ahead might hold the whole base."""
    before = os.environ.get(ASYNC_OFF)
    os.environ[ASYNC_OFF] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[ASYNC_OFF]
        else:
            os.environ[ASYNC_OFF] = before


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


def _check_layout(source: str, state: Any, quantization: Quantization) -> None:
    """Refuse packed bytes in another layout than the operators read, whatever config.json says of them."""
    seen = (state.quant_type, state.blocksize, state.state2.blocksize if state.nested else 256)
    if seen != (quantization, 64, 256):
        text = f"{source} holds a weight in {seen[0]}, in blocks of {seen[1]}, with scales in blocks of {seen[2]}."
        raise ConfigError(
            f"{text} This loop reads {quantization}, 64 and 256.",
            hint="Name the model in bf16, or one that transformers saved in 4 bits.",
        )


@contextlib.contextmanager
def _environment_errors(source: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())
        raise EnvironmentProblem(
            f"Model {source} cannot be loaded: {_advice(error, source)} ({type(error).__name__}: {reason[:300]})",
        ) from error


def _advice(error: BaseException, source: str) -> str:
    text = f"{error} {error.__cause__}".lower()
    if "trust_remote_code" in text:
        return "it comes with its own Python code. Read that code, then pass --trust-remote-code; Phi-3 needs none."
    if "unrecognized configuration class" in text:
        return "it is not a decoder-only language model, which is what this loop trains."
    if "safetensors" in text and not Path(source).is_dir():
        return "the hub has no safetensors of it, and this loop does not read pytorch_model.bin, which may run code."
    if isinstance(error, RuntimeError):
        return "its weights and its config.json do not belong together."
    if Path(source).is_dir():
        return "the folder is not a complete model. It needs config.json, the weights as safetensors, and a tokenizer."
    if "gated" in text or "401" in text or "403" in text:
        return "the hub requires a login. Accept the license on the model's page and set the environment variable HF_TOKEN."
    if "offline" in text or "connect" in text or "internet" in text:
        return "the hub cannot be reached and the model is not in its cache. Go online, name a folder, or use --model demo."
    return "no such folder, and no such model on the hub. Check the spelling, and HF_TOKEN if the model is private."
