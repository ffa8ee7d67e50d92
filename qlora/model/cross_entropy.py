"""Cross-entropy and its gradient in one launch over bf16 logits, where torch takes six over a copy in fp32.

Imported on a CUDA GPU only: Triton comes with torch there.
"""

import torch
import triton
import triton.language as tl

BLOCK = 4096  # logits a program has in hand


@triton.jit  # type: ignore[untyped-decorator]
def _cross_entropy(logits, targets, losses, vocabulary, SCALE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    target = tl.load(targets + row)
    wanted = tl.load(logits + target).to(tl.float32)
    largest = float("-inf")
    total = 0.0  # of exp(logit - largest)
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = tl.load(logits + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)  # [BLOCK]
        larger = tl.maximum(largest, tl.max(values))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(values - larger))
        largest = larger
    log_normalizer = largest + tl.log(total)
    tl.store(losses + row, log_normalizer - wanted)
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = tl.load(logits + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)  # [BLOCK]
        slopes = SCALE * (tl.exp(values - log_normalizer) - tl.where(at == target, 1.0, 0.0))  # [BLOCK]
        tl.store(logits + at, slopes.to(logits.dtype.element_ty), mask=at < vocabulary)


def cross_entropy_(logits: torch.Tensor, targets: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """[C, V] contiguous, [C] -> [C] fp32, in nats; `logits` becomes `scale` times the gradient of their sum."""
    assert logits.is_contiguous()
    losses = torch.empty(len(logits), device=logits.device)  # [C]
    _cross_entropy[(len(logits),)](logits, targets, losses, logits.shape[1], scale, BLOCK, num_warps=16)
    return losses
