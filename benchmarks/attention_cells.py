"""What one cell of attention.py measures, in a process of its own.

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
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import torch
import torch.nn.functional as F
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.train_step import write_random_model
from qlora import attention, data
from qlora.config import AttnImplementation, TrainConfig, UserError
from qlora.guards import is_out_of_memory
from qlora.loss import Head, read_head, token_loss_sum
from qlora.memory import peak_memory_gib
from qlora.model import add_adapters, audit_targets, enable_gradient_checkpointing, load_nf4_model, load_skeleton
from qlora.tracking import environment
from train_loop import train_step

HEADS = {"phi3-mini": (32, 96), "demo": (9, 64), "tiny": (2, 96)}  # (H, d)
# Operator that the profiler shows when a family of kernels runs; some show in a part of the kernel's own name.
OPERATORS = {
    "sdpa_cudnn": ("aten::_scaled_dot_product_cudnn_attention",),
    "sdpa_flash": ("aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_flash_attention_for_cpu"),
    "sdpa_efficient": ("aten::_scaled_dot_product_efficient_attention",),
    "sdpa_math": ("aten::_scaled_dot_product_attention_math",),
    "flash_attention_2": ("flash_attn::_flash_attn_forward", "flash_attn::_flash_attn_varlen_forward"),
    "varlen": ("torch_attn::_varlen_attn",),
}
DISPATCHED = {"sdpa": {"sdpa_cudnn", "sdpa_flash", "sdpa_efficient", "sdpa_math"}}
NAMED = {"flex_attention": "triton_tem", "flash_attention_4": "flashattention", "flash_attention_2": " flash::flash_fwd"}
ATTENTION = ("flash", "fmha", "sdpa", "attention", "softmax", "triton_tem")  # parts of names of kernels that attend
LEAST_STEPS = 3
TIMED_S = 3.0  # for the steps of a cell, 0.5 for a kernel
PROBED = 64  # positions whose logits are compared
SAMPLES, MEAN_LENGTH = 16, 600  # of a padded or packed step


class Unavailable(Exception):
    """Why a cell cannot run."""


def device_here() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def measure(cell: dict[str, Any], grid: dict[str, Any], scratch: Path) -> list[dict[str, Any]]:
    """The rows of a cell; one that cannot run is a row with the reason."""
    device = device_here()
    try:
        match cell["level"]:
            case "environment":
                described = {**environment(device), "cuda_device": device.type == "cuda"}
                return [{"environment": described, "matmul_tflops": matmul_tflops(device)}]
            case "model":
                write_model(grid["shape"], scratch / "model")
                return [{}]
            case "kernel":
                return [{**cell, **kernel(cell, grid, device)}]
            case "step":
                return [{**cell, **step(cell, grid, scratch, device)}]
            case _:
                return list(parity(cell, grid, scratch, device))
    except (Unavailable, UserError) as error:
        return [{**cell, "unavailable": str(error)}]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return [{**cell, "unavailable": "out of memory"}]


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


# -- time, and the kernel that ran -----------------------------------------------------------------------------------


def milliseconds(
    function: Callable[[], Any], device: torch.device, budget_s: float, least: int, most: int, warm_up: int = 2
) -> list[float]:
    """Times of single calls after `warm_up` + 2 others; queued without a wait, so that the GPU does not idle for the host."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(warm_up + 1):
        function()
    wait()
    began = time.perf_counter()
    function()
    wait()
    count = max(least, min(most, int(budget_s / max(time.perf_counter() - began, 1e-6))))
    if device.type == "cpu":
        times = []
        for _ in range(count):
            began = time.perf_counter()
            function()
            times.append(1000 * (time.perf_counter() - began))
        return times
    torch.cuda.reset_peak_memory_stats()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for start, end in events:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def spread(name: str, times: list[float]) -> dict[str, float]:
    """Median, and the 10th and 90th percentile, under names with their unit."""
    tenths = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times * 9
    return {name: round(statistics.median(times), 4), f"{name}_p10": round(tenths[0], 4), f"{name}_p90": round(tenths[8], 4)}


def matmul_tflops(device: torch.device) -> float:
    """Rate of a large bf16 matrix product, 2 n^3 operations: what kernels are held against."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))  # [size, size] each
    median = statistics.median(milliseconds(lambda: left @ right, device, 1.0, 5, 50))
    return round(2 * size**3 / median / 1e9, 1)


def kernels_run(function: Callable[[], Any], device: torch.device) -> tuple[set[str], list[str]]:
    """Families of attention whose operator was dispatched, and the names of the kernels that attended, the longest first."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
    averages = profiler.key_averages()
    operators = {average.key for average in averages}
    families = {family for family, names in OPERATORS.items() if operators & set(names)}
    on_device = [average for average in averages if average.device_type == torch.autograd.DeviceType.CUDA]
    on_device.sort(key=lambda average: -average.self_device_time_total)
    names = [average.key for average in on_device if any(part in average.key.lower() for part in ATTENTION)]
    families |= {family for family, part in NAMED.items() if any(part in name.lower() for name in names)}
    if not families and ("aten::_softmax" in operators or "aten::softmax" in operators):
        families.add("eager")
    if device.type == "cpu":
        names = sorted(operators & {name for family in OPERATORS.values() for name in family} | operators & {"aten::_softmax"})
    return families, names


def verified(backend: str, function: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """The kernels that ran, or Unavailable if they are not those that the backend's name promises."""
    families, names = kernels_run(function, device)
    allowed = DISPATCHED.get(backend, {backend})
    if not families or not families <= allowed:
        raise Unavailable(f"ran {', '.join(sorted(families)) or 'no attention kernel that is known'} instead: {names[:3]}")
    return {"ran": sorted(families), "kernels": [name[:120] for name in names[:3]]}


# -- kernel level ----------------------------------------------------------------------------------------------------


def kernel(cell: dict[str, Any], grid: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Forward and backward of attention alone, bf16 and causal."""
    backend, length, window, rows = (cell[name] for name in ("backend", "length", "window", "rows"))
    heads, width = HEADS[grid["shape"]]
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(rows, length, heads, width, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    )  # [B, T, H, d] each, as a projection writes them
    attend = KERNEL_FUNCTIONS[backend](rows, length, window, heads, device)
    forward = functools.partial(attend, q, k, v)
    try:
        output = forward()  # [B, T, H, d]
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise Unavailable(" ".join(str(error).split())[:200]) from None
    backward = functools.partial(torch.autograd.grad, inputs=(q, k, v), grad_outputs=torch.randn_like(output))
    ran = verified(backend, lambda: backward(forward()), device)
    backward_ms = milliseconds(functools.partial(backward, output, retain_graph=True), device, 0.5, 5, 30)
    del output
    forward_ms = milliseconds(forward, device, 0.5, 5, 30)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    backward(forward())
    seen = length * (length + 1) / 2 if window is None else window * (window + 1) / 2 + (length - window) * window
    flops = 4 * rows * heads * width * seen  # two products of 2 d operations for each pair; backward has five
    medians = statistics.median(forward_ms), statistics.median(backward_ms)
    rates = flops / medians[0] / 1e9, 2.5 * flops / medians[1] / 1e9
    return {
        **spread("forward_ms", forward_ms),
        **spread("backward_ms", backward_ms),
        "forward_tflops": round(rates[0], 2),
        "backward_tflops": round(rates[1], 2),
        "peak_gib": round(peak_memory_gib(device), 3),
        **ran,
    }


def band(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """[1, 1, T, T] bool: the causal mask of a row, with the window."""
    return attention.causal_mask(data.collate([data.Encoded([0] * length, [0] * length, 1)]).to(device), window)


def eager_kernel(rows: int, length: int, window: int | None, heads: int, device: torch.device) -> Callable[..., torch.Tensor]:
    """The loop's own eager function."""
    mask = torch.zeros(1, 1, length, length, dtype=torch.bfloat16, device=device)  # [1, 1, T, T]
    mask.masked_fill_(~band(length, window, device), attention.MASKED)
    module: Any = SimpleNamespace(num_key_value_groups=1, training=True)
    function = transformers.AttentionInterface()[attention.PREFIX + "eager"]
    return lambda q, k, v: function(
        module, *(x.transpose(1, 2) for x in (q, k, v)), attention_mask=mask, scaling=q.shape[-1] ** -0.5
    )[0]


def sdpa_kernel_of(*chosen: SDPBackend) -> Callable[..., Callable[..., torch.Tensor]]:
    """torch's scaled_dot_product_attention with one of its kernels, or with what its dispatcher picks."""

    def make(rows: int, length: int, window: int | None, heads: int, device: torch.device) -> Callable[..., torch.Tensor]:
        if device.type == "cpu" and chosen and chosen[0] not in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
            raise Unavailable("it needs a CUDA GPU")
        mask = None if window is None else band(length, window, device)  # [1, 1, T, T]

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(list(chosen)) if chosen else contextlib.nullcontext():
                rows_first = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, T, d] each
                return F.scaled_dot_product_attention(*rows_first, attn_mask=mask, is_causal=mask is None).transpose(1, 2)

        return attend

    return make


def flash_kernel(rows: int, length: int, window: int | None, heads: int, device: torch.device) -> Callable[..., torch.Tensor]:
    """Package flash-attn."""
    if device.type == "cpu":
        raise Unavailable("it needs a CUDA GPU")
    try:
        import flash_attn
    except ImportError as error:
        raise Unavailable(f"package flash-attn is not installed ({error})") from None
    size = (-1, -1) if window is None else (window - 1, 0)
    return lambda q, k, v: flash_attn.flash_attn_func(q, k, v, causal=True, window_size=size)


def flash_4_kernel(rows: int, length: int, window: int | None, heads: int, device: torch.device) -> Callable[..., torch.Tensor]:
    """Package flash-attn-4."""
    try:
        from flash_attn.cute import flash_attn_func
    except ImportError:
        raise Unavailable("package flash-attn-4 is not installed") from None
    size = (None, None) if window is None else (window - 1, 0)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        output = flash_attn_func(q, k, v, causal=True, window_size=size)
        return output[0] if isinstance(output, tuple) else output

    return attend


def varlen_kernel(rows: int, length: int, window: int | None, heads: int, device: torch.device) -> Callable[..., torch.Tensor]:
    """torch's own varlen kernel, all samples of one length."""
    attention.choose_attention(TrainConfig(attn_implementation="varlen"), device)
    from torch.nn.attention import varlen

    function: Any = varlen.varlen_attn
    ends = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=device)  # [B + 1]
    size = (-1, 0) if window is None else (window - 1, 0)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        flat = (x.flatten(0, 1) for x in (q, k, v))  # [B * T, H, d] each
        return function(*flat, ends, ends, length, length, window_size=size).view_as(q)

    return attend


def flex_kernel(rows: int, length: int, window: int | None, heads: int, device: torch.device) -> Callable[..., torch.Tensor]:
    """torch's flex_attention, compiled."""
    if device.type == "cpu":
        raise Unavailable("its backward needs a CUDA GPU")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(row: Any, head: Any, at: Any, key: Any) -> Any:
        return (at >= key) & (at - key < (window or length))

    mask = create_block_mask(seen, None, None, length, length, device=device)
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask).transpose(1, 2)


KERNEL_FUNCTIONS: dict[str, Callable[..., Callable[..., torch.Tensor]]] = {
    "eager": eager_kernel,
    "sdpa": sdpa_kernel_of(),
    "sdpa_cudnn": sdpa_kernel_of(SDPBackend.CUDNN_ATTENTION),
    "sdpa_flash": sdpa_kernel_of(SDPBackend.FLASH_ATTENTION),
    "sdpa_efficient": sdpa_kernel_of(SDPBackend.EFFICIENT_ATTENTION),
    "sdpa_math": sdpa_kernel_of(SDPBackend.MATH),
    "flash_attention_2": flash_kernel,
    "varlen": varlen_kernel,
    "flex_attention": flex_kernel,
    "flash_attention_4": flash_4_kernel,
}


# -- step level ------------------------------------------------------------------------------------------------------


def load(
    folder: Path, backend: AttnImplementation, max_length: int, window: int, device: torch.device
) -> tuple[Any, TrainConfig]:
    """The NF4 model with adapters, as the loop has it, and the configuration it is trained with."""
    config = TrainConfig(model=str(folder), lora_dropout=0.0, max_length=max_length, attn_implementation=backend)
    skeleton = transformers.AutoModelForCausalLM.from_config
    skeleton = load_skeleton(str(folder), dataclasses.replace(config, max_length=16))
    chosen = attention.choose_attention(config, device, skeleton)
    torch.manual_seed(0)
    model = load_nf4_model(str(folder), config, chosen.loaded_as, device)
    model = add_adapters(model, config, audit_targets(skeleton, config), str(folder)).train()
    model.config.sliding_window = window
    return model, config


def random_rows(lengths: list[int], vocabulary: int) -> list[data.Encoded]:
    """Samples of the given lengths, every id but the first trained."""
    draw = random.Random(0)
    rows = [[draw.randrange(3, vocabulary) for _ in range(length)] for length in lengths]
    return [data.Encoded(ids, ids, line) for line, ids in enumerate(rows)]


def micro_batches(cell: dict[str, Any], vocabulary: int, pin: bool) -> list[data.Batch]:
    """The window of a step: one micro-batch of full rows, or lognormal lengths, padded or packed."""
    length, rows = cell["length"], cell["rows"]
    if cell["layout"] == "full":
        samples, order = random_rows([length] * rows, vocabulary), list(range(rows))
        return list(data.micro_batches(samples, order, rows, pin))
    draw, mean = random.Random(1), MEAN_LENGTH * length // 2048
    lengths = [min(length, max(8, round(draw.lognormvariate(0, 0.6) * mean))) for _ in range(SAMPLES)]
    samples = random_rows(lengths, vocabulary)
    order = list(range(SAMPLES))
    packed: Any = data.pack(lengths, order, length) if cell["layout"] == "packed" else order
    return list(data.micro_batches(samples, packed, rows, pin))


def step(cell: dict[str, Any], grid: dict[str, Any], scratch: Path, device: torch.device) -> dict[str, Any]:
    """The loop's own train_step, after warm-up."""
    model, config = load(scratch / "model", cell["backend"], cell["length"], grid["window"], device)
    if cell["checkpointing"] == "full":
        enable_gradient_checkpointing(model)
    head = read_head(model)
    window = micro_batches(cell, len(head.weight), pin=device.type == "cuda")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, fused=True)
    loss_sum = functools.partial(token_loss_sum, head=head)
    decoder = model.get_decoder()

    def forward() -> None:
        batch = window[0].to(device)
        with torch.autocast(device.type, torch.bfloat16):
            decoder(**attention.decoder_inputs(batch, decoder.config), use_cache=False)

    take = functools.partial(train_step, decoder, optimizer, window, loss_sum, 5e-5, 1.0)
    ours = cell["window"] == "as trained"
    with attention.for_training(model, config) if ours else contextlib.nullcontext():
        ran = verified(cell["backend"], forward, device)
        step_ms = milliseconds(take, device, TIMED_S, LEAST_STEPS, grid["steps"], warm_up=0)
        loss, norm = take()
    if not (torch.isfinite(loss) and torch.isfinite(norm)):
        raise Unavailable(f"loss {loss.item()}, norm {norm.item()}")
    tokens = sum(batch.num_input_tokens for batch in window)
    return {
        **spread("step_ms", step_ms),
        "tokens": tokens,  # without padding
        "positions": sum(batch.input_ids.numel() for batch in window),
        "micro_batches": len(window),
        "tokens_per_s": round(1000 * tokens / statistics.median(step_ms), 1),
        "peak_gib": round(peak_memory_gib(device), 3),
        "loss": loss.item(),
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
    if device.type == "cuda":
        enable_gradient_checkpointing(model)
    head, vocabulary = read_head(model), model.config.vocab_size
    for length in lengths:
        for layout, shares in LAYOUTS.items():
            sizes = [max(4, int(share * length)) for share in shares]
            samples = random_rows(sizes, vocabulary)
            file = scratch / f"{layout}-{length}.pt"
            if is_reference:
                torch.save(reference(model, samples, device), file)
                continue
            batch = data.collate_packed([samples]) if layout == "packed" else data.collate(samples)
            with attention.for_training(model, dataclasses.replace(config, max_length=length)):
                found = compared(model, head, batch.to(device), torch.load(file, map_location=device), length == lengths[2])
                if layout == "packed":
                    found["leak"] = leak(model, samples, device)
                if (length, layout) == (lengths[0], "unpadded"):
                    found |= verified(backend, lambda b=batch: hidden_states(model, b.to(device)), device)
            yield {"level": "parity", "backend": backend, "length": length, "layout": layout, "window": grid["window"], **found}
    if is_reference:
        yield {**cell, "done": True}


def dequantize(model: Any) -> None:
    """Turn the NF4 model into fp32 throughout, in place: what is compared is attention and its rounding, not quantisation."""
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


def reference(model: Any, samples: list[data.Encoded], device: torch.device) -> dict[str, Any]:
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


def hidden_states(model: Any, batch: data.Batch) -> torch.Tensor:
    """[B, T, D] under bf16 autocast, as the loop computes them."""
    decoder = model.get_decoder()
    with torch.autocast(batch.input_ids.device.type, torch.bfloat16):
        return decoder(**attention.decoder_inputs(batch, decoder.config), use_cache=False).last_hidden_state


def compared(model: Any, head: Head, batch: data.Batch, expected: dict[str, Any], twice: bool) -> dict[str, Any]:
    """Differences to the reference, and whether the same backward gives the same bits again."""

    def gradients() -> tuple[float, torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        hidden = hidden_states(model, batch)  # [B, T, D]
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


def sample_starts(batch: data.Batch) -> list[tuple[int, int]]:
    """(first position in the flattened rows, length) of each sample, padding left out."""
    if batch.cu_seqlens is not None:
        ends = batch.cu_seqlens.tolist()
        return [(start, end - start) for start, end in itertools.pairwise(ends)][: len(batch.lines)]
    trained = (batch.labels != data.IGNORED).sum(dim=1).tolist()  # every id of a sample is trained
    return [(row * batch.labels.shape[1], length) for row, length in enumerate(trained)]


def leak(model: Any, samples: list[data.Encoded], device: torch.device) -> float:
    """Largest change in the hidden states of a row's other samples when all ids of the middle one change: 0, or it leaks."""
    changed = samples[1]._replace(input_ids=[(index + 7) % model.config.vocab_size for index in samples[1].input_ids])
    with torch.no_grad():
        before, after = (
            hidden_states(model, data.collate_packed([[samples[0], middle, samples[2]]]).to(device))
            for middle in (samples[1], changed)
        )  # [1, T, D] each
    first, second = len(samples[0].input_ids), len(samples[0].input_ids) + len(samples[1].input_ids)
    apart = (before - after).abs()[0]  # [T, D]
    return max(apart[:first].max().item(), apart[second:].max().item())
