"""Which weights quantization and adapters cover, and which they do not: routers and fused experts, other linear classes."""

import re
from collections import Counter
from typing import Any, NamedTuple

import torch

from qlora.model.supported import quantization_values
from qlora.model.third_party import bitsandbytes, transformers

# A part of a module's name by which it decides which experts see a token: router, router_mlp, gate, shared_expert_gate.
ROUTER = re.compile(r"(^|\.)(\w*router\w*|gate|\w*expert_gate)(\.|$)")
UNCOVERED_LIMIT = 0.1  # dense families are below 0.08, mixtures of experts above 0.5
LISTED = 5  # module names in a message


def quantized_layers(model: Any) -> dict[str, torch.nn.Linear]:
    """Name -> linear layer that is quantized, or that would be once the model is loaded.

    Before loading it asks transformers' own rule: torch.nn.Linear and Conv1D only, so neither a subclass of the former, such as
    Falcon's, nor experts that are fused into one parameter; and neither the head nor what is tied to it.
    """
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        classes = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
        return {name: module for name, module in model.named_modules() if isinstance(module, classes)}
    from transformers.quantizers.base import HfQuantizer  # here: third_party must be the first to import bitsandbytes
    from transformers.quantizers.quantizers_utils import should_convert_module

    skip = (quantization_values(model.config) or {}).get("llm_int8_skip_modules")  # of a checkpoint that is quantized already
    left_out = HfQuantizer.get_modules_to_not_convert(model, skip, model._keep_in_fp32_modules)
    kinds = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    plain = ((name, module) for name, module in model.named_modules() if type(module) in kinds)
    return {name: module for name, module in plain if should_convert_module(name, left_out)}


def linear_layers(model: Any) -> dict[str, torch.nn.Linear]:
    """Name -> linear layer of the decoder that can get an adapter: in NF4, and no router of experts.

    Nor the head, whose frozen weight the loss reads, nor layers of a vision tower, nor a Conv1D, whose weight is transposed.
    """
    inside = {id(module) for module in model.get_decoder().modules()} - {id(model.get_output_embeddings())}
    layers = quantized_layers(model).items()
    conv1d = transformers.pytorch_utils.Conv1D
    return {n: m for n, m in layers if id(m) in inside and not ROUTER.search(n) and not isinstance(m, conv1d)}


class Uncovered(NamedTuple):
    """The weights that are neither in NF4 nor adapted, embeddings, head, norms and biases aside."""

    parameters: int
    share: float  # of all weights but embeddings, head, norms and biases
    modules: tuple[str, ...]  # that hold them, the largest first; N stands for the number of a layer

    def __str__(self) -> str:
        """For messages."""
        names = ", ".join(self.modules[:LISTED]) + (", ..." if len(self.modules) > LISTED else "")
        return (
            f"{100 * self.share:.1f} % of the weights ({self.parameters:,} parameters), embeddings, head and norms aside, "
            f"are neither in NF4 nor adapted: {names}"
        )


def uncovered(model: Any) -> Uncovered:
    """What of a model QLoRA does not cover, such as the fused experts of a mixture of experts, which stay in bf16.

    Args:
        model: the base model or the meta model, without adapters.
    """
    ends = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    ends += [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    aside = {id(parameter) for end in ends for parameter in end.parameters()}
    covered = {id(layer.weight) for layer in quantized_layers(model).values()}
    weights = [(n, p) for n, p in model.named_parameters() if p.dim() > 1 and id(p) not in aside]  # 1-D: norms, biases
    sizes: Counter[str] = Counter()
    for name, parameter in weights:
        if id(parameter) not in covered:
            sizes[re.sub(r"\.\d+\.", ".N.", name.rpartition(".")[0])] += parameter.numel()
    total = sum(parameter.numel() for _, parameter in weights)
    return Uncovered(sizes.total(), sizes.total() / max(total, 1), tuple(name for name, _ in sizes.most_common()))


def linear_classes(model: Any) -> list[str]:
    """Names of the classes that are linear layers, but not torch's own."""
    linear = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    return sorted({type(m).__name__ for m in model.modules() if isinstance(m, linear) and type(m) is not torch.nn.Linear})
