"""Attention alone: the kernels that there are, how long they take, and which of them ran.

The process that starts cells imports this module, so importing it must not touch the GPU.
Shapes: B rows, T tokens, H heads, d of a head. Times are medians, of CUDA events on a GPU, in ms.
"""

import functools
import importlib
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.harness import Clock, Row, device, peak_gb, spread
from qlora.config import TrainConfig
from qlora.data.batch import collate
from qlora.data.template import TokenizedExample
from qlora.errors import UserError, is_out_of_memory
from qlora.model import attention

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # q, k, v [B, T, H, d] each -> [B, T, H, d]
HEADS = {"phi3-mini": (32, 96), "demo": (9, 64), "tiny": (2, 96)}  # (H, d)
ON_A_CPU = ("eager", "sdpa", "sdpa_flash", "sdpa_math")
# The operators that the profiler shows when a family of kernels runs. Some show only in names of kernels.
OPERATORS = {
    "sdpa_cudnn": {"aten::_scaled_dot_product_cudnn_attention"},
    "sdpa_flash": {"aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_flash_attention_for_cpu"},
    "sdpa_efficient": {"aten::_scaled_dot_product_efficient_attention"},
    "sdpa_math": {"aten::_scaled_dot_product_attention_math"},
    "flash_attention_2": {"flash_attn::_flash_attn_forward", "flash_attn::_flash_attn_varlen_forward"},
    "varlen": {"torch_attn::_varlen_attn"},
}
NAMED = {"flex_attention": "triton_tem", "flash_attention_4": "flashattention", "flash_attention_2": " flash::flash_fwd"}
DISPATCHED = {"sdpa": {"sdpa_cudnn", "sdpa_flash", "sdpa_efficient", "sdpa_math"}}
ATTENTION = ("flash", "fmha", "sdpa", "attention", "softmax", "triton_tem")  # parts of names of kernels that attend


class Unavailable(Exception):
    """Why a cell cannot run."""


def measured(level: Callable[[Row, Row, Path], Iterable[Row]], cell: Row, grid: Row, scratch: Path) -> Row:
    """The `rows` of a cell, from the function of its level; or why it is `unavailable`."""
    try:
        return {"rows": list(level(cell, grid, scratch))}
    except (Unavailable, UserError) as error:
        return {"unavailable": str(error)}
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return {"unavailable": "out of memory"}


def milliseconds(function: Callable[[], Any], budget_s: float, least: int, most: int, warm_up: int = 2) -> list[float]:
    """Times of single calls after `warm_up` + 2 others; queued without a wait, so that the GPU does not idle for the host."""
    clock = Clock()
    for _ in range(warm_up + 1):
        function()
    began = clock.now()
    function()
    taken_s = clock.now() - began
    for _ in range(max(least, min(most, int(budget_s / taken_s)))):
        clock.begin()
        function()
        clock.end()
    return clock.milliseconds()


def matmul_tflops() -> float:
    """Rate of a large bf16 matrix product, 2 n^3 operations: what kernels are held against."""
    size = 8192 if device().type == "cuda" else 256
    left, right = (torch.randn(size, size, device=device(), dtype=torch.bfloat16) for _ in range(2))  # [size, size] each
    median = statistics.median(milliseconds(lambda: left @ right, 1.0, 5, 50))
    return round(2 * size**3 / median / 1e9, 6)


def verified(backend: str, function: Callable[[], Any]) -> Row:
    """The kernels that ran, the longest first, and their families; Unavailable if the backend's name promises others."""
    with torch.profiler.profile() as profiler:
        function()
        if device().type == "cuda":
            torch.cuda.synchronize()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
    operators = {event.key for event in events}
    families = {family for family, names in OPERATORS.items() if operators & names}
    on_gpu = [event.key for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    names = [name for name in on_gpu if any(part in name.lower() for part in ATTENTION)]
    families |= {family for family, part in NAMED.items() if any(part in name.lower() for name in names)}
    if not families and operators & {"aten::_softmax", "aten::softmax"}:
        families = {"eager"}
    if device().type == "cpu":
        names = sorted(operators & {"aten::_softmax"}.union(*OPERATORS.values()))
    if not families or not families <= DISPATCHED.get(backend, {backend}):
        raise Unavailable(f"ran {', '.join(sorted(families)) or 'no attention kernel that is known'} instead: {names[:3]}")
    return {"ran": sorted(families), "kernels": [name[:120] for name in names[:3]]}


def kernel(cell: Row, grid: Row, scratch: Path) -> Iterator[Row]:
    """Forward and backward of attention alone, bf16 and causal."""
    backend, length, window = cell["backend"], cell["length"], cell["window"]
    if device().type == "cpu" and backend not in ON_A_CPU:
        raise Unavailable("it needs a CUDA GPU")
    torch.manual_seed(0)
    shape = (cell["rows"], length, *HEADS[grid["shape"]])  # [B, T, H, d], as a projection writes it
    q, k, v = (torch.randn(shape, device=device(), dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    try:
        forward = functools.partial(KERNELS[backend](q, window), q, k, v)
        output = forward()  # [B, T, H, d]
    except (ImportError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise Unavailable(" ".join(str(error).split())[:200]) from None
    backward = functools.partial(torch.autograd.grad, inputs=(q, k, v), grad_outputs=torch.randn_like(output))
    ran = verified(backend, lambda: backward(forward()))
    backward_ms = milliseconds(functools.partial(backward, output, retain_graph=True), 0.5, 5, 30)
    del output
    forward_ms = milliseconds(forward, 0.5, 5, 30)
    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    backward(forward())
    seen = min(window or length, length)
    pairs = seen * (seen + 1) / 2 + (length - seen) * seen  # of a row
    flops = 4 * q.numel() / length * pairs  # two products of 2 d operations for each pair; backward has five
    yield {
        **cell,
        **spread("forward_ms", forward_ms),
        **spread("backward_ms", backward_ms),
        "forward_tflops": round(flops / statistics.median(forward_ms) / 1e9, 2),
        "backward_tflops": round(2.5 * flops / statistics.median(backward_ms) / 1e9, 2),
        "peak_gb": peak_gb(),
        **ran,
    }


def causal_mask(q: torch.Tensor, window: int | None) -> torch.Tensor:
    """[1, 1, T, T] bool: the causal mask of a row, with the window."""
    row = [0] * q.shape[1]
    return attention.causal_mask(collate([TokenizedExample(row, row, 1)]).to(q.device), window)


def eager(q: torch.Tensor, window: int | None) -> Attend:
    """The loop's own eager function."""
    seen = causal_mask(q, window)  # [1, 1, T, T]
    mask = torch.zeros_like(seen, dtype=torch.bfloat16).masked_fill_(~seen, torch.finfo(torch.bfloat16).min)  # [1, 1, T, T]
    module = SimpleNamespace(num_key_value_groups=1, training=True)
    function = transformers.AttentionInterface()[attention.PREFIX + "eager"]
    options = {"attention_mask": mask, "scaling": q.shape[-1] ** -0.5}
    return lambda *qkv: function(module, *(tensor.transpose(1, 2) for tensor in qkv), **options)[0]


def sdpa(chosen: SDPBackend | None, q: torch.Tensor, window: int | None) -> Attend:
    """torch's scaled_dot_product_attention with one of its kernels, or with what its dispatcher picks."""
    mask = None if window is None else causal_mask(q, window)  # [1, 1, T, T]

    def attend(*qkv: torch.Tensor) -> torch.Tensor:
        heads_first = (tensor.transpose(1, 2) for tensor in qkv)  # [B, H, T, d] each
        return F.scaled_dot_product_attention(*heads_first, attn_mask=mask, is_causal=mask is None).transpose(1, 2)

    return attend if chosen is None else sdpa_kernel(chosen)(attend)


def flash(module: str, unlimited: int | None, q: torch.Tensor, window: int | None) -> Attend:
    """Package flash-attn, or flash-attn-4."""
    function = importlib.import_module(module).flash_attn_func
    size = (unlimited, unlimited) if window is None else (window - 1, 0)

    def attend(*qkv: torch.Tensor) -> torch.Tensor:
        output = function(*qkv, causal=True, window_size=size)
        return output[0] if isinstance(output, tuple) else output

    return attend


def varlen(q: torch.Tensor, window: int | None) -> Attend:
    """torch's own varlen kernel, all samples of one length."""
    attention.choose_attention(TrainConfig(attn_implementation="varlen"), q.device)
    from torch.nn.attention.varlen import varlen_attn

    rows, length = q.shape[:2]
    ends = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=q.device)  # [B + 1]
    size = (-1, 0) if window is None else (window - 1, 0)
    lengths = (ends, ends, length, length)
    return lambda *qkv: varlen_attn(*(tensor.flatten(0, 1) for tensor in qkv), *lengths, window_size=size).view_as(q)


def flex(q: torch.Tensor, window: int | None) -> Attend:
    """torch's flex_attention, compiled."""
    length = q.shape[1]

    def seen(row: Any, head: Any, at: Any, key: Any) -> Any:
        return (at >= key) & (at - key < (window or length))

    mask = create_block_mask(seen, None, None, length, length, device=q.device)
    torch._functorch.config.donated_buffer = False  # backward is taken several times on one graph
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    return lambda *qkv: compiled(*(tensor.transpose(1, 2) for tensor in qkv), block_mask=mask).transpose(1, 2)


KERNELS: dict[str, Callable[[torch.Tensor, int | None], Attend]] = {  # each for rows like q, and a window
    "eager": eager,
    "sdpa": functools.partial(sdpa, None),
    "sdpa_cudnn": functools.partial(sdpa, SDPBackend.CUDNN_ATTENTION),
    "sdpa_flash": functools.partial(sdpa, SDPBackend.FLASH_ATTENTION),
    "sdpa_efficient": functools.partial(sdpa, SDPBackend.EFFICIENT_ATTENTION),
    "sdpa_math": functools.partial(sdpa, SDPBackend.MATH),
    "flash_attention_2": functools.partial(flash, "flash_attn", -1),
    "varlen": varlen,
    "flex_attention": flex,
    "flash_attention_4": functools.partial(flash, "flash_attn.cute", None),
}
