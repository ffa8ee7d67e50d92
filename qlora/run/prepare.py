"""All about a run that can fail without the model's weights: options, data, tokenizer, targets, memory, disk."""

import dataclasses
import os
from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from rich.console import Console

from qlora import terminal
from qlora.config import TrainConfig
from qlora.data.batch import count_steps, epoch_rows, longest_rows, row_length
from qlora.data.dataset import TokenizedDataset, check_files, encode_files
from qlora.data.template import PromptTemplate, load_template
from qlora.model.attention import Attention, choose_attention
from qlora.model.demo import model_source
from qlora.model.load import load_meta_model, load_tokenizer
from qlora.model.lora import Target, checked_targets, with_init_adapter
from qlora.run import log
from qlora.run.environment import environment
from qlora.run.folder import RunFolder
from qlora.run.schema import DataCounts, Environment, RunConfig, RunInfo
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
    """Switch on what must be on before CUDA starts, and choose the device: the first GPU if there is one."""
    torch.use_deterministic_algorithms(config.deterministic)
    leave_no_gaps()
    if config.deterministic:  # read when CUDA starts, and by flash attention's backward
        os.environ |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FLASH_ATTENTION_DETERMINISTIC": "1"}
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def resolve(config: TrainConfig, device: torch.device, say: Callable[[str], None]) -> TrainConfig:
    """The configuration with what follows from the machine and from `--init-adapter`.

    Raises:
        UserError: exit 2 or 7 for what this machine cannot do.
    """
    resolved, line = with_init_adapter(config).resolved(on_gpu=device.type == "cuda")
    say(line)
    choose_attention(resolved, device)
    return resolved


def prepare(config: TrainConfig, device: torch.device, run: RunFolder, console: Console) -> Prepared | None:
    """Check everything that needs no weights, from what is cheapest to what is dearest. Nothing on disk changes.

    Args:
        config: from `resolve`.
        device: where the model will be.
        run: the run folder; what is `auto` stays what it was when the run began.
        console: for what was found and chosen.

    Returns:
        None if the folder holds this run and it is complete.

    Raises:
        UserError: with the exit code of its kind.
    """
    assert config.model is not None  # as resolved
    say = partial(terminal.say, console)
    columns = check_files(config)
    source = model_source(config.model)
    config = run.as_before(config)
    meta_model = load_meta_model(source, config)
    attention = choose_attention(config, device, meta_model)
    config = dataclasses.replace(config, attn_implementation=attention.implementation)
    say(f"Attention: {attention.implementation} ({attention.reason})")
    targets = checked_targets(meta_model, config, say)
    console.print(log.targets_table(targets, meta_model.num_parameters()))
    template = load_template(load_tokenizer(source, meta_model, config), config.prompt_format, run.date)
    train_set, eval_set = encode_files(config, columns, template, console)
    longest = row_length(train_set, longest_rows(train_set, config)[-1])
    rows = len(epoch_rows(train_set, config, 1))
    steps_per_epoch, total_steps = count_steps(config, rows)
    epochs = total_steps / steps_per_epoch
    job = Job(rows / config.per_device_train_batch_size * epochs, sum(train_set.lengths) * epochs)
    config, line = choose_layers(config, meta_model, targets, longest, device, job)
    if config.compile != "none":
        compile_cache.use(config.compile_cache)
    terms_gb = memory_terms(meta_model, targets, config, longest)
    info = RunInfo(
        config=cast(RunConfig, config.plain()),
        data=train_set.sha256,
        eval_data=eval_set.sha256 if eval_set else None,
        targets=sorted(f"{target.name} x {len(target.layers)}" for target in targets),
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
    )
    if not run.accept(config, info):
        return None
    say(line)
    run.require_space(sum(target.adapter_parameters for target in targets), config.save_total_limit)
    for note in run.notes:
        say(note)
    return Prepared(config, device, source, attention, targets, template, train_set, eval_set, longest, sum(terms_gb.values()))
