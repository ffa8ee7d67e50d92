"""What a run needs of memory before it is one: shapes, columns, verdicts, and the way down to a card."""

import dataclasses
import itertools
import json

import pytest
import transformers

from qlora.cli import main as command_line
from qlora.commands import plan
from qlora.commands.options import PlanOptions
from qlora.errors import ExitCode, UserError
from qlora.model.targets import audit_targets
from qlora.run.files import require_writable
from qlora.speed import memory


@pytest.mark.parametrize(
    ("shape", "parameters"), [("phi3-mini", 3_821_079_552), ("phi3-medium", 13_960_238_080), ("demo", 134_515_008)]
)
def test_the_built_in_shapes_have_the_parameters_of_their_models(shape, parameters):
    options = PlanOptions(shape=shape)
    assert plan.shape_meta_model(options, plan.configuration(options)).num_parameters() == parameters


def test_the_table_is_what_training_predicts(tmp_path, capsys):
    out = tmp_path / "plan.json"
    assert command_line(["plan", "--json", str(out), "--lora-r", "8", "--max-length", "512"]) == 0
    told, record = capsys.readouterr().out, json.loads(out.read_text())
    assert [row["gradient_checkpointing"] for row in record["policies"]] == ["none", "selective", "full"]
    options = PlanOptions(lora_r=8, max_length=512)
    config = plan.configuration(options)
    meta_model = plan.shape_meta_model(options, config)
    for row in record["policies"]:
        changed = dataclasses.replace(config, gradient_checkpointing=row["gradient_checkpointing"])
        expected = memory.estimated_memory_gb(meta_model, audit_targets(meta_model, changed), changed, 512)
        assert row["total_gb"] == pytest.approx(expected) == pytest.approx(sum(row["terms_gb"].values()))
        assert f"{expected:.2f}" in told
    assert "base in bf16" not in told and "attention scores" not in told  # nothing of them here
    assert "Rank 8: 12,582,912 parameters trained of 3,833,662,464." in told
    assert record["changes"] == [] and record["free_gb"] is None


def planned(capsys, *arguments: str) -> str:
    assert command_line(["plan", *arguments]) == 0
    return " ".join(capsys.readouterr().out.split())


def test_a_card_gets_the_fastest_that_fits_or_the_way_down_to_it(capsys):
    assert "It fits with --gradient-checkpointing none --compile graphs" in planned(capsys, "--gpu-memory", "24")
    assert "It fits with --gradient-checkpointing selective" in planned(capsys, "--gpu-memory", "12")
    assert "A card of 8 GB. We plan for at most 6.71 GB. It fits with --gradient-checkpointing full" in planned(
        capsys, "--gpu-memory", "8"
    )
    told = planned(capsys, "--gpu-memory", "4.5")
    assert "To make it fit, one after the other" in told and told.count("fits") == 1
    assert told.index("-batch-size 1") < told.index("--compile layers") < told.index("--offload-check") < told.index("fits")
    told = planned(capsys, "--gpu-memory", "2")
    assert "No setting, down to 128 tokens and rank 4, makes it fit" in told
    assert "--max-length 128" in told and "--max-length 64" not in told and "--lora-r 4" in told and "--lora-r 2" not in told
    asked = ("--gpu-memory", "24", "--gradient-checkpointing", "full")
    assert "It fits with --gradient-checkpointing full" in planned(capsys, *asked)


def test_each_change_comes_on_top_of_those_before_it():
    options = PlanOptions(attn_implementation="eager", cache_dequantized=True)
    config = dataclasses.replace(plan.configuration(options), gradient_checkpointing="none")
    meta_model = plan.shape_meta_model(options, config)
    steps = list(plan.steps_down(meta_model, config, 4.2))
    totals = [step.total_gb for _, step in steps]
    assert totals == sorted(totals, reverse=True)
    assert [step.fits(4.2) for _, step in steps] == [False] * (len(steps) - 1) + [True]
    last = steps[-1][1].config
    assert (last.cache_dequantized, last.gradient_checkpointing, last.compile) == (False, "full", "layers")


def test_each_change_is_the_one_that_saves_most_and_training_is_changed_last():
    options = PlanOptions(attn_implementation="eager", cache_dequantized=True)
    config = dataclasses.replace(plan.configuration(options), gradient_checkpointing="none")
    meta_model = plan.shape_meta_model(options, config)
    found = [(None, plan.planned(meta_model, config)), *plan.steps_down(meta_model, config, 0.1)]
    kinds = []
    for (_, before), (words, then) in itertools.pairwise(found):
        settings = memory.settings_to_try(before.config, before.config.max_length)
        totals = {each: [] for each in (True, False)}
        for each in settings:
            changed = plan.planned(meta_model, dataclasses.replace(before.config, **each.changes))
            totals[each.same_training].append(changed.total_gb)
        (kind,) = (each.same_training for each in settings if each.flags == words)
        assert then.total_gb == min(totals[kind]) < before.total_gb
        assert kind or min([*totals[True], before.total_gb]) >= before.total_gb  # nothing else was left that saves
        kinds.append(kind)
    assert kinds == sorted(kinds, reverse=True) and {True, False} == set(kinds)
    assert (found[-1][1].config.max_length, found[-1][1].config.lora_r) == (128, 4)


def test_a_model_s_own_configuration_is_read_and_what_cannot_be_is_refused(tiny, capsys):
    for model in (str(tiny), "tiny-random"):
        assert "135,168 parameters trained of 799,680" in planned(capsys, "--model", model, "--max-length", "256")
    assert command_line(["plan", "--model", "tiny-random", "--shape", "phi3-mini"]) == ExitCode.CONFIGURATION
    assert "--model tiny-random and --shape phi3-mini were both given" in capsys.readouterr().err
    assert command_line(["plan", "--max-length", "9999"]) == ExitCode.CONFIGURATION
    assert "more than the 4096 positions of phi3-mini" in capsys.readouterr().err
    assert command_line(["plan", "--gpu-memory", "0"]) == ExitCode.CONFIGURATION
    assert command_line(["plan", "--lora-r", "0"]) == ExitCode.CONFIGURATION
    assert command_line(["plan", "--target-modules", "q_proj"]) == ExitCode.CONFIGURATION
    assert "--lora-r 0 cannot be used: it must be at least 1" in capsys.readouterr().err
    with pytest.raises(UserError, match="needs --compile layers, not none"):
        plan.configuration(PlanOptions(offload_checkpoints=True, compile="none"))
    assert plan.configuration(PlanOptions(offload_checkpoints=True)).compile == "layers"


def test_what_is_read_is_not_replaced_and_a_folder_is_no_file(tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text('{"instruction": "a", "response": "b"}\n')
    for command in (["inspect-data", "--model", "tiny-random", "--train-file", str(data)],):
        assert command_line([*command, "--json", str(data)]) == ExitCode.CONFIGURATION
        assert "is read by this command" in capsys.readouterr().err
    assert data.read_text() == '{"instruction": "a", "response": "b"}\n'
    for path in (tmp_path / "nowhere" / "x.json", tmp_path):
        assert command_line(["plan", "--json", str(path)]) == ExitCode.CHECKPOINT
        assert "cannot be written" in capsys.readouterr().err
    with pytest.raises(UserError, match="it is a folder"):
        require_writable(tmp_path)


def test_several_gpus_get_the_time_of_a_step_and_memory_with_a_shared_base(tmp_path, capsys):
    out = tmp_path / "plan.json"
    assert command_line(["plan", "--gpus", "4", "--interconnect", "12.5", "--json", str(out)]) == 0
    told, record = " ".join(capsys.readouterr().out.split()), json.loads(out.read_text())
    assert "On 4 GPUs" in told and "each GPU sends 0.30 GB per step, at 12.5 GB/s" in told
    whole, sharded = record["several"][-2:]
    assert (whole["gradient_checkpointing"], whole["shard_base"], sharded["shard_base"]) == ("full", False, True)
    # 50,331,648 gradients of 4 bytes, of which a ring sends 2 * 3/4; and 3.62 GB / 2 of packed weights, twice 2 micro-batches.
    assert whole["reduce_ms"] == pytest.approx(1000 * 1.5 * 4 * 50_331_648 / 12.5e9) == sharded["reduce_ms"]
    assert whole["gather_ms"] == 0 and sharded["gather_ms"] == pytest.approx(1000 * 0.75 * 4 * 1.8119e9 / 12.5e9, rel=1e-3)
    assert sharded["step_ms"] == pytest.approx(max(sharded["compute_ms"], sharded["gather_ms"]) + sharded["reduce_ms"])
    assert sharded["gather_ms"] > sharded["compute_ms"] and sharded["efficiency"] < whole["efficiency"] < 1
    options = PlanOptions()
    config = dataclasses.replace(plan.configuration(options), shard_base=True, compile="layers", gradient_checkpointing="full")
    meta_model = plan.shape_meta_model(options, config)
    one, four = (memory.memory_terms(meta_model, audit_targets(meta_model, config), config, 2048, ranks) for ranks in (1, 4))
    # Three fourths of the packed bytes go; two layers of 32 come.
    assert one["base in NF4"] - four["base in NF4"] == pytest.approx(0.75 * 1.8119, rel=1e-3)
    assert four["layers gathered"] == pytest.approx(2 * 1.8119 / 32, rel=1e-3) and one["layers gathered"] == 0
    assert sharded["peak_gb"] == pytest.approx(sum(four.values()))


@pytest.mark.parametrize(("flag", "value"), [("--gpus", "0"), ("--interconnect", "0"), ("--gradient-accumulation-steps", "0")])
def test_several_gpus_refuse_what_cannot_be(capsys, flag, value):
    assert command_line(["plan", flag, value]) == ExitCode.CONFIGURATION
    assert f"{flag} {value}" in capsys.readouterr().err


def test_a_shared_base_is_the_first_change_and_the_step_stays_the_same(tmp_path, capsys):
    flags = ["--gpus", "8", "--shape", "phi3-medium", "--gpu-memory", "6", "--json", str(tmp_path / "plan.json")]
    assert command_line(["plan", *flags]) == 0
    first, *others = [row["change"] for row in json.loads((tmp_path / "plan.json").read_text())["changes"]]
    # 16 micro-batches of 2 rows on 8 GPUs are 32 of 1 row.
    assert first == "--shard-base"
    assert "--per-device-train-batch-size 1 --gradient-accumulation-steps 32 (the same step)" in others


def test_a_shared_base_is_advised_where_a_whole_one_does_not_fit(capsys):
    told = planned(capsys, "--gpus", "8", "--shape", "phi3-medium", "--gpu-memory", "10")
    assert "It fits with --shard-base --gradient-checkpointing full --compile layers" in told
    told = planned(capsys, "--gpus", "8", "--shape", "phi3-medium", "--gpu-memory", "8")
    assert "To make it fit" in told and told.count(" fits") == 1
    assert "--shard-base" not in planned(capsys, "--gpus", "8", "--gpu-memory", "80").rpartition("It fits with ")[2]


def test_the_micro_batches_of_a_step_are_shared_out(tmp_path, capsys):
    rows = []
    for steps in ("4", "6", None):
        flags = [] if steps is None else ["--gradient-accumulation-steps", steps]
        assert command_line(["plan", "--gpus", "4", *flags, "--json", str(tmp_path / "plan.json")]) == 0
        rows.append(json.loads((tmp_path / "plan.json").read_text())["several"][0])
    one, uneven, two = rows
    # Six on four GPUs: two of them have two.
    assert uneven["compute_ms"] == pytest.approx(2 * one["compute_ms"]) == pytest.approx(two["compute_ms"])
    assert uneven["tokens_per_s"] == pytest.approx(0.75 * two["tokens_per_s"])


def test_plan_refuses_what_training_refuses_and_compiles_as_training_does(tmp_path, capsys):
    for flags, words in (
        (["--quantization", "none", "--cache-dequantized"], "--cache-dequantized True cannot be used"),
        (["--quantization", "int8", "--compile", "graphs"], "layers in 8 bits are never compiled"),
    ):
        assert command_line(["plan", *flags]) == ExitCode.CONFIGURATION and words in capsys.readouterr().err
    assert command_line(["plan", "--quantization", "int8", "--gpu-memory", "80"]) == 0
    shown = capsys.readouterr().out
    assert "--compile none" in shown and "base in INT8" in shown
    settings = {"vocab_size": 384, "hidden_size": 64, "n_layer": 2, "n_head": 4}
    transformers.BloomConfig(**settings).save_pretrained(tmp_path)
    assert command_line(["plan", "--model", str(tmp_path), "--max-length", "128", "--gpu-memory", "80"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "Layers run as written: in BloomForCausalLM its decoder does not run with masks" in shown and "--compile none" in shown
    )
