"""`python -m qlora evaluate`: base and adapter side by side on eval data, with what chance may have done to each number."""

import dataclasses
import functools
import itertools
import json
import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora import terminal
from qlora.commands.adapter import (
    Adapter,
    columns_of,
    load_adapted,
    oom_as_user_error_with,
    open_adapter,
    positions_of,
    prompt_ids,
)
from qlora.commands.options import EvalDataOptions, EvaluateOptions, refuse_below, refuse_seed, require_packages
from qlora.config import Quantization
from qlora.data.batch import Batch, iter_batches
from qlora.data.dataset import TokenizedDataset, encode_all
from qlora.data.formats import Example, Prompt, check_source, read_examples
from qlora.data.sources import Source, names_of
from qlora.data.template import TokenizedExample, encode_prompt
from qlora.errors import ConfigError
from qlora.eval import scores
from qlora.eval.generate import answer_limit, generate_all
from qlora.eval.loss import EvalResult, evaluate_loss
from qlora.model import attention
from qlora.model.load import prepare_inference
from qlora.model.loss import CHUNK_TOKENS, Head, read_head
from qlora.report.record import sha256_of
from qlora.run import environment
from qlora.run.files import require_writable, write_file

SIDES = ("base", "adapter")  # always in this order


class Side(NamedTuple):
    """What one side, base or adapter, did."""

    result: EvalResult
    tokens: numpy.ndarray  # [n, 3]: of each sample the sum of losses, tokens that were the likeliest, trained tokens
    answers: list[str]
    loss_s: float
    generation_s: float


def run(options: EvaluateOptions) -> int:
    """Evaluate, print a table, and write the requested JSON; see EvaluateOptions.

    Returns:
        0.

    Raises:
        UserError: exit 2, 3, 4 or 7 before the weights are loaded; 6 where memory does not suffice.
    """
    console = Console()
    say = functools.partial(terminal.say, console)
    refuse_below(1, options, "limit", "batch_size", "max_length", "max_new_tokens")
    refuse_seed(options.seed)
    if options.json is not None:
        require_writable(options.json, *names_of(options.eval_file))
    require_packages("Scoring answers", scores.PACKAGES, extra="evaluate")
    adapter = open_adapter(options.adapter, options.model, options.prompt_format, options.trust_remote_code, options.device)
    for note in adapter.notes:
        say(note)
    source, samples, examples, notes = read_eval_data(options, adapter)
    say(notes)
    asked = [example for example in examples if example.prompt]  # a row that is one text has a loss, and no prompt
    limit = options.max_new_tokens or _answer_limit(asked, adapter)
    rows = (Prompt(example.prompt, source.where(example.line), example.tools) for example in asked)
    prompts = [prompt_ids(row, adapter, limit) for row in rows]
    quantization: Quantization = "int8" if options.int8 else adapter.config.quantization
    with oom_as_user_error_with(f"Lower --batch-size {options.batch_size} or --max-new-tokens {limit}."):
        model = load_adapted(adapter, quantization)
        sides = both_sides(model, adapter, samples, prompts, options.batch_size, limit)
    compared = comparisons(sides, [example.response for example in asked], options.seed)
    console.print(results_table(compared, len(examples), sides[0].result.num_tokens))
    if options.json is not None:
        record: dict[str, Any] = {"adapter": str(adapter.folder), "base": adapter.source, "quantization": quantization}
        record["precision"] = "fp16" if model.dtype == torch.float16 else "bf16"
        record |= {"adapter_sha256": sha256_of(adapter.folder), "eval_data_sha256": samples.sha256}  # as in run.json
        record |= {"eval_file": str(source), "num_examples": len(examples), "num_tokens": sides[0].result.num_tokens}
        record |= {"max_new_tokens": limit, "batch_size": options.batch_size, "seed": options.seed}
        record |= recorded(sides, compared, asked)
        record["environment"] = environment.environment(adapter.device)
        write_file(options.json, json.dumps(record, indent=1, ensure_ascii=False).encode() + b"\n")
        say(f"Written to {options.json}, answers included.")
    return 0


def recorded(sides: Sequence[Side], compared: dict[str, scores.Comparison], examples: list[Example]) -> dict[str, Any]:
    """Metrics with their intervals, seconds, and answers, as JSON knows them."""
    metrics = {
        name: {side: {key: _finite(number) for key, number in each._asdict().items()} for side, each in found._asdict().items()}
        for name, found in compared.items()
    }
    seconds = {name: {"loss": side.loss_s, "generation": side.generation_s} for name, side in zip(SIDES, sides, strict=True)}
    answers = [
        {"line": example.line, "prompt": example.prompt[-1].content, "reference": example.response}
        | dict(zip(SIDES, both, strict=True))
        for example, *both in zip(examples, *(side.answers for side in sides), strict=True)
    ]
    return {"resamples": scores.RESAMPLES, "metrics": metrics, "seconds": seconds, "answers": answers}


def _finite(number: float | None) -> float | None:
    """None for NaN and infinities, which JSON does not know."""
    return number if number is not None and math.isfinite(number) else None


def read_eval_data(options: EvalDataOptions, adapter: Adapter) -> tuple[Source, TokenizedDataset, list[Example], str]:
    """The source, its samples and examples in the same order, and a line that counts them.

    Raises:
        UserError: exit 2 if no file is known, 3 as data.encode_all does.
    """
    names = options.eval_file or adapter.config.eval_file
    if names is None:
        raise ConfigError(f"{adapter.folder} does not record any eval data.", hint="Pass --eval-file.")
    flags = {name: getattr(options, name) for name in ("max_length", "on_long", "allow_drop")}
    config = dataclasses.replace(adapter.config, **{name: value for name, value in flags.items() if value})
    source, column_names = Source(names, "test"), columns_of(options, adapter)
    columns = check_source(source, "test", column_names)
    examples = list(itertools.islice(read_examples(source, "test", column_names), options.limit))
    samples, notes = encode_all(examples, source, adapter.template, config)
    kept = {sample.line for sample in samples}
    examples = [example for example in examples if example.line in kept]
    return source, samples, examples, f"Eval: {notes}; form {columns}{source.count}"


def _answer_limit(examples: list[Example], adapter: Adapter) -> int:
    """Twice the longest answer wanted, as in training, or what the longest prompt leaves of the model's positions."""
    limit = answer_limit(examples, adapter.template)
    longest = max((len(encode_prompt(example.prompt, adapter.template, example.tools)) for example in examples), default=0)
    return max(1, min(limit, (positions_of(adapter) or limit + longest) - longest))


def both_sides(
    model: Any, adapter: Adapter, samples: TokenizedDataset, prompts: list[list[int]], batch_size: int, limit: int
) -> list[Side]:
    """Losses and greedy answers of the base alone, and with the adapter: in the order of SIDES.

    Args:
        model: from load_adapted; afterward it can no longer be trained.
        adapter: its format and attention.
        samples: to take the loss of.
        prompts: token ids, to be answered.
        batch_size: samples or prompts at a time.
        limit: longest answer, in tokens.
    """
    losses = []
    with model.disable_adapter():  # the head may have been trained too
        heads = [read_head(model)]
    heads.append(read_head(model))
    with attention.for_training(model, adapter.config):  # the very numbers that training tells
        with model.disable_adapter():
            losses.append(_timed(score_tokens, model, samples, batch_size, heads[0]))
        losses.append(_timed(score_tokens, model, samples, batch_size, heads[1]))
    prepare_inference(model)  # after this the weights give no loss
    answers = []
    with model.disable_adapter():
        answers.append(_timed(generate_all, model, prompts, adapter.template, limit, batch_size))
    answers.append(_timed(generate_all, model, prompts, adapter.template, limit, batch_size))
    rows = zip(losses, answers, strict=True)
    return [Side(result, tokens, texts, loss_s, generation_s) for ((result, tokens), loss_s), (texts, generation_s) in rows]


def _timed(function: Any, *arguments: Any) -> tuple[Any, float]:
    started = time.perf_counter()
    return function(*arguments), round(time.perf_counter() - started, 2)


def score_tokens(
    model: Any, samples: Sequence[TokenizedExample], batch_size: int, head: Head | None = None
) -> tuple[EvalResult, numpy.ndarray]:
    """The evaluation of training, and of each sample [n, 3]: sum of losses, tokens that were the likeliest, trained tokens."""
    head = head or read_head(model)
    rows: list[torch.Tensor] = []

    def loss_sum(hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        losses, correct = token_scores(hidden, batch, head)  # [N], [N]
        each = torch.stack([losses, correct.float(), torch.ones_like(losses)], dim=1)  # [N, 3]
        sample = batch.positions // batch.labels.shape[1]  # [N]: the row of the batch that a token is in
        sums = torch.zeros(len(batch.labels), 3, device=losses.device)  # [B, 3]
        rows.append(sums.index_add_(0, sample, each).cpu())
        return losses.sum()

    batches = iter_batches(samples, range(len(samples)), batch_size, pin=model.device.type == "cuda")
    result = evaluate_loss(model, batches, loss_sum)
    return result, torch.cat(rows).double().numpy()  # [n, 3]


def token_scores(hidden: torch.Tensor, batch: Batch, head: Head) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of each trained token, and whether it was the likeliest: [N] fp32 and [N] bool; logits live for a chunk.

    Args:
        hidden: [B, T, D] last hidden states.
        batch: labels, and the positions that predict them.
        head: the output layer.
    """
    rows = hidden.flatten(0, 1)[batch.positions]  # [N, D]
    targets = batch.labels.flatten()[batch.positions + 1]  # [N]
    losses, correct = [], []
    for start in range(0, len(rows), CHUNK_TOKENS):
        wanted = targets[start : start + CHUNK_TOKENS]  # [C]
        logits = head.logits(rows[start : start + CHUNK_TOKENS]).float()  # [C, V]
        losses.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none"))
        correct.append(logits.argmax(dim=-1) == wanted)
    return torch.cat(losses), torch.cat(correct)  # [N], [N]


def comparisons(sides: Sequence[Side], references: list[str], seed: int) -> dict[str, scores.Comparison]:
    """Every metric of both sides, by the names of scores.SHOWN and in their order."""
    found = {}
    for name, columns, metric in (("loss", [0, 2], scores.ratio), ("perplexity", [0, 2], scores.perplexity),
                                  ("token_accuracy", [1, 2], scores.ratio)):  # fmt: skip
        base, adapted = (side.tokens[:, columns] for side in sides)  # [n, 2] each
        found[name] = scores.compare(base, adapted, metric, seed)
    texts = [scores.of_answers(side.answers, references) if references else {} for side in sides]
    for name, (statistics, metric) in texts[0].items():
        found[name] = scores.compare(statistics, texts[1][name][0], metric, seed)
    return {name: found[name] for name in scores.SHOWN if name in found}


def results_table(compared: dict[str, scores.Comparison], num_examples: int, num_tokens: int) -> Table:
    """Base, adapter and their difference, each with its interval."""
    title = f"{num_examples} eval examples, {num_tokens:,} trained tokens"
    table = Table(title=title, box=None, padding=(0, 0, 0, 1), pad_edge=False)  # 80 columns suffice
    for header in ("", *SIDES, "adapter - base"):
        table.add_column(header, justify="right" if header else "left")
    for name, found in compared.items():
        table.add_row(scores.SHOWN[name][0], *(Text(" ".join(scores.shown(each, name))) for each in found))
    intervals = "[low, high]: 95 % by bootstrap over examples."
    if num_examples < scores.FEWEST:
        intervals = f"[-]: no intervals; at least {scores.FEWEST} examples are needed."
    table.caption = Text(f"{intervals} Loss in nats per token; accuracy and the rows below in %.")
    return table
