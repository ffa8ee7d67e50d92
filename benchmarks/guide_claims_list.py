"""The claims of the teaching guide, in few words: how each is judged by its figures, and what is said of it.

Imports nothing heavy, so that report.py can render rows. `measure` names a function of guide_claims_cells.py or
guide_claims_demo.py; `runs` names those of guide_claims_training.py that it reads.
"""

import dataclasses
import itertools
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
    # measured; computed from shapes; read from the library, its defaults and tables; not measured; or the pattern of a file
    how: str = "measured"
    runs: tuple[str, ...] = ()  # names in guide_claims_training.py
    short: bool = False  # in the README too


def right_if(holds: bool, otherwise: Verdict = "wrong") -> Verdict:
    """The verdict of a claim that holds or does not."""
    return "right" if holds else otherwise


def listed(values: dict[str, float], spec: str, unit: str = "") -> str:
    """`name: value unit`, separated by semicolons."""
    return "; ".join(f"{name}: {value:{spec}}{unit}" for name, value in values.items())


LABELS = {"accidental": "o_proj and down_proj, which the guide's names match", "mlp": "MLP", "all, r=12": "all at r=12"}


def eval_losses(f: Figures) -> str:
    """Eval losses of runs, and what they are to be compared with."""
    losses = {LABELS.get(name, name): run["held_out"] for name, run in f["runs"].items()}
    first = next(iter(f["runs"].values()))
    apart = f"the one pair of seeds differs by {f['seeds_differ_by']:.4f}"
    told = f"after {first['epochs']} epochs ({first['before']:.3f} before; {apart})"
    return f"eval loss {told}: {listed(losses, '.4f')}"


def too_short(f: Figures) -> bool:
    """Whether runs are shorter than the guide's 20 epochs, so that they do not show what it says of those."""
    return bool(next(iter(f["runs"].values()))["epochs"] < 20)


def unsettled(f: Figures) -> str:
    """Said before what runs show that are too short."""
    return f"not settled in {6 * next(iter(f['runs'].values()))['epochs']} steps: " if too_short(f) else ""


def grows(f: Figures, what: str) -> bool:
    """Whether each rank costs at least a tenth more of it than the one before."""
    values = [row[what] for row in f["ranks"].values()]
    return all(later > 1.1 * earlier for earlier, later in itertools.pairwise(values))


def near(f: Figures, name: str, other: str, times: float = 2.0) -> bool:
    """Whether two runs' eval losses are nearer than twice what two seeds differ by."""
    return abs(f["runs"][name]["held_out"] - f["runs"][other]["held_out"]) <= times * f["seeds_differ_by"]


TRAIN_STEP, PEERS, ATTENTION, DEMO = (
    "train_step_h100_*.json",
    "peers_h100_*.json",
    "attention_h100_*.json",
    "demo_cpu_*.json",
)
COMMANDS = {  # that made the files which figures come from
    TRAIN_STEP: "python benchmarks/train_step.py",
    PEERS: "python benchmarks/peers.py",
    ATTENTION: "python benchmarks/attention.py",
    DEMO: "python benchmarks/demo.py",
    "peers_cpu_*.json": "python benchmarks/peers.py",
    "kill_resume_*.json": "python benchmarks/kill_resume.py",
}
LIBRARY = "read from the library"


def ratios(f: Figures, backend: str) -> dict[str, float]:
    """By length and checkpointing: how many times as long a step with `backend` takes as with flash_attention_2; medians."""
    steps = {name: (row[backend], row["flash_attention_2"]) for name, row in f["steps"].items()}
    return {name: other[0] / flash[0] for name, (other, flash) in steps.items() if other and flash}


def is_slower(f: Figures, backend: str) -> dict[str, bool | None]:
    """Whether a step with `backend` is slower than with flash_attention_2; None where the spreads overlap."""
    found: dict[str, bool | None] = {}
    for name, row in f["steps"].items():
        if row[backend] and row["flash_attention_2"]:
            (_, low, high), (_, flash_low, flash_high) = row[backend], row["flash_attention_2"]
            found[name] = True if low > flash_high else False if high < flash_low else None
    return found


def spread(f: Figures, name: str) -> str:
    """Median and 10th to 90th percentile of a step, for each backend."""
    label = {"flash_attention_2": "flash"}
    return ", ".join(
        f"{label.get(backend, backend)} {ms[0]:,.0f} ({ms[1]:,.0f}-{ms[2]:,.0f})" if ms else f"{backend} out of memory"
        for backend, ms in f["steps"][name].items()
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
        how=LIBRARY,
    ),
    Claim(
        "adapter-3mb",
        "Trained parameters take 3 MB",
        "adapter_bytes",
        lambda f: right_if(f["file_mb"] < 4),
        lambda f: (
            f"{f['parameters']:,} fp32 parameters, a file of {f['file_mb']:.0f} MB; with gradients and moments, weighed after "
            f"a step of AdamW, {f['training_mb']:.0f}"
        ),
        short=True,
    ),
    Claim(
        "adapter-7mb",
        "Adapters are 7 x 2 x 32 x 4096 x 4 bytes, 7 MB",
        "adapter_formula",
        lambda f: right_if(abs(f["guide_mb"] / f["real_mb"] - 1) < 0.1),
        lambda f: (
            f"that is {f['guide_mb']:.1f} MB, one layer of another model; all layers of Phi-3-mini, 4 r (in + out) bytes each, "
            f"{f['real_mb']:.0f} MB"
        ),
        how="computed",
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
        how="computed",
    ),
    Claim(
        "init-gaussian",
        "A starts Gaussian",
        "initialization",
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
        lambda f: right_if(f["scale"] == 1, "depends"),
        lambda f: f"it is where alpha = r: the update carries alpha / r, here {f['scale']:g}, as the guide has it further down",
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
        how=LIBRARY,
        short=True,
    ),
    Claim(
        "nf4-blocks",
        "Weights are normalized to [-1, 1] and stored as 4-bit integers",
        "blocks",
        lambda f: right_if(f["block"] >= f["elements"], "depends"),
        lambda f: (
            f"by the largest of each {f['block']}, not of a weight; what is stored are indices of {f['indices']} levels, "
            f"{f['values_a_byte']:g} in a {f['stored_as']}"
        ),
    ),
    Claim(
        "bits-4.5",
        "NF4 takes 4 bits a parameter, 0.5 bytes",
        "bits",
        lambda f: right_if(abs(f["double"] / 4 - 1) < 0.01),
        lambda f: (
            f"{f['double']:.3f} bits with double quantization, which the guide has on: {f['double'] / 4 - 1:.0%} more, for the "
            f"scales of blocks; {f['single']:.3f} without"
        ),
    ),
    Claim(
        "double-quantization",
        "Double quantization saves 0.37 bits a parameter",
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
        "QLoRA reduces memory usage by about 75 %",
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
        "The quantized model takes 3.8 GB, or 1.9 GB",
        "quantized_model",
        lambda f: right_if(min(abs(f["total_gb"] - said) for said in (1.9, 3.8)) < 0.1),
        lambda f: (
            f"{f['total_gb']:.2f} GB: {f['linear_gb']:.2f} of linear layers in NF4, "
            f"{f['rest_gb']:.2f} of embeddings, head and norms in bf16"
        ),
        short=True,
    ),
    Claim(
        "clusters",
        "Quantization clusters similar weights",
        "clusters",
        lambda f: right_if(not f["same_levels"], "depends"),
        lambda f: (
            "neighbors share a level, but levels are the same for any weight, not fitted to clusters: 16 distinct values, "
            f"which clustering would keep exactly, get a relative error of {f['error']['clustered']:.1%}, normal ones "
            f"{f['error']['normal']:.1%}"
        ),
    ),
    Claim(
        "better-than-uniform",
        "NF4 is better than uniform quantization",
        "four_bit_formats",
        lambda f: right_if(all(f["error"]["nf4"] < error for name, error in f["error"].items() if "uniform" in name)),
        lambda f: (
            f"relative error of normal weights, blocks of 64, 16 levels each: {listed(f['error'], '.2%')} (uniform: -1 to 1; "
            "or -8 to 7 by a signed scale)"
        ),
    ),
    Claim(
        "suits-networks",
        "NF4 is optimized for the weights of neural networks",
        "format_errors",
        lambda f: right_if(all(f["nf4"] < error for name, error in f.items() if name != "nf4")),
        lambda f: f"relative error of the demo's linear weights, blocks of 64, 16 levels each: {listed(f, '.2%')}",
    ),
    Claim(
        "quality-nf4",
        "4 bits cost about 0.5 % of accuracy",
        "quality",
        lambda f: right_if(f["change"]["nf4_dq"] < 0.01, "depends"),
        lambda f: (
            f"perplexity {f['perplexity']['bf16']:.2f} in bf16; {f['perplexity']['nf4']:.2f} in NF4 "
            f"({f['change']['nf4']:+.1%}, standard error {f['error']['nf4']:.1%}), {f['perplexity']['nf4_dq']:.2f} with double "
            f"quantization, {f['perplexity']['fp4']:.2f} in FP4 ({f['change']['fp4']:+.1%}): the demo of 135 million "
            "parameters, which comes from 4-bit weights itself"
        ),
        short=True,
    ),
    Claim(
        "quality-int8",
        "Use INT8 quantization for inference",
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
        lambda f: f"{f['parameters']:,}, {f['fp32_gb']:.2f} GB, by transformers' own shape",
        how=LIBRARY,
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
        lambda f: right_if(min(f["measured_gb"], f["trl_gb"]) < 1.1 * f["guide_gb"]),
        lambda f: (
            f"a step of 2 x 2,048 tokens with full checkpointing peaks at {f['measured_gb']:.2f} GB in this loop with compiled "
            f"layers ({f['predicted_gb']:.2f} predicted), at {f['trl_gb']:.2f} in SFTTrainer as it comes, "
            f"{f['trl_best_gb']:.2f} tuned; at {f['measured_none_gb']:.2f} in this loop without checkpointing"
        ),
        how=PEERS,
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
        lambda f: right_if(max(abs(f[name] - f["guide"]) for name in ("states", "with_activations")) < 0.01),
        lambda f: (
            f"like against like: weights, adapters, gradients and moments {f['states']:.1%} less, with a step's activations on "
            f"both sides {f['with_activations']:.1%}. Measured peaks against the 60 GB, which lack activations: "
            f"{f['peak']:.1%} this loop with compiled layers, {f['trl_peak']:.1%} SFTTrainer"
        ),
        how=PEERS,
        short=True,
    ),
    Claim(
        "peft-checkpointing",
        "PEFT switches gradient checkpointing on",
        "peft_and_checkpointing",
        lambda f: right_if(
            f["get_peft_model"] and f["prepare_model_for_kbit_training"],
            "depends" if f["get_peft_model"] or f["prepare_model_for_kbit_training"] else "wrong",
        ),
        lambda f: (
            f"get_peft_model: {f['get_peft_model']}; prepare_model_for_kbit_training: {f['prepare_model_for_kbit_training']}, "
            f"and it casts {f['cast_to_fp32']} tensors (embeddings, norms, head) to fp32, by its shape "
            f"{f['phi3_growth_gb']:.2f} GB more for Phi-3-mini. The guide imports both and calls neither: SFTTrainer "
            "checkpoints by itself"
        ),
        short=True,
    ),
    Claim(
        "trl-checkpointing",
        "SFTTrainer checkpoints by itself",
        "trl_checkpointing",
        lambda f: right_if(f["trl"]["peak_gb"] < 0.9 * f["trl_no_checkpointing"]["peak_gb"], "depends"),
        lambda f: (
            f"{f['version']} does: peak {f['trl']['peak_gb']:.2f} GB and {f['trl']['step_ms']:,.0f} ms a step as it comes, "
            f"{f['trl_no_checkpointing']['peak_gb']:.2f} and {f['trl_no_checkpointing']['step_ms']:,.0f} when told not to "
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
        lambda f: right_if(f["full"]["peak_gb"] < 0.5 * f["none"]["peak_gb"]),
        lambda f: (
            f"this loop, not compiled, 2 x 2,048 tokens: {f['none']['peak_gb']:.1f} to {f['full']['peak_gb']:.1f} GB, for "
            f"{f['none']['step_ms']:.0f} to {f['full']['step_ms']:.0f} ms a step; 1 x 8,192: {f['at_8192_gb']['none']:.1f} to "
            f"{f['at_8192_gb']['full']:.1f} GB"
        ),
        how=TRAIN_STEP,
    ),
    Claim(
        "oom-advice",
        "Batch 1, 512 tokens, rank 16 help too",
        "out_of_memory",
        lambda f: right_if(f["none_1x512"] < 0.5 * f["none_2x2048"] and f["half_rank"] > 2, "depends"),
        lambda f: (
            f"fewer tokens do: this loop, compiled with CUDA graphs and without checkpointing, {f['none_2x2048']:.1f} GB at 2 "
            f"x 2,048, {f['none_1x512']:.1f} at 1 x 512; half the rank saves {f['half_rank']:.2f} by its formula"
        ),
        how=PEERS,
    ),
    Claim(
        "6gb",
        "A card of 6 GB, such as an RTX 2060 or RTX 3060, is enough",
        "small_card",
        lambda f: right_if(len(f["fits"]) == len(f["peaks_gb"]), "depends"),
        lambda f: (
            f"peaks on an H100 (this loop compiled): {listed(f['peaks_gb'], '.2f', ' GB')}, and a context of CUDA on top. bf16 "
            "and flash_attention_2 want compute capability 8.0, an RTX 2060 has 7.5, so the script as it stands is not for "
            "it; and a desktop's RTX 3060 has 12 or 8 GB. No such card was measured"
        ),
        how=PEERS,
        short=True,
    ),
    Claim(
        "16gb-ram",
        "16 GB of system memory are enough",
        "host_memory",
        lambda f: right_if(
            f["before"] + max(f["grown"]) / f["file"] * f["phi3_file"]
            < 0.75 * f["guide"],  # as it is a guess from a small model
            "depends" if f["before"] + min(f["grown"]) / f["file"] * f["phi3_file"] < f["guide"] else "wrong",
        ),
        lambda f: (
            f"a process takes {f['before']:.1f} GB with the libraries; loading the demo's file of {f['file']:.2f} GB in NF4 on "
            f"a CPU adds {min(f['grown']):.2f} to {max(f['grown']):.2f} at the peak, in {len(f['grown'])} runs. At these "
            f"ratios Phi-3-mini's {f['phi3_file']:.1f} GB add {min(f['grown']) / f['file'] * f['phi3_file']:.0f} to "
            f"{max(f['grown']) / f['file'] * f['phi3_file']:.0f}, file pages included; it was not loaded itself"
        ),
    ),
    Claim(
        "20gb-disk",
        "20 GB of free space are enough",
        "disk",
        lambda f: right_if(f["weights"] + f["checkpoints"] + f["packages"] < f["guide"]),
        lambda f: (
            f"{f['weights']:.1f} GB of weights in bf16, by their number, {f['checkpoints']:.1f} of three checkpoints of full "
            f"size as measured, {f['packages']:.1f} of packages as installed here, torch for a CPU among them: "
            f"{f['guide'] - f['weights'] - f['checkpoints'] - f['packages']:.1f} are left, and torch for CUDA takes several"
        ),
    ),
    Claim(
        "only-adapters",
        "Only adapters are saved, not the model",
        "checkpoint_contents",
        lambda f: right_if(f["checkpoint_mb"] < 0.2 * f["model_gb"] * 1e3, "depends"),
        lambda f: (
            f"a checkpoint takes {f['checkpoint_mb']:.0f} MB (adapter and two moments, {f['adapter_mb']:.0f} "
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
        lambda f: right_if(
            all(2 <= f["kernel_ms"][name] / f["kernel_ms"]["flash_attention_2"] <= 3 for name in ("eager", "sdpa")), "depends"
        ),
        lambda f: (
            f"the kernel at {f['length']:,} tokens: {f['kernel_ms']['eager'] / f['kernel_ms']['flash_attention_2']:.1f} times "
            f"as fast as eager, {f['kernel_ms']['sdpa'] / f['kernel_ms']['flash_attention_2']:.2f} times as sdpa, which is the "
            f"default and runs {', '.join(f['sdpa_ran'])} there, "
            f"{f['kernel_ms']['sdpa_flash'] / f['kernel_ms']['flash_attention_2']:.2f} times as sdpa told to take its flash "
            "kernel"
        ),
        how=ATTENTION,
        short=True,
    ),
    Claim(
        "flash-training",
        "Training gets 2 to 3 times as fast by it",
        "flash_speed",
        lambda f: right_if(
            all(2 <= ratio <= 3 for name in ("eager", "sdpa") for ratio in ratios(f, name).values()),
            "depends" if any(ratio >= 2 for name in ("eager", "sdpa") for ratio in ratios(f, name).values()) else "wrong",
        ),
        lambda f: (
            "ms of a step of this loop, not compiled, by tokens and checkpointing, median (10th to 90th percentile): "
            + "; ".join(f"{name}: {spread(f, name)}" for name in f["steps"])
            + f". So {min(ratios(f, 'eager').values()):.1f} to {max(ratios(f, 'eager').values()):.1f} times as fast as eager, "
            f"{min(ratios(f, 'sdpa').values()):.2f} to {max(ratios(f, 'sdpa').values()):.2f} as sdpa, the default"
        ),
        how=ATTENTION,
        short=True,
    ),
    Claim(
        "flash-memory",
        "Memory falls from O(N²) to O(N)",
        "flash_memory",
        lambda f: right_if(f["growth_gb"]["flash_attention_2"] < 0.25 * f["growth_gb"]["eager"]),
        lambda f: (
            f"peak of a step of this loop with checkpointing, from 4,096 to 8,192 tokens: "
            f"{listed(f['growth_gb'], '+.1f', ' GB')}. At 2 x 2,048 eager "
            f"costs {f['at_2048_gb']['eager'] - f['at_2048_gb']['sdpa']:.1f} GB more than either"
        ),
        how=ATTENTION,
    ),
    Claim(
        "sdpa-slower",
        "sdpa is the slower way out",
        "flash_speed",
        lambda f: right_if(all(is_slower(f, "sdpa").values()), "depends" if any(is_slower(f, "sdpa").values()) else "wrong"),
        lambda f: (
            "a step of this loop with sdpa takes, by tokens and checkpointing, "
            + ", ".join(
                f"{ratio:.2f} times as long ({name})"
                + (" with spreads that overlap" if is_slower(f, "sdpa")[name] is None else "")
                for name, ratio in ratios(f, "sdpa").items()
            )
            + "; at 8,192 the window of Phi-3 makes it take a mask"
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
        how=LIBRARY,
    ),
    Claim(
        "fp16-with-bf16",
        "fp16=True goes with bf16 compute",
        "mixed_precision",
        lambda f: right_if(not any(f["error"].values()), "wrong" if all(f["error"].values()) else "depends"),
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
        "dequantized",
        "Weights are dequantized during computation",
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
        how=LIBRARY,
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
        how="computed",
    ),
    Claim(
        "first-update",
        "In warmup the rate is t / warmup",
        "first_rate",
        lambda f: right_if(f["off_formula"] < 1e-6),
        lambda f: (
            f"so it is in transformers (off by {f['off_formula']:.0e} at most), but its first update is of rate 0: weights "
            f"move by {f['moved'][0]:g}, in the second by {f['moved'][1]:.1e}. Here it starts at {f['here']:.3f} of the peak"
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
        lambda f: (
            f"transformers.Trainer makes {f['total']}: {f['per_epoch']} an epoch, the last of {f['windows'][-1]} examples; "
            f"{f['warmup']} are warmup"
        ),
        short=True,
    ),
    Claim(
        "batch-4",
        "The effective batch is 4",
        "steps",
        lambda f: right_if(set(f["windows"]) == {4}, "depends"),
        lambda f: f"examples of each update in an epoch of transformers.Trainer: {', '.join(map(str, f['windows']))}",
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
        how=LIBRARY,
    ),
    Claim(
        "pad-eos",
        "pad = eos prevents trouble in generation",
        "pad_labels",
        lambda f: right_if(
            min(f["trl"], f["transformers"]) == f["examples"],
            "depends" if max(f["trl"], f["transformers"]) == f["examples"] else "wrong",
        ),
        lambda f: (
            f"it depends on who masks labels. The guide's SFTTrainer in TRL {f['trl_version']}, by length: {f['trl']} of "
            f"{f['examples']} stop tokens stay trained. transformers' DataCollatorForLanguageModeling, by id: "
            f"{f['transformers']} of {f['examples']}, so that nothing teaches the model to stop. Here, by length: {f['here']}"
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
        lambda f: right_if(f["trl"] == f["examples"]),
        lambda f: (
            f"TRL {f['trl_version']} appends eos and trains it: {f['trl']} of {f['examples']} samples; here {f['here']}. With "
            f"formatting_func it trains the prompt and its headings too, {f['trl_trained']:.0%} of tokens; here the response "
            f"alone, {f['here_trained']:.0%}"
        ),
    ),
    Claim(
        "format-instruct",
        "### Instruction is what instruct models know",
        "prompt_forms",
        lambda f: right_if(f["loss"]["plain"] <= f["loss"]["chat"], "depends"),
        lambda f: f"loss of the eval answers, before training: {listed(f['loss'], '.3f')} (the demo and its chat template)",
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
        how=LIBRARY,
    ),
    Claim(
        "device-map",
        'device_map="auto" puts layers 21 to 32 on the CPU where room lacks',
        "offloading",
        lambda f: right_if(f["error"]["too_little"] is None),
        lambda f: (
            'in 4 bits loading with "auto" '
            + ("succeeds" if f["error"]["enough"] is None else "fails")
            + " where the tiny model has room, and "
            + ("succeeds" if f["error"]["too_little"] is None else "is refused with a ValueError")
            + " where a part of it would go to the disk (tried without a GPU); layers of Phi-3-mini go from "
            f"{f['first_layer']} to {f['last_layer']}"
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
        "For deployment merge into the unquantized model",
        "merging",
        lambda f: right_if(f["merged"]["bf16"]["relative"] <= f["merged"]["dequantized"]["relative"], "depends"),
        lambda f: (
            f"eval perplexity {f['without']['perplexity']:.3f} without the adapter, {f['beside']['perplexity']:.3f} with "
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
        eval_losses,
        runs=("BASE", "ANOTHER_SEED", "TARGETS"),
        short=True,
    ),
    Claim(
        "rank-quality",
        "A higher rank has more capacity",
        "ranks",
        lambda f: right_if(
            not too_short(f) and f["runs"]["128"]["held_out"] < f["runs"]["8"]["held_out"] and not near(f, "8", "128"),
            "depends",
        ),
        lambda f: unsettled(f) + eval_losses(f) + "; a low rank learns more slowly here, which is not what it can learn",
        runs=("BASE", "ANOTHER_SEED", "RANKS"),
    ),
    Claim(
        "rank-memory",
        "A higher rank costs memory and speed",
        "rank_cost",
        lambda f: right_if(grows(f, "training_mb") and grows(f, "step_s"), "depends" if grows(f, "training_mb") else "wrong"),
        lambda f: (
            "memory does, of adapters, gradients and moments: "
            + listed({f"r={rank}": row["training_mb"] for rank, row in f["ranks"].items()}, ".1f", " MB")
            + f" (the demo; its frozen base takes {f['ranks'][f['highest']]['base_mb']:.0f}). For speed no difference up to "
            "rank 32 is shown; seconds of a step on a busy machine: "
            + listed({f"r={rank}": row["step_s"] for rank, row in f["ranks"].items()}, ".2f")
        ),
        short=True,
    ),
    Claim(
        "dropout",
        "Dropout of 0.1 is essential and prevents memorization",
        "dropouts",
        lambda f: (
            "depends"
            if too_short(f)
            else right_if(
                f["runs"]["0.1"]["held_out"] < f["runs"]["0.0"]["held_out"]
                and f["runs"]["0.1"]["train_loss_without_dropout"] > 2 * f["runs"]["0.0"]["train_loss_without_dropout"]
                and not near(f, "0.0", "0.1")
            )
        ),
        lambda f: (
            unsettled(f)
            + eval_losses(f)
            + "; loss on the training data, dropout off: "
            + listed({name: run["train_loss_without_dropout"] for name, run in f["runs"].items()}, ".4f")
        ),
        runs=("BASE", "ANOTHER_SEED", "DROPOUTS"),
        short=True,
    ),
    Claim(
        "learning-rate",
        "LoRA needs a rate below pre-training's, such as 5e-5, and is sensitive to high ones",
        "rates",
        lambda f: right_if(
            f["whole"]["5e-05"]["last"] <= 1.1 * min(run["last"] for run in f["whole"].values())
            and f["runs"]["0.02"]["held_out"] > f["runs"]["0.02"]["before"],
            "depends",
        ),
        lambda f: (
            "eval loss and right answers after the guide's 20 epochs of the demo, by peak rate, one run each: "
            + "; ".join(f"{rate}: {run['last']:.4f}, {run['right']}" for rate, run in f["whole"].items())
            + ". Extremes after 4 epochs: "
            + listed({rate: f["runs"][rate]["held_out"] for rate in ("1e-05", "0.003", "0.02")}, ".4f")
            + f" ({f['runs']['0.02']['before']:.3f} before)"
        ),
        how=DEMO,
        runs=("BASE", "ANOTHER_SEED", "RATES"),
        short=True,
    ),
    Claim(
        "weight-decay",
        "If the loss does not fall, remove weight decay",
        "decay",
        lambda f: right_if(f["runs"]["0"]["held_out"] < f["runs"]["0.01"]["held_out"] - f["seeds_differ_by"]),
        lambda f: f"in the run decay takes at most {f['decays_by_at_most']:.3%} off a weight; {eval_losses(f)}",
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
        lambda f: right_if(f["last_loss"] > 0.4 and f["smallest_norm"] >= 1, "depends"),
        lambda f: (
            f"the demo's: loss {f['first_loss']:.2f} to {f['last_loss']:.3f} in {f['steps']} steps, norm "
            f"{f['largest_norm']:.2f} to {f['smallest_norm']:.3f}; both depend on the data"
        ),
        runs=("BASE",),
    ),
    Claim(
        "success",
        "A lower eval loss shows that training worked",
        "signs_of_success",
        lambda f: right_if(
            all(run["last"] < run["before"] and run["right"] > run["right_before"] for run in f["runs"].values()), "depends"
        ),
        lambda f: (
            f"{next(iter(f['runs'].values()))['before']:.3f} and {next(iter(f['runs'].values()))['right_before']} of {f['of']} "
            "answers right before; after 20 epochs, by peak rate: "
            + "; ".join(f"{rate}: {run['last']:.4f}, {run['right']}" for rate, run in f["runs"].items())
            + ". Between losses as near as these it does not decide"
        ),
        how=DEMO,
    ),
    Claim(
        "plateau",
        "A loss that stands still after 2 or 3 epochs is a warning",
        "epochs",
        lambda f: right_if(all(right < 0.5 * f["of"] for epoch, right in f["plateau"].values() if epoch <= 4), "depends"),
        lambda f: (
            "the epoch from which eval loss stays within twice its last, and right answers of "
            f"{f['of']}, by peak rate: "
            + "; ".join(f"{rate}: {epoch}, {right}" for rate, (epoch, right) in f["plateau"].items())
        ),
        how=DEMO,
    ),
    Claim(
        "20-epochs",
        "A small data set requires multiple passes: 20 epochs",
        "epochs",
        lambda f: right_if(f["within_a_tenth"] > 15, "depends" if f["within_a_tenth"] > 1 else "wrong"),
        lambda f: (
            f"several it does; at the demo's rate eval loss is within a tenth of its lowest after {f['within_a_tenth']}; "
            f"lowest after {f['best_epoch']} ({f['best']:.4f}), {f['last']:.4f} after {f['epochs']}"
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
        ("rtx-cards", "A card of 12 GB, such as an RTX 3080 or RTX 4070", "the one GPU at hand was an H100"),
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
