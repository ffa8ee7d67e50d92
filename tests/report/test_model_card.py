"""adapter/README.md: filled in from the run, and its lines work."""

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import jinja2
import jinja2.meta
import pytest
import torch
import transformers

from qlora.cli import train as command_line
from qlora.data.messages import Message
from qlora.data.template import encode_prompt, load_template
from qlora.model import demo
from qlora.report import record as records
from qlora.report.model_card import TEMPLATE, base_of, data_name, model_card
from tests.helpers import write_run

pytestmark = pytest.mark.draws_report


@pytest.fixture(autouse=True)
def strict(monkeypatch):
    """ModelCard leaves a place empty whose value is missing, or misspelled in the template; here it is an error."""
    monkeypatch.setattr(jinja2, "Template", jinja2.Environment(undefined=jinja2.StrictUndefined).from_string)


@pytest.fixture(scope="module", params=["plain", "chat"])
def folder(request, tiny, tmp_path_factory) -> Path:
    """A run of two steps on the tiny model, finished."""
    folder = tmp_path_factory.mktemp("runs") / request.param
    flags = ["--max-steps", "2", "--lora-r", "20", "--learning-rate", "0.01", "--prompt-format", request.param]
    assert command_line(["--model", "tiny-random", *flags, "--output-dir", str(folder)]) == 0
    return folder


def head_of(card: str) -> dict:
    return huggingface_hub.ModelCard(card, ignore_metadata_errors=False).data.to_dict()


def code(card: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", card, re.DOTALL)


def test_training_leaves_a_card_without_a_blank(folder):
    card = (folder / "adapter" / "README.md").read_text()
    assert head_of(card) == {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora", "qlora"]}
    outside_answers = re.sub(r"```text.*?```", "", card, flags=re.DOTALL)
    blanks = (r"\[More Information", r"None", "null", "<!--", r"\{\{|\{%", "Undefined", "not recorded", "/tmp", r"\| +\|$")
    for blank in blanks:
        assert not re.search(blank, outside_answers.replace("| | |\n", ""), re.MULTILINE), blank
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluations = [row for row in metrics if row["event"] == "eval"]
    for words in (f"| before | {evaluations[0]['eval_loss']:.4f} |", f"| after | {evaluations[-1]['eval_loss']:.4f} |",
                  "random weights", "| Rank, alpha, dropout | 20, 64, 0.1 |", f"torch {torch.__version__}",
                  "22 bundled AVRO", "**How much of it is chance.**", f"| Prompt format | {folder.name} |"):  # fmt: skip
        assert words in card, words


def test_the_template_takes_every_value_that_is_given_and_no_other(tmp_path, monkeypatch):
    """Those it may leave out are among the values of some run; see `strict` for those that are missing."""
    given, from_template = {}, huggingface_hub.ModelCard.from_template

    def seen(card_data, template_path, **values):
        given.update(values)
        return from_template(card_data, template_path=template_path, **values)

    monkeypatch.setattr(huggingface_hub.ModelCard, "from_template", seen)
    card = model_card(records.read(write_run(tmp_path / "run")))
    named = jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(TEMPLATE.read_text()))
    assert named == {*given, "card_data"}
    assert card.startswith("---\nlibrary_name: peft\n") and card.endswith(".\n") and not card.endswith("\n\n")
    assert not re.search(r"\n{3,}", card)
    del given["versions"]
    with pytest.raises(jinja2.UndefinedError, match="versions"):
        from_template(huggingface_hub.ModelCardData(), template_path=str(TEMPLATE), **given)


def test_training_leaves_a_report_of_what_it_counted_and_predicted(folder):
    """Of both formats the same data; the run ended early, after 2 of 2 steps."""
    assert {path.name for path in (folder / "plots").glob("*.png")} >= {"loss.png", "peak_memory_gb.png"}
    words = " ".join(re.sub(r"<[^>]+>", " ", (folder / "report.html").read_text()).split())
    run_info = json.loads((folder / "run.json").read_text())
    train, eval_counts = run_info["counts"]
    assert f"examples used {train['examples']} {eval_counts['examples']} " in words and (train["examples"], train["read"]) == (
        22,
        22,
    )
    assert f"tokens that carry the loss {train['tokens']:,} {eval_counts['tokens']:,} " in words
    assert train["shortest"] < train["median"] < train["longest"] < train["input_tokens"] / 10
    assert f"predicted for a GPU {run_info['predicted_gb']:.2f} GB" in words and "Steps 2 of 2" in words
    terms_gb = run_info["predicted_terms_gb"]
    assert (
        sum(terms_gb.values()) == run_info["predicted_gb"] and f"adapters in fp32 {terms_gb['adapters in fp32']:.3f}" in words
    )
    assert run_info["parameters"] > 400_000 and "% of the model" in words


def test_its_lines_load_and_prompt_and_merge(folder, template, monkeypatch, tmp_path):
    """Run as they stand, in a copy of the adapter's folder."""
    card = (folder / "adapter" / "README.md").read_text()
    place = tmp_path / "adapter"
    place.mkdir()
    for path in (folder / "adapter").iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    monkeypatch.chdir(place)
    load, nf4, merge = code(card, "python")
    names: dict = {}
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(load.replace("max_new_tokens=256", "max_new_tokens=8"), names)
    assert said.getvalue().strip()
    sample = json.loads((folder / "samples.jsonl").read_text().splitlines()[0])
    format_ = load_template(names["tokenizer"], folder.name)
    assert names["inputs"].input_ids[0].tolist() == encode_prompt((Message("user", sample["prompt"]),), format_)
    with torch.no_grad():
        beside = names["model"](**names["inputs"]).logits
        with names["model"].disable_adapter():
            without = names["model"](**names["inputs"]).logits
        exec(merge, names)
        merged = transformers.AutoModelForCausalLM.from_pretrained("merged", dtype=torch.bfloat16)(**names["inputs"]).logits
        exec(nf4, names)
        quantized = names["model"](**names["inputs"]).logits
    assert (beside - without).norm() > 3 * (beside - merged).norm(), (beside - without).norm() / (beside - merged).norm()
    assert quantized.shape == beside.shape and not torch.equal(quantized, beside)
    assert (Path("merged") / "tokenizer.json").exists()


def test_the_serve_line_names_a_base_and_a_rank_that_vllm_takes(folder, tmp_path):
    (serve,) = code((folder / "adapter" / "README.md").read_text(), "bash")
    assert "--enable-lora --lora-modules tuned=. --max-lora-rank 32" in serve  # rank 20 is below it, and no choice of vLLM's
    root = Path(__file__).parents[2]
    python = tmp_path / "python"  # the card says `python`; pytest may run by its path, without an activated environment
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    shell = subprocess.run(
        ["bash", "-c", serve.replace("vllm serve", "echo")],
        capture_output=True, text=True, cwd=folder / "adapter", env={**os.environ, "PYTHONPATH": str(root), "PATH": path},
    )  # fmt: skip
    assert Path(shlex.split(shell.stdout)[0]) == demo.tiny_random_model(), shell.stderr


COMMIT = "0a67737cc96d2554230f90338b163bc6380a2a85"


@pytest.mark.parametrize(
    ("model", "source", "hub_id", "license"),
    [
        ("microsoft/Phi-3-mini-4k-instruct", "microsoft/Phi-3-mini-4k-instruct", "microsoft/Phi-3-mini-4k-instruct", "mit"),
        ("org/name", "org/name", "org/name", None),
        ("cached", f"/home/me/hub/models--org--some-name/snapshots/{COMMIT}", "org/some-name", None),
        ("../phi3", "/home/me/secret/phi3", None, None),
        ("demo", "/home/me/.cache/qlora-train/smollm2-135m-phi3", None, "apache-2.0"),
    ],
)
def test_the_base_is_named_as_others_can_find_it(tmp_path, model, source, hub_id, license):
    folder = write_run(tmp_path / "run", model=model)
    revision = COMMIT if hub_id else None
    settings = {"base_model_name_or_path": source, "revision": None if model == "cached" else revision}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps({"r": 8, "lora_alpha": 16} | settings))
    run = records.read(folder)
    base, card = base_of(run), model_card(run)
    assert (base.hub_id, base.revision, base.license) == (hub_id, revision, license)
    head = head_of(card)
    assert head.get("base_model") == ("HuggingFaceTB/SmolLM2-135M-Instruct" if model == "demo" else hub_id)
    assert head.get("license") == license and (f"base_model:adapter:{hub_id}" in head["tags"]) == bool(hub_id)
    assert "/home/me" not in card and "secret" not in card
    if hub_id:
        assert f"vllm serve {hub_id} --revision {COMMIT} --enable-lora" in card
        assert 'AutoPeftModelForCausalLM.from_pretrained(".", dtype=torch.bfloat16)' in card


def test_what_a_run_went_on_with_is_named_without_paths(tmp_path):
    changes = {
        "model": ["/home/me/secret/phi3", "org/name"],
        "eval_file": ["./secret/held.jsonl", "secret/deep/other.jsonl"],
        "compile": ["none", "layers"],
        "learning_rate": [0.1, None],
    }
    card = model_card(records.read(write_run(tmp_path / "run", history=[{"step": 3, "overrides": changes}])))
    assert "model from phi3 to org/name, eval_file from held.jsonl to other.jsonl, compile from none to layers" in card
    assert "learning_rate from 0.1 to None" in card and "secret" not in card and "/home" not in card


def test_data_are_named_without_paths_and_a_hub_data_set_stands_in_the_head(tmp_path):
    assert data_name("/home/me/my.jsonl") == "my.jsonl" and data_name("org/set:train") == "org/set:train"
    assert data_name("my.parquet") == "my.parquet" and data_name(None) == "none"
    assert data_name(["/home/me/my.csv", "org/set", "/data/*.jsonl.gz"]) == "my.csv, org/set, *.jsonl.gz"
    assert data_name([f"/home/me/{n}.csv" for n in range(7)]) == "0.csv, 1.csv, 2.csv, 3.csv, 4.csv and 2 more"
    several = records.read(
        write_run(tmp_path / "several", train_file=("org/set:en:train", "/home/me/my.csv", "org/set:de:train"))
    )
    assert head_of(model_card(several))["datasets"] == ["org/set"] and "/home/me" not in model_card(several)
    run = records.read(write_run(tmp_path / "run", train_file="org/set:train"))
    assert head_of(model_card(run))["datasets"] == ["org/set"]
    assert "datasets" not in head_of(model_card(records.read(write_run(tmp_path / "file"))))


def test_answers_cannot_leave_their_block_and_long_ones_are_cut(tmp_path):
    folder = write_run(tmp_path / "run")
    answer = "```\n" + "````" + "\n# Not a heading" * 60
    row = {"step": 1, "prompt": 'say "```"', "base": answer, "tuned": "x", "reference": "y"}
    (folder / "samples.jsonl").write_text(json.dumps(row) + "\n")
    card = model_card(records.read(folder))
    block = re.search(r"^(`{5,})text\n(.*?)^\1$", card, re.DOTALL | re.MULTILINE)
    assert block and "````\n# Not a heading" in block[2] and "... 38 more lines" in block[2]
    assert "# Not a heading" not in card.replace(block[0], "")


def test_a_rank_beyond_vllm_is_to_be_merged_and_no_eval_data_is_told(tmp_path):
    card = model_card(records.read(write_run(tmp_path / "run", lora_r=600, eval_data=None, eval_file=None)))
    assert "--max-lora-rank" not in card and "vLLM takes no such adapter" in card
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    card = model_card(records.read(tmp_path / "run"))
    assert "There was no eval data, so there is no result but the training loss." in card and "| before |" not in card
