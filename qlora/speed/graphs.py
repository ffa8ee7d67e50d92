"""The decoder's forward and backward, each recorded once for a shape of batch and replayed as one launch: CUDA graphs.

A step of Phi-3-mini is some thousands of kernels. Where batches are small the GPU is through with one before the CPU has
launched the next, and waits. A recorded graph launches them all at once; it reads and writes the same memory each time, so
inputs are copied to where it reads, and gradients are added where it found them.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from qlora.errors import EnvironmentProblem, is_out_of_memory
from qlora.model.families import is_uniform
from qlora.model.random_state import random_state, set_random_state
from qlora.speed.lora_linear import require_plain_gradients

MAX_GRAPHS = 32  # shapes that are recorded; what comes after runs without a graph


def graphs_unavailable_reason(model: Any) -> str | None:
    """Why a model's decoder cannot be recorded, or None.

    Args:
        model: or the meta model.
    """
    config = model.config
    if not is_uniform(model):
        return "no CUDA graphs, as transformers makes its masks, and waits for the device"
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
    distinct = {id(value): value for value in inputs.values() if isinstance(value, torch.Tensor)}
    copies = {key: tensor.clone() for key, tensor in distinct.items()}
    return {name: copies.get(id(value), value) for name, value in inputs.items()}


class _Pool(NamedTuple):
    """Memory of all recordings, and the stream that they are captured on."""

    memory: torch.cuda.MemPool
    stream: torch.cuda.Stream


class _Recording:
    """Forward and backward of the decoder for inputs of one shape."""

    def __init__(
        self, forward: Any, inputs: dict[str, Any], parameters: list[torch.nn.Parameter], pool: _Pool, first: bool
    ) -> None:
        """Warm up, then capture. The warm-up compiles what is new about this shape, which must not happen during capture.

        Args:
            forward: forward of the decoder; it is captured under autocast if autocast is on.
            inputs: its arguments.
            parameters: trained parameters; their gradients must stay where they are.
            pool: shared by all recordings, since only one runs at a time.
            first: whether this is the first recording of the decoder. Its warm-up also makes the gradients and the workspace
                of cuBLAS, outside the pool. Later warm-ups run in the pool, so they need no memory beside it.
        """
        self.inputs = static_copies(inputs)
        # What autocast has cast must not be remembered: the next replay would not cast it again.
        device = parameters[0].device.type
        autocast = torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), False)
        run = functools.partial(forward, **self.inputs)
        before = random_state()
        pool.stream.wait_stream(torch.cuda.current_stream())
        # Only the stream that captures may reuse these blocks later, and only this thread allocates from the pool.
        in_pool = contextlib.nullcontext() if first else torch.cuda.use_mem_pool(pool.memory)
        with torch.cuda.stream(pool.stream), in_pool, torch.autograd.set_multithreading_enabled(first), autocast:
            for _ in range(2 if first else 1):  # compile, then run once as captured
                hidden = run().last_hidden_state  # [B, T, D]
                hidden.backward(torch.zeros_like(hidden))  # adds zeros to the gradients
                del hidden
        torch.cuda.current_stream().wait_stream(pool.stream)
        if first:
            torch.cuda.empty_cache()  # the pool needs as much again
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        pool_id: Any = pool.memory.id  # Any: a stub of torch's wants its own kind of tuple
        with autocast, torch.cuda.graph(self.forward, pool_id, pool.stream):
            hidden = run().last_hidden_state  # [B, T, D]
        self.d_hidden = torch.empty_like(hidden)  # [B, T, D]
        with torch.cuda.graph(self.backward, pool_id, pool.stream):
            hidden.backward(self.d_hidden)
        self.hidden = hidden.detach()  # [B, T, D]
        set_random_state(before)
        torch.cuda.reset_peak_memory_stats()  # from now on peak_memory_gb counts the graph's memory as a whole


class _Replay(torch.autograd.Function):
    """anchor [] -> hidden [B, T, D]; the graph itself adds to the gradients of parameters, outside autograd."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, recording: _Recording, graphs: "Graphs") -> torch.Tensor:
        graphs.passes += 1
        ctx.recording, ctx.graphs, ctx.number = recording, graphs, graphs.passes
        recording.forward.replay()
        hidden: torch.Tensor = recording.hidden.detach()  # [B, T, D]
        return hidden

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
        ctx.recording.d_hidden.copy_(d_hidden)
        ctx.recording.backward.replay()
        return None, None, None


class Graphs:
    """The decoder in training, replayed where its batch has a shape that was seen before."""

    def __init__(self, run: Callable[..., Any], decoder: Any) -> None:
        """Nothing is recorded yet.

        Args:
            run: the decoder's forward in training, which is recorded.
            decoder: holds the adapters.
        """
        self.run = run
        self.parameters = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
        self.gradients: list[torch.Tensor | None] = []  # where the graphs add
        self.recordings: dict[Any, _Recording] = {}
        self.passes = 0  # replays of a forward pass, all of which write to the pool
        self.pool = _Pool(torch.cuda.MemPool(), torch.cuda.Stream())
        self.anchor = torch.zeros((), device=self.parameters[0].device, requires_grad=True)  # []

    def __call__(self, **inputs: Any) -> Any:
        """Like `run`, but the hidden states belong to the graph: they are valid until the next call, and so is backward."""
        key = self._key(inputs)
        if key not in self.recordings and len(self.recordings) == MAX_GRAPHS:
            return self.run(**inputs)
        require_plain_gradients(self.parameters)
        if key not in self.recordings:
            self.put_gradients_back()  # a recording adds to the gradients that it finds
            self.recordings[key] = self._record(inputs)
        recording = self.recordings[key]
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor):
                recording.inputs[name].copy_(value)
        hidden = _Replay.apply(self.anchor, recording, self)  # type: ignore[no-untyped-call]  # [B, T, D]
        return BaseModelOutputWithPast(last_hidden_state=hidden)

    def _key(self, inputs: dict[str, Any]) -> tuple[Any, ...]:
        """What a recording depends on: autocast, shapes, and which arguments are one tensor."""
        tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        first = {id(value): name for name, value in reversed(tensors.items())}
        shapes = ((name, first[id(value)], tuple(value.shape)) for name, value in tensors.items())
        return (torch.is_autocast_enabled(self.anchor.device.type), *shapes)

    def _record(self, inputs: dict[str, Any]) -> _Recording:
        try:
            recording = _Recording(self.run, inputs, self.parameters, self.pool, first=not self.recordings)
        except RuntimeError as error:
            if is_out_of_memory(error) or "captur" not in str(error):
                raise
            raise EnvironmentProblem(
                "The decoder could not be recorded as CUDA graphs.",
                hint=f"Pass --compile layers, which does without. ({' '.join(str(error).split())[:300]})",
            ) from error
        self.gradients = [parameter.grad for parameter in self.parameters]
        return recording

    def put_gradients_back(self) -> None:
        """Where the graphs add to them, whatever has become of them since: zeros if they were set to None."""
        moved = [(p, g) for p, g in zip(self.parameters, self.gradients, strict=False) if g is not None and p.grad is not g]
        if moved:
            torch._foreach_zero_([gradient for _, gradient in moved])
            for parameter, gradient in moved:
                if parameter.grad is not None:
                    gradient.copy_(parameter.grad)
                parameter.grad = gradient
