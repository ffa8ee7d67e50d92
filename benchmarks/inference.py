"""How fast a model answers: our `generate` beside transformers' own, in NF4 and in 8 bits; and `evaluate`.

    python -m benchmarks.inference --run RUN   # of the demo model; minutes on 2 cores; writes results/inference_cpu_YYYYMM.json
    python -m benchmarks.inference --precisions nf4      # a CUDA GPU: Phi-3-mini's shape, random weights and adapter

Both sides answer the same prompts greedily with the same number of tokens, in turns, in one process for each precision:
- ours: qlora.commands.adapter.load_adapted, prepared for inference, and qlora.eval.generate.generate.
- transformers: AutoPeftModelForCausalLM.from_pretrained with the same BitsAndBytesConfig, and its `generate`.
"""

import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import tyro

from benchmarks.harness import ROOT, Cell, Output, ResultFile, Row, Shape, build, write_random_model
from benchmarks.tables import load, source, table

Answer = Callable[[list[list[int]], int], object]  # prompts, and new tokens for each


@dataclasses.dataclass(frozen=True)
class Options:
    """What to time."""

    run: Path | None = None
    """A finished run of the demo model, which answers on the CPU. Unset: --shape, on the GPU if there is one."""
    shape: Shape = "phi3-mini"
    """Of a model with random weights and a random adapter."""
    output: tyro.conf.OmitArgPrefixes[Output] = Output()
    new_tokens: int = 64
    """Tokens of each answer; it does not end earlier."""
    repeats: int = 5
    """Timed rounds, after one that is not."""
    batch_sizes: tuple[int, ...] = (1, 8)
    """Prompts answered at a time."""
    precisions: tuple[str, ...] = ("nf4", "int8")
    """Of the base."""
    evaluate: bool = True
    """With --run: whether `python -m qlora evaluate` is timed too, as a process, on the eight eval examples."""


def write_random_adapter(shape: Shape, folder: Path) -> None:
    """A model in `folder`/model and an adapter of rank 32 in `folder`/adapter, whose update is not zero."""
    import torch
    import transformers

    from qlora.config import TrainConfig
    from qlora.run.checkpoint import adapter_files
    from qlora.run.files import write_folder

    write_random_model(shape, folder / "model")
    _, trainee = build(TrainConfig(model=str(folder / "model"), compile="none", gradient_checkpointing="full"))
    with torch.no_grad():
        for name, parameter in trainee.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    write_folder(folder / "adapter", dict(adapter_files(trainee.model, tokenizer)))


def time_generation(options: Options, scratch: Path, precision: str) -> list[Row]:
    """Seconds and processor seconds of both, for each batch size; the two take turns, so that a busy machine meets both."""
    from qlora.commands.adapter import open_adapter
    from qlora.config import BUNDLED_EVAL
    from qlora.data.formats import read_examples
    from qlora.data.template import encode_prompt

    if options.run:
        adapter = open_adapter(options.run, device="cpu")
    else:
        adapter = open_adapter(scratch / "adapter", prompt_format="plain")
    examples = list(read_examples(BUNDLED_EVAL, "test"))[: max(options.batch_sizes)]
    prompts = [encode_prompt(example.prompt, adapter.template) for example in examples]
    both = contenders(adapter, precision)
    rows = []
    for size in options.batch_sizes:
        wall: dict[str, list[float]] = {name: [] for name in both}
        cpu: dict[str, list[float]] = {name: [] for name in both}
        for round_number in range(options.repeats + 1):
            for name, answer in both.items():
                started, worked = time.perf_counter(), time.process_time()
                answer(prompts[:size], options.new_tokens)
                if round_number:
                    wall[name].append(round(time.perf_counter() - started, 3))
                    cpu[name].append(round(time.process_time() - worked, 3))
        best = {name: round(size * options.new_tokens / min(values), 3) for name, values in wall.items()}
        rows.append(
            {
                "precision": precision,
                "batch_size": size,
                "tokens_per_s": best,  # of the fastest round, the least disturbed
                "ratio": round(best["ours"] / best["transformers"], 3),
                "cpu_ratio": round(min(cpu["transformers"]) / min(cpu["ours"]), 3),
                "seconds": wall,
                "cpu_seconds": cpu,
            }
        )
    return rows


def contenders(adapter, precision: str) -> dict[str, Answer]:
    """Name -> function that answers prompts once."""
    import torch

    from qlora.commands.adapter import load_adapted
    from qlora.eval.generate import generate
    from qlora.model.load import prepare_inference, quantization_of
    from qlora.model.third_party import peft

    ours = load_adapted(adapter, precision)
    prepare_inference(ours)
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(
        str(adapter.folder),
        quantization_config=quantization_of(precision),
        dtype=torch.bfloat16,
        device_map={"": adapter.device},
    ).eval()
    template = adapter.template
    endless = template._replace(stop_id=len(template.tokenizer) - 1)  # a token that the model does not write
    ours.generation_config.eos_token_id = theirs.generation_config.eos_token_id = None

    def their_answer(prompts: list[list[int]], new_tokens: int) -> object:
        template.tokenizer.padding_side = "left"
        batch = template.tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(adapter.device)  # [B, T]
        return theirs.generate(**batch, do_sample=False, max_new_tokens=new_tokens)

    return {"ours": lambda prompts, new: generate(ours, prompts, endless, new), "transformers": their_answer}


def time_evaluation(run: Path, precision: str) -> Row:
    """Seconds of `python -m qlora evaluate` from the start of the process to its end, and the metrics it gave."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "evaluation.json"
        flags = ["--json", str(out), "--device", "cpu", *(["--int8"] if precision == "int8" else [])]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "qlora", "evaluate", str(run), *flags], cwd=ROOT, check=True)
        total_s = time.perf_counter() - started
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        record = json.loads(out.read_text())
    kept = {name: record[name] for name in ("precision", "num_examples", "num_tokens", "max_new_tokens", "seconds", "metrics")}
    cpu_s = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    return {"total_s": round(total_s, 1), "cpu_s": round(cpu_s, 1), **kept}


def main(options: Options) -> None:
    """Time all, and write the file."""
    file = ResultFile("inference", options.output)
    with tempfile.TemporaryDirectory() as scratch:
        if options.run is None:
            Cell(write_random_adapter, options.shape, Path(scratch)).result()
        rows = []
        for precision in options.precisions:  # one process at a time
            rows += Cell(time_generation, options, Path(scratch), precision).result(3600.0)
    file.record = {"environment": file.environment, "new_tokens": options.new_tokens, "generate": rows}
    file.record["load_average"] = os.getloadavg()  # of the last 1, 5 and 15 minutes: 1 is a machine that does nothing else
    evaluated = options.precisions if options.evaluate and options.run else ()
    file.record["evaluate"] = [time_evaluation(options.run, precision) for precision in evaluated]
    file.write(file.record)


def speeds(pattern: str) -> str:
    """How fast a model answers, and how long `evaluate` takes."""
    name, record = load(pattern)
    rows = []
    for row in record["generate"]:
        ours, theirs = (f"{row['tokens_per_s'][side]:.1f}" for side in ("ours", "transformers"))
        rows.append([row["precision"], str(row["batch_size"]), ours, theirs, f"{row['ratio']:.2f}", f"{row['cpu_ratio']:.2f}"])
    headers = ["base", "prompts at a time", "`generate`, tokens/s", "transformers' own", "ratio", "by processor seconds"]
    lines = [table(headers, rows), ""]
    for row in record["evaluate"]:
        losses = {side: row["metrics"]["loss"][side]["value"] for side in ("base", "adapter")}
        lines.append(
            f"`evaluate` with {row['precision']}: {row['num_examples']} prompts in {row['total_s']:.0f} s, start and loading "
            f"included ({row['cpu_s']:.0f} processor seconds); eval loss {losses['base']:.4f} without the adapter, "
            f"{losses['adapter']:.4f} with it."
        )
    busy = f"Load average of the machine at the end: {record['load_average'][1]:.1f}."
    return "\n".join([*lines, "", f"{record['new_tokens']} new tokens, greedy, fastest round. {busy} {source(name, record)}"])


if __name__ == "__main__":
    main(tyro.cli(Options))
