"""Ranks: the processes of one run on several GPUs, each with the whole model. torchrun starts them; without it there is one.

Each computes a share of a step's micro-batches. Gradients and loss are summed before the update, which is then the same on all
ranks. A run may stop on two GPUs and resume on one. Not DistributedDataParallel: its hooks never see these gradients, which
CUDA graphs and the adapters' copies write outside autograd. In a run of one process every function here does nothing.
"""

import contextlib
import datetime
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from qlora.checksum import checksum
from qlora.errors import CheckpointError, EnvironmentProblem, UserError, is_out_of_memory

Value = TypeVar("Value")
JOIN_TIMEOUT = datetime.timedelta(minutes=10)  # between the starts of two ranks
TIMEOUT = datetime.timedelta(hours=2)  # the first rank may tokenize for that long; one that dies is noticed at once


class Ranks(NamedTuple):
    """This process among those of its run."""

    rank: int = 0
    size: int = 1
    free_gb: float = math.inf  # memory of the GPU that has the least

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes files and prints."""
        return self.rank == 0


def start() -> Ranks:
    """Join the other ranks, if torchrun or accelerate has started any.

    Raises EnvironmentProblem if they cannot be reached, or their GPUs differ.
    """
    on_gpu = torch.cuda.is_available()
    free_gb = torch.cuda.mem_get_info()[0] / 1e9 if on_gpu else math.inf
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return Ranks(free_gb=free_gb)
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else None
    printing = sys.excepthook
    try:
        store, rank, size = next(iter(rendezvous("env://", timeout=JOIN_TIMEOUT)))
        # torchrun keeps its store when it restarts ranks: what one that died has written must not be read.
        store = PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        how = {"store": store, "rank": rank, "world_size": size, "timeout": TIMEOUT, "device_id": device}
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", **how)
    except (ValueError, RuntimeError) as error:
        raise EnvironmentProblem(
            f"The {os.environ['WORLD_SIZE']} ranks of WORLD_SIZE cannot be joined: {' '.join(str(error).split())[:200]}.",
            hint="Start all of them with torchrun.",
        ) from None
    sys.excepthook = printing  # torch's own holds back what this one prints
    names: list[str] = [""] * size
    dist.all_gather_object(names, torch.cuda.get_device_name(device) if on_gpu else "cpu")
    if len(set(names)) > 1:
        raise EnvironmentProblem(f"The ranks have different devices: {', '.join(sorted(set(names)))}.")
    return ranks()._replace(free_gb=smallest(free_gb))


def ranks() -> Ranks:
    """This process among the others, once they have joined."""
    return Ranks(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Ranks()


def leave() -> None:
    """Leave the other ranks, at the end of a run."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block in which this rank waits for the others; the error if one of them is gone."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise EnvironmentProblem(
            "Another process of this run has ended, or does not answer.",
            hint=f"Its own message says why; the same command resumes. ({' '.join(str(error).split())[:120]})",
        ) from error


def shares(sizes: Sequence[int], ranks: int, even: bool = False) -> list[int]:
    """Which rank computes each micro-batch of a step: the largest first, to the rank that has the least so far.

    `sizes` are tokens. Some ranks get nothing if there are fewer micro-batches. If `even`, no rank gets two more than another.
    """
    load, owner = [(0, 0)] * ranks, [0] * len(sizes)  # load: micro-batches if even, else 0; and tokens
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        owner[index] = rank = load.index(min(load))
        load[rank] = load[rank][0] + even, load[rank][1] + sizes[index]
    return owner


def sum_gradients(parameters: Sequence[torch.nn.Parameter], loss: torch.Tensor) -> None:
    """Sum gradients and loss over all ranks, in place and in one message.

    A rank without a micro-batch has no gradients, which count as zero. The loss is an fp32 scalar.
    """
    if not dist.is_initialized():
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    parts = [loss, *(parameter.grad for parameter in parameters if parameter.grad is not None)]
    message = torch.cat([part.reshape(-1) for part in parts])  # [1 + all adapter parameters]
    with together():
        dist.all_reduce(message)
    pieces = message.split([part.numel() for part in parts])
    torch._foreach_copy_(parts, [piece.view_as(part) for part, piece in zip(parts, pieces, strict=True)])


def sum_numbers(*numbers: float) -> list[float]:
    """The sum of each over all ranks, in fp64."""
    return _over_ranks(numbers, "sum")


def largest(number: int) -> int:
    """Over all ranks, which wait for each other but not for their GPUs."""
    return int(_over_ranks([number], "max")[0])


def smallest(number: float) -> float:
    """Over all ranks, like `largest`."""
    return _over_ranks([number], "min")[0]


def _over_ranks(numbers: Sequence[float], how: str) -> list[float]:
    if not dist.is_initialized():
        return list(numbers)
    found = torch.tensor(numbers, dtype=torch.float64)  # [numbers], which go by gloo
    with together():
        dist.all_reduce(found, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}[how])
    return found.tolist()


def by_first(make: Callable[[], Value]) -> Value:
    """What `make` returns on the first rank, which alone calls it. If it raises, every rank ends with that exit code.

    Raises:
        UserError: on the first rank, by `make`.
        SystemExit: on the others, with its exit code.
    """
    if not dist.is_initialized():
        return make()
    message: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            message[0] = make()
        except UserError as error:
            message[1] = int(error.exit_code)
            dist.broadcast_object_list(message)
            raise
    with together():
        dist.broadcast_object_list(message)
    if message[1] is not None:
        raise SystemExit(message[1])  # the first rank says why
    made: Value = message[0]
    return made


def in_turn(make: Callable[[], Value]) -> Value:
    """What `make` returns on this rank: the first rank calls it, and then the others, which find what it has cached.

    Raises:
        UserError: by `make`.
        SystemExit: with its exit code, if it was the first rank's.
    """
    made: list[Value] = []
    by_first(lambda: made.append(make()))
    return made[0] if made else make()


def require_same(tensors: Sequence[torch.Tensor], what: str) -> None:
    """End the run if a tensor differs between ranks: they would train different adapters.

    Raises CheckpointError on every rank. The tensors are in the same order everywhere; `what` names them.
    """
    if not dist.is_initialized():
        return
    ours = [int(checksum(tensor)) for tensor in tensors]
    theirs = by_first(lambda: ours)
    different = largest(sum(one != other for one, other in zip_longest(ours, theirs)))
    if different:
        raise CheckpointError(f"Ranks hold different {what}: {different} of {len(tensors)} tensors.", hint="Resume the run.")
