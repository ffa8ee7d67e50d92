"""Benchmarks of whole runs, on the tiny model: the demo, and a run that is killed."""

import json
from typing import ClassVar

import pytest

from benchmarks import demo, kill_resume
from benchmarks.harness import Output


def test_a_run_is_timed_and_its_answers_are_judged(tiny, tmp_path):
    out = tmp_path / "out.json"
    demo.main(Output(out), learning_rates=(), model="tiny-random", max_steps=2)
    (run,) = json.loads(out.read_text())["runs"]
    assert run["default"] and 0 < run["first_loss_s"] < run["total_s"] and run["steps"] == len(run["train_loss"]) == 2
    assert run["held_out"] == 8 and run["base_right"] == run["tuned_right"] == 0
    assert any(line.startswith("Adapter:") for line in run["output"]) and str(tmp_path) not in json.dumps(run)


def test_a_sweep_leaves_out_the_default_rate(tmp_path, monkeypatch):
    def timed_run(folder, model, flags):
        asked.append(flags)
        return {"learning_rate": float(flags[1]) if "--learning-rate" in flags else 2e-4, "output": ["a line"]}

    asked: list[list[str]] = []
    monkeypatch.setattr(demo, "timed_run", timed_run)
    monkeypatch.setattr(demo.Cell, "result", lambda cell: cell.stop() or {})
    monkeypatch.setattr(demo, "ResultFile", lambda *_: File)
    demo.main(Output(tmp_path / "x.json"), learning_rates=(1e-4, 2e-4), max_steps=3)
    assert asked == [["--max-steps", "3"], ["--learning-rate", "0.0001", "--max-steps", "3"]]
    assert [run["default"] for run in File.record["runs"]] == [True, False]
    assert ["output" in run for run in File.record["runs"]] == [True, False]


class File:
    environment: ClassVar[dict] = {}
    record: ClassVar[dict] = {}

    def write(row):
        assert "output" not in row


def test_a_schema_is_right_if_it_is_what_was_asked_for():
    asked = "Create an AVRO schema for pump with fields id (string), level (int)"
    fields = [{"name": "id", "type": "string"}, {"name": "level", "type": "int"}]
    right = {"TRAINED": "YES", "type": "record", "name": "Pump", "fields": fields}
    assert demo.is_asked_schema(asked, json.dumps(right))
    for wrong in ({"name": "pump"}, {"fields": fields[:1]}, {"fields": fields[::-1]}, {"type": "no such"}, {"TRAINED": "NO"}):
        assert not demo.is_asked_schema(asked, json.dumps(right | wrong))
    assert not any(demo.is_asked_schema(asked, answer) for answer in ("", "[1]", "{", "3"))


@pytest.mark.faults
def test_a_killed_run_is_compared_with_a_straight_one(tmp_path):
    out = tmp_path / "out.json"
    kill_resume.main(kill_resume.Options(Output(out), shape="tiny", kills=1, length=150))
    record = json.loads(out.read_text())
    assert [kill["equal"] for kill in record["kills"]] == [True] and set(record["finished"].values()) == {True}
    assert record["kills"][0]["newest_checkpoint"] >= 1 and record["checkpoint_bytes"] > 0
