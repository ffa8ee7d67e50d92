"""The comparison with datasets.map."""

import json

from benchmarks import tables, tokenizing
from benchmarks.harness import Output


def test_both_tokenize_the_same_rows(tmp_path, monkeypatch):
    out = tmp_path / "tokenizing_cpu_1.json"
    tokenizing.main(tokenizing.Options(Output(out), model="tiny-random", rows=2100, times=1))
    cells = json.loads(out.read_text())["cells"]
    assert [cell["what"] for cell in cells] == 2 * ["this loop", "this loop, from its cache", "`datasets.map`"]
    assert {cell["rows"] for cell in cells[:3]} == {210} and {cell["rows"] for cell in cells[3:]} == {2100}
    ours, kept, theirs = cells[3:]
    assert ours["tokens"] == kept["tokens"] and 0 <= theirs["tokens"] - ours["tokens"] <= 2 * 2100  # what follows the last stop
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    text = tokenizing.speed("tokenizing_cpu_*.json")
    assert text.count("\n| this loop") == 4 and text.count("\n| `datasets.map`") == 2
