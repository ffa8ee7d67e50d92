"""What `--explain` shows: what is trained, in which dtype it lies, which tokens carry the loss, where gradients are large.

Each table has a function that returns its values, for use in a notebook; `explain_start` and `explain_step` print them.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora.config import TrainConfig
from qlora.data.batch import Batch, batched, epoch_rows, training_batches
from qlora.data.dataset import TokenizedDataset
from qlora.data.template import IGNORED, TokenizedExample
from qlora.model.shards import shard_of
from qlora.run.log import Tracker
from qlora.speed.lora_linear import LoRALinear4bit
from qlora.terminal import printable, say

KINDS = ("NF4 weights", "NF4 weights, gathered", "NF4 constants", "NF4 weights, dequantized", "embeddings", "norms",
         "other parameters", "head", "buffers", "adapters", "gradients", "moments", "constants of moments")  # fmt: skip
TOKEN_ROWS = 200  # of the example, in the terminal


class Group(NamedTuple):
    """Tensors of one kind and one dtype that stay in memory from step to step."""

    name: str
    dtype: str
    elements: int  # parameters, where these are packed two in a byte
    bytes: int


class Token(NamedTuple):
    """One token of a sample: what it is, and whether the model is trained to predict it from those before."""

    position: int
    id: int
    text: str
    trained: bool


class Count(NamedTuple):
    """What a micro-batch holds, in tokens."""

    samples: int
    length: int  # T, of its rows
    padding: int  # positions that hold none
    context: int  # tokens that are only read
    trained: int


# -- values ----------------------------------------------------------------------------------------------------------


def parameter_counts(model: Any) -> tuple[int, int]:
    """All parameters of a model, those packed in 4 bits counted one by one, and how many of them are trained."""
    parameters = {id(parameter): parameter for parameter in model.parameters()}.values()
    return sum(map(_count, parameters)), sum(_count(parameter) for parameter in parameters if parameter.requires_grad)


def dtype_ledger(model: Any, optimizer: torch.optim.Optimizer) -> list[Group]:
    """Parameters and bytes by kind and dtype, each storage once: the model, its gradients, and the optimizer's moments.

    What lives for part of a step only (activations, bf16 copies of adapters, dequantized weights) is not in it.

    Args:
        model: with adapters.
        optimizer: over them. Before the first step there are neither gradients nor moments.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    seen: set[int] = set()
    for name, tensor, elements in (*_model_tensors(model), *_training_tensors(model, optimizer)):
        if tensor.data_ptr() not in seen:  # tied weights, and tables that layers share, count once
            seen.add(tensor.data_ptr())
            group = groups.setdefault((name, str(tensor.dtype).removeprefix("torch.")), [0, 0])
            group[0] += elements
            group[1] += tensor.numel() * tensor.element_size()
    return [Group(*key, *groups[key]) for key in sorted(groups, key=lambda key: KINDS.index(key[0].replace("FP4", "NF4")))]


def _count(parameter: torch.Tensor) -> int:
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def _model_tensors(model: Any) -> Iterator[tuple[str, torch.Tensor, int]]:
    """(kind, tensor, elements) of all that the model holds."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    shared = {id(module) for layer in model.modules() if shard_of(layer) for module in layer.modules()}
    for shard in filter(None, map(shard_of, model.modules())):
        part = shard.base.parts[shard.number]  # [bytes / ranks], two weights in each
        yield "NF4 weights", part, 2 * part.numel()
        yield from (("NF4 weights, gathered", buffer, 2 * buffer.numel()) for buffer in shard.base.buffers)
    for module in model.modules():
        kind = "norms" if "norm" in type(module).__name__.lower() else "other parameters"
        kind = "embeddings" if module is embeddings else "head" if module is head else kind
        for parameter in module.parameters(recurse=False):
            state = getattr(parameter, "quant_state", None)
            if state is None:
                yield "adapters" if parameter.requires_grad else kind, parameter.data, parameter.numel()
                continue
            if id(module) not in shared:
                yield f"{state.quant_type.upper()} weights", parameter.data, _count(parameter)
            double = (state.state2.absmax, state.state2.code, state.offset) if state.nested else ()
            constants = (state.absmax, state.code, *double)
            yield from ((f"{state.quant_type.upper()} constants", tensor, tensor.numel()) for tensor in constants)
        yield from (("buffers", buffer, buffer.numel()) for buffer in module.buffers(recurse=False))
        if len(cached := getattr(module, "frozen", [])) == 1 and isinstance(module, LoRALinear4bit):
            yield f"{_form(module)} weights, dequantized", cached[0], cached[0].numel()


def _form(layer: Any) -> str:
    """NF4 or FP4, of an adapted layer in 4 bits."""
    return str(layer.base_layer.weight.quant_state.quant_type).upper()


def _training_tensors(model: Any, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor, int]]:
    """(kind, tensor, elements) of what training adds."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    yield from (("gradients", p.grad, p.numel()) for p in trained if p.grad is not None)
    for parameter in trained:
        for name, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor) and name != "step":
                kind = "moments" if value.shape == parameter.shape else "constants of moments"
                yield kind, value, value.numel()


def tokens(sample: TokenizedExample, tokenizer: Any) -> list[Token]:
    """A sample token by token.

    The first is never trained, label or not: there is nothing before it to predict it from.
    """
    found = []
    for position, (token, label) in enumerate(zip(sample.input_ids, sample.labels, strict=True)):
        found.append(Token(position, token, tokenizer.decode([token]), label != IGNORED and position > 0))
    return found


def token_counts(micro_batches: Iterable[Batch]) -> list[Count]:
    """The tokens of each micro-batch of a step; their `trained` add up to what the step's loss is divided by."""
    counts = []
    for batch in micro_batches:
        padding, context = batch.input_ids.numel() - batch.num_input_tokens, batch.num_input_tokens - batch.num_tokens
        counts.append(Count(len(batch.lines), batch.input_ids.shape[1], padding, context, batch.num_tokens))
    return counts


def gradient_norms(model: Any) -> dict[str, torch.Tensor]:
    """Module and matrix, as `qkv_proj.lora_A` -> the norms [layers] of its gradients, on the CPU, first layer first.

    They are of the gradients as they lie there: after clipping, if train_step has clipped.
    """
    with_gradient = [(name, parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None]
    norms = torch.stack(torch._foreach_norm([gradient for _, gradient in with_gradient])).float().cpu()  # sync; [tensors]
    found: dict[str, list[torch.Tensor]] = {}
    for (name, _), norm in zip(with_gradient, norms, strict=True):
        parts = name.replace(".default", "").removesuffix(".weight").split(".")
        found.setdefault(".".join(parts[-2:]), []).append(norm)
    return {name: torch.stack(layers) for name, layers in found.items()}


# -- shown -----------------------------------------------------------------------------------------------------------


def explain_start(config: TrainConfig, model: Any, samples: TokenizedDataset, tokenizer: Any, console: Console) -> None:
    """With --explain, print the parameters, the shortest sample token by token, and the tokens of the first step."""
    if not config.explain:
        return
    total, trained = parameter_counts(model)
    say(console, f"Parameters: {total:,}, of which {trained:,} are trained ({100 * trained / total:.2f} %)")
    sample = samples[min(range(len(samples)), key=samples.length)]
    line = samples.source.line(sample.line) if samples.source else sample.line
    console.print(token_table(tokens(sample, tokenizer), line))
    batches = training_batches(samples, epoch_rows(samples, config, 1), config)
    console.print(count_table(token_counts(next(batched(batches, config.gradient_accumulation_steps)))))


def explain_step(
    config: TrainConfig, model: Any, optimizer: torch.optim.Optimizer, step: int, tracker: Tracker, first: bool
) -> None:
    """With --explain, after a log step: a histogram over layers of each module's gradient norms and, at first, the ledger."""
    if not config.explain:
        return
    for name, norms in gradient_norms(model).items():
        tracker.board.add_histogram(f"gradient_norm/{name}", norms, step)
    if first:
        tracker.console.print(ledger_table(dtype_ledger(model, optimizer)))


def ledger_table(groups: Sequence[Group]) -> Table:
    """The ledger as a table, with its sum."""
    table = _table("Memory from step to step", "tensors", "dtype", "elements", "bytes", "MB")
    for group in groups:
        table.add_row(group.name, group.dtype, f"{group.elements:,}", f"{group.bytes:,}", f"{group.bytes / 1e6:,.2f}")
    total = sum(group.bytes for group in groups)
    table.add_section()
    table.add_row("all", "", "", f"{total:,}", f"{total / 1e6:,.2f}")
    return table


def token_table(rows: Sequence[Token], line: int | str) -> Table:
    """A sample's tokens as a table; the middle of a long one is left out."""
    count = sum(token.trained for token in rows)
    table = _table(f"Line {line}: {count} of {len(rows)} tokens trained", "position", "id", "token", "")
    left_out = _middle(len(rows))
    for token in rows:
        if token.position == left_out.start and left_out:
            table.add_row("...", "", Text(f"{len(left_out)} more"), "")
        if token.position not in left_out:
            text = Text(repr(token.text), style="bold" if token.trained else "dim")  # Text: [brackets] are no markup
            table.add_row(str(token.position), str(token.id), text, "trained" if token.trained else "masked")
    return table


def _middle(count: int) -> range:
    """What is left out of a long sample."""
    half = TOKEN_ROWS // 2
    return range(half, count - half) if count > TOKEN_ROWS else range(0)


def token_text(rows: Sequence[Token], bars: bool = True) -> Text:
    """A sample's tokens as running text, the middle of a long one left out.

    Trained tokens are green; without color they are in double brackets.

    Args:
        rows: the tokens.
        bars: put a bar between two tokens and mark line ends.
    """
    text = Text()
    left_out = _middle(len(rows))
    before = False
    for token in rows:
        if token.position == left_out.start and left_out:
            text.append(f" ... {len(left_out)} more ... ", "dim")
        if token.position in left_out:
            continue
        bar = ("\u27e7" if before else "") + ("\u27e6" if token.trained else "") if token.trained != before else "\u2502" * bars
        text.append(bar, "cyan")
        text.append(
            printable(token.text.replace("\n", "\u21b5\n") if bars else token.text), "bold green" if token.trained else "dim"
        )
        before = token.trained
    return text.append("\u27e7" if before else "", "cyan")


def count_table(counts: Sequence[Count]) -> Table:
    """The tokens of a step as a table."""
    table = _table("Tokens of the first step", "micro-batch", "samples", "positions", "padding", "context", "trained")
    for number, count in enumerate(counts, 1):
        columns = (number, count.samples, count.padding + count.context + count.trained, *count[2:])
        table.add_row(*(f"{value:,}" for value in columns))
    table.caption = f"Its loss is the sum of losses over {sum(count.trained for count in counts):,} tokens, divided by that."
    return table


def _table(title: str, *headers: str) -> Table:
    table = Table(title=title)
    for header in headers:
        table.add_column(header, justify="left" if header in ("tensors", "dtype", "token", "") else "right")
    return table
