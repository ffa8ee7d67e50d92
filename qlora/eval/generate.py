"""Answers to prompts, and greedy completions of base and adapter side by side."""

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig

from qlora.data.batch import batched
from qlora.data.formats import Example
from qlora.data.template import PromptTemplate, encode_prompt
from qlora.errors import UserError, is_out_of_memory
from qlora.model.load import prepare_inference
from qlora.model.precision import autocast_dtype
from qlora.model.prompts import base_of, has_prompt
from qlora.model.shards import shard_of
from qlora.model.third_party import peft
from qlora.speed.decode import (
    PromptedTokens,
    TokenGraph,
    adapters_by_row,
    adapts_by_row,
    decode,
    decode_unavailable_reason,
)
from qlora.speed.lora_linear import answering

# What may go wrong with sample answers: libraries, the disk, the data.
FAILURES = (RuntimeError, MemoryError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError, AssertionError,
            ImportError, OSError, UserError)  # fmt: skip


MAX_SAMPLE_TOKENS, MAX_SAMPLE_S = 256, 5.0  # of a run's sample answers; the time is for all of them


class Completion(NamedTuple):
    """Greedy answers of the model without and with its adapter, and the answer that was wanted."""

    prompt: str
    base: str
    tuned: str
    reference: str


class Sampling(NamedTuple):
    """How a token is drawn: from the logits over the temperature, cut to the top_k likeliest, then to the top_p share."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None


def stop_ids(model: Any, template: PromptTemplate) -> list[int]:
    """What ends an answer: the stop token that was trained, and those that the model itself names."""
    own = model.generation_config.eos_token_id
    return sorted({template.stop_id, *(own if isinstance(own, list) else [own] if own is not None else [])})


def generate(
    model: Any,
    prompts: list[list[int]],
    template: PromptTemplate,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    streamer: Any = None,
) -> list[str]:
    """Answers to all prompts in one batch with a KV cache, padded on the left.

    Args:
        model: with or without its adapter switched on; it is put back into the mode it came in. It runs in the caller's
            precision: autocast, which training needs, only costs time here.
        prompts: token ids, as encode_prompt makes them.
        template: its stop token ends an answer, as do the ids that the model itself names.
        max_new_tokens: longest answer.
        sampling: None is greedy; else tokens are drawn with torch's generator.
        streamer: of transformers, to show the answer to a single prompt while it grows.
    """
    return _answer(model, [prompts], template, _settings(model, template, max_new_tokens, sampling), streamer)[0]


def generate_all(
    model: Any,
    prompts: list[list[int]],
    template: PromptTemplate,
    max_new_tokens: int,
    batch_size: int,
    sampling: Sampling | None = None,
) -> list[str]:
    """Answers to any number of prompts, in their order; prompts of like length share a batch, for less padding."""
    answers = [""] * len(prompts)
    batches = list(batched(sorted(range(len(prompts)), key=lambda row: len(prompts[row])), batch_size))
    settings = _settings(model, template, max_new_tokens, sampling)
    found = _answer(model, [[prompts[row] for row in rows] for rows in batches], template, settings)
    for rows, texts in zip(batches, found, strict=True):
        for row, answer in zip(rows, texts, strict=True):
            answers[row] = answer
    return answers


def _settings(model: Any, template: PromptTemplate, max_new_tokens: int, sampling: Sampling | None) -> GenerationConfig:
    # What is left unset here would come from the model's own generation_config, as Qwen's penalty on repetition.
    settings = GenerationConfig(
        do_sample=sampling is not None,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_ids(model, template),
        pad_token_id=template.stop_id,
    )
    if sampling is not None:
        settings.update(temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k or 0)
    return settings


@torch.no_grad()
def _answer(
    model: Any, batches: list[list[list[int]]], template: PromptTemplate, settings: GenerationConfig, streamer: Any = None
) -> list[list[str]]:
    """Answers to each batch of prompts. On a GPU one recorded forward serves all of them, where it can be recorded."""
    if not batches:
        return []
    training = model.training
    model.eval()
    more: dict[str, Any] = {"streamer": streamer}
    # Mixtures of experts may compute a loss of their routers, which fails here, as the mask is longer than the ids.
    if getattr(model.config, "output_router_logits", False):
        more["output_router_logits"] = False
    rows = max(map(len, batches))
    recorded, prompted = decode_unavailable_reason(model) is None, has_prompt(model)
    # Behind virtual tokens there must be no padding, so there only rows of one length are answered together.
    calls = [_rows_by_length(prompts) if prompted else [[*range(len(prompts))]] for prompts in batches]
    answers = []
    with _as_in_training(model), answering(model) if recorded else contextlib.nullcontext():
        if recorded:
            longest = max(len(prompt) for prompts in batches for prompt in prompts)
            graph = TokenGraph(model, rows, longest + settings.max_new_tokens)
            more["custom_generate"] = functools.partial(decode, graph=graph, show=streamer)
        elif prompted:
            more["custom_generate"] = functools.partial(decode, graph=PromptedTokens(model), show=streamer)
            settings = copy.copy(settings)
            settings.max_time = settings.max_time and settings.max_time / sum(map(len, calls))
        for prompts, groups in zip(batches, calls, strict=True):
            texts = [""] * len(prompts)
            for together in groups:
                full = [prompts[row] for row in together]
                full += full[-1:] * (rows - len(full)) if recorded else []
                longest = max(map(len, full))
                padded = [[template.stop_id] * (longest - len(ids)) + ids for ids in full]
                seen = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in full]
                input_ids, attention_mask = torch.tensor([padded, seen], device=model.device)  # [B, T] each
                output = (base_of(model) if prompted else model).generate(  # [B, T + new]
                    input_ids=input_ids, attention_mask=attention_mask, generation_config=settings, **more
                )
                new = output[: len(together), longest:]  # [B, new]
                for row, text in zip(together, template.tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                    texts[row] = text
            answers.append(texts)
    model.train(training)
    return answers


def _rows_by_length(prompts: list[list[int]]) -> list[list[int]]:
    """The rows of each length, the shortest first."""
    groups: dict[int, list[int]] = {}
    for row, ids in enumerate(prompts):
        groups.setdefault(len(ids), []).append(row)
    return [groups[length] for length in sorted(groups)]


def _as_in_training(model: Any) -> contextlib.AbstractContextManager[Any]:
    """Autocast for methods that leave the base's dtype without it, such as IA3, whose vectors are in fp32."""
    plain = not isinstance(model, peft.PeftModel) or adapts_by_row(model)
    return contextlib.nullcontext() if plain else torch.autocast(model.device.type, autocast_dtype(model))


def answer_limit(examples: list[Example], template: PromptTemplate) -> int:
    """Tokens that an answer may have: twice those of the longest that is wanted, and 1,024 at most."""
    return min(2 * max((len(template.ids(example.response)) for example in examples), default=0) + 8, 1024)


def sample_responses(model: Any, examples: list[Example], template: PromptTemplate) -> list[Completion]:
    """Greedy answers to the prompts of `examples`, without and with the adapter, of at most 256 tokens.

    Both are one batch if the adapter is plain LoRA. On a GPU generation ends after 5 s, however long an answer is by then.
    """
    prompts = [encode_prompt(example.prompt, template, example.tools) for example in examples]
    settings = _settings(model, template, min(answer_limit(examples, template), MAX_SAMPLE_TOKENS), sampling=None)
    if model.device.type == "cuda":
        settings.max_time = MAX_SAMPLE_S
    has_adapter = torch.arange(2 * len(prompts), device=model.device) < len(prompts)  # [B]
    with torch.autocast(model.device.type, autocast_dtype(model)):  # as training runs
        if adapts_by_row(model):
            with adapters_by_row(model, has_adapter):
                (answers,) = _answer(model, [prompts + prompts], template, settings)
            tuned, base = answers[: len(prompts)], answers[len(prompts) :]
        else:
            settings.max_time = settings.max_time and settings.max_time / 2
            (tuned,) = _answer(model, [prompts], template, settings)
            with model.disable_adapter():
                (base,) = _answer(model, [prompts], template, settings)
    rows = zip(examples, base, tuned, strict=True)
    return [Completion(example.prompt[-1].content or "", base, tuned, example.response) for example, base, tuned in rows]


def try_samples(
    model: Any,
    examples: Callable[[], list[Example]],
    template: PromptTemplate,
    record: Callable[[list[Completion]], None],
    say: Callable[[str], None],
) -> None:
    """Like sample_responses, but whatever fails is a warning with the reason, and no samples.

    By the time of the samples the run is complete and saved: an answer that cannot be generated must not end it with an error,
    and the model is not trained any more, so that a CPU may repack its weights.

    Args:
        model: with its adapter.
        examples: reads those whose prompts are answered; their file may be gone by now.
        template: of prompts.
        record: shows and stores the answers.
        say: for the warning.
    """
    try:
        found = examples()
        if not found:
            say("No sample answers: rows that are one text have no prompts.")
            return
        if any(shard_of(module) for module in model.modules()):
            say("No sample answers: no GPU holds the whole base. `python -m qlora generate` writes them on one that does.")
            return
        prepare_inference(model)
        record(sample_responses(model, found, template))
    except FAILURES as error:
        reason = " ".join(str(error).split())[:200]
        why = "memory ran out" if is_out_of_memory(error) else type(error).__name__
        say(f"Warning: no sample answers were generated: {why} ({reason}). The run is complete without them.")
