"""The guide's claims: what can be measured at once is, and agrees with the file; verdicts and texts follow from figures."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import guide_claims as benchmark
from benchmarks import guide_claims_cells as cells
from benchmarks import guide_claims_demo as demo
from benchmarks import guide_claims_training as training
from benchmarks import report
from benchmarks.guide_claims_list import CLAIMS
from qlora.config import TrainConfig
from qlora.run.signals import Signals

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
TINY = cells.Source("tiny-random", [])
NOW = ("targets", "other_models", "adapter_bytes", "adapter_formula", "parameters_of_a_rank", "model_size", "initialization",
       "scale_and_dropout", "levels", "blocks", "bits", "layer_4096", "quantized_model", "memory_of_phi3", "reduction",
       "clusters", "four_bit_formats", "float_formats", "schedule_formula", "first_rate", "steps", "pad_token", "pad_labels",
       "added_pad", "stop_token", "native_class", "offloading", "peft_and_checkpointing", "mixed_precision", "dtypes",
       "checkpointing_gpu", "flash_speed", "flash_memory", "out_of_memory", "full_fine_tuning", "small_card", "epochs",
       "checkpoint_contents", "signs_of_success", "trl_checkpointing")  # fmt: skip
NUMBER = re.compile(r"\d")


@pytest.fixture(scope="module")
def record() -> dict:
    return report.load("guide_claims_*.json")[1]


@pytest.fixture(scope="module")
def rows(record) -> dict[str, dict]:
    return {row["id"]: row for row in record["rows"]}


# -- the file ----------------------------------------------------------------------------------------------------------


def test_each_claim_has_its_row_and_each_row_its_fields(record, rows):
    assert [row["id"] for row in record["rows"]] == list(CLAIMS)
    for name, row in rows.items():
        assert set(row) == {
            "id",
            "group",
            "short",
            "claim",
            "verdict",
            "fact",
            "figures",
            "how",
            "command",
            "seconds",
            "commit",
        }
        assert row["verdict"] in ("right", "wrong", "depends") and row["seconds"] >= 0 and len(row["commit"]) == 40
        assert row["claim"] and row["fact"]
        assert not re.search(r"\bnan\b|\binf\b|\|", row["fact"]), name
        if row["how"] == "not measured":
            assert row["figures"] == {} and row["verdict"] == "depends"
        else:
            assert NUMBER.search(json.dumps(row["figures"])) or any(isinstance(v, str | bool) for v in row["figures"].values())
        if row["how"].startswith("from "):
            assert (RESULTS / row["how"].removeprefix("from ")).exists()
            script = row["command"].removeprefix("python ")
            assert script != "benchmarks/guide_claims.py" and (RESULTS.parents[1] / script).exists()
        else:
            assert row["command"] == f"python benchmarks/guide_claims.py --only {name}"
            assert row["how"] in ("measured", "computed", "read from the library", "not measured")


def test_most_rows_are_measured_and_few_are_arithmetic(record):
    hows = [row["how"] for row in record["rows"]]
    assert sum(map(report.is_measured, record["rows"])) >= 25 and hows.count("computed") <= 5
    assert hows.count("measured") >= 25  # those of files not counted


def test_verdicts_and_texts_are_those_that_the_figures_give(record):
    assert benchmark.renewed(record["rows"]) == record["rows"]


def test_a_claim_that_is_gone_leaves_no_row_and_the_order_is_the_lists(record):
    turned = [*reversed(record["rows"]), {"id": "no such claim", "figures": {}, "seconds": 0, "commit": ""}]
    assert benchmark.renewed(turned) == record["rows"]


OTHERWISE = {  # other figures for each claim that is judged, and the verdict that they ought to give
    "targets": ({"share": 1.0}, "right"),
    "targets-elsewhere": ({"matched.Llama": 6}, "wrong"),
    "adapter-3mb": ({"file_mb": 3.1}, "right"),
    "adapter-7mb": ({"real_mb": 7.3}, "right"),
    "parameters-2rd": ({"equal": ["a", "b", "c", "d"]}, "right"),
    "init-gaussian": ({"kurtosis": 3.0}, "right"),
    "ba-zero": ({"largest_difference": 1e-6}, "wrong"),
    "forward-formula": ({"scale": 1}, "right"),
    "alpha": ({"of_64": 1.0}, "wrong"),
    "gradients-frozen": ({"base_unchanged": False}, "wrong"),
    "dropout-place": ({"zero_outputs": 0.1}, "right"),
    "nf4-levels": ({"missing": []}, "right"),
    "nf4-blocks": ({"block": 64 * 256}, "right"),
    "bits-4.5": ({"double": 4.0}, "right"),
    "double-quantization": ({"saved": 0.3}, "wrong"),
    "8x": ({"fp32_ratio": 8.0}, "right"),
    "75-percent": ({"below_bf16": 0.75}, "right"),
    "97.5-percent": ({"stored": 0.975}, "right"),
    "model-3.8gb": ({"total_gb": 1.9}, "right"),
    "clusters": ({"same_levels": False}, "right"),
    "better-than-uniform": ({"error.uniform, -8 to 7": 0.09}, "wrong"),
    "suits-networks": ({"uniform": 0.09}, "wrong"),
    "quality-nf4": ({"change.nf4_dq": 0.004}, "right"),
    "quality-int8": ({"change.int8": 0.004}, "right"),
    "parameters-3.8b": ({"parameters": 3.9e9}, "wrong"),
    "printed-size": ({"share": 1.0}, "right"),
    "total-2gb": ({"trl_gb": 2.1}, "right"),
    "memory-terms": ({"worst": 0.1}, "wrong"),
    "60gb": ({"gb": 70.0}, "wrong"),
    "96.7-percent": ({"states": 0.967, "with_activations": 0.96}, "right"),
    "peft-checkpointing": ({"get_peft_model": True}, "right"),
    "trl-checkpointing": ({"trl.peak_gb": 1.889}, "depends"),
    "checkpointing-stores": ({"inputs_share": 0.0}, "right"),
    "checkpointing-gpu": ({"full.peak_gb": 20.0}, "wrong"),
    "oom-advice": ({"half_rank": 3.0}, "right"),
    "6gb": ({"fits": ["a", "b", "c", "d", "e"]}, "right"),
    "16gb-ram": ({"grown": [1.0, 1.0]}, "wrong"),
    "20gb-disk": ({"packages": 15.0}, "wrong"),
    "only-adapters": ({"checkpoint_mb": 7600.0}, "depends"),
    "flash-kernel": ({"kernel_ms.eager": 7.0, "kernel_ms.sdpa": 6.0}, "right"),
    "flash-training": ({"steps": {"a": {"eager": [300] * 3, "sdpa": [250] * 3, "flash_attention_2": [100] * 3}}}, "right"),
    "flash-memory": ({"growth_gb.flash_attention_2": 25.0}, "wrong"),
    "sdpa-slower": ({"steps": {"a": {"eager": None, "sdpa": [250] * 3, "flash_attention_2": [100] * 3}}}, "right"),
    "bf16-bits": ({"mantissa": 8}, "wrong"),
    "fp16-with-bf16": ({"error.bf16": None}, "right"),
    "loss-fp16": ({"loss": "float16"}, "right"),
    "backward-fp32": ({"gradient": "float32"}, "right"),
    "dequantized": ({"compute": "float16"}, "wrong"),
    "default-scheduler": ({"default": "cosine"}, "right"),
    "schedule-formula": ({"largest_difference": 0.0}, "right"),
    "first-update": ({"off_formula": 1 / 12}, "wrong"),
    "configuration-runs": ({"warmup_ratio": None}, "right"),
    "110-steps": ({"total": 110}, "right"),
    "batch-4": ({"windows": [4, 4]}, "right"),
    "accumulation": ({"windows.bundled.error": 0.0, "windows.unlike.error": 0.0}, "right"),
    "batch-noise": ({"cosine.11": 0.5}, "wrong"),
    "no-pad-token": ({"pad": None}, "right"),
    "pad-eos": ({"transformers": 22}, "right"),
    "add-pad": ({"error": None}, "right"),
    "format-boundaries": ({"trl": 0}, "wrong"),
    "format-instruct": ({"loss.plain": 0.9}, "right"),
    "jsonl-streams": ({"default": "IterableDataset"}, "right"),
    "trust-remote-code": ({"module": "transformers_modules.phi3"}, "right"),
    "device-map": ({"error.too_little": None}, "right"),
    "adapters-in-output-dir": ({"in_output_dir": True}, "right"),
    "merge": ({"merged.bf16.relative": 0.0}, "right"),
    "kv-cache": ({"default": False}, "right"),
    "target-modules": ({"runs.mlp.held_out": 0.01}, "wrong"),
    "rank-quality": ({"runs.2.epochs": 20}, "right"),
    "rank-memory": ({"ranks.2.step_s": 1.0, "ranks.8.step_s": 2.0, "ranks.32.step_s": 3.0}, "right"),
    "dropout": ({"runs.0.0.epochs": 20}, "wrong"),
    "learning-rate": ({"whole.5e-05.last": 0.009}, "right"),
    "weight-decay": ({"runs.0.held_out": 0.01}, "right"),
    "knowledge": ({"change": 0.01}, "right"),
    "signs": ({"last_loss": 0.5, "smallest_norm": 1.0}, "right"),
    "success": ({"runs.0.0001.right": 0}, "depends"),
    "plateau": ({"plateau.0.0002": [3, 0], "plateau.0.0004": [3, 0]}, "right"),
    "20-epochs": ({"within_a_tenth": 19}, "right"),
}
AS_WELL = [  # verdicts between the two
    ("peft-checkpointing", {"prepare_model_for_kbit_training": False}, "wrong"),
    ("pad-eos", {"trl": 0}, "wrong"),
    ("16gb-ram", {"grown": [0.3, 1.0]}, "depends"),
    ("16gb-ram", {"grown": [0.3, 0.3]}, "right"),
    ("fp16-with-bf16", {"error.fp16": "it fails"}, "wrong"),
    ("flash-training", {"steps": {"a": {"eager": [120] * 3, "sdpa": [90] * 3, "flash_attention_2": [100] * 3}}}, "wrong"),
    ("sdpa-slower", {"steps": {"a": {"eager": None, "sdpa": [110, 90, 130], "flash_attention_2": [100, 80, 95]}}}, "wrong"),
    ("rank-memory", {"ranks.128.training_mb": 130.0}, "wrong"),
    ("better-than-uniform", {"error.uniform": 0.09}, "wrong"),
    ("96.7-percent", {"states": 0.967}, "wrong"),  # of two sides one
    ("nf4-blocks", {"block": 128}, "depends"),
    ("20-epochs", {"within_a_tenth": 1}, "wrong"),
    ("plateau", {"plateau.0.0002": [3, 0]}, "depends"),
    ("learning-rate", {"whole.5e-05.last": 0.009, "runs.0.02.held_out": 0.02}, "depends"),
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


def test_each_judged_claim_has_figures_that_turn_it(rows):
    assert OTHERWISE.keys() == {name for name, claim in CLAIMS.items() if claim.how != "not measured"}
    for name, (values, verdict) in OTHERWISE.items():
        assert rows[name]["verdict"] != verdict == CLAIMS[name].judge(changed(rows[name]["figures"], values)), name
    for name, values, verdict in AS_WELL:
        assert CLAIMS[name].judge(changed(rows[name]["figures"], values)) == verdict, name


# -- measured at once --------------------------------------------------------------------------------------------------


def close(found, kept) -> bool:
    """Whether figures agree: numbers to 2 %, the rest exactly."""
    if isinstance(kept, dict):
        return found.keys() == kept.keys() and all(close(found[name], kept[name]) for name in kept)
    if isinstance(kept, list):
        return len(found) == len(kept) and all(map(close, found, kept))
    is_number = isinstance(kept, int | float) and not isinstance(kept, bool)
    return found == pytest.approx(kept, rel=0.02, abs=1e-6) if is_number else found == kept


@pytest.mark.parametrize("name", NOW)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_what_is_cheap_agrees_with_the_file(tiny, rows, name):
    torch.manual_seed(0)
    found = json.loads(json.dumps(getattr(cells, name)(TINY)))
    claims = [claim for claim in CLAIMS.values() if claim.measure == name]
    assert claims
    for claim in claims:
        assert close(found, rows[claim.id]["figures"]), found
        assert claim.judge(found) == rows[claim.id]["verdict"] and claim.fact(found)


def test_known_numbers_stand_in_the_rows(rows):
    figures = {name: row["figures"] for name, row in rows.items()}
    assert figures["targets"]["guide"] == {"layers": 64, "parameters": 17_825_792}
    assert figures["targets"]["right"] == {"layers": 128, "parameters": 50_331_648}
    assert figures["parameters-3.8b"]["parameters"] == 3_821_079_552
    assert figures["bits-4.5"]["single"] == 4.5 and figures["double-quantization"]["double"] == pytest.approx(4.127, abs=1e-4)
    assert figures["97.5-percent"]["stored"] == pytest.approx(0.855, abs=1e-3)
    assert figures["model-3.8gb"]["total_gb"] == pytest.approx(2.26, abs=0.01)
    assert figures["110-steps"]["total"] == 120 and figures["110-steps"]["windows"] == [4, 4, 4, 4, 4, 2]
    assert figures["batch-4"]["windows"] == figures["110-steps"]["windows"] and figures["110-steps"]["warmup"] == 12
    assert figures["96.7-percent"]["states"] == pytest.approx(1 - 3.07 / 61.14, abs=1e-3)
    assert [figures["pad-eos"][who] for who in ("trl", "transformers", "here")] == [22, 0, 22]
    assert figures["format-boundaries"]["trl"] == 22 and figures["format-boundaries"]["trl_trained"] == 1.0
    full, none = (figures["flash-training"]["steps"][f"2 x 2,048, {policy}"] for policy in ("full", "none"))
    assert [round(ms) for ms in full["sdpa"]] == [528, 492, 536] and [round(ms) for ms in none["sdpa"]] == [391, 323, 429]
    terms = figures["total-2gb"]["terms_gb"]
    assert sum(terms.values()) == pytest.approx(figures["total-2gb"]["predicted_gb"]) and min(terms.values()) > 0
    assert figures["total-2gb"]["predicted_gb"] == pytest.approx(figures["total-2gb"]["measured_gb"], rel=0.04)


@pytest.mark.parametrize("double", [False, True])
def test_bytes_of_a_quantized_weight_follow_the_paper(double):
    values, scales = cells.quantized_bytes(256, 512, double)
    blocks = 256 * 512 // 64
    assert values == 256 * 512 // 2 and scales == (blocks + 4 * blocks // 256 if double else 4 * blocks)


def test_equally_spaced_levels_are_16_in_a_block_and_keep_its_largest():
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))  # [N, K]
    largest = weight.view(-1, 64).abs().amax(1)  # [blocks]
    for levels in (cells.uniform_levels, cells.signed_levels):
        rounded = levels(weight).view(-1, 64)  # [blocks, 64]
        torch.testing.assert_close(rounded.abs().amax(1), largest)
        for row, scale in zip(rounded, largest, strict=True):
            levels_apart = {cells.uniform_levels: 7.5, cells.signed_levels: 8}[levels] * row / scale  # [64]
            assert (levels_apart.diff() - levels_apart.diff().round()).abs().max() < 1e-3
            assert 8 <= len(levels_apart.round(decimals=2).unique()) <= 16
    everything = cells.uniform_levels(torch.linspace(-1, 1, 640)[None], block=640)  # [1, 640]
    torch.testing.assert_close(everything.unique(), torch.linspace(-1, 1, 16))


def test_loading_configuration_and_trainer_refuse_what_the_guide_has(tiny):
    assert cells.offloading(TINY)["error"]["enough"] is None and "GPU" in cells.offloading(TINY)["error"]["too_little"]
    found = cells.scheduler_default(TINY)
    assert found["default"] == "linear" and found["warmup_ratio"] in (None, "TypeError")
    assert cells.adapter_place(TINY)["folders"] == ["checkpoint-1"]
    assert cells.streaming(TINY) == {"default": "Dataset", "streaming": "IterableDataset"}


# -- on the tiny model, what the file has of the demo ------------------------------------------------------------------


def test_fresh_adapters_change_nothing_and_the_base_stays(tiny):
    found = demo.start(TINY)
    assert found["largest_difference"] == 0 and found["gradient"]["lora_A"] == 0 < found["gradient"]["lora_B"]
    growth = demo.alphas(TINY)
    assert growth["of_16"] == pytest.approx(4, rel=0.02) and growth["of_64"] == pytest.approx(4, rel=0.02)
    moved = demo.frozen(TINY)
    assert moved["base_unchanged"] and moved["moved"] == moved["trained"] == 16


def test_means_of_means_are_off_where_answers_differ(tiny):
    windows = demo.accumulation(TINY)["windows"]
    assert windows["unlike"]["tokens"][0] == 12 and windows["unlike"]["error"] > 10 * windows["bundled"]["error"] > 0
    cosines = list(demo.batch_noise(TINY)["cosine"].values())
    assert cosines == sorted(cosines) and 0 < cosines[0] < cosines[-1] < 1


def test_checkpointing_keeps_the_inputs_of_layers(tiny):
    found = demo.checkpointing(TINY, (32, 64))
    saved, inputs = found["saved_mb"], found["layer_inputs_mb"]
    assert saved["full"]["64"] == pytest.approx(2 * saved["full"]["32"], rel=0.02)
    assert inputs["64"] == 2 * 64 * 192 * 2 / 1e6 <= saved["full"]["64"] < 0.3 * saved["none"]["64"]


def test_terms_of_memory_weigh_what_was_predicted(tiny):
    found = demo.memory_terms(TINY)
    assert found["worst"] < 1e-3 and found["predicted_mb"].keys() == found["measured_mb"].keys()
    cost = demo.rank_cost(TINY, (2, 4), rounds=2)["ranks"]
    assert cost["4"]["training_mb"] == 2 * cost["2"]["training_mb"] == 16 * cost["4"]["parameters"] / 1e6


def test_formats_and_sizes(tiny):
    found = demo.quality(TINY, rows=2, length=64)
    assert found["change"]["bf16"] == 0 < abs(found["change"]["nf4"]) and found["tokens"] == 2 * 63
    assert abs(found["change"]["int8"]) < abs(found["change"]["fp4"]) and set(found["perplexity"]) >= {"fp32", "nf4_dq"}
    assert 0.5 < demo.printed_size(TINY)["share"] < 0.9
    memory = demo.host_memory(TINY, rounds=1)
    assert len(memory["grown"]) == 1 and 0 < memory["file"] < 0.1 < memory["before"] < 3 and memory["phi3_file"] > 7
    loss = demo.prompt_forms(TINY)["loss"]
    assert loss["plain"] != loss["chat"]
    assert demo.kv_cache(TINY, new_tokens=8)["default"]


@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit linear:UserWarning")
def test_merging_into_dequantized_weights_is_nearest(tiny):
    merged = demo.merging(TINY, epochs=1)["merged"]
    assert merged["dequantized"]["relative"] < 0.2 * min(merged[route]["relative"] for route in ("bf16", "requantized"))


# -- short runs --------------------------------------------------------------------------------------------------------


def test_a_short_run_is_the_loops_own(tiny, tmp_path):
    """The same losses, norms and eval losses as train_loop.main, bit for bit."""
    import train_loop

    flags = {"lora_r": 4, "lora_alpha": 8, "learning_rate": 1e-3, "target_modules": ["o_proj", "down_proj"]}
    row = training.run("tiny-random", flags, epochs=2).row
    config = TrainConfig(model="tiny-random", output_dir=tmp_path / "run", num_train_epochs=2, **flags)
    train_loop.main(config, Signals())
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in metrics if row["event"] == "step"]
    assert row["train_loss"] == [step["loss"] for step in steps] and len(steps) == 12
    assert row["grad_norm"] == [step["grad_norm"] for step in steps]
    assert row["eval_loss"] == [line["eval_loss"] for line in metrics if line["event"] == "eval"]
    assert row["trained_parameters"] == 4 * 2 * ((192 + 192) + (256 + 192))


def test_the_file_has_every_run_that_a_claim_reads(record):
    kept = [run["flags"] for run in record["trainings"]]
    for claim in CLAIMS.values():
        assert all(flags in kept for flags in benchmark.flags_of(claim.runs)), claim.id
    assert {run["epochs"] for run in record["trainings"]} == {training.EPOCHS}
    base = demo.of(cells.Source("demo", record["trainings"]), training.BASE)
    assert base["eval_loss"][-1] < 0.1 * base["eval_loss"][0] and len(base["train_loss"]) == 6 * training.EPOCHS


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def here(monkeypatch):
    """Rows are measured in this process; the names of what was called."""
    called = []

    def noted(function, name):
        called.append(name)
        return function

    measure = benchmark.measure
    monkeypatch.setattr(benchmark, "measure", lambda name, *rest: noted(measure, name)(name, *rest))
    row = training.training_row
    monkeypatch.setattr(training, "training_row", lambda *rest: noted(row, "training_row")(*rest))
    monkeypatch.setattr(benchmark, "alone", lambda function, *rest: function(*rest))
    return called


def test_missing_rows_are_measured_and_others_left_alone(tiny, tmp_path, here):
    out = tmp_path / "claims.json"
    options = {"model": "tiny-random", "epochs": 1, "out": out}
    benchmark.main(benchmark.Options(only=("110-steps", "batch-4"), **options))
    assert here == ["steps"]  # one function for both
    first = json.loads(out.read_text())
    assert [row["id"] for row in first["rows"]] == ["110-steps", "batch-4"]
    benchmark.main(benchmark.Options(only=("first-update", "110-steps"), missing=True, **options))
    assert here == ["steps", "first_rate"]
    second = json.loads(out.read_text())
    assert [row["id"] for row in second["rows"]] == ["first-update", "110-steps", "batch-4"]
    assert [row for row in second["rows"] if row["id"] != "first-update"] == first["rows"]
    benchmark.main(benchmark.Options(only=("110-steps",), minutes=0.0, **options))
    assert here == ["steps", "first_rate"]


def test_a_run_is_made_once_for_all_that_read_it(tiny, tmp_path, here):
    out = tmp_path / "claims.json"
    for only in (("signs",), ("signs", "weight-decay")):
        benchmark.main(benchmark.Options(only=only, model="tiny-random", epochs=1, out=out))
    assert here == ["training_row", "signs", "training_row", "training_row", "decay", "signs"]
    flags = [run["flags"] for run in json.loads(out.read_text())["trainings"]]
    assert flags == [training.BASE, training.ANOTHER_SEED, training.NO_DECAY]


def test_what_is_not_there_or_of_another_machine_is_refused(tiny, tmp_path):
    with pytest.raises(SystemExit, match="There is no claim bits-5"):
        benchmark.main(benchmark.Options(only=("bits-5",)))
    out = tmp_path / "claims.json"
    environment = {"device": "a", "packages": {"torch": "2"}}
    out.write_text(json.dumps({"environment": environment, "model": "demo", "trainings": [], "rows": []}))
    assert benchmark.opened(out, "demo", environment)["rows"] == []
    with pytest.raises(SystemExit, match="another device"):
        benchmark.opened(out, "demo", {**environment, "device": "b"})
    with pytest.raises(SystemExit, match="another model"):
        benchmark.opened(out, "tiny-random", environment)


# -- rendering ---------------------------------------------------------------------------------------------------------


def test_the_page_has_every_row_and_the_readme_the_short_ones(record):
    page, short = report.claims(), report.claims_short()
    for row in record["rows"]:
        assert f"| `{row['id']}` | {row['claim']} | {row['verdict']} | {row['fact']} | {report.how_known(row)} |" in page
        assert (f"| {row['claim']} | {row['verdict']} | {row['fact']} |" in short) == row["short"]
    assert page.count("all, measured on an H100") == 1 and record["text"] in page
    assert short.startswith("| a guide says | verdict | what is so |")
    assert "from attention_h100_202611.json, `python benchmarks/attention.py` |" in page
    assert f"{len(record['rows'])} claims" in page and 10 <= sum(row["short"] for row in record["rows"]) <= 30


def test_the_page_changes_with_a_figure(record, tmp_path, monkeypatch):
    before = report.claims()
    changed = copy.deepcopy(record)
    next(row for row in changed["rows"] if row["id"] == "110-steps")["figures"]["total"] = 123
    changed["rows"] = benchmark.renewed(changed["rows"])
    (tmp_path / "guide_claims_cpu_202601.json").write_text(json.dumps(changed))
    for path in RESULTS.glob("*.json"):
        if not path.name.startswith("guide_claims"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    after = report.claims().splitlines()
    (line,) = (new for new, old in zip(after, before.splitlines(), strict=True) if new != old and "guide_claims_cpu" not in new)
    assert "makes 123: 6 an epoch" in line


def test_a_file_that_lacks_rows_is_not_rendered(record, tmp_path, monkeypatch):
    partial = {**record, "rows": [row for row in record["rows"] if row["id"] not in ("merge", "110-steps")]}
    (tmp_path / "guide_claims_cpu_202612.json").write_text(json.dumps(partial))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    for page in (report.claims, report.claims_short):
        with pytest.raises(SystemExit, match=r"guide_claims_cpu_202612.json lacks 2 of \d+ claims \(110-steps, merge\)"):
            page()
    assert benchmark.Options().out == tmp_path / "guide_claims_cpu_202612.json"  # the newest, whatever month it is
    (tmp_path / "guide_claims_cpu_202612.json").unlink()
    assert re.fullmatch(r"guide_claims_cpu_\d{6}\.json", benchmark.Options().out.name)
