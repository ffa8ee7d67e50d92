"""Loading from bf16 and from NF4."""

import json

import pytest

from benchmarks import loading, tables
from benchmarks.harness import Output


def test_both_folders_are_loaded_and_the_saved_one_is_smaller(tmp_path, monkeypatch):
    out = tmp_path / "loading_h100_1.json"
    loading.main(Output(out), shape="tiny", loads=2)
    bf16, nf4 = json.loads(out.read_text())["cells"]
    assert (bf16["stored"], nf4["stored"]) == ("bf16", "NF4") and len(nf4["load_s"]) == 2
    assert nf4["disk_gb"] < 0.5 * bf16["disk_gb"] and nf4["model_gb"] == pytest.approx(bf16["model_gb"])
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    text = loading.load_times("loading_h100_*.json")
    assert "not measured" not in text
    assert text.count("\n| bf16 |") == 1 and text.count("\n| NF4 |") == 1
