"""The claims of the teaching guide, in few words: how each is judged by its figures, and what is said of it.

Imports nothing heavy, so that report.py can render rows. `measure` names a function of guide_claims_cells.py or
guide_claims_demo.py; `runs` names those of guide_claims_training.py that it reads.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

Figures = dict[str, Any]
Verdict = Literal["right", "wrong", "depends"]


@dataclasses.dataclass(frozen=True)
class Claim:
    """One claim. Its figures come from `measure`; verdict and fact follow from them."""

    id: str
    claim: str
    measure: str
    judge: Callable[[Figures], Verdict]
    fact: Callable[[Figures], str]
    how: str = "measured"  # or computed, not measured, or the pattern of the results file that figures come from
    runs: tuple[str, ...] = ()  # names in guide_claims_training.py
    short: bool = False  # in the README too


def right_if(holds: bool, otherwise: Verdict = "wrong") -> Verdict:
    """The verdict of a claim that holds or does not."""
    return "right" if holds else otherwise


def listed(values: dict[str, float], form: str, unit: str = "") -> str:
    """`name: value unit`, separated by semicolons."""
    return "; ".join(f"{name}: {value:{form}}{unit}" for name, value in values.items())


LABELS = {"accidental": "o_proj and down_proj, which the guide's names match", "mlp": "MLP", "all, r=12": "all at r=12"}


def held_out(f: Figures) -> str:
    """Held-out losses of runs, and what they are to be compared with."""
    losses = {LABELS.get(name, name): run["held_out"] for name, run in f["runs"].items()}
    first = next(iter(f["runs"].values()))
    told = f"after {first['epochs']} epochs ({first['before']:.3f} before; two seeds differ by {f['seeds_differ_by']:.4f})"
    return f"held-out loss {told}: {listed(losses, '.4f')}"


def near(f: Figures, name: str, other: str, times: float = 2.0) -> bool:
    """Whether two runs' held-out losses are nearer than twice what two seeds differ by."""
    return abs(f["runs"][name]["held_out"] - f["runs"][other]["held_out"]) <= times * f["seeds_differ_by"]


TRAIN_STEP, LADDER, ATTENTION, DEMO = (
    "train_step_h100_*.json",
    "first_ladder_*.json",
    "attention_h100_*.json",
    "demo_cpu_*.json",
)

ADAPTERS = (
    Claim(
        "targets",
        "The seven Llama names adapt attention and MLP of Phi-3",
        "targets",
        lambda f: right_if(f["share"] == 1),
        lambda f: (
            f"they match {' and '.join(f['matched'])} alone: {f['guide']['layers']} of {f['right']['layers']} layers, "
            f"{f['guide']['parameters']:,} of {f['right']['parameters']:,} parameters ({f['share']:.0%}); PEFT gives "
            f"{f['warnings']} warnings. Phi-3 has {', '.join(f['own'])}"
        ),
        short=True,
    ),
    Claim(
        "targets-elsewhere",
        "The same list works with Llama, Mistral, Gemma",
        "other_models",
        lambda f: right_if(all(count == f["of"] for family, count in f["matched"].items() if family != "Phi-3")),
        lambda f: "names that match: " + ", ".join(f"{family} {count} of {f['of']}" for family, count in f["matched"].items()),
    ),
    Claim(
        "adapter-3mb",
        "Trained parameters take 3 MB",
        "adapter_bytes",
        lambda f: right_if(f["file_mb"] < 4),
        lambda f: (
            f"{f['parameters']:,} fp32 parameters, a file of {f['file_mb']:.0f} MB; with gradients and moments "
            f"{f['training_mb']:.0f}"
        ),
        short=True,
    ),
    Claim(
        "adapter-7mb",
        "Adapters are 7 x 2 x 32 x 4096 x 4 bytes, 7 MB",
        "adapter_bytes",
        lambda f: right_if(abs(f["guide_formula_mb"] / f["file_mb"] - 1) < 0.1),
        lambda f: (
            f"that is {f['guide_formula_mb']:.1f} MB, one layer of another model; all layers of Phi-3-mini {f['file_mb']:.0f} "
            "MB"
        ),
    ),
    Claim(
        "parameters-2rd",
        "An adapter has 2 r d parameters",
        "parameters_of_a_rank",
        lambda f: right_if(len(f["equal"]) == len(f["real"])),
        lambda f: (
            f"r (in + out): {listed(f['real'], ',')} against {f['formula']:,}; equal for {', '.join(f['equal'])}, the square "
            "one"
        ),
    ),
    Claim(
        "init-gaussian",
        "A starts Gaussian",
        "initialisation",
        lambda f: right_if(abs(f["kurtosis"] - 3) < 0.2),
        lambda f: (
            f"uniform within {f['largest_times_root_in']:.2f} / sqrt(in), kurtosis {f['kurtosis']:.2f} (uniform 1.8, Gaussian "
            "3); PEFT has Gaussian as an option"
        ),
    ),
    Claim(
        "ba-zero",
        "BA = 0 at the start",
        "start",
        lambda f: right_if(f["largest_difference"] == 0),
        lambda f: (
            f"largest difference of logits with and without adapters: {f['largest_difference']:g}; the first gradient of A is "
            f"{f['gradient']['lora_A']:g}, of B {f['gradient']['lora_B']:.3g} (norms)"
        ),
        short=True,
    ),
    Claim(
        "forward-formula",
        "The output is x W0 + x B A",
        "scale_and_dropout",
        lambda f: right_if(f["scale"] == 1),
        lambda f: (
            f"the update carries alpha / r, here {f['scale']:g} (the guide has it further down); and B A acts transposed on x"
        ),
    ),
    Claim(
        "alpha",
        "A higher alpha adapts more strongly",
        "alphas",
        lambda f: right_if(f["of_16"] > 2 and f["of_64"] > 2),
        lambda f: (
            "the update is in proportion to alpha / r, and so is the first gradient of B: its norm at r=32 by alpha is "
            f"{listed(f['norms'], '.3g')}"
        ),
    ),
    Claim(
        "gradients-frozen",
        "Only A and B get gradients; W0 stays",
        "frozen",
        lambda f: right_if(f["base_unchanged"] and f["moved"] == f["trained"]),
        lambda f: (
            f"after two steps {f['moved']} of {f['trained']} adapter tensors moved, the base is "
            f"{'the same bytes' if f['base_unchanged'] else 'changed'}"
        ),
    ),
    Claim(
        "dropout-place",
        "Dropout zeros 10 % of the LoRA activations",
        "scale_and_dropout",
        lambda f: right_if(f["zero_outputs"] > 0.05, "depends"),
        lambda f: (
            f"it acts on the input of A ({f['zero_inputs']:.1%} zeroed, the rest times {f['kept_value']:.3f}), not on what A "
            f"or B give: {f['zero_outputs']:.0%} of the outputs at rank 1"
        ),
    ),
)

NF4 = (
    Claim(
        "nf4-levels",
        "NF4's levels are symmetric: ±0.525, ±0.6961, ±1",
        "levels",
        lambda f: right_if(not f["missing"]),
        lambda f: (
            f"{f['below_zero']} below zero, an exact zero, {f['above_zero']} above; there is no "
            f"{' and no '.join(f'{level:g}' for level in f['missing'])}, but {f['levels'][-3]:g} and {f['levels'][-2]:g}"
        ),
        short=True,
    ),
    Claim(
        "nf4-blocks",
        "Weights are normalised to [-1, 1] and stored as 4-bit integers",
        "blocks",
        lambda f: right_if(f["block"] > 64, "depends"),
        lambda f: (
            f"by the largest of each {f['block']}, not of a weight; what is stored are indices of {f['indices']} levels, "
            f"{f['values_a_byte']:g} in a {f['stored_as']}"
        ),
    ),
    Claim(
        "bits-4.5",
        "NF4 takes 4 bits a parameter, 0.5 bytes",
        "bits",
        lambda f: right_if(f["single"] == 4),
        lambda f: f"{f['single']:.3f} bits with the fp32 scale of each block",
    ),
    Claim(
        "double-quantisation",
        "Double quantisation saves 0.37 bits a parameter",
        "bits",
        lambda f: right_if(abs(f["saved"] - 0.37) < 0.005),
        lambda f: f"{f['single']:.3f} to {f['double']:.3f} bits: {f['saved']:.3f}",
        short=True,
    ),
    Claim(
        "8x",
        "4-bit loading takes 8 times less than fp32",
        "quantized_model",
        lambda f: right_if(f["fp32_ratio"] >= 7.95),
        lambda f: f"{f['fp32_ratio']:.2f} times for all of Phi-3-mini, as embeddings and head stay in 16 bits",
    ),
    Claim(
        "75-percent",
        "QLoRA takes about 75 % less memory, as weights go from 32 bits to 4",
        "quantized_model",
        lambda f: right_if(abs(f["below_bf16"] - 0.75) < 0.02, "depends"),
        lambda f: (
            f"weights alone: {f['below_bf16']:.1%} less than in bf16, as they are published, {f['below_fp32']:.1%} less than "
            "in fp32; for training see below"
        ),
    ),
    Claim(
        "97.5-percent",
        "A 4096 x 4096 layer at rank 32 takes 97.5 % less",
        "layer_4096",
        lambda f: right_if(abs(f["stored"] - 0.975) < 0.01),
        lambda f: (
            f"{f['stored']:.1%}; with gradients and moments of A and B {f['training']:.1%}; the guide's own formula gives "
            f"{f['own_formula']:.1%}"
        ),
        short=True,
    ),
    Claim(
        "model-3.8gb",
        "The quantised model takes 3.8 GB, or 1.9 GB",
        "quantized_model",
        lambda f: right_if(min(abs(f["total_gb"] - said) for said in (1.9, 3.8)) < 0.1),
        lambda f: (
            f"{f['total_gb']:.2f} GB ({f['total_gib']:.2f} GiB): {f['linear_gb']:.2f} of linear layers in NF4, "
            f"{f['rest_gb']:.2f} of embeddings, head and norms in bf16"
        ),
        short=True,
    ),
    Claim(
        "clusters",
        "Quantisation clusters similar weights",
        "clusters",
        lambda f: right_if(not f["same_levels"]),
        lambda f: (
            "the levels are the same for any weight; one of 16 distinct values, which clustering would keep exactly, gets a "
            f"relative error of {f['error']['clustered']:.1%} (normal ones {f['error']['normal']:.1%})"
        ),
    ),
    Claim(
        "better-than-uniform",
        "NF4 is better than equally spaced levels",
        "four_bit_formats",
        lambda f: right_if(f["error"]["nf4"] < f["error"]["uniform"]),
        lambda f: f"relative error of normal weights, blocks of 64: {listed(f['error'], '.2%')}",
    ),
    Claim(
        "suits-networks",
        "NF4 suits the weights of neural networks",
        "format_errors",
        lambda f: right_if(f["nf4"] < f["uniform"]),
        lambda f: f"relative error of the demo's linear weights, blocks of 64: {listed(f, '.2%')} (equally spaced levels)",
    ),
    Claim(
        "quality-nf4",
        "4 bits cost about 0.5 % of accuracy",
        "quality",
        lambda f: right_if(f["change"]["nf4"] < 0.01, "depends"),
        lambda f: (
            f"perplexity {f['perplexity']['bf16']:.2f} in bf16, {f['perplexity']['nf4']:.2f} in NF4 "
            f"({f['change']['nf4']:+.1%}, standard error {f['error']['nf4']:.1%}) for the demo of 135 million parameters, "
            "which comes from 4-bit weights itself"
        ),
        short=True,
    ),
    Claim(
        "quality-double",
        "Double quantisation costs nothing",
        "quality",
        lambda f: right_if(abs(f["change"]["nf4_dq"] - f["change"]["nf4"]) < 2 * f["error"]["nf4"]),
        lambda f: f"perplexity {f['perplexity']['nf4']:.2f} without, {f['perplexity']['nf4_dq']:.2f} with",
    ),
    Claim(
        "quality-fp4",
        "NF4 loses less than FP4",
        "quality",
        lambda f: right_if(f["change"]["nf4"] < f["change"]["fp4"]),
        lambda f: (
            f"perplexity {f['perplexity']['fp4']:.2f} in FP4 ({f['change']['fp4']:+.1%}), {f['perplexity']['nf4']:.2f} in NF4"
        ),
    ),
    Claim(
        "quality-int8",
        "INT8 is good for serving",
        "quality",
        lambda f: right_if(abs(f["change"]["int8"]) < 0.01, "depends"),
        lambda f: (
            f"perplexity {f['perplexity']['int8']:.2f} in int8 ({f['change']['int8']:+.2%}), {f['perplexity']['bf16']:.2f} in "
            "bf16; speed was not measured"
        ),
    ),
)

MEMORY = (
    Claim(
        "parameters-3.8b",
        "Phi-3-mini has 3.8 billion parameters, 15.2 GB in fp32",
        "model_size",
        lambda f: right_if(round(f["parameters"] / 1e9, 1) == 3.8),
        lambda f: f"{f['parameters']:,}, {f['fp32_gb']:.2f} GB",
    ),
    Claim(
        "printed-size",
        "sum(p.numel()) prints the model's size",
        "printed_size",
        lambda f: right_if(f["share"] > 0.99),
        lambda f: (
            f"in NF4 it counts bytes of two weights each: {f['printed_m']:.1f} million for {f['real_m']:.1f} "
            f"({f['share']:.0%}), the demo"
        ),
    ),
    Claim(
        "total-2gb",
        "QLoRA needs 2 GB in total",
        "memory_of_phi3",
        lambda f: right_if(f["measured_gb"] < 1.1 * f["guide_gb"]),
        lambda f: (
            f"a step of 2 x 2,048 tokens peaks at {f['measured_gb']:.2f} GB with full checkpointing ({f['predicted_gb']:.2f} "
            f"predicted), at {f['measured_none_gb']:.2f} without"
        ),
        how=LADDER,
        short=True,
    ),
    Claim(
        "memory-terms",
        "Memory of weights, adapters, gradients and Adam follows from the shape",
        "memory_terms",
        lambda f: right_if(f["worst"] < 0.01),
        lambda f: (
            f"to {f['worst']:.3%}, each weighed after a step of the demo; but activations, logits and what a layer works with "
            "come on top"
        ),
    ),
    Claim(
        "60gb",
        "Full fine-tuning in fp32 with Adam takes 60 GB",
        "full_fine_tuning",
        lambda f: right_if(abs(f["gb"] / f["guide_gb"] - 1) < 0.02),
        lambda f: f"16 bytes a parameter: {f['gb']:.1f} GB, without activations",
        how="computed",
    ),
    Claim(
        "96.7-percent",
        "60 GB against 2 GB, 96.7 % less",
        "reduction",
        lambda f: right_if(abs(f["measured"] - f["guide"]) < 0.01),
        lambda f: (
            f"{f['measured']:.1%} by the measured peak of {f['peak_gb']:.2f} GB; and the 60 GB lack the activations that the "
            "peak has"
        ),
        how=LADDER,
        short=True,
    ),
    Claim(
        "peft-checkpointing",
        "PEFT switches gradient checkpointing on",
        "peft_and_checkpointing",
        lambda f: right_if(f["get_peft_model"]),
        lambda f: (
            f"get_peft_model: {f['get_peft_model']}; prepare_model_for_kbit_training: {f['prepare_model_for_kbit_training']}, "
            f"and it casts embeddings, norms and head to fp32, +{f['phi3_growth_gb']:.2f} GB for Phi-3-mini"
        ),
        short=True,
    ),
    Claim(
        "trl-checkpointing",
        "SFTTrainer checkpoints by itself",
        "trl_checkpointing",
        lambda f: right_if(f["trl"]["peak_gib"] < 0.9 * f["trl_no_checkpointing"]["peak_gib"], "depends"),
        lambda f: (
            f"{f['version']} does: peak {f['trl']['peak_gib']:.2f} GiB and {f['trl']['step_ms']:,.0f} ms a step as it comes, "
            f"{f['trl_no_checkpointing']['peak_gib']:.2f} and {f['trl_no_checkpointing']['step_ms']:,.0f} when told not to "
            "(the demo)"
        ),
        how="peers_cpu_*.json",
    ),
    Claim(
        "checkpointing-stores",
        "With checkpointing outputs of layers are not stored",
        "checkpointing",
        lambda f: right_if(f["inputs_share"] < 0.1),
        lambda f: (
            f"the input of each layer is, which is the output of the one before: {f['inputs_share']:.0%} of what is kept. Kept "
            f"for {f['longest']} tokens of the demo: {f['saved_mb']['none'][f['longest']]:.0f} MB without, "
            f"{f['saved_mb']['full'][f['longest']]:.0f} with; linear in the length"
        ),
        short=True,
    ),
    Claim(
        "checkpointing-gpu",
        "Checkpointing helps against running out of memory",
        "checkpointing_gpu",
        lambda f: right_if(f["full"]["peak_gib"] < 0.5 * f["none"]["peak_gib"]),
        lambda f: (
            f"2 x 2,048 tokens: {f['none']['peak_gib']:.1f} to {f['full']['peak_gib']:.1f} GiB, for {f['none']['step_ms']:.0f} "
            f"to {f['full']['step_ms']:.0f} ms a step; 1 x 8,192: {f['at_8192_gib']['none']:.1f} to "
            f"{f['at_8192_gib']['full']:.1f} GiB"
        ),
        how=TRAIN_STEP,
    ),
    Claim(
        "oom-advice",
        "Batch 1, 512 tokens, rank 16 help too",
        "out_of_memory",
        lambda f: right_if(f["1x512"] < 0.5 * f["none_2x2048"] and f["half_rank_gib"] > 2, "depends"),
        lambda f: (
            f"fewer tokens do: {f['none_2x2048']:.1f} GiB at 2 x 2,048, {f['1x512']:.1f} at 1 x 512, without checkpointing; "
            f"half the rank saves {f['half_rank_gib']:.2f}"
        ),
        how=LADDER,
    ),
    Claim(
        "6gb",
        "A card of 6 GB, such as an RTX 2060, is enough",
        "small_card",
        lambda f: right_if(len(f["fits"]) == len(f["peaks_gib"]), "depends"),
        lambda f: (
            f"peaks on an H100: {listed(f['peaks_gib'], '.2f', ' GiB')}, and a context of CUDA on top. bf16 and "
            "flash_attention_2 want compute capability 8.0, an RTX 2060 has 7.5, so the script as it stands is not for it; no "
            "such card was measured"
        ),
        how=LADDER,
        short=True,
    ),
    Claim(
        "only-adapters",
        "Only adapters are saved, not the model",
        "checkpoint_contents",
        lambda f: right_if(f["checkpoint_mb"] < 0.2 * f["model_gb"] * 1e3, "depends"),
        lambda f: (
            f"a checkpoint to go on from takes {f['checkpoint_mb']:.0f} MB (adapter and two moments, {f['adapter_mb']:.0f} "
            f"each), the model {f['model_gb']:.1f} GB"
        ),
        how="kill_resume_*.json",
    ),
)

ATTENTION_CLAIMS = (
    Claim(
        "flash-kernel",
        "Flash attention is 2 to 3 times as fast as standard attention",
        "flash_speed",
        lambda f: right_if(2 <= f["kernel_against_eager"] <= 3 and f["kernel_against_sdpa"] >= 2, "depends"),
        lambda f: (
            f"the kernel at {f['length']:,} tokens: {f['kernel_against_eager']:.1f} times as fast as eager, "
            f"{f['kernel_against_sdpa']:.2f} times as sdpa, which is the default and flash as well"
        ),
        how=ATTENTION,
        short=True,
    ),
    Claim(
        "flash-training",
        "Training gets 2 to 3 times as fast by it",
        "flash_speed",
        lambda f: right_if(f["step_against_sdpa"] >= 2),
        lambda f: (
            f"a step of 2 x {f['length']:,} tokens: {f['step_against_eager']:.2f} times as fast as with eager, "
            f"{f['step_against_sdpa']:.2f} as with sdpa; at 8,192, where the window acts, "
            f"{f['step_at_8192_against_eager']:.1f} and {f['step_at_8192_against_sdpa']:.2f}"
        ),
        how=ATTENTION,
        short=True,
    ),
    Claim(
        "flash-memory",
        "Memory falls from O(N²) to O(N)",
        "flash_memory",
        lambda f: right_if(f["growth_gib"]["flash_attention_2"] < 0.25 * f["growth_gib"]["eager"]),
        lambda f: (
            f"peak of a step from 4,096 to 8,192 tokens: {listed(f['growth_gib'], '+.1f', ' GiB')}. At 2 x 2,048, with "
            f"checkpointing, eager costs {f['at_2048_gib']['eager'] - f['at_2048_gib']['sdpa']:.1f} GiB more than either"
        ),
        how=ATTENTION,
    ),
    Claim(
        "sdpa-slower",
        "sdpa is the slower way out",
        "flash_speed",
        lambda f: right_if(f["step_against_sdpa"] > 1 and f["step_at_8192_against_sdpa"] > 1, "depends"),
        lambda f: (
            f"a step with sdpa takes {f['step_against_sdpa']:.2f} times as long at 2,048 tokens, "
            f"{f['step_at_8192_against_sdpa']:.2f} times at 8,192, where the window makes it take a mask"
        ),
        how=ATTENTION,
    ),
)

PRECISION = (
    Claim(
        "bf16-bits",
        "bf16 has 8 exponent and 7 mantissa bits, and more range than fp16",
        "float_formats",
        lambda f: right_if((f["exponent"], f["mantissa"]) == (8, 7) and f["bf16_largest"] > f["fp16_largest"]),
        lambda f: (
            f"{f['exponent']} and {f['mantissa']}; largest {f['bf16_largest']:.1e} against {f['fp16_largest']:.1e}, steps "
            f"{f['fp16_eps_ratio']:g} times as wide"
        ),
    ),
    Claim(
        "fp16-with-bf16",
        "fp16=True goes with bf16 compute",
        "mixed_precision",
        lambda f: right_if(not any(f["error"].values())),
        lambda f: (
            f"loaded in bf16, as transformers 5 does, on a CPU the first forward fails: {f['error']['bf16']}; loaded in fp16: "
            f"{f['error']['fp16'] or 'it runs, and each product rounds to bf16 and back'}"
        ),
        short=True,
    ),
    Claim(
        "loss-fp16",
        "The loss is computed in fp16",
        "dtypes",
        lambda f: right_if(f["loss"] == "float16"),
        lambda f: f"under fp16 autocast: logits {f['logits']}, loss {f['loss']}",
    ),
    Claim(
        "backward-fp32",
        "Backward runs in fp32",
        "dtypes",
        lambda f: right_if(f["gradient"] == "float32"),
        lambda f: f"each gradient has its forward's dtype: {f['gradient']} at a layer's output of {f['layer']}",
    ),
    Claim(
        "dequantised",
        "Weights are dequantised during computation",
        "dtypes",
        lambda f: right_if(f["compute"] == "bfloat16"),
        lambda f: f"to {f['compute']} for each product, whatever autocast says",
    ),
)

SCHEDULE = (
    Claim(
        "default-scheduler",
        "The rate decays by a cosine by default",
        "scheduler_default",
        lambda f: right_if(f["default"] == "cosine"),
        lambda f: f"{f['default']} in transformers {f['transformers']}; the guide's script names none",
        short=True,
    ),
    Claim(
        "schedule-formula",
        "After warmup the rate is 0.5 (1 + cos(pi t / total))",
        "schedule_formula",
        lambda f: right_if(f["largest_difference"] < 1e-6),
        lambda f: (
            f"warmup has to be taken off both: of the peak, {f['peak']['guide']:.3f} for {f['peak']['real']:.3f} when it ends, "
            f"{f['at_60']['guide']:.3f} for {f['at_60']['real']:.3f} at step 60 of 120"
        ),
    ),
    Claim(
        "first-update",
        "In warmup the rate is t / warmup",
        "first_rate",
        lambda f: right_if(f["transformers"] > 0, "depends"),
        lambda f: (
            f"so it is in transformers, and the first update is of rate {f['transformers']:g}: nothing moves. Here it starts "
            f"at {f['here']:.3f} of the peak"
        ),
    ),
    Claim(
        "configuration-runs",
        "The printed training configuration is accepted",
        "scheduler_default",
        lambda f: right_if(f["warmup_ratio"] is None),
        lambda f: (
            f"transformers {f['transformers']} answers warmup_ratio with a {f['warmup_ratio']}; warmup_steps takes a share now"
        ),
    ),
    Claim(
        "110-steps",
        "22 examples and 20 epochs make 110 steps",
        "steps",
        lambda f: right_if(f["total"] == 110),
        lambda f: f"{f['total']}: {f['per_epoch']} an epoch, the last of {f['windows'][-1]} examples; {f['warmup']} are warmup",
        short=True,
    ),
    Claim(
        "batch-4",
        "The effective batch is 4",
        "steps",
        lambda f: right_if(set(f["windows"]) == {4}, "depends"),
        lambda f: f"in an epoch: {', '.join(map(str, f['windows']))}",
    ),
    Claim(
        "accumulation",
        "Each micro-batch's loss is divided by the number of micro-batches",
        "accumulation",
        lambda f: right_if(max(window["error"] for window in f["windows"].values()) < 1e-3),
        lambda f: (
            "then a token of a short answer weighs more: the gradient is off by "
            + ", ".join(f"{w['error']:.1%} for {w['tokens'][0]} and {w['tokens'][1]} tokens" for w in f["windows"].values())
        ),
        short=True,
    ),
    Claim(
        "batch-noise",
        "A larger batch estimates the gradient better",
        "batch_noise",
        lambda f: right_if(list(f["cosine"].values()) == sorted(f["cosine"].values())),
        lambda f: f"likeness to the gradient of all 22 examples: {listed(f['cosine'], '.3f')} (examples: cosine)",
    ),
)

TOKENS = (
    Claim(
        "no-pad-token",
        "Phi-3 defines no pad token",
        "pad_token",
        lambda f: right_if(f["pad"] is None),
        lambda f: (
            f"transformers' Phi-3 configuration has pad {f['pad']} and eos {f['eos']}; the tokenizer's own file was not at hand"
        ),
    ),
    Claim(
        "pad-eos",
        "pad = eos prevents trouble in generation",
        "pad_labels",
        lambda f: right_if(f["collator"] == f["examples"]),
        lambda f: (
            f"DataCollatorForLanguageModeling masks labels by id: {f['collator']} of {f['examples']} stop tokens stay trained, "
            f"so that nothing teaches the model to stop. Masked by length, as here: {f['here']}"
        ),
        short=True,
    ),
    Claim(
        "add-pad",
        "Or add a token [PAD]",
        "added_pad",
        lambda f: right_if(f["error"] is None, "depends"),
        lambda f: (
            f"id {f['id']} in {f['rows']} rows of embeddings: {f['error']} in the first forward (the tiny model); Phi-3's "
            f"{f['phi3_rows']:,} rows have room for it, but nothing trained"
        ),
    ),
    Claim(
        "format-boundaries",
        "The format makes boundaries easy to learn",
        "stop_token",
        lambda f: right_if(f["guide"] == f["examples"]),
        lambda f: f"{f['guide']} of {f['examples']} formatted texts end with a stop token; here {f['here']} do",
    ),
    Claim(
        "format-instruct",
        "### Instruction is what instruct models know",
        "prompt_forms",
        lambda f: right_if(f["loss"]["plain"] <= f["loss"]["chat"], "depends"),
        lambda f: f"loss of the held-out answers, before training: {listed(f['loss'], '.3f')} (the demo and its chat template)",
    ),
    Claim(
        "jsonl-streams",
        "JSONL is there to be streamed",
        "streaming",
        lambda f: right_if(f["default"] == "IterableDataset", "depends"),
        lambda f: f"load_dataset gives a {f['default']}, mapped from disk; with streaming=True an {f['streaming']}",
    ),
)

LOADING = (
    Claim(
        "trust-remote-code",
        "trust_remote_code is required for some models",
        "native_class",
        lambda f: right_if(not f["module"].startswith("transformers."), "depends"),
        lambda f: f"not for Phi-3: {f['module']}",
    ),
    Claim(
        "device-map",
        'device_map="auto" puts layers 21 to 32 on the CPU where room lacks',
        "offloading",
        lambda f: right_if(not f["refused"]),
        lambda f: (
            "in 4 bits loading refuses it with a ValueError unless fp32 offloading is asked for; and layers go from 0 to 31"
        ),
    ),
    Claim(
        "adapters-in-output-dir",
        "Adapters can be loaded from output_dir",
        "adapter_place",
        lambda f: right_if(f["in_output_dir"]),
        lambda f: f"without save_model() they lie in {', '.join(f['folders'])} of it alone",
    ),
    Claim(
        "merge",
        "For deployment merge into the unquantised model",
        "merging",
        lambda f: right_if(f["merged"]["bf16"]["relative"] <= f["merged"]["dequantised"]["relative"], "depends"),
        lambda f: (
            f"held-out perplexity {f['without']['perplexity']:.3f} without the adapter, {f['beside']['perplexity']:.3f} with "
            "it beside NF4; merged into "
            + ", ".join(
                f"{route} weights {m['perplexity']:.3f} (logits off by {m['relative']:.1%})" for route, m in f["merged"].items()
            )
        ),
        short=True,
    ),
    Claim(
        "kv-cache",
        "A KV cache has to be implemented for generation",
        "kv_cache",
        lambda f: right_if(not f["default"]),
        lambda f: (
            f"generate() has it unasked; without it {f['new_tokens']} tokens behind 128 take {f['factor']:.1f} times as long "
            "(the demo)"
        ),
    ),
)

TRAINING = (
    Claim(
        "target-modules",
        "Attention and MLP together show the best results",
        "target_quality",
        lambda f: right_if(
            all(f["runs"]["all"]["held_out"] <= run["held_out"] + f["seeds_differ_by"] for run in f["runs"].values())
        ),
        held_out,
        runs=("BASE", "ANOTHER_SEED", "TARGETS"),
        short=True,
    ),
    Claim(
        "rank-quality",
        "A higher rank has more capacity",
        "ranks",
        lambda f: right_if(f["runs"]["128"]["held_out"] < f["runs"]["8"]["held_out"] and not near(f, "8", "128"), "depends"),
        held_out,
        runs=("BASE", "ANOTHER_SEED", "RANKS"),
    ),
    Claim(
        "rank-memory",
        "A higher rank costs memory and speed",
        "rank_cost",
        lambda f: right_if(f["ranks"][f["highest"]]["step_s"] > 1.1 * f["ranks"][f["lowest"]]["step_s"], "depends"),
        lambda f: (
            "memory of adapters, gradients and moments, and a step: "
            + "; ".join(f"r={rank} {row['training_mb']:.1f} MB, {row['step_s']:.2f} s" for rank, row in f["ranks"].items())
            + f" (the demo; its frozen base takes {f['ranks'][f['highest']]['base_mb']:.0f} MB)"
        ),
        short=True,
    ),
    Claim(
        "dropout",
        "Dropout of 0.1 is essential and prevents memorisation",
        "dropouts",
        lambda f: right_if(
            f["runs"]["0.1"]["held_out"] < f["runs"]["0.0"]["held_out"]
            and f["runs"]["0.1"]["train_loss_without_dropout"] > 2 * f["runs"]["0.0"]["train_loss_without_dropout"]
            and not near(f, "0.0", "0.1")
        ),
        lambda f: (
            held_out(f)
            + "; loss on the training data, dropout off: "
            + listed({name: run["train_loss_without_dropout"] for name, run in f["runs"].items()}, ".4f")
        ),
        runs=("BASE", "ANOTHER_SEED", "DROPOUTS"),
        short=True,
    ),
    Claim(
        "learning-rate",
        "LoRA wants a rate below pre-training's, such as 5e-5, and is sensitive to high ones",
        "rates",
        lambda f: right_if(f["runs"]["5e-05"]["held_out"] <= f["runs"]["0.0004"]["held_out"], "depends"),
        held_out,
        runs=("BASE", "ANOTHER_SEED", "RATES"),
        short=True,
    ),
    Claim(
        "weight-decay",
        "Without weight decay the loss falls better",
        "decay",
        lambda f: right_if(f["runs"]["0"]["held_out"] < f["runs"]["0.01"]["held_out"] - f["seeds_differ_by"]),
        held_out,
        runs=("BASE", "ANOTHER_SEED", "NO_DECAY"),
    ),
    Claim(
        "knowledge",
        "The base model's knowledge is preserved",
        "knowledge",
        lambda f: right_if(f["change"] < 0.02, "depends"),
        lambda f: (
            f"perplexity on a text that has nothing to do with the task: {f['before']:.2f} before, {f['after']:.2f} after "
            f"({f['change']:+.1%}); {f['too_high_rate']:.3g} after a run with too high a rate"
        ),
        runs=("BASE", "RATES"),
    ),
    Claim(
        "signs",
        "A good run: loss 2.5 to 0.5, gradient norm 1 to 10",
        "signs",
        lambda f: right_if(f["last_loss"] > 0.4 and f["smallest_norm"] >= 1),
        lambda f: (
            f"the demo's: loss {f['first_loss']:.2f} to {f['last_loss']:.3f} in {f['steps']} steps, norm "
            f"{f['largest_norm']:.2f} to {f['smallest_norm']:.3f}; both depend on the data"
        ),
        runs=("BASE",),
    ),
    Claim(
        "success",
        "A lower held-out loss shows that training worked",
        "signs_of_success",
        lambda f: right_if(f["lowest"]["right"] >= f["default"]["right"], "depends"),
        lambda f: (
            f"from {f['default']['before']:.3f} to {f['default']['best']:.4f}, and {f['default']['right']} of {f['of']} "
            f"answers right, {f['default']['right_before']} before; but the rate that gets lowest, {f['lowest']['rate']:g} "
            f"with {f['lowest']['best']:.4f}, has {f['lowest']['right']}"
        ),
        how=DEMO,
    ),
    Claim(
        "20-epochs",
        "A small data set needs 20 epochs",
        "epochs",
        lambda f: right_if(f["within_a_tenth"] > 15, "depends"),
        lambda f: (
            f"held-out loss is within a tenth of its lowest after {f['within_a_tenth']}; lowest after {f['best_epoch']} "
            f"({f['best']:.4f}), {f['last']:.4f} after {f['epochs']}"
        ),
        how=DEMO,
    ),
)

OPEN = tuple(
    Claim(name, claim, "nothing", lambda f: "depends", lambda f, why=why: why, how="not measured")
    for name, claim, why in (
        ("cost", "Full training costs $100 an hour, QLoRA $5", "the guide has no source, and prices are not measured here"),
        ("convergence", "LoRA converges faster than full fine-tuning on little data", "full fine-tuning was not run"),
        ("skip-norms", "Adapting embeddings and norms gains less", "the loop trains neither"),
        (
            "100k-examples",
            "Beyond 100,000 examples fine-tune fully",
            "the guide has no source, and the bundled data are 22 examples",
        ),
        ("rtx-cards", "RTX 3060 to RTX 4070 do", "the one GPU at hand was an H100"),
        ("ampere", "Flash attention needs Ampere and CUDA 11.8", "no older card or CUDA was at hand"),
        ("serving", "vLLM, TGI and ONNX serve what comes out", "no server was run"),
        ("bf16-speed", "bf16 is faster than fp32", "products in fp32 were not timed on the GPU"),
    )
)

GROUPS = {
    "Adapters": ADAPTERS,
    "NF4": NF4,
    "Memory": MEMORY,
    "Attention": ATTENTION_CLAIMS,
    "Precision": PRECISION,
    "Schedule, steps and batches": SCHEDULE,
    "Tokens and data": TOKENS,
    "Loading, merging, generating": LOADING,
    "Training": TRAINING,
    "Not measured": OPEN,
}
CLAIMS = {claim.id: claim for group in GROUPS.values() for claim in group}
