"""transformers loads a base of which each rank keeps a part: its NF4 quantizer, with a step behind it that cuts the bytes.

Each linear layer is quantized whole on the GPU, as double quantization subtracts a mean over the whole tensor, and only this
rank's part of its bytes stays. All else is as transformers loads it: names, dtypes, buffers, tied weights.
"""

from typing import Any

from qlora.errors import ConfigError
from qlora.model.families import outermost_layers
from qlora.model.shards import ALIGNMENT, Shard, ShardedBase
from qlora.model.third_party import bitsandbytes, transformers

from transformers.integrations.bitsandbytes import Bnb4bitDeserialize, Bnb4bitQuantize  # isort: skip  after bitsandbytes
from transformers.quantizers import register_quantization_config, register_quantizer  # isort: skip
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer  # isort: skip
from transformers.quantizers.quantizers_utils import get_module_from_name  # isort: skip

METHOD = "nf4_sharded"


@register_quantization_config(METHOD)
class ShardedNF4Config(transformers.BitsAndBytesConfig):
    """BitsAndBytesConfig, for the quantizer below."""

    def post_init(self) -> None:
        """Name the quantizer. A checkpoint's own settings come without load_in_4bit, which would name transformers'."""
        super().post_init()  # type: ignore[no-untyped-call]
        self.load_in_4bit = True
        self.quant_method = METHOD  # type: ignore[assignment]


def as_sharded(config: Any) -> Any:
    """The configuration of a checkpoint in NF4, so that this file's quantizer loads it; any other as it is."""
    for each in (config, config.get_text_config()):
        stored = getattr(each, "quantization_config", None)
        values: Any = stored if stored is None or isinstance(stored, dict) else stored.to_dict()
        if values is not None and values.get("quant_method") != METHOD:
            kept = {name: value for name, value in values.items() if "load_in" not in name}
            each.quantization_config = {**kept, "quant_method": METHOD}
    return config


@register_quantizer(METHOD)
class ShardedQuantizer(Bnb4BitHfQuantizer):
    """transformers' quantizer of bitsandbytes, which gives each decoder layer a shard."""

    def __deepcopy__(self, _: Any) -> "ShardedQuantizer":
        """Itself: transformers copies its loading operations, which hold this, for each tensor."""
        return self

    def _process_model_before_weight_loading(self, model: Any, device_map: Any, **_: Any) -> None:  # type: ignore[override]
        super()._process_model_before_weight_loading(model, device_map=device_map)
        self.layers = [layer for _, _, layer in outermost_layers(model)]
        self.places: dict[int, tuple[int, int]] = {}  # of a linear layer: its decoder layer, and where its bytes begin there
        sizes = []
        for number, layer in enumerate(self.layers):
            end = 0
            for linear in (each for each in layer.modules() if isinstance(each, bitsandbytes.nn.Linear4bit)):
                if id(linear) in self.places:
                    raise ConfigError("--shard-base cannot be used: decoder layers of this model share linear layers.")
                self.places[id(linear)] = number, end
                end += -(-_packed_bytes(linear) // ALIGNMENT) * ALIGNMENT
            sizes.append(end)
        (device,) = device_map.values()
        self.base = ShardedBase(sizes, device)

    def param_element_size(self, model: Any, param_name: str, param: Any) -> float:
        """Of transformers, which reserves so many bytes per element at once; none for what is cut, as its part has room."""
        cut = id(get_module_from_name(model, param_name)[0]) in self.places
        return 0.0 if cut else float(super().param_element_size(model, param_name, param))

    def keep_part(self, linear: Any, weight: Any) -> Any:
        """`weight`, a Params4bit, as a view of where its layer is gathered, once its part is kept."""
        if id(linear) in self.places:  # not those outside of the decoder layers
            number, begin = self.places[id(linear)]
            end = begin + _packed_bytes(linear)
            first, last = self.base.share(number, begin, end)
            if last > first:
                self.base.keep(number, begin + first, weight.data.flatten()[first:last])
            weight.data = self.base.view(number, begin, end)  # [N * K / 2, 1]
        return weight

    def get_quantize_ops(self) -> Any:
        """Of transformers: quantizes a weight in bf16."""
        return _Quantize(self)  # type: ignore[no-untyped-call]

    def get_load_operations(self) -> dict[str, type]:
        """Of transformers: reads a weight that is in NF4 already."""
        return {"deserialize": _Deserialize}

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for number, layer in enumerate(self.layers):
            layer.shard = Shard(self.base, number)
            # In evaluation; a training step calls the layer's class.
            layer.register_forward_pre_hook(lambda module, _: module.shard.before_forward())
        return super()._process_model_after_weight_loading(model)


class _Quantize(Bnb4bitQuantize):
    def convert(  # type: ignore[override]
        self, input_dict: Any, full_layer_name: Any = None, model: Any = None, **_: Any
    ) -> dict[str, Any]:
        found = super().convert(input_dict, full_layer_name=full_layer_name, model=model)
        return {name: self.hf_quantizer.keep_part(get_module_from_name(model, name)[0], each) for name, each in found.items()}


class _Deserialize(Bnb4bitDeserialize):
    def convert(  # type: ignore[override]
        self, input_dict: Any, model: Any = None, full_layer_name: Any = None, **_: Any
    ) -> dict[str, Any]:
        whole = len(input_dict) > 1  # a weight with its scales, not a bias
        found: dict[str, Any] = super().convert(input_dict, model=model, full_layer_name=full_layer_name)
        if not whole:
            return found
        linear = get_module_from_name(model, full_layer_name)[0]
        return {name: self.hf_quantizer.keep_part(linear, each) for name, each in found.items()}


def _packed_bytes(linear: Any) -> int:
    """Two values in a byte."""
    return int(linear.in_features * linear.out_features // 2)
