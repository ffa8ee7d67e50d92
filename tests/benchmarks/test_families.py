"""The table of model families: a step against plain transformers and PEFT, and what the table says."""

import json

import pytest
import torch
import transformers

from benchmarks import families, families_speed, shapes, tables
from benchmarks.peers import work
from qlora.model.families import mixed_rotation


@pytest.mark.parametrize("family", ["Qwen3", "Gemma3Text", "Bloom"])
def test_a_step_is_that_of_transformers_and_peft(tiny, tmp_path, family):
    """Gemma 3 mixes layers with a sliding window and without; Bloom cannot be packed."""
    families.write_model(family, tmp_path)
    found = families.compare(family, tmp_path, families.STEPS[:3])  # the others compile for half a minute
    assert "lets a sample see its neighbor" in found["packed"]["refused"] if family == "Bloom" else "loss" in found["packed"]
    for step in (step for step in found.values() if "refused" not in step):
        assert step["loss"] < families.LOSS_LIMIT and step["gradient"] < families.GRADIENT_LIMIT


def test_the_program_does_with_a_family_what_it_does_with_phi_3(tiny, tmp_path):
    families.write_model("Qwen3", tmp_path / "model")
    assert families.try_commands(tmp_path / "model", tmp_path) == dict.fromkeys(families.COMMANDS, "yes")


def test_what_was_measured_is_within_the_limits_and_in_the_table():
    name, record = tables.load("families_cpu_*.json")
    assert {cell["family"] for cell in record["cells"]} == set(families.FAMILIES)
    for cell in record["cells"]:
        steps = [step for step in cell["steps"].values() if "refused" not in step]
        assert len(steps) >= 2 and set(cell["commands"].values()) == {"yes"}, cell["family"]
        for step in steps:
            assert step["loss"] < families.LOSS_LIMIT and step["gradient"] < families.GRADIENT_LIMIT, cell["family"]
    text = families.families("families_cpu_*.json")
    assert all(f"| {family} | " in text for family in families.FAMILIES) and name in text and json.dumps(name)


@pytest.mark.parametrize(
    ("kind", "lengths", "warns"),
    [("longrope", [10, 300], True), ("longrope", [10, 256], False), ("longrope", [257], False), ("default", [10, 300], False)],
)
def test_samples_on_both_sides_of_longrope_s_length_are_told(kind, lengths, warns):
    rotation = families.LONGROPE if kind == "longrope" else {"rope_type": "default", "rope_theta": 10000.0}
    settings = {**families.FAMILIES["Phi3, longrope"], "rope_parameters": rotation}
    line = mixed_rotation(transformers.Phi3Config(**settings), lengths)
    assert mixed_rotation(transformers.Phi3Config(**settings), [length - 6 for length in lengths], before=6) == line
    assert (line is not None) == warns and (not warns or "1 of 2 samples are longer than 256 tokens" in line)


SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
         "num_hidden_layers": 2, "vocab_size": 384}  # fmt: skip


def test_a_shape_is_written_in_nf4_and_trained_both_ways(tiny, tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setitem(shapes.SHAPES, "gemma-3-12b", {**shapes.SHAPES["gemma-3-12b"], **SMALL})
    families_speed.write_and_compile("gemma-3-12b", tmp_path / "model", 2, 32)
    written = transformers.AutoConfig.from_pretrained(tmp_path / "model")
    assert written.layer_types == ["sliding_attention", "full_attention"]
    assert (
        written.quantization_config["bnb_4bit_quant_type"] == "nf4" and written.quantization_config["bnb_4bit_use_double_quant"]
    )
    row = families_speed.both(tmp_path / "model", 32, 1)
    plain, fast = row["as written"], row["compiled"]
    assert plain["first_loss"] == fast["first_loss"] and plain["last_loss"] < plain["first_loss"]
    assert row["ratio"] == pytest.approx(fast["tokens_per_s"] / plain["tokens_per_s"], rel=0.01)


def test_shapes_have_the_parameters_of_their_models():
    """In billions, as their authors give them; within 1 % where they are known to three digits."""
    known = {"llama-3.1-8b": 8.03, "qwen3-8b": 8.19, "gemma-3-12b": 11.77, "mistral-7b": 7.25, "qwen2.5-7b": 7.62,
             "gemma-7b": 8.54, "gemma-2-9b": 9.24, "phi-4-mini": 3.84, "smollm3-3b": 3.08, "granite-3.3-8b": 8.17,
             "olmo-2-7b": 7.3, "glm-4-9b": 9.4, "command-r7b": 8.03, "stablelm-3b": 2.8, "starcoder2-7b": 7.17,
             "ministral-8b": 8.02, "olmo-3-7b": 7.3}  # fmt: skip
    assert known.keys() == shapes.SHAPES.keys()
    for name, billions in known.items():
        values = dict(shapes.SHAPES[name])
        config = getattr(transformers, f"{values.pop('family')}Config")(**values, pad_token_id=3)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        assert model.num_parameters() / 1e9 == pytest.approx(billions, rel=0.011), name


def test_windows_are_counted_where_a_layer_has_one():
    shape = {**SMALL, "sliding_window": 4}
    every = work.flops_per_token(shape, [8], 0)
    mixed = work.flops_per_token({**shape, "layer_types": ["sliding_attention", "full_attention"]}, [8], 0)
    none = work.flops_per_token({**shape, "sliding_window": None}, [8], 0)
    # 7 operations for each pair of positions, 64 wide, of 2 layers: twice the pairs are 64 without a window, 48 with one of 4.
    assert none - every == 7 * 16 / 8 * 64 * 2 and none - mixed == 7 * 16 / 8 * 64


def test_speeds_are_in_the_table():
    name, record = tables.load("families_speed_h200_*.json")
    text = families_speed.speeds("families_speed_h200_*.json")
    assert {cell["model"] for cell in record["cells"]} == set(shapes.SHAPES) and name in text
    for cell in record["cells"]:
        assert f"| {cell['model']} | " in text and f" {cell['ratio']:.2f} " in text
