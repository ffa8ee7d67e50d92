"""What ends a run: a first gradient that trains nothing, a loss that is not finite, memory that ran out."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from qlora.config import ExitCode, UserError


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, of whatever class, says that memory ran out: on the GPU, in cuBLAS, or on the CPU."""
    texts = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)


def require_plain_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Refuse gradient hooks on adapters: backward writes their `.grad` itself, so autograd would never call a hook.

    Raises:
        RuntimeError: if a parameter has a hook of `register_hook` or `register_post_accumulate_grad_hook`, or in a forward pass
            of DistributedDataParallel, whose reducer is such a hook.
    """
    if DistributedDataParallel._get_active_ddp_module() is not None:
        text = (
            "DistributedDataParallel would never reduce these gradients: this loop's backward pass writes the adapters' .grad"
        )
        raise RuntimeError(f"{text} itself, outside autograd. Leave the wrapper out, and all_reduce .grad after backward().")
    watched = sum(bool(p._backward_hooks) or bool(p._post_accumulate_grad_hooks) for p in parameters)
    if watched:
        text = f"{watched} adapter tensors have gradient hooks, which would never be called: this loop's backward pass writes"
        raise RuntimeError(f"{text} their .grad itself, outside autograd. Read .grad after backward() instead.")


def check_first_gradients(named: list[tuple[str, torch.nn.Parameter]], grad_norm: torch.Tensor) -> None:
    """Stop a run that would train nothing. (A's gradient is exactly zero while B is: that is right.)

    Args:
        named: trained parameters after the first backward.
        grad_norm: over all of them, a scalar.

    Raises:
        UserError: exit 5.
    """
    without = [name for name, parameter in named if parameter.grad is None]
    norm = grad_norm.item()  # sync, once a run
    if without:
        seen = f"not usable: {len(without)} of {len(named)} adapter tensors got none, {without[0]} first"
    elif norm == 0.0:
        seen = "zero everywhere"
    elif not math.isfinite(norm):
        seen = f"not finite: its norm is {norm}"
    else:
        return
    text = f"The first gradient is {seen}. Nothing was saved. Check --target-modules and the data."
    raise UserError(ExitCode.NUMERICS, text)


def count_not_finite(
    rows: list[dict[str, Any]],
    before: list[dict[str, Any]],
    skipped: int,
    permitted: int,
    say: Callable[[str], None],
    advice: Callable[[], str],
) -> int:
    """Count the windows that train_step left out because of a NaN or infinity, and end the run when they are too many.

    Args:
        rows: of finished steps, with numbers for loss and grad_norm.
        before: rows of steps before them.
        skipped: windows left out so far.
        permitted: how many may be.
        say: for a line about each that is permitted.
        advice: what to tell about checkpoints when the run ends.

    Returns:
        Windows left out so far, these included.

    Raises:
        UserError: exit 5, with step, rate, losses before it and the lines of the data.
    """
    for index, row in enumerate(rows):
        if math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]):
            continue
        skipped += 1
        lines = ", ".join(map(str, row["lines"]))
        seen = (
            f"Step {row['step']} is not finite: loss {row['loss']}, gradient norm {row['grad_norm']}, learning rate "
            f"{row['learning_rate']:g}, lines {lines} of the training data."
        )
        if skipped > permitted:
            losses = ", ".join(f"{earlier['loss']:.4g}" for earlier in [*before, *rows[:index]][-5:])
            way_out = "Lower --learning-rate, look at those lines, or allow some such steps with --skip-nonfinite."
            text = f"{seen} The weights were kept from it. Losses before it: {losses or 'none'}. {way_out} {advice()}"
            raise UserError(ExitCode.NUMERICS, text)
        say(f"{seen} It was skipped, {skipped} of {permitted} that may be.")
    return skipped


@contextlib.contextmanager
def out_of_memory_told(words: Callable[[str], str]) -> Iterator[None]:
    """A block in which running out of memory is an error in these words.

    Args:
        words: from the reason that the library gave to one paragraph.

    Raises:
        UserError: exit 6.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(ExitCode.MEMORY, words(" ".join(str(error).split())[:200])) from error
