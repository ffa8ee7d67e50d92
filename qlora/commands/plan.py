"""`python -m qlora plan`: what a run needs of a GPU's memory, from the model's shape alone, and how to make it fit."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import transformers
from rich.console import Console
from rich.table import Table

from qlora.commands.options import PlanOptions, refuse_below
from qlora.config import Compile, GradientCheckpointing, TrainConfig
from qlora.errors import ConfigError
from qlora.model.coverage import UNCOVERED_LIMIT, uncovered
from qlora.model.demo import model_source
from qlora.model.load import load_meta_model
from qlora.model.targets import Target, audit_targets
from qlora.run.files import require_writable, write_file
from qlora.speed.graphs import graphs_unavailable_reason
from qlora.speed.layers import MARGIN, model_unavailable_reason
from qlora.speed.memory import LEAST_LENGTH, LEAST_RANK, memory_terms, settings_to_try
from qlora.speed.scaling import StepTime, reduced_bytes, step_time

SHAPES: dict[str, dict[str, Any]] = {  # arguments of transformers' Phi3Config, whose own defaults are Phi-3-mini
    "phi3-mini": {"sliding_window": 2047},
    "phi3-medium": {
        "hidden_size": 5120,
        "intermediate_size": 17920,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 10,
        "sliding_window": 2047,
    },
    "demo": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
}
DEFAULT_SHAPE = "phi3-mini"
POLICIES: tuple[GradientCheckpointing, ...] = ("none", "selective", "full")
CONTEXT_GB = 0.54  # of CUDA and cuBLAS, which torch does not count


class Plan(NamedTuple):
    """Settings, and the memory that they are predicted to need, in GB by term; on several GPUs, the time of a step."""

    config: TrainConfig
    terms_gb: dict[str, float]
    time: StepTime | None = None

    @property
    def total_gb(self) -> float:
        """The sum of all terms."""
        return sum(self.terms_gb.values())

    def fits(self, free_gb: float) -> bool:
        """Whether it is below what training itself would take for safe."""
        return self.total_gb < MARGIN * free_gb


def run(options: PlanOptions) -> int:
    """Print a table of terms, a column for each policy, and what fits or would.

    Raises:
        UserError: exit 2 for values that no run could use, 7 if the model's configuration cannot be read.
    """
    refuse_below(1, options, "max_length", "per_device_train_batch_size", "lora_r", "gpus", "gradient_accumulation_steps")
    if not options.interconnect > 0:
        raise ConfigError(f"--interconnect {options.interconnect:g} cannot be used: it must be above 0.")
    if options.json is not None:
        require_writable(options.json)
    config = configuration(options)
    meta_model = shape_meta_model(options, config)
    config, note = as_compiled(meta_model, options, config)
    targets = audit_targets(meta_model, config)
    free_gb, card = _free(options.gpu_memory)
    tried = POLICIES if options.gradient_checkpointing == "auto" else (options.gradient_checkpointing,)
    changed = (dataclasses.replace(config, gradient_checkpointing=policy) for policy in tried)
    plans = [planned(meta_model, each) for each in changed]
    console = Console()
    what = options.model or options.shape or DEFAULT_SHAPE
    console.print(terms_table(f"{what}: {config.per_device_train_batch_size} x {config.max_length} tokens", plans))
    trained = sum(target.adapter_parameters for target in targets)
    if note:
        console.print(note)
    console.print(f"Rank {config.lora_r}: {trained:,} parameters trained of {meta_model.num_parameters() + trained:,}.")
    if (rest := uncovered(meta_model)).share > UNCOVERED_LIMIT:
        console.print(f"Warning: {rest}. Training refuses such a model unless --target-modules names the layers to adapt.")
    several = list(plans_on_several(meta_model, [plan.config for plan in plans], options)) if options.gpus > 1 else []
    if several:
        console.print(several_table(several, options))
        sent = 2 * (options.gpus - 1) / options.gpus * reduced_bytes(targets) / 1e9
        console.print(f"To sum the gradients each GPU sends {sent:.2f} GB per step, at {options.interconnect:g} GB/s.")
    steps: list[tuple[str, Plan]] = []
    if free_gb is not None:
        candidates = [*plans, *(plan for plan in several if plan.config.shard_base)]
        fitting = [plan for plan in candidates if plan.fits(free_gb)]
        console.print(f"{card}. We plan for at most {MARGIN * free_gb:.2f} GB.")
        if fitting:
            console.print(f"It fits with {flags(fitting[0].config)}, the fastest of these that does.")
        else:
            smallest = dataclasses.replace(candidates[-1].config, gradient_accumulation_steps=step_micro_batches(options))
            steps = list(steps_down(meta_model, smallest, free_gb, options.gpus))
            if smallest.shard_base:
                steps = [("--shard-base", planned(meta_model, smallest, options.gpus)), *steps]
            console.print(ways_table(steps, free_gb))
            if not steps or not steps[-1][1].fits(free_gb):
                least = f"down to {LEAST_LENGTH} tokens and rank {LEAST_RANK}"
                console.print(f"No setting, {least}, makes it fit; use a smaller model or a larger card.")
    if options.json is not None:
        record = _record(what, free_gb, plans, steps)
        if several:
            record["gpus"], record["interconnect_gb_per_s"] = options.gpus, options.interconnect
            record["several"] = [_several_row(plan, options) for plan in several]
        write_file(options.json, json.dumps(record, indent=1).encode() + b"\n")
    return 0


def configuration(options: PlanOptions) -> TrainConfig:
    """The training configuration whose memory is predicted, its policy still open if that is auto.

    Raises:
        ConfigError: for options that exclude each other.
    """
    if options.model is not None and options.shape is not None:
        raise ConfigError(f"--model {options.model} and --shape {options.shape} were both given.", hint="Keep one of them.")
    asked = dataclasses.asdict(options)
    shared = {field.name for field in dataclasses.fields(TrainConfig)} & set(asked)
    config = TrainConfig(**{name: asked[name] for name in shared if asked[name] is not None})
    if config.quantization == "int8" and config.compile in ("layers", "graphs"):
        raise ConfigError(f"--compile {config.compile} cannot be used: layers in 8 bits are never compiled.")
    if config.compile == "auto":
        compiled: Compile = "layers" if config.offload_checkpoints else "graphs"
        config = dataclasses.replace(config, compile="none" if config.quantization == "int8" else compiled)
    if config.offload_checkpoints and config.compile != "layers":
        raise ConfigError(f"--offload-checkpoints needs --compile layers, not {config.compile}.")
    config.resolved(on_gpu=True)  # refuses what training refuses
    return config


def as_compiled(meta_model: Any, options: PlanOptions, config: TrainConfig) -> tuple[TrainConfig, str]:
    """The configuration as training compiles this model, where --compile is auto; and the reason if it is without graphs."""
    if options.compile != "auto" or config.compile == "none":
        return config, ""
    if reason := model_unavailable_reason(meta_model):
        return dataclasses.replace(config, compile="none"), f"Layers run as written: {reason}."
    if config.compile == "graphs" and (reason := graphs_unavailable_reason(meta_model)):
        return dataclasses.replace(config, compile="layers"), f"Layers are compiled; {reason}."
    return config, ""


def shape_meta_model(options: PlanOptions, config: TrainConfig) -> Any:
    """The model on the meta device: one of the built-in shapes, or that of a hub id or folder."""
    if options.model is not None:
        return load_meta_model(model_source(options.model), config)
    name = options.shape or DEFAULT_SHAPE
    shape = transformers.Phi3Config(**SHAPES[name], pad_token_id=0)
    if config.max_length > shape.max_position_embeddings:
        raise ConfigError(
            f"--max-length {config.max_length} is more than the {shape.max_position_embeddings} positions of {name}.",
        )
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16, attn_implementation="eager")


def planned(meta_model: Any, config: TrainConfig, gpus: int = 1) -> Plan:
    """The memory of rows of --max-length tokens, on each of the GPUs."""
    targets: list[Target] = audit_targets(meta_model, config)
    return Plan(config, memory_terms(meta_model, targets, config, config.max_length, gpus))


def plans_on_several(meta_model: Any, configs: list[TrainConfig], options: PlanOptions) -> Iterator[Plan]:
    """Each setting on --gpus GPUs: with the whole base on each, and with --shard-base, if that goes with the setting."""
    for config in configs:
        for shard_base in (False, True) if not config.cache_dequantized else (False,):
            compiled = dataclasses.replace(config, compile="layers") if config.compile == "graphs" and shard_base else config
            of_each = -(-step_micro_batches(options) // options.gpus)  # the GPU that has the most
            each = dataclasses.replace(compiled, shard_base=shard_base, gradient_accumulation_steps=of_each)
            targets = audit_targets(meta_model, each)
            tokens = each.per_device_train_batch_size * each.max_length
            time = step_time(meta_model, targets, each, tokens, options.gpus, options.interconnect)
            yield Plan(each, memory_terms(meta_model, targets, each, each.max_length, options.gpus), time)


def step_micro_batches(options: PlanOptions) -> int:
    """Of all GPUs together."""
    return options.gradient_accumulation_steps or 2 * options.gpus


def _several_row(plan: Plan, options: PlanOptions) -> dict[str, Any]:
    """What the table shows, in GB, ms and tokens/s of all GPUs together."""
    assert plan.time is not None  # as plans_on_several makes them
    config, time = plan.config, plan.time
    tokens = step_micro_batches(options) * config.per_device_train_batch_size * config.max_length
    times = {name.replace("_s", "_ms"): 1000 * value for name, value in time._asdict().items()}
    return {
        "shard_base": config.shard_base, "gradient_checkpointing": config.gradient_checkpointing, "compile": config.compile,
        "peak_gb": plan.total_gb, **times, "step_ms": 1000 * time.total_s, "tokens_per_s": tokens / time.total_s,
        "efficiency": time.efficiency,
    }  # fmt: skip


def several_table(plans: list[Plan], options: PlanOptions) -> Table:
    """A row for each setting on several GPUs."""
    caption = "Memory per GPU; times in ms, of an H100 with compiled layers. eff.: the share of a step spent computing."
    table = Table(title=f"On {options.gpus} GPUs", caption=caption)
    table.add_column("base")
    table.add_column("policy")
    for header in ("GB", "compute", "sum", "gather", "step", "tokens/s", "eff."):
        table.add_column(header, justify="right")
    for plan in plans:
        row = _several_row(plan, options)
        names = ("compute_ms", "reduce_ms", "gather_ms", "step_ms")
        times = [f"{row[name]:.0f}" if row[name] >= 100 else f"{row[name]:.1f}" for name in names]
        cells = [f"{row['peak_gb']:.1f}", *times, f"{row['tokens_per_s']:,.0f}"]
        base = "parts" if row["shard_base"] else "whole"
        table.add_row(base, row["gradient_checkpointing"], *cells, f"{row['efficiency']:.1%}")
    return table


def steps_down(meta_model: Any, config: TrainConfig, free_gb: float, gpus: int = 1) -> Iterator[tuple[str, Plan]]:
    """What to change, one after the other, until it fits: the largest saving first, what changes the training last."""
    plan = planned(meta_model, config, gpus)
    while not plan.fits(free_gb):
        settings = settings_to_try(plan.config, plan.config.max_length)
        tried = [(each, planned(meta_model, dataclasses.replace(plan.config, **each.changes), gpus)) for each in settings]
        saving = [(each, then) for each, then in tried if then.total_gb < plan.total_gb]
        if not saving:
            return
        setting, plan = min(saving, key=lambda pair: (not pair[0].same_training, pair[1].total_gb))
        yield setting.flags, plan


def flags(config: TrainConfig) -> str:
    """What of the command line chooses between speed and memory."""
    names = ("gradient_checkpointing", "compile")
    shared = "--shard-base " if config.shard_base else ""
    return shared + " ".join(f"--{name.replace('_', '-')} {getattr(config, name)}" for name in names)


def terms_table(title: str, plans: list[Plan]) -> Table:
    """A row for each term, a column for each policy, in GB; terms that are nothing everywhere are left out."""
    table = Table(title=title, caption="Predicted, in GB. The CUDA context needs about 0.5 GB more.")
    table.add_column(f"--compile {plans[0].config.compile}")
    for plan in plans:
        table.add_column(plan.config.gradient_checkpointing, justify="right")
    for term in plans[0].terms_gb:
        sizes = [plan.terms_gb[term] for plan in plans]
        if any(sizes):
            table.add_row(term, *(f"{size:.2f}" for size in sizes))
    table.add_section()
    table.add_row("peak", *(f"{plan.total_gb:.2f}" for plan in plans), style="bold")
    return table


def ways_table(steps: list[tuple[str, Plan]], free_gb: float) -> Table:
    """Each change on top of those above it, and the peak that is then predicted."""
    table = Table(title="To make it fit, one after the other")
    table.add_column("change")
    table.add_column("peak GB", justify="right")
    table.add_column("")
    for words, plan in steps:
        table.add_row(words, f"{plan.total_gb:.2f}", "fits" if plan.fits(free_gb) else "")
    return table


def card_free_gb(gpu_memory: float) -> float:
    """Memory that a run may use, in GB, of a card sold as one of `gpu_memory` GB; it has at least as many times 1e9 bytes."""
    return max(gpu_memory - CONTEXT_GB, 0.0)


def _free(gpu_memory: float | None) -> tuple[float | None, str]:
    """Memory that a run may use, in GB, and whose it is."""
    if gpu_memory is not None:
        if not gpu_memory > 0:
            raise ConfigError(f"--gpu-memory {gpu_memory:g} cannot be used: it must be above 0.")
        return card_free_gb(gpu_memory), f"A card of {gpu_memory:g} GB"
    if not torch.cuda.is_available():
        return None, ""
    return torch.cuda.mem_get_info()[0] / 1e9, torch.cuda.get_device_name()


def _record(what: str, free_gb: float | None, plans: list[Plan], steps: list[tuple[str, Plan]]) -> dict[str, Any]:
    def row(plan: Plan) -> dict[str, Any]:
        chosen = {name: getattr(plan.config, name) for name in ("gradient_checkpointing", "compile")}
        return {**chosen, "terms_gb": plan.terms_gb, "total_gb": plan.total_gb}

    changes = [{"change": words, **row(plan)} for words, plan in steps]
    return {"model": what, "free_gb": free_gb, "policies": [row(plan) for plan in plans], "changes": changes}
