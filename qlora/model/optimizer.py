"""The optimizer over the adapters: AdamW with its moments in fp32, or bitsandbytes' AdamW or Lion with them in 8 bits."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qlora.config import TrainConfig
from qlora.errors import NonFiniteError

FIRST_LOSS_SCALE, GROWTH_STEPS = 2.0**16, 2000  # those of torch.amp.GradScaler


def build_optimizer(parameters: Mapping[str, torch.nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW or Lion over the adapters; each step sets the learning rate, times `lr_ratio` of a parameter group.

    In 8 bits (Dettmers et al. 2022, arXiv 2110.02861, section 2) an element of a moment is an index into a map of 256
    numbers, times the largest absolute value of its block of 256 elements. Tensors of fewer than 4,096 elements keep fp32.

    With lora_plus_ratio, B learns faster than A (LoRA+; Hayou et al. 2024, arXiv 2402.12354): near the start A's gradient is
    small, as B is close to 0. Lion (Chen et al. 2023, arXiv 2302.06675) keeps one moment, and steps by its sign.

    Args:
        parameters: to be trained, by name, on their device.
        config: resolved; optimizer, weight_decay, lora_plus_ratio and precision are read.
    """
    groups: list[dict[str, Any]] = [{"params": list(parameters.values())}]
    if config.lora_plus_ratio != 1.0:
        of_b = {name: "lora_B" in name for name in parameters}
        groups = [
            {"params": [parameter for name, parameter in parameters.items() if of_b[name] == faster], "lr_ratio": ratio}
            for faster, ratio in ((False, 1.0), (True, config.lora_plus_ratio))
        ]
    if config.precision == "fp16":
        groups[0] |= {"loss_scale": FIRST_LOSS_SCALE, "steps_at_scale": 0}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, weight_decay=config.weight_decay, fused=True)
    import bitsandbytes  # here, as qlora.model.third_party must be the first to import it

    kinds: dict[str, Any] = {
        "adamw_8bit": bitsandbytes.optim.AdamW8bit,
        "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
        "lion_8bit": bitsandbytes.optim.Lion8bit,
    }
    optimizer: torch.optim.Optimizer = kinds[config.optimizer](groups, lr=0.0, weight_decay=config.weight_decay)
    return optimizer


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


# -- the loss scale of fp16 --------------------------------------------------------------------------------------------


def loss_scale(optimizer: torch.optim.Optimizer) -> float:
    """What the loss is multiplied by before the backward pass: a power of 2 in fp16, else 1."""
    scale: float = optimizer.param_groups[0].get("loss_scale", 1.0)
    return scale


def unscale_gradients(parameters: Sequence[torch.nn.Parameter], scale: float) -> None:
    """Divide fp32 gradients by the loss scale, which is exact for a power of 2."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if scale != 1.0 and gradients:
        torch._foreach_div_(gradients, scale)


def update_loss_scale(optimizer: torch.optim.Optimizer, loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
    """Halve the loss scale if gradients overflow, and double it after 2,000 steps without an overflow (arXiv 1710.03740).

    Args:
        optimizer: nothing happens unless it has a loss scale.
        loss: []; one that is not finite says nothing about the scale.
        grad_norm: []. Both are waited for.

    Raises:
        NonFiniteError: if gradients overflow at a scale of 1.
    """
    group = optimizer.param_groups[0]
    if "loss_scale" not in group:
        return
    if not (grad_norm.isfinite() | ~loss.isfinite()).item():  # sync
        if group["loss_scale"] <= 1.0:
            raise NonFiniteError(
                "The gradients overflow in fp16 even at a loss scale of 1.",
                hint="Start a run with a lower --learning-rate, or with --precision bf16 on a GPU that has it.",
            )
        group["loss_scale"], group["steps_at_scale"] = group["loss_scale"] / 2, 0
        return
    group["steps_at_scale"] += 1
    if group["steps_at_scale"] == GROWTH_STEPS:
        group["loss_scale"], group["steps_at_scale"] = 2 * group["loss_scale"], 0


def loss_scaling(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """What of the loss scale a checkpoint has to hold; nothing without one."""
    group = optimizer.param_groups[0]
    return {name: group[name] for name in ("loss_scale", "steps_at_scale") if name in group}
