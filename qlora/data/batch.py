"""From tokenized examples to micro-batches: padding, packing and the seeded order of an epoch.

Shapes: B samples in a micro-batch, T positions (padding included), N supervised tokens in a micro-batch.
A supervised token is a label that is trained after the shift by one: the hidden state at position t predicts the id at t + 1.
"""

import bisect
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from qlora.config import TrainConfig
from qlora.data.dataset import TokenizedDataset
from qlora.data.template import IGNORED, TokenizedExample
from qlora.distributed import Ranks, shares

Item = TypeVar("Item")
FILLER_POSITIONS = 8  # few, but torch.compile would compile for 0 and 1 alone
LEAST_EVAL_POSITIONS = 2048  # 0.2 GB for a layer of Phi-3-mini; a GPU waits for the CPU with fewer


Row = int | list[int]  # of a batch: the index of its sample or, with packing, of its samples


class Batch(NamedTuple):
    """A micro-batch, right-padded. No attention mask: under a causal mask nothing real sees the padding behind it.

    With packing a row holds several samples, one behind the other, and the last three fields tell where they are.
    """

    input_ids: torch.Tensor  # [B, T] int64
    labels: torch.Tensor  # [B, T] int64, IGNORED where not trained
    positions: torch.Tensor  # [N] int64: flat b * T + t of each hidden state that predicts a token, found on the CPU
    num_tokens: int  # N
    num_input_tokens: int  # without padding
    lines: tuple[int, ...]  # of the source, one of each sample
    position_ids: torch.Tensor | None = None  # [B, T] int64: from 0 in each sample, and in the padding of a row
    cu_seqlens: torch.Tensor | None = None  # [S + 1] int32: where each begins in the flattened rows, and B * T
    max_seqlen: int | None = None  # of the longest, padding included
    seed: int = 0  # of the dropout in this micro-batch

    @property
    def is_here(self) -> bool:
        """Whether this process computes it; if not, it holds no ids, but says what they are of."""
        return self.input_ids.numel() > 0

    def to(self, device: torch.device) -> "Batch":
        """The same batch there; the copy does not wait when the source is pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> "Batch":
        """The same batch in page-locked memory, from which a GPU copies asynchronously."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        moved: dict[str, Any] = {name: function(value) for name, value in self._asdict().items() if torch.is_tensor(value)}
        return self._replace(**moved)


# -- collation and order ---------------------------------------------------------------------------------------------


def collate(samples: Sequence[TokenizedExample], multiple: int = 1, least: int = 1) -> Batch:
    """Pad on the right with id 0. Any id would do: padding is known by length, never by its id.

    Args:
        samples: of the rows.
        multiple: of which T is the smallest that the longest sample fits into.
        least: rows; those behind the samples' are of padding alone.
    """
    longest = rounded(max(len(sample.input_ids) for sample in samples), multiple)
    input_ids = torch.zeros((max(len(samples), least), longest), dtype=torch.int64)  # [B, T]
    labels = torch.full(input_ids.shape, IGNORED)  # [B, T]
    for row, sample in enumerate(samples):
        input_ids[row, : len(sample.input_ids)] = torch.tensor(sample.input_ids)  # [T of this sample]
        labels[row, : len(sample.labels)] = torch.tensor(sample.labels)  # [T of this sample]
    rows, columns = torch.nonzero(labels[:, 1:] != IGNORED, as_tuple=True)  # [N], [N]
    positions = rows * longest + columns  # [N]
    num_input_tokens, lines = sum(len(sample.input_ids) for sample in samples), tuple(sample.line for sample in samples)
    return Batch(input_ids, labels, positions, len(positions), num_input_tokens, lines)


def collate_packed(rows: Sequence[Sequence[TokenizedExample]], multiple: int = 1, least: int = 1) -> Batch:
    """Put the samples of a row one behind the other: positions start anew in each, and no label is predicted across.

    What pads a row is a sample too; samples without a token make their number, and that of the ends, a multiple.
    """
    batch = collate([_joined(samples) for samples in rows], multiple, least)
    height, width = batch.input_ids.shape
    lengths: list[int] = []  # of samples, and of the padding behind them
    for samples in rows:
        own = [len(sample.input_ids) for sample in samples]
        lengths += own if sum(own) == width else [*own, width - sum(own)]
    lengths += (height - len(rows)) * [width]
    ends = [0, *itertools.accumulate(lengths)]
    ends += [ends[-1]] * (rounded(len(ends), multiple) - len(ends))
    return batch._replace(
        lines=tuple(sample.line for samples in rows for sample in samples),
        position_ids=torch.cat([torch.arange(length) for length in lengths]).view_as(batch.input_ids),  # [B, T]
        cu_seqlens=torch.tensor(ends, dtype=torch.int32),  # [S + 1]
        max_seqlen=max(lengths),
    )


def rounded(number: int, multiple: int) -> int:
    """Up to the next multiple."""
    return -(-number // multiple) * multiple


def _joined(samples: Sequence[TokenizedExample]) -> TokenizedExample:
    ids = [index for sample in samples for index in sample.input_ids]
    labels = [label for sample in samples for label in (IGNORED, *sample.labels[1:])]  # nothing precedes a sample's first id
    return TokenizedExample(ids, labels, samples[0].line)


def pack(lengths: Sequence[int], order: Iterable[int], budget: int) -> list[list[int]]:
    """Best fit, longest first: each sample goes into the fullest row that has room for it, or into a new one.

    Args:
        lengths: of all samples, none above the budget.
        order: of their indices, kept among samples of one length; how many rows there are does not depend on it.
        budget: most tokens in a row.

    Source: best-fit-decreasing, as for language models in Ding et al., 2024 (arXiv 2404.10830).
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # free tokens -> rows
    rooms: list[int] = []  # its keys, ascending
    for index in sorted(order, key=lambda index: -lengths[index]):
        at = bisect.bisect_left(rooms, lengths[index])
        if at == len(rooms):
            room, row = budget, len(rows)
            rows.append([])
        else:
            room = rooms[at]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        rows[row].append(index)
        room -= lengths[index]
        if room not in with_room:
            with_room[room] = []
            bisect.insort(rooms, room)
        with_room[room].append(row)
    return rows


def epoch_rows(samples: TokenizedDataset, config: TrainConfig, epoch: int) -> Sequence[Row]:
    """The rows of an epoch in their order: one sample each or, with packing, as many as fit; always the same number.

    Packing goes by length, so that mostly the same samples share a row in each epoch; the order of rows changes.
    """
    order = epoch_order(len(samples), config.seed, epoch)
    if not config.packing:
        return order
    rows = pack(samples.lengths, order, config.max_length)
    return [rows[index] for index in epoch_order(len(rows), config.seed, epoch)]


def longest_rows(samples: TokenizedDataset, config: TrainConfig) -> list[Row]:
    """The rows of a micro-batch that needs the most memory, the longest last."""
    rows = sorted(epoch_rows(samples, config, epoch=1), key=lambda row: row_length(samples, row))
    return rows[-config.per_device_train_batch_size :]


def row_length(samples: TokenizedDataset, row: Row) -> int:
    """Tokens of a row, without padding."""
    return sum(map(samples.length, [row] if isinstance(row, int) else row))


def epoch_order(num_samples: int, seed: int, epoch: int) -> list[int]:
    """The order of samples in an epoch: a pure function, so that a resumed run needs no state to find it again."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(num_samples, generator=generator).tolist()


def iter_batches(
    samples: Sequence[TokenizedExample],
    rows: Iterable[Row],
    batch_size: int,
    pin: bool = False,
    multiple: int = 1,
    least: int = 1,
) -> Iterator[Batch]:
    """Collate `batch_size` rows at a time in the given order; the last batch may be smaller unless `least` pads it."""
    for group in batched(rows, batch_size):
        packed = [[samples[index] for index in row] for row in group if isinstance(row, list)]
        if packed:
            batch = collate_packed(packed, multiple, least)
        else:
            batch = collate([samples[row] for row in group if isinstance(row, int)], multiple, least)
        yield batch.pin() if pin else batch


def dropout_seed(seed: int, epoch: int, index: int) -> int:
    """The seed of the dropout in a micro-batch: a pure function, so that no generator's state has to be saved or shared.

    Every micro-batch of a run gets another seed, up to a million of them in an epoch. That holds for the low 32 bits too, and
    a CPU's generator reads no others.

    Args:
        seed: of the run.
        epoch: from 1.
        index: of the micro-batch in its epoch, from 0.

    Returns:
        A number from 0 to 2**63 - 1.
    """
    return ((seed * 1_000_003 + epoch) * 1_000_003 + index) % 2**63


def training_batches(
    samples: Sequence[TokenizedExample],
    rows: Iterable[Row],
    config: TrainConfig,
    pin: bool = False,
    epoch: int = 1,
    first: int = 0,
) -> Iterator[Batch]:
    """The micro-batches of training, each with the seed of its dropout.

    Where layers are compiled all have the same number of rows, so that one layer's code, and memory, is that of all: rows of
    padding fill up the last of an epoch.

    Args:
        samples: all of the training data.
        rows: those to collate, in order: all rows of an epoch, or its last ones.
        config: batch size, compile and seed are read.
        pin: whether in page-locked memory.
        epoch: that the rows belong to.
        first: index, in the epoch, of the micro-batch that begins with the first of `rows`.
    """
    size = config.per_device_train_batch_size
    batches = iter_batches(samples, rows, size, pin, config.length_multiple, _least_rows(config))
    for index, batch in enumerate(batches, first):
        yield batch._replace(seed=dropout_seed(config.seed, epoch, index))


def _least_rows(config: TrainConfig) -> int:
    """Rows that a micro-batch of training has at least."""
    return 1 if config.compile == "none" else config.per_device_train_batch_size


def training_steps(
    samples: TokenizedDataset, rows: Iterable[Row], config: TrainConfig, ranks: Ranks, at: tuple[int, int], pin: bool = False
) -> Iterator[list[Batch]]:
    """The micro-batches of each optimizer step. Those that another rank computes hold no ids, but say what they are of.

    Args:
        samples: all of the training data.
        rows: of an epoch, those that were not trained on yet.
        config: batch size, accumulation, compile and seed are read.
        ranks: this process among the others.
        at: epoch, and index in it of the first micro-batch of `rows`.
        pin: whether in page-locked memory.
    """
    epoch, first = at
    groups = enumerate(batched(rows, config.per_device_train_batch_size), first)
    for step in batched(groups, config.gradient_accumulation_steps):
        positions = [len(group) * max(row_length(samples, row) for row in group) for _, group in step]
        owners, batches = shares(positions, ranks.size, config.shard_base), list[Batch]()
        for (index, group), owner in zip(step, owners, strict=True):
            if owner == ranks.rank:
                batches += training_batches(samples, group, config, pin, epoch, index)
            else:
                batches.append(_elsewhere(samples, group, config))
        if config.shard_base and owners.count(ranks.rank) < math.ceil(len(step) / ranks.size):
            batches += _fillers(config, pin)
        yield batches


def _fillers(config: TrainConfig, pin: bool) -> Iterator[Batch]:
    """A micro-batch of padding: a rank that has nothing to compute takes part in gathering layers for those that have."""
    nothing = TokenizedExample([0] * FILLER_POSITIONS, [IGNORED] * FILLER_POSITIONS, 0)
    rows: list[Row] = [[0]] if config.packing else [0]
    for batch in iter_batches([nothing], rows, 1, pin, config.length_multiple, _least_rows(config)):
        yield batch._replace(num_input_tokens=0, lines=())


def _elsewhere(samples: TokenizedDataset, group: list[Row], config: TrainConfig) -> Batch:
    """What a step has to know of a micro-batch that another rank computes."""
    found = [samples[index] for row in group for index in ([row] if isinstance(row, int) else row)]
    nothing = torch.zeros((max(len(group), _least_rows(config)), 0), dtype=torch.int64)  # [B, 0]
    num_tokens = sum(label != IGNORED for sample in found for label in sample.labels[1:])
    num_input_tokens, lines = sum(len(sample.input_ids) for sample in found), tuple(sample.line for sample in found)
    return Batch(nothing, nothing, torch.zeros(0, dtype=torch.int64), num_tokens, num_input_tokens, lines)


def eval_batches(
    samples: TokenizedDataset,
    most_positions: int,
    config: TrainConfig,
    ranks: Ranks = Ranks(),  # noqa: B008  a tuple
    pin: bool = False,
) -> Iterator[Batch]:
    """This rank's share of all samples, the shortest first, as many at a time as `most_positions` hold with their padding.

    Nothing is kept for backward, so what fits in training fits here, and up to LEAST_EVAL_POSITIONS always do.
    """
    most = max(most_positions, LEAST_EVAL_POSITIONS)
    groups: list[list[int]] = [[]]
    for index in sorted(range(len(samples)), key=samples.length):
        if groups[-1] and (len(groups[-1]) + 1) * samples.length(index) > most:
            groups.append([])
        groups[-1].append(index)
    ours = groups[ranks.rank :: ranks.size]
    for group in ours:
        yield from iter_batches(samples, group, len(group), pin)
    if config.shard_base and len(ours) < math.ceil(len(groups) / ranks.size):
        yield from _fillers(dataclasses.replace(config, packing=False), pin)


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """`size` items at a time, the last ones fewer: rows to a micro-batch, micro-batches to an optimizer step."""
    items = iter(items)
    while group := list(itertools.islice(items, size)):
        yield group


def count_steps(config: TrainConfig, num_rows: int) -> tuple[int, int]:
    """Optimizer steps of an epoch, the last of which may have fewer micro-batches, and of the whole run."""
    num_micro_batches = math.ceil(num_rows / config.per_device_train_batch_size)
    steps_per_epoch = math.ceil(num_micro_batches / config.gradient_accumulation_steps)
    return steps_per_epoch, config.max_steps or config.num_train_epochs * steps_per_epoch
