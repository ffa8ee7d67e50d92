"""NF4 weights with double quantization, as bitsandbytes lays them out, and how they become bf16."""

from typing import Any, NamedTuple

import torch

from qlora.model.third_party import bitsandbytes


class NF4Weight(NamedTuple):
    """An [N, K] weight in NF4 with double quantization, as bitsandbytes lays it out; no copies."""

    packed: torch.Tensor  # [N * K / 2, 1] uint8, two values each, the first in the high half
    scales: torch.Tensor  # [N * K / 64] uint8, one for each block of 64 values
    scales_of_scales: torch.Tensor  # [N * K / 64 / 256] fp32
    scale_code: torch.Tensor  # [256] fp32, what a uint8 scale stands for
    scale_offset: torch.Tensor  # [] fp32
    levels: torch.Tensor  # [16] fp32, what four bits stand for


def frozen_weight(layer: bitsandbytes.nn.Linear4bit) -> NF4Weight:
    """The weight of a layer, as it lies in memory."""
    weight: Any = layer.weight
    state = weight.quant_state
    assert state.nested and (state.quant_type, state.blocksize, state.state2.blocksize) == ("nf4", 64, 256)
    packed = weight.data.view(-1, 1)  # [N * K / 2, 1]
    return NF4Weight(packed, state.absmax, state.state2.absmax, state.state2.code, state.offset, state.code)


def dequantized(weight: NF4Weight, outputs: int, dtype: torch.dtype) -> torch.Tensor:
    """[N, K]: in one launch on a CUDA GPU, by bitsandbytes' two operators elsewhere; the same bits."""
    shape = (outputs, 2 * weight.packed.numel() // outputs)  # N, K
    if weight.packed.is_cuda:
        from qlora.speed.dequantize import dequantize  # here, as it needs Triton

        return dequantize(weight, shape, dtype)
    operators = torch.ops.bitsandbytes
    scales = operators.dequantize_blockwise(
        weight.scales, weight.scales_of_scales, weight.scale_code, 256, torch.float32
    )  # [N * K / 64]
    scales += weight.scale_offset
    dense: torch.Tensor = operators.dequantize_4bit(weight.packed, scales, 64, "nf4", list(shape), dtype)  # [N, K]
    return dense
