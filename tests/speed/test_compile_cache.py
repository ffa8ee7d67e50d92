"""Where compiled kernels are kept: a folder of the user's, as they are code."""

import dataclasses
import functools
import os
import re
import shutil
import stat
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.compiler.config

from qlora.cli import train as command_line
from qlora.data.batch import iter_batches
from qlora.model import attention
from qlora.model.loss import read_head, token_loss_sum
from qlora.run import prepare
from qlora.speed import compile_cache
from qlora.speed.accelerate import accelerate
from tests.helpers import adapted_model, decoder_of, gradients, wake_adapters
from train_loop import train_step


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of this version, in a new cache folder."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with torch.compiler.config.patch(cache_key_tag=""):
        yield tmp_path / "qlora-train" / "compiled" / f"torch-{torch.__version__}-python-3.{sys.version_info[1]}"
    os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)


def test_kernels_are_kept_where_only_the_user_may_write(cache):
    for _ in range(2):
        os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
        compile_cache.use(keep=True)
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(cache) and stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_code_that_was_edited_is_compiled_again(cache, tmp_path, monkeypatch):
    package = tmp_path / "package"
    for folder in ("speed", "model"):
        shutil.copytree(Path(compile_cache.__file__).parents[1] / folder, package / folder)
    monkeypatch.setattr(compile_cache, "__file__", str(package / "speed" / "compile_cache.py"))
    tags = []
    for edited in (None, package / "speed" / "lora_linear.py", package / "model" / "attention.py", package / "model" / "x.py"):
        if edited is not None:
            edited.write_text(edited.read_text() + "\n" if edited.exists() else "")
        torch.compiler.config.cache_key_tag = "mine"
        compile_cache.use(keep=True)
        tags.append(torch.compiler.config.cache_key_tag)
    assert len(set(tags[:3])) == 3 and all(tag.startswith("mine") for tag in tags)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    "policy", ["none", pytest.param("selective", marks=pytest.mark.slow), pytest.param("full", marks=pytest.mark.slow)]
)
def test_what_was_traced_is_found_again(cache, config, samples, policy):
    """After dynamo has forgotten, as in another process: the cache of traced graphs is hit, and gradients are the same."""
    compile_cache.use(keep=True)
    found = []
    for expected in ("autograd_cache_miss", "autograd_cache_hit"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        changed = dataclasses.replace(config, attn_implementation="sdpa")
        model = adapted_model(changed)
        wake_adapters(model)
        model.accelerated = accelerate(model, dataclasses.replace(changed, gradient_checkpointing=policy, compile="layers"))
        loss_sum = functools.partial(token_loss_sum, head=read_head(model))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        with attention.for_training(model.train(), changed):
            batches = list(iter_batches(samples, range(2), 2))
            loss, _ = train_step(decoder_of(model), optimizer, batches, loss_sum, 0.0, None)
        assert torch._dynamo.utils.counters["aot_autograd"][expected] == 1
        found.append((loss.item(), gradients(model)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(gradient, found[1][1][name]) for name, gradient in found[0][1].items())


def test_a_folder_of_the_user_s_stays(cache, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    compile_cache.use(keep=True)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/elsewhere" and not cache.exists()


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
@pytest.mark.parametrize("parent", [False, True])
def test_a_folder_that_others_may_write_is_not_used(cache, mode, parent):
    cache.mkdir(parents=True, mode=0o700)
    cache.parent.chmod(0o700)
    (cache.parent if parent else cache).chmod(mode)
    note = compile_cache.use(keep=True)
    used = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert re.fullmatch(rf"Compiled kernels are not kept: others than you may write to .*mode {mode:o}\)\.", note)
    assert cache not in (used, *used.parents) and stat.S_IMODE(used.stat().st_mode) == 0o700


def test_a_folder_of_another_user_is_not_used(cache, monkeypatch):
    cache.mkdir(parents=True, mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: cache.stat().st_uid + 1)
    assert "others than you may write" in compile_cache.use(keep=True)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] != str(cache)


def test_a_folder_that_cannot_be_made_is_no_reason_to_stop(cache):
    cache.parent.parent.write_text("a file")
    assert "cannot be made" in compile_cache.use(keep=True) and Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).is_dir()


def test_folders_of_other_versions_go_when_they_are_long_unused(cache):
    old, recent = cache.with_name("torch-1"), cache.with_name("torch-2")
    for folder, days in ((old, 61), (recent, 59)):
        (folder / "kernels").mkdir(parents=True)
        os.utime(folder, (0, time.time() - days * 24 * 3600))
    compile_cache.use(keep=True)
    assert not old.exists() and recent.exists() and cache.exists()


@pytest.mark.parametrize(("flags", "kept"), [([], True), (["--no-compile-cache"], False)])
def test_the_command_line_decides_whether_kernels_are_kept(cache, tiny, tmp_path, monkeypatch, flags, kept):
    class Enough(Exception):
        pass

    def stop(*_):
        raise Enough

    monkeypatch.setattr(prepare, "Prepared", stop)
    command = ["--model", "tiny-random", "--compile", "layers", "--output-dir", str(tmp_path / "run")]
    with pytest.raises(Enough):
        command_line([*command, *flags])
    assert (os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(cache)) == kept
