"""What needs a model: the loop's own step, and whether its numbers are those of an fp32 reference.

The process that starts cells imports this module, so importing it must not touch the GPU. Importing bitsandbytes would.
Shapes: B rows, T tokens, D hidden size, V vocabulary. Times are medians, of CUDA events on a GPU, in ms.
"""

import contextlib
import dataclasses
import functools
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.attention.kernels import Unavailable, milliseconds, verified
from benchmarks.harness import Row, build, device, peak_gb, spread
from qlora.config import TrainConfig
from qlora.data.batch import Batch, collate, collate_packed, iter_batches, pack
from qlora.data.template import TokenizedExample
from qlora.model import attention

MEDIAN_LENGTH = 600 / 2048  # of the samples of a padded or packed step, as a share of the longest that it may have
PROBED = 64  # positions whose logits are compared, for each sample
LAYOUTS = {"unpadded": (1.0,), "right-padded": (1.0, 0.6), "packed": (0.5, 0.3, 0.2)}  # shares of T that samples have


def load(scratch: Path, window: int, **options: Any) -> tuple[TrainConfig, Any]:
    """The model of the scratch folder as the loop trains it with these options, and with another sliding window."""
    config, trainee = build(TrainConfig(model=str(scratch / "model"), lora_dropout=0.0, compile="none", **options))
    trainee.model.train().config.sliding_window = window
    return config, trainee


def random_samples(lengths: list[int], vocabulary: int) -> list[TokenizedExample]:
    """Samples of the given lengths, every id but the first trained."""
    draw = random.Random(0)
    rows = [[draw.randrange(3, vocabulary) for _ in range(length)] for length in lengths]
    return [TokenizedExample(ids, ids, line) for line, ids in enumerate(rows)]


def hidden_states(decoder: Any, batch: Batch) -> torch.Tensor:
    """[B, T, D] under bf16 autocast, as the loop computes them."""
    batch = batch.to(device())
    with torch.autocast(device().type, torch.bfloat16):
        return decoder(**attention.decoder_inputs(batch, decoder.config), use_cache=False).last_hidden_state


def micro_batches_of(cell: Row, count: int, vocabulary: int) -> list[Batch]:
    """The micro-batches of a step: one of full rows, or `count` samples of lognormal lengths, padded or packed."""
    length, rows = cell["length"], cell["rows"]
    lengths = [length] * rows
    if cell["layout"] != "full":
        draw, median = random.Random(1), MEDIAN_LENGTH * length
        lengths = [min(length, max(8, round(draw.lognormvariate(0, 0.6) * median))) for _ in range(count)]
    order: Any = range(len(lengths))
    if cell["layout"] == "packed":
        order = pack(lengths, order, length)
    return list(iter_batches(random_samples(lengths, vocabulary), order, rows, pin=device().type == "cuda"))


def step(cell: Row, grid: Row, scratch: Path) -> Iterator[Row]:
    """The loop's own train_step, after warm-up."""
    from train_loop import train_step

    began = time.perf_counter()
    options = {"attn_implementation": cell["backend"], "gradient_checkpointing": cell["checkpointing"]}
    config, (model, decoder, loss_sum, optimizer) = load(scratch, grid["window"], max_length=cell["length"], **options)
    loaded_s = time.perf_counter() - began
    micro_batches = micro_batches_of(cell, grid["samples"], model.config.vocab_size)
    take = functools.partial(train_step, decoder, optimizer, micro_batches, loss_sum, 5e-5, 1.0)
    ours = attention.for_training(model, config)
    with ours if cell["window"] == "as trained" else contextlib.nullcontext():
        ran = verified(cell["backend"], lambda: hidden_states(decoder, micro_batches[0]))
        first_loss = take()[0].item()
        step_ms = milliseconds(take, grid["timed_s"], 3, grid["steps"], warm_up=0)
        loss, norm = take()
    if not (torch.isfinite(loss) and torch.isfinite(norm)):
        raise Unavailable(f"loss {loss.item()}, norm {norm.item()}")
    tokens = sum(batch.num_input_tokens for batch in micro_batches)
    yield {
        **cell,
        **spread("step_ms", step_ms),
        "tokens": tokens,  # without padding
        "positions": sum(batch.input_ids.numel() for batch in micro_batches),
        "micro_batches": len(micro_batches),
        "tokens_per_s": round(1000 * tokens / statistics.median(step_ms), 1),
        "peak_gb": peak_gb(),
        "first_loss": first_loss,
        "loaded_s": round(loaded_s, 2),
        **ran,
    }


def load_for_parity(backend: str, cell: Row, grid: Row, scratch: Path) -> tuple[TrainConfig, Any]:
    """A model whose adapters have random B: while B is zero, A has no gradient."""
    checkpointing = "full" if device().type == "cuda" else "none"
    options = {"attn_implementation": backend, "gradient_checkpointing": checkpointing}
    config, trainee = load(scratch, grid["window"], max_length=max(cell["lengths"]), **options)
    generator = torch.Generator(device()).manual_seed(1)
    for name, parameter in trainee.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02, generator=generator)
    return config, trainee


def comparisons(cell: Row, vocabulary: int, scratch: Path) -> Iterator[tuple[int, str, list[TokenizedExample], Path]]:
    """Length, layout, samples, and the file with the reference's numbers."""
    for length, (layout, shares) in itertools.product(cell["lengths"], LAYOUTS.items()):
        sizes = [max(4, int(share * length)) for share in shares]
        yield length, layout, random_samples(sizes, vocabulary), scratch / f"{layout}-{length}.pt"


def write_reference(cell: Row, grid: Row, scratch: Path) -> None:
    """The numbers of samples that are computed one by one, in fp32 throughout, from the same NF4 weights."""
    _, trainee = load_for_parity("eager", cell, grid, scratch)
    model = trainee.model.float()
    for _, _, samples, file in comparisons(cell, model.config.vocab_size, scratch):
        batches = [collate([sample]) for sample in samples]
        torch.save(numbers(model, batches, functools.partial(in_fp32, trainee)), file)


def parity(cell: Row, grid: Row, scratch: Path) -> Iterator[Row]:
    """Logits, loss and adapter gradients of one backend against the reference's."""
    backend, lengths = cell["backend"], cell["lengths"]
    config, trainee = load_for_parity(backend, cell, grid, scratch)
    model, decoder, _, _ = trainee
    forward = functools.partial(as_trained, trainee)
    for length, layout, samples, file in comparisons(cell, model.config.vocab_size, scratch):
        batch = collate_packed([samples]) if layout == "packed" else collate(samples)
        with attention.for_training(model, dataclasses.replace(config, max_length=length)):
            found = numbers(model, [batch], forward)
            row = differences(found, torch.load(file, map_location=device()))
            if length == lengths[2]:
                again = numbers(model, [batch], forward)["gradients"]
                row["same_bits_again"] = all(torch.equal(found["gradients"][name], again[name]) for name in again)
            if layout == "packed":
                row["leak"] = leak(decoder, samples)
            if (length, layout) == (lengths[0], "unpadded"):
                row |= verified(backend, functools.partial(hidden_states, decoder, batch))
        yield {"level": "parity", "backend": backend, "length": length, "layout": layout, "window": grid["window"], **row}


def as_trained(trainee: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [B, T, D] and the sum of losses [], as the loop computes them."""
    with torch.autocast(device().type, torch.bfloat16):
        hidden = hidden_states(trainee.decoder, batch)  # [B, T, D]
        return hidden, trainee.loss_sum(hidden, batch.to(device()))


def in_fp32(trainee: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for one sample, through transformers' own eager attention, its window and its head; F.cross_entropy."""
    ids = batch.input_ids.to(device())  # [1, T]
    hidden = trainee.decoder(input_ids=ids, use_cache=False).last_hidden_state  # [1, T, D]
    logits = trainee.model.get_output_embeddings()(hidden[0, :-1])  # [T - 1, V]
    return hidden, F.cross_entropy(logits, ids[0, 1:], reduction="sum")


def numbers(model: Any, batches: list[Batch], forward: Callable[[Batch], tuple[torch.Tensor, torch.Tensor]]) -> Row:
    """Mean loss, some logits, and gradients of the adapters, over batches as if they were one."""
    model.zero_grad()
    tokens = sum(batch.num_tokens for batch in batches)
    loss, states = 0.0, []
    for batch in batches:
        hidden, loss_sum = forward(batch)  # [B, T, D], []
        (loss_sum / tokens).backward()
        loss += loss_sum.item() / tokens
        states.append(hidden.detach().flatten(0, 1)[batch.positions.to(device())])  # [N, D]
    probes = PROBED * sum(len(batch.lines) for batch in batches)
    probed = torch.linspace(0, tokens - 1, probes).long()  # [probed]
    logits = model.get_output_embeddings()(torch.cat(states)[probed]).float()  # [probed, V]
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {"loss": loss, "logits": logits, "gradients": gradients}


def differences(found: Row, expected: Row) -> Row:
    """How far numbers are from the reference's. Relative: norm of the difference over norm."""
    logits = found["logits"] - expected["logits"]  # [probed, V]
    pairs = [(found["gradients"][name].float() - gradient, gradient) for name, gradient in expected["gradients"].items()]
    squares, norm = (sum(tensor.square().sum() for tensor in tensors) for tensors in zip(*pairs, strict=True))
    return {
        "loss_difference": found["loss"] - expected["loss"],
        "logits_max_difference": logits.abs().max().item(),
        "logits_relative": (logits.norm() / expected["logits"].norm()).item(),
        "gradient_relative": (squares / norm).sqrt().item(),
        "gradient_max_relative": max((apart.abs().max() / gradient.abs().max()).item() for apart, gradient in pairs),
    }


@torch.no_grad()
def leak(decoder: Any, samples: list[TokenizedExample]) -> float:
    """Largest change in the hidden states of a row's other samples when all ids of the middle one change: 0, or it leaks."""
    first, middle, last = samples
    changed = middle._replace(input_ids=[(index + 7) % decoder.config.vocab_size for index in middle.input_ids])
    before, after = (hidden_states(decoder, collate_packed([[first, other, last]])) for other in (middle, changed))
    apart = (before - after).abs()[0]  # [T, D]
    start, end = len(first.input_ids), len(first.input_ids) + len(middle.input_ids)
    return max(apart[:start].max().item(), apart[end:].max().item())
