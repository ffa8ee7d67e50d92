"""How fast the demo model answers here: our `generate` beside transformers' own, in NF4 and in 8 bits; and `evaluate`.

    python benchmarks/inference.py --run RUN   # of the demo model; minutes on 2 cores; writes results/inference_cpu_YYYYMM.json

Both sides answer the same prompts greedily with the same number of tokens, in turns, in one process for each precision:
- ours: qlora.commands.adapter.load_adapted, prepared for inference, and qlora.eval.generate.generate.
- theirs: AutoPeftModelForCausalLM.from_pretrained with the same BitsAndBytesConfig, and its `generate`.
"""

import dataclasses
import datetime
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Options:
    """What to time."""

    run: Path
    """A finished run of the demo model."""
    new_tokens: int = 64
    """Tokens of each answer; it does not end earlier."""
    repeats: int = 5
    """Timed rounds, after one that is not."""
    batch_sizes: tuple[int, ...] = (1, 8)
    """Prompts answered at a time."""
    precisions: tuple[str, ...] = ("nf4", "int8")
    """Of the base."""
    evaluate: bool = True
    """Whether `python -m qlora evaluate` is timed too, as a process, on the eight eval examples."""
    out: Path = ROOT / "benchmarks" / "results" / f"inference_cpu_{datetime.date.today():%Y%m}.json"
    """Where the JSON goes."""


def contenders(adapter, precision: str) -> dict:
    """Name -> function of prompts and tokens that answers them once."""
    import torch

    from qlora.commands.adapter import load_adapted
    from qlora.eval.generate import generate
    from qlora.model.load import prepare_inference, quantization_of
    from qlora.model.third_party import peft

    ours = load_adapted(adapter, precision)
    prepare_inference(ours)
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(
        str(adapter.folder), quantization_config=quantization_of(precision), dtype=torch.bfloat16
    ).eval()
    template = adapter.template
    never = template._replace(stop_id=len(template.tokenizer) - 1)  # a token that the model does not write
    ours.generation_config.eos_token_id = theirs.generation_config.eos_token_id = None

    def their_answer(prompts: list[list[int]], new_tokens: int) -> None:
        template.tokenizer.padding_side = "left"
        batch = template.tokenizer.pad({"input_ids": prompts}, return_tensors="pt")  # [B, T]
        theirs.generate(**batch, do_sample=False, max_new_tokens=new_tokens)

    return {"ours": lambda prompts, new: generate(ours, prompts, never, new), "transformers": their_answer}


def timed(options: Options, adapter, precision: str, prompts: list[list[int]]) -> list[dict]:
    """Seconds and processor seconds of both, for each batch size; the two take turns, so that a busy machine meets both."""
    rows = []
    both = contenders(adapter, precision)
    for size in options.batch_sizes:
        wall, cpu = ({name: [] for name in both} for _ in range(2))
        for round in range(options.repeats + 1):
            for name, answer in both.items():
                started, worked = time.perf_counter(), time.process_time()
                answer(prompts[:size], options.new_tokens)
                if round:
                    wall[name].append(round_(time.perf_counter() - started))
                    cpu[name].append(round_(time.process_time() - worked))
        best = {name: round_(size * options.new_tokens / min(values)) for name, values in wall.items()}
        row = {"precision": precision, "batch_size": size, "tokens_per_s": best}  # of the fastest round, the least disturbed
        row |= {"ratio": round_(best["ours"] / best["transformers"])}
        row |= {"cpu_ratio": round_(min(cpu["transformers"]) / min(cpu["ours"]))}
        print(row, flush=True)
        rows.append({**row, "seconds": wall, "cpu_seconds": cpu})
    return rows


def round_(value: float) -> float:
    """Three decimals: more is noise."""
    return round(value, 3)


def timed_evaluation(run: Path, flags: list[str]) -> dict:
    """Seconds of `python -m qlora evaluate` from the start of the process to its end, and the metrics it gave."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "evaluation.json"
        command = [sys.executable, "-m", "qlora", "evaluate", str(run), "--json", str(out), *flags]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        started = time.perf_counter()
        subprocess.run(command, cwd=ROOT, check=True)
        total_s = time.perf_counter() - started
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        record = json.loads(out.read_text())
    kept = {name: record[name] for name in ("precision", "num_examples", "num_tokens", "max_new_tokens", "seconds", "metrics")}
    cpu_s = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    return {"total_s": round(total_s, 1), "cpu_s": round(cpu_s, 1), **kept}


def main(options: Options) -> None:
    """Time all, and write the file."""
    from qlora.commands.adapter import open_adapter
    from qlora.config import BUNDLED_EVAL
    from qlora.data.formats import read_examples
    from qlora.data.template import encode_prompt
    from qlora.run.environment import environment

    adapter = open_adapter(options.run, device="cpu")
    examples = list(read_examples(BUNDLED_EVAL, "test"))[: max(options.batch_sizes)]
    prompts = [encode_prompt(example.prompt, adapter.template) for example in examples]
    rows = [row for precision in options.precisions for row in timed(options, adapter, precision, prompts)]
    evaluations = []
    if options.evaluate:
        for precision in options.precisions:
            flags = ["--device", "cpu", *(["--int8"] if precision == "int8" else [])]
            evaluations.append(timed_evaluation(options.run, flags))
    record = {"environment": environment(adapter.device), "new_tokens": options.new_tokens, "generate": rows}
    record["load_average"] = os.getloadavg()  # of the last 1, 5 and 15 minutes: 1 is a machine that does nothing else
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**record, "evaluate": evaluations}, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
