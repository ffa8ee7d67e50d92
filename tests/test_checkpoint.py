"""What a run leaves on disk, and whether others can load it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from qlora import checkpoint, data
from qlora.config import ExitCode, UserError
from qlora.loss import read_head, token_loss_sum
from tests.conftest import adapted_model, wake_adapters
from train_loop import train_step


@pytest.fixture
def trained(config, samples):
    """A model and its optimizer after one step."""
    model = adapted_model(config)
    head = read_head(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    train_step(model.get_decoder(), optimizer, [data.collate(samples[:2])], lambda h, b: token_loss_sum(h, b, head), 1e-3, 1.0)
    return model, optimizer


def test_a_checkpoint_holds_adapter_moments_and_state(trained, tmp_path):
    model, optimizer = trained
    folder = checkpoint.save(tmp_path, model, optimizer, {"step": 12, "epoch": 2}, keep=3)
    assert folder == tmp_path / "step-000012"
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "state.json",
        "trainer_state.safetensors",
    ]
    assert json.loads((folder / "state.json").read_text()) == {"step": 12, "epoch": 2}
    stored = load_file(folder / "trainer_state.safetensors")
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert stored.keys() == {f"{kind}.{name}" for name in named for kind in ("step", "exp_avg", "exp_avg_sq")}
    for name, parameter in named.items():
        for kind, value in optimizer.state[parameter].items():
            assert (
                torch.equal(stored[f"{kind}.{name}"], value) and stored[f"{kind}.{name}"].dtype == value.dtype == torch.float32
            )


def test_only_the_newest_are_kept_and_foreign_files_stay(trained, tmp_path):
    (tmp_path / "notes.txt").touch()
    for step, kept in ((6, {6}), (12, {6, 12}), (999_999, {12, 999_999}), (1_000_000, {999_999, 1_000_000})):
        checkpoint.save(tmp_path, *trained, {"step": step}, keep=2)
        assert {p.name for p in tmp_path.iterdir()} == {"notes.txt", *(f"step-{number:06d}" for number in kept)}
    checkpoint.save(tmp_path, *trained, {"step": 1_000_001}, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "step-1000001"]
    checkpoint.save(tmp_path, *trained, {"step": 999_999}, keep=1)  # a step below the newest goes first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "step-1000001"]


def test_leftovers_of_a_save_that_died_do_not_hinder_the_next(trained, tmp_path):
    (tmp_path / ".step-000006").mkdir()
    (tmp_path / ".step-000006" / "adapter_model.safetensors").write_bytes(b"half")
    folder = checkpoint.save(tmp_path, *trained, {"step": 6}, keep=2)
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]


def test_the_adapter_loads_in_another_process_offline_with_equal_logits(tiny, tokenizer, config, tmp_path):
    """As the closing words say: AutoPeftModelForCausalLM.from_pretrained(RUN/adapter), in bf16 and on the NF4 base."""
    model = adapted_model(config)
    wake_adapters(model)
    checkpoint.save_adapter(model, tmp_path)
    tokenizer.save_pretrained(tmp_path)
    bf16 = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16), str(tmp_path)
    )
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        expected = {"bf16": bf16(input_ids=ids).logits, "nf4": model.eval()(input_ids=ids).logits}
    torch.save(expected, tmp_path / "expected.pt")
    code = f"""
import torch; torch.set_num_threads(1)
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, BitsAndBytesConfig
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                         bnb_4bit_compute_dtype=torch.bfloat16)
expected = torch.load({str(tmp_path / "expected.pt")!r})
for name, how in (("bf16", {{}}), ("nf4", {{"quantization_config": nf4}})):
    model = AutoPeftModelForCausalLM.from_pretrained({str(tmp_path)!r}, dtype="bfloat16", **how).eval()
    ids = torch.arange(5, 45)[None]
    for module in model.modules():  # bitsandbytes' inference kernel rounds otherwise than the one we train with
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected[name]), name
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, expected[name], rtol=0.05, atol=0.05)
assert AutoTokenizer.from_pretrained({str(tmp_path)!r}).eos_token == "<|endoftext|>"
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not torch.equal(expected["bf16"], expected["nf4"])  # the two bases differ: NF4 rounds


def test_the_adapter_names_its_base_and_commit_and_carries_no_blank_card(model, config, tmp_path):
    checkpoint.save_adapter(model, tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == config.model and Path(config.model).is_absolute()
    assert saved["inference_mode"] is True and model.peft_config["default"].inference_mode is False
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert all(t.dtype == torch.float32 for t in load_file(tmp_path / "adapter_model.safetensors").values())


def test_a_hub_model_is_named_by_id_and_commit(config, tmp_path):
    from qlora.model import add_adapters, audit_targets, load_nf4_model
    from tests.conftest import CPU

    base = load_nf4_model(config.model, config, "sdpa", CPU)
    base.config._commit_hash = "0123abc"
    adapted = add_adapters(base, config, audit_targets(base, config), "org/model")
    checkpoint.save_adapter(adapted, tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["base_model_name_or_path"], saved["revision"]) == ("org/model", "0123abc")


def test_nothing_that_is_written_is_a_pickle(trained, tmp_path):
    folder = checkpoint.save(tmp_path, *trained, {"step": 1}, keep=1)
    assert {p.suffix for p in folder.rglob("*") if p.is_file()} == {".json", ".safetensors"}


def test_a_run_folder_is_made_and_checked_and_never_written_over(tmp_path):
    checkpoint.prepare_run_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    checkpoint.prepare_run_folder(tmp_path / "a" / "b")  # an empty one is no run
    (tmp_path / "file").touch()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").touch()
    for folder, words in (
        (tmp_path / "used", "is not empty"),
        (tmp_path / "file" / "run", "cannot be written"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            checkpoint.prepare_run_folder(folder)
        assert caught.value.exit_code == ExitCode.CHECKPOINT
    assert (tmp_path / "used" / "notes.txt").exists()
