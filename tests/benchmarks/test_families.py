"""The table of model families: a step against plain transformers and PEFT, and what the table says."""

import json

import pytest
import transformers

from benchmarks import families, tables
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
    assert (line is not None) == warns and (not warns or "1 of 2 samples are longer than 256 tokens" in line)
