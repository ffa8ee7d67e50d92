"""Held-out loss and perplexity, and greedy samples of base and tuned model side by side."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from qlora.config import PromptFormat
from qlora.data import Batch, Example, encode_prompt, stop_token_id


class HeldOut(NamedTuple):
    """Mean negative log-likelihood of a trained token, in nats; its exponential; and how many tokens it was taken over."""

    loss: float
    perplexity: float
    num_tokens: int


class Sample(NamedTuple):
    """Greedy answers of the model without and with its adapter, and the answer that was wanted."""

    prompt: str
    base: str
    tuned: str
    reference: str


@torch.no_grad()
def evaluate_loss(model: Any, batches: Iterable[Batch], loss_sum: Callable[[torch.Tensor, Batch], torch.Tensor]) -> HeldOut:
    """Sum of losses over sum of tokens, so that batch shapes and padding change nothing.

    Args:
        model: with adapters; it is put back into the mode it came in.
        batches: at least one, with at least one token.
        loss_sum: (hidden [B, T, D], batch) -> fp32 scalar, the one that training uses.
    """
    training = model.training
    model.eval()
    decoder, device = model.get_decoder(), model.device
    total = torch.zeros((), device=device)
    num_tokens = 0
    for cpu_batch in batches:
        batch = cpu_batch.to(device)
        with torch.autocast(device.type, torch.bfloat16):
            hidden = decoder(input_ids=batch.input_ids, use_cache=False).last_hidden_state  # [B, T, D]
            total += loss_sum(hidden, batch)
        num_tokens += batch.num_tokens
    model.train(training)
    loss = total.item() / num_tokens  # sync
    return HeldOut(loss, math.exp(min(loss, 700.0)), num_tokens)


@torch.no_grad()
def generate(model: Any, tokenizer: Any, prompts: list[list[int]], stop_id: int, max_new_tokens: int) -> list[str]:
    """Greedy answers to all prompts in one batch with a KV cache, padded on the left.

    Args:
        model: with or without its adapter switched on; it is put back into the mode it came in.
        tokenizer: of the model.
        prompts: token ids, as data.encode_prompt makes them.
        stop_id: ends an answer, as do the ids that the model itself names.
        max_new_tokens: longest answer.
    """
    from transformers import GenerationConfig

    own = model.generation_config.eos_token_id
    stops = {stop_id, *(own if isinstance(own, list) else [own] if own is not None else [])}
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=sorted(stops), pad_token_id=tokenizer.pad_token_id
    )
    longest = max(map(len, prompts))
    padded = [[tokenizer.pad_token_id] * (longest - len(ids)) + ids for ids in prompts]
    seen = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
    input_ids, attention_mask = torch.tensor([padded, seen], device=model.device)  # [B, T] each
    training = model.training
    model.eval()
    with torch.autocast(model.device.type, torch.bfloat16):
        output = model.generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=greedy)  # [B, T + new]
    model.train(training)
    return tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)


def sample_responses(model: Any, tokenizer: Any, examples: list[Example], prompt_format: PromptFormat) -> list[Sample]:
    """Greedy answers to the prompts of `examples`, without and with the adapter, up to twice the longest answer wanted."""
    prompts = [encode_prompt(example.prompt, tokenizer, prompt_format) for example in examples]
    longest = max(len(tokenizer(example.response).input_ids) for example in examples)
    stop_id = stop_token_id(tokenizer, prompt_format)
    limit = min(2 * longest + 8, 1024)
    tuned = generate(model, tokenizer, prompts, stop_id, limit)
    with model.disable_adapter():
        base = generate(model, tokenizer, prompts, stop_id, limit)
    rows = zip(examples, base, tuned, strict=True)
    return [Sample(example.prompt[-1].content, base, tuned, example.response) for example, base, tuned in rows]
