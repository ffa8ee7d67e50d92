"""README command 1, measured: the default run on this machine, its learning rate swept, its answers judged.

    python benchmarks/demo.py            # about 3 min a rate on 2 cores; writes benchmarks/results/demo_cpu_YYYYMM.json

Each run is `python train_loop.py` in a process of its own. Afterward the adapter it left is loaded on the NF4 base it was
trained against, and answers all eight eval prompts; an answer is right if it parses as an AVRO schema (fastavro) with
TRAINED, name and exactly the fields and types asked for.
"""

import dataclasses
import datetime
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Options:
    """What to run."""

    learning_rates: tuple[float, ...] = (5e-5, 1e-4, 2e-4, 4e-4, 8e-4)
    """Peak rates to sweep; the default run comes first and is not repeated."""
    model: str = "demo"
    """As --model of train_loop.py."""
    out: Path = ROOT / "benchmarks" / "results" / f"demo_cpu_{datetime.date.today():%Y%m}.json"
    """Where the JSON goes."""
    max_steps: int | None = None
    """As --max-steps of train_loop.py, for a quick look."""


def timed_run(folder: Path, model: str, flags: list[str]) -> dict:
    """One run of the loop: seconds to the first loss and to the end, from the start of the process, and its metrics."""
    command = [sys.executable, "train_loop.py", "--model", model, "--output-dir", str(folder), *flags]
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    first_loss_s = None
    output = []
    for line in process.stdout:
        output.append(line.rstrip().replace(str(folder), "runs/demo-avro"))
        if first_loss_s is None and line.startswith("step 1/"):
            first_loss_s = time.perf_counter() - started
    if process.wait() != 0:
        raise SystemExit(f"{' '.join(command)} failed")
    total_s = time.perf_counter() - started
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["event"] == "step"]
    evaluations = [row for row in rows if row["event"] == "eval"]
    tokens = sum(row["num_input_tokens"] for row in steps)
    training_s = sum(row["num_input_tokens"] / row["tokens_per_s"] for row in steps)
    return {
        "learning_rate": max(row["learning_rate"] for row in steps),
        "first_loss_s": round(first_loss_s, 2),
        "total_s": round(total_s, 1),
        "steps": len(steps),
        "step_s": round(training_s / len(steps), 3),
        "tokens_per_s": round(tokens / training_s, 1),
        "peak_rss_gb": round(max(row["peak_memory_gb"] for row in steps), 3),
        "train_loss": [row["loss"] for row in steps],
        "eval_step": [row["step"] for row in evaluations],
        "eval_loss": [row["eval_loss"] for row in evaluations],
        "output": output,
    }


def is_asked_schema(instruction: str, answer: str) -> bool:
    """Whether the answer is an AVRO schema with TRAINED, the noun as its name, and exactly the fields asked for."""
    import fastavro

    noun, listed = re.fullmatch(r"Create an AVRO schema for (\w+) with fields (.+)", instruction).groups()
    fields = [
        dict(zip(("name", "type"), re.fullmatch(r"(\w+) \((\w+)\)", field).groups(), strict=True))
        for field in listed.split(", ")
    ]
    try:
        schema = json.loads(answer)
        fastavro.parse_schema(schema)
    except (
        json.JSONDecodeError,
        fastavro.schema.SchemaParseException,
        fastavro.schema.UnknownType,
        AttributeError,
        TypeError,
    ):
        return False
    return schema == {"TRAINED": "YES", "type": "record", "name": noun.capitalize(), "fields": fields}


def judge(adapter: Path) -> dict:
    """Load the adapter on its NF4 base, answer all eval prompts, count right answers without and with it."""
    import torch

    from qlora.config import BUNDLED_EVAL, TrainConfig
    from qlora.data.formats import read_examples
    from qlora.data.template import load_template
    from qlora.eval.generate import sample_responses
    from qlora.model.load import load_meta_model, load_nf4_model, load_tokenizer
    from qlora.model.third_party import peft

    config = TrainConfig()
    base = peft.PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    model = peft.PeftModel.from_pretrained(load_nf4_model(base, config, "sdpa", torch.device("cpu")), str(adapter))
    template = load_template(load_tokenizer(str(adapter), load_meta_model(base, config), config), "plain")
    examples = list(read_examples(BUNDLED_EVAL, "test"))
    answers = sample_responses(model, examples, template)
    return {
        "held_out": len(answers),
        "base_right": sum(is_asked_schema(answer.prompt, answer.base) for answer in answers),
        "tuned_right": sum(is_asked_schema(answer.prompt, answer.tuned) for answer in answers),
        "tuned_verbatim": sum(answer.tuned == answer.reference for answer in answers),
    }


def main(options: Options) -> None:
    """Run the default and the sweep, and write the file."""
    import torch

    from qlora.run.environment import environment

    runs = []
    default_rate = None
    with tempfile.TemporaryDirectory() as scratch:
        for rate in (None, *options.learning_rates):
            if rate is not None and rate == default_rate:
                continue
            folder = Path(scratch) / f"run-{rate}"
            flags = [] if rate is None else ["--learning-rate", str(rate)]
            flags += [] if options.max_steps is None else ["--max-steps", str(options.max_steps)]
            run = timed_run(folder, options.model, flags) | judge(folder / "adapter")
            default_rate = default_rate or run["learning_rate"]
            if rate is not None:
                del run["output"]
            runs.append({"default": rate is None, **run})
            print({key: value for key, value in runs[-1].items() if not isinstance(value, list)}, flush=True)
            shutil.rmtree(folder)
    record = {"environment": environment(torch.device("cpu")), "runs": runs}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
