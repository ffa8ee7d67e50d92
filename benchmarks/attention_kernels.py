"""Attention alone: the kernels that there are, how long they take, and which of them really ran.

Nothing here needs the model: the module is imported before processes are forked, and must not touch the GPU while it is.
Shapes: B rows, T tokens, H heads, d of a head. Times are medians of CUDA events, in ms.
"""

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.train_step import spread
from qlora.config import TrainConfig
from qlora.data.batch import collate
from qlora.data.template import TokenizedExample
from qlora.errors import UserError, is_out_of_memory
from qlora.model import attention
from qlora.speed.memory import peak_memory_gb

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


class Unavailable(Exception):
    """Why a cell cannot run."""


def measured(cell: dict[str, Any], rows: Callable[[], Iterable[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of a cell; one that cannot run is a row with the reason."""
    try:
        return list(rows())
    except (Unavailable, UserError) as error:
        return [{**cell, "unavailable": str(error)}]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return [{**cell, "unavailable": "out of memory"}]


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
        "peak_gb": round(peak_memory_gb(device), 3),
        **ran,
    }


def band(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """[1, 1, T, T] bool: the causal mask of a row, with the window."""
    return attention.causal_mask(collate([TokenizedExample([0] * length, [0] * length, 1)]).to(device), window)


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
    import torch._functorch.config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(row: Any, head: Any, at: Any, key: Any) -> Any:
        return (at >= key) & (at - key < (window or length))

    mask = create_block_mask(seen, None, None, length, length, device=device)
    torch._functorch.config.donated_buffer = False  # backward is taken several times on one graph
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
