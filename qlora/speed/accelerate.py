"""The decoder as it runs in training: fast, in little memory, and with the same numbers but for rounding."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from qlora.config import TrainConfig
from qlora.speed import lora_linear
from qlora.speed.graphs import Graphs
from qlora.speed.layers import training_layers


def accelerate(model: Any, config: TrainConfig, backend: str = "inductor") -> "AcceleratedDecoder":
    """The callable that training steps run instead of `model.get_decoder()`. Evaluation and generation use the model itself.

    The model's `forward` methods stay as they are. Its adapted layers become LoRALinear, a subclass of PEFT's with the same
    weights and names, which behaves as PEFT's does except in training.

    Args:
        model: NF4 base with adapters.
        config: resolved; gradient_checkpointing, compile, lora_dropout and cache_dequantized are read.
        backend: of torch.compile; a test may pass one that needs no C compiler.
    """
    cache = torch.bfloat16 if config.cache_dequantized else None
    adapted = lora_linear.install(model, cache)
    return AcceleratedDecoder(model.get_decoder(), adapted, config, backend)


class AcceleratedDecoder:
    """What runs when `decoder(input_ids=...)` is called, from the outside in.

        AcceleratedDecoder.__call__   ids [B, T] -> last hidden states [B, T, D]
          Graphs.__call__             with --compile graphs: what follows, replayed as one launch
            copy_adapters             all A and B in bf16, and a dropout seed for each layer
            type(decoder).forward     transformers' own code, over training layers in the place of its layers
              TrainingLayer.forward   one layer, compiled, its activations kept or recomputed (layers.py)
                LoRALinear.forward    one linear layer: NF4 base and adapter as one operator (lora_linear.py)

    Attributes:
        config: of the model.
        graphs: the recordings; None where nothing is recorded.
    """

    def __init__(
        self, decoder: Any, adapted: list[lora_linear.LoRALinear], config: TrainConfig, backend: str = "inductor"
    ) -> None:
        """Compile nothing yet: the first call does.

        Args:
            decoder: of the model.
            adapted: its adapted layers.
            config: resolved.
            backend: of torch.compile.
        """
        self.decoder, self.config, self.adapted = decoder, decoder.config, adapted
        self.seeded = config.compile != "none" and config.lora_dropout > 0
        self.layers = training_layers(decoder, config, backend)
        self.graphs = Graphs(self._run, decoder) if config.compile == "graphs" else None

    def __call__(self, **inputs: Any) -> Any:
        """The decoder's output, with `last_hidden_state` [B, T, D]; in eval mode, or without gradients, as the plain decoder.

        Args:
            inputs: as the decoder takes them; see attention.decoder_inputs.
        """
        if not (self.decoder.training and torch.is_grad_enabled()):
            return self.decoder(**inputs)
        return self._run(**inputs) if self.graphs is None else self.graphs(**inputs)

    def _run(self, **inputs: Any) -> Any:
        if self.adapted:
            lora_linear.copy_adapters(self.adapted, self.seeded)
        with self._training_layers():
            return type(self.decoder).forward(self.decoder, **inputs)

    @contextlib.contextmanager
    def _training_layers(self) -> Iterator[None]:
        """A block in which training layers stand in the place of the decoder's layers."""
        for parent, name, layer in self.layers:
            parent._modules[name] = layer
        try:
            yield
        finally:
            for parent, name, layer in self.layers:
                parent._modules[name] = layer.layer

    def release(self, optimizer: torch.optim.Optimizer) -> None:
        """Free what only training needs: CUDA graphs, gradients and optimizer state. Weights stay."""
        self.graphs = None
        for layer in self.adapted:
            layer.copies = layer.seed = None  # in the graphs' memory
        optimizer.zero_grad(set_to_none=True)
        optimizer.state.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
