"""Fixtures of the commands that load a trained adapter."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from qlora.commands import adapter
from qlora.config import TrainConfig
from qlora.model.load import fingerprint, load_meta_model
from qlora.run import checkpoint
from qlora.run.files import write_folder
from qlora.run.folder import FINISHED, LOCK, RUN
from qlora.run.schema import FORMAT, Environment, RunInfo
from tests.helpers import adapted_model, save_checkpoint, wake_adapters


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> Path:
    """A run folder as a finished run of the tiny model leaves it, with an adapter that does something, and a checkpoint."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    (run / "checkpoints").mkdir(parents=True)
    config = TrainConfig(model=str(tiny), lora_r=4, lora_alpha=8, lora_dropout=0.0, max_length=300, eval_file="held.jsonl",
                         train_file="train.jsonl", learning_rate=1e-4)  # fmt: skip
    model = adapted_model(config)
    wake_adapters(model)
    tokenizer = adapter.load_tokenizer(str(tiny), load_meta_model(str(tiny), config), config)
    options, environment = config.plain(), Environment(python="3", device="cpu", packages={})
    run_info = RunInfo(format=FORMAT, config=options, data="d", eval_data=None, targets=[], device="cpu", history=[],
                       origin=None, weights=fingerprint(model), environment=environment)  # fmt: skip
    write_folder(run / "adapter", dict(checkpoint.adapter_files(model, tokenizer)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    save_checkpoint(run / "checkpoints", model, optimizer, checkpoint.TrainState(step=4), run_info)
    (run / RUN).write_text(json.dumps(run_info.model_dump()))
    (run / LOCK).touch()
    (run / FINISHED).write_text('{"step": 4}')
    return run


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))
