"""Files of older versions are read under the keys of this one."""

import json

import pytest
import yaml

from benchmarks import harness
from qlora.config import parse
from qlora.errors import UserError
from qlora.report import record
from qlora.run.schema import in_gb, with_current_keys
from tests.helpers import EVALUATED, write_run


def test_gib_becomes_gb_in_numbers_objects_and_arrays():
    old = '{"peak_gib": 2, "at_gib": {"sdpa": {"8192": 0.5}, "eager": null}, "runs_gib": [1, 4], "n": 1, "fits_gib": true}'
    assert json.loads(old, object_hook=in_gb) == {
        "peak_gb": pytest.approx(2.147483648),
        "at_gb": {"sdpa": {"8192": pytest.approx(0.536870912)}, "eager": None},
        "runs_gb": pytest.approx([1.073741824, 4.294967296]),
        "n": 1,
        "fits_gb": True,
    }


def test_a_current_key_wins_over_the_old_one():
    assert with_current_keys({"total_gib": 1.0, "total_gb": 3.0}) == {"total_gb": 3.0}
    assert with_current_keys({"held_out": "a", "eval_data": "b", "held_out_sha256": "c"})["eval_data"] == "b"


def test_the_report_reads_an_old_run_with_its_evaluation(tmp_path):
    folder = write_run(tmp_path / "run", device_memory_gb=85.9)
    env = json.loads((folder / "env.json").read_text())
    env["device_memory_gib"] = 80.0
    del env["device_memory_gb"]
    (folder / "env.json").write_text(json.dumps(env))
    own = {"adapter_sha256": record.sha256_of(folder / "adapter")}
    text = json.dumps(EVALUATED | own).replace("eval_data_sha256", "held_out_sha256")
    (folder / "evaluation.json").write_text(text)
    assert "held_out_sha256" in text
    found = record.read(folder)
    assert found.environment.device_memory_gb == pytest.approx(85.899345920)
    assert found.evaluation.eval_data_sha256 == "b" * 64 and found.on_gpu()


def test_old_result_files_are_continued_in_gb(tmp_path):
    environment = {"device": "a card", "packages": {"torch": "1"}}
    path = tmp_path / "result.json"
    path.write_text(json.dumps({"environment": environment, "runs": [], "cells": [{"peak_gib": 1.0}]}))
    assert harness.reopened(path, environment, {})["cells"] == [{"peak_gb": pytest.approx(1.073741824)}]
    row = {"id": "x", "figures": {"peak_gib": 1.0}}
    path.write_text(json.dumps({"environment": environment, "model": "demo", "trainings": [], "rows": [row]}))
    assert harness.reopened(path, environment, {})["rows"][0]["figures"] == {"peak_gb": pytest.approx(1.073741824)}


@pytest.mark.parametrize("names", ["/home/me/my.jsonl", ["/home/me/my.jsonl", "org/set:en:train"]])
def test_data_are_one_name_in_older_runs_and_a_list_in_newer_ones(tmp_path, names):
    folder = write_run(tmp_path / "run")
    run_info, config = json.loads((folder / "run.json").read_text()), yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "run.json").write_text(json.dumps(run_info | {"config": {**config, "train_file": names, "eval_file": None}}))
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"train_file": names}))
    wanted = [names] if isinstance(names, str) else names
    found = record.read(folder)
    assert found.config["train_file"] == found.run_info.config["train_file"] == wanted
    assert found.run_info.config["eval_file"] is None
    assert parse(["--config", str(folder / "config.yaml")]).train_file == tuple(wanted)
    for wrong in ([], 5, [5]):
        (folder / "config.yaml").write_text(yaml.safe_dump(config | {"train_file": wrong}))
        with pytest.raises(UserError, match="train_file"):
            record.read(folder)
