"""QLoRA fine-tuning in a plain PyTorch loop, to be read from top to bottom and edited.

    python train_loop.py                                        # a 135M demo model on a CPU, Phi-3-mini on a GPU
    python train_loop.py --train-file my.jsonl --eval-file held_out.jsonl
    python train_loop.py --help

A run that stopped, for whatever reason, goes on where it was with the same command.

Words: a *step* is one optimizer step; a *micro-batch* is one forward and backward; a *window* is the micro-batches of one
step; a *token* is a label that is trained, counted after the shift by one.
Shapes: B samples, T positions, D hidden size. `qlora/` holds the rest: data, model, loss, checkpoints.
"""

if __name__ == "__main__":  # Parse first: --help and a typo should not wait for torch and transformers to be imported.
    from qlora.cli import train as command_line

    raise SystemExit(command_line())  # it imports this file again, as a module

import dataclasses
import functools
import itertools
import math
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console

from qlora.config import TrainConfig
from qlora.data.batch import Batch, epoch_rows, longest_rows, micro_batches, row_length, training_batches, windows
from qlora.data.dataset import Samples, check_files, encode_files, first_examples
from qlora.data.template import Format, read_format
from qlora.eval.generate import try_samples
from qlora.eval.loss import evaluate_loss
from qlora.model import attention
from qlora.model.demo import model_source
from qlora.model.load import fingerprint, load_nf4_model, load_skeleton, load_tokenizer
from qlora.model.lora import add_adapters, checked_targets, with_init_adapter
from qlora.model.loss import read_head, token_loss_sum
from qlora.model.optimizer import build_optimizer
from qlora.model.random_state import seed_generators
from qlora.report.html import after_training, when_complete
from qlora.run import checkpoint, environment, explain, log
from qlora.run.files import write_folder
from qlora.run.folder import RunFolder
from qlora.run.guards import check_first_gradients, count_not_finite
from qlora.run.signals import Signals
from qlora.speed.layers import choose_layers, free_training_memory, prepare_layers
from qlora.speed.memory import explained, leave_no_gaps, memory_terms, peak_memory_gib, probe_memory

LossSum = Callable[[torch.Tensor, Batch], torch.Tensor]  # (hidden [B, T, D], batch) -> fp32 scalar, a sum over tokens


def lr_multiplier(step: int, warmup_steps: int, total_steps: int) -> float:
    """Share of the peak learning rate for update `step` (from 0): linear warmup, then half a cosine.

    The first update already moves: transformers' schedule starts at k / warmup and wastes update 0 on a rate of zero.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def train_step(
    decoder: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    window: list[Batch],
    loss_sum: LossSum,
    learning_rate: float,
    max_grad_norm: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step over the micro-batches of a window, as if they were one batch.

    Args:
        decoder: maps ids [B, T] to hidden states [B, T, D], without the head; adapters inside.
        optimizer: over the adapters alone.
        window: micro-batches on the CPU, pinned if the decoder is on a GPU.
        loss_sum: sum of token losses of a micro-batch; a test may pass the plain head.
        learning_rate: of this step.
        max_grad_norm: clip to this norm; None leaves gradients as they are.

    Returns:
        Mean loss of a token in the window, and the gradient norm before clipping: fp32 scalars still on the device.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    device = parameters[0].device
    # Divide by the tokens of the whole window, never by the number of micro-batches: a mean of means weighs tokens of
    # short answers more, and is off by a factor of 1.4 in the gradient for answers of 12 and 100 tokens.
    num_tokens = sum(micro_batch.num_tokens for micro_batch in window)
    loss = torch.zeros((), device=device)  # []
    optimizer.zero_grad(set_to_none=True)  # the last step's, which stayed until now so that they could be looked at
    for micro_batch in window:
        batch = micro_batch.to(device)
        # Autocast runs matrix products in bf16 and casts the fp32 adapters on the fly; norms and the loss stay in fp32.
        with torch.autocast(device.type, torch.bfloat16):
            inputs = attention.decoder_inputs(batch, decoder.config)  # the ids, and what keeps samples of a row apart
            hidden = decoder(**inputs, use_cache=False).last_hidden_state  # [B, T, D]
            micro_loss = loss_sum(hidden, batch) / num_tokens  # []
        micro_loss.backward()  # adds to the gradients of the window's earlier micro-batches
        loss += micro_loss.detach()
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf if max_grad_norm is None else max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    # A NaN or infinity must not reach the weights. A fused optimizer skips its update where found_inf is 1, on the device;
    # for any other the host has to look, and wait.
    finite = torch.isfinite(loss) & torch.isfinite(grad_norm)  # []
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)
    if fused:
        optimizer.found_inf = 1.0 - finite.float()  # type: ignore[attr-defined]
    if fused or finite.item():  # sync, unless it is fused
        optimizer.step()
    return loss, grad_norm


def count_steps(config: TrainConfig, num_rows: int) -> tuple[int, int]:
    """Optimizer steps of an epoch, whose short last window is a step too, and of the whole run."""
    num_micro_batches = math.ceil(num_rows / config.per_device_train_batch_size)
    steps_per_epoch = math.ceil(num_micro_batches / config.gradient_accumulation_steps)
    return steps_per_epoch, config.max_steps or config.num_train_epochs * steps_per_epoch


def train(
    config: TrainConfig,
    model: Any,
    optimizer: torch.optim.Optimizer,
    loss_sum: LossSum,
    samples: Samples,
    held_out: Samples | None,
    progress: checkpoint.Progress,
    tracker: log.Tracker,
    run: RunFolder,
    stop: Signals,
) -> None:
    """The whole run, or the rest of it: epochs of windows, a log line every few steps, an evaluation each epoch.

    Args:
        config: resolved.
        model: NF4 base with adapters.
        optimizer: over the adapters.
        loss_sum: sum of token losses of a micro-batch, from its last hidden states.
        samples: to train on, one at least.
        held_out: to evaluate on, if there is any.
        progress: where the run is; model, optimizer and generators are in that state.
        tracker: where metrics go.
        run: where checkpoints go.
        stop: whether a signal has come; the step at hand is finished and saved first.

    Raises:
        UserError: exit 5 if the first step finds an adapter without a gradient, or if a loss or norm is not finite.
        Stopped: after a signal, when all is saved.
    """
    assert config.learning_rate is not None  # as resolved
    decoder, device = model.get_decoder(), model.device
    on_gpu = device.type == "cuda"
    batch_size, window_size = config.per_device_train_batch_size, config.gradient_accumulation_steps
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    steps_per_epoch, total_steps = count_steps(config, len(epoch_rows(samples, config, 1)))
    warmup_steps = math.ceil(config.warmup_ratio * total_steps)
    save_steps = config.save_steps or total_steps

    def evaluate_held_out(step: int, epoch: int) -> None:
        if held_out is None or step in tracker.evaluations:  # a run that goes on after this step may know it already
            return
        with stop.immediate():  # all is saved
            batches = micro_batches(held_out, range(len(held_out)), batch_size, pin=on_gpu)
            result = evaluate_loss(model, batches, loss_sum)
        tracker.held_out(step, epoch, result)

    step, first_epoch, seen, skipped = progress
    tracker.begin(step, total_steps, config.logging_steps)
    run.prune(config.save_total_limit, tracker.evaluations)  # which a process that died after its save has not done
    model.train()
    with stop.deferred():
        if step == 0:
            evaluate_held_out(0, 0)
        pending: list[dict[str, Any]] = []  # steps not yet read from the device
        recent: list[dict[str, Any]] = []  # the last that were
        since = time.perf_counter()
        for epoch in range(first_epoch, math.ceil(total_steps / steps_per_epoch) + 1):
            rows_left = epoch_rows(samples, config, epoch)[seen:]
            batches = training_batches(samples, rows_left, config, pin=on_gpu)
            for window in itertools.islice(windows(batches, window_size), total_steps - step):
                learning_rate = config.learning_rate * lr_multiplier(step, warmup_steps, total_steps)
                loss, grad_norm = train_step(decoder, optimizer, window, loss_sum, learning_rate, config.max_grad_norm)
                step += 1
                row: dict[str, Any] = {"step": step, "epoch": epoch, "learning_rate": learning_rate}
                row |= {"loss": loss, "grad_norm": grad_norm}
                row["num_tokens"] = sum(micro_batch.num_tokens for micro_batch in window)
                row["num_input_tokens"] = sum(micro_batch.num_input_tokens for micro_batch in window)
                row["lines"] = [line for micro_batch in window for line in micro_batch.lines]
                pending.append(row)
                seen += sum(len(micro_batch.input_ids) for micro_batch in window)
                if step == 1:
                    check_first_gradients(named, grad_norm)
                save = stop.received is not None or step % save_steps == 0 or step in (epoch * steps_per_epoch, total_steps)
                if save or step == 1 or step % config.logging_steps == 0:
                    rows = read_pending(pending, since, device)
                    tracker.steps(rows)
                    explain.explain_step(config, model, optimizer, step, tracker, first=not recent)
                    skipped = count_not_finite(rows, recent, skipped, config.skip_nonfinite, tracker.say, run.advice)
                    pending, recent, since = [], [*recent, *rows][-5:], time.perf_counter()
                if save:
                    progress = checkpoint.Progress(step, epoch, seen, skipped)
                    run.save(model, optimizer, progress, config.save_total_limit, tracker.evaluations)
                    stop.raise_if_received()
                    since = time.perf_counter()  # saving and evaluation are not training time
            seen = 0
            evaluate_held_out(step, epoch)
            if tracker.ends_early(step, config.early_stopping_patience):
                break
            since = time.perf_counter()


def read_pending(pending: list[dict[str, Any]], since: float, device: torch.device) -> list[dict[str, Any]]:
    """Rows of finished steps with numbers in place of tensors: one wait for the device, however many steps."""
    keys = ("loss", "grad_norm")
    numbers = torch.stack([torch.stack([row[key] for key in keys]) for row in pending]).tolist()  # sync; [steps, 2]
    seconds = time.perf_counter() - since
    tokens_per_s = sum(row["num_input_tokens"] for row in pending) / seconds
    measured = {"tokens_per_s": tokens_per_s, "peak_memory_gib": peak_memory_gib(device)}
    return [{**row, **dict(zip(keys, values, strict=True)), **measured} for row, values in zip(pending, numbers, strict=True)]


def main(config: TrainConfig, stop: Signals) -> None:
    """From the command line's configuration to a checked run: what needs no model first, then its small files, then training.

    A mistake should not cost a download, and nothing that is on disk already.

    Raises:
        UserError: with the exit code of its kind.
        Stopped: after a signal, as soon as all is saved.
    """
    stop.armed = True
    console = Console()
    say = functools.partial(log.say, console)
    torch.use_deterministic_algorithms(config.deterministic)
    leave_no_gaps()
    if config.deterministic:  # read when CUDA starts, and by flash attention's backward
        os.environ |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FLASH_ATTENTION_DETERMINISTIC": "1"}
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    config, line = with_init_adapter(config).resolved(on_gpu=device.type == "cuda")
    assert config.model is not None and config.output_dir is not None  # as resolved
    say(line)
    attention.choose_attention(config, device)
    with RunFolder(config.output_dir, config.resume) as run:
        stop.advice = run.advice
        columns = check_files(config)
        source = model_source(config.model)
        config = run.as_before(config)
        skeleton = load_skeleton(source, config)
        attn = attention.choose_attention(config, device, skeleton)
        config = dataclasses.replace(config, attn_implementation=attn.implementation)
        say(f"Attention: {attn.implementation} ({attn.reason})")
        targets = checked_targets(skeleton, config, say)
        console.print(log.targets_table(targets, skeleton.num_parameters()))
        form = read_format(load_tokenizer(source, skeleton, config), config.prompt_format, run.date)
        samples, held_out = encode_files(config, columns, form, say)
        facts: dict[str, Any] = {"data": samples.sha256, "held_out": held_out.sha256 if held_out else None}
        facts |= {"targets": sorted(f"{target.name} x {len(target.layers)}" for target in targets), "device": device.type}
        facts |= {"environment": environment.environment(device), "parameters": skeleton.num_parameters(), "date": form.date}
        facts["counts"] = [samples.counts, held_out.counts if held_out else None]
        longest = row_length(samples, longest_rows(samples, config)[-1])
        config, line = choose_layers(config, skeleton, targets, longest, device)
        if not run.accept(config, facts, total_steps=count_steps(config, len(epoch_rows(samples, config, 1)))[1]):
            say(when_complete(run.folder))
            return
        say(line)
        run.require_space(sum(target.adapter_parameters for target in targets), config.save_total_limit)
        for note in run.notes:
            say(note)
        predicted_gib = run.keep_prediction(memory_terms(skeleton, targets, config, longest))
        with explained(config, device, predicted_gib, longest):
            seed_generators(config.seed)
            model = load_nf4_model(source, config, attn.loaded_as, device)
            model = add_adapters(model, config, targets, source)
            peak_gib = fine_tune(config, model, form, samples, held_out, console, run, stop, predicted_gib)
        say(log.closing_words(run.folder, after_training(run.folder), peak_gib, predicted_gib))


def fine_tune(
    config: TrainConfig,
    model: Any,
    form: Format,
    samples: Samples,
    held_out: Samples | None,
    console: Console,
    run: RunFolder,
    stop: Signals,
    predicted_gib: float,
) -> float:
    """Restore what there is, train, and leave the adapter, the mark of a finished run and sample answers.

    Returns:
        The peak of memory in training, in GiB.
    """
    base = fingerprint(model)
    prepare_layers(model, config)
    loss_sum = functools.partial(token_loss_sum, head=read_head(model))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(parameters, config)
    if model.device.type == "cuda":  # what does not fit shall not fit now, not in hour three
        step = functools.partial(train_step, model.get_decoder(), loss_sum=loss_sum, learning_rate=0.0, max_grad_norm=None)
        with attention.for_training(model.train(), config):
            probe_memory(step, optimizer, samples, config)
        peak_gib = peak_memory_gib(model.device)
        log.say(console, f"Memory: the longest batch peaks at {peak_gib:.2f} GiB, {predicted_gib:.2f} were predicted")
    progress = run.restore(model, optimizer, base)
    run.take_over(config)
    with log.Tracker(run.folder, console, progress.step, held_out.sha256 if held_out else None) as tracker:
        tracker.say(f"Learning rate: {config.learning_rate:g}; run folder: {run.folder}")
        explain.explain_start(config, model, samples, form.tokenizer, console)
        with attention.for_training(model, config):
            train(config, model, optimizer, loss_sum, samples, held_out, progress, tracker, run, stop)
        adapter_step = run.step
        if config.early_stopping_patience is not None:
            adapter_step = run.load_best(model, tracker)
        write_folder(run.folder / "adapter", dict(checkpoint.adapter_files(model, form.tokenizer)))
        tracker.hyperparameters(config, tracker.evaluations.get(adapter_step))
        run.finish(tracker.total_steps, adapter_step)
        # The run is complete; the answers below are only shown. Generation needs the memory that training no longer does.
        peak_gib = peak_memory_gib(model.device)
        free_training_memory(model, optimizer)
        first = functools.partial(first_examples, config, samples, held_out, 3)
        record = functools.partial(tracker.samples, of="held-out" if held_out else "training", step=adapter_step)
        try_samples(model, first, form, record, tracker.say)
    return peak_gib
