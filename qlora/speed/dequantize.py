"""4 bits -> bf16, fp16 or fp32 in one launch, where bitsandbytes takes four with double quantization.

Imported on a CUDA GPU only: Triton comes with torch there. The arithmetic is bitsandbytes' own, rounding included.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

BLOCK_BYTES = 1024  # packed bytes a program; 2048 values, 32 scales


@triton.jit  # type: ignore[untyped-decorator]
def _dequantize(  # type: ignore[no-untyped-def]
    packed, scales, levels, scales_of_scales, scale_code, scale_offset, output, num_bytes,
    DOUBLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = at < num_bytes
    byte = tl.load(packed + at, mask=inside, other=0).to(tl.int32)  # [BLOCK]
    block = at // 32  # a scale stands for 64 values, 32 bytes
    scale = tl.load(scales + block, mask=inside, other=0)  # [BLOCK]
    if DOUBLE:
        scale = tl.load(scale_code + scale.to(tl.int32)) * tl.load(scales_of_scales + block // 256, mask=inside, other=0.0)
        scale += tl.load(scale_offset)  # [BLOCK]
    first = tl.load(levels + (byte >> 4)) * scale  # [BLOCK]: the high half comes first
    second = tl.load(levels + (byte & 15)) * scale  # [BLOCK]
    values = tl.interleave(first, second).to(output.dtype.element_ty)  # [2 * BLOCK]
    place = tl.program_id(0).to(tl.int64) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)  # [2 * BLOCK]
    tl.store(output + place, values, mask=place < 2 * num_bytes)


def dequantize(weight: Sequence[torch.Tensor], shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """[N, K] on the GPU, from the tensors that nf4.py lists."""
    output = torch.empty(shape, dtype=dtype, device=weight[0].device)  # [N, K]
    packed, scales, levels, *double = weight
    grid = (triton.cdiv(packed.numel(), BLOCK_BYTES),)
    of_scales = double or (levels, levels, levels)  # which are not read then
    tensors = (packed, scales, levels, *of_scales, output)
    _dequantize[grid](*tensors, packed.numel(), bool(double), BLOCK_BYTES, num_warps=4, enable_fp_fusion=False)
    return output
