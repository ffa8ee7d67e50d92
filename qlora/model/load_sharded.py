"""Load a base that no GPU holds: one linear layer at a time is quantized, and each rank keeps its part of the bytes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import huggingface_hub
import torch
from accelerate.utils import set_module_tensor_to_device
from safetensors import safe_open
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora.config import TrainConfig
from qlora.errors import EnvironmentProblem
from qlora.model.coverage import nf4_layers
from qlora.model.load import environment_errors, load_meta_model, prepare_nf4, quantization_of
from qlora.model.shards import ALIGNMENT, Shard, ShardedBase
from qlora.model.third_party import bitsandbytes, transformers


class _Weights:
    """The tensors of a model folder, read by name, straight to a device."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        index = folder / "model.safetensors.index.json"
        files = sorted(set(json.loads(index.read_bytes())["weight_map"].values())) if index.exists() else ["model.safetensors"]
        opened: list[Any] = [safe_open(folder / name, framework="pt", device=str(device)) for name in files]
        self._file_of = {name: file for file in opened for name in file.keys()}  # noqa: SIM118  not a dict

    @property
    def names(self) -> set[str]:
        """Of all tensors."""
        return set(self._file_of)

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor."""
        tensor: torch.Tensor = self._file_of[name].get_tensor(name)
        return tensor

    def rows(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Some rows of a tensor; no others are read."""
        rows: torch.Tensor = self._file_of[name].get_slice(name)[begin:end]
        return rows

    def of(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors whose names begin so, under the rest of their names."""
        return {name.removeprefix(prefix): self.tensor(name) for name in self._file_of if name.startswith(prefix)}


def load_sharded_model(source: str, config: TrainConfig, attn_implementation: str, device: torch.device) -> Any:
    """The base model as load_nf4_model loads it, but that each rank keeps a part of every decoder layer's bytes.

    From a checkpoint in bf16 each rank quantizes all of it, one linear layer at a time, as double quantization subtracts a mean
    over the whole tensor. From one in NF4 a rank reads its own bytes only.

    Args:
        source: folder or hub id.
        config: revision and trust_remote_code are read.
        attn_implementation: a name from attention.choose_attention.
        device: of this rank.

    Raises:
        EnvironmentProblem: if the weights are not there, or have other names than the model's.
    """
    meta_model = load_meta_model(source, config)
    with environment_errors(source):
        folder = Path(source)
        if not folder.is_dir():
            patterns = ["*.json", "*.safetensors"]
            folder = Path(huggingface_hub.snapshot_download(source, revision=config.revision, allow_patterns=patterns))
        weights = _Weights(folder, device)
        with accelerate.init_empty_weights(include_buffers=False):  # buffers, such as those of rotations, are computed
            model = transformers.AutoModelForCausalLM.from_config(
                meta_model.config,
                trust_remote_code=config.trust_remote_code,
                dtype=torch.bfloat16,
                attn_implementation=attn_implementation,
            )
        _require_names(source, model, weights)
        linear = list(nf4_layers(meta_model))
        for name in linear:
            _replace(model, name)
        layers = list(_decoder_layers(model))
        inside = [[each for each in linear if each.startswith(f"{name}.")] for name, _ in layers]
        ends = [_ends(model, names) for names in inside]  # of each linear layer's bytes, in its decoder layer
        base = ShardedBase([each[-1] for each in ends], device)
        for index, (name, layer) in enumerate(layers):
            for each, begin in zip(inside[index], ends[index], strict=False):
                _load_part(model.get_submodule(each), f"{each}.weight", weights, base, (index, begin))
            layer.shard = Shard(base, index)
            # In evaluation; a training step calls the layer's class.
            layer.register_forward_pre_hook(lambda module, _: module.shard.before_forward())
            for rest, _ in list(layer.named_parameters(prefix=name)):
                if rest.removesuffix(".weight") not in inside[index]:
                    set_module_tensor_to_device(model, rest, device, weights.tensor(rest), torch.bfloat16)
        for name, parameter in list(model.named_parameters()):
            if parameter.device.type == "meta" and name in weights.names:
                set_module_tensor_to_device(model, name, device, weights.tensor(name), torch.bfloat16)
        for name, buffer in list(model.named_buffers()):
            set_module_tensor_to_device(model, name, device, buffer)
        model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name in linear:
        prepare_nf4(model.get_submodule(name), source)
    model.is_loaded_in_4bit, model.is_quantized = True, True  # read by PEFT
    model.config.quantization_config = quantization_of("nf4")
    return model.eval()


def _require_names(source: str, model: Any, weights: _Weights) -> None:
    """Refuse a checkpoint whose tensors have other names than the model's, which transformers would rename or join."""
    tied = set(model._tied_weights_keys or {}) if model.config.get_text_config().tie_word_embeddings else set()
    wanted = {name for name, _ in model.named_parameters()} - tied
    if missing := sorted(wanted - weights.names):
        raise EnvironmentProblem(
            f"Model {source} lacks {len(missing)} tensors, {missing[0]} first. --shard-base finds them by their names only.",
            hint="Load the model with transformers and save it with save_pretrained, or leave out --shard-base.",
        )


def _replace(model: Any, name: str) -> None:
    """Put a bitsandbytes layer without weights where a linear layer without weights is."""
    parent, _, child = name.rpartition(".")
    old = model.get_submodule(name)
    with torch.device("meta"):
        new = bitsandbytes.nn.Linear4bit(
            old.in_features, old.out_features, old.bias is not None, torch.bfloat16, compress_statistics=True, quant_type="nf4"
        )
    setattr(model.get_submodule(parent), child, new)


def _decoder_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Name and module of each decoder layer."""
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer):
            yield name, module


def _ends(model: Any, names: list[str]) -> list[int]:
    """0, and where the packed bytes of each linear layer end, aligned."""
    ends = [0]
    for name in names:
        layer = model.get_submodule(name)
        packed = layer.in_features * layer.out_features // 2
        ends.append(ends[-1] + -(-packed // ALIGNMENT) * ALIGNMENT)
    return ends


def _load_part(layer: Any, name: str, weights: _Weights, base: ShardedBase, place: tuple[int, int]) -> None:
    """Give a linear layer its scales, and the part of its bytes that this rank keeps; `place` is (decoder layer, begin)."""
    index, begin = place
    packed_bytes = layer.in_features * layer.out_features // 2
    first, last = base.share(index, begin, begin + packed_bytes)
    weight: Any
    if stored := weights.of(f"{name}."):  # in NF4 already
        part = weights.rows(name, first, last)  # [bytes, 1]
        weight = bitsandbytes.nn.Params4bit.from_prequantized(part, stored, device=part.device, module=layer)
    else:
        dense = weights.tensor(name).to(torch.bfloat16)  # [N, K]
        unpacked: Any = bitsandbytes.nn.Params4bit(dense, requires_grad=False, **layer.weight.__dict__)
        weight = unpacked.to(dense.device)  # which quantizes
        part = weight.data[first:last]  # [bytes, 1]
    if last > first:
        base.keep(index, begin + first, part.flatten())
    weight.data = base.view(index, begin, begin + packed_bytes)  # [N * K / 2, 1]
    layer.weight = weight
