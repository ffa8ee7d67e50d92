"""The decoder as it runs in training: fast, in little memory, and with the same numbers up to rounding."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from qlora.config import TrainConfig
from qlora.model.precision import autocast_dtype
from qlora.model.prompts import PromptedDecoder, has_prompt
from qlora.speed import lora_linear
from qlora.speed.graphs import Graphs
from qlora.speed.layers import training_layers

TOLERANCE = 0.1  # relative difference of hidden states; what bf16 rounds in 32 layers is a tenth of it


def accelerate(
    model: Any, config: TrainConfig, say: Callable[[str], None] = print, backend: str = "inductor"
) -> "AcceleratedDecoder":
    """The callable that training steps run instead of `model.get_decoder()`. Evaluation and generation use the model itself.

    No `forward` of the model is replaced. Its adapted layers become LoRALinear, a subclass of PEFT's layer with the same
    weights and names, which behaves as PEFT's does except in training. Hooks on the decoder and its layers do not run in
    training steps. What runs when `decoder(input_ids=...)` is called, from the outside in:

        AcceleratedDecoder.__call__   ids [B, T] -> last hidden states [B, T, D]
          Graphs.__call__             with --compile graphs only: replays what follows as one launch
            AcceleratedDecoder._run   A and B of all adapters in bf16; then transformers' decoder, over training layers
              TrainingLayer.forward   one layer, compiled; its activations are kept or recomputed (layers.py)
                the layer's forward   transformers' own code: norms, attention, MLP
                  LoRALinear.forward  one linear layer: NF4 base and adapter as one operator (lora_linear.py)

    Args:
        model: NF4 base with adapters.
        config: resolved; gradient_checkpointing, compile, lora_dropout and cache_dequantized are read.
        say: for a warning if compiled layers turn out to compute something else.
        backend: of torch.compile; a test may pass one that needs no C compiler.
    """
    cache = autocast_dtype(model) if config.cache_dequantized else None
    adapted = lora_linear.install(model, cache)
    return AcceleratedDecoder(model, adapted, config, say, backend)


class AcceleratedDecoder:
    """The decoder of a model for training steps; see `accelerate`.

    Attributes:
        config: of the model.
        dtype: of matrix products, for autocast: bf16, or fp16 if the base is in fp16.
        graphs: the recordings; None where nothing is recorded.
    """

    def __init__(
        self,
        model: Any,
        adapted: list[lora_linear.LoRALinear],
        config: TrainConfig,
        say: Callable[[str], None] = print,
        backend: str = "inductor",
    ) -> None:
        """Compile nothing yet: the first call does.

        Args:
            model: with adapters.
            adapted: its adapted layers.
            config: resolved.
            say: for a warning.
            backend: of torch.compile.
        """
        self._train_config, self._say = config, say
        self._unchecked = config.compile != "none"
        self.decoder = decoder = model.get_decoder()
        # Virtual tokens come in through PeftModel.forward; else the decoder's own forward is called, without hooks.
        plain = functools.partial(type(decoder).forward, decoder)
        self._forward: Callable[..., Any] = PromptedDecoder(model) if has_prompt(model) else plain
        self.config, self.dtype = decoder.config, autocast_dtype(decoder)
        self.adapted = adapted
        self.seeded = bool(adapted) and config.compile != "none" and config.lora_dropout > 0
        self.layers = training_layers(decoder, config, backend)
        self.graphs = Graphs(self._run, decoder) if config.compile == "graphs" else None

    def __call__(self, **inputs: Any) -> Any:
        """The decoder's output, with `last_hidden_state` [B, T, D]. In eval mode it is that of the plain decoder.

        Args:
            inputs: as the decoder takes them; see attention.decoder_inputs.
        """
        if not self.decoder.training:
            return self._forward(**inputs)
        if self.seeded:  # drawn here, as a graph must find them among its inputs
            inputs["dropout_seeds"] = lora_linear.dropout_seeds(self.adapted)  # [adapted layers]
        run = self._run if self.graphs is None or not torch.is_grad_enabled() else self.graphs
        output = run(**inputs)
        if self._unchecked and torch.is_grad_enabled() and not self._agrees(output.last_hidden_state, inputs):
            del output  # with all that it keeps for backward
            return self._run(**inputs)
        return output

    @torch.no_grad()
    def _agrees(self, hidden: torch.Tensor, inputs: dict[str, Any]) -> bool:
        """Compare the first output of compiled layers that is finite, hidden [B, T, D], with that of layers as written.

        Both draw the same dropout, by seeds. If they differ by more than bf16 rounding, layers run as written from now on.
        """
        plain = {name: value for name, value in inputs.items() if name != "dropout_seeds"}  # which the layers have
        expected = self._forward(**plain).last_hidden_state.float()  # [B, T, D]
        difference = float((hidden.float() - expected).norm() / expected.norm())  # sync
        self._unchecked = not expected.isfinite().all()  # the next one will tell
        if difference <= TOLERANCE or self._unchecked:
            return True
        self._say(
            f"Warning: compiled layers differ from layers as written by {100 * difference:.3g} % in their output. From now on "
            "layers run as written, which is slower. Please report this with the model's config.json."
        )
        self.graphs = None
        self.layers = training_layers(self.decoder, dataclasses.replace(self._train_config, compile="none"), "eager")
        return False

    def _run(self, dropout_seeds: torch.Tensor | None = None, **inputs: Any) -> Any:
        if self.adapted:
            lora_linear.copy_adapters(self.adapted, dropout_seeds)
        with self._training_layers():
            output = self._forward(**inputs)
        if not torch.is_grad_enabled():
            lora_linear.drop_copies(self.adapted)  # else backward does
        return output

    @contextlib.contextmanager
    def _training_layers(self) -> Iterator[None]:
        """A block in which training layers replace the decoder's layers."""
        plain = [parent._modules[name] for parent, name, _ in self.layers]
        try:
            for parent, name, layer in self.layers:
                parent._modules[name] = layer
            yield
        finally:
            for (parent, name, _), original in zip(self.layers, plain, strict=True):
                parent._modules[name] = original

    def release(self, optimizer: torch.optim.Optimizer) -> None:
        """Free what only training needs: CUDA graphs, gradients and optimizer state. Weights stay."""
        self.graphs = None
        lora_linear.drop_copies(self.adapted)  # they lie in the graphs' memory
        optimizer.zero_grad(set_to_none=True)
        optimizer.state.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
