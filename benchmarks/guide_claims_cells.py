"""Claims that shapes, formats and libraries decide: what guide_claims.py measures without the demo's weights.

Phi-3-mini stands here as its exact shape on the meta device. MB and GB are 1e6 and 1e9 bytes.
Shapes: D hidden size, r rank, N x K a weight of N outputs and K inputs.
"""

import functools
import math
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

import train_loop
from benchmarks import report
from qlora.config import BUNDLED_TRAIN, TrainConfig
from qlora.data.batch import collate
from qlora.data.formats import read_examples
from qlora.data.template import IGNORED, encode, load_template
from qlora.model.coverage import linear_layers
from qlora.model.demo import tiny_random_model
from qlora.model.load import load_meta_model, load_tokenizer
from qlora.model.lora import audit_targets
from qlora.model.loss import CHUNK_TOKENS
from qlora.model.third_party import bitsandbytes, peft, transformers
from qlora.speed.memory import estimated_memory_gb

Figures = dict[str, Any]
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # the guide's targets
RANK, BATCH, LENGTH = 32, 2, 2048  # the guide's
PEERS, SHAPE = "peers_h100_*.json", "2x2048x2"  # rows x tokens x micro-batches of a step there
TOTAL_GB, FULL_GB = 2.0, 60.8  # what it says QLoRA and full fine-tuning take


class Source(NamedTuple):
    """What rows are measured on: a model, as --model names it, and the runs of guide_claims_training.py."""

    model: str
    trainings: list[dict[str, Any]]


def phi3_mini(**changes: Any) -> Any:
    """Phi-3-mini's shape, without weights."""
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(transformers.Phi3Config(**changes), dtype=torch.bfloat16)


def linear_parameters(model: Any) -> int:
    """Weights of the layers that are quantized."""
    return sum(layer.weight.numel() for layer in linear_layers(model).values())


# -- adapters ----------------------------------------------------------------------------------------------------------


def adapted(model: Any, targets: list[str]) -> Any:
    """The model with LoRA of rank 32 on these names."""
    return peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=64, target_modules=targets, task_type="CAUSAL_LM"))


def targets(source: Source) -> Figures:
    """What PEFT adapts when it gets the guide's seven names, and what it says to that."""
    own = sorted({name.rsplit(".", 1)[-1] for name in linear_layers(phi3_mini())})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        guide = adapted(phi3_mini(), SEVEN)
        about_targets = [warning for warning in said if "target" in str(warning.message)]
    found: Figures = {"own": own, "matched": sorted(set(SEVEN) & set(own)), "warnings": len(about_targets)}
    for label, model in (("guide", guide), ("right", adapted(phi3_mini(), own))):
        adapters = {name: parameter.numel() for name, parameter in model.named_parameters() if "lora_" in name}
        found[label] = {"layers": len(adapters) // 2, "parameters": sum(adapters.values())}
    return {**found, "share": found["guide"]["parameters"] / found["right"]["parameters"]}


def other_models(source: Source) -> Figures:
    """How many of the seven names match a layer of the models that the guide recommends, and of Phi-3."""
    configs = {"Llama": transformers.LlamaConfig, "Mistral": transformers.MistralConfig, "Gemma": transformers.GemmaConfig,
               "Phi-3": transformers.Phi3Config}  # fmt: skip
    matched = {}
    for family, config in configs.items():
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config(num_hidden_layers=1), dtype=torch.bfloat16)
        names = {name.rsplit(".", 1)[-1] for name in linear_layers(model)}
        matched[family] = len(names & set(SEVEN))
    return {"matched": matched, "of": len(SEVEN)}


def adapter_bytes(source: Source) -> Figures:
    """The file of an fp32 adapter on all linear layers, written and weighed, and what training keeps beside it."""
    model = adapted(phi3_mini(), audit_names(phi3_mini()))
    tensors = {name: torch.zeros(p.shape) for name, p in model.named_parameters() if "lora_" in name}
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder) / "adapter_model.safetensors")
        file_bytes = (Path(folder) / "adapter_model.safetensors").stat().st_size
    parameters = [torch.nn.Parameter(tensor) for tensor in tensors.values()]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    adamw = torch.optim.AdamW(parameters)
    adamw.step()
    moments = [value for state in adamw.state.values() for value in state.values() if value.dim()]
    training = sum(tensor.nbytes for tensor in (*parameters, *(p.grad for p in parameters if p.grad is not None), *moments))
    return {"file_mb": file_bytes / 1e6, "parameters": sum(p.numel() for p in parameters), "training_mb": training / 1e6}


def adapter_formula(source: Source) -> Figures:
    """The guide's formula for the bytes of its adapters, and r (in + out) of each layer of Phi-3-mini, in MB."""
    real = sum(target.adapter_parameters for target in audit_targets(phi3_mini(), TrainConfig()))
    return {"guide_mb": 7 * 2 * RANK * 4096 * 4 / 1e6, "real_mb": 4 * real / 1e6}


def audit_names(model: Any) -> list[str]:
    """The names of all linear layers, as train_loop derives them."""
    return [target.name for target in audit_targets(model, TrainConfig())]


def parameters_of_a_rank(source: Source) -> Figures:
    """r (in + out) of each module of a layer against the formula 2 r D."""
    shapes = {target.name: target.shapes[0] for target in audit_targets(phi3_mini(), TrainConfig())}
    real = {name: RANK * (rows + columns) for name, (rows, columns) in shapes.items()}
    formula = 2 * RANK * phi3_mini().config.hidden_size
    return {"formula": formula, "real": real, "equal": [name for name, count in real.items() if count == formula]}


def model_size(source: Source) -> Figures:
    """Parameters of Phi-3-mini, counted."""
    parameters = phi3_mini().num_parameters()
    return {"parameters": parameters, "fp32_gb": 4 * parameters / 1e9}


def initialization(source: Source) -> Figures:
    """A and B as PEFT makes them: a uniform distribution has kurtosis 1.8, a Gaussian one 3."""
    torch.manual_seed(0)
    inputs = 3072
    layer = torch.nn.Sequential(torch.nn.Linear(inputs, inputs, bias=False))
    model = peft.get_peft_model(layer, peft.LoraConfig(r=RANK, target_modules=["0"]))
    weights = dict(model.named_parameters())
    a, b = (next(p.detach() for name, p in weights.items() if side in name) for side in ("lora_A", "lora_B"))
    kurtosis = (a - a.mean()).pow(4).mean() / a.var(correction=0).square()
    return {"largest_times_root_in": a.abs().max().item() * math.sqrt(inputs), "kurtosis": kurtosis.item(),
            "b_largest": b.abs().max().item()}  # fmt: skip


def scale_and_dropout(source: Source) -> Figures:
    """What stands before B A x, and where dropout acts: its input x, so that with rank 1 no output is zero."""
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False))
    config = peft.LoraConfig(r=1, lora_alpha=2, lora_dropout=0.1, target_modules=["0"])
    model = peft.get_peft_model(layer, config)
    linear: Any = model.base_model.model[0]
    x = torch.ones(4000, 64)  # [rows, in]
    with torch.no_grad():
        linear.lora_A["default"].weight.fill_(1.0)
        linear.lora_B["default"].weight.fill_(1.0)
        update = model.eval()(x) - linear.base_layer(x)  # [rows, out]; B A x = 64
        dropped = (model.train()(x) - linear.base_layer(x))[:, 0]  # [rows]
        kept = linear.lora_dropout["default"](x)  # [rows, in]
    return {
        "scale": (update / 64).mean().item(),
        "alpha_over_r": 2.0,
        "zero_outputs": (dropped.abs() < 1e-3).float().mean().item(),
        "zero_inputs": (kept == 0).float().mean().item(),
        "kept_value": kept.max().item(),
    }


# -- NF4 ---------------------------------------------------------------------------------------------------------------


def quantized_bytes(rows: int, columns: int, double: bool) -> tuple[int, int]:
    """Bytes of a quantized random weight that grow with it, values and scales."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))  # [N, K]
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
    scales = [state.absmax, state.state2.absmax] if double else [state.absmax]
    return packed.nbytes, sum(tensor.nbytes for tensor in scales)


def bits(source: Source) -> Figures:
    """Bits of a parameter in NF4 without and with double quantization, of a 4096 x 4096 layer."""
    count = 4096 * 4096
    single, double = (8 * sum(quantized_bytes(4096, 4096, double)) / count for double in (False, True))
    return {"single": single, "double": double, "saved": single - double, "fp32_ratio": 32 / double}


def layer_4096(source: Source) -> Figures:
    """A 4096 x 4096 layer with rank 32, fp32 against NF4 with an fp32 adapter, without and with its training state."""
    full = 4 * 4096 * 4096
    base, adapter = sum(quantized_bytes(4096, 4096, True)), 4 * 2 * 4096 * RANK
    formula = (4096 * 4096 * 4 + 2 * 4096 * RANK * 32) / (4096 * 4096 * 32)
    return {"stored": 1 - (base + adapter) / full, "training": 1 - (base + 4 * adapter) / full, "own_formula": 1 - formula}


@functools.cache
def _quantized_phi3() -> Figures:
    """Phi-3-mini in memory: each of its linear shapes quantized and weighed, the rest in 16 bits."""
    model = phi3_mini()
    layers = linear_layers(model).values()
    size = {(layer.out_features, layer.in_features): 0 for layer in layers}
    size = {shape: sum(quantized_bytes(*shape, True)) for shape in size}
    linear = sum(size[layer.out_features, layer.in_features] for layer in layers)
    rest = 2 * (model.num_parameters() - linear_parameters(model))
    total, parameters = linear + rest, model.num_parameters()
    return {
        "linear_gb": linear / 1e9,
        "rest_gb": rest / 1e9,
        "total_gb": total / 1e9,
        "below_bf16": 1 - total / (2 * parameters),
        "below_fp32": 1 - total / (4 * parameters),
        "fp32_ratio": 4 * parameters / total,
    }


def quantized_model(source: Source) -> Figures:
    """Phi-3-mini in memory, weighed."""
    return dict(_quantized_phi3())


def levels(source: Source) -> Figures:
    """The 16 levels, and which of the six that the guide prints are among them."""
    code = [round(level, 4) for level in bitsandbytes.functional.get_4bit_type("nf4", device="cpu").tolist()]
    printed = (-1.0, -0.6961, -0.5250, 0.5250, 0.6961, 1.0)
    missing = [level for level in printed if min(abs(level - real) for real in code) > 2e-4]
    return {"levels": code, "below_zero": sum(level < 0 for level in code), "above_zero": sum(level > 0 for level in code),
            "missing": missing}  # fmt: skip


def blocks(source: Source) -> Figures:
    """What is stored of a weight: indices of levels, two to a byte, and a scale for each block."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))  # [N, K]
    weight[0] *= 100.0
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4")
    back = bitsandbytes.functional.dequantize_4bit(packed, state).view(-1, state.blocksize)  # [blocks, 64]
    largest = weight.view(-1, state.blocksize).abs().amax(1, keepdim=True)  # [blocks, 1]
    distance = (back / largest)[..., None] - state.code  # [blocks, 64, 16]
    indices = torch.cat([packed >> 4, packed & 15]).unique()  # [16]
    return {
        "block": state.blocksize,
        "elements": weight.numel(),
        "off_level": distance.abs().amin(-1).max().item(),
        "indices": len(indices),
        "stored_as": str(packed.dtype).removeprefix("torch."),
        "values_a_byte": weight.numel() / packed.nbytes,
    }


def clusters(source: Source) -> Figures:
    """Weights of 16 distinct values, which clustering would keep exactly, and normal ones, in NF4: relative errors."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(256, 256, generator=generator)  # [N, K]
    values = torch.randn(16, generator=generator)  # [16]
    clustered = values[torch.randint(16, (256, 256), generator=generator)]  # [N, K]
    errors = {}
    codes = []
    for name, weight in (("normal", normal), ("clustered", clustered)):
        packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4")
        errors[name] = relative_rms(bitsandbytes.functional.dequantize_4bit(packed, state), weight)
        codes.append(state.code)
    return {"error": errors, "same_levels": torch.equal(*codes)}


def relative_rms(approximation: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over norm, of tensors of one shape."""
    return float((approximation.float() - exact.float()).norm() / exact.float().norm())


def uniform_levels(weight: torch.Tensor, block: int = 64) -> torch.Tensor:
    """[N, K] rounded to 16 equally spaced levels in each block, from minus to plus its largest absolute value."""
    rows = weight.float().reshape(-1, block)  # [blocks, 64]
    largest = rows.abs().amax(1, keepdim=True).clamp_min(1e-12)  # [blocks, 1]
    index = ((rows / largest + 1) * 7.5).round()  # [blocks, 64], 0 to 15
    return ((index / 7.5 - 1) * largest).view_as(weight)


def signed_levels(weight: torch.Tensor, block: int = 64) -> torch.Tensor:
    """[N, K] rounded to 16 equally spaced levels in each block, -8 to 7 times a scale that puts the largest at -8 (Q4_0)."""
    rows = weight.float().reshape(-1, block)  # [blocks, 64]
    scale = rows.gather(1, rows.abs().argmax(1, keepdim=True)) / -8  # [blocks, 1]
    return ((rows / scale).round().clamp(-8, 7) * scale).view_as(weight)


def four_bit_formats(source: Source) -> Figures:
    """Relative error of normal weights in NF4, FP4 and 16 equally spaced levels, two ways, each with a scale for 64."""
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))  # [N, K]
    errors = {"uniform": relative_rms(uniform_levels(weight), weight)}
    errors["uniform, -8 to 7"] = relative_rms(signed_levels(weight), weight)
    for kind in ("nf4", "fp4"):
        packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type=kind)
        errors[kind] = relative_rms(bitsandbytes.functional.dequantize_4bit(packed, state), weight)
    return {"error": errors}


def float_formats(source: Source) -> Figures:
    """Bits and range of bf16 and fp16."""
    bf16, fp16 = torch.finfo(torch.bfloat16), torch.finfo(torch.float16)
    mantissa = round(-math.log2(bf16.eps))
    return {"mantissa": mantissa, "exponent": bf16.bits - 1 - mantissa, "bf16_largest": bf16.max, "fp16_largest": fp16.max,
            "fp16_eps_ratio": bf16.eps / fp16.eps}  # fmt: skip


# -- schedule, steps, batches ------------------------------------------------------------------------------------------


def cosine_rates(warmup: int, total: int) -> list[float]:
    """transformers' warmup and cosine, as shares of the peak."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, warmup, total)
    return [schedule.lr_lambdas[0](step) for step in range(total)]


def schedule_formula(source: Source) -> Figures:
    """The guide's cosine, which forgets the warmup, against transformers'."""
    warmup, total = 12, 120
    real = cosine_rates(warmup, total)
    guide = [step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * step / total)) for step in range(total)]
    return {"peak": {"guide": guide[warmup], "real": real[warmup]}, "at_60": {"guide": guide[60], "real": real[60]},
            "largest_difference": max(abs(a - b) for a, b in zip(guide, real, strict=True))}  # fmt: skip


def first_rate(source: Source) -> Figures:
    """transformers' rates in warmup against t / warmup, and what its first update moves; the share of the first rate here."""
    warmup = 12
    weight = torch.nn.Parameter(torch.ones(4))
    weight.grad = torch.ones(4)
    adamw = torch.optim.AdamW([weight], lr=1e-3)
    schedule = transformers.get_cosine_schedule_with_warmup(adamw, warmup, 120)
    rates, moved = [], []
    for _ in range(warmup):
        before = weight.detach().clone()  # [4]
        rates.append(adamw.param_groups[0]["lr"] / 1e-3)
        adamw.step()
        schedule.step()
        moved.append((weight.detach() - before).abs().max().item())
    off = max(abs(rate - step / warmup) for step, rate in enumerate(rates))
    return {"off_formula": off, "moved": moved[:2], "here": train_loop.lr_multiplier(0, warmup, 120)}


def scheduler_default(source: Source) -> Figures:
    """What transformers takes where the configuration names no schedule, and whether it takes warmup_ratio."""
    with tempfile.TemporaryDirectory() as folder:
        scheduler = transformers.TrainingArguments(output_dir=folder).lr_scheduler_type
        try:
            transformers.TrainingArguments(output_dir=folder, warmup_ratio=0.1)
            refused = None
        except TypeError as error:
            refused = type(error).__name__
    return {"default": str(scheduler.value), "warmup_ratio": refused, "transformers": transformers.__version__}


class _Toy(torch.nn.Module):
    """A model for Trainer that notes how many examples each forward gets."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.sizes: list[int] = []

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Args: x: [B, 1]."""
        self.sizes.append(len(x))
        return {"loss": (x * self.weight).mean()}


def steps(source: Source) -> Figures:
    """Updates of transformers.Trainer, over a toy model, with the guide's numbers; examples of each in the first epoch."""
    examples, toy = len(list(read_examples(BUNDLED_TRAIN, "train"))), _Toy()
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=20,
            warmup_steps=0.1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        trainer = transformers.Trainer(toy, arguments, train_dataset=[{"x": torch.ones(1)}] * examples)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    total = trainer.state.global_step
    micro_batches = toy.sizes[: len(toy.sizes) // 20]
    examples_of_steps = [sum(micro_batches[start : start + 2]) for start in range(0, len(micro_batches), 2)]
    return {"examples": examples, "per_epoch": total // 20, "total": total, "warmup": arguments.get_warmup_steps(total),
            "windows": examples_of_steps}  # fmt: skip


# -- tokens ------------------------------------------------------------------------------------------------------------


def pad_token(source: Source) -> Figures:
    """The pad id of transformers' own Phi-3 configuration."""
    config = transformers.Phi3Config()
    return {"pad": config.pad_token_id, "eos": config.eos_token_id}


def tiny_tokenizer() -> Any:
    """The tiny model's tokenizer, whose pad is its eos, as the guide sets it."""
    source = str(tiny_random_model())
    return load_tokenizer(source, load_meta_model(source, TrainConfig()), TrainConfig())


@functools.cache
def guides_batch() -> Any:
    """The 22 samples as the guide's SFTTrainer makes and collates them: formatting_func, pad = eos, 2,048 tokens at most."""
    import datasets
    import trl

    datasets.disable_progress_bars()
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    rows = [
        {"instruction": example.prompt[-1].content, "response": example.response}
        for example in read_examples(BUNDLED_TRAIN, "train")
    ]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TRL calls transformers by an old name
        trainer = trl.SFTTrainer(
            model=fresh_tiny(),
            train_dataset=datasets.Dataset.from_list(rows),
            peft_config=peft.LoraConfig(r=4, target_modules=["qkv_proj"], task_type="CAUSAL_LM"),
            formatting_func=lambda row: f"### Instruction:\n{row['instruction']}\n\n### Response:\n{row['response']}",
            processing_class=tokenizer,
            args=trl.SFTConfig(output_dir=folder, use_cpu=True, report_to=[], max_length=LENGTH),
        )
        batch = trainer.data_collator([trainer.train_dataset[row] for row in range(len(rows))])
    return {"labels": batch["labels"], "lengths": batch["attention_mask"].sum(1), "stop": tokenizer.eos_token_id,
            "version": trl.__version__}  # fmt: skip


def pad_labels(source: Source) -> Figures:
    """Stop tokens that stay trained when pad = eos: in SFTTrainer, with transformers' collator, which masks by id, and here."""
    tokenizer, theirs = tiny_tokenizer(), guides_batch()
    template = load_template(tokenizer, "plain")
    samples = [encode(example, template, "all") for example in read_examples(BUNDLED_TRAIN, "train")]
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    by_id = collator([{"input_ids": sample.input_ids, "attention_mask": [1] * len(sample.input_ids)} for sample in samples])
    counts = {"trl": theirs["labels"], "transformers": by_id["labels"], "here": collate(samples).labels}  # [22, T] each
    stops = {name: int((labels == tokenizer.eos_token_id).sum()) for name, labels in counts.items()}
    return {"examples": len(samples), "trl_version": theirs["version"], **stops}


def stop_token(source: Source) -> Figures:
    """How many of the guide's samples end with a stop token, as SFTTrainer makes them and here, and what is trained of each."""
    template, theirs = load_template(tiny_tokenizer(), "plain"), guides_batch()
    last = theirs["labels"].gather(1, theirs["lengths"][:, None] - 1)[:, 0]  # [22]
    ours = [encode(example, template, "response") for example in read_examples(BUNDLED_TRAIN, "train")]
    positions = sum(len(sample.input_ids) for sample in ours)
    return {
        "examples": len(ours),
        "trl_version": theirs["version"],
        "trl": int((last == theirs["stop"]).sum()),
        "trl_trained": int((theirs["labels"] != IGNORED).sum()) / int(theirs["lengths"].sum()),
        "here": sum(sample.input_ids[-1] == template.stop_id and sample.labels[-1] == template.stop_id for sample in ours),
        "here_trained": sum(label != IGNORED for sample in ours for label in sample.labels) / positions,
    }


def added_pad(source: Source) -> Figures:
    """What a forward pass says to a [PAD] that is added without a row for it."""
    folder = str(tiny_random_model())
    tokenizer = tiny_tokenizer()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    try:
        model(torch.tensor([[tokenizer.pad_token_id]]))  # [1, 1]
        error = None
    except IndexError as raised:
        error = type(raised).__name__
    return {"id": tokenizer.pad_token_id, "rows": model.get_input_embeddings().weight.shape[0], "error": error,
            "phi3_rows": transformers.Phi3Config().vocab_size}  # fmt: skip


def streaming(source: Source) -> Figures:
    """What load_dataset gives for a JSONL file, with and without streaming."""
    import datasets

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache:
        kinds = [
            type(datasets.load_dataset("json", data_files=str(BUNDLED_TRAIN), split="train", streaming=lazily, cache_dir=cache))
            for lazily in (False, True)
        ]
    return {"default": kinds[0].__name__, "streaming": kinds[1].__name__}


# -- libraries ---------------------------------------------------------------------------------------------------------


def native_class(source: Source) -> Figures:
    """Where transformers' Phi-3 comes from without trust_remote_code."""
    return {"module": type(phi3_mini()).__module__}


def fresh_tiny(dtype: torch.dtype = torch.bfloat16) -> Any:
    """The tiny model in NF4 with bf16 compute, as the guide loads it, and what is not quantized in `dtype`."""
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    return transformers.AutoModelForCausalLM.from_pretrained(
        str(tiny_random_model()), quantization_config=quantization, dtype=dtype, device_map={"": "cpu"}
    )


def offloading(source: Source) -> Figures:
    """What loading in 4 bits with device_map="auto" gives with room for all of the tiny model, and for a part of it."""
    quantization = transformers.BitsAndBytesConfig(load_in_4bit=True)
    errors: dict[str, str | None] = {}
    for name, room in (("enough", "1GB"), ("too_little", "400KB")):
        try:
            transformers.AutoModelForCausalLM.from_pretrained(
                str(tiny_random_model()), quantization_config=quantization, device_map="auto", max_memory={"cpu": room}
            )
            errors[name] = None
        except ValueError as raised:
            errors[name] = " ".join(str(raised).split())[:120]
    layers = [int(name.split(".")[2]) for name in linear_layers(phi3_mini())]
    return {"error": errors, "first_layer": min(layers), "last_layer": max(layers)}


def peft_and_checkpointing(source: Source) -> Figures:
    """Which of PEFT's two functions switches checkpointing on, and what the other one also casts to fp32."""
    model = adapted(fresh_tiny(), ["qkv_proj"])
    by_get_peft_model = bool(model.get_base_model().is_gradient_checkpointing)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT calls transformers by an old name
        prepared = peft.prepare_model_for_kbit_training(fresh_tiny())
    cast = [name for name, parameter in prepared.named_parameters() if parameter.dtype == torch.float32]
    shape = phi3_mini()
    growth = 2 * (shape.num_parameters() - linear_parameters(shape)) / 1e9
    return {
        "get_peft_model": by_get_peft_model,
        "prepare_model_for_kbit_training": bool(prepared.is_gradient_checkpointing),
        "cast_to_fp32": len(cast),
        "phi3_growth_gb": growth,
    }


def mixed_precision(source: Source) -> Figures:
    """A forward pass under fp16 autocast with bf16 compute, of a model loaded in bf16 and of one loaded in fp16."""
    ids = torch.arange(8)[None]  # [1, 8]
    errors: dict[str, str | None] = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        model = adapted(fresh_tiny(dtype), ["qkv_proj"]).train()
        try:
            with torch.autocast("cpu", torch.float16):
                model(input_ids=ids, labels=ids).loss.backward()
            errors[name] = None
        except RuntimeError as raised:
            errors[name] = str(raised).splitlines()[0]
    return {"error": errors}


def dtypes(source: Source) -> Figures:
    """Dtypes in a step under fp16 autocast, of a model loaded in fp16: forward, loss, and backward."""
    model = adapted(fresh_tiny(torch.float16), ["qkv_proj"]).train()
    seen: dict[str, str] = {}

    def name_of(tensor: torch.Tensor) -> str:
        return str(tensor.dtype).removeprefix("torch.")

    def keep(_: Any, __: Any, output: torch.Tensor) -> None:
        seen["layer"] = name_of(output)
        output.register_hook(lambda gradient: seen.update({"gradient": name_of(gradient)}))

    linear = model.get_base_model().model.layers[1].mlp.down_proj
    linear.register_forward_hook(keep)
    ids = torch.arange(8)[None]  # [1, 8]
    with torch.autocast("cpu", torch.float16):
        output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    return {**seen, "compute": str(linear.compute_dtype).removeprefix("torch."), "logits": name_of(output.logits),
            "loss": name_of(output.loss)}  # fmt: skip


def adapter_place(source: Source) -> Figures:
    """Where transformers.Trainer leaves adapters with save_strategy="epoch" and no save_model()."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer("a b c").input_ids
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, num_train_epochs=1, save_strategy="epoch", report_to=[], use_cpu=True, disable_tqdm=True
        )
        rows = [{"input_ids": ids, "labels": ids}] * 2
        transformers.Trainer(adapted(fresh_tiny(), ["qkv_proj"]), arguments, train_dataset=rows).train()
        found = sorted(str(path.parent.relative_to(folder)) for path in Path(folder).rglob("adapter_model.safetensors"))
    return {"folders": found, "in_output_dir": "." in found}


# -- what measured files say -------------------------------------------------------------------------------------------


def measured_cell(pattern: str, **wanted: Any) -> dict[str, Any]:
    """The cell of a results file with these values."""
    _, record = report.load(pattern)
    return next(cell for cell in record["cells"] if all(cell.get(name) == value for name, value in wanted.items()))


def checkpointing_gpu(source: Source) -> Figures:
    """Peak and time of a step at 2 x 2,048 tokens on a GPU, and of longer rows, with and without checkpointing."""
    short = {policy: measured_cell("train_step_h100_*.json", attn_implementation="sdpa", gradient_checkpointing=policy)
             for policy in ("none", "full")}  # fmt: skip
    found: Figures = {policy: {"peak_gb": cell["peak_gb"], "step_ms": cell["step_ms"]} for policy, cell in short.items()}
    long = {policy: measured_cell("attention_h100_*.json", level="step", backend="sdpa", length=8192, layout="full",
                             checkpointing=policy, window="as trained") for policy in ("none", "full")}  # fmt: skip
    return {**found, "at_8192_gb": {policy: cell["peak_gb"] for policy, cell in long.items()}}


def attention_kernel(backend: str, length: int, window: int | None = None) -> dict[str, Any]:
    """A cell of attention alone."""
    return measured_cell("attention_h100_*.json", level="kernel", backend=backend, length=length, window=window)


def attention_step(backend: str, length: int, checkpointing: str = "full") -> dict[str, Any]:
    """A cell of a whole step."""
    wanted = {"layout": "full", "window": "as trained", "checkpointing": checkpointing}
    return measured_cell("attention_h100_*.json", level="step", backend=backend, length=length, **wanted)


def flash_speed(source: Source) -> Figures:
    """Flash attention against eager and sdpa, in ms: forward and backward alone, and a step, with 10th and 90th percentile.

    A step that ran out of memory is None.
    """
    kernels = {name: attention_kernel(name, LENGTH) for name in ("eager", "sdpa", "sdpa_flash", "flash_attention_2")}
    steps: dict[str, dict[str, Any]] = {}
    for rows, length in ((BATCH, LENGTH), (1, 8192)):
        for policy in ("full", "none"):
            cells = {name: attention_step(name, length, policy) for name in ("eager", "sdpa", "flash_attention_2")}
            steps[f"{rows} x {length:,}, {policy}"] = {
                name: [cell[key] for key in ("step_ms", "step_ms_p10", "step_ms_p90")] if cell.get("step_ms") else None
                for name, cell in cells.items()
            }
    return {
        "length": LENGTH,
        "kernel_ms": {name: cell["forward_ms"] + cell["backward_ms"] for name, cell in kernels.items()},
        "sdpa_ran": kernels["sdpa"]["ran"],
        "steps": steps,
    }


def flash_memory(source: Source) -> Figures:
    """Peak of a step of one row over its length: a quadratic term shows where the length doubles."""
    peaks: dict[str, dict[int, float]] = {}
    for backend in ("eager", "sdpa", "flash_attention_2"):
        peaks[backend] = {length: attention_step(backend, length)["peak_gb"] for length in (4096, 8192)}
    growth = {backend: peak[8192] - peak[4096] for backend, peak in peaks.items()}
    named = {backend: {str(length): gb for length, gb in peak.items()} for backend, peak in peaks.items()}
    short = {backend: attention_step(backend, LENGTH)["peak_gb"] for backend in peaks}
    return {"peak_gb": named, "growth_gb": growth, "at_2048_gb": short}


def peers_gb(contender: str, shape: str = SHAPE) -> float:
    """Measured peak of a contender of peers.py on an H100, in GB."""
    return float(measured_cell(PEERS, contender=contender, shape=shape)["peak_gb"])


def out_of_memory(source: Source) -> Figures:
    """What the advice against running out of memory is worth: measured peaks in GB, and by its formula half the rank."""
    halved = 16 * sum(target.adapter_parameters for target in audit_targets(phi3_mini(), TrainConfig())) / 2
    return {"none_2x2048": peers_gb("ours_none"), "checkpointing": peers_gb("ours_full"),
            "none_1x512": peers_gb("ours_none", "1x512x4"), "half_rank": halved / 1e9}  # fmt: skip


def memory_of_phi3(source: Source) -> Figures:
    """Each term of this loop's step at 2 x 2,048 tokens with full checkpointing, in GB, and measured peaks, TRL's too."""
    model = phi3_mini()
    config = TrainConfig(gradient_checkpointing="full", compile="layers", attn_implementation="sdpa")
    targets = audit_targets(model, config)
    adapters = sum(target.adapter_parameters for target in targets)
    shape, tokens = model.config, BATCH * LENGTH
    weights = quantized_model(source)
    terms = {
        "linear layers, NF4": weights["linear_gb"],
        "embeddings, head, norms, bf16": weights["rest_gb"],
        "adapters, fp32": 4 * adapters / 1e9,
        "their gradients": 4 * adapters / 1e9,
        "AdamW's moments": 8 * adapters / 1e9,
        "adapters in bf16 for the products": 2 * adapters / 1e9,
        "inputs of the layers": 2 * tokens * shape.num_hidden_layers * shape.hidden_size / 1e9,
        "a chunk of logits": 2 * min(CHUNK_TOKENS, tokens) * shape.vocab_size / 1e9,
    }
    predicted = estimated_memory_gb(model, targets, config, LENGTH)
    terms["the layer at work, and scratch"] = predicted - sum(terms.values())
    states = ("linear layers, NF4", "embeddings, head, norms, bf16", "adapters, fp32", "their gradients", "AdamW's moments")
    return {
        "terms_gb": terms,
        "states_gb": sum(terms[name] for name in states),
        "predicted_gb": predicted,
        "measured_gb": peers_gb("ours_full_layers"),
        "measured_none_gb": peers_gb("ours_none"),
        "trl_gb": peers_gb("trl"),
        "trl_best_gb": peers_gb("trl_best"),
        "guide_gb": TOTAL_GB,
    }


def full_fine_tuning(source: Source) -> Figures:
    """Weights, gradients and two moments in fp32, 16 bytes a parameter; activations are not among them."""
    return {"gb": 16 * phi3_mini().num_parameters() / 1e9, "guide_gb": FULL_GB}


def reduction(source: Source) -> Figures:
    """How much less than full fine-tuning: like against like, without activations and with a step's, and measured peaks.

    "activations" stands for all of the measured peak that is no weight, gradient or moment, on both sides.
    """
    memory, full = memory_of_phi3(source), full_fine_tuning(source)["gb"]
    peak = memory["measured_gb"]
    return {
        "states": 1 - memory["states_gb"] / full,
        "with_activations": 1 - peak / (full + peak - memory["states_gb"]),
        "peak": 1 - peak / full,
        "trl_peak": 1 - memory["trl_gb"] / full,
        "guide": 0.967,
    }


def small_card(source: Source) -> Figures:
    """Measured peaks of this loop and of TRL in GB against 6 GB, the least that the guide asks for."""
    peaks = {
        "this loop with full checkpointing, 2 x 2,048": peers_gb("ours_full_layers"),
        "this loop without, 2 x 2,048": peers_gb("ours_none"),
        "this loop without, 1 x 512": peers_gb("ours_none", "1x512x4"),
        "SFTTrainer, 2 x 2,048": peers_gb("trl"),
        "SFTTrainer, 1 x 512": peers_gb("trl", "1x512x4"),
    }
    return {"peaks_gb": peaks, "fits": [name for name, gb in peaks.items() if gb < 5.5], "card_gb": 6}  # 0.5 for CUDA


def disk(source: Source) -> Figures:
    """What the guide's run puts on a disk, in GB: weights, packages as installed here, three checkpoints as measured."""
    _, record = report.load("kill_resume_*.json")
    packages = Path(torch.__file__).parents[1]
    installed = sum(path.stat().st_size for path in packages.rglob("*") if path.is_file() and not path.is_symlink())
    return {"weights": 2 * phi3_mini().num_parameters() / 1e9, "checkpoints": 3 * record["checkpoint_bytes"] / 1e9,
            "packages": installed / 1e9, "guide": 20}  # fmt: skip


def epochs(source: Source) -> Figures:
    """When runs of 20 epochs stopped gaining: the default one, and for each peak rate the epoch from which the loss
    stays within twice its last."""
    _, record = report.load("demo_cpu_*.json")
    losses = record["runs"][0]["eval_loss"]
    plateau = {
        f"{run['learning_rate']:g}": [
            max(epoch for epoch, loss in enumerate(run["eval_loss"]) if loss > 2 * run["eval_loss"][-1]) + 1,
            run["tuned_right"],
        ]
        for run in sorted(record["runs"], key=lambda run: run["learning_rate"])
    }
    best = min(losses)
    near = next(epoch for epoch, loss in enumerate(losses) if loss < 1.1 * best)
    return {
        "best": best,
        "best_epoch": losses.index(best),
        "last": losses[-1],
        "within_a_tenth": near,
        "plateau": plateau,
        "of": record["runs"][0]["held_out"],
        "epochs": len(losses) - 1,
    }


def signs_of_success(source: Source) -> Figures:
    """Eval loss before and after 20 epochs and right answers, for each peak rate."""
    _, record = report.load("demo_cpu_*.json")
    runs = {
        f"{run['learning_rate']:g}": {"before": run["eval_loss"][0], "last": run["eval_loss"][-1], "right": run["tuned_right"],
                                      "right_before": run["base_right"]}
        for run in sorted(record["runs"], key=lambda run: run["learning_rate"])
    }  # fmt: skip
    return {"of": record["runs"][0]["held_out"], "runs": runs}


def trl_checkpointing(source: Source) -> Figures:
    """Peak and step of SFTTrainer as it comes, and told not to checkpoint."""
    cells = {name: measured_cell("peers_cpu_*.json", contender=name) for name in ("trl", "trl_no_checkpointing")}
    return {"version": cells["trl"]["version"], **{name: {"peak_gb": cell["peak_gb"], "step_ms": cell["step_ms"]}
                                                   for name, cell in cells.items()}}  # fmt: skip


def checkpoint_contents(source: Source) -> Figures:
    """Bytes of a checkpoint of full size, against those of the model."""
    _, record = report.load("kill_resume_*.json")
    return {"checkpoint_mb": record["checkpoint_bytes"] / 1e6, "model_gb": 2 * phi3_mini().num_parameters() / 1e9,
            "adapter_mb": adapter_bytes(source)["file_mb"]}  # fmt: skip


def nothing(source: Source) -> Figures:
    """No figures: there is nothing here to measure it on."""
    return {}
