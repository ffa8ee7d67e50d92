"""Claims about what adapters, NF4 weights and a step take, and about what NF4 costs in quality."""

import functools
import math
import statistics
import warnings

import safetensors.torch
import torch

import train_loop
from benchmarks.guide_claims.finding import LENGTH, LIBRARY, RANK, Figures, Finding, Source, listed, measured_cell, right_if
from benchmarks.guide_claims.models import adapted, base_model, built, phi3_mini, template_of
from benchmarks.guide_claims.training import text_losses
from qlora.config import TrainConfig
from qlora.model.coverage import linear_layers
from qlora.model.targets import audit_targets
from qlora.model.third_party import bitsandbytes, peft
from qlora.speed.memory import memory_terms

PEERS = "peers_h100_*.json"
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # the guide's targets
STATES = ("base in NF4", "embeddings, head, norms", "adapters in fp32", "their gradients", "their moments")  # of memory_terms


def targets(source: Source, f: Figures) -> Finding:
    """The seven Llama names adapt attention and MLP of Phi-3."""
    if not f:
        own = sorted({name.rsplit(".", 1)[-1] for name in linear_layers(phi3_mini())})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            models = {"guide": adapted(phi3_mini(), SEVEN), "right": adapted(phi3_mini(), own)}
        about_targets = sum("target" in str(warning.message) for warning in caught)
        f = {"own": own, "matched": sorted(set(SEVEN) & set(own)), "warnings": about_targets}
        for name, model in models.items():
            f[name] = {"layers": len(model.targeted_module_names), "parameters": model.get_nb_trainable_parameters()[0]}
        f["share"] = f["guide"]["parameters"] / f["right"]["parameters"]
    fact = f"""they match {" and ".join(f["matched"])} alone: {f["guide"]["layers"]} of {f["right"]["layers"]} layers,
        {f["guide"]["parameters"]:,} of {f["right"]["parameters"]:,} parameters ({f["share"]:.0%}); PEFT gives {f["warnings"]}
        warnings. Phi-3 has {", ".join(f["own"])}"""
    return Finding(right_if(f["share"] == 1), fact, f, short=True)


def adapter_3mb(source: Source, f: Figures) -> Finding:
    """Trained parameters take 3 MB."""
    if not f:
        model = adapted(phi3_mini(), "all-linear")
        tensors = {name: torch.zeros(p.shape, requires_grad=True) for name, p in model.named_parameters() if p.requires_grad}
        adamw = torch.optim.AdamW(tensors.values())
        for tensor in tensors.values():
            tensor.grad = torch.zeros_like(tensor)
        adamw.step()
        moments = sum(value.nbytes for state in adamw.state.values() for value in state.values() if value.dim())
        file_bytes, adapter_bytes = len(safetensors.torch.save(tensors)), sum(tensor.nbytes for tensor in tensors.values())
        f = {"file_mb": file_bytes / 1e6, "training_mb": (2 * adapter_bytes + moments) / 1e6, "parameters": adapter_bytes // 4}
    fact = f"""{f["parameters"]:,} fp32 parameters, a file of {f["file_mb"]:.0f} MB; with gradients and moments, weighed after a
        step of AdamW, {f["training_mb"]:.0f}"""
    return Finding(right_if(f["file_mb"] < 4), fact, f, short=True)


def nf4_levels(source: Source, f: Figures) -> Finding:
    """NF4's levels are symmetric: ±0.525, ±0.6961, ±1."""
    if not f:
        levels = [round(level, 4) for level in bitsandbytes.functional.get_4bit_type("nf4", device="cpu").tolist()]
        f = {"levels": levels}
        f |= {"below_zero": sum(level < 0 for level in levels), "above_zero": sum(level > 0 for level in levels)}
        printed = (-1.0, -0.6961, -0.5250, 0.5250, 0.6961, 1.0)
        f["missing"] = [level for level in printed if min(abs(level - real) for real in levels) > 2e-4]
    fact = f"""{f["below_zero"]} below zero, an exact zero, {f["above_zero"]} above; there is no
        {" and no ".join(f"{level:g}" for level in f["missing"])}, but {f["levels"][-3]:g} and {f["levels"][-2]:g}"""
    return Finding(right_if(not f["missing"]), fact, f, LIBRARY, short=True)


@functools.cache
def quantized_bytes(rows: int, columns: int, double: bool = True) -> int:
    """Bytes of a quantized random weight that grow with it: values and scales."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
    return packed.nbytes + state.absmax.nbytes + (state.state2.absmax.nbytes if double else 0)


def bits() -> Figures:
    """Bits per parameter of a 4096 x 4096 layer in NF4, without and with double quantization."""
    single, double = (8 * quantized_bytes(4096, 4096, double) / 4096**2 for double in (False, True))
    return {"single": single, "double": double, "saved": single - double}


def bits_4_5(source: Source, f: Figures) -> Finding:
    """NF4 takes 4 bits a parameter, 0.5 bytes."""
    f = f or bits()
    fact = f"""{f["double"]:.3f} bits with double quantization, which the guide has on: {f["double"] / 4 - 1:.0%} more, for the
        scales of blocks; {f["single"]:.3f} without"""
    return Finding(right_if(abs(f["double"] / 4 - 1) < 0.01), fact, f)


def double_quantization(source: Source, f: Figures) -> Finding:
    """Double quantization saves 0.37 bits a parameter."""
    f = f or bits()
    fact = f"{f['single']:.3f} to {f['double']:.3f} bits: {f['saved']:.3f}"
    return Finding(right_if(abs(f["saved"] - 0.37) < 0.005), fact, f, short=True)


def _97_5_percent(source: Source, f: Figures) -> Finding:
    """A 4096 x 4096 layer at rank 32 takes 97.5 % less."""
    if not f:
        full, base, adapter = 4 * 4096**2, quantized_bytes(4096, 4096), 4 * 2 * 4096 * RANK
        f = {"stored": 1 - (base + adapter) / full, "training": 1 - (base + 4 * adapter) / full}
        f["own_formula"] = 1 - (4096**2 * 4 + 2 * 4096 * RANK * 32) / (4096**2 * 32)
    fact = f"""{f["stored"]:.1%}; with gradients and moments of A and B {f["training"]:.1%}; the guide's own formula gives
        {f["own_formula"]:.1%}"""
    return Finding(right_if(abs(f["stored"] - 0.975) < 0.01), fact, f, short=True)


def quantized_phi3() -> Figures:
    """Phi-3-mini in memory: each of its linear shapes quantized and weighed, the rest in 16 bits."""
    model = phi3_mini()
    layers = linear_layers(model).values()
    linear = sum(quantized_bytes(layer.out_features, layer.in_features) for layer in layers)
    rest = 2 * (model.num_parameters() - sum(layer.weight.numel() for layer in layers))
    return {"linear_gb": linear / 1e9, "rest_gb": rest / 1e9, "total_gb": (linear + rest) / 1e9}


def model_3_8gb(source: Source, f: Figures) -> Finding:
    """The quantized model takes 3.8 GB, or 1.9 GB."""
    f = f or quantized_phi3()
    fact = f"""{f["total_gb"]:.2f} GB: {f["linear_gb"]:.2f} of linear layers in NF4, {f["rest_gb"]:.2f} of embeddings, head and
        norms in bf16"""
    return Finding(right_if(min(abs(f["total_gb"] - said) for said in (1.9, 3.8)) < 0.1), fact, f, short=True)


def quality_nf4(source: Source, f: Figures) -> Finding:
    """4 bits cost about 0.5 % of accuracy."""
    if not f:
        f, template, in_bf16 = {"perplexity": {}, "change": {}, "error": {}}, template_of(source.model), []
        for kind in ("bf16", "nf4", "nf4_dq", "fp4", "int8"):
            losses = text_losses(base_model(source.model, kind), template)  # of rows of a text
            in_bf16 = in_bf16 or losses
            changes = [loss - base for loss, base in zip(losses, in_bf16, strict=True)]
            f["perplexity"][kind] = math.exp(statistics.mean(losses))
            f["change"][kind] = math.exp(statistics.mean(changes)) - 1
            f["error"][kind] = statistics.stdev(changes) / math.sqrt(len(changes))
    perplexity, change = f["perplexity"], f["change"]
    fact = f"""perplexity {perplexity["bf16"]:.2f} in bf16; {perplexity["nf4"]:.2f} in NF4 ({change["nf4"]:+.1%}, standard error
        {f["error"]["nf4"]:.1%}), {perplexity["nf4_dq"]:.2f} with double quantization, {perplexity["fp4"]:.2f} in FP4
        ({change["fp4"]:+.1%}): the demo of 135 million parameters, which comes from 4-bit weights itself"""
    return Finding(right_if(change["nf4_dq"] < 0.01, "depends"), fact, f, short=True)


def peers_gb(contender: str, shape: str = "2x2048x2") -> float:
    """Measured peak of a contender of peers.py on an H100. Shapes are rows x tokens x micro-batches."""
    return float(measured_cell(PEERS, contender=contender, shape=shape)["peak_gb"])


def memory_of_phi3() -> Figures:
    """Each term of this loop's step at 2 x 2,048 tokens with full checkpointing, and measured peaks, TRL's too."""
    model, config = phi3_mini(), TrainConfig(gradient_checkpointing="full", compile="layers", attn_implementation="sdpa")
    terms = {name: gb for name, gb in memory_terms(model, audit_targets(model, config), config, LENGTH).items() if gb}
    f = {"terms_gb": terms, "predicted_gb": sum(terms.values()), "states_gb": sum(terms[name] for name in STATES)}
    peaks = {"measured_gb": "ours_full_layers", "measured_none_gb": "ours_none", "trl_gb": "trl", "trl_best_gb": "trl_best"}
    return f | {name: peers_gb(contender) for name, contender in peaks.items()}


def total_2gb(source: Source, f: Figures) -> Finding:
    """QLoRA needs 2 GB in total."""
    f = f or memory_of_phi3()
    fact = f"""a step of 2 x 2,048 tokens with full checkpointing peaks at {f["measured_gb"]:.2f} GB in this loop with compiled
        layers ({f["predicted_gb"]:.2f} predicted), at {f["trl_gb"]:.2f} in SFTTrainer as it comes, {f["trl_best_gb"]:.2f}
        tuned; at {f["measured_none_gb"]:.2f} in this loop without checkpointing"""
    return Finding(right_if(min(f["measured_gb"], f["trl_gb"]) < 2.2), fact, f, PEERS, short=True)


def _96_7_percent(source: Source, f: Figures) -> Finding:
    """60 GB against 2 GB, 96.7 % less."""
    if not f:
        memory, full_gb = memory_of_phi3(), 16 * phi3_mini().num_parameters() / 1e9
        peak_gb, states_gb = memory["measured_gb"], memory["states_gb"]
        f = {"states": 1 - states_gb / full_gb, "peak": 1 - peak_gb / full_gb, "trl_peak": 1 - memory["trl_gb"] / full_gb}
        # All of the measured peak that is no weight, gradient or moment counts as activations, on both sides.
        f["with_activations"] = 1 - peak_gb / (full_gb + peak_gb - states_gb)
    fact = f"""like against like: weights, adapters, gradients and moments {f["states"]:.1%} less, with a step's activations on
        both sides {f["with_activations"]:.1%}. Measured peaks against the 60 GB, which lack activations: {f["peak"]:.1%} this
        loop with compiled layers, {f["trl_peak"]:.1%} SFTTrainer"""
    off = max(abs(f[name] - 0.967) for name in ("states", "with_activations"))
    return Finding(right_if(off < 0.01), fact, f, PEERS, short=True)


def peft_checkpointing(source: Source, f: Figures) -> Finding:
    """PEFT switches gradient checkpointing on."""
    if not f:
        plain = adapted(base_model("tiny-random", "nf4_dq"), ["qkv_proj"]).get_base_model()
        prepared = peft.prepare_model_for_kbit_training(base_model("tiny-random", "nf4_dq"))
        f = {"get_peft_model": plain.is_gradient_checkpointing}
        f["prepare_model_for_kbit_training"] = prepared.is_gradient_checkpointing
        f["cast_to_fp32"] = sum(parameter.dtype == torch.float32 for parameter in prepared.parameters())
        f["phi3_growth_gb"] = quantized_phi3()["rest_gb"]  # as much again
    adapting, preparing = f["get_peft_model"], f["prepare_model_for_kbit_training"]
    fact = f"""get_peft_model: {adapting}; prepare_model_for_kbit_training: {preparing}, and it casts {f["cast_to_fp32"]}
        tensors (embeddings, norms, head) to fp32, by its shape {f["phi3_growth_gb"]:.2f} GB more for Phi-3-mini. The guide
        imports both and calls neither: SFTTrainer checkpoints by itself"""
    verdict = right_if(adapting and preparing, "depends" if adapting or preparing else "wrong")
    return Finding(verdict, fact, f, short=True)


def saved_bytes(trainee: train_loop.Trainee, length: int) -> int:
    """Bytes that a forward pass over one row keeps for backward, without parameters and frozen weights."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*trainee.model.parameters(), *trainee.model.buffers())}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage  # which keeps it alive, so that nothing else gets its address
        return tensor

    ids = torch.arange(length)[None] % trainee.model.config.vocab_size  # [1, T]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        trainee.decoder(input_ids=ids, use_cache=False)
    return sum(storage.nbytes() for address, storage in kept.items() if address not in known)


def checkpointing_stores(source: Source, f: Figures) -> Finding:
    """With checkpointing outputs of layers are not stored."""
    if not f:
        f = {"saved_mb": {}, "longest": "512"}
        for policy in ("none", "full"):
            trainee = built(source.model, gradient_checkpointing=policy)
            f["saved_mb"][policy] = {f"{length}": saved_bytes(trainee, length) / 1e6 for length in (64, 128, 256, 512)}
        shape = trainee.model.config
        f["inputs_share"] = 2 * 512 * shape.hidden_size * shape.num_hidden_layers / 1e6 / f["saved_mb"]["full"]["512"]
    none, full = (f["saved_mb"][policy][f["longest"]] for policy in ("none", "full"))
    fact = f"""the input of each layer is, which is the output of the one before: {f["inputs_share"]:.0%} of what is kept. Kept
        for {f["longest"]} tokens of the demo: {none:.0f} MB without, {full:.0f} with; linear in the length"""
    return Finding(right_if(f["inputs_share"] < 0.1), fact, f, short=True)


def _6gb(source: Source, f: Figures) -> Finding:
    """A card of 6 GB, such as an RTX 2060 or RTX 3060, is enough."""
    if not f:
        f = {"peaks_gb": {
            "this loop with full checkpointing, 2 x 2,048": peers_gb("ours_full_layers"),
            "this loop without, 2 x 2,048": peers_gb("ours_none"),
            "this loop without, 1 x 512": peers_gb("ours_none", "1x512x4"),
            "SFTTrainer, 2 x 2,048": peers_gb("trl"),
            "SFTTrainer, 1 x 512": peers_gb("trl", "1x512x4"),
        }}  # fmt: skip
    fact = f"""peaks on an H100 (this loop compiled): {listed(f["peaks_gb"], ".2f", " GB")}, and a context of CUDA on top. bf16
        and flash_attention_2 want compute capability 8.0, an RTX 2060 has 7.5, so the script as it stands is not for it; and a
        desktop's RTX 3060 has 12 or 8 GB. No such card was measured"""
    return Finding(right_if(max(f["peaks_gb"].values()) < 5.5, "depends"), fact, f, PEERS, short=True)  # 0.5 for CUDA
