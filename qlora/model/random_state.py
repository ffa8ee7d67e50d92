"""State of every random number generator that a training loop might draw from."""

import random
from typing import Any

import numpy
import torch


def seed_generators(seed: int) -> None:
    """Start every generator that a training loop might draw from at `seed`."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # of the CPU and of every GPU


def random_state() -> dict[str, torch.Tensor]:
    """The state of every generator that a training loop might draw from, as tensors: torch's, CUDA's, Python's, NumPy's."""
    _, words, gauss = random.getstate()
    bits: dict[str, Any] = numpy.random.get_state(legacy=False)
    state = {
        "torch": torch.get_rng_state(),  # [5056] uint8
        "python": torch.tensor(words, dtype=torch.int64),  # [625]
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),  # [0] or [1]
        "numpy": torch.tensor([*bits["state"]["key"].tolist(), bits["state"]["pos"], bits["has_gauss"]]),  # [626] int64
        "numpy_gauss": torch.tensor([bits["gauss"]], dtype=torch.float64),  # [1]
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()  # [16] uint8
    return state


def set_random_state(state: dict[str, torch.Tensor]) -> None:
    """Put back what `random_state` gave."""
    torch.set_rng_state(state["torch"])
    gauss = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss[0] if gauss else None))
    *key, position, has_gauss = state["numpy"].tolist()
    numpy.random.set_state(("MT19937", numpy.array(key, numpy.uint32), position, has_gauss, state["numpy_gauss"].item()))
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
