"""Claims that need a model with weights: what guide_claims.py measures on the demo, or, quickly, on the tiny random model.

Shapes: B rows, T tokens, D hidden size. Losses are nats per token.
"""

import concurrent.futures
import functools
import logging
import math
import multiprocessing
import re
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import train_loop
from benchmarks import guide_claims_training as training
from benchmarks.guide_claims_cells import (
    Figures,
    Source,
    phi3_mini,
    relative_rms,
    signed_levels,
    signs_of_success,
    uniform_levels,
)
from qlora.config import BUNDLED_EVAL, BUNDLED_TRAIN, TrainConfig
from qlora.data.batch import Batch, collate
from qlora.data.formats import read_examples
from qlora.data.template import IGNORED, PromptTemplate, TokenizedExample, encode, load_template
from qlora.model import attention
from qlora.model.coverage import linear_layers
from qlora.model.demo import model_source
from qlora.model.load import fingerprint, load_meta_model, load_nf4_model, load_tokenizer
from qlora.model.lora import audit_targets
from qlora.model.loss import read_head, token_loss_sum
from qlora.model.optimizer import build_optimizer
from qlora.model.third_party import bitsandbytes, peft, transformers
from qlora.run import checkpoint
from qlora.run.files import write_folder
from qlora.speed.accelerate import accelerate
from qlora.speed.memory import NF4_BYTES

CPU = torch.device("cpu")
# On a CPU it says in each product that int8 works in fp16.
logging.getLogger("bitsandbytes.autograd._functions").addFilter(lambda record: "MatMul8bitLt" not in str(record.msg))


def format_of(source: Source) -> PromptTemplate:
    """The plain format with the model's own tokenizer."""
    folder = model_source(source.model)
    return load_template(load_tokenizer(folder, load_meta_model(folder, TrainConfig()), TrainConfig()), "plain")


def encoded(source: Source, path: Path = BUNDLED_TRAIN, template: PromptTemplate | None = None) -> list[TokenizedExample]:
    """The bundled examples, loss on the response."""
    template = template or format_of(source)
    return [encode(example, template, "response") for example in read_examples(path, "train")]


def base_model(source: Source, kind: str) -> Any:
    """The model in fp32, bf16, int8, or in 4 bits: nf4 or fp4, with `_dq` for double quantization."""
    folder = model_source(source.model)
    if kind in ("fp32", "bf16"):
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[kind]
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    four: Any = {"load_in_4bit": True, "bnb_4bit_quant_type": kind[:3], "bnb_4bit_use_double_quant": kind.endswith("_dq")}
    options = {"load_in_8bit": True} if kind == "int8" else {**four, "bnb_4bit_compute_dtype": torch.bfloat16}
    quantization = transformers.BitsAndBytesConfig(**options)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(folder, quantization_config=quantization, dtype=torch.bfloat16, device_map={"": CPU}).eval()
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False  # its other kernel rounds differently
    return model


# -- what rounding costs -----------------------------------------------------------------------------------------------


@functools.cache
def _quality(model: str, rows: int, length: int) -> dict[str, list[float]]:
    source = Source(model, [])
    ids = training.text_rows(format_of(source), rows, length)
    kinds = ("fp32", "bf16", "nf4", "nf4_dq", "fp4", "int8")
    return {kind: training.text_losses(base_model(source, kind), ids, None if kind == "fp32" else torch.bfloat16)
            for kind in kinds}  # fmt: skip


def quality(source: Source, rows: int = training.TEXT_ROWS, length: int = training.TEXT_LENGTH) -> Figures:
    """Perplexity on the text in each format, the change of the loss against bf16, and its standard error over rows."""
    losses = _quality(source.model, rows, length)
    found: Figures = {"tokens": rows * (length - 1), "perplexity": {}, "change": {}, "error": {}}
    for kind, values in losses.items():
        changes = [value - base for value, base in zip(values, losses["bf16"], strict=True)]
        found["perplexity"][kind] = math.exp(statistics.mean(values))
        found["change"][kind] = math.exp(statistics.mean(changes)) - 1
        found["error"][kind] = statistics.stdev(changes) / math.sqrt(rows)
    return found


def format_errors(source: Source) -> Figures:
    """Relative error of all of the demo's linear weights in NF4 and in 16 equally spaced levels, two ways."""
    errors: dict[str, list[float]] = {"nf4": [], "uniform": [], "uniform, -8 to 7": []}
    for layer in linear_layers(base_model(source, "bf16")).values():
        weight = layer.weight.detach().float()
        packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4")
        errors["nf4"].append(relative_rms(bitsandbytes.functional.dequantize_4bit(packed, state), weight))
        errors["uniform"].append(relative_rms(uniform_levels(weight), weight))
        errors["uniform, -8 to 7"].append(relative_rms(signed_levels(weight), weight))
    return {name: statistics.mean(values) for name, values in errors.items()}


def printed_size(source: Source) -> Figures:
    """What sum(p.numel()) gives for a model in NF4, and how many parameters it has."""
    real = load_meta_model(model_source(source.model), TrainConfig()).num_parameters()
    printed = sum(parameter.numel() for parameter in base_model(source, "nf4_dq").parameters())
    return {"printed_m": printed / 1e6, "real_m": real / 1e6, "share": printed / real}


# -- adapters at their start -------------------------------------------------------------------------------------------


def step_of(source: Source, template: PromptTemplate) -> list[Batch]:
    """The first four examples as two micro-batches."""
    samples = encoded(source, template=template)
    return [collate(samples[:2]), collate(samples[2:4])]


def start(source: Source) -> Figures:
    """Logits with fresh adapters against those without, and the gradients of A and B."""
    config, template, model = training.start(source.model, {"lora_dropout": 0.0})
    batch = step_of(source, template)[0]
    with torch.no_grad():
        with_adapters = model.eval()(input_ids=batch.input_ids).logits  # [B, T, V]
        with model.disable_adapter():
            without = model(input_ids=batch.input_ids).logits  # [B, T, V]
    decoder = accelerate(model.train(), config)
    loss = token_loss_sum(hidden_of(decoder, batch), batch, read_head(model))
    loss.backward()
    norms = {side: math.sqrt(sum(float(p.grad.square().sum()) for name, p in model.named_parameters() if side in name))
             for side in ("lora_A", "lora_B")}  # fmt: skip
    return {"largest_difference": float((with_adapters - without).abs().max()), "gradient": norms}


def hidden_of(decoder: Any, batch: Batch) -> torch.Tensor:
    """Last hidden states [B, T, D], as train_step computes them."""
    with torch.autocast("cpu", torch.bfloat16):
        return decoder(**attention.decoder_inputs(batch, decoder.config), use_cache=False).last_hidden_state


def alphas(source: Source) -> Figures:
    """The first gradient of B for alphas at rank 32: norms, which grow as the update's scale does."""
    norms = {}
    for alpha in (16, 64, 256):
        config, template, model = training.start(source.model, {"lora_dropout": 0.0, "lora_alpha": alpha})
        decoder = accelerate(model.train(), config)
        norms[str(alpha)] = float(gradient_of(model, decoder, step_of(source, template)[0], read_head(model)).norm())
    return {"norms": norms, "of_16": norms["64"] / norms["16"], "of_64": norms["256"] / norms["64"]}


def frozen(source: Source) -> Figures:
    """Two steps: which parameters moved, and whether the base is still the same bytes."""
    config, template, model = training.start(source.model, {})
    decoder = accelerate(model.train(), config)
    before = fingerprint(model)
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = build_optimizer([p for p in model.parameters() if p.requires_grad], config)
    loss_sum = functools.partial(token_loss_sum, head=read_head(model))
    for _ in range(2):  # in the first, A stands still, as B is zero
        train_loop.train_step(decoder, optimizer, step_of(source, template), loss_sum, 1e-3, 1.0)
    moved = sum(not torch.equal(p, trained[name]) for name, p in model.named_parameters() if name in trained)
    return {"base_unchanged": fingerprint(model) == before, "moved": moved, "trained": len(trained)}


# -- batches -----------------------------------------------------------------------------------------------------------


def gradient_of(model: Any, decoder: Any, batch: Batch, head: Any) -> torch.Tensor:
    """The gradient of a micro-batch's loss sum to all adapters, as one vector."""
    model.zero_grad(set_to_none=True)
    token_loss_sum(hidden_of(decoder, batch), batch, head).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])  # [parameters]


def accumulation(source: Source) -> Figures:
    """The gradient of a mean of micro-batch means against that of the step's tokens, for like and unlike answers."""
    config, template, model = training.start(source.model, {"lora_dropout": 0.0})
    decoder = accelerate(model.train(), config)
    head = read_head(model)
    found = {}
    whole = encoded(source, template=template)
    prompt = sum(label == IGNORED for label in whole[0].labels)
    short = TokenizedExample(*(part[: prompt + 12] for part in whole[0][:2]), 1)
    steps = {"bundled": step_of(source, template), "unlike": [collate([short]), collate([whole[1]])]}
    for name, micro_batches in steps.items():
        sums = [gradient_of(model, decoder, batch, head) for batch in micro_batches]
        counts = [batch.num_tokens for batch in micro_batches]
        right = sum(sums) / sum(counts)  # [parameters]
        means = sum(total / count for total, count in zip(sums, counts, strict=True)) / len(micro_batches)  # [parameters]
        found[name] = {"tokens": counts, "error": float((means - right).norm() / right.norm())}
    return {"windows": found}


def batch_noise(source: Source) -> Figures:
    """Cosine between the gradient of 1, 2, 4 and 11 examples and that of all 22, the mean over disjoint batches."""
    config, template, model = training.start(source.model, {"lora_dropout": 0.0})
    decoder = accelerate(model.train(), config)
    head = read_head(model)
    samples = [collate([sample]) for sample in encoded(source, template=template)]
    gradients = torch.stack([gradient_of(model, decoder, batch, head) for batch in samples])  # [22, parameters]
    everything = gradients.sum(0)  # [parameters]
    found = {}
    for size in (1, 2, 4, 11):
        parts = [rows.sum(0) for rows in gradients.split(size) if len(rows) == size]  # [parameters] each
        found[str(size)] = statistics.mean(float(torch.cosine_similarity(part, everything, dim=0)) for part in parts)
    return {"cosine": found}


# -- memory ------------------------------------------------------------------------------------------------------------


def saved_bytes(model: Any, decoder: Any, length: int) -> int:
    """Bytes that a forward pass of one row keeps for backward, parameters and frozen weights left out."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    storages: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # else its address could be given to another
        return tensor

    ids = torch.arange(length)[None] % model.config.vocab_size  # [1, T]
    batch = collate([TokenizedExample(ids[0].tolist(), ids[0].tolist(), 1)])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden_of(decoder, batch)
    return sum(storages.values())


def checkpointing(source: Source, lengths: tuple[int, ...] = (64, 128, 256, 512)) -> Figures:
    """What a forward pass keeps for backward, in MB, over the length, and what the inputs of the layers alone are."""
    kept: dict[str, dict[str, float]] = {}
    for policy in ("none", "full"):
        config, _, model = training.start(source.model, {})
        decoder = accelerate(model.train(), TrainConfig(**{**vars(config), "gradient_checkpointing": policy}))
        kept[policy] = {str(length): saved_bytes(model, decoder, length) / 1e6 for length in lengths}
    shape = model.config
    inputs = {str(length): 2 * length * shape.hidden_size * shape.num_hidden_layers / 1e6 for length in lengths}
    longest = str(max(lengths))
    full, none = kept["full"][longest], kept["none"][longest]
    return {
        "saved_mb": kept,
        "layer_inputs_mb": inputs,
        "longest": longest,
        "of": full / none,
        "inputs_share": inputs[longest] / full,
    }


def memory_terms(source: Source) -> Figures:
    """The terms of memory predicted from the shape, and what the tensors of a step weigh, in MB."""
    config, template, model = training.start(source.model, {})
    decoder = accelerate(model.train(), config)
    meta_model = load_meta_model(model_source(source.model), config)
    linear = sum(layer.weight.numel() for layer in linear_layers(meta_model).values())
    adapters = sum(target.adapter_parameters for target in audit_targets(meta_model, config))
    optimizer = build_optimizer([p for p in model.parameters() if p.requires_grad], config)
    loss_sum = functools.partial(token_loss_sum, head=read_head(model))
    train_loop.train_step(decoder, optimizer, step_of(source, template), loss_sum, 1e-3, 1.0)
    quantized = [p for p in model.parameters() if isinstance(p, bitsandbytes.nn.Params4bit)]
    scales = sum(state.absmax.nbytes + state.state2.absmax.nbytes for state in (p.quant_state for p in quantized))
    trained = [p for p in model.parameters() if p.requires_grad]
    other = [p for p in model.parameters() if not p.requires_grad and not isinstance(p, bitsandbytes.nn.Params4bit)]
    sixteen_bits = 2 * (meta_model.num_parameters() - linear)
    sizes = {  # bytes: predicted, measured
        "linear layers, NF4": (NF4_BYTES * linear, scales + sum(p.nbytes for p in quantized)),
        "embeddings, head, norms, bf16": (sixteen_bits, sum(p.nbytes for p in other)),
        "adapters, fp32": (4 * adapters, sum(p.nbytes for p in trained)),
        "their gradients": (4 * adapters, sum(p.grad.nbytes for p in trained)),
        "AdamW's moments": (8 * adapters, moment_bytes(optimizer)),
    }
    return {
        "predicted_mb": {name: predicted / 1e6 for name, (predicted, _) in sizes.items()},
        "measured_mb": {name: measured / 1e6 for name, (_, measured) in sizes.items()},
        "worst": max(abs(measured / predicted - 1) for predicted, measured in sizes.values()),
    }


def high_water_gb() -> float:
    """Peak resident memory of this process; what getrusage gives may be that of the process which started it."""
    (kib,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kib) * 1024 / 1e9


def loading(source: Source) -> tuple[float, float]:
    """Peak memory of this process before it loads the model in NF4, and what that adds to it, in GB."""
    base_model(Source("tiny-random", []), "nf4_dq")  # what libraries import when they load something
    before = high_water_gb()
    base_model(source, "nf4_dq")
    return before, high_water_gb() - before


def host_memory(source: Source, rounds: int = 3) -> Figures:
    """Peak memory of processes that load the model in NF4, the file that they read, and Phi-3-mini's size, in GB."""
    file = sum(path.stat().st_size for path in Path(model_source(source.model)).glob("*.safetensors"))
    found = []
    for _ in range(rounds):
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            found.append(pool.submit(loading, source).result())
    return {"before": max(before for before, _ in found), "grown": sorted(grown for _, grown in found), "file": file / 1e9,
            "phi3_file": 2 * phi3_mini().num_parameters() / 1e9, "guide": 16}  # fmt: skip


def rank_cost(source: Source, chosen: tuple[int, ...] = (2, 8, 32, 128), rounds: int = 4) -> Figures:
    """What ranks cost: seconds of a step, in turns so that a busy machine is busy for all, and MB that training keeps."""
    steps, found, kept = {}, {}, {}
    for rank in chosen:
        config, template, model = training.start(source.model, {"lora_r": rank, "lora_alpha": 2 * rank})
        decoder = accelerate(model.train(), config)
        trained = [p for p in model.parameters() if p.requires_grad]
        loss_sum = functools.partial(token_loss_sum, head=read_head(model))
        optimizer, micro_batches = build_optimizer(trained, config), step_of(source, template)
        steps[rank] = functools.partial(
            train_loop.train_step, decoder, optimizer, micro_batches, loss_sum, 1e-4, 1.0
        )  # () -> loss, norm
        kept[rank] = optimizer
        frozen_mb = sum(p.nbytes for p in model.parameters() if not p.requires_grad) / 1e6
        found[str(rank)] = {"parameters": sum(p.numel() for p in trained), "base_mb": frozen_mb, "step_s": []}
    for turn in range(rounds):
        for rank, step in steps.items():
            began = time.perf_counter()
            step()
            if turn:  # the first makes the moments
                found[str(rank)]["step_s"].append(time.perf_counter() - began)
    for rank, optimizer in kept.items():
        row = found[str(rank)]
        weights = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        weighed = sum(p.nbytes + p.grad.nbytes for p in weights) + moment_bytes(optimizer)
        found[str(rank)] = {**row, "step_s": statistics.median(row["step_s"]), "training_mb": weighed / 1e6}
    return {"ranks": found, "lowest": str(min(chosen)), "highest": str(max(chosen))}


def moment_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's moments; its step counts, scalars, are left out."""
    states = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.nbytes for value in states if torch.is_tensor(value) and value.dim())


# -- prompts, generation, merging --------------------------------------------------------------------------------------


def prompt_forms(source: Source) -> Figures:
    """Loss of the eval answers behind the guide's headings and behind the model's own chat template, untrained."""
    folder = model_source(source.model)
    tokenizer = load_tokenizer(folder, load_meta_model(folder, TrainConfig()), TrainConfig())
    model = base_model(source, "bf16")
    losses = {}
    for name in ("plain", "chat"):
        total, tokens = 0.0, 0
        for sample in encoded(source, BUNDLED_EVAL, load_template(tokenizer, name)):
            trained = torch.tensor(sample.labels)[1:]  # [T - 1]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([sample.input_ids])).logits.float()[0, :-1]  # [T - 1, V]
            total += float(torch.nn.functional.cross_entropy(logits, trained, ignore_index=IGNORED, reduction="sum"))
            tokens += int((trained != IGNORED).sum())
        losses[name] = total / tokens
    return {"loss": losses}


def kv_cache(source: Source, new_tokens: int = 64) -> Figures:
    """Whether generate() uses a cache unasked, and the time of an answer with and without it."""
    model = base_model(source, "bf16")
    ids = training.text_rows(format_of(source), 1, 128)  # [1, 128]
    seconds = {}
    for cached in (None, True, False):
        began = time.perf_counter()
        options = {} if cached is None else {"use_cache": cached}
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens,
                       min_new_tokens=new_tokens, **options)  # fmt: skip
        seconds[str(cached)] = time.perf_counter() - began
    return {"default": model.generation_config.use_cache in (None, True), "seconds": seconds, "new_tokens": new_tokens,
            "factor": seconds["False"] / seconds["True"]}  # fmt: skip


def merging(source: Source, epochs: int = training.EPOCHS) -> Figures:
    """A trained adapter merged in three ways against the NF4 model with its adapter beside it.

    bf16: into the unquantized model, as the guide does; dequantized: into the NF4 weights, turned to bf16; requantized: into
    the 4-bit weights, which are then quantized anew. Logits are those of the eval examples.
    """
    trained = training.run(source.model, {}, epochs)
    template, config, folder = trained.template, trained.config, model_source(source.model)
    samples = [collate([sample]) for sample in encoded(source, BUNDLED_EVAL, template)]
    with TemporaryDirectory() as scratch:
        write_folder(Path(scratch) / "adapter", dict(checkpoint.adapter_files(trained.model, template.tokenizer)))
        adapter = str(Path(scratch) / "adapter")
        reference = compared(peft.PeftModel.from_pretrained(load_nf4_model(folder, config, "sdpa", CPU), adapter), samples)
        merged = {}
        for route in ("bf16", "dequantized", "requantized"):
            base = base_model(source, "bf16") if route == "bf16" else load_nf4_model(folder, config, "sdpa", CPU)
            base = base.dequantize() if route == "dequantized" else base
            merged[route] = compared(peft.PeftModel.from_pretrained(base, adapter).merge_and_unload(), samples, reference)
    beside = {"loss": reference["loss"], "perplexity": math.exp(reference["loss"])}
    return {"beside": beside, "without": {"perplexity": math.exp(trained.row["eval_loss"][0])}, "merged": merged}


@torch.no_grad()
def compared(model: Any, samples: list[Batch], reference: Figures | None = None) -> Figures:
    """Loss on eval answers and, against a reference, the largest and the relative difference of logits."""
    model.eval()
    logits, total, tokens = [], 0.0, 0
    for batch in samples:
        with torch.autocast("cpu", torch.bfloat16):
            found = model(input_ids=batch.input_ids, use_cache=False).logits.float()[0]  # [T, V]
        logits.append(found)
        targets = batch.labels.flatten()[batch.positions + 1]  # [N]
        total += float(torch.nn.functional.cross_entropy(found[batch.positions], targets, reduction="sum"))
        tokens += batch.num_tokens
    row: Figures = {"loss": total / tokens}
    if reference is None:
        return {**row, "logits": logits}
    exact = torch.cat(reference["logits"])  # [all T, V]
    row["perplexity"] = math.exp(row["loss"])
    row["largest"] = float((torch.cat(logits) - exact).abs().max())
    row["relative"] = relative_rms(torch.cat(logits), exact)
    return row


# -- what short runs say -----------------------------------------------------------------------------------------------


def of(source: Source, flags: training.Flags) -> dict[str, Any]:
    """The run with these flags."""
    return next(row for row in source.trainings if row["flags"] == flags)


def summary(row: dict[str, Any]) -> dict[str, Any]:
    """What claims are judged by, of one run."""
    kept = ("trained_parameters", "step_s", "peak_rss_gb", "train_loss_without_dropout", "text_perplexity", "epochs")
    return {"held_out": row["eval_loss"][-1], "best_held_out": min(row["eval_loss"]), "before": row["eval_loss"][0],
            **{name: row[name] for name in kept}}  # fmt: skip


def noise(source: Source) -> float:
    """How much the eval loss differs between two seeds."""
    return abs(summary(of(source, training.BASE))["held_out"] - summary(of(source, training.ANOTHER_SEED))["held_out"])


def runs(source: Source, flags: dict[Any, training.Flags]) -> Figures:
    """The default run beside others."""
    return {"runs": {str(name): summary(of(source, other)) for name, other in flags.items()}, "seeds_differ_by": noise(source)}


def target_quality(source: Source) -> Figures:
    """Eval loss for each choice of targets."""
    return runs(source, {"all": training.BASE, **training.TARGETS})


def ranks(source: Source) -> Figures:
    """Eval loss, time and memory for each rank."""
    return runs(source, dict(sorted({32: training.BASE, **training.RANKS}.items())))


def dropouts(source: Source) -> Figures:
    """Training loss with dropout switched off, and eval loss, for each share of dropout."""
    return runs(source, dict(sorted({0.1: training.BASE, **training.DROPOUTS}.items())))


def rates(source: Source) -> Figures:
    """Eval loss for each peak rate: after the guide's 20 epochs, and of the short runs, which have the extremes."""
    whole = {name: {"last": run["last"], "right": run["right"]} for name, run in signs_of_success(source)["runs"].items()}
    return {**runs(source, dict(sorted({4e-4: training.BASE, **training.RATES}.items()))), "whole": whole}


def decay(source: Source) -> Figures:
    """Eval loss with and without weight decay, and the largest share of a weight that decay takes in the run."""
    row = of(source, training.BASE)
    config = training.configured(source.model, {})
    assert config.learning_rate is not None  # as resolved
    share = len(row["train_loss"]) * config.learning_rate * config.weight_decay
    return {**runs(source, {"0.01": training.BASE, "0": training.NO_DECAY}), "decays_by_at_most": share}


def knowledge(source: Source) -> Figures:
    """Perplexity on the text before training, after the default run, and after one at too high a rate."""
    before = math.exp(
        statistics.mean(training.text_losses(base_model(source, "nf4_dq"), training.text_rows(format_of(source))))
    )
    after = of(source, training.BASE)["text_perplexity"]
    high = of(source, training.RATES[2e-2])["text_perplexity"]
    return {"before": before, "after": after, "too_high_rate": high, "change": after / before - 1}


def signs(source: Source) -> Figures:
    """First and last training loss and the range of gradient norms of a run that goes well."""
    row = of(source, training.BASE)
    return {"first_loss": row["train_loss"][0], "last_loss": row["train_loss"][-1], "smallest_norm": min(row["grad_norm"]),
            "largest_norm": max(row["grad_norm"]), "steps": len(row["grad_norm"])}  # fmt: skip
