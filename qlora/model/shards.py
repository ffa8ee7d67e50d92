"""A base too large for one GPU: each rank keeps a part of every decoder layer's NF4 bytes, and gathers a layer to run it.

The bytes are plain uint8, as bitsandbytes' `Params4bit` inside `fully_shard` gives a loss of 0 and NaN gradients without an
error (its issue 1945). Scales, 3 % of the bytes, and adapters stay whole on every rank, so that checkpoints are the same.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from qlora import distributed

ALIGNMENT = 256  # bytes, as torch aligns a tensor's memory


class ShardedBase:
    """The packed weights of all decoder layers: a part of each, and two buffers that hold a whole layer.

    A layer's weights are views of one of the buffers, and valid from its `gather` until the layer after the next is gathered.
    Every rank has to gather the same layers in the same order.

    Attributes:
        parts: one tensor per layer, [bytes / ranks] uint8: what this rank keeps.
        buffers: two, each [bytes of the largest layer] uint8.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        """Make room.

        Args:
            sizes: bytes of each layer.
            device: of this rank.
        """
        self._ranks = distributed.ranks()
        each = [-(-size // self._ranks.size) for size in sizes]
        self.parts = [torch.zeros(size, dtype=torch.uint8, device=device) for size in each]  # [bytes / ranks] each
        room = self._ranks.size * max(each)
        self.buffers = [torch.empty(room, dtype=torch.uint8, device=device) for _ in range(2)]  # [bytes of the largest]
        self._held: list[int | None] = [None, None]  # the layer that each buffer holds, or that is arriving there
        self._arriving: list[Any] = [None, None]

    def share(self, layer: int, begin: int, end: int) -> tuple[int, int]:
        """Which of the bytes from `begin` to `end` of a layer this rank keeps, counted from `begin`; perhaps none."""
        size = len(self.parts[layer])
        first, last = size * self._ranks.rank, size * (self._ranks.rank + 1)
        return min(max(first - begin, 0), end - begin), max(min(last, end) - begin, 0)

    def keep(self, layer: int, begin: int, packed: torch.Tensor) -> None:
        """Keep `packed` [n] uint8, the bytes of a layer that begin at `begin` and that `share` names."""
        start = begin - len(self.parts[layer]) * self._ranks.rank
        self.parts[layer][start : start + len(packed)] = packed

    def view(self, layer: int, begin: int, end: int) -> torch.Tensor:
        """[end - begin, 1] uint8: where these bytes of a layer are once it has been gathered."""
        return self.buffers[layer % 2][begin:end].view(-1, 1)

    def gather(self, layer: int, after: int | None = None) -> None:
        """Have the bytes of a layer in its buffer for what is launched next, and begin to gather those of the layer after.

        A gather waits for all that was launched before it, so the layer that the other buffer held has run by then.
        """
        with distributed.together():
            for index in (layer, after):
                if index is not None and 0 <= index < len(self.parts) and self._held[index % 2] != index:
                    self._wait_for(index % 2)  # for a layer that was gathered and did not run
                    part = self.parts[index]
                    whole = self.buffers[index % 2][: self._ranks.size * len(part)]  # [bytes]
                    self._arriving[index % 2] = dist.all_gather_into_tensor(whole, part, async_op=True)
                    self._held[index % 2] = index
            self._wait_for(layer % 2)

    def _wait_for(self, buffer: int) -> None:
        if self._arriving[buffer] is not None:
            self._arriving[buffer].wait()
            self._arriving[buffer] = None


class Shard(NamedTuple):
    """One decoder layer of a ShardedBase."""

    base: ShardedBase
    number: int

    def before_forward(self) -> None:
        """Have the layer's bytes here; the next layer's are on their way."""
        self.base.gather(self.number, self.number + 1)

    def before_backward(self, output: Any) -> Any:
        """The layer's output, hidden [B, T, D] or a tuple that begins with it, whose backward gathers the bytes again."""
        hidden, *rest = output if isinstance(output, tuple) else (output,)
        hidden = _GatherInBackward.apply(hidden, self)  # type: ignore[no-untyped-call]  # [B, T, D]
        return (hidden, *rest) if isinstance(output, tuple) else hidden


class _GatherInBackward(torch.autograd.Function):
    """hidden -> hidden. Recomputation and backward of the layer share the gather."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, shard: Shard) -> torch.Tensor:
        ctx.shard = shard
        return hidden.view_as(hidden)  # [B, T, D]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.shard.base.gather(ctx.shard.number, ctx.shard.number - 1)
        return d_hidden, None


def shard_of(layer: Any) -> Shard | None:
    """The shard that a decoder layer was loaded as, or None."""
    shard: Shard | None = getattr(layer, "shard", None)
    return shard
