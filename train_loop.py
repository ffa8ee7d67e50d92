"""QLoRA fine-tuning in a plain PyTorch loop, to be read from top to bottom and edited.

    python train_loop.py                                        # a 135M demo model on a CPU, Phi-3-mini on a GPU
    python train_loop.py --train-file my.jsonl --eval-file eval.jsonl
    python train_loop.py --help

The same command resumes a run that stopped, whatever the reason.

Words: a *step* is one optimizer step; a *micro-batch* is one forward and backward; a *token* is a label that is trained,
counted after the shift by one.
Shapes: B samples, T positions, D hidden size. `qlora/` holds the rest: data, model, loss, checkpoints.
"""

if __name__ == "__main__":  # Parse first: --help and a typo should not wait for torch and transformers to be imported.
    from qlora.cli import train as command_line

    raise SystemExit(command_line())  # it imports this file again, as a module

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from rich.console import Console

from qlora import distributed, terminal
from qlora.config import TrainConfig
from qlora.data.batch import Batch, count_steps, epoch_rows, eval_batches, training_steps
from qlora.data.dataset import first_examples
from qlora.eval.generate import try_samples
from qlora.eval.loss import EvalResult, evaluate_loss, has_stalled
from qlora.model import attention
from qlora.model.load import fingerprint, load_nf4_model
from qlora.model.lora import add_lora
from qlora.model.loss import read_head, token_loss_sum
from qlora.model.optimizer import build_optimizer, loss_scale, unscale_gradients, update_loss_scale
from qlora.model.random_state import seed_generators
from qlora.report import html
from qlora.run import checkpoint, explain, log
from qlora.run.files import write_folder
from qlora.run.folder import RunFolder
from qlora.run.guards import check_finite, check_first_gradients
from qlora.run.prepare import Prepared, prepare_everywhere, resolve, set_up_torch
from qlora.run.signals import Signals
from qlora.run.timing import PhaseClock
from qlora.speed import memory
from qlora.speed.accelerate import AcceleratedDecoder, accelerate

LossSum = Callable[[torch.Tensor, Batch], torch.Tensor]  # (hidden [B, T, D], batch) -> fp32 scalar, a sum over tokens


class Trainee(NamedTuple):
    """The model, and what trains it."""

    model: Any  # NF4 base with adapters; evaluated and saved
    decoder: AcceleratedDecoder  # the same weights; what a training step runs
    loss_sum: LossSum
    optimizer: torch.optim.Optimizer  # over the adapters


def lr_multiplier(step: int, warmup_steps: int, total_steps: int) -> float:
    """Share of the peak learning rate for update `step` (from 0): linear warmup, then half a cosine.

    The first update already moves: transformers' schedule starts at k / warmup and wastes update 0 on a rate of zero.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def train_step(
    decoder: Any,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[Batch],
    loss_sum: LossSum,
    learning_rate: float,
    max_grad_norm: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step over micro-batches, as if they were one batch.

    Args:
        decoder: maps ids [B, T] to hidden states [B, T, D], without the head; adapters inside. Accelerated or plain.
        optimizer: over the adapters alone.
        micro_batches: on the CPU, pinned if the decoder is on a GPU.
        loss_sum: sum of the token losses of a micro-batch; a test may pass the plain head.
        learning_rate: of this step.
        max_grad_norm: clip to this norm; None leaves gradients as they are.

    Returns: mean loss per supervised token, and the gradient norm before clipping: fp32 scalars, still on the device.
    """
    # Only the adapters: the base is frozen, and no optimizer knows it.
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    device = parameters[0].device
    # Divide by the tokens of the whole step, never by the number of micro-batches: a mean of means weighs tokens of
    # short answers more, and is off by a factor of 1.4 in the gradient for answers of 12 and 100 tokens.
    num_tokens = sum(micro_batch.num_tokens for micro_batch in micro_batches)
    # 1, except in fp16, where small gradients would underflow to 0. Gradients of parameters are in fp32.
    scale = loss_scale(optimizer)
    loss = torch.zeros((), device=device)  # []
    # The gradients of the last step stayed until now so that they could be looked at.
    optimizer.zero_grad(set_to_none=True)
    for micro_batch in (each for each in micro_batches if each.is_here):
        # Those of other GPUs are left out. Dropout is drawn from a seed, to be the same after a resume and on any of them.
        torch.manual_seed(micro_batch.seed)
        # The copy does not wait: the batch is in pinned memory.
        batch = micro_batch.to(device)
        # Autocast runs matrix products in bf16 (or fp16) and casts the fp32 adapters. Norms and the loss stay in fp32.
        with torch.autocast(device.type, decoder.dtype):
            # Ids [B, T], and with packing what keeps the samples of a row apart.
            inputs = attention.decoder_inputs(batch, decoder.config)
            hidden = decoder(**inputs, use_cache=False).last_hidden_state  # [B, T, D]
            micro_loss = loss_sum(hidden, batch) / num_tokens  # []
        # Adds to the gradients of the step's earlier micro-batches.
        (scale * micro_loss).backward()
        loss += micro_loss.detach()  # stays on the device: reading it here would wait for the backward pass
    distributed.sum_gradients(parameters, loss)  # over all GPUs; each continues with the sums
    unscale_gradients(parameters, scale)
    # Returns the norm even where nothing is clipped.
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf if max_grad_norm is None else max_grad_norm)
    # The schedule is a function of the step, so there is no scheduler to save and restore.
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_ratio", 1.0)  # LoRA+ gives B a higher one than A
    # A NaN or infinity must not reach the weights. Where found_inf is 1 a fused optimizer skips its update, on the device.
    finite = torch.isfinite(loss) & torch.isfinite(grad_norm)  # []
    update_loss_scale(optimizer, loss, grad_norm)  # sync, in fp16 only
    if fused := getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = 1.0 - finite.float()  # type: ignore[attr-defined]
    if fused or finite.item():  # sync, unless it is fused
        optimizer.step()
    return loss, grad_norm


def train(
    prep: Prepared, trainee: Trainee, state: checkpoint.TrainState, run: RunFolder, tracker: log.Tracker, stop: Signals
) -> dict[int, EvalResult]:
    """The whole run, or the rest of it: epochs of steps of micro-batches.

    Args:
        prep: configuration and data.
        trainee: in the state that `state` says.
        state: where the run is.
        run: where checkpoints go.
        tracker: where metrics go.
        stop: whether a signal has come; the step at hand is finished and saved first.

    Returns:
        Step -> result on the eval data, including those of earlier processes of this run.

    Raises:
        NonFiniteError: if the first step finds an adapter without a gradient, or if a loss or norm is not finite.
        Stopped: after a signal, when all is saved.
    """
    config = prep.config
    model, decoder, loss_sum, optimizer = trainee
    # Only from pinned memory can a batch be copied to the GPU asynchronously.
    pin = prep.device.type == "cuda"
    ranks = distributed.ranks()
    adapters = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    # The last step of an epoch may have fewer micro-batches.
    steps_per_epoch, total_steps = count_steps(config, len(epoch_rows(prep.train_set, config, 1)))
    # Rounded up: with a ratio above 0 there is at least one step of warmup.
    warmup_steps = math.ceil(config.warmup_ratio * total_steps)
    # The end of each epoch is saved in any case.
    save_steps = config.save_steps or total_steps
    # Early stopping counts the evaluations of earlier processes too.
    evaluations = distributed.by_first(lambda: dict(tracker.known_evaluations))
    # Steps taken; epoch to resume in; rows of it that were trained on; steps skipped as not finite.
    step, first_epoch, seen, skipped = state

    def evaluate(step: int, epoch: int) -> None:
        # A resumed run may know this evaluation already.
        if prep.eval_set is None or step in evaluations:
            return
        # Everything is saved or on its way to disk, so a signal may end the loop on the spot, unless others wait for this one.
        with stop.immediate(ranks.size == 1):
            batches = eval_batches(prep.eval_set, config.per_device_train_batch_size * prep.longest, config, ranks, pin)
            evaluations[step] = evaluate_loss(model, batches, loss_sum)
        tracker.evaluation(step, epoch, evaluations[step])

    # A progress bar in a terminal, a line every few steps elsewhere.
    tracker.begin(step, total_steps, config.logging_steps)
    # A process that died after its save has not removed old checkpoints.
    run.prune(config.save_total_limit, evaluations)
    # Dropout of the adapters is on.
    model.train()
    # A signal is only noted in here, and acted on once the step at hand is saved.
    with stop.deferred():
        if step == 0:
            evaluate(0, 0)
        step_log = log.StepLog(tracker, prep.device)
        for epoch in range(first_epoch, math.ceil(total_steps / steps_per_epoch) + 1):
            # -- batch --
            # The order is a function of seed and epoch, so a resumed run finds it again and leaves out what it has seen.
            rows_left = epoch_rows(prep.train_set, config, epoch)[seen:]
            # Batches are collated as they are asked for; the data may be larger than memory. Each has the seed of its dropout,
            # a function of seed, epoch and micro-batch. A resumed run starts at the micro-batch after those it has seen.
            at = (epoch, seen // config.per_device_train_batch_size)
            steps = training_steps(prep.train_set, rows_left, config, ranks, at, pin)
            for micro_batches in itertools.islice(steps, total_steps - step):
                # -- step --
                learning_rate = prep.learning_rate * lr_multiplier(step, warmup_steps, total_steps)
                loss, grad_norm = train_step(decoder, optimizer, micro_batches, loss_sum, learning_rate, config.max_grad_norm)
                step += 1
                seen += sum(len(micro_batch.input_ids) for micro_batch in micro_batches if micro_batch.lines)
                # Checkpoints are written while training continues; a full disk shows here.
                run.raise_if_not_saved()
                # A signal to one process stops all of them, at the same step.
                stopping = distributed.largest(stop.received or 0)
                # A target that gets no gradient would train nothing, in silence.
                if step == 1:
                    check_first_gradients(adapters, grad_norm, config.precision == "fp16")
                # -- log --
                # Reading a loss waits for the GPU, so rows are read every few steps. The first step is read at once.
                step_log.add(step, epoch, learning_rate, loss, grad_norm, micro_batches)
                # Due after a signal, every save_steps, at the end of an epoch, and at the end.
                save = stopping or step % save_steps == 0 or step in (epoch * steps_per_epoch, total_steps)
                if save or step == 1 or step % config.logging_steps == 0:
                    step_log.flush()  # sync
                    explain.explain_step(config, model, optimizer, step, tracker, first=not step_log.before)
                    skipped = check_finite(step_log, skipped, config, run.advice, prep.train_set.source)
                    # tokens_per_s counts training alone: not explanations, saves or evaluations.
                    step_log.restart_clock()
                # -- save --
                # After the rows of its steps are on disk. The state is copied here; a thread writes it, verifies it, and only
                # then removes an older checkpoint. Whatever ends the run waits for it.
                if save:
                    state = checkpoint.TrainState(step, epoch, seen, skipped)
                    run.save(model, optimizer, state, config.save_total_limit, evaluations)
                    stop.raise_for(stopping)
                    step_log.restart_clock()
            # -- evaluate --
            seen = 0
            evaluate(step, epoch)
            stop.raise_for(distributed.largest(stop.received or 0))
            if step < total_steps and has_stalled(evaluations, config.early_stopping_patience):
                tracker.ended_early(step, config.early_stopping_patience)
                break
            step_log.restart_clock()
    return evaluations


def finish(prep: Prepared, trainee: Trainee, evaluations: dict[int, EvalResult], run: RunFolder, tracker: log.Tracker) -> float:
    """Leave the adapter, the mark of a complete run, and sample answers, in this order.

    Returns:
        Peak memory in training, in GB.
    """
    model, decoder, _, optimizer = trainee
    # Of several GPUs, the first writes.
    if not distributed.ranks().is_first:
        return math.nan
    run.wait_until_saved()
    adapter_step = run.step
    # Early stopping hands over the best adapter; without it, the last one is what was asked for.
    if prep.config.early_stopping_patience is not None:
        adapter_step = run.load_best(model, evaluations, tracker.say)
        tracker.adapter_chosen(adapter_step, evaluations)
    # In PEFT's format, with the tokenizer: AutoPeftModelForCausalLM loads it.
    write_folder(run.folder / "adapter", dict(checkpoint.adapter_files(model, prep.template.tokenizer)))
    tracker.hyperparameters(prep.config, evaluations.get(adapter_step))
    run.finish(adapter_step)
    tracker.clock.end("checkpoints")
    # The run is complete; the answers below are only shown. Generation needs the memory that training no longer does.
    peak_gb = memory.peak_memory_gb(prep.device)
    # CUDA graphs, gradients and moments go; the weights stay.
    decoder.release(optimizer)
    examples = functools.partial(first_examples, prep.config, prep.train_set, prep.eval_set, 3)
    record = functools.partial(tracker.samples, of="eval" if prep.eval_set else "training", step=adapter_step)
    try_samples(model, examples, prep.template, record, tracker.say)
    tracker.clock.end("answers")
    return peak_gb


def main(options: TrainConfig, stop: Signals) -> None:
    """One run, from options to a finished adapter. Raises UserError with an exit code, or Stopped after a signal."""
    # From here on a signal ends the process in an orderly way; during imports it would end it on the spot.
    stop.armed = True
    # Where the time goes, printed at the end: each phase ends with a call.
    clock = PhaseClock()
    device = set_up_torch(options)
    # One process, unless torchrun has started more. The first of them writes and prints.
    ranks = distributed.start()
    console = Console(quiet=not ranks.is_first)
    say = functools.partial(terminal.say, console)
    asked = resolve(options, device, say)
    with RunFolder.open(asked, ranks) as run:
        # What a signal or an error prints: what is safe, and the command that resumes.
        stop.advice = run.advice
        # A mistake should not cost a download, so everything that needs no weights comes first.
        prep = prepare_everywhere(asked, device, run, console, ranks)
        if prep is None:
            if ranks.is_first:
                say(html.when_complete(run.folder))
            return
        config = prep.config
        clock.end("data and checks")
        with memory.oom_as_user_error(config, device, prep.predicted_gb, prep.longest):
            # Adapters start from the seed. Order and dropout follow from it too, by functions that need no generator's state.
            seed_generators(config.seed)
            # QLoRA in five lines: a frozen base in 4 bits per weight, fp32 adapters, a fast decoder, the loss, the optimizer.
            # 3.8 billion parameters take 2.3 GB; no weight of the base ever gets a gradient.
            model = load_nf4_model(prep.source, config, prep.attention.loaded_as, device)
            model = add_lora(model, config, prep.targets, prep.source)
            # A callable for training steps. Evaluation, generation and saving use the model itself.
            decoder = accelerate(model, config, say)
            # The head and cross-entropy, in chunks, over supervised positions only.
            loss_sum = functools.partial(token_loss_sum, head=read_head(model))
            optimizer = build_optimizer({name: each for name, each in model.named_parameters() if each.requires_grad}, config)
            trainee = Trainee(model, decoder, loss_sum, optimizer)  # what changes from step to step: adapters and moments
            clock.end("model")
            if device.type == "cuda":
                # What does not fit should fail now, not in hour three. At rate zero no weight moves, and weight decay, which
                # the rate multiplies, does nothing either.
                probe_step = functools.partial(train_step, decoder, loss_sum=loss_sum, learning_rate=0.0, max_grad_norm=None)
                with attention.for_training(model.train(), config):
                    say(memory.probe_memory(probe_step, optimizer, prep.train_set, config, prep.predicted_gb))
                clock.end("compile and probe")
            # Adapters and moments, each tensor in its dtype; or step 0. A resumed run must find the very same base.
            state = run.restore(model, optimizer, fingerprint(model))
            # Only from here on does the run folder change.
            run.take_over(config)
            with log.Tracker(run.logs, console, clock, state.step, prep.eval_set) as tracker:
                tracker.say(f"Learning rate: {config.learning_rate:g}; run folder: {run.folder}")
                explain.explain_start(config, model, prep.train_set, prep.template.tokenizer, console)
                # Phi-3's sliding window is off where it changes nothing: it would cost sdpa its flash kernel.
                with attention.for_training(model, config):
                    evaluations = train(prep, trainee, state, run, tracker, stop)
                peak_gb = finish(prep, trainee, evaluations, run, tracker)
        distributed.leave()
        if ranks.is_first:
            say(log.closing_words(run.folder, html.after_training(run.folder), peak_gb, prep.predicted_gb, clock, prep.config))
