"""python -m qlora evaluate, on the tiny model: its numbers against training's own, and what it refuses."""

import dataclasses
import hashlib
import json
import math

import pytest
import torch

from qlora.cli import main
from qlora.commands import evaluate
from qlora.commands.adapter import load_adapted, open_adapter
from qlora.commands.options import EvaluateOptions
from qlora.config import BUNDLED_EVAL
from qlora.data.batch import collate, iter_batches
from qlora.data.dataset import encode_all
from qlora.data.formats import read_examples
from qlora.data.template import IGNORED, encode_prompt
from qlora.eval import scores
from qlora.eval.generate import generate
from qlora.eval.loss import evaluate_loss
from qlora.model import attention
from qlora.model.loss import read_head, token_loss_sum
from tests.helpers import wake_adapters


@pytest.fixture
def rows(tmp_path):
    """Three short examples."""
    path = tmp_path / "held.jsonl"
    pairs = [("Say a", '{"a": 1}'), ("Say something longer than that", '{"b": 2}'), ("c?", '{"c": [1, 2, 3, 4, 5, 6, 7]}')]
    path.write_text("".join(json.dumps({"instruction": a, "response": b}) + "\n" for a, b in pairs))
    return path


def test_every_number_is_in_the_file_and_the_table(run, rows, tmp_path, capsys):
    out = tmp_path / "evaluation.json"
    flags = ["evaluate", str(run), "--eval-file", str(rows), "--max-new-tokens", "6", "--batch-size", "2", "--json", str(out)]
    assert main(flags) == 0
    shown, record = capsys.readouterr().out, json.loads(out.read_text())
    assert list(record["metrics"]) == [name for name in scores.SHOWN if name != "valid_avro"]
    assert "eval loss" in shown and "3 eval examples" in shown and "[" in shown and str(out) in shown
    assert (
        record["num_examples"] == 3
        and (record["quantization"], record["precision"]) == ("nf4", "bf16")
        and record["environment"]["packages"]["torch"]
    )
    assert record["answers"][0]["reference"] == '{"a": 1}' and record["answers"][1]["line"] == 2
    for found in record["metrics"].values():
        assert set(found) == {"base", "adapter", "difference"}
        assert found["difference"]["value"] == pytest.approx(found["adapter"]["value"] - found["base"]["value"])
        assert {side[end] for side in found.values() for end in ("low", "high")} == {None}  # of three examples
    assert "[-]: no intervals; at least 5 examples" in " ".join(shown.split())
    assert record["adapter_sha256"] == hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
    # The same numbers from training's own functions, one sample at a time.
    opened = open_adapter(run)
    model = load_adapted(opened)
    head = read_head(model)
    samples, _ = encode_all(read_examples(rows, "test"), rows, opened.template, opened.config)
    assert record["eval_data_sha256"] == samples.sha256
    with attention.for_training(model, opened.config):
        batches = iter_batches(samples, range(3), 1)
        wanted = evaluate_loss(model, batches, lambda hidden, batch: token_loss_sum(hidden, batch, head))
    assert record["metrics"]["loss"]["adapter"]["value"] == pytest.approx(wanted.loss, rel=2e-3)
    assert record["num_tokens"] == wanted.num_tokens
    prompts = [encode_prompt(example.prompt, opened.template) for example in read_examples(rows, "test")]
    answers = [generate(model, [prompt], opened.template, 6)[0] for prompt in prompts]
    assert [row["adapter"] for row in record["answers"]] == answers
    assert [row["base"] for row in record["answers"]] != answers
    assert main([*flags, "--int8"]) == 0
    int8 = json.loads(out.read_text())
    assert int8["quantization"] == "int8"
    assert int8["metrics"]["loss"]["base"]["value"] == pytest.approx(record["metrics"]["loss"]["base"]["value"], rel=0.05)
    assert int8["metrics"]["loss"] != record["metrics"]["loss"]


def test_what_evaluate_writes_stands_in_the_report_of_its_run(run, tmp_path, capsys):
    opened = open_adapter(run)
    eval_set, _ = encode_all(read_examples(BUNDLED_EVAL, "test"), BUNDLED_EVAL, opened.template, opened.config)
    run_info = json.loads((run / "run.json").read_text()) | {"eval_data": eval_set.sha256, "targets": [], "history": []}
    (run / "run.json").write_text(json.dumps(run_info))
    (run / "config.yaml").write_text(json.dumps(run_info["config"] | {"train_file": "x.jsonl", "learning_rate": 1e-3}))
    flags = ["--eval-file", str(BUNDLED_EVAL), "--max-new-tokens", "3", "--json", str(run / "evaluation.json")]
    assert main(["evaluate", str(run), *flags]) == 0
    record = json.loads((run / "evaluation.json").read_text())
    for found in record["metrics"].values():
        assert all(side["low"] <= side["value"] + 1e-9 and side["value"] <= side["high"] + 1e-9 for side in found.values())
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "on 8 eval examples: base and adapter" in page and page.count('<span class="interval">') == 27


def test_json_knows_no_nan(rows):
    nan = scores.Estimate(math.nan, -math.inf, math.inf)
    sides = [evaluate.Side(None, None, [], 1.0, 2.0)] * 2
    found = evaluate.recorded(sides, {"loss": scores.Comparison(nan, nan, nan._replace(value=1.0))}, [])["metrics"]["loss"]
    assert found["base"] == {"value": None, "low": None, "high": None} and found["difference"]["value"] == 1.0


def test_tokens_are_scored_as_by_transformers_and_counted_by_sample(model, head, samples):
    wake_adapters(model)
    rows = [samples[0], samples[1]._replace(labels=[IGNORED] * 44 + samples[1].labels[44:]), samples[2]]
    results = [evaluate.score_tokens(model, rows, size) for size in (1, 3)]
    model.eval()
    for index, row in enumerate(rows):
        batch = collate([row])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            output = model(input_ids=batch.input_ids, labels=batch.labels)
        targets = batch.labels[0, 1:]
        hits = (output.logits[0, :-1].argmax(-1) == targets)[targets != IGNORED].sum().item()
        for eval_set, each in results:
            assert each[index, 2] == batch.num_tokens and each[index, 0] == pytest.approx(
                output.loss.item() * batch.num_tokens, rel=5e-3
            )
            assert abs(each[index, 1] - hits) <= 1  # of two tokens whose logits bf16 can hardly tell apart
            assert each[:, 0].sum() / each[:, 2].sum() == pytest.approx(eval_set.loss, rel=1e-5)


def test_a_chunk_of_logits_at_a_time_changes_nothing(head, samples, monkeypatch):
    batch = collate(samples[:2])
    hidden = torch.randn(*batch.input_ids.shape, head.weight.shape[1], dtype=torch.bfloat16)
    whole = evaluate.token_scores(hidden, batch, head)
    monkeypatch.setattr(evaluate, "CHUNK_TOKENS", 7)
    chunked = evaluate.token_scores(hidden, batch, head)
    assert torch.allclose(whole[0], chunked[0], rtol=1e-2) and len(whole[0]) == batch.num_tokens
    assert (whole[1] == chunked[1]).float().mean() > 0.98


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--batch-size", "0"], 2, "--batch-size 0"),
        (["--eval-file", "none.jsonl"], 3, "none.jsonl does not exist"),
        (["--eval-file", "EMPTY"], 3, "holds no example"),
        (["--json", "/no/such/folder/x.json"], 4, "/no/such/folder/x.json cannot be written"),
        (["--model", "/no/such/folder"], 7, "/no/such/folder"),
        (["--max-length", "20"], 3, "none of 8 examples fits --max-length 20"),
        (["--eval-file", "MIXED", "--max-length", "50"], 3, "--allow-drop"),
        (["--eval-file", "MIXED", "--max-length", "50", "--on-long", "error"], 3, "more than --max-length 50"),
        (["--max-new-tokens", "100000"], 3, "more than the model's positions"),
    ],
)
def test_mistakes_are_told_before_weights_are_loaded(run, tmp_path, monkeypatch, capsys, flags, code, words):
    monkeypatch.setattr(evaluate, "load_adapted", None)  # it must not come to that
    (tmp_path / "EMPTY").touch()
    lines = (json.dumps({"instruction": "a", "response": text}) for text in ("b", "c", "d" * 500))
    (tmp_path / "MIXED").write_text("\n".join(lines))
    flags = [str(tmp_path / flag) if flag in ("EMPTY", "MIXED") else flag for flag in flags]
    file = [] if "--eval-file" in flags else ["--eval-file", str(BUNDLED_EVAL)]
    assert main(["evaluate", str(run), *flags, *file]) == code
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_data_that_no_run_names_must_be_given(run, tmp_path, capsys):
    run_info = json.loads((run / "run.json").read_text())
    run_info["config"]["eval_file"] = None
    (run / "run.json").write_text(json.dumps(run_info))
    assert main(["evaluate", str(run)]) == 2 and "--eval-file" in capsys.readouterr().err


def test_columns_are_those_of_the_run_or_of_the_command(run, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"q": "Say a", "a": "a", "history": ["x"]}) + "\n")
    own = ("instruction=q", "response=a")
    options = EvaluateOptions(run, eval_file=str(path), columns=own, ignore_columns=("history",))
    opened = open_adapter(run)
    assert opened.config.columns == ()
    _, samples, examples, notes = evaluate.read_eval_data(options, opened)
    assert len(samples) == 1 and examples[0].response == "a" and "ignored: history" in notes
    record = json.loads((run / "run.json").read_text())
    record["config"] |= {"columns": list(own), "ignore_columns": ["history"]}
    (run / "run.json").write_text(json.dumps(record))
    of_the_run = dataclasses.replace(options, columns=None, ignore_columns=None)
    assert evaluate.read_eval_data(of_the_run, open_adapter(run))[2] == examples
    for name in ("columns", "ignore_columns"):  # a run of version 0.1.0
        del record["config"][name]
    (run / "run.json").write_text(json.dumps(record))
    assert open_adapter(run).config.columns == ()


def test_texts_have_a_loss_and_no_answers(run, tmp_path, capsys):
    path, out = tmp_path / "texts.jsonl", tmp_path / "out.json"
    path.write_text("".join(json.dumps({"text": f"once {n}"}) + "\n" for n in range(2)))
    assert main(["evaluate", str(run), "--eval-file", str(path), "--json", str(out)]) == 0
    record = json.loads(out.read_text())
    assert list(record["metrics"]) == ["loss", "perplexity", "token_accuracy"] and record["answers"] == []
    assert "2 eval examples" in capsys.readouterr().out


def test_several_files_are_one_eval_set_and_an_error_names_the_right_one(run, rows, tmp_path, capsys, monkeypatch):
    other = tmp_path / "other.csv"
    other.write_text(f"instruction,response\nSay b,b\n{'Say ' * 30},c\n")
    out = tmp_path / "out.json"
    flags = ["evaluate", str(run), "--eval-file", str(rows), str(other)]
    assert main([*flags, "--max-new-tokens", "2", "--json", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["num_examples"] == 5 and record["eval_file"] == f"{rows}, {other}"
    assert "; 2 files" in capsys.readouterr().out
    opened = open_adapter(run)
    positions = opened.meta_model.config.get_text_config().max_position_embeddings
    monkeypatch.setattr(evaluate, "load_adapted", None)  # it must not come to that
    assert main([*flags, "--max-new-tokens", str(positions - 60)]) == 3
    assert f"{other}:3: " in capsys.readouterr().err
    assert main([*flags, "--json", str(other)]) == 2 and "is read by this command" in capsys.readouterr().err
