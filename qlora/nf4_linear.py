"""A frozen NF4 linear layer with LoRA beside it, as one operator: the weight is dequantised once in each pass.

PEFT's own layer multiplies by the weight, copies the result, multiplies by A and by B, scales, and adds: five tensors as large
as the output. Here A comes first; B's small product makes the output, and the large product adds to it while it is computed.
Nothing of the layer's size is kept for backward but its input, for the gradient of A. Only in training: evaluation and
generation take PEFT's way.

Shapes: M positions, K inputs, N outputs, r the rank.
"""

from typing import Any, NamedTuple

import bitsandbytes
import torch
from peft.tuners.lora.bnb import Linear4bit
from torch.utils.flop_counter import register_flop_formula


class NF4Weight(NamedTuple):
    """An [N, K] weight in NF4 with double quantisation, as bitsandbytes lays it out; no copies."""

    packed: torch.Tensor  # [N * K / 2, 1] uint8, two values each, the first in the high half
    scales: torch.Tensor  # [N * K / 64] uint8, one for each block of 64 values
    scales_of_scales: torch.Tensor  # [N * K / 64 / 256] fp32
    scale_code: torch.Tensor  # [256] fp32, what a uint8 scale stands for
    scale_offset: torch.Tensor  # [] fp32
    levels: torch.Tensor  # [16] fp32, what four bits stand for
    outputs: int  # N
    inputs: int  # K


def dequantized(weight: NF4Weight, dtype: torch.dtype) -> torch.Tensor:
    """[N, K]: in one launch on a CUDA GPU, by bitsandbytes' two operators elsewhere; the same bits."""
    if weight.packed.is_cuda:
        from qlora.dequantize import dequantize  # here, as it needs Triton

        return dequantize(*weight[:6], (weight.outputs, weight.inputs), dtype)
    operators = torch.ops.bitsandbytes
    scales = operators.dequantize_blockwise(
        weight.scales, weight.scales_of_scales, weight.scale_code, 256, torch.float32
    )  # [N * K / 64]
    scales += weight.scale_offset
    return operators.dequantize_4bit(weight.packed, scales, 64, "nf4", [weight.outputs, weight.inputs], dtype)  # [N, K]


# -- the operator ------------------------------------------------------------------------------------------------------

# Opaque to torch.compile, which would otherwise keep dequantised weights for backward, at 2 bytes a parameter.
# Its last argument says which layer it is, for those who decide what is kept and what is recomputed.


@torch.library.custom_op("qlora::nf4_linear", mutates_args=())
def nf4_linear(
    x: torch.Tensor,
    reduced: torch.Tensor,
    b: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    scales_of_scales: torch.Tensor,
    scale_code: torch.Tensor,
    scale_offset: torch.Tensor,
    levels: torch.Tensor,
    outputs: int,
    inputs: int,
    name: str,
) -> torch.Tensor:
    """x [M, K], reduced [M, r], b [N, r] -> x W^T + reduced b^T [M, N], all in the dtype of x."""
    weight = NF4Weight(packed, scales, scales_of_scales, scale_code, scale_offset, levels, outputs, inputs)
    output = reduced @ b.T  # [M, N]
    return output.addmm_(x, dequantized(weight, x.dtype).T)  # [M, N]


@nf4_linear.register_fake
def _nf4_linear_shape(x: torch.Tensor, reduced: torch.Tensor, b: torch.Tensor, *weight_and_name: Any) -> torch.Tensor:
    return x.new_empty(x.shape[0], b.shape[0])  # [M, N]


@torch.library.custom_op("qlora::nf4_linear_backward", mutates_args=())
def nf4_linear_backward(
    d_output: torch.Tensor,
    reduced: torch.Tensor,
    b: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    scales_of_scales: torch.Tensor,
    scale_code: torch.Tensor,
    scale_offset: torch.Tensor,
    levels: torch.Tensor,
    outputs: int,
    inputs: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """d_output [M, N] -> the gradients of x [M, K], reduced [M, r] and b [N, r]."""
    weight = NF4Weight(packed, scales, scales_of_scales, scale_code, scale_offset, levels, outputs, inputs)
    return d_output @ dequantized(weight, d_output.dtype), d_output @ b, d_output.T @ reduced


@nf4_linear_backward.register_fake
def _nf4_linear_backward_shapes(
    d_output: torch.Tensor, reduced: torch.Tensor, b: torch.Tensor, *weight: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return d_output.new_empty(d_output.shape[0], weight[-1]), torch.empty_like(reduced), torch.empty_like(b)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, *tensors, ctx.outputs, ctx.inputs, _ = inputs
    ctx.save_for_backward(*tensors)  # not x: W is frozen


def _differentiate(ctx: Any, d_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    gradients = torch.ops.qlora.nf4_linear_backward(d_output, *ctx.saved_tensors, ctx.outputs, ctx.inputs)
    return *gradients, *[None] * 9


nf4_linear.register_autograd(_differentiate, setup_context=_keep_for_backward)


@register_flop_formula(torch.ops.qlora.nf4_linear)
def _forward_flops(x: list[int], reduced: list[int], b: list[int], *weight: Any, **_: Any) -> int:
    return 2 * x[0] * b[0] * (x[1] + b[1])


@register_flop_formula(torch.ops.qlora.nf4_linear_backward)
def _backward_flops(d_output: list[int], reduced: list[int], b: list[int], *weight: Any, **_: Any) -> int:
    return 2 * d_output[0] * b[0] * (weight[-1] + 2 * b[1])


# -- the layer ---------------------------------------------------------------------------------------------------------


class LoRALinear(Linear4bit):
    """PEFT's adapted NF4 layer, with the operator above as its forward in training."""

    frozen: NF4Weight
    name: str

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[..., K] -> [..., N], in autocast's dtype if there is one, else in that of x."""
        if not self.training or self.disable_adapters:
            return super().forward(x, *args, **kwargs)
        autocast, device = torch.is_autocast_enabled(x.device.type), x.device.type
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        a, b = self.lora_A["default"].weight.to(dtype), self.lora_B["default"].weight.to(dtype)  # [r, K], [N, r]
        rows = x.to(dtype).flatten(0, -2)  # [M, K]
        reduced = self.lora_dropout["default"](rows) @ a.T * self.scaling["default"]  # [M, r]
        output = nf4_linear(rows, reduced, b, *self.frozen, self.name)  # [M, N]
        if self.base_layer.bias is not None:
            output = output + self.base_layer.bias.to(dtype)  # [M, N]
        return output.view(*x.shape[:-1], -1)  # [..., N]


def install(model: Any) -> None:
    """Make every adapted NF4 layer of a model a LoRALinear, in place: same weights, same names."""
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit) and isinstance(module.base_layer, bitsandbytes.nn.Linear4bit):
            weight: Any = module.base_layer.weight
            state = weight.quant_state
            assert state.nested and (state.quant_type, state.blocksize, state.state2.blocksize) == ("nf4", 64, 256)
            packed = weight.data.view(-1, 1)  # [N * K / 2, 1]
            tensors = (packed, state.absmax, state.state2.absmax, state.state2.code, state.offset, state.code)
            ours: Any = module
            ours.__class__ = LoRALinear
            ours.frozen, ours.name = NF4Weight(*tensors, *state.shape), name.rsplit(".", 1)[-1]
