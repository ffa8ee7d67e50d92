"""Memory: the measured peak."""

import resource
import sys

import torch


def peak_memory_gib(device: torch.device) -> float:
    """Highest memory so far, in GiB: allocated on the GPU, or resident in the process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
