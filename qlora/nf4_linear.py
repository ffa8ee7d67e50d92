"""A frozen NF4 linear layer with LoRA beside it: the weight is dequantised once a pass, and the update is added by the product.

PEFT's own layer multiplies by the dequantised weight, copies the result, multiplies by A and B, scales, and adds: five tensors
as large as the output. Here A is applied first; B's product makes the output, to which the product with the large weight is
added while it is computed (`addmm`). Nothing of the layer's own size is kept for backward but its input, and that only for A.

Shapes: M positions, K inputs, N outputs, r the rank.
"""

from typing import Any, NamedTuple

import peft
import torch
from peft.tuners.lora.bnb import Linear4bit
from torch.utils.flop_counter import register_flop_formula


class NF4Weight(NamedTuple):
    """An [N, K] weight in NF4 with double quantisation, as bitsandbytes lays it out."""

    packed: torch.Tensor  # [N * K / 2, 1] uint8, two values each
    scales: torch.Tensor  # [N * K / 64] uint8, one for each block of 64 values
    scale_of_scales: torch.Tensor  # [N * K / 64 / 256] fp32
    scale_code: torch.Tensor  # [256] fp32, what a uint8 scale stands for
    scale_offset: torch.Tensor  # [] fp32
    outputs: int  # N
    inputs: int  # K


def dequantized(weight: NF4Weight, dtype: torch.dtype) -> torch.Tensor:
    """[N, K], by bitsandbytes' own operators."""
    blocks = torch.ops.bitsandbytes.dequantize_blockwise(
        weight.scales, weight.scale_of_scales, weight.scale_code, 256, torch.float32
    )  # [N * K / 64]
    blocks += weight.scale_offset
    return torch.ops.bitsandbytes.dequantize_4bit(
        weight.packed, blocks, 64, "nf4", [weight.outputs, weight.inputs], dtype
    )  # [N, K]


# Operators of their own, since a compiler that saw inside would keep a dequantised weight for backward.


@torch.library.custom_op("qlora::nf4_linear", mutates_args=())
def _nf4_linear(
    x: torch.Tensor,
    reduced: torch.Tensor,
    b: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    scale_of_scales: torch.Tensor,
    scale_code: torch.Tensor,
    scale_offset: torch.Tensor,
    outputs: int,
    inputs: int,
) -> torch.Tensor:
    """x [M, K], reduced [M, r], b [N, r] -> x W^T + reduced b^T [M, N], in the dtype of x."""
    weight = NF4Weight(packed, scales, scale_of_scales, scale_code, scale_offset, outputs, inputs)
    output = reduced @ b.T  # [M, N]
    return output.addmm_(x, dequantized(weight, x.dtype).T)  # [M, N]: the small product waits in memory, not the large one


@_nf4_linear.register_fake
def _(x, reduced, b, packed, scales, scale_of_scales, scale_code, scale_offset, outputs, inputs):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], outputs)


@torch.library.custom_op("qlora::nf4_linear_backward", mutates_args=())
def _nf4_linear_backward(
    d_output: torch.Tensor,
    reduced: torch.Tensor,
    b: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    scale_of_scales: torch.Tensor,
    scale_code: torch.Tensor,
    scale_offset: torch.Tensor,
    outputs: int,
    inputs: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """d_output [M, N] -> gradients of x [M, K], reduced [M, r] and b [N, r]."""
    weight = NF4Weight(packed, scales, scale_of_scales, scale_code, scale_offset, outputs, inputs)
    return d_output @ dequantized(weight, d_output.dtype), d_output @ b, d_output.T @ reduced


@_nf4_linear_backward.register_fake
def _(d_output, reduced, b, packed, scales, scale_of_scales, scale_code, scale_offset, outputs, inputs):  # type: ignore[no-untyped-def]
    return d_output.new_empty(d_output.shape[0], inputs), torch.empty_like(reduced), torch.empty_like(b)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, *tensors, ctx.outputs, ctx.inputs = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, d_output: torch.Tensor) -> tuple[Any, ...]:
    gradients = torch.ops.qlora.nf4_linear_backward(d_output.contiguous(), *ctx.saved_tensors, ctx.outputs, ctx.inputs)
    return *gradients, *([None] * 7)


_nf4_linear.register_autograd(_differentiate, setup_context=_keep)


@register_flop_formula(torch.ops.qlora.nf4_linear)
def _flops(x_shape: list[int], reduced_shape: list[int], *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """What recomputing the layer costs, which decides whether its output is kept."""
    inputs, outputs = args[-1], args[-2]
    return 2 * x_shape[0] * outputs * (inputs + reduced_shape[1])
