"""What inspect-data tells of data is what training makes of it."""

import dataclasses
import io
import json

import pytest
import transformers
from rich.console import Console

from qlora.cli import main
from qlora.commands import inspect_data
from qlora.commands.inspect_data import Repeats
from qlora.config import TrainConfig
from qlora.data.batch import epoch_rows, iter_batches, training_batches
from qlora.data.dataset import TokenizedDataset
from qlora.data.formats import Example, check_source
from qlora.data.messages import Message
from qlora.data.template import IGNORED, TokenizedExample
from qlora.run import explain
from qlora.run.explain import Token


def encoded(*lengths: int, prompt: int = 4) -> TokenizedDataset:
    return TokenizedDataset(
        TokenizedExample([1] * n, [IGNORED] * prompt + [1] * (n - prompt), line) for line, n in enumerate(lengths, 1)
    )


def example(line: int, prompt: str, response: str, system: str | None = None) -> Example:
    turns = [Message("system", system)] if system else []
    return Example((*turns, Message("user", prompt), Message("assistant", response)), line)


def shown(renderable) -> str:
    out = io.StringIO()
    Console(file=out, width=120).print(renderable)
    return out.getvalue()


def test_contents_are_counted_as_training_would():
    everything = encoded(5, 30, 7, 20, 10)
    config = TrainConfig(max_length=10, on_long="truncate")
    contents, kept = inspect_data.describe("a.jsonl", everything, config)
    assert (contents.examples, contents.truncated, contents.dropped) == (5, 2, 0)
    assert kept.lengths == [5, 10, 7, 10, 10] and contents.input_tokens == 42 and contents.trained_tokens == 1 + 6 + 3 + 6 + 6
    assert (contents.shortest, contents.median, contents.mean, contents.longest) == (5, 10, 14.4, 30)
    contents, kept = inspect_data.describe("a.jsonl", everything, dataclasses.replace(config, on_long="drop"))
    assert (contents.truncated, contents.dropped, contents.dropped_lines) == (0, 2, [2, 4]) and kept.lengths == [5, 7, 10]
    everything = encoded(15, 30, 20, prompt=15)  # a cut at 10 leaves nothing to train on
    contents, kept = inspect_data.describe("a.jsonl", everything, config)
    assert (contents.truncated, contents.dropped_lines) == (0, [1, 2, 3]) and len(kept) == 0
    contents, _ = inspect_data.describe("a", encoded(*range(1, 101)), TrainConfig())
    assert contents.percentile_95 == 95


@pytest.mark.parametrize("lengths", [[7], [1, 2, 3], [5, 5, 900], list(range(3, 1000, 7)), [100] * 30])
def test_a_histogram_holds_each_length_once(lengths):
    found = inspect_data.histogram(sorted(lengths))
    assert len(found) <= inspect_data.BINS and found[0][0] == min(lengths) and found[-1][1] >= max(lengths)
    assert all(count == sum(start <= n <= end for n in lengths) for start, end, count in found)
    assert [end + 1 for _, end, _ in found[:-1]] == [start for start, _, _ in found[1:]]


def test_duplicates_are_exact_or_equal_but_for_case_and_white_space():
    rows = [example(1, "p", "r"), example(2, "p", "R "), example(3, "p", "r"), example(4, "p", "other"), example(5, "q", "r")]
    assert inspect_data.duplicates(rows) == Repeats(exact=[(3, 1)], normalized=[(2, 1), (3, 1)])
    apart = [example(1, "a b", "c"), example(2, "a", "b c"), example(3, "a", "b c", system="s")]
    assert inspect_data.duplicates(apart) == Repeats([], [])


def test_leaks_are_found_by_prompt_and_by_prompt_and_response():
    train = [example(1, "one", "x"), example(2, "Two  words", "y"), example(3, "one", "z"), example(4, "three", "w")]
    eval_examples = [example(1, "four", "x"), example(2, "one", "z"), example(3, "two words", "Y"), example(4, "three", "v")]
    assert inspect_data.leaks(train, eval_examples, prompts_only=False) == Repeats([(2, 3)], [(2, 3), (3, 2)])
    assert inspect_data.leaks(train, eval_examples, prompts_only=True) == Repeats([(2, 1), (4, 4)], [(2, 1), (3, 2), (4, 4)])


@pytest.mark.parametrize("packing", [False, True])
def test_padding_is_that_of_the_batches_of_an_epoch(packing):
    samples = encoded(5, 30, 7, 20, 10, 31, 9, 150, 6)
    config = TrainConfig(max_length=200, packing=packing, per_device_train_batch_size=2, seed=3)
    found = inspect_data.padding(samples, config)
    rows = epoch_rows(samples, config, 1)
    batches = list(iter_batches(samples, rows, 2))
    positions, tokens = sum(batch.input_ids.numel() for batch in batches), sum(samples.lengths)
    assert (found.rows, found.micro_batches, found.positions) == (len(rows), len(batches), positions)
    assert found.wasted == pytest.approx(1 - tokens / positions)
    graphs = dataclasses.replace(config, compile="graphs")
    recorded = sum(batch.input_ids.numel() for batch in training_batches(samples, rows, graphs))
    assert found.wasted_with_graphs == pytest.approx(1 - tokens / recorded) and recorded > positions


def test_shown_samples_go_from_the_shortest_to_the_longest():
    samples = encoded(5, 30, 7, 20, 10)
    assert [len(sample.input_ids) for sample in inspect_data.spread(samples, 3)] == [5, 10, 30]
    assert [len(sample.input_ids) for sample in inspect_data.spread(samples, 9)] == [5, 7, 10, 20, 30]
    assert [len(sample.input_ids) for sample in inspect_data.spread(samples, 1)] == [5] and inspect_data.spread(
        samples, 0
    ) == []


def test_trained_tokens_are_green_and_in_brackets():
    rows = [Token(0, 1, "a", False), Token(1, 2, "[b]", True), Token(2, 3, "c\n", True), Token(3, 4, "d", False)]
    text = explain.token_text(rows)
    assert text.plain == "│a⟦[b]│c↵\n⟧d"
    assert [text.plain[span.start : span.end] for span in text.spans if "green" in span.style] == ["[b]", "c↵\n"]
    assert explain.token_text(rows[:2]).plain == "│a⟦[b]⟧"
    long = explain.token_text([Token(index, index, f"<{index}>", False) for index in range(1000)]).plain
    assert "<99>" in long and "<100>" not in long and "800 more" in long and "<899>" not in long and "<900>" in long


def test_what_training_would_refuse_is_said():
    contents, _ = inspect_data.describe("a", encoded(5, 5, 5, 30), TrainConfig(max_length=10))
    assert "fifth" in inspect_data.refusal(contents, TrainConfig())
    assert inspect_data.refusal(contents, TrainConfig(allow_drop=True)) is None
    assert "error" in inspect_data.refusal(contents, TrainConfig(allow_drop=True, on_long="error"))
    contents, kept = inspect_data.describe("a", encoded(30, 40), TrainConfig(max_length=10))
    assert inspect_data.refusal(contents, TrainConfig(allow_drop=True)) == "none is left" and len(kept) == 0
    bars = shown(inspect_data.histogram_text(contents, 35))
    assert bars.count("█") == 2 * inspect_data.BAR and "--max-length is in" not in bars


@pytest.fixture
def files(tmp_path, tiny):
    """Command line for a training file and a eval one: a duplicate, a leak, and a long example."""
    rows = [("one", "a"), ("two", "b"), ("one", "a"), ("three", "c " * 300)]
    eval_examples = [("TWO ", "B"), ("one", "other"), ("new", "n")]
    for name, pairs in (("train", rows), ("eval", eval_examples)):
        text = "".join(json.dumps({"prompt": prompt, "completion": response}) + "\n" for prompt, response in pairs)
        (tmp_path / f"{name}.jsonl").write_text(text)
    return ["inspect-data", "--model", "tiny-random", "--train-file", str(tmp_path / "train.jsonl"),
            "--eval-file", str(tmp_path / "eval.jsonl")]  # fmt: skip


def test_the_command_tells_it_all_without_weights(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)
    assert main([*files, "--max-length", "100", "--packing", "--json", str(tmp_path / "found.json")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "duplicates in train: 1 of 4 (lines 3 = 1)" in out
    assert "eval prompt and response in train: 0 of 3 ignoring case and whitespace: 1 of 3 (lines 1 = 2)" in out
    assert "eval prompt in train: 1 of 3 (lines 2 = 1) ignoring case and whitespace: 2 of 3 (lines 1 = 2, 2 = 1)" in out
    assert "Dropped of train: lines 4" in out and "Training would refuse train: more than a fifth" in out
    assert "packed *" in out and "⟦" in out and "Line 1," in out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["data"]["train"]["dropped_lines"] == [4] and found["config"]["max_length"] == 100
    assert found["repeats"]["eval prompt in train"] == {"exact": [[2, 1]], "normalized": [[1, 2], [2, 1]]}
    assert set(found["padding"]) == {"single samples", "packed"} and found["data"]["eval"]["examples"] == 3


def test_columns_keys_and_mistakes_are_shown_with_the_text_as_it_is_rendered(tmp_path, capsys):
    rows = [{"instruction": f"q{n}", "input": "more" * (n % 2), "output": "Yes.", "id": n} for n in range(4)]
    rows[3]["instruction"] = "q1"
    rows[3]["output"] = "No <|end|>."
    path, out = tmp_path / "train.jsonl", tmp_path / "found.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["inspect-data", "--model", "tiny-random", "--train-file", str(path), "--json", str(out)]
    assert main([*command, "--max-length", "80"]) == 0
    text = capsys.readouterr().out
    words = " ".join(text.replace("│", " ").split())
    assert "(empty in 2 of 4)" in words and "id ignored" in words
    assert "Probably not meant: train: a special token of the model is written in the text: 1 of 4 (lines 4)" in words
    assert "the same prompt has another answer than before: 1 of 4 (lines 4) The model learns a mix." in words
    assert "### Instruction:\nq0\n\n### Response:\n⟦Yes.<|endoftext|>⟧" in text
    found = json.loads(out.read_text())
    assert [finding["lines"] for finding in found["mistakes"]["train"]] == [[4], [4]]
    assert found["columns"]["train"]["empty"] == {"input": 2} and found["columns"]["train"]["rows"] == 4
    assert main([*command, "--tokens"]) == 0
    assert "│#│#│#│" in capsys.readouterr().out


def test_keys_of_messages_are_shown(tmp_path, tokenizer, capsys):
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": calls, "weight": 1}]
    path = tmp_path / "train.jsonl"
    path.write_text((json.dumps({"messages": turns}) + "\n") * 2)
    found = check_source(path, "train")
    assert found.keys == {"tool_calls": 2} and found.rows == 2
    table = shown(inspect_data.columns_table({"train": found}))
    assert "messages.tool_calls" in table and "given to the chat template (2 rows)" in table


def test_all_dropped_is_told_too(files, capsys):
    assert main([*files, "--max-length", "3", "--examples", "0"]) == 0
    assert "none is left" in capsys.readouterr().out


def test_bad_input_is_one_paragraph(files, tmp_path, capsys):
    wrong = (
        (["--examples", "-1"], 2),
        (["--max-length", "0"], 2),
        (["--per-device-train-batch-size", "0"], 2),
        (["--json", str(tmp_path / "no" / "x.json")], 4),
        (["--eval-file", str(tmp_path / "none.jsonl")], 3),
        (["--model", str(tmp_path)], 7),
    )
    for flags, code in wrong:
        assert main([*files, *flags]) == code, flags
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("error: "), error


def test_lines_of_several_files_are_told_with_their_file(files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "more.csv").write_text(f"prompt,completion\ntwo,b\nlong,{'c ' * 300}\n")
    (tmp_path / "held.csv").write_text("prompt,completion\nthree,c\nlong,d\n")
    flags = [*files[:3], "--train-file", "train.jsonl", "more.csv", "--eval-file", "eval.jsonl", "held.csv"]
    assert main([*flags, "--max-length", "100", "--json", "found.json"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "duplicates in train: 2 of 6 (lines train.jsonl:3 = train.jsonl:1, more.csv:2 = train.jsonl:2)" in out
    assert "eval prompt in train: 3 of 5 (lines eval.jsonl:2 = train.jsonl:1, held.csv:2 = train.jsonl:4" in out
    assert "held.csv:3 = more.csv:3)" in out and "Dropped of train: lines train.jsonl:4, more.csv:3" in out
    assert "Line train.jsonl:" in out or "Line more.csv:" in out
    assert main([*flags, "--json", "held.csv"]) == 2 and "is read by this command" in capsys.readouterr().err
