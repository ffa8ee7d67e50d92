"""What a cell of attention.py that needs the model measures, in a process of its own: steps and parity.

Shapes: B rows, T tokens, H heads, d of a head, V vocabulary. Times are medians of CUDA events, in ms.
"""

import contextlib
import copy
import dataclasses
import functools
import itertools
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
import torch.nn.functional as F
import transformers

from benchmarks.attention_kernels import LEAST_STEPS, Unavailable, matmul_tflops, milliseconds, verified
from benchmarks.train_step import spread, write_random_model
from qlora.config import AttnImplementation, TrainConfig
from qlora.data.batch import Batch, collate, collate_packed, iter_batches, pack
from qlora.data.template import IGNORED, TokenizedExample
from qlora.model import attention
from qlora.model.load import load_meta_model, load_nf4_model
from qlora.model.lora import add_lora, audit_targets
from qlora.model.loss import Head, read_head, token_loss_sum
from qlora.run.environment import environment
from qlora.speed.accelerate import accelerate
from qlora.speed.memory import peak_memory_gb
from train_loop import train_step

PROBED = 64  # positions whose logits are compared
MEDIAN_LENGTH = 600 / 2048  # of a padded or packed step, of the longest that it may have


def measure(cell: dict[str, Any], grid: dict[str, Any], scratch: Path, device: torch.device) -> Iterator[dict[str, Any]]:
    """The rows of a cell that needs the model, or the machine's description."""
    match cell["level"]:
        case "environment":
            described = {**environment(device), "cuda_device": device.type == "cuda"}
            yield {"environment": described, "matmul_tflops": matmul_tflops(device)}
        case "model":
            write_model(grid["shape"], scratch / "model")
            yield {}
        case "step":
            yield {**cell, **step(cell, grid, scratch, device)}
        case "parity":
            yield from parity(cell, grid, scratch, device)


def write_model(shape: str, folder: Path) -> None:
    """A checkpoint of exact shape and random weights."""
    if shape != "demo":
        write_random_model(shape, folder)
        return
    write_random_model("tiny", folder)  # for its tokenizer
    config = transformers.Phi3Config(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        dtype=torch.bfloat16,
    )
    transformers.Phi3ForCausalLM(config).bfloat16().save_pretrained(folder)


# -- step level ------------------------------------------------------------------------------------------------------


def load(
    folder: Path, backend: AttnImplementation, max_length: int, window: int, device: torch.device
) -> tuple[Any, TrainConfig]:
    """The NF4 model with adapters, as the loop has it, and the configuration it is trained with."""
    config = TrainConfig(model=str(folder), lora_dropout=0.0, max_length=max_length, attn_implementation=backend)
    meta_model = load_meta_model(
        str(folder), dataclasses.replace(config, max_length=16)
    )  # rows here may be longer than it allows
    chosen = attention.choose_attention(config, device, meta_model)
    torch.manual_seed(0)
    model = load_nf4_model(str(folder), config, chosen.loaded_as, device)
    model = add_lora(model, config, audit_targets(meta_model, config), str(folder)).train()
    model.config.sliding_window = window
    return model, config


def random_rows(lengths: list[int], vocabulary: int) -> list[TokenizedExample]:
    """Samples of the given lengths, every id but the first trained."""
    draw = random.Random(0)
    rows = [[draw.randrange(3, vocabulary) for _ in range(length)] for length in lengths]
    return [TokenizedExample(ids, ids, line) for line, ids in enumerate(rows)]


def cell_batches(cell: dict[str, Any], count: int, vocabulary: int, pin: bool) -> list[Batch]:
    """The micro-batches of a step: one micro-batch of full rows, or lognormal lengths, padded or packed."""
    length, rows = cell["length"], cell["rows"]
    if cell["layout"] == "full":
        samples, order = random_rows([length] * rows, vocabulary), list(range(rows))
        return list(iter_batches(samples, order, rows, pin))
    draw, median = random.Random(1), MEDIAN_LENGTH * length
    lengths = [min(length, max(8, round(draw.lognormvariate(0, 0.6) * median))) for _ in range(count)]
    samples = random_rows(lengths, vocabulary)
    order = list(range(count))
    packed: Any = pack(lengths, order, length) if cell["layout"] == "packed" else order
    return list(iter_batches(samples, packed, rows, pin))


def step(cell: dict[str, Any], grid: dict[str, Any], scratch: Path, device: torch.device) -> dict[str, Any]:
    """The loop's own train_step, after warm-up."""
    began = time.perf_counter()
    model, config = load(scratch / "model", cell["backend"], cell["length"], grid["window"], device)
    loaded_s = time.perf_counter() - began
    config = dataclasses.replace(config, gradient_checkpointing=cell["checkpointing"], compile="none")
    decoder = accelerate(model, config)
    head = read_head(model)
    micro_batches = cell_batches(cell, grid["samples"], len(head.weight), pin=device.type == "cuda")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, fused=True)
    loss_sum = functools.partial(token_loss_sum, head=head)
    take = functools.partial(train_step, decoder, optimizer, micro_batches, loss_sum, 5e-5, 1.0)
    ours = cell["window"] == "as trained"
    with attention.for_training(model, config) if ours else contextlib.nullcontext():
        ran = verified(cell["backend"], lambda: hidden_states(decoder, micro_batches[0].to(device)), device)
        first_loss = take()[0].item()
        step_ms = milliseconds(take, device, grid["timed_s"], LEAST_STEPS, grid["steps"], warm_up=0)
        loss, norm = take()
    if not (torch.isfinite(loss) and torch.isfinite(norm)):
        raise Unavailable(f"loss {loss.item()}, norm {norm.item()}")
    tokens = sum(batch.num_input_tokens for batch in micro_batches)
    return {
        **spread("step_ms", step_ms),
        "tokens": tokens,  # without padding
        "positions": sum(batch.input_ids.numel() for batch in micro_batches),
        "micro_batches": len(micro_batches),
        "tokens_per_s": round(1000 * tokens / statistics.median(step_ms), 1),
        "peak_gb": round(peak_memory_gb(device), 3),
        "first_loss": first_loss,
        "loaded_s": round(loaded_s, 2),
        **ran,
    }


# -- parity ----------------------------------------------------------------------------------------------------------

LAYOUTS = {"unpadded": (1.0,), "right-padded": (1.0, 0.6), "packed": (0.5, 0.3, 0.2)}  # shares of T that samples have


def parity(cell: dict[str, Any], grid: dict[str, Any], scratch: Path, device: torch.device) -> Iterator[dict[str, Any]]:
    """Logits, loss and adapter gradients of one backend against those that the reference left in the scratch folder."""
    backend, lengths = cell["backend"], cell["lengths"]
    is_reference = backend == "reference"
    model, config = load(scratch / "model", "eager" if is_reference else backend, max(lengths), grid["window"], device)
    generator = torch.Generator(device).manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # at zero A would have no gradient
            parameter.data.normal_(std=0.02, generator=generator)
    if is_reference:
        dequantize(model)
    decoder = accelerate(
        model, dataclasses.replace(config, gradient_checkpointing="full" if device.type == "cuda" else "none", compile="none")
    )
    head, vocabulary = read_head(model), model.config.vocab_size
    for length in lengths:
        for layout, shares in LAYOUTS.items():
            sizes = [max(4, int(share * length)) for share in shares]
            samples = random_rows(sizes, vocabulary)
            file = scratch / f"{layout}-{length}.pt"
            if is_reference:
                torch.save(reference(model, samples, device), file)
                continue
            batch = collate_packed([samples]) if layout == "packed" else collate(samples)
            with attention.for_training(model, dataclasses.replace(config, max_length=length)):
                found = compared(
                    model, decoder, head, batch.to(device), torch.load(file, map_location=device), length == lengths[2]
                )
                if layout == "packed":
                    found["leak"] = leak(decoder, samples, device)
                if (length, layout) == (lengths[0], "unpadded"):
                    found |= verified(backend, lambda b=batch: hidden_states(decoder, b.to(device)), device)
            yield {"level": "parity", "backend": backend, "length": length, "layout": layout, "window": grid["window"], **found}
    if is_reference:
        yield {**cell, "done": True}


def dequantize(model: Any) -> None:
    """Turn the NF4 model into fp32 throughout, in place: what is compared is attention and its rounding, not quantization."""
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    for name, module in layers:
        state = copy.copy(module.weight.quant_state)
        state.dtype = torch.float32
        linear = torch.nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, state)  # [out, in]
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, linear)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()


def reference(model: Any, samples: list[TokenizedExample], device: torch.device) -> dict[str, Any]:
    """Each sample alone, in fp32, through transformers' own eager attention, its window and its head; F.cross_entropy."""
    model.zero_grad()
    logits, loss, tokens = [], 0.0, sum(len(sample.input_ids) - 1 for sample in samples)
    for sample in samples:
        ids = torch.tensor([sample.input_ids], device=device)  # [1, T]
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]  # [T, D]
        every = model.get_output_embeddings()(hidden[:-1])  # [T - 1, V]
        total = F.cross_entropy(every, ids[0, 1:], reduction="sum") / tokens  # []
        total.backward()
        loss += total.item()
        logits.append(every[probed(len(sample.input_ids))].detach())  # [PROBED, V]
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss, "logits": torch.cat(logits), "gradients": gradients}


def probed(length: int) -> list[int]:
    """Positions whose logits are compared: spread over the sample, the last that predicts something among them."""
    return sorted({round(i * (length - 2) / (PROBED - 1)) for i in range(PROBED)})


def hidden_states(decoder: Any, batch: Batch) -> torch.Tensor:
    """[B, T, D] under bf16 autocast, as the loop computes them."""
    with torch.autocast(batch.input_ids.device.type, torch.bfloat16):
        return decoder(**attention.decoder_inputs(batch, decoder.config), use_cache=False).last_hidden_state


def compared(model: Any, decoder: Any, head: Head, batch: Batch, expected: dict[str, Any], twice: bool) -> dict[str, Any]:
    """Differences to the reference, and whether the same backward gives the same bits again."""

    def gradients() -> tuple[float, torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        hidden = hidden_states(decoder, batch)  # [B, T, D]
        with torch.autocast(hidden.device.type, torch.bfloat16):
            loss = token_loss_sum(hidden, batch, head) / batch.num_tokens  # []
        loss.backward()
        return loss.item(), hidden.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    loss, hidden, found = gradients()
    flat, starts = hidden.flatten(0, 1), sample_starts(batch)  # [B * T, D]
    at = [start + position for start, length in starts for position in probed(length)]
    logits = head.logits(flat[at]).float()  # [probed, V]
    difference = logits - expected["logits"]
    squares = sum((found[n].float() - g).square().sum() for n, g in expected["gradients"].items())
    norm = sum(g.square().sum() for g in expected["gradients"].values())
    worst = max((found[n].float() - g).abs().max().item() / g.abs().max().item() for n, g in expected["gradients"].items())
    result = {
        "loss_difference": loss - expected["loss"],
        "logits_max_difference": difference.abs().max().item(),
        "logits_relative": (difference.norm() / expected["logits"].norm()).item(),
        "gradient_relative": (squares / norm).sqrt().item(),
        "gradient_max_relative": worst,
    }
    if twice:
        again = gradients()[2]
        result["same_bits_again"] = all(torch.equal(found[name], again[name]) for name in found)
    return result


def sample_starts(batch: Batch) -> list[tuple[int, int]]:
    """(first position in the flattened rows, length) of each sample, padding left out."""
    if batch.cu_seqlens is not None:
        ends = batch.cu_seqlens.tolist()
        return [(start, end - start) for start, end in itertools.pairwise(ends)][: len(batch.lines)]
    trained = (batch.labels != IGNORED).sum(dim=1).tolist()  # every id of a sample is trained
    return [(row * batch.labels.shape[1], length) for row, length in enumerate(trained)]


def leak(decoder: Any, samples: list[TokenizedExample], device: torch.device) -> float:
    """Largest change in the hidden states of a row's other samples when all ids of the middle one change: 0, or it leaks."""
    changed = samples[1]._replace(input_ids=[(index + 7) % decoder.config.vocab_size for index in samples[1].input_ids])
    with torch.no_grad():
        before, after = (
            hidden_states(decoder, collate_packed([[samples[0], middle, samples[2]]]).to(device))
            for middle in (samples[1], changed)
        )  # [1, T, D] each
    first, second = len(samples[0].input_ids), len(samples[0].input_ids) + len(samples[1].input_ids)
    apart = (before - after).abs()[0]  # [T, D]
    return max(apart[:first].max().item(), apart[second:].max().item())
