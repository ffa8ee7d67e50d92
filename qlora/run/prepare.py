"""All about a run that can fail without the model's weights: options, data, tokenizer, targets, memory, disk."""

import dataclasses
import os
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from rich.console import Console

from qlora import distributed, terminal
from qlora.config import Precision, TrainConfig
from qlora.data.batch import count_steps, epoch_rows, longest_rows, row_length
from qlora.data.dataset import TokenizedDataset, check_files, encode_files
from qlora.data.template import PromptTemplate, load_template
from qlora.distributed import Ranks
from qlora.errors import ConfigError, EnvironmentProblem
from qlora.model.attention import Attention, choose_attention
from qlora.model.demo import model_source
from qlora.model.families import mixed_rotation
from qlora.model.load import load_meta_model, load_tokenizer
from qlora.model.lora import checked_targets, with_init_adapter
from qlora.model.peft_config import peft_settings, virtual_tokens, with_peft_config
from qlora.model.precision import compute_dtype
from qlora.model.targets import Target
from qlora.run import log
from qlora.run.environment import environment
from qlora.run.folder import RunFolder
from qlora.run.schema import FORMAT, DataCounts, Environment, RunConfig, RunInfo
from qlora.speed import compile_cache
from qlora.speed.layers import Job, choose_layers
from qlora.speed.memory import leave_no_gaps, memory_terms


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a run needs to know before its weights are loaded."""

    config: TrainConfig  # resolved: nothing is auto
    device: torch.device
    source: str  # of the base model: a folder or a hub id
    attention: Attention
    targets: list[Target]  # layers that get an adapter
    template: PromptTemplate  # how prompts and answers become ids
    train_set: TokenizedDataset
    eval_set: TokenizedDataset | None
    longest: int  # tokens of the longest row
    predicted_gb: float  # peak memory in training

    @property
    def learning_rate(self) -> float:
        """The peak of the schedule."""
        assert self.config.learning_rate is not None  # as resolved
        return self.config.learning_rate


def set_up_torch(config: TrainConfig) -> torch.device:
    """Switch on what must be on before CUDA starts, and choose the device: this rank's GPU if there is one.

    Raises:
        EnvironmentProblem: if torchrun has started more processes on this machine than it has GPUs.
    """
    torch.use_deterministic_algorithms(config.deterministic)
    leave_no_gaps()
    if config.deterministic:  # read when CUDA starts, and by flash attention's backward
        os.environ |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FLASH_ATTENTION_DETERMINISTIC": "1"}
    if not torch.cuda.is_available():
        return torch.device("cpu")
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    local, count = 0 if alone else int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if count == 1:  # as where each process is shown a GPU of its own
        local = 0
    if local >= count:
        raise EnvironmentProblem(
            f"This is process {local + 1} on a machine with {count} GPUs.", hint=f"Pass torchrun --nproc-per-node {count}."
        )
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device


def resolve(config: TrainConfig, device: torch.device, say: Callable[[str], None]) -> TrainConfig:
    """The configuration with what follows from the machine, and from `--init-adapter` or `--peft-config`.

    Raises:
        UserError: exit 2 or 7 for what this machine cannot do.
    """
    resolved, line = with_peft_config(with_init_adapter(config)).resolved(on_gpu=device.type == "cuda")
    say(line)
    choose_attention(resolved, device)
    return resolved


def prepare_everywhere(
    config: TrainConfig, device: torch.device, run: RunFolder, console: Console, ranks: Ranks
) -> Prepared | None:
    """`prepare` on the first rank, then on the others.

    Raises:
        UserError: as `prepare`; or if the ranks see other options, data or checkpoints.
    """
    prep = distributed.in_turn(lambda: prepare(config, device, run, console, ranks))
    facts: dict[str, Any] = {"run folder": (run.step, prep is None)}
    if prep is not None:
        sets = [each and each.sha256 for each in (prep.train_set, prep.eval_set)]
        facts |= {"options": prep.config.plain(), "training data": sets[0], "eval data": sets[1], "model": str(prep.targets)}
    theirs = distributed.by_first(lambda: facts)
    different = [name for name, value in facts.items() if theirs.get(name) != value]
    if distributed.largest(len(different)):
        seen = f"This process has other {', '.join(different)} than the first" if different else "Another process differs"
        raise ConfigError(f"{seen}.", hint="All of them need the same options, and see the same files and run folder.")
    return prep


def prepare(
    config: TrainConfig,
    device: torch.device,
    run: RunFolder,
    console: Console,
    ranks: Ranks = Ranks(),  # noqa: B008  a tuple
) -> Prepared | None:
    """Check everything that needs no weights, from what is cheapest to what is dearest. Nothing on disk changes.

    Args:
        config: from `resolve`. What is `auto` stays what it was when the run began.
        device: where the model will be.
        run: the run folder.
        console: for what was found and chosen.
        ranks: how many share the work, and the memory of the GPU that has the least.

    Returns: None if the folder holds this run and it is complete. Raises UserError with the exit code of its kind.
    """
    assert config.model is not None  # as resolved
    say = partial(terminal.say, console)
    columns = check_files(config)
    source = model_source(config.model)
    config = with_precision(run.as_before(config), device, say)
    meta_model = load_meta_model(source, config)
    attention = choose_attention(config, device, meta_model)
    config = dataclasses.replace(config, attn_implementation=attention.implementation)
    say(f"Attention: {attention.implementation} ({attention.reason})")
    targets = checked_targets(meta_model, config, say)
    console.print(log.targets_table(targets, meta_model.num_parameters()))
    template = load_template(load_tokenizer(source, meta_model, config), config.prompt_format, run.date)
    train_set, eval_set = encode_files(config, columns, template, console)
    longest = row_length(train_set, longest_rows(train_set, config)[-1])
    job, total_steps = _job(config, train_set, ranks)
    config, line = choose_layers(config, meta_model, targets, virtual_tokens(config) + longest, device, job)
    terms_gb = memory_terms(meta_model, targets, config, virtual_tokens(config) + longest, ranks.size)
    info = RunInfo(
        format=FORMAT,
        config=cast(RunConfig, config.plain()),
        data=train_set.sha256,
        eval_data=eval_set.sha256 if eval_set else None,
        targets=sorted(f"{target.name} x {len(target.layers)}" if target.layers else target.name for target in targets),
        device=device.type,
        environment=Environment(**environment(device)),
        parameters=meta_model.num_parameters(),
        date=template.date,
        counts=cast(list[DataCounts | None], [train_set.counts, eval_set.counts if eval_set else None]),
        total_steps=total_steps,
        history=[],
        origin=None,
        predicted_gb=sum(terms_gb.values()),
        predicted_terms_gb=terms_gb,
        peft_config=peft_settings(config),
    )
    if not run.accept(config, info):
        return None
    run.require_space(sum(target.adapter_parameters for target in targets), config.save_total_limit)
    uncached = compile_cache.use(config.compile_cache) if config.compile != "none" else None
    rotation = mixed_rotation(meta_model.config, train_set.lengths, virtual_tokens(config))
    say("\n".join(filter(None, [line, uncached, rotation, *run.notes])))
    return Prepared(config, device, source, attention, targets, template, train_set, eval_set, longest, sum(terms_gb.values()))


def with_precision(config: TrainConfig, device: torch.device, say: Callable[[str], None]) -> TrainConfig:
    """The configuration with `precision` resolved, which is said if it is not bf16."""
    precision: Precision = "fp16" if compute_dtype(config, device) == torch.float16 else "bf16"
    if precision == "fp16":
        say(f"Precision: fp16 ({'as asked' if config.precision == 'fp16' else 'this GPU has no bf16'})")
    return dataclasses.replace(config, precision=precision)


def _job(config: TrainConfig, train_set: TokenizedDataset, ranks: Ranks) -> tuple[Job, int]:
    """How much is trained, whoever computes it, and in how many steps."""
    rows = len(epoch_rows(train_set, config, 1))
    steps_per_epoch, total_steps = count_steps(config, rows)
    epochs = total_steps / steps_per_epoch
    micro_batches, tokens = rows / config.per_device_train_batch_size * epochs, sum(train_set.lengths) * epochs
    return Job(micro_batches, tokens, ranks.free_gb, ranks.size), total_steps
