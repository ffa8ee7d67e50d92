"""Checks that end a run: a first gradient that trains nothing, a loss that is not finite."""

import math
from collections.abc import Callable

import torch

from qlora import distributed
from qlora.config import TrainConfig
from qlora.data.sources import Source
from qlora.errors import NonFiniteError
from qlora.run.log import StepLog


def check_first_gradients(
    named: list[tuple[str, torch.nn.Parameter]], grad_norm: torch.Tensor, may_overflow: bool = False
) -> None:
    """Stop a run that would train nothing. (A's gradient is exactly zero while B is: that is right.)

    Args:
        named: trained parameters after the first backward.
        grad_norm: over all of them, a scalar.
        may_overflow: in fp16, whose loss scale is found step by step.

    Raises:
        NonFiniteError.
    """
    # On several GPUs a gradient that nobody has is a sum of zeros.
    several = distributed.ranks().size > 1
    without = [name for name, p in named if p.grad is None or (several and "lora_B" in name and not p.grad.any())]
    norm = grad_norm.item()  # sync, once a run
    if without:
        seen = f"not usable: {len(without)} of {len(named)} adapter tensors got none, {without[0]} first"
    elif norm == 0.0:
        seen = "zero everywhere"
    elif not math.isfinite(norm) and not may_overflow:
        seen = f"not finite: its norm is {norm}"
    else:
        return
    raise NonFiniteError(f"The first gradient is {seen}. Nothing was saved.", hint="Check --target-modules and the data.")


def check_finite(
    steps: StepLog, skipped: int, config: TrainConfig, advice: Callable[[], str], source: Source | None = None
) -> int:
    """Count the steps that train_step skipped because of a NaN or infinity, and end the run when they are too many.

    Args:
        steps: the steps of its last flush are looked at.
        skipped: steps skipped so far.
        config: skip_nonfinite is how many may be. With precision fp16, a step whose gradients overflow is not one of them.
        advice: what to tell about checkpoints when the run ends.
        source: of the training data, which names the lines of several files.

    Returns:
        Steps skipped so far, these included.

    Raises:
        NonFiniteError: with step, rate, losses before it and the lines of the data.
    """
    for index, row in enumerate(steps.rows):
        if math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]):
            continue
        if config.precision == "fp16" and math.isfinite(row["loss"]):
            steps.tracker.say(f"Step {row['step']} was skipped: its gradients overflow in fp16. The loss scale is halved.")
            continue
        skipped += 1
        lines = ", ".join(map(source.line if source else str, row["lines"]))
        seen = (
            f"Step {row['step']} is not finite: loss {row['loss']}, gradient norm {row['grad_norm']}, learning rate "
            f"{row['learning_rate']:g}, lines {lines} of the training data."
        )
        if skipped > config.skip_nonfinite:
            losses = ", ".join(f"{earlier['loss']:.4g}" for earlier in [*steps.before, *steps.rows[:index]][-5:])
            way_out = "Lower --learning-rate, look at those lines, or allow some such steps with --skip-nonfinite."
            if config.precision == "fp16":
                way_out += " In fp16 numbers above 65,504 are infinite; --precision bf16 has no such limit."
            raise NonFiniteError(
                f"{seen} No weight was changed. Losses before it: {losses or 'none'}.", hint=f"{way_out} {advice()}"
            )
        steps.tracker.say(f"{seen} The step was skipped ({skipped} of {config.skip_nonfinite} allowed).")
    return skipped
