"""Memory: the measured peak, an estimate beside it, and what to change when it does not suffice."""

import contextlib
import os
import resource
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from qlora import distributed
from qlora.config import TrainConfig
from qlora.data.batch import longest_rows, rounded, training_batches
from qlora.data.dataset import TokenizedDataset
from qlora.errors import user_error_on_oom
from qlora.model.coverage import quantized_layers, uncovered
from qlora.model.loss import CHUNK_TOKENS
from qlora.model.peft_config import runs_as_peft_wrote_it
from qlora.model.targets import Target

ATTENTION_INPUTS = ("qkv_proj", "q_proj", "k_proj", "v_proj")  # layers whose output attention reads
LEAST_LENGTH, LEAST_RANK = 128, 4  # below which a run would hardly be the one that was wanted
AMPLE = 0.5  # of the free memory: a prediction below it is not as wrong as that
NF4_BYTES = 4.127 / 8  # of a parameter, scales in double quantization included
BASES = {"nf4": "base in NF4", "fp4": "base in FP4", "int8": "base in INT8", "none": "base without quantization"}
BASE_BYTES = {"nf4": NF4_BYTES, "fp4": NF4_BYTES, "int8": 1.0, "none": 2.0}  # of a parameter


def peak_memory_gb(device: torch.device) -> float:
    """Highest memory so far, in GB: allocated on the GPU, or resident in the process where there is none.

    What CUDA graphs write to when they are replayed counts as a whole, though the allocator holds most of it to be free.
    """
    if device.type == "cuda":
        pools = [part for part in torch.cuda.memory_snapshot() if part["segment_pool_id"] != (0, 0)]
        held = sum(part["total_size"] - part["allocated_size"] for part in pools)
        return float(torch.cuda.max_memory_allocated(device) + held) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def leave_no_gaps() -> None:
    """Have torch grow its blocks of GPU memory instead of adding others, which leaves gaps where lengths vary.

    To be called before CUDA starts, as its allocator reads the variable then; a PYTORCH_ALLOC_CONF of the user's stays.
    """
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def memory_terms(model: Any, targets: list[Target], config: TrainConfig, longest: int, ranks: int = 1) -> dict[str, float]:
    """What a step's tensors take on a GPU when they take the most, in GB, term by term, from the shape alone.

    The sum is within 5 % of Phi-3-mini's peaks in benchmarks/results, to which it was fit. CUDA's context takes 0.5 GB more.

    Args:
        model: the base model or the meta model.
        targets: from audit_targets.
        config: resolved, but that compile and gradient_checkpointing may be anything but auto.
        longest: tokens of the longest row.
        ranks: GPUs that share the base with shard_base.
    """
    shape = model.config.get_text_config()
    hidden, layers = shape.hidden_size, shape.num_hidden_layers
    heads = getattr(shape, "num_attention_heads", 0)  # Mamba has none
    inner = getattr(shape, "intermediate_size", 4 * hidden)
    linear, in_bf16 = sum(layer.weight.numel() for layer in quantized_layers(model).values()), uncovered(model).parameters
    names = [name for target in targets for name in target.layers] if config.cache_dequantized else []
    dequantized = [rows * columns for target in targets for rows, columns in target.shapes if config.quantization != "none"]
    parts = ranks if config.shard_base else 1  # of the base, one on each GPU
    trained = sum(target.adapter_parameters for target in targets)
    moment = 4 if config.optimizer == "adamw" else 1 + 4 / 256  # bytes: fp32, or 8 bits and an fp32 scale for each 256
    tokens = config.per_device_train_batch_size * (longest := rounded(longest, config.length_multiple))
    attention_inputs = sum(target.shapes[0][0] for target in targets if target.name in ATTENTION_INPUTS) or 3 * hidden
    kept = {"full": 0 if config.offload_checkpoints else 2 * hidden}  # bytes of a layer and token that stay until backward
    kept["selective"] = kept["full"] + 2 * hidden + 4 * heads + 2 * attention_inputs
    kept["none"] = kept["selective"] + 2 * hidden + 4 * inner
    full = config.gradient_checkpointing == "full"
    # Bytes of a token in the layer whose backward runs; with dropout, which of the adapters' inputs were dropped.
    at_work = 27 * hidden + 8 * inner + (3 * hidden + inner if config.lora_dropout else 0)
    if config.compile != "none":
        # As live at the peak: gate, up, their gradients, q, k, v ...; where products are kept, what is beside them.
        at_work = 6 * hidden + 10 * inner + 2 * attention_inputs if full else 2 * hidden + 6 * inner
    elif config.gradient_checkpointing == "none":
        kept["none"] = at_work  # and nothing beside it
    rest = 0 if config.gradient_checkpointing == "none" and config.compile == "none" else at_work
    scores = heads * tokens * longest if config.attn_implementation == "eager" else 0
    score_copies = 6 * layers if config.gradient_checkpointing == "none" else 13 if config.compile == "none" else 8  # bytes
    staying, scored = tokens * layers * kept[config.gradient_checkpointing], score_copies * scores
    terms = {
        BASES[config.quantization]: (BASE_BYTES[config.quantization] - 0.5 + 0.5 / parts) * linear,
        "layers gathered": linear / layers if parts > 1 else 0,  # two of them
        "weights not in NF4": 2 * in_bf16,
        "embeddings, head, norms": 2 * (model.num_parameters() - linear - in_bf16),
        "base in bf16": 2 * sum(model.get_submodule(name).weight.numel() for name in names),
        "adapters in fp32": 4 * trained,
        "their gradients": 4 * trained,
        "their moments": (1 if config.optimizer == "lion_8bit" else 2) * moment * trained,
        "their copies in bf16": 2 * trained,
        "kept until backward": staying,
        "attention scores": scored,
        "one layer at work": tokens * rest,
        "gaps in the graphs' memory": 0,
        "head and loss": 2 * min(CHUNK_TOKENS, tokens) * shape.vocab_size + 12 * tokens * hidden,
        "one weight dequantized": 2 * max(dequantized, default=0),
    }
    if config.compile == "graphs":  # a private memory pool, and a cuBLAS workspace per stream
        twice = 0.37 if full else 1.3  # of a layer's, in forward's and backward's graph
        terms["gaps in the graphs' memory"] = 0.06 * (staying + scored + tokens * rest) + twice * tokens * rest + 0.35 * 2**30
    return {name: size / 1e9 for name, size in terms.items()}


def estimated_memory_gb(model: Any, targets: list[Target], config: TrainConfig, longest: int) -> float:
    """The sum of `memory_terms`, in GB."""
    return sum(memory_terms(model, targets, config, longest).values())


class Setting(NamedTuple):
    """A change that needs less memory."""

    flags: str  # of the command line, perhaps with a remark
    changes: dict[str, Any]  # fields of the configuration; nothing where what to give them is the user's choice
    same_training: bool  # whether nothing changes but speed, and rounding


def settings_to_try(config: TrainConfig, longest: int) -> list[Setting]:
    """Changes that need less memory, those first that change nothing but speed.

    Args:
        config: resolved.
        longest: tokens of the longest row.

    Returns:
        One setting at least; lengths and ranks are halved down to LEAST_LENGTH and LEAST_RANK.
    """
    batch, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    same: list[tuple[str, dict[str, Any]]] = []
    if config.cache_dequantized:
        same.append(("--no-cache-dequantized", {"cache_dequantized": False}))
    method = runs_as_peft_wrote_it(config)
    if config.gradient_checkpointing != "full" and method != "PREFIX_TUNING":
        same.append(("--gradient-checkpointing full", {"gradient_checkpointing": "full"}))
    if config.attn_implementation == "eager":
        same.append(("--attn-implementation sdpa", {"attn_implementation": "sdpa"}))
    if config.compile == "graphs":
        same.append(("--compile layers", {"compile": "layers"}))
    if config.compile == "layers" and not config.offload_checkpoints:
        same.append(("--offload-checkpoints", {"offload_checkpoints": True}))
    if batch > 1:
        smaller = next(size for size in range(batch // 2, 0, -1) if batch % size == 0)
        step = {"per_device_train_batch_size": smaller, "gradient_accumulation_steps": accumulation * batch // smaller}
        flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in step.items())
        same.append((f"{flags} (the same step)", step))
    other: list[tuple[str, dict[str, Any]]] = []
    if config.quantization in ("int8", "none"):
        other.append(("--quantization nf4", {"quantization": "nf4"}))
    if config.optimizer == "adamw":
        saved = "6 bytes less for each trained parameter"
        other.append((f"--optimizer adamw_8bit ({saved})", {"optimizer": "adamw_8bit"}))
    if longest > LEAST_LENGTH:
        shorter = max(longest // 2, LEAST_LENGTH)
        other.append((f"--max-length {shorter} (the longest row has {longest} tokens)", {"max_length": shorter}))
    if config.peft_config is not None:
        other.append(("fewer trained parameters in the file of --peft-config", {}))
        return [*(Setting(*each, True) for each in same), *(Setting(*each, False) for each in other)]
    if config.lora_r > LEAST_RANK:
        smaller = max(config.lora_r // 2, LEAST_RANK)
        other.append((f"--lora-r {smaller}", {"lora_r": smaller}))
    other.append(("--target-modules with fewer names", {}))
    return [*(Setting(*each, True) for each in same), *(Setting(*each, False) for each in other)]


def oom_as_user_error(
    config: TrainConfig, device: torch.device, estimate_gb: float, longest: int
) -> contextlib.AbstractContextManager[None]:
    """Turn running out of memory in a block into the error that says what was needed and what to try.

    Raises:
        OutOfMemory.
    """
    where = "GPU" if device.type == "cuda" else "machine"
    advice = ", or ".join(setting.flags for setting in settings_to_try(config, longest)[:3])
    return user_error_on_oom(
        lambda reason: (
            f"The {where} ran out of memory: the peak so far was {peak_memory_gb(device):.2f} GB, the estimate for these "
            f"settings {estimate_gb:.2f} GB. Try {advice}. ({reason})"
        )
    )


def _free_gb(device: torch.device) -> float:
    """Memory of a GPU that this process, or another rank, has or could get, in GB; 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    return distributed.smallest((torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)) / 1e9)


def probe_memory(
    step: Callable[..., Any],
    optimizer: torch.optim.Optimizer,
    samples: TokenizedDataset,
    config: TrainConfig,
    predicted_gb: float,
) -> str:
    """Take steps at rate zero on the longest rows, so that what does not fit shows at the start.

    Where memory is ample it is one step of one micro-batch, which compiles and records nothing.

    Nothing is left of it but the measured peak: no weight moves, and no gradient stays.

    Args:
        step: the loop's own, called with `optimizer` and `micro_batches`.
        optimizer: its parameters are those that are trained; another one of its kind takes the step.
        samples: all of the training data.
        config: batch size and accumulation are read.
        predicted_gb: by memory_terms.

    Returns:
        A line with the peak beside the prediction.
    """
    device = optimizer.param_groups[0]["params"][0].device
    free_gb = _free_gb(device)
    ample = predicted_gb < AMPLE * free_gb
    batch = next(training_batches(samples, longest_rows(samples, config), config))
    micro_batches = [batch] if ample else min(2, config.gradient_accumulation_steps) * [batch]
    # bitsandbytes never frees pages: those of a paged `scratch`, 2 bytes a parameter, move to the host when room is needed.
    same_kind: Any = type(optimizer)
    scratch = same_kind([dict(group) for group in optimizer.param_groups])
    for _ in range(1 if ample else 2):  # the first makes the moments, which lie in memory beside the activations ever after
        step(optimizer=scratch, micro_batches=micro_batches)
    scratch.zero_grad(set_to_none=True)  # the parameters' own
    once = f" (one step, as {free_gb:.1f} GB are free)" if ample else ""
    return f"Memory: the longest batch peaks at {peak_memory_gb(device):.2f} GB, {predicted_gb:.2f} were predicted{once}"
