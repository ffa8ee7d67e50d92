"""How fast rows become ids and labels, on all cores: this loop's data path against `datasets.map` as TRL uses it.

    python -m benchmarks.tokenizing                          # 100,000 rows, the demo's tokenizer, three times each
    python -m benchmarks.tokenizing --rows 3000 --times 1    # anywhere, a smoke test

Both read the same JSONL of instruction, input and output, render the chat template, tokenize prompt and answer, and keep the
result on disk. Ours also checks every row, and hashes all ids and labels. Imports, and loading the tokenizer, do not count.
"""

import contextlib
import dataclasses
import datetime
import io
import json
import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import tyro

from benchmarks.harness import Cell, Output, ResultFile, Row
from benchmarks.tables import load, source, table


@dataclasses.dataclass(frozen=True)
class Options:
    """What to tokenize."""

    output: tyro.conf.OmitArgPrefixes[Output] = Output()
    model: str = "demo"
    """Hub id, folder, `demo` or `tiny-random`, for its tokenizer and chat template."""
    rows: int = 100_000
    """Of the file. A tenth of them is tokenized too, to show whether memory grows."""
    times: int = 3
    """Runs of each; medians count."""


def write_rows(folder: Path, file: Path, count: int) -> None:
    """Rows of Alpaca's form, of words of the tokenizer: 6 to 20 per instruction, up to 30 of input, 10 to 80 of output."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = (tokenizer.decode([index]).strip() for index in range(len(tokenizer)))
    words = [text for text in texts if text.isascii() and text.isalpha()]
    draw = random.Random(0)

    def sentence(low: int, high: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(low, high))).capitalize() + "."

    with file.open("w") as out:
        for _ in range(count):
            more = sentence(3, 30) if draw.random() < 0.4 else ""
            row = {"instruction": sentence(6, 20), "input": more, "output": sentence(10, 80)}
            out.write(json.dumps(row) + "\n")


@contextlib.contextmanager
def peak_memory(found: Row) -> Iterator[None]:
    """A block during which the memory of this process and its children is sampled; shared pages count once (PSS).

    Args:
        found: gets `start_gb` and `peak_gb`.
    """
    import psutil

    def held_gb() -> float:
        total = 0
        for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
            with contextlib.suppress(psutil.Error):  # one that has ended
                total += process.memory_full_info().pss
        return total / 1e9

    def watch() -> None:
        while not done.wait(0.2):
            found["peak_gb"] = max(found["peak_gb"], held_gb())

    done = threading.Event()
    found["start_gb"] = found["peak_gb"] = held_gb()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def ours(folder: Path, file: Path, cache: Path) -> list[Row]:
    """Read, check and tokenize, and once more from the cache."""
    from rich.console import Console

    from qlora.config import TrainConfig
    from qlora.data.dataset import check_files, encode_files
    from qlora.data.template import load_template
    from qlora.model.load import load_meta_model, load_tokenizer

    os.environ["XDG_CACHE_HOME"] = str(cache)
    config = TrainConfig(model=str(folder), train_file=(str(file),), prompt_format="chat")
    template = load_template(load_tokenizer(str(folder), load_meta_model(str(folder), config), config), "chat")
    rows = []
    for name in ("this loop", "this loop, from its cache"):
        row: Row = {"what": name}
        with peak_memory(row):
            began = time.perf_counter()
            checked = check_files(config)
            row["read_s"] = time.perf_counter() - began
            samples, _ = encode_files(config, checked, template, Console(file=io.StringIO()))
            row["tokenize_s"] = time.perf_counter() - began - row["read_s"]
        rows.append(row | {"rows": len(samples), "tokens": samples.counts["input_tokens"]})
    return rows


def theirs(folder: Path, file: Path, cache: Path) -> list[Row]:
    """The same by `datasets`, with as many processes."""
    import datasets
    import transformers

    from qlora.data.parallel import num_cores

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def tokenize(row: Row) -> Row:
        asked = row["instruction"] + (f"\n\n{row['input']}" if row["input"] else "")
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
        ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        return {"input_ids": ids, "completion_mask": [0] * len(prompt) + [1] * (len(ids) - len(prompt))}

    row: Row = {"what": "`datasets.map`"}
    with peak_memory(row):
        began = time.perf_counter()
        read = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(cache))
        row["read_s"] = time.perf_counter() - began
        mapped = read.map(tokenize, num_proc=num_cores(), remove_columns=read.column_names)
        row["tokenize_s"] = time.perf_counter() - began - row["read_s"]
    return [row | {"rows": len(mapped), "tokens": sum(map(len, mapped["input_ids"]))}]


def main(options: Options) -> None:
    """Write the rows, tokenize them by both in turn, and write the file."""
    from qlora.data.parallel import num_cores
    from qlora.model.demo import model_source

    file = ResultFile("tokenizing", options.output)
    folder = Path(model_source(options.model))
    cells: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for count in (options.rows // 10, options.rows):
            data = Path(scratch, f"{count}.jsonl")
            Cell(write_rows, folder, data, count).result()
            for run in range(options.times):
                for function in (ours, theirs):
                    cache = Path(scratch, f"{function.__name__}-{count}-{run}")
                    cells += Cell(function, folder, data, cache, forks=True).result(3600.0)
    file.record = {"environment": file.environment, "date": f"{datetime.date.today()}", "model": options.model,
                   "processes": num_cores(), "times": options.times, "cells": cells}  # fmt: skip
    file.write(file.record)


def speed(pattern: str) -> str:
    """Rows per second and memory of both, medians."""
    name, record = load(pattern)
    groups: dict[tuple[str, int], list[Row]] = {}
    for cell in record["cells"]:
        groups.setdefault((cell["what"], cell["rows"]), []).append(cell)

    def median(cells: list[Row], key: str) -> float:
        return statistics.median(cell[key] for cell in cells)

    rows = []
    for (what, count), cells in groups.items():
        seconds = median(cells, "read_s") + median(cells, "tokenize_s")
        rows.append([what, f"{count:,}", f"{median(cells, 'read_s'):.1f}", f"{median(cells, 'tokenize_s'):.1f}",
                     f"{count / seconds:,.0f}", f"{median(cells, 'peak_gb') - median(cells, 'start_gb'):.2f}"])  # fmt: skip
    headers = ["", "rows", "read, s", "tokenize, s", "rows/s", "memory, GB"]
    tokens = {cell["what"]: cell["tokens"] / cell["rows"] for cell in record["cells"]}
    what = f"Medians of {record['times']} with {record['processes']} processes; {tokens['this loop']:.0f} tokens per row. "
    what += "Memory is what all processes take beyond the start, shared pages once."
    return f"{table(headers, rows)}\n\n{what} {source(name, record)}"


if __name__ == "__main__":
    main(tyro.cli(Options))
