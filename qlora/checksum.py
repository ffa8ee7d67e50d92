"""A 64-bit checksum of a tensor, computed on its own device: 2 GB take a GPU some hundredths of a second."""

import torch

CHUNK = 2**22  # 64-bit words at a time
MULTIPLIERS = (-7046029254386353131, -4658895280553007687)  # odd, from SplitMix64 (Steele et al., 2014): 0x9E37..., 0xBF58...


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """A sum over the words of a tensor, each mixed with its place: any byte or order that differs changes it.

    It finds accidents; it does not withstand somebody who makes two tensors of one checksum on purpose.

    Args:
        tensor: of any shape and dtype; its bytes count, so that NaNs are compared too.

    Returns:
        [] int64, on the device of the tensor, for which nobody has waited.
    """
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)  # [bytes]
    whole = len(flat) // 8 * 8
    words = flat[:whole].view(torch.int64) if flat.storage_offset() % 8 == 0 else flat[:whole].clone().view(torch.int64)  # [n]
    total = torch.full((), len(flat), dtype=torch.int64, device=flat.device)  # []
    for start in range(0, len(words), CHUNK):
        total += _mixed(words[start : start + CHUNK], start)
    rest = torch.zeros(8, dtype=torch.uint8, device=flat.device)  # [8]
    rest[: len(flat) - whole] = flat[whole:]
    return total + _mixed(rest.view(torch.int64), len(words))


def _mixed(words: torch.Tensor, start: int) -> torch.Tensor:
    """[n] int64 -> their sum [], each mixed with its place; int64 wraps around."""
    place = torch.arange(start, start + len(words), device=words.device)  # [n]
    mixed = words ^ (place * MULTIPLIERS[0])  # [n]
    mixed = (mixed ^ (mixed >> 29)) * MULTIPLIERS[1]
    return (mixed ^ (mixed >> 32)).sum()
