"""The decoder's forward and backward, each recorded once for a shape of batch and replayed as one launch: CUDA graphs.

A step of Phi-3-mini is some thousands of kernels. Where batches are small the GPU is through with one before the CPU has
launched the next, and waits. A recorded graph launches them all at once; it reads and writes the same memory each time, so
inputs are copied to where it reads, and gradients are added where it found them.
"""

import functools
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from qlora.attention import is_uniform
from qlora.checkpoint import random_state, set_random_state
from qlora.config import ExitCode, UserError
from qlora.guards import is_out_of_memory

MOST = 32  # shapes that are recorded; what comes after runs without a graph


def graph_obstacle(model: Any) -> str | None:
    """Why a model's decoder cannot be recorded, or None.

    Args:
        model: or its skeleton.
    """
    config = model.config
    if not is_uniform(model):
        return "no CUDA graphs, as transformers makes its masks, and waits for the device"
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = {entry.get("rope_type") for entry in (parameters, *parameters.values()) if isinstance(entry, dict)}
    if dynamic := kinds & {"dynamic", "longrope"}:
        return f"no CUDA graphs, as its {dynamic.pop()} rotation reads the length from the device"
    return None


class _Recording:
    """Forward and backward of the decoder for inputs of one shape."""

    def __init__(
        self, forward: Any, inputs: dict[str, Any], parameters: list[torch.nn.Parameter], pool: Any, first: bool
    ) -> None:
        """Record it; the first time run it before, so that all is compiled, cuBLAS has its workspace, and gradients exist.

        Args:
            forward: of the decoder, to be recorded, under autocast if it is to run so.
            inputs: its arguments.
            parameters: that are trained; their gradients must stay where they are.
            pool: of the memory that all recordings share, as no two are at work at a time.
            first: of this decoder. Those after it take no memory outside of the pool.
        """
        self.inputs = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
        # What autocast has cast must not be remembered: the next replay would not cast it again.
        device = parameters[0].device.type
        autocast = torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), False)
        run = functools.partial(forward, **self.inputs)
        before = random_state()
        if first:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side), autocast:
                for _ in range(2):  # compiles, and then runs as it will be recorded
                    hidden = run().last_hidden_state  # [B, T, D]
                    hidden.backward(torch.zeros_like(hidden))  # adds nothing to the gradients, but makes them
                    del hidden
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.empty_cache()  # the pool needs as much again
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with autocast, torch.cuda.graph(self.forward, pool=pool):
            hidden = run().last_hidden_state  # [B, T, D]
        self.d_hidden = torch.empty_like(hidden)  # [B, T, D]
        with torch.cuda.graph(self.backward, pool=pool):
            hidden.backward(self.d_hidden)
        self.hidden = hidden.detach()  # [B, T, D]
        set_random_state(before)
        torch.cuda.reset_peak_memory_stats()  # from now on peak_memory_gib counts the graph's memory as a whole


class _Replay(torch.autograd.Function):
    """anchor [] -> hidden [B, T, D]; the gradients of parameters are added to by the graph, autograd knows of none."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, recording: _Recording) -> torch.Tensor:
        ctx.recording = recording
        recording.forward.replay()
        return recording.hidden.detach()

    @staticmethod
    def backward(ctx: Any, d_hidden: torch.Tensor) -> tuple[None, None]:
        ctx.recording.d_hidden.copy_(d_hidden)
        ctx.recording.backward.replay()
        return None, None


class Graphs:
    """The decoder in training, replayed where its batch has a shape that was seen before."""

    def __init__(self, decoder: Any) -> None:
        """Nothing is recorded yet.

        Args:
            decoder: with layers prepared; its forward is replaced.
        """
        self.decoder = decoder
        self.parameters = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
        self.gradients: list[torch.Tensor | None] = []  # where the graphs add
        self.recordings: dict[Any, _Recording] = {}
        self.pool = torch.cuda.graph_pool_handle()
        self.anchor = torch.zeros((), device=self.parameters[0].device, requires_grad=True)  # []
        self.recorded, decoder.forward = decoder.forward, self.forward

    def forward(self, **inputs: Any) -> Any:
        """As the decoder's own; in training the hidden states are the graph's, and last until its next replay."""
        tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        key = (
            torch.is_autocast_enabled(self.anchor.device.type),
            *((name, tuple(value.shape)) for name, value in tensors.items()),
        )
        trains = self.decoder.training and torch.is_grad_enabled()
        if not trains or (key not in self.recordings and len(self.recordings) == MOST):
            return self.recorded(**inputs)
        self._put_gradients_back()
        if key not in self.recordings:
            self.recordings[key] = self._record(inputs)
        recording = self.recordings[key]
        for name, value in tensors.items():
            recording.inputs[name].copy_(value)
        return BaseModelOutputWithPast(last_hidden_state=_Replay.apply(self.anchor, recording))

    def _record(self, inputs: dict[str, Any]) -> _Recording:
        try:
            recording = _Recording(self.recorded, inputs, self.parameters, self.pool, first=not self.recordings)
        except RuntimeError as error:
            if is_out_of_memory(error) or "captur" not in str(error):
                raise
            text = "The decoder could not be recorded as CUDA graphs. Pass --compile layers, which does without."
            raise UserError(ExitCode.ENVIRONMENT, f"{text} ({' '.join(str(error).split())[:300]})") from error
        self.gradients = [parameter.grad for parameter in self.parameters]
        return recording

    def _put_gradients_back(self) -> None:
        """Where the graphs add to them, whatever has become of them since: zeros if they were set to None."""
        moved = [(p, g) for p, g in zip(self.parameters, self.gradients, strict=False) if g is not None and p.grad is not g]
        if moved:
            torch._foreach_zero_([gradient for _, gradient in moved])
            for parameter, gradient in moved:
                if parameter.grad is not None:
                    gradient.copy_(parameter.grad)
                parameter.grad = gradient
