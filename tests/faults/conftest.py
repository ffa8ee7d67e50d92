"""The run that is disturbed here, and the record of what was tried."""

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from qlora.eval import generate
from qlora.run.environment import environment
from tests.faults.harness import ANSWER_LIMIT, Case

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a background job of a script: runs would rightly ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)

SEED = 20261124
FLAGS = (
    "--model tiny-random --lora-r 4 --num-train-epochs 3 --learning-rate 1e-2 --gradient-checkpointing full "
    "--save-steps 2 --save-total-limit 2"
)


@pytest.fixture(autouse=True)
def long_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are as long here as in the programs that are started: 24 tokens at most, as the data are short."""
    monkeypatch.setattr(generate, "answer_limit", ANSWER_LIMIT)


@pytest.fixture(scope="session")
def case(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """3 epochs of 4 steps, the last one short; a checkpoint every 2 steps; NF4, bf16 autocast, checkpointing, dropout 0.1."""
    folder = tmp_path_factory.mktemp("faults")
    draw = random.Random(SEED)
    for name, count in (("train", 13), ("eval", 3)):
        rows = [
            {"prompt": f"{name} {i} " + "x" * draw.randint(1, 12), "completion": "a" * draw.randint(1, 8)} for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ["--train-file", str(folder / "train.jsonl"), "--eval-file", str(folder / "eval.jsonl")]
    return Case([*FLAGS.split(), *files], folder)


@pytest.fixture(scope="session")
def record() -> Iterator[Callable[[str, int, float], None]]:
    """Called at the end of a test with what it tried, how often, and since when: all survived, or it would not be called.

    Written to the file that SURVIVAL_JSON names, if it is set.
    """
    trials = []

    def survived(what: str, times: int, start: float) -> None:
        trials.append({"what": what, "tried": times, "survived": times, "seconds": round(time.perf_counter() - start, 1)})

    yield survived
    if path := os.environ.get("SURVIVAL_JSON"):
        document = {"environment": environment(torch.device("cpu")), "flags": FLAGS, "trials": trials}
        Path(path).write_text(json.dumps(document, indent=1) + "\n")
