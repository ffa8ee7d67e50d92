"""QLoRA fine-tuning in a plain PyTorch loop, to be read from top to bottom and edited.

    python train_loop.py                                        # a 135M demo model on a CPU, Phi-3-mini on a GPU
    python train_loop.py --train-file my.jsonl --eval-file held_out.jsonl
    python train_loop.py --help

Words: a *step* is one optimizer step; a *micro-batch* is one forward and backward; a *window* is the micro-batches of one
step; a *token* is a label that is trained, counted after the shift by one.
Shapes: B samples, T positions, D hidden size. `qlora/` holds the rest: data, model, loss, checkpoints.
"""

if __name__ == "__main__":  # Parse first: --help and a typo should not wait for torch and transformers to be imported.
    from qlora.__main__ import train as command_line

    raise SystemExit(command_line())  # it imports this file again, as a module

import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console

from qlora import attention, checkpoint, data, evaluate, tracking
from qlora.config import ExitCode, TrainConfig, UserError
from qlora.demo import model_source
from qlora.loss import Head, read_head, token_loss_sum
from qlora.memory import peak_memory_gib
from qlora.model import (
    add_adapters,
    audit_targets,
    enable_gradient_checkpointing,
    load_nf4_model,
    load_skeleton,
    load_tokenizer,
    with_init_adapter,
)

LossSum = Callable[[torch.Tensor, data.Batch], torch.Tensor]  # (hidden [B, T, D], batch) -> fp32 scalar, a sum over tokens


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
    window: list[data.Batch],
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
            hidden = decoder(input_ids=batch.input_ids, use_cache=False).last_hidden_state  # [B, T, D]
            micro_loss = loss_sum(hidden, batch) / num_tokens  # []
        micro_loss.backward()  # adds to the gradients of the window's earlier micro-batches
        loss += micro_loss.detach()
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf if max_grad_norm is None else max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    return loss, grad_norm


def train(
    config: TrainConfig,
    model: Any,
    head: Head,
    samples: list[data.Encoded],
    held_out: list[data.Encoded],
    tracker: tracking.Tracker,
) -> evaluate.HeldOut | None:
    """The whole run: epochs of windows, a log line every few steps, evaluation and a checkpoint at the end of each epoch.

    Args:
        config: resolved.
        model: NF4 base with adapters.
        head: its output layer.
        samples: to train on, one at least.
        held_out: to evaluate on; may be empty.
        tracker: where metrics go.

    Returns:
        The last evaluation on held-out data, if there is any.

    Raises:
        UserError: exit 5 if the first step finds an adapter without a gradient, or if a loss or norm is not finite.
    """
    assert config.learning_rate is not None and config.output_dir is not None  # as resolved
    device = head.weight.device
    on_gpu = device.type == "cuda"
    decoder = model.get_decoder()
    loss_sum = functools.partial(token_loss_sum, head=head)
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW([parameter for _, parameter in named], lr=0.0, weight_decay=config.weight_decay, fused=True)

    batch_size, window_size = config.per_device_train_batch_size, config.gradient_accumulation_steps
    steps_per_epoch = math.ceil(math.ceil(len(samples) / batch_size) / window_size)  # the short last window is a step too
    total_steps = config.max_steps or config.num_train_epochs * steps_per_epoch
    warmup_steps = math.ceil(config.warmup_ratio * total_steps)

    def evaluate_held_out(step: int, epoch: int) -> evaluate.HeldOut | None:
        if not held_out:
            return None
        batches = data.micro_batches(held_out, range(len(held_out)), batch_size, pin=on_gpu)
        result = evaluate.evaluate_loss(model, batches, loss_sum)
        tracker.held_out(step, epoch, result)
        return result

    tracker.begin(total_steps, config.logging_steps)
    result = evaluate_held_out(step=0, epoch=0)
    model.train()
    step = 0
    pending: list[dict[str, Any]] = []  # steps not yet read from the device
    since = time.perf_counter()
    for epoch in range(1, math.ceil(total_steps / steps_per_epoch) + 1):
        order = data.epoch_order(len(samples), config.seed, epoch)
        batches = data.micro_batches(samples, order, batch_size, pin=on_gpu)
        for window in data.windows(batches, window_size):
            learning_rate = config.learning_rate * lr_multiplier(step, warmup_steps, total_steps)
            loss, grad_norm = train_step(decoder, optimizer, window, loss_sum, learning_rate, config.max_grad_norm)
            step += 1
            row = {"step": step, "epoch": epoch, "learning_rate": learning_rate, "loss": loss, "grad_norm": grad_norm}
            row["num_tokens"] = sum(micro_batch.num_tokens for micro_batch in window)
            row["num_input_tokens"] = sum(micro_batch.num_input_tokens for micro_batch in window)
            pending.append(row)
            if step == 1:
                check_first_gradients(named, grad_norm)
            if step == 1 or step % config.logging_steps == 0 or step % steps_per_epoch == 0 or step == total_steps:
                rows = read_pending(pending, since, device)
                finite = [row for row in rows if math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])]
                tracker.steps(finite)
                if len(finite) < len(rows):
                    raise not_finite(next(row for row in rows if row not in finite))
                pending, since = [], time.perf_counter()
            if step == total_steps:
                break
        result = evaluate_held_out(step, epoch)
        state = {"step": step, "epoch": epoch, "total_steps": total_steps, "held_out": result and result._asdict()}
        checkpoint.save(config.output_dir / "checkpoints", model, optimizer, state, config.save_total_limit)
        since = time.perf_counter()  # evaluation and saving are not training time
    return result


def read_pending(pending: list[dict[str, Any]], since: float, device: torch.device) -> list[dict[str, Any]]:
    """Rows of finished steps with numbers in place of tensors: one wait for the device, however many steps."""
    keys = ("loss", "grad_norm")
    numbers = torch.stack([torch.stack([row[key] for key in keys]) for row in pending]).tolist()  # sync; [steps, 2]
    seconds = time.perf_counter() - since
    tokens_per_s = sum(row["num_input_tokens"] for row in pending) / seconds
    measured = {"tokens_per_s": tokens_per_s, "peak_memory_gib": peak_memory_gib(device)}
    return [{**row, **dict(zip(keys, values, strict=True)), **measured} for row, values in zip(pending, numbers, strict=True)]


def not_finite(row: dict[str, Any]) -> UserError:
    """The error that ends a run before a checkpoint could keep what a NaN or infinity left of the adapter."""
    seen = f"loss {row['loss']}, gradient norm {row['grad_norm']}, learning rate {row['learning_rate']:g}"
    advice = "The last checkpoint, if there is one, is from before it. Lower --learning-rate, or look at the data."
    return UserError(ExitCode.NUMERICS, f"Step {row['step']} is not finite: {seen}. {advice}")


def check_first_gradients(named: list[tuple[str, torch.nn.Parameter]], grad_norm: torch.Tensor) -> None:
    """Stop a run that would train nothing. (A's gradient is exactly zero while B is: that is right.)"""
    without = [name for name, parameter in named if parameter.grad is None]
    advice = "Nothing was saved. Check --target-modules and the data."
    if without:
        seen = f"{len(without)} of {len(named)} adapter tensors got none, {without[0]} first"
        raise UserError(ExitCode.NUMERICS, f"The first gradient is not usable: {seen}. {advice}")
    if grad_norm.item() == 0.0:  # sync, once a run
        raise UserError(ExitCode.NUMERICS, f"The first gradient is zero everywhere. {advice}")


def main(config: TrainConfig) -> None:
    """From the command line's configuration to an adapter on disk.

    Raises:
        UserError: with the exit code of its kind; what costs nothing to check is checked before the model is loaded.
    """
    console = Console()
    say = functools.partial(tracking.say, console)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    config, line = with_init_adapter(config).resolved(on_gpu=device.type == "cuda")
    model_name, train_file, run_folder = config.model, config.train_file, config.output_dir
    assert model_name is not None and train_file is not None and run_folder is not None  # as resolved
    say(line)
    checkpoint.prepare_run_folder(run_folder)

    # What needs no model first, then its small files, then its weights: a mistake should not cost a download.
    attention.choose_attention(config.attn_implementation, device)
    examples, columns = data.read_examples(train_file, "train")
    held_out_examples, held_out_columns = data.read_examples(config.eval_file, "test") if config.eval_file else ([], "")
    source = model_source(model_name)
    skeleton = load_skeleton(source, config)
    attn = attention.choose_attention(config.attn_implementation, device, type(skeleton))
    config = dataclasses.replace(config, attn_implementation=attn.implementation)
    say(f"Attention: {attn.implementation} ({attn.reason})")
    targets = audit_targets(skeleton, config)
    console.print(tracking.targets_table(targets, skeleton.num_parameters()))
    form = data.read_format(load_tokenizer(source, skeleton, config), config.prompt_format)
    samples, notes = data.encode_all(examples, train_file, form, config)
    say(f"Data: {notes}; columns {columns}")
    held_out: list[data.Encoded] = []
    if config.eval_file is not None:
        held_out, notes = data.encode_all(held_out_examples, config.eval_file, form, config)
        say(f"Held out: {notes}; columns {held_out_columns}")

    torch.manual_seed(config.seed)
    model = load_nf4_model(source, config, attn.implementation, device)
    model = add_adapters(model, config, targets, source)
    if config.gradient_checkpointing == "full":
        enable_gradient_checkpointing(model)
    head = read_head(model)
    say(
        f"Learning rate: {config.learning_rate:g}; gradient checkpointing: {config.gradient_checkpointing}; "
        f"run folder: {run_folder}"
    )

    (run_folder / "config.yaml").write_text(config.to_yaml())
    (run_folder / "env.json").write_text(json.dumps({**tracking.environment(device), "command": sys.argv}, indent=2))
    with tracking.Tracker(run_folder, console) as tracker:
        with attention.sliding_window(model, attention.training_window(model.config, config.max_length)):
            result = train(config, model, head, samples, held_out, tracker)
        checkpoint.save_adapter(model, run_folder / "adapter")
        form.tokenizer.save_pretrained(run_folder / "adapter")
        tracker.hyperparameters(config, result)
        shown = data.kept_examples(held_out_examples, held_out) or data.kept_examples(examples, samples)
        answers = evaluate.sample_responses(model, shown[:3], form)
        tracker.samples(answers, of="held-out" if held_out else "training")
    say(tracking.closing_words(run_folder))
