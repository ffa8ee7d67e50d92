"""The report of a run, its curves, and what it says that the run does not show."""

import cProfile
import fcntl
import hashlib
import itertools
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from qlora.cli import main
from qlora.errors import ExitCode, UserError
from qlora.eval.scores import SHOWN
from qlora.report import plots, record
from qlora.report.caveats import caveats
from qlora.report.html import after_training, html, read, write
from qlora.report.model_card import model_card
from qlora.run.folder import RunFolder
from tests.helpers import EVALUATED, HOSTILE, SIDE, evaluation, write_run

pytestmark = pytest.mark.draws_report


def add_rows(folder: Path, *rows: dict) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


class Page(HTMLParser):
    """What a test looks at in a page: tags in order, attributes, text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(text)
        self.words = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.text += data if self.tags[-1:] != ["style"] else ""

    def handle_endtag(self, tag):
        self.text += " "


def page_of(folder: Path) -> Page:
    return Page(write(read(folder)).read_text())


# -- what is read ------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    for folder, code in ((tmp_path / "nowhere", ExitCode.CHECKPOINT), (tmp_path, ExitCode.CHECKPOINT)):
        assert main(["report", str(folder)]) == code
        err = capsys.readouterr().err
        assert err.startswith(f"error: {folder}") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "content"),
    [("config.yaml", "a: [b"), ("config.yaml", "- 1"), ("config.yaml", "\xff"), ("run.json", "{"), ("env.json", "[1]")],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content):
    folder = write_run(tmp_path / "run")
    (folder / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=name) as caught:
        record.read(folder)
    assert caught.value.exit_code == ExitCode.CHECKPOINT


FILES = ("run.json", "env.json", "metrics.jsonl", "samples.jsonl", "evaluation.json", "config.yaml")


def evaluated_run(folder: Path, **changes) -> Path:
    """A run whose evaluation.json is of its own adapter."""
    folder = write_run(folder, **{"steps": 12, "history": [{"step": 3, "overrides": {"lora_r": [1, 2]}}], **changes})
    evaluation = EVALUATED | {"adapter_sha256": record.sha256_of(folder / "adapter")}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null\n", b"[]\n", b"[{}]\n", b'"x"\n', b"3\n", b"\xff\xfe\n", b'{"step": NaN}\n', b"[" * 5000 + b"\n"],
)
def test_a_damaged_file_is_one_paragraph_and_does_not_spoil_a_finished_training(tmp_path, capsys, name, content):
    folder = evaluated_run(tmp_path / "run")
    (folder / name).write_bytes(content)
    if name.endswith(".jsonl") and not content.endswith(b"\n"):  # no rows, or one that is just being written
        assert record.read(folder).status == "finished"
        return
    assert main(["report", str(folder)]) == ExitCode.CHECKPOINT
    err = capsys.readouterr().err
    assert err.startswith(f"error: {folder / name} cannot be read as what ") and err.count("\n") == 1 and len(err) < 600
    said = after_training(folder)
    assert said.startswith("none, as it could not be written: ") and name in said and "The run is complete" in said


WRONG = (None, "x", "\ud800", True, -1, 1.5, math.nan, math.inf, 10**400, [], [None], [[1, 2]], {}, {"x": None})


def wronged(values, wrongs=WRONG, depth=3):
    """Copies of a JSON value, in each of which one part is wrong or gone."""
    yield from wrongs
    if not depth or not isinstance(values, dict | list):
        return
    for key in list(values) if isinstance(values, dict) else range(len(values)):
        for wrong in wronged(values[key], wrongs, depth - 1):
            copy = values.copy()
            copy[key] = wrong
            yield copy
        copy = values.copy()
        del copy[key]
        yield copy


@pytest.mark.parametrize("name", FILES)
def test_whatever_a_file_holds_it_is_reported_on_or_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(plots, "_curve", lambda name, title, said, lines, units, room: plots.Curve(name, said, "", b""))
    folder = evaluated_run(tmp_path / "run")
    path = folder / name
    load = yaml.safe_load if name == "config.yaml" else json.loads
    lines = path.read_text().splitlines() if name.endswith(".jsonl") else [path.read_text()]
    outcomes = set()
    for line in {0, 1, len(lines) - 1} & set(range(len(lines))):
        for wrong in wronged(load(lines[line]), WRONG[::3] if name == "config.yaml" else WRONG):  # PyYAML is slow
            text = yaml.safe_dump(wrong) if name == "config.yaml" else json.dumps(wrong)
            path.write_text("\n".join([*lines[:line], text, *lines[line + 1 :], ""]))
            try:
                run = record.read(folder)
            except UserError as error:
                assert error.exit_code == ExitCode.CHECKPOINT and str(path) in str(error) and "\n" not in str(error)
                outcomes.add("refused")
                continue
            assert "<html" in html(run, plots.draw(run)) and "library_name: peft" in model_card(run)
            outcomes.add("reported on")
    assert outcomes == {"refused", "reported on"}


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"base_model_name_or_path": 3}', b'{"revision": []}'])
def test_damaged_settings_of_the_adapter_are_told(tmp_path, capsys, content):
    folder = write_run(tmp_path / "run")
    (folder / "adapter" / "adapter_config.json").write_bytes(content)
    assert main(["report", str(folder)]) == ExitCode.CHECKPOINT
    assert "adapter_config.json cannot be read as what a run writes" in capsys.readouterr().err


def test_a_line_that_is_torn_in_the_middle_is_named(tmp_path):
    folder = write_run(tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:4], lines[4][:30], *lines[5:]]) + "\n")
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be read .* its line 5 is not whole"):
        record.read(folder)
    lines[4] = json.dumps(json.loads(lines[4]) | {"loss": "low"})
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"in line 5 loss: .*\(loss: 'low'\)"):
        record.read(folder)


def test_a_command_line_or_a_name_that_is_no_utf_8_is_reported_on(tmp_path):
    folder = write_run(tmp_path / "run", train_file="/data/caf\udce9.jsonl")
    environment = json.loads((folder / "env.json").read_text()) | {"command": ["train_loop.py", "caf\udce9.jsonl"]}
    (folder / "env.json").write_text(json.dumps(environment))
    assert main(["report", str(folder)]) == 0
    assert (
        "caf?.jsonl" in (folder / "report.html").read_text() and "caf?.jsonl" in (folder / "adapter" / "README.md").read_text()
    )


def test_a_run_is_finished_going_or_stopped(tmp_path):
    folder = write_run(tmp_path / "run", finished=False, steps=25)
    assert record.read(folder).status == "stopped"
    with (folder / "run.lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert record.read(folder).status == "going"
    (folder / "finished.json").write_text('{"step": 60}')
    assert record.read(folder).status == "finished"


def test_rows_of_other_eval_data_and_torn_ones_do_not_count(tmp_path):
    folder = write_run(tmp_path / "run", steps=20)
    add_rows(folder, evaluation(20, 0.001, eval_data="c" * 64), evaluation(20, 9.0) | {"eval_loss": None})
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "st')  # as it is when the process dies, or just then
    run = record.read(folder)
    assert [row["step"] for row in run.evaluations] == [0, 10, 20] and run.evaluations[-1]["eval_loss"] > 0.3
    assert (run.last_step, run.trained_parameters, run.times_seen[3]) == (20, 440, 2)


# -- the page ----------------------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_else_and_takes_no_text_for_markup(tmp_path):
    folder = write_run(tmp_path / "run", model="org/" + HOSTILE.replace("/", ""), seed=7)
    page = page_of(folder)
    for tag, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "action", "data"):
            assert value.startswith(("#", "data:")), (tag, name, value)
        assert "url(" not in value or "url(#" in value
    text = (folder / "report.html").read_text()
    names = r'<pre.*?</pre>|<t[dh].*?</t[dh]>|xmlns(:xlink)?="http://www\.w3\.org/\d+/\w+"'  # no browser asks for a namespace
    assert not re.search(r"@import|//[a-z]", re.sub(names, "", text, flags=re.DOTALL))
    assert {"script", "b", "iframe", "object", "link"} & set(page.tags) == {"link"}
    assert page.text.count(HOSTILE) >= 3  # a prompt, an answer, the command: as they were written


def test_the_page_has_the_numbers_of_the_run(tmp_path):
    page = page_of(write_run(tmp_path / "run"))
    last = 1.2 * 0.95**60
    for words in (
        "tiny-random fine-tuned on my.jsonl", "1.200 → 0.066", "perplexity 3.320 → 1.068", f"1.140 → {last:.4f}", "60 of 60",
        "5,460", "1,500 tokens/s", "1.75 GB", "440", "0.04 % of the model", "before training 0 1.2000 3.320",
        "at the end 60 0.0661 1.068", "examples read 22 8", "times each was seen 5 to 6",
        "predicted for a GPU 2.50 GB measured 1.75 GB",
        "The prediction is the sum of these: base in NF4 1.750 GB kept until backward 0.750 GB",
        "Python " + sys.version.split()[0], "lora_alpha 64", "After, as wanted",
    ):  # fmt: skip
        assert words in page.words, words
    assert not re.search(r"\bNone\b|\bnan\b|\{\{|Undefined", page.text)
    assert "note" not in [value for _, name, value in page.attributes if name == "class"]
    assert "/home/me" not in page.text.partition("Configuration")[0]


def test_scores_of_the_evaluate_command_stand_in_the_page_with_their_intervals(tmp_path):
    folder = write_run(tmp_path / "run")
    assert "qlora evaluate" not in page_of(folder).words
    found = {name: {"base": SIDE, "adapter": SIDE | {"value": 0.625}, "difference": SIDE} for name in SHOWN}
    own = record.sha256_of(folder / "adapter")
    evaluated = EVALUATED | {"num_examples": 1234, "metrics": found, "adapter_sha256": own}
    (folder / "evaluation.json").write_text(json.dumps(evaluated))
    words = page_of(folder).words
    assert "1,234 eval examples: base" in words and "exact match 50.0 [25.0, 75.0] 62.5 [25.0, 75.0] 50.0 [25.0, 75.0]" in words
    assert "eval loss 0.500 [0.250, 0.750] 0.625" in words and "BLEU 0.5 [0.2, 0.8]" in words
    assert "How often a whole answer is right" not in words  # which is known by now
    found["bleu"]["base"] = {"value": 0.5, "low": None, "high": None}
    other = evaluated | {"num_examples": 4, "eval_data_sha256": "c" * 64}
    (folder / "evaluation.json").write_text(json.dumps(other))
    words = page_of(folder).words
    assert "on 4 examples that are not this run's eval data, or not all of it: base and adapter." in words
    assert "BLEU 0.5 [-] 0.6 [0.2, 0.8]" in words and "No intervals: at least 5 examples are needed" in words


def test_an_evaluation_of_another_adapter_is_left_out_and_that_is_told(tmp_path):
    folder = write_run(tmp_path / "run")
    own = record.sha256_of(folder / "adapter")
    told = "evaluation.json is of another adapter than the one this run ended with, and was left out."
    for digest, ended, shown in ((own, True, True), ("d" * 64, True, False), (own, False, False)):
        (folder / "evaluation.json").write_text(json.dumps(EVALUATED | {"adapter_sha256": digest}))
        (folder / "finished.json").unlink(missing_ok=not ended)
        if ended:
            (folder / "finished.json").write_text('{"step": 60}')
        words = page_of(folder).words
        assert ("eval loss 0.500 [0.250, 0.750]" in words, told in words) == (shown, not shown)
        assert ("How often a whole answer is right" in words) is not shown


def test_the_page_can_be_heard_and_walked_through(tmp_path):
    page = page_of(write_run(tmp_path / "run"))
    levels = [int(tag[1]) for tag in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels.count(1) == 1 and all(after <= before + 1 for before, after in itertools.pairwise(levels))
    before_svg = [page.attributes[at - 2 : at] for at, (tag, *_) in enumerate(page.attributes) if tag == "svg"]
    described = [label for (_, _, role), (_, name, label) in before_svg if (role, name) == ("img", "aria-label")]
    assert len(described) == page.tags.count("svg") == 6 and all(len(words) > 30 for words in described)
    assert "Training loss: 1.14 at first, 0.0553 at last" in described[0] and "Eval loss: 1.2 at first" in described[0]
    ids = [value for _, name, value in page.attributes if name == "id"]
    used = [value for _, name, value in page.attributes if name in ("xlink:href", "clip-path")]
    assert len(ids) == len(set(ids)) and {re.sub(r"^(url\()?#|\)$", "", value) for value in used} <= set(ids)
    assert ("html", "lang", "en") in page.attributes and ("meta", "name", "viewport") in page.attributes
    before_tables = [page.tags[at - 1] for at, tag in enumerate(page.tags) if tag == "table"]
    assert set(before_tables) == {"div"}  # that scrolls


def test_a_long_run_makes_a_small_page_in_time(tmp_path):
    """In time: calls of functions, which no busy machine changes, grow as the run does and not as its square."""
    folder, calls = write_run(tmp_path / "run", steps=20_000), []
    for run in (folder, write_run(tmp_path / "short", steps=2_000)):
        with cProfile.Profile() as profile:
            path = write(read(run))
        calls.append(sum(entry.callcount for entry in profile.getstats()))
    assert calls[0] < 15 * calls[1]
    path = folder / "report.html"
    size = path.stat().st_size + sum(file.stat().st_size for file in (folder / "plots").iterdir())
    assert path.stat().st_size < 500_000 and size < 2e6
    assert {"loss.png", "learning_rate.png", "grad_norm.png", "tokens_per_s.png", "peak_memory_gb.png"} == {
        file.name for file in (folder / "plots").glob("*.png")
    }


@pytest.mark.parametrize("steps", [0, 1, 25])
def test_a_run_that_has_not_ended_says_so_and_is_left_alone(tmp_path, capsys, steps):
    folder = write_run(tmp_path / "run", finished=False, steps=steps)
    before = {path: hashlib.sha256(path.read_bytes()).digest() for path in folder.rglob("*") if path.is_file()}
    with (folder / "run.lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["report", str(folder)]) == 0
        assert capsys.readouterr().out == f"This run is still going.\n{folder / 'report.html'}\n"
        assert "This run is still going: what follows is its state" in page_of(folder).words
    page = page_of(folder)
    assert "This run has not ended: it stopped" in page.words and "Answers are generated when the run ends" in page.words
    assert (f"It stopped after step {steps} of 60" in page.words) and (page.tags.count("svg") == (6 if steps else 0))
    assert before == {path: hashlib.sha256(path.read_bytes()).digest() for path in before}
    assert not (folder / "adapter" / "README.md").exists()


def test_what_an_older_run_did_not_write_is_left_out(tmp_path):
    folder = write_run(tmp_path / "run")
    for name in ("env.json", "run.json"):
        (folder / name).unlink()
    page = page_of(folder)
    assert (
        "60" in page.words
        and "examples read" not in page.words
        and "sum of these" not in page.words
        and not re.search(r"\bNone\b|\bnan\b", page.text)
    )


def test_numbers_that_are_not_finite_leave_gaps(tmp_path):
    folder = write_run(tmp_path / "run", steps=3)
    step = {
        "event": "step",
        "epoch": 1,
        "num_tokens": 9,
        "loss": None,
        "grad_norm": None,
        "learning_rate": 1e-4,
        "tokens_per_s": 1.0,
    }
    add_rows(folder, {**step, "step": 4}, {**step, "step": 5})
    page = page_of(folder)
    assert "2 of 5 steps had a loss or gradient that was not finite" in page.words and "nan" not in page.words
    run = record.read(folder)
    run.rows[:] = [row | {"loss": None, "peak_memory_gb": None} for row in run.rows]
    assert plots.draw(run)[0].description.startswith("Training loss: no finite value.")
    assert "nan" not in Page(html(run, plots.draw(run))).words


# -- what the run does not show ----------------------------------------------------------------------------------------

ALWAYS = {"What it did before and may do no longer", "How much of it is chance", "Other precisions"}


@pytest.mark.parametrize(
    ("changes", "gap", "fact"),
    [
        ({"counts": None}, "What it does beyond prompts like these", "22 examples, each seen up to 6 times"),
        ({}, "A precise eval loss", "8 examples, 700 tokens"),
        ({}, "Anything about language", "random weights"),
        ({}, "How much of it is chance", "seed 42"),
        ({"seed": 7}, "How much of it is chance", "seed 7."),
        ({}, "Speed and memory on a GPU", "on a CPU"),
        ({"early_stopping_patience": 3}, "An eval loss on data that decided nothing", "(patience 3) chose"),
        ({"total_steps": 90}, "The whole schedule", "after step 60 of 90"),
        ({"finished": False}, "The end of the run", "stopped after step 60 of 60"),
        ({}, "How often a whole answer is right", "2 eval prompts"),
        ({"eval_data": None, "eval_file": None}, "How it answers prompts it has not seen", "no eval data"),
        (
            {"history": [{"step": 30, "overrides": {"learning_rate": [1, 2]}}]},
            "The effect of one set of settings",
            "After step 30 the run continued with changed settings: learning_rate from 1 to 2.",
        ),
    ],
)
def test_each_gap_comes_from_a_fact(tmp_path, changes, gap, fact):
    found = dict(caveats(record.read(write_run(tmp_path / "run", **changes))))
    assert fact in found[gap]


@pytest.mark.parametrize(
    ("side", "counts", "gap", "fact"),
    [
        (0, {"dropped": 3, "read": 25}, "Long examples", "3 of 25 examples were longer than 2,048 tokens"),
        (0, {"cut": 4}, "Whole long answers", "4 examples were cut"),
        (1, {"shared": 2}, "A clean eval loss", "2 of 8 eval examples"),
    ],
)
def test_what_was_counted_of_the_data_is_told(tmp_path, side, counts, gap, fact):
    folder = write_run(tmp_path / "run")
    run_info = json.loads((folder / "run.json").read_text())
    assert gap not in dict(caveats(record.read(folder)))
    run_info["counts"][side] |= counts
    (folder / "run.json").write_text(json.dumps(run_info))
    assert fact in dict(caveats(record.read(folder)))[gap]


def test_eval_losses_that_turned_or_were_left_behind_are_told(tmp_path):
    folder = write_run(tmp_path / "run")
    assert "The best adapter of the run" not in dict(caveats(record.read(folder)))
    add_rows(folder, evaluation(60, 0.5))
    found = dict(caveats(record.read(folder)))
    assert "0.0661 after step 60, and 0.5000 after step 60, whose adapter" in found["The best adapter of the run"]
    assert "the eval loss 0.5000" in found["Generalization versus memorization"]


def test_a_large_run_on_a_gpu_keeps_only_what_is_true_of_every_run(tmp_path):
    many = {"read": 9000, "examples": 9000, "tokens": 10**6, "cut": 0, "dropped": 0, "longest": 9, "median": 9, "shortest": 9,
            "input_tokens": 2 * 10**6}  # fmt: skip
    folder = write_run(tmp_path / "run", model="org/name", counts=[many, many | {"examples": 500}], device_memory_gb=80.0)
    (folder / "samples.jsonl").unlink()
    assert {caveat.gap for caveat in caveats(record.read(folder))} == ALWAYS
    page = page_of(folder)
    assert "predicted over measured +42.9 %" in page.words and "the GPU has 80.00 GB" in page.words
    assert "predicted 2.50" in page.words


# -- curves ------------------------------------------------------------------------------------------------------------


def test_smoothing_is_the_mean_of_what_is_around():
    values = [1.0, 2.0, math.nan, 4.0, 9.0]
    assert plots.smoothed(values, 1) == pytest.approx([1.5, 1.5, 3.0, 6.5, 6.5])
    assert plots.smoothed([math.nan], 2)[0] != plots.smoothed([math.nan], 2)[0]
    assert [plots.reach(n) for n in (1, 12, 120, 4000)] == [1, 1, 3, 100]


def test_thinning_keeps_the_extremes_and_the_order():
    steps = list(range(50_000))
    values = [math.sin(step / 700) for step in steps]
    values[12_345], values[23_456] = 7.0, -7.0
    few_steps, few = plots.thinned(steps, values)
    assert len(few) <= plots.MOST_POINTS and (max(few), min(few)) == (7.0, -7.0)
    assert few_steps == sorted(few_steps) and all(values[step] == value for step, value in zip(few_steps, few, strict=True))
    assert plots.thinned(steps[:50], values[:50]) == (steps[:50], values[:50])


def test_numbers_are_short():
    given = (0.0, 0.00042, 5e-5, 8.46e-8, 1.8304, 345.67, 1234567.0, 1e12, math.nan)
    assert list(map(plots.short, given)) == [
        "0", "0.00042", "5e-5", "8.46e-8", "1.83", "346", "1,234,567", "1,000,000,000,000", ""]  # fmt: skip


def test_curves_take_the_colors_and_the_font_of_the_page(tmp_path):
    run = record.read(write_run(tmp_path / "run"))
    curves = plots.draw(run)
    page = html(run, curves)
    for curve in curves:
        assert curve.png.startswith(b"\x89PNG") and curve.svg.startswith("<svg ") and curve.svg in page
        drawn = set(re.findall(r"(?:fill|stroke): #\w+", curve.svg))
        assert drawn and all(f'[style*="{color}"] {{' in page for color in drawn)  # each has its rule
    # No ancestor comes before it: such a rule would not apply to markers, which a <use> element shows.
    rules = set(re.findall(r'^\[style\*="(\w+: #\w+)"\] { (\w+: var\(--\w+\)) !important; }', page, re.MULTILINE))
    assert rules == {
        (f"{of}: {color}", f"{of}: var(--{name})") for of in ("fill", "stroke") for name, color in plots.COLORS.items()
    }
    loss = Page(curves[0].svg).words
    assert "eval 0.0661" in loss and "training 0.0" in loss and "log scale" in loss
    again = plots.draw(record.read(tmp_path / "run"))
    assert [curve.svg for curve in curves] == [curve.svg for curve in again]  # to the byte


def test_labels_at_the_ends_of_lines_do_not_touch(tmp_path):
    folder = write_run(tmp_path / "run")
    add_rows(folder, evaluation(60, 1.2 * 0.95**60))  # just where the training loss ends
    svg = plots.draw(record.read(folder))[0].svg
    ys = [float(y) for y in re.findall(r'y="([\d.]+)"[^>]*>(?:training|eval) ', svg)]
    assert len(ys) == 2 and abs(ys[0] - ys[1]) >= plots.FONT_UNITS


# -- after training ----------------------------------------------------------------------------------------------------


def test_what_the_machine_lacks_is_told_and_is_no_failure(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # importing it fails
    said = after_training(folder)
    assert said.startswith("none, as it could not be written: ") and "matplotlib" in said
    assert f"The run is complete; python -m qlora report {folder} tries again." in said
    assert (folder / "adapter" / "README.md").exists() and not (folder / "report.html").exists()
    monkeypatch.undo()
    assert after_training(folder) == str(folder / "report.html")


def test_a_mistake_of_ours_is_not_hidden(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "draw", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        after_training(write_run(tmp_path / "run"))


def test_what_a_dead_process_left_of_it_goes_with_the_next_run(tmp_path):
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    folder = write_run(tmp_path / "run", finished=False, config=options, device="cpu", origin=None)
    (folder / ".plots.tmp").mkdir()
    for name in (".report.html.tmp", ".plots.tmp/loss.png", "adapter/.README.md.tmp"):
        (folder / name).touch()
    with RunFolder(folder, "auto"):
        assert not list(folder.rglob("*.tmp"))


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run")
    (folder / "report.html").mkdir()  # so that no file can take its name
    assert "report.html cannot be written" in after_training(folder)
    assert main(["report", str(folder)]) == ExitCode.CHECKPOINT


def test_the_command_writes_a_card_only_where_there_is_none(tmp_path):
    folder = write_run(tmp_path / "run")
    card = folder / "adapter" / "README.md"
    assert main(["report", str(folder)]) == 0 and "library_name: peft" in card.read_text()
    card.write_text("mine")
    assert main(["report", str(folder)]) == 0 and card.read_text() == "mine"


def test_secrets_are_masked(tmp_path):
    token = "hf_" + "AbCdEf123456" * 3
    folder = write_run(tmp_path / "run")
    add = {"step": 60, "prompt": token, "base": token, "tuned": token, "reference": token}
    (folder / "samples.jsonl").write_text(json.dumps(add) + "\n")
    after_training(folder)
    for path in (folder / "report.html", folder / "adapter" / "README.md"):
        assert token not in path.read_text() and "hf_***" in path.read_text()
