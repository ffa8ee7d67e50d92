"""Weights in 4 bits, as bitsandbytes lays them out, and how they become bf16.

A weight [N, K] is a list of tensors, without copies, in this order:

    packed              [N * K / 2, 1] uint8, two values each, the first in the high half
    scales              [N * K / 64], one for each block of 64 values: fp32, or uint8 with double quantization
    levels              [16] fp32, what four bits stand for: those of NF4 or FP4

and, with double quantization, what the uint8 scales stand for:

    scales_of_scales    [N * K / 64 / 256] fp32
    scale_code          [256] fp32
    scale_offset        [] fp32
"""

from collections.abc import Sequence
from typing import Any

import torch

from qlora.model.third_party import bitsandbytes


def frozen_weight(layer: bitsandbytes.nn.Linear4bit) -> list[torch.Tensor]:
    """The weight of a layer, as it lies in memory."""
    weight: Any = layer.weight
    state = weight.quant_state
    packed = weight.data.view(-1, 1)  # [N * K / 2, 1]
    if not state.nested:
        assert state.blocksize == 64
        return [packed, state.absmax, state.code]
    assert (state.blocksize, state.state2.blocksize) == (64, 256)
    return [packed, state.absmax, state.code, state.state2.absmax, state.state2.code, state.offset]


def dequantized(weight: Sequence[torch.Tensor], outputs: int, dtype: torch.dtype) -> torch.Tensor:
    """[N, K]: in one launch on a CUDA GPU, by bitsandbytes' operators elsewhere; the same bits."""
    packed, scales, levels, *double = weight
    shape = (outputs, 2 * packed.numel() // outputs)  # N, K
    if packed.is_cuda:
        from qlora.speed.dequantize import dequantize  # here, as it needs Triton

        return dequantize(weight, shape, dtype)
    operators = torch.ops.bitsandbytes
    if double:
        scales_of_scales, scale_code, scale_offset = double
        scales = operators.dequantize_blockwise(scales, scales_of_scales, scale_code, 256, torch.float32)  # [N * K / 64]
        scales += scale_offset
    kind = "nf4" if levels[0] == -1.0 else "fp4"  # the first level of FP4 is 0
    dense: torch.Tensor = operators.dequantize_4bit(packed, scales, 64, kind, list(shape), dtype)  # [N, K]
    return dense
