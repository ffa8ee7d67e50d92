"""Models, data and steps that several claims measure with."""

from pathlib import Path
from typing import Any

import torch

import train_loop
from benchmarks import harness
from benchmarks.guide_claims.finding import RANK
from qlora.config import BUNDLED_TRAIN, TrainConfig
from qlora.data.formats import read_examples
from qlora.data.template import PromptTemplate, TokenizedExample, encode, load_template
from qlora.model.demo import model_source
from qlora.model.load import load_meta_model, load_tokenizer
from qlora.model.third_party import bitsandbytes, peft, transformers


def phi3_mini() -> Any:
    """Phi-3-mini's shape, without weights."""
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(transformers.Phi3Config(), dtype=torch.bfloat16)


def adapted(model: Any, targets: list[str] | str) -> Any:
    """The model with the guide's LoRA on layers of these names."""
    return peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=64, target_modules=targets, task_type="CAUSAL_LM"))


def base_model(model: str, kind: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A model in bf16, int8, nf4 or fp4, or in nf4_dq, with double quantization. `dtype` is that of what is not quantized."""
    four_bit = {"bnb_4bit_quant_type": kind[:3], "bnb_4bit_use_double_quant": kind == "nf4_dq"}
    options: Any = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True, **four_bit}
    quantization = transformers.BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.bfloat16, **options)
    options = {} if kind == "bf16" else {"quantization_config": quantization, "device_map": {"": "cpu"}}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model_source(model), dtype=dtype, **options).eval()
    for module in loaded.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False  # its other kernel rounds differently
    return loaded


def template_of(model: str) -> PromptTemplate:
    """The plain format with the model's own tokenizer."""
    folder = model_source(model)
    return load_template(load_tokenizer(folder, load_meta_model(folder, TrainConfig()), TrainConfig()), "plain")


def encoded(template: PromptTemplate, path: Path = BUNDLED_TRAIN, loss_on: str = "response") -> list[TokenizedExample]:
    """The bundled examples."""
    return [encode(example, template, loss_on) for example in read_examples(path, "train")]


def built(model: str, **flags: Any) -> train_loop.Trainee:
    """The model with adapters, and what trains it, as train_loop.py makes them."""
    _, trainee = harness.build(TrainConfig(model=model_source(model), **flags))
    trainee.model.train()
    return trainee
