"""How decoder layers run in training: what each keeps for backward, what is computed again, and whether they are compiled.

Three policies, from fast to small; none changes a result but by rounding:

- none: all matrix products and attention are kept. Compiled, what is cheap (norms, activations, rotations) is computed again.
- selective: attention and the product that it reads are kept; those behind it, the MLP's being the largest, are not.
- full: only the layer's input is kept (Chen et al., 2016, arXiv 1604.06174).

Each layer is compiled separately, so that all share one piece of code: compilation takes seconds, whatever the depth. CUDA
graphs then launch all of them at once.
"""

import contextlib
import dataclasses
import functools
import itertools
import logging
import math
import os
import shutil
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora.config import Compile, GradientCheckpointing, TrainConfig
from qlora.errors import ConfigError, EnvironmentProblem
from qlora.model.coverage import UNCOVERED_LIMIT, uncovered
from qlora.model.families import attention_use, outermost_layers
from qlora.model.peft_config import runs_as_peft_wrote_it
from qlora.model.precision import has_bf16
from qlora.model.shards import shard_of
from qlora.model.targets import Target
from qlora.speed.graphs import graphs_unavailable_reason
from qlora.speed.memory import ATTENTION_INPUTS, memory_terms

# torch warns of in-place operators in what is computed again; there are none in a layer.
logging.getLogger("torch._higher_order_ops.wrap").addFilter(lambda record: "context_fn is passed" not in str(record.msg))
# And of products in fp32 that could be less precise; there are none but where they are wanted so.
warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores", category=UserWarning)
# Operators that attend; what each returns is as large as its queries, and dear to compute.
ATTENTION = {
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "flash_attn::_flash_attn_forward",
    "flash_attn::_flash_attn_varlen_forward",
    "torch_attn::_varlen_attn",
}
PRODUCTS = {"aten::mm", "aten::bmm", "aten::addmm", "qlora::nf4_linear", "bitsandbytes::gemm_4bit"}


def _keep_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operator.name().partition(".")[0] in ATTENTION | PRODUCTS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _keep_attention(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operator.name().partition(".")[0]
    kept = name in ATTENTION or name == "aten::mm" or (name == "qlora::nf4_linear" and args[-1] in ATTENTION_INPUTS)
    return CheckpointPolicy.MUST_SAVE if kept and not _draws(operator, args, kwargs) else CheckpointPolicy.PREFER_RECOMPUTE


def _draws(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call draws random numbers, that is, has a dropout rate above 0.

    Such a call must run again in the recomputation. If its saved output were used instead, the generator would not advance,
    and every later dropout of the layer would draw another mask than it drew in the forward pass.
    """
    names = [argument.name for argument in operator._schema.arguments]
    rate = kwargs.get("dropout_p", args[names.index("dropout_p")] if "dropout_p" in names[: len(args)] else 0.0)
    return bool(rate)


COMPILE_ERRORS = (
    torch._dynamo.exc.TorchDynamoException,
    torch._dynamo.exc.FailOnRecompileLimitHit,
    torch._inductor.exc.InductorError,
)
Run = Callable[..., torch.Tensor]  # (layer, *its arguments) -> its output
COMPILE_LABELS = {"none": "as written", "layers": "compiled", "graphs": "compiled, replayed as CUDA graphs"}
MARGIN = 0.9  # of the memory that is free: predictions are good to a tenth, and fragments take room


class Job(NamedTuple):
    """How much a run trains, and the memory that it finds."""

    micro_batches: float
    tokens: float
    free_gb: float = math.inf  # of the rank that has the least; not finite: what this GPU has
    ranks: int = 1


# Measured on an H200 with Phi-3-mini: a micro-batch of few tokens takes 270 ms as written, for launches, and 27 ms replayed;
# one of many takes 74 and 37 us per token. Compiling and the probe took 3 to 4 s with cached kernels, 7 s without, and 16 to
# 19 s in the first process of a machine (benchmarks/results/end_to_end_h200_*); without compilation the probe takes about 1 s.
COMPILE_S = 15.0
AS_WRITTEN, REPLAYED = (8.4e-3, 19.5e-15), (0.8e-3, 9.7e-15)  # s per layer; s per token and parameter


def seconds_saved(model: Any, job: Job) -> float:
    """What compiled layers save in a run, before the time to compile them; a rough estimate.

    Args:
        model: or the meta model.
        job: to be trained.
    """
    depth: int = model.config.get_text_config().num_hidden_layers
    work: float = job.tokens / job.micro_batches * model.num_parameters()  # of a micro-batch
    as_written, replayed = (max(launch * depth, each * work) for launch, each in (AS_WRITTEN, REPLAYED))
    return job.micro_batches * (as_written - replayed)


def choose_layers(
    config: TrainConfig, meta_model: Any, targets: list[Target], longest: int, device: torch.device, job: Job | None = None
) -> tuple[TrainConfig, str]:
    """Resolve `compile` and `gradient_checkpointing`, if they are auto.

    Args:
        config: resolved otherwise.
        meta_model: the base model without weights.
        targets: of the adapters.
        longest: tokens of the longest row.
        device: where the model is to be.
        job: if given, auto leaves layers as written where the run is too short for compilation to pay.

    Returns:
        The configuration, and a line for the log: what was chosen and why, with the memory that is predicted.

    Raises:
        UserError: exit 7 if compilation or offloaded checkpoints were requested and are not available; 2 if checkpoints were
            requested and transformers does not mark the model's layers as able to have them.
    """
    policies = _policies(config, meta_model, job)
    alone = "\n--shard-base changes nothing on one GPU." if config.shard_base and job and job.ranks == 1 else ""
    candidates, why = _ways_to_compile(config, meta_model, device, job)
    config = dataclasses.replace(config, gradient_checkpointing=policies[0], compile=candidates[0])
    if device.type != "cuda":
        how = COMPILE_LABELS[config.compile] + (f" ({why})" if why else "")
        return config, f"Layers: {how}; gradient checkpointing: {config.gradient_checkpointing}{alone}"
    free_gb = job.free_gb if job and math.isfinite(job.free_gb) else torch.cuda.mem_get_info(device)[0] / 1e9
    # A smaller policy costs more than graphs gain, so all ways to compile come first.
    for policy, compile in itertools.product(policies, candidates):
        config = dataclasses.replace(config, compile=compile, gradient_checkpointing=policy)
        terms_gb = memory_terms(meta_model, targets, config, longest, job.ranks if job else 1)
        predicted_gb = sum(terms_gb.values())
        if predicted_gb < MARGIN * free_gb:
            break
    fits = "the fastest that fits" if predicted_gb < MARGIN * free_gb else "the smallest, which may not fit"
    if config.compile != candidates[0]:
        why = "graphs would need more memory"
    how = COMPILE_LABELS[config.compile] + (f" ({why})" if why else "")
    chosen = fits if len(policies) > 1 else "as asked"
    memory = f"{predicted_gb:.2f} GB predicted, {free_gb:.1f} free"
    line = f"Layers: {how}; gradient checkpointing: {config.gradient_checkpointing} ({chosen}: {memory})"
    terms = ", ".join(f"{name} {size:.2f}" for name, size in terms_gb.items() if size >= 0.005)
    return config, f"{line}\nMemory predicted, in GB: {terms}{alone}"


def _ways_to_compile(
    config: TrainConfig, meta_model: Any, device: torch.device, job: Job | None
) -> tuple[tuple[Compile, ...], str]:
    """Values of `compile` that may be chosen, the fastest first; and why there are no others, or nothing."""
    never = "layers in 8 bits run in bitsandbytes' own code" if config.quantization == "int8" else None
    if method := runs_as_peft_wrote_it(config):
        never = f"layers run as they are written with {method}"
    never = never or dropout_unavailable_reason(meta_model)
    if never and config.compile in ("layers", "graphs"):
        raise EnvironmentProblem(f"--compile {config.compile} cannot be used: {never}.", hint="Leave it out.")
    unavailable_reason = compile_unavailable_reason(meta_model, device) or never
    unrecorded = unavailable_reason or (
        "checkpoints go to the host"
        if config.offload_checkpoints
        else "layers are gathered as they run"
        if config.shard_base and (job is None or job.ranks > 1)
        else graphs_unavailable_reason(meta_model)
    )
    candidates: tuple[Compile, ...] = (config.compile,)
    why = "as asked"
    if config.compile == "auto":
        saved_s = math.inf if job is None or config.offload_checkpoints else seconds_saved(meta_model, job)
        if not unavailable_reason and saved_s < COMPILE_S:
            return ("none",), f"compiling takes about {COMPILE_S:.0f} s and would save {saved_s:.0f} s"
        candidates = ("none",) if unavailable_reason else ("layers",) if unrecorded else ("graphs", "layers")
        why = unrecorded or ""
    if candidates[0] == "graphs" and unrecorded:
        hint = "Pass --compile layers, and on resume --override shard_base compile." if config.shard_base else None
        raise EnvironmentProblem(
            f"--compile graphs cannot be used: {unrecorded}.", hint=hint or "Leave it out, or give another one."
        )
    if config.offload_checkpoints and candidates[0] != "layers":
        why = unavailable_reason or "asked or resumed"
        raise EnvironmentProblem(f"--offload-checkpoints needs --compile layers, and it is {candidates[0]}, as {why}.")
    return candidates, why


def _policies(config: TrainConfig, meta_model: Any, job: Job | None) -> tuple[GradientCheckpointing, ...]:
    """Those that may be chosen, the fastest first."""
    asked = config.gradient_checkpointing
    if runs_as_peft_wrote_it(config) == "PREFIX_TUNING":
        if asked in ("selective", "full"):
            raise ConfigError(
                f"--gradient-checkpointing {asked} cannot be used with PREFIX_TUNING: a layer that is computed again would "
                "find its keys and values in the cache twice.",
                hint="Leave it out.",
            )
        return ("none",)
    if any(isinstance(module, GradientCheckpointingLayer) for module in meta_model.modules()):
        return ("none", "selective", "full") if asked == "auto" else (asked,)
    if config.shard_base and (job is None or job.ranks > 1):
        raise ConfigError(
            f"--shard-base cannot be used: transformers does not mark the layers of {meta_model.config.model_type}.",
            hint="Leave it out.",
        )
    if config.gradient_checkpointing in ("selective", "full"):
        raise ConfigError(
            f"--gradient-checkpointing {config.gradient_checkpointing} cannot be used: transformers does not support "
            f"checkpointing the layers of {meta_model.config.model_type}.",
            hint="Leave it out.",
        )
    return ("none",)


def offloaded(hidden: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    """Within this, what autograd saves of `hidden` is saved in the host's memory, pinned, and brought back by backward.

    Both copies are made in the order of the stream: 0.5 ms for 25 MB, in the shadow of nothing, but no buffer is in the way.
    """
    place = hidden.data_ptr(), hidden.shape

    def pack(tensor: torch.Tensor) -> Any:
        if (tensor.data_ptr(), tensor.shape) != place:
            return tensor
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)  # [B, T, D]
        host.copy_(tensor, non_blocking=True)
        return host, tensor.device

    def unpack(saved: Any) -> torch.Tensor:
        return saved if isinstance(saved, torch.Tensor) else saved[0].to(saved[1], non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def compile_unavailable_reason(meta_model: Any, device: torch.device) -> str | None:
    """Why layers are not compiled unless it is asked for, or None.

    Args:
        meta_model: the base model without weights.
        device: where the model is to be.
    """
    if device.type != "cuda":
        return "there is no CUDA GPU"
    if reason := model_unavailable_reason(meta_model):
        return reason
    if not has_bf16(device):
        return "it needs a GPU with bf16 (compute capability 8.0)"
    if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        return "it needs a C compiler, and there is none"
    return None


def model_unavailable_reason(meta_model: Any) -> str | None:
    """Why the layers of a model are not compiled on any GPU, or None.

    Args:
        meta_model: the base model without weights.
    """
    kind = type(meta_model).__name__
    if not getattr(meta_model, "_can_compile_fullgraph", False):
        return f"transformers does not declare that {kind} compiles without graph breaks"
    if uncovered(meta_model).share > UNCOVERED_LIMIT:
        return f"transformers' own code runs the experts of {kind}"
    if problem := attention_use(meta_model).problem:
        return f"in {kind} {problem}"
    return dropout_unavailable_reason(meta_model)


def dropout_unavailable_reason(meta_model: Any) -> str | None:
    """Why a model whose own layers have dropout is never compiled, or None. (Adapters' dropout draws from seeds.)

    Where torch.compile recomputes dropout in backward, it draws from its own generator, which no seed of the loop reaches and
    which cannot be captured in a CUDA graph.

    Args:
        meta_model: the base model without weights.
    """
    rates = {getattr(meta_model.config.get_text_config(), "attention_dropout", 0.0) or 0.0}
    rates |= {module.p for module in meta_model.modules() if isinstance(module, torch.nn.Dropout)}
    if max(rates) > 0:
        return f"its layers have dropout of their own ({max(rates):g}), which compiled layers would not draw from the seed"
    return None


def _policy(config: TrainConfig, preserve_rng_state: bool = True) -> Run:
    """(layer, *its arguments) -> its output, keeping for backward what the policy says."""
    if config.gradient_checkpointing == "none" and config.compile == "none":
        return lambda layer, *args, **kwargs: type(layer).forward(layer, *args, **kwargs)
    keep = {"none": _keep_products, "selective": _keep_attention, "full": None}[config.gradient_checkpointing]
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": preserve_rng_state}
    if keep is not None:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, keep)
        options["context_fn"].cache_hash = keep.__name__  # lets torch cache what it traces; see compile_cache
    return lambda layer, *args, **kwargs: checkpoint(type(layer).forward, layer, *args, **options, **kwargs)


class TrainingLayer(torch.nn.Module):
    """A decoder layer as it runs in training: compiled, and with its activations kept or recomputed.

    It replaces the layer while the decoder runs; the layer itself is not changed. Hooks on the layer do not run.
    """

    def __init__(self, layer: torch.nn.Module, run: Run, compiled: Run | None, config: TrainConfig) -> None:
        """Wrap a layer.

        Args:
            layer: of transformers.
            run: (layer, *its arguments) -> its output, under the policy of `config`.
            compiled: the same, compiled; None where it is not.
            config: resolved; offload_checkpoints and the longest row are read.
        """
        super().__init__()
        self._layer = layer
        self._shard = shard_of(layer)
        self._run = run
        self._compiled = compiled
        self._config = config

    def __getattr__(self, name: str) -> Any:
        """Some decoders ask their layers which kind of attention they have."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("_layer"), name)

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[B, T, D] -> [B, T, D]."""
        if self._shard is not None:
            self._shard.before_forward()
        if self._compiled is None:
            output = self._run(self._layer, hidden, *args, **kwargs)  # [B, T, D]
            return output if self._shard is None else self._shard.before_backward(output)
        if torch.is_grad_enabled() and not hidden.requires_grad:
            # The first layer. As the others, or it would be compiled on its own; the gradient that nobody reads is one product.
            hidden = hidden.detach().requires_grad_()  # [B, T, D]
        # One compilation for all lengths: without a word here, each new one would begin another.
        for tensor in (hidden, kwargs.get("position_ids"), *kwargs.get("position_embeddings", ())):
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 1)  # T of [B, T, ...]
        if kwargs.get("attention_mask") is not None:
            torch._dynamo.maybe_mark_dynamic(kwargs["attention_mask"], (2, 3))  # T and T of [B, 1, T, T]
        if kwargs.get("cu_seq_lens_q") is not None:
            for name in ("cu_seq_lens_q", "cu_seq_lens_k"):  # usually one tensor
                torch._dynamo.maybe_mark_dynamic(kwargs[name], 0)  # S + 1
            bound = self._config.max_length + self._config.length_multiple  # does as well, and stays the same
            kwargs |= {"max_length_q": bound, "max_length_k": bound}
        try:
            with offloaded(hidden) if self._config.offload_checkpoints else contextlib.nullcontext():
                output = self._compiled(self._layer, hidden, *args, **kwargs)  # [B, T, D]
        except COMPILE_ERRORS as error:
            kind = type(self._layer).__name__
            raise EnvironmentProblem(
                f"{kind} could not be compiled.",
                hint=(
                    f"Pass --compile none, which runs it as it is written, but slower. ({' '.join(str(error).split())[:300]})"
                ),
            ) from error
        return output if self._shard is None else self._shard.before_backward(output)


def training_layers(decoder: Any, config: TrainConfig, backend: str) -> list[tuple[torch.nn.Module, str, TrainingLayer]]:
    """The layers of a decoder as they run in training, each with the module that holds it and its name there.

    Args:
        decoder: of a model with adapters; it is not changed.
        config: resolved; gradient_checkpointing and compile are read.
        backend: of torch.compile.
    """
    run, compiled = _policy(config), None
    if config.compile != "none":
        # Its dropout is drawn from seeds, and what torch 2.11 makes of torch's own with dynamic lengths cannot be compiled.
        compiled = torch.compile(_policy(config, preserve_rng_state=False), fullgraph=True, backend=backend)
    return [(parent, name, TrainingLayer(layer, run, compiled, config)) for parent, name, layer in outermost_layers(decoder)]
