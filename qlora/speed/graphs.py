"""The decoder's forward and backward, recorded when a shape of batch comes again and replayed as one launch: CUDA graphs.

A step of Phi-3-mini is some thousands of kernels. Where batches are small the GPU is through with one before the CPU has
launched the next, and waits. A recorded graph launches them all at once; it reads and writes the same memory each time, so
inputs are copied to where it reads, and gradients are added where it found them.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from qlora.errors import EnvironmentProblem, is_out_of_memory
from qlora.model.families import attention_use
from qlora.speed.lora_linear import require_plain_gradients

MAX_GRAPHS = 32  # shapes that are recorded; what comes after runs without a graph


def graphs_unavailable_reason(model: Any) -> str | None:
    """Why a model's decoder cannot be recorded, or None.

    Args:
        model: or the meta model.
    """
    config = model.get_decoder().config
    if problem := attention_use(model).problem:
        return f"no CUDA graphs, as transformers makes its masks, and waits for the device: {problem}"
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = {entry.get("rope_type") for entry in (parameters, *parameters.values()) if isinstance(entry, dict)}
    if dynamic := kinds & {"dynamic", "longrope"}:
        return f"no CUDA graphs, as its {dynamic.pop()} rotation reads the length from the device"
    return None


def static_copies(inputs: dict[str, Any]) -> dict[str, Any]:
    """Copy the tensors among the arguments; two names for one tensor are two names for its copy as well.

    A compiled layer treats one tensor under two names and two equal tensors as different cases. A second copy of
    `cu_seqlens` would be a new tensor of fixed length, and every other length would compile the layer again.
    """
    copies = {key: tensor.clone() for key, tensor in {id(tensor): tensor for _, tensor in _tensors(inputs)}.items()}

    def copied(value: Any) -> Any:
        return {kind: copied(mask) for kind, mask in value.items()} if isinstance(value, dict) else copies.get(id(value), value)

    return {name: copied(value) for name, value in inputs.items()}


def _tensors(inputs: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of each argument that is one, and of each mask in a dict of masks."""
    for name, value in inputs.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{kind}", mask) for kind, mask in _tensors(value))
        elif isinstance(value, torch.Tensor):
            yield name, value


class _Pool(NamedTuple):
    """Memory of all recordings, and the stream that they are captured on."""

    memory: torch.cuda.MemPool
    stream: torch.cuda.Stream


class _Live:
    """Forward and backward of the decoder, launched kernel by kernel: a shape that comes once is not worth a recording."""

    def __init__(
        self, forward: Any, inputs: dict[str, Any], place: Callable[[], contextlib.AbstractContextManager[None]]
    ) -> None:
        """Run nothing yet.

        Args:
            forward: forward of the decoder.
            inputs: its arguments.
            place: a block on the stream and in the memory where it runs.
        """
        self.run, self.place, self.autocast = functools.partial(forward, **inputs), place, _autocast(inputs)

    def run_forward(self) -> torch.Tensor:
        """-> hidden [B, T, D]."""
        with self.place(), self.autocast, torch.enable_grad():
            self.hidden = self.run().last_hidden_state  # [B, T, D]
        detached: torch.Tensor = self.hidden.detach()  # [B, T, D]
        return detached

    def run_backward(self, d_hidden: torch.Tensor) -> None:
        """d_hidden [B, T, D]; adds to the gradients of the parameters."""
        hidden = self.hidden  # [B, T, D]
        del self.hidden  # its activations go with backward
        with self.place():
            hidden.backward(d_hidden)


class _Recording:
    """Forward and backward of the decoder for inputs of one shape, replayed."""

    def __init__(self, forward: Any, inputs: dict[str, Any], pool: _Pool) -> None:
        """Capture what has run before for this shape, so that nothing is left to compile. It draws no random numbers.

        Args:
            forward: forward of the decoder; it is captured under autocast if autocast is on.
            inputs: its arguments.
            pool: shared by all recordings, since only one runs at a time.
        """
        self.inputs = static_copies(inputs)
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # thread_local: a thread may be writing a checkpoint, and wait for its copies.
        pool_id: Any = pool.memory.id  # Any: a stub of torch's wants its own kind of tuple
        with _autocast(inputs), torch.cuda.graph(self.forward, pool_id, pool.stream, "thread_local"):
            hidden = forward(**self.inputs).last_hidden_state  # [B, T, D]
        self.d_hidden = torch.empty_like(hidden)  # [B, T, D]
        with torch.cuda.graph(self.backward, pool_id, pool.stream, "thread_local"):
            hidden.backward(self.d_hidden)
        self.hidden = hidden.detach()  # [B, T, D]
        torch.cuda.reset_peak_memory_stats()  # from now on peak_memory_gb counts the graph's memory as a whole

    def copy_in(self, inputs: dict[str, Any]) -> None:
        """Copy a batch to where the graph reads."""
        for (_, target), (_, tensor) in zip(_tensors(self.inputs), _tensors(inputs), strict=True):
            target.copy_(tensor)

    def run_forward(self) -> torch.Tensor:
        """-> hidden [B, T, D], which the next replay overwrites."""
        self.forward.replay()
        detached: torch.Tensor = self.hidden.detach()  # [B, T, D]
        return detached

    def run_backward(self, d_hidden: torch.Tensor) -> None:
        """d_hidden [B, T, D]; adds to the gradients of the parameters."""
        self.d_hidden.copy_(d_hidden)
        self.backward.replay()


def _autocast(inputs: dict[str, Any]) -> torch.autocast:
    """Autocast as it is where the inputs are, but that it remembers no cast: the next replay would not cast again."""
    device = next(value.device.type for value in inputs.values() if isinstance(value, torch.Tensor))
    return torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), cache_enabled=False)


class _Pass(torch.autograd.Function):
    """anchor [] -> hidden [B, T, D]; what runs adds to the gradients of parameters itself, outside autograd."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, runs: _Live | _Recording, graphs: "Graphs") -> torch.Tensor:
        graphs.passes += 1
        ctx.runs, ctx.graphs, ctx.number = runs, graphs, graphs.passes
        return runs.run_forward()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_hidden: torch.Tensor) -> tuple[None, None, None]:
        if ctx.number is None:
            text = "This forward pass of the decoder has had its backward pass: a CUDA graph keeps nothing for a second one."
            raise RuntimeError(f"{text} Run forward again, or pass --compile layers.")
        if ctx.number != ctx.graphs.passes:
            text = (
                "A later forward pass of the decoder has overwritten the activations of this one: all CUDA graphs share memory."
            )
            raise RuntimeError(f"{text} Call backward() before the next forward pass, or pass --compile layers.")
        ctx.number = None
        ctx.graphs.put_gradients_back()  # zero_grad may have been called since the forward pass
        ctx.runs.run_backward(d_hidden)
        ctx.graphs.keep_gradients()
        return None, None, None


class Graphs:
    """The decoder in training: recorded when a shape of batch comes the second time, and replayed from then on."""

    def __init__(self, run: Callable[..., Any], decoder: Any) -> None:
        """Nothing is recorded yet.

        Args:
            run: the decoder's forward in training, which is recorded.
            decoder: holds the adapters.
        """
        self.run = run
        self.parameters = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
        self.gradients: list[torch.Tensor | None] = []  # where the graphs add; made by the first backward pass
        self.seen: set[Any] = set()  # shapes that have run once
        self.recordings: dict[Any, _Recording] = {}
        self.passes = 0  # forward passes, all of which write to the pool
        self.pool = _Pool(torch.cuda.MemPool(), torch.cuda.Stream())
        self.anchor = torch.zeros((), device=self.parameters[0].device, requires_grad=True)  # []

    def __call__(self, **inputs: Any) -> Any:
        """Like `run`, but the hidden states lie in the pool: they are valid until the next call, and so is backward."""
        key = self._key(inputs)
        require_plain_gradients(self.parameters)
        if key not in self.recordings and key in self.seen and self.gradients and len(self.recordings) < MAX_GRAPHS:
            self.put_gradients_back()  # a recording adds to the gradients that it finds
            self.recordings[key] = self._record(inputs)
        self.seen.add(key)
        runs = self.recordings.get(key) or _Live(self.run, inputs, self._place())
        if isinstance(runs, _Recording):
            runs.copy_in(inputs)
        hidden = _Pass.apply(self.anchor, runs, self)  # type: ignore[no-untyped-call]  # [B, T, D]
        return BaseModelOutputWithPast(last_hidden_state=hidden)

    def _place(self) -> Callable[[], contextlib.AbstractContextManager[None]]:
        """Where a pass runs without a recording: on the stream that captures and, except for the first, in the pool.

        Later passes then need no memory beside the pool. The first compiles, and makes the workspace of cuBLAS, which stays.
        """
        first = self.passes == 0
        if self.passes == 1:
            torch.cuda.empty_cache()  # the pool needs as much again

        @contextlib.contextmanager
        def place() -> Iterator[None]:
            # Only the stream that captures may reuse these blocks later, and only this thread allocates from the pool.
            self.pool.stream.wait_stream(torch.cuda.current_stream())
            in_pool = contextlib.nullcontext() if first else torch.cuda.use_mem_pool(self.pool.memory)
            with torch.cuda.stream(self.pool.stream), in_pool:
                yield
            torch.cuda.current_stream().wait_stream(self.pool.stream)

        return place

    def _key(self, inputs: dict[str, Any]) -> tuple[Any, ...]:
        """What a recording depends on: autocast, shapes, and which arguments are one tensor."""
        tensors = dict(_tensors(inputs))
        first = {id(value): name for name, value in reversed(tensors.items())}
        shapes = ((name, first[id(value)], tuple(value.shape)) for name, value in tensors.items())
        return (torch.is_autocast_enabled(self.anchor.device.type), *shapes)

    def _record(self, inputs: dict[str, Any]) -> _Recording:
        if not self.recordings:
            torch.cuda.empty_cache()  # of what ran before; the pool needs as much again
        try:
            return _Recording(self.run, inputs, self.pool)
        except RuntimeError as error:
            if is_out_of_memory(error) or "captur" not in str(error):
                raise
            raise EnvironmentProblem(
                "The decoder could not be recorded as CUDA graphs.",
                hint=f"Pass --compile layers, which does without. ({' '.join(str(error).split())[:300]})",
            ) from error

    def put_gradients_back(self) -> None:
        """Where the graphs add to them, whatever has become of them since: zeros if they were set to None."""
        moved = [(p, g) for p, g in zip(self.parameters, self.gradients, strict=False) if g is not None and p.grad is not g]
        if moved:
            torch._foreach_zero_([gradient for _, gradient in moved])
            for parameter, gradient in moved:
                if parameter.grad is not None:
                    gradient.copy_(parameter.grad)
                parameter.grad = gradient

    def keep_gradients(self) -> None:
        """Remember where the first backward pass has made gradients: each later one adds there."""
        if not self.gradients:
            self.gradients = [parameter.grad for parameter in self.parameters]
