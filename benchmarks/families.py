"""Model families: a training step of this loop against plain transformers and PEFT, and a whole run, on tiny random models.

    python -m benchmarks.families                     # on a CPU; writes benchmarks/results/
    python -m benchmarks.families --families Qwen3 Gemma3Text --out /tmp/families.json

Each family has two to four layers with random weights, hidden size 64, in NF4, and an adapter with B other than 0. The
reference is the model as transformers loads it and PEFT adapts it: `model(input_ids, attention_mask, labels)` under bf16
autocast, one sample at a time, so that neither padding nor packing is in it. Compared are the loss and the gradient of each
adapter matrix: of padded rows, of packed rows, with all layers recomputed, and with layers compiled. Then the program itself
trains, resumes, evaluates, generates and merges, and PEFT loads what it saved.
"""

import contextlib
import dataclasses
import io
import json
import math
import random
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro

from benchmarks.harness import Cell, Failed, Output, ResultFile, Row, reason
from benchmarks.tables import load, source, table

SIZES: Row = {"vocab_size": 384, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0,
              "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
DENSE = SIZES | {"intermediate_size": 128, "num_key_value_heads": 2}
MIXED = DENSE | {"num_hidden_layers": 4, "head_dim": 16, "sliding_window": 16}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 6, "long_factor": [1.3] * 6,
            "partial_rotary_factor": 0.75}  # fmt: skip
GPT = {"vocab_size": 384, "n_embd": 64, "n_layer": 2, "n_head": 4}
# Of transformers' configuration class, without its Config: what makes it tiny.
FAMILIES: dict[str, Row] = {
    "Phi3": DENSE | {"sliding_window": 16},
    "Phi3, longrope": DENSE | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 256,
                               "max_position_embeddings": 512},
    "Llama": DENSE,
    "Mistral": DENSE | {"sliding_window": 16},
    "Ministral": DENSE | {"sliding_window": 16, "head_dim": 16},
    "Qwen2": DENSE,
    "Qwen3": DENSE | {"head_dim": 16},
    "Gemma": DENSE | {"head_dim": 16},
    "Gemma2": MIXED,
    "Gemma3Text": MIXED | {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "SmolLM3": DENSE | {"num_hidden_layers": 4},
    "Granite": DENSE | {"logits_scaling": 8.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    "Olmo2": DENSE,
    "Olmo3": {name: value for name, value in MIXED.items() if name != "head_dim"},
    "Glm4": DENSE | {"head_dim": 16},
    "Cohere": DENSE,
    "Cohere2": MIXED,
    "StableLm": DENSE,
    "Starcoder2": DENSE | {"sliding_window": None},
    "Phi": DENSE,
    "Nemotron": DENSE,
    "Exaone4": MIXED,
    "Ernie4_5": DENSE | {"head_dim": 16},
    "GPTNeoX": SIZES | {"intermediate_size": 128},
    "GPTJ": GPT | {"rotary_dim": 8},
    "Bloom": {"vocab_size": 384, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "Mpt": {"vocab_size": 384, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 512},
}  # fmt: skip
LENGTHS = (40, 23, 31, 9)  # tokens of the samples; all but the last are longer than the windows above
LOSS_LIMIT, GRADIENT_LIMIT = 5e-3, 0.1  # relative: bf16 rounds at 0.004, and a tiny random model adds up little noise
STEPS = ("padded", "packed", "recomputed", "compiled", "compiled and packed")
COMMANDS = ("resume", "evaluate", "generate", "merge", "PEFT loads it")


@dataclasses.dataclass(frozen=True)
class Options:
    """Which families."""

    output: tyro.conf.OmitArgPrefixes[Output] = Output()
    families: tuple[str, ...] = tuple(FAMILIES)
    """Names of transformers' configuration classes, without Config."""


def write_model(family: str, folder: Path) -> None:
    """A tiny random model of a family, with the tokenizer of the tests."""
    import torch
    import transformers

    from qlora.model.demo import tiny_random_model

    torch.manual_seed(0)
    config = getattr(transformers, f"{family.partition(',')[0]}Config")(**FAMILIES[family])
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tiny_random_model()).save_pretrained(folder)


def wake(model: Any) -> None:
    """Give the adapters values, the same for the same shapes and order; B too, which starts at 0."""
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))  # [r, in] or [out, r]


def reference(folder: Path, targets: list[str], samples: list[list[int]]) -> tuple[float, dict[str, Any]]:
    """Mean loss per token, and gradients [on the CPU], by plain transformers and PEFT, one sample at a time."""
    import peft
    import torch
    import transformers

    from qlora.model.load import quantization_of

    base = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization_of("nf4"), dtype=torch.bfloat16, attn_implementation="eager"
    )
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # which would repack weights at the first forward without a gradient
    lora = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")
    model: Any = peft.get_peft_model(base, lora)
    wake(model)
    tokens, total = sum(len(ids) - 1 for ids in samples), 0.0
    for ids in samples:
        row = torch.tensor([ids], device=base.device)  # [1, T]
        with torch.autocast(base.device.type, torch.bfloat16):
            loss = model(input_ids=row, attention_mask=torch.ones_like(row), labels=row, use_cache=False).loss  # []
        share = loss * (len(ids) - 1) / tokens  # []
        share.backward()
        total += share.item()
    return total, {name: parameter.grad.cpu() for name, parameter in model.named_parameters() if parameter.requires_grad}


def compare(family: str, folder: Path, ways: tuple[str, ...] = STEPS) -> Row:
    """Loss and gradients of this loop beside the reference: the largest relative difference of each way to train."""
    import torch

    from benchmarks.harness import build
    from qlora.config import TrainConfig
    from qlora.data.batch import collate, collate_packed
    from qlora.data.template import TokenizedExample
    from qlora.errors import UserError
    from qlora.model import attention

    torch.set_num_threads(1)
    draw = random.Random(0)
    samples = [[draw.randrange(3, 384) for _ in range(length)] for length in LENGTHS]
    examples = [TokenizedExample(ids, ids, line) for line, ids in enumerate(samples, 1)]
    rows: Row = {}
    expected: tuple[float, dict[str, Any]] | None = None
    for way in ways:
        config = TrainConfig(
            model=str(folder), lora_r=4, lora_alpha=8, lora_dropout=0.0, max_length=128,
            compile="layers" if way.startswith("compiled") else "none",
            packing=way.endswith("packed"), gradient_checkpointing="full" if way == "recomputed" else "none",
        )  # fmt: skip
        try:
            config, trainee = build(config)
            wake(trainee.model)
            if expected is None:
                names = sorted({name.split(".")[-4] for name, p in trainee.model.named_parameters() if "lora_A" in name})
                expected = reference(folder, names, samples)
            batch = collate_packed([examples[:2], examples[2:]]) if config.packing else collate(examples)
            trainee.model.train()
            with attention.for_training(trainee.model, config), torch.autocast("cpu", torch.bfloat16):
                inputs = attention.decoder_inputs(batch, trainee.decoder.config)
                hidden = trainee.decoder(**inputs, use_cache=False).last_hidden_state  # [B, T, D]
                loss = trainee.loss_sum(hidden, batch) / batch.num_tokens  # []
            loss.backward()
        except UserError as error:
            rows[way] = {"refused": str(error)}
            continue
        apart = {
            name: ((parameter.grad - expected[1][name]).norm() / expected[1][name].norm()).item()
            for name, parameter in trainee.model.named_parameters()
            if parameter.requires_grad
        }
        worst = max(apart, key=lambda name: math.inf if math.isnan(apart[name]) else apart[name])
        rows[way] = {"loss": abs(loss.item() / expected[0] - 1), "gradient": apart[worst], "worst": worst}
    return rows


def try_commands(folder: Path, scratch: Path) -> Row:
    """Whether the program trains and resumes bit for bit, evaluates, generates and merges, and PEFT loads the adapter."""
    import torch
    from safetensors.torch import load_file

    from qlora.cli import main as any_command
    from qlora.cli import train
    from qlora.eval.generate import FAILURES

    torch.set_num_threads(1)
    lines = [{"prompt": f"say {word}", "completion": word} for word in ("one", "three", "seven", "eleven")]
    (scratch / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    flags = ["--model", str(folder), "--train-file", str(scratch / "rows.jsonl"), "--max-length", "128", "--lora-r", "2"]
    flags += ["--save-steps", "1", "--save-total-limit", "9"]
    rows, run = str(scratch / "rows.jsonl"), str(scratch / "straight")

    def called(command: Callable[[list[str]], int], *words: str) -> None:
        told = io.StringIO()
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            status = command(list(words))
        if status:
            raise Failed(reason(told.getvalue()))

    def adapter(run: str) -> dict[str, Any]:
        return load_file(scratch / run / "adapter" / "adapter_model.safetensors")

    def resumed() -> bool:
        called(train, *flags, "--max-steps", "4", "--output-dir", run)
        half = str(scratch / "straight" / "checkpoints" / "step-000002")
        called(train, *flags, "--max-steps", "4", "--output-dir", str(scratch / "resumed"), "--resume", half)
        before = load_file(scratch / "straight" / "checkpoints" / "step-000001" / "adapter_model.safetensors")
        moved = all(not torch.equal(tensor, before[name]) for name, tensor in adapter("straight").items() if "lora_B" in name)
        return moved and all(torch.equal(tensor, adapter("resumed")[name]) for name, tensor in adapter("straight").items())

    def loaded() -> bool:
        import peft

        model = peft.AutoPeftModelForCausalLM.from_pretrained(scratch / "straight" / "adapter", dtype=torch.bfloat16)
        found = peft.get_peft_model_state_dict(model)
        return all(torch.equal(found[name], tensor) for name, tensor in adapter("straight").items())

    checks: dict[str, Callable[[], Any]] = {
        "resume": resumed,
        "evaluate": lambda: called(any_command, "evaluate", run, "--eval-file", rows, "--max-new-tokens", "4"),
        "generate": lambda: called(any_command, "generate", run, "--prompt", "say one", "--max-new-tokens", "4"),
        "merge": lambda: called(
            any_command, "merge", run, "--eval-file", rows, "--into", "bf16", "--output-dir", str(scratch / "merged")
        ),
        "PEFT loads it": loaded,
    }
    found: Row = {}
    for name, check in checks.items():
        try:
            found[name] = "no" if check() is False else "yes"
        except Failed as failed:
            found[name] = str(failed)
        except FAILURES:  # of a library: the reason is what is looked for
            found[name] = reason(traceback.format_exc())
    return found


def main(options: Options) -> None:
    """Try the families, each in two processes, and write the file after each."""
    file = ResultFile("families", options.output)
    file.begin_run({})
    for family in options.families:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            cell: Row = {"family": family, "commit": file.environment["commit"]}
            try:
                Cell(write_model, family, folder).result()
                cell["steps"] = Cell(compare, family, folder).result()
                cell["commands"] = Cell(try_commands, folder, Path(scratch)).result()
            except Failed as failed:
                cell["unavailable"] = str(failed)
        file.record["cells"] = [*(other for other in file.record["cells"] if other["family"] != family), cell]
        file.write(cell)


def families(pattern: str) -> str:
    """A row per family: the differences of a step, and what the program does with it."""
    name, record = load(pattern)
    rows = []
    for cell in record["cells"]:
        cells = []
        for way in STEPS:
            step = cell["steps"][way]
            cells.append("refused" if "refused" in step else f"{step['loss']:.0e} / {step['gradient']:.1%}")
        cells += [cell["commands"][check] for check in COMMANDS]
        rows.append([cell["family"], *cells])
    return f"{table(['family', *STEPS, *COMMANDS], rows)}\n\n{source(name, record)}"


if __name__ == "__main__":
    main(tyro.cli(Options))
