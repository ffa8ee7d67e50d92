"""The optimizer over the adapters: AdamW with its moments in fp32, or bitsandbytes' AdamW with them in 8 bits."""

import torch

from qlora.config import TrainConfig


def build_optimizer(parameters: list[torch.nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over the adapters; the rate is set by each step.

    In 8 bits (Dettmers et al. 2022, arXiv 2110.02861, section 2) an element of a moment is an index into a map of 256
    numbers, times the largest absolute value of its block of 256 elements. Tensors of fewer than 4,096 elements keep fp32.

    Args:
        parameters: to be trained, on their device.
        config: resolved; optimizer and weight_decay are read.
    """
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=0.0, weight_decay=config.weight_decay, fused=True)
    import bitsandbytes  # here, as qlora.model.third_party must be the first to import it

    paged = config.optimizer == "paged_adamw_8bit"
    eight_bit = bitsandbytes.optim.PagedAdamW8bit if paged else bitsandbytes.optim.AdamW8bit
    return eight_bit(parameters, lr=0.0, weight_decay=config.weight_decay)


def init_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Give each parameter the state that a bitsandbytes optimizer makes in its first step, to copy a saved one into.

    Only that optimizer's own tensors are what they should be: moments of 100,000 elements and more in managed memory where it
    is paged, one map for all parameters. torch's optimizers have no such function, and are left without state.
    """
    from bitsandbytes.optim.optimizer import Optimizer8bit  # here, as qlora.model.third_party must be the first to import it

    if isinstance(optimizer, Optimizer8bit):
        for group_index, group in enumerate(optimizer.param_groups):
            for index, parameter in enumerate(group["params"]):
                optimizer.init_state(group, parameter, group_index, index)
