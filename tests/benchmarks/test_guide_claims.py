"""The guide's claims: verdicts and facts follow from figures, and what is cheap to measure agrees with the file."""

import copy
import json
import re
from pathlib import Path

import pytest

from benchmarks import report, tables
from benchmarks.guide_claims import __main__ as runner
from benchmarks.guide_claims import training
from benchmarks.guide_claims.finding import Source
from benchmarks.guide_claims.tables import CLAIMS, GROUPS, how_known, id_of
from benchmarks.guide_claims.weights import SEVEN, quantized_bytes

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
# Measured on shapes, formats, libraries and the files of other benchmarks, so they come out the same wherever they run.
SAME_EVERYWHERE = ("targets", "nf4-levels", "bits-4.5", "double-quantization", "97.5-percent", "model-3.8gb", "total-2gb",
                   "96.7-percent", "peft-checkpointing", "6gb", "flash-kernel", "flash-training", "flash-memory",
                   "fp16-with-bf16", "default-scheduler", "configuration-runs", "110-steps", "pad-eos")  # fmt: skip


@pytest.fixture(scope="module")
def record() -> dict:
    return tables.load("guide_claims_*.json")[1]


@pytest.fixture(scope="module")
def rows(record) -> dict[str, dict]:
    return {row["id"]: row for row in record["rows"]}


@pytest.fixture
def source(tiny) -> Source:
    return Source("tiny-random", 1, [])


# -- verdicts and facts ------------------------------------------------------------------------------------------------


def test_verdicts_and_facts_are_those_that_the_figures_give(rows):
    assert len(CLAIMS) == sum(map(len, GROUPS.values())) and CLAIMS.keys() <= rows.keys()
    for name in CLAIMS:
        assert runner.judged(rows[name]) == rows[name], name
        assert not re.search(r"\bnan\b|\binf\b|\|", rows[name]["fact"]), name
        assert rows[name]["how"] in ("measured", "read from the library") or (RESULTS / rows[name]["how"][5:]).exists(), name


def test_ids_are_names_with_dashes(rows):
    assert id_of(CLAIMS["97.5-percent"]) == "97.5-percent" and CLAIMS["97.5-percent"].__name__ == "_97_5_percent"
    assert CLAIMS["6gb"].__name__ == "_6gb" and CLAIMS["model-3.8gb"].__name__ == "model_3_8gb"
    gone = {"id": "ba-zero", "figures": {}}
    assert runner.judged(gone) is gone


OTHERWISE = [  # other figures for each claim, and the verdict that they ought to give
    ("targets", {"share": 1.0}, "right"),
    ("adapter-3mb", {"file_mb": 3.1}, "right"),
    ("nf4-levels", {"missing": []}, "right"),
    ("bits-4.5", {"double": 4.0}, "right"),
    ("double-quantization", {"saved": 0.3}, "wrong"),
    ("97.5-percent", {"stored": 0.975}, "right"),
    ("model-3.8gb", {"total_gb": 1.9}, "right"),
    ("quality-nf4", {"change.nf4_dq": 0.004}, "right"),
    ("total-2gb", {"trl_gb": 2.1}, "right"),
    ("96.7-percent", {"states": 0.967, "with_activations": 0.96}, "right"),
    ("96.7-percent", {"states": 0.967}, "wrong"),  # of two sides one
    ("peft-checkpointing", {"get_peft_model": True}, "right"),
    ("peft-checkpointing", {"prepare_model_for_kbit_training": False}, "wrong"),
    ("checkpointing-stores", {"inputs_share": 0.0}, "right"),
    ("6gb", {"peaks_gb": {"all": 5.0}}, "right"),
    ("flash-kernel", {"kernel_ms.eager": 7.0, "kernel_ms.sdpa": 6.0}, "right"),
    ("flash-training", {"steps": {"a": {"eager": [300] * 3, "sdpa": [250] * 3, "flash_attention_2": [100] * 3}}}, "right"),
    ("flash-training", {"steps": {"a": {"eager": [120] * 3, "sdpa": [90] * 3, "flash_attention_2": [100] * 3}}}, "wrong"),
    ("flash-memory", {"growth_gb.flash_attention_2": 25.0}, "wrong"),
    ("fp16-with-bf16", {"error.bf16": None}, "right"),
    ("fp16-with-bf16", {"error.fp16": "it fails"}, "wrong"),
    ("default-scheduler", {"default": "cosine"}, "right"),
    ("configuration-runs", {"warmup_ratio": None}, "right"),
    ("110-steps", {"total": 110}, "right"),
    ("accumulation", {"windows.bundled.error": 0.0, "windows.unlike.error": 0.0}, "right"),
    ("pad-eos", {"transformers": 22}, "right"),
    ("pad-eos", {"trl": 0}, "wrong"),
    ("merge", {"merged.bf16.relative": 0.0}, "right"),
    ("target-modules", {"runs.mlp.held_out": 0.01}, "wrong"),
    ("dropout", {"runs.0.1.epochs": 20}, "wrong"),
    ("dropout", {"runs.0.1.epochs": 20, "runs.0.0.held_out": 0.1, "runs.0.0.train_loss_without_dropout": 0.001}, "right"),
    ("learning-rate", {"whole.5e-05.last": 0.009}, "right"),
    ("learning-rate", {"whole.5e-05.last": 0.009, "runs.0.02.held_out": 0.02}, "depends"),
    ("knowledge", {"change": 0.01}, "right"),
]


def changed(figures: dict, values: dict) -> dict:
    """A copy of figures with other values by dotted path; a key may have dots itself."""
    copied = copy.deepcopy(figures)
    for path, value in values.items():
        inner, rest = copied, path
        while rest not in inner:
            (key,) = [key for key in inner if rest.startswith(f"{key}.") and isinstance(inner[key], dict)]
            inner, rest = inner[key], rest.removeprefix(f"{key}.")
        inner[rest] = value
    return copied


def test_each_claim_has_figures_that_turn_it(rows):
    turned = set()
    for name, values, verdict in OTHERWISE:
        row = runner.judged({**rows[name], "figures": changed(rows[name]["figures"], values)})
        assert row["verdict"] == verdict, (name, values)
        turned |= {name} if verdict != rows[name]["verdict"] else set()
    assert turned == CLAIMS.keys()


# -- measured ----------------------------------------------------------------------------------------------------------


def close(found, kept) -> bool:
    """Whether figures agree as far as they are read today: numbers to 2 %, the rest exactly. Terms of memory have new names."""
    if isinstance(kept, dict):
        return all(name == "terms_gb" or (name in kept and close(found[name], kept[name])) for name in found)
    if isinstance(kept, list):
        return len(found) == len(kept) and all(map(close, found, kept))
    is_number = isinstance(kept, int | float) and not isinstance(kept, bool)
    return found == pytest.approx(kept, rel=0.02, abs=1e-6) if is_number else found == kept


@pytest.mark.parametrize("name", SAME_EVERYWHERE)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_what_is_cheap_agrees_with_the_file(source, rows, name):
    figures = json.loads(json.dumps(CLAIMS[name](source, {}).figures))
    assert close(figures, rows[name]["figures"]), figures
    assert runner.judged({**rows[name], "figures": figures})["verdict"] == rows[name]["verdict"]


def test_known_numbers_stand_in_the_rows(rows):
    figures = {name: rows[name]["figures"] for name in CLAIMS}
    assert figures["targets"]["guide"] == {"layers": 64, "parameters": 17_825_792} and len(SEVEN) == 7
    assert figures["targets"]["right"] == {"layers": 128, "parameters": 50_331_648}
    assert figures["adapter-3mb"]["parameters"] == 50_331_648
    assert figures["adapter-3mb"]["training_mb"] == pytest.approx(16 * 50_331_648 / 1e6)
    assert figures["bits-4.5"]["single"] == 4.5 and figures["double-quantization"]["double"] == pytest.approx(4.127, abs=1e-4)
    assert figures["110-steps"]["total"] == 120 and figures["110-steps"]["windows"] == [4, 4, 4, 4, 4, 2]
    assert figures["96.7-percent"]["states"] == pytest.approx(1 - 3.07 / 61.14, abs=1e-3)
    assert [figures["pad-eos"][who] for who in ("trl", "transformers", "here")] == [22, 0, 22]
    full, none = (figures["flash-training"]["steps"][f"2 x 2,048, {policy}"] for policy in ("full", "none"))
    assert [round(ms) for ms in full["sdpa"]] == [528, 492, 536] and [round(ms) for ms in none["sdpa"]] == [391, 323, 429]


def test_terms_of_memory_add_up_to_what_is_predicted_and_measured(source, rows):
    for figures in (rows["total-2gb"]["figures"], CLAIMS["total-2gb"](source, {}).figures):
        assert sum(figures["terms_gb"].values()) == pytest.approx(figures["predicted_gb"])
        assert min(figures["terms_gb"].values()) > 0
        assert figures["predicted_gb"] == pytest.approx(figures["measured_gb"], rel=0.04)


@pytest.mark.parametrize("double", [False, True])
def test_bytes_of_a_quantized_weight_follow_the_paper(double):
    blocks = 256 * 512 // 64
    assert quantized_bytes(256, 512, double) == 256 * 512 // 2 + (blocks + 4 * blocks // 256 if double else 4 * blocks)


def test_means_of_means_are_off_where_answers_differ(source):
    windows = CLAIMS["accumulation"](source, {}).figures["windows"]
    assert windows["unlike"]["tokens"][0] == 12 and windows["unlike"]["error"] > 10 * windows["bundled"]["error"] > 0


def test_checkpointing_keeps_the_inputs_of_layers(source):
    figures = CLAIMS["checkpointing-stores"](source, {}).figures
    none, full = (figures["saved_mb"][policy] for policy in ("none", "full"))
    assert full["512"] == pytest.approx(2 * full["256"], rel=0.02) and full["512"] < 0.3 * none["512"]
    assert figures["inputs_share"] * full["512"] == pytest.approx(2 * 512 * 192 * 2 / 1e6)


def test_perplexity_changes_with_the_format(source):
    figures = CLAIMS["quality-nf4"](source, {}).figures
    assert figures["change"]["bf16"] == 0 < abs(figures["change"]["nf4"]) < abs(figures["change"]["fp4"])
    assert abs(figures["change"]["int8"]) < abs(figures["change"]["fp4"]) and figures["error"]["nf4"] > 0


# -- short runs --------------------------------------------------------------------------------------------------------


class Here:
    """In place of a Cell: the function runs in this process."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def result(self, timeout_s):
        return self.function(*self.arguments)


@pytest.fixture
def runs(monkeypatch) -> list[dict]:
    """The flags of the short runs that are made, in this process and without sample answers."""
    import train_loop

    made, train = [], training.train

    def noted(model, flags, epochs, folder):
        made.append(flags)
        return train(model, flags, epochs, folder)

    monkeypatch.setattr(train_loop, "try_samples", lambda *_: None)
    monkeypatch.setattr(training, "Cell", Here)
    monkeypatch.setattr(training, "train", noted)
    return made


def test_a_run_is_that_of_the_loop_and_made_once(source, runs):
    flags = {"lora_r": 4, "target_modules": ["o_proj", "down_proj"]}
    row = training.short_run(source, flags)
    assert training.short_run(source, flags) is row is source.trainings[0] and runs == [flags]
    assert row["trained_parameters"] == 4 * 2 * ((192 + 192) + (256 + 192))
    assert len(row["train_loss"]) == len(row["grad_norm"]) == 6 and len(row["eval_loss"]) == 2
    assert row["eval_loss"][1] < row["eval_loss"][0] and 1 < row["text_perplexity"] < 2000
    assert row["train_loss_without_dropout"] == pytest.approx(row["eval_loss"][1], rel=0.05)


@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit linear:UserWarning")
def test_merging_into_dequantized_weights_is_nearest(source, runs):
    merged = CLAIMS["merge"](source, {}).figures["merged"]
    assert merged["dequantized"]["relative"] < 0.2 * min(merged[route]["relative"] for route in ("bf16", "requantized"))
    assert runs == [{}] and source.trainings == []


def test_the_file_has_every_run_that_a_claim_reads(record, monkeypatch):
    monkeypatch.delattr(training, "Cell")
    kept = Source("demo", 4, record["trainings"])
    for name in ("target-modules", "dropout", "learning-rate"):
        found = CLAIMS[name](kept, {})
        assert " ".join(found.fact.split()) == next(row["fact"] for row in record["rows"] if row["id"] == name)
    assert {run["epochs"] for run in record["trainings"]} == {4}


# -- the command -------------------------------------------------------------------------------------------------------


def test_missing_rows_are_measured_and_others_left_alone(tiny, tmp_path, capsys):
    out = tmp_path / "claims.json"
    options = {"model": "tiny-random", "out": out, "commit": "abc"}
    runner.main(runner.Options(only=("configuration-runs", "6gb"), **options))
    first = json.loads(out.read_text())
    assert [row["id"] for row in first["rows"]] == ["configuration-runs", "6gb"]
    kept = {"id", "group", "short", "claim", "verdict", "fact", "figures", "how", "seconds", "commit"}
    assert all(row.keys() == kept and row["commit"] == "abc" for row in first["rows"])
    first["rows"][0]["seconds"] = 1234
    out.write_text(json.dumps(first))
    runner.main(runner.Options(only=("double-quantization", "configuration-runs"), missing=True, **options))
    second = json.loads(out.read_text())
    assert second["rows"][:2] == first["rows"] and [row["id"] for row in second["rows"][2:]] == ["double-quantization"]
    runner.main(runner.Options(minutes=0.0, **options))
    assert json.loads(out.read_text()) == second
    assert "configuration-runs: wrong. transformers" in capsys.readouterr().out


def test_what_is_not_there_or_of_another_model_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="There is no claim bits-5"):
        runner.main(runner.Options(only=("bits-5",)))
    out = tmp_path / "claims.json"
    runner.main(runner.Options(only=("6gb",), out=out))
    with pytest.raises(SystemExit, match="another model: demo"):
        runner.main(runner.Options(model="tiny-random", out=out))


# -- rendering ---------------------------------------------------------------------------------------------------------


def test_the_page_has_every_claim_and_the_readme_the_short_ones(record, rows):
    page, short = report.guide_claims.claims(), report.guide_claims.short()
    for name in CLAIMS:
        row = rows[name]
        assert f"| `{name}` | {row['claim']} | {row['verdict']} | {row['fact']} | {how_known(row)} |" in page
        assert (f"| {row['claim']} | {row['verdict']} | {row['fact']} |" in short) == row["short"]
    assert page.startswith(f"{len(CLAIMS)} claims: ") and short.startswith("| a guide says | verdict | what is so |")
    assert page.count("\n| `") == len(CLAIMS) + sum(run["flags"] != {} for run in record["trainings"])  # rows of others are not
    assert page.count("all, measured on an H100") == 1 and record["text"] in page
    assert "from attention_h100_202611.json, `python -m benchmarks.attention` |" in page
    others = {row["id"] for row in record["rows"] if row["figures"]} - CLAIMS.keys()
    assert f"The file has rows of {len(others)} others" in page


def test_the_page_changes_with_a_figure_and_lacks_none(record, tmp_path, monkeypatch):
    before = report.guide_claims.claims()
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for path in RESULTS.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    altered = copy.deepcopy(record)
    (row,) = [row for row in altered["rows"] if row["id"] == "110-steps"]
    row["figures"]["total"] = 123
    altered["rows"] = [runner.judged(row) for row in altered["rows"]]
    (tmp_path / "guide_claims_cpu_202612.json").write_text(json.dumps(altered))
    after = report.guide_claims.claims().splitlines()
    (line,) = (new for new, old in zip(after, before.splitlines(), strict=True) if new != old and "guide_claims_cpu" not in new)
    assert "makes 123: 6 an epoch" in line
    altered["rows"] = [row for row in altered["rows"] if row["id"] not in ("merge", "110-steps")]
    (tmp_path / "guide_claims_cpu_202612.json").write_text(json.dumps(altered))
    for page in (report.guide_claims.claims, report.guide_claims.short):
        with pytest.raises(SystemExit, match=r"guide_claims_cpu_202612.json lacks 2 of \d+ claims \(110-steps, merge\)"):
            page()
