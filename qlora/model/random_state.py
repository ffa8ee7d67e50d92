"""The random number generators that a training loop might draw from.

Only the start of the adapters depends on what is drawn before it. Each micro-batch seeds torch anew for its dropout, and the
order of samples has a generator for each epoch, so no state of a generator is saved.
"""

import random

import numpy
import torch


def seed_generators(seed: int) -> None:
    """Start every generator that a training loop might draw from at `seed`."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # of the CPU and of every GPU
