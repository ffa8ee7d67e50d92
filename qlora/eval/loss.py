"""Loss and perplexity on the eval data."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from qlora import distributed
from qlora.data.batch import Batch
from qlora.model import attention
from qlora.model.precision import autocast_dtype
from qlora.model.prompts import decoder_of


class EvalResult(NamedTuple):
    """Mean negative log-likelihood of a trained token, in nats; its exponential; and how many tokens it was taken over."""

    loss: float
    perplexity: float
    num_tokens: int


@torch.no_grad()
def evaluate_loss(model: Any, batches: Iterable[Batch], loss_sum: Callable[[torch.Tensor, Batch], torch.Tensor]) -> EvalResult:
    """Sum of losses over sum of tokens, so that batch shapes and padding change nothing.

    Args:
        model: with adapters; it is put back into the mode it came in.
        batches: of this rank; of all ranks at least one, with at least one token.
        loss_sum: (hidden [B, T, D], batch) -> fp32 scalar, the one that training uses.
    """
    training = model.training
    model.eval()
    decoder, device = decoder_of(model), model.device
    total = torch.zeros((), device=device)  # []
    num_tokens = 0
    for cpu_batch in batches:
        batch = cpu_batch.to(device)
        with torch.autocast(device.type, autocast_dtype(model)):
            inputs = attention.decoder_inputs(batch, decoder.config)
            hidden = decoder(**inputs, use_cache=False).last_hidden_state  # [B, T, D]
            total += loss_sum(hidden, batch)  # []
        num_tokens += batch.num_tokens
    model.train(training)
    loss_sum_of_all, num_tokens_of_all = distributed.sum_numbers(total.item(), num_tokens)  # sync
    loss, num_tokens = loss_sum_of_all / num_tokens_of_all, int(num_tokens_of_all)
    return EvalResult(loss, math.exp(min(loss, 700.0)), num_tokens)


def has_stalled(evaluations: dict[int, EvalResult], patience: int | None) -> bool:
    """Whether the lowest eval loss is `patience` evaluations old; a loss that is NaN is none. None never is."""
    losses = [math.inf if math.isnan(evaluations[step].loss) else evaluations[step].loss for step in sorted(evaluations)]
    return patience is not None and bool(losses) and len(losses) - 1 - losses.index(min(losses)) >= patience
