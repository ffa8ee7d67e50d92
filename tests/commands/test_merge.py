"""Merged weights, what merging changes, and the folders that come of it."""

import dataclasses
import json
import math
import shutil
import stat
from types import SimpleNamespace

import bitsandbytes
import numpy
import onnxruntime
import pytest
import torch
import transformers

from qlora.cli import main
from qlora.commands import export_onnx, merge
from qlora.commands.adapter import load_adapted, open_adapter
from qlora.commands.merge import Difference
from qlora.config import BUNDLED_EVAL
from qlora.data.batch import iter_batches
from qlora.data.dataset import TokenizedDataset, encode_all
from qlora.data.formats import read_examples
from qlora.data.template import IGNORED, load_template
from qlora.errors import ExitCode, UserError
from qlora.eval.loss import evaluate_loss
from qlora.model.load import load_nf4_model
from qlora.model.loss import read_head, token_loss_sum
from qlora.model.third_party import peft
from qlora.run import checkpoint, files
from qlora.run.files import verify, write_folder
from tests.helpers import CPU, adapted_model, of_peft, wake_adapters


@pytest.fixture
def write(config, tokenizer, tmp_path):
    """Write an adapter for a base into tmp_path; its folder."""

    def written(base: str | None = None, scale: float = 1.0):
        model = adapted_model(dataclasses.replace(config, model=base or config.model))
        wake_adapters(model, scale)
        write_folder(tmp_path / "adapter", dict(checkpoint.adapter_files(model, tokenizer)))
        return tmp_path / "adapter"

    return written


@pytest.fixture
def adapter(write):
    return open_adapter(write(), prompt_format="plain", device="cpu")


@pytest.fixture
def eval_set(template, config) -> TokenizedDataset:
    return encode_all(read_examples(BUNDLED_EVAL, "test"), BUNDLED_EVAL, template, config)[0]


def command(folder, *flags, prompt_format: str = "plain") -> list[str]:
    options = ("--prompt-format", prompt_format, "--eval-file", str(BUNDLED_EVAL), "--limit", "3", "--device", "cpu")
    return ["merge", str(folder), *options, *map(str, flags)]


# -- merging and measuring -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["bf16", "dequantized"])
def test_merged_weights_are_the_sum_rounded_once(adapter, route):
    merged = merge.merged_model(adapter, route)
    assert not any("lora" in name for name, _ in merged.named_modules()) and not merged.training
    assert not hasattr(merged.config, "quantization_config")
    unmerged = load_adapted(adapter, "nf4" if route == "dequantized" else "none")
    layers = [(name, module) for name, module in unmerged.named_modules() if hasattr(module, "lora_A")]
    assert len(layers) == 8
    for name, layer in layers:
        weight = layer.base_layer.weight
        if route == "dequantized":
            weight = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert weight.dtype == torch.bfloat16
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
        found = merged.get_submodule(name.removeprefix("base_model.model.")).weight
        assert torch.equal(found, (weight.float() + product).bfloat16()), name


def test_differences_are_those_of_whole_logits(adapter, eval_set, monkeypatch):
    reference, other = load_adapted(adapter, "nf4"), load_adapted(adapter, "none")
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.mul_(3 if "lora_B" in name else 1)
    monkeypatch.setattr(merge, "CHUNK_TOKENS", 17)
    found = merge.difference(reference, other, eval_set)
    kl, agreed, loss, tokens = 0.0, 0, 0.0, 0
    for sample in eval_set:
        labels = torch.tensor(sample.labels)[1:]
        kept = labels != IGNORED
        ids = torch.tensor([sample.input_ids])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            p, q = (torch.log_softmax(m(input_ids=ids).logits[0, :-1][kept].double(), dim=-1) for m in (reference, other))
        kl += torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True).item()
        loss -= q[torch.arange(len(q)), labels[kept]].sum().item()
        agreed += (p.argmax(-1) == q.argmax(-1)).sum().item()
        tokens += len(p)
    assert found.kl == pytest.approx(kl / tokens, rel=1e-3) and found.kl > 1e-4
    assert found.loss == pytest.approx(loss / tokens, rel=1e-5)
    assert found.agreement == pytest.approx(agreed / tokens, abs=2 / tokens)
    assert found.perplexity == pytest.approx(math.exp(loss / tokens), rel=1e-4)


def test_what_is_measured_is_the_adapter_its_base_and_each_way_to_merge(adapter, eval_set):
    found = merge.measured(adapter, ["bf16", "dequantized"], eval_set)
    assert list(found) == ["unmerged", "base", "bf16", "dequantized"]
    assert found["unmerged"].kl == 0 and found["unmerged"].agreement == 1
    model = load_adapted(adapter, "nf4")
    head = read_head(model)
    batches = list(iter_batches(eval_set, range(len(eval_set)), 1))
    losses = [evaluate_loss(model, batches, lambda h, b: token_loss_sum(h, b, head)).loss]
    with model.disable_adapter():
        losses.append(evaluate_loss(model, batches, lambda h, b: token_loss_sum(h, b, head)).loss)
    assert [found["unmerged"].loss, found["base"].loss] == pytest.approx(losses, rel=1e-4)
    assert abs(losses[0] - losses[1]) > 1e-3 * losses[0]
    assert 0 < found["dequantized"].kl < found["bf16"].kl < found["base"].kl


def test_the_closest_is_recommended_and_a_lower_loss_is_told():
    near, far = Difference(1e-5, 1.0, 0.5), Difference(1e-3, 0.9, 0.4)
    best, line = merge.recommendation({"bf16": far, "dequantized": near})
    assert best == "dequantized" and "1e-05" in line and "lower with bf16, by 0.1" in line
    best, line = merge.recommendation({"bf16": near, "dequantized": far._replace(loss=0.6)})
    assert best == "bf16" and "lower" not in line
    assert merge.recommendation({"dequantized": far})[0] == "dequantized"


UNMERGED = Difference(0.0, 1.0, 0.5)


@pytest.mark.parametrize(
    ("base", "dequantized", "bf16", "refused"),
    [
        ((1.1, 1.2), (2e-4, 0.5), (2e-2, 0.6), ()),
        ((8e-2, 0.7), (49.0, 54.0), (49.0, 54.0), ("bf16", "dequantized")),  # spoiled
        ((0.3, 0.7), (0.3, 0.7), (0.3, 0.7), ("bf16", "dequantized")),  # the adapter got lost
        ((0.3, 0.7), (math.nan, math.nan), (0.01, 0.5), ("bf16", "dequantized")),
        ((1e-7, 0.5), (2e-5, 0.5), (2e-3, 0.49), ()),  # an adapter of next to no effect
        ((6e-4, 0.55), (3e-6, 0.5), (2e-3, 0.52), ()),  # of less effect than NF4's rounding
        ((0.1, 0.55), (2e-4, 0.5), (0.2, 0.6), ("bf16",)),
        ((0.1, 0.55), (2e-4, 0.5), (math.nan, math.nan), ("bf16",)),
    ],
)
def test_what_loses_the_adapter_is_no_merge(base, dequantized, bf16, refused):
    found = {"unmerged": UNMERGED}
    for name, (kl, loss) in (("base", base), ("bf16", bf16), ("dequantized", dequantized)):
        found[name] = Difference(kl, 0.9, loss)
    for route in ("bf16", "dequantized"):
        if route in refused:
            with pytest.raises(UserError, match="nothing was saved") as caught:
                merge.check_merges(found, route)
            assert caught.value.exit_code == ExitCode.NUMERICS
        else:
            merge.check_merges(found, route)


def test_a_spoiled_merge_is_not_saved(write, monkeypatch, capsys, tmp_path):
    whole = merge.merged_model

    def spoiled(adapter, route):
        model = whole(adapter, route)
        model.get_input_embeddings().weight.data.mul_(-9)
        return model

    monkeypatch.setattr(merge, "merged_model", spoiled)
    for flags in ([], ["--into", "bf16"], ["--into", "recommended"]):
        assert main(command(write(), *flags)) == 5
        shown = capsys.readouterr()
        assert "into dequantized" in shown.out and "Recommended" not in shown.out
        assert "does not reproduce the adapter" in shown.err and shown.err.count("\n") == 1
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_biases_of_the_adapter_are_refused_before_weights_are_loaded(adapter, monkeypatch, capsys):
    adapter.lora.lora_bias = True
    monkeypatch.setattr(merge, "open_adapter", lambda *_: adapter)
    monkeypatch.setattr(merge, "load_adapted", None)
    assert main(command(adapter.folder)) == 2
    assert "lora_bias" in capsys.readouterr().err


def test_two_merges_to_one_place_share_nothing_and_the_second_replaces_nothing(adapter, tmp_path):
    folder = tmp_path / "merged"
    with merge._scratch(folder) as one, merge._scratch(folder) as other:
        assert one != other and one.is_dir() and other.is_dir() and one.parent == other.parent == tmp_path
    assert not one.exists() and not other.exists()
    merge.save(merge.merged_model(adapter, "bf16"), adapter, folder, {"first": True}, None)
    with pytest.raises(UserError, match="nothing is replaced"):
        merge.save(merge.merged_model(adapter, "bf16"), adapter, folder, {"first": False}, None)
    assert json.loads((folder / merge.SUMMARY).read_text()) == {"first": True}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged"]


def test_an_adapter_that_is_not_finite_is_refused(write):
    folder = write(scale=math.inf)
    adapter = open_adapter(folder, prompt_format="plain", device="cpu")
    with pytest.raises(UserError, match="tensors are not finite") as caught:
        merge.merged_model(adapter, "bf16")
    assert caught.value.exit_code == ExitCode.NUMERICS


# -- the command -----------------------------------------------------------------------------------------------------


def test_a_saved_folder_loads_as_any_model(write, template, capsys, tmp_path):
    folder = write()
    assert main(command(folder, "--into", "recommended", prompt_format="chat")) == 0
    out = capsys.readouterr().out
    saved = tmp_path / "adapter-merged-dequantized"
    assert f"vllm serve {saved}" in out and "--max-lora-rank 8 " in out and "convert_hf_to_gguf.py" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", saved.name]
    assert verify(saved) is None
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o044 == 0o044 for path in saved.iterdir())
    loaded, chat = (
        transformers.AutoModelForCausalLM.from_pretrained(saved, dtype="auto"),
        load_template(template.tokenizer, "chat"),
    )
    assert loaded.dtype == torch.bfloat16 and loaded.generation_config.eos_token_id == [template.stop_id, chat.stop_id]
    merged = merge.merged_model(open_adapter(folder, prompt_format="plain", device="cpu"), "dequantized")
    tensors = merged.state_dict()
    assert tensors.keys() == loaded.state_dict().keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in loaded.state_dict().items())
    text = "### Instruction:\nhello"
    assert transformers.AutoTokenizer.from_pretrained(saved)(text).input_ids == template.tokenizer(text).input_ids
    summary = json.loads((saved / merge.SUMMARY).read_text())
    assert summary["into"] == "dequantized" and summary["differences"].keys() == {"unmerged", "base", "bf16", "dequantized"}
    assert summary["environment"]["packages"]["torch"] == torch.__version__


@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens"])
def test_a_tied_layer_that_was_trained_whole_is_saved_apart(tiny, tmp_path, layer):
    folder = of_peft(tiny, tmp_path, tied=True, modules_to_save=[layer])
    assert main(command(folder, "--into", "dequantized", "--output-dir", tmp_path / "merged")) == 0
    merged = merge.merged_model(open_adapter(folder, prompt_format="plain", device="cpu"), "dequantized")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)
    assert all(torch.equal(tensor, merged.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_without_into_nothing_is_written(write, capsys, tmp_path):
    assert main(command(write())) == 0
    out = capsys.readouterr().out
    assert "Recommended: dequantized" in out and "heldout.jsonl" in out and "--enable-lora" in out
    assert "(beside the base in bf16: the numbers of merging into bf16)" in out
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_base_stored_in_nf4_merges_one_way(write, config, tokenizer, tmp_path, capsys):
    base = tmp_path / "nf4"
    load_nf4_model(config.model, config, "sdpa", CPU).save_pretrained(base)
    tokenizer.save_pretrained(base)
    folder = write(str(base))
    assert main(command(folder, "--into", "bf16")) == 2 and "stored in NF4" in capsys.readouterr().err
    assert main(command(folder, "--into", "recommended", "--output-dir", tmp_path / "merged")) == 0
    out = capsys.readouterr().out
    assert "the only one" in out and "(beside the base in NF4, as it was trained)" in out
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert type(loaded.model.layers[0].mlp.down_proj) is torch.nn.Linear and loaded.dtype == torch.bfloat16


def test_bad_input_is_one_paragraph_and_leaves_nothing(write, tmp_path, capsys, monkeypatch):
    folder = write()
    (tmp_path / "there").mkdir()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "other").mkdir()
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(merge, "load_adapted", None)  # all of it before weights are loaded
    cases = (
        (["--output-dir", "x"], 2, "--output-dir goes with --into"),
        (["--onnx"], 2, "--onnx goes with --into"),
        (["--limit", "0"], 2, "--limit"),
        (["--into", "bf16", "--output-dir", tmp_path / "there"], 4, "nothing is replaced"),
        (["--into", "bf16", "--output-dir", tmp_path / "no" / "x"], 4, "cannot be written"),
        (["--into", "bf16", "--eval-file", tmp_path / "empty.jsonl"], 3, "no example"),
    )
    for flags, code, text in cases:
        assert main(command(folder, *flags)) == code, flags
        error = capsys.readouterr().err
        assert text in error and error.count("\n") == 1, error
    assert main(command(tmp_path / "other")) == 4
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert main(command(folder, "--into", "bf16")) == 4 and "needed for the merged model" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_that_fills_up_leaves_no_half(adapter, tmp_path, monkeypatch):
    model = merge.merged_model(adapter, "bf16")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    for owner, name in ((type(adapter.template.tokenizer), "save_pretrained"), (files, "_write")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(UserError, match="No space left") as caught:
                merge.save(model, adapter, tmp_path / "merged", {}, None)
        assert caught.value.exit_code == ExitCode.CHECKPOINT
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


# -- serving ---------------------------------------------------------------------------------------------------------


def test_vllm_gets_a_rank_that_it_takes(adapter):
    def line(**changed) -> str:
        lora = peft.LoraConfig(**{"r": 32, **changed})
        return merge.adapter_lines(adapter._replace(lora=lora))

    assert "--max-lora-rank 32 " in line() and f"tuned={adapter.folder}" in line() and adapter.source in line()
    assert "--max-lora-rank 64 " in line(r=33) and "--max-lora-rank 8 " in line(r=8, use_rslora=True)


@pytest.mark.parametrize(
    "odd",
    [{"use_dora": True}, {"lora_bias": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]},
     {"rank_pattern": {"o_proj": 4}}, {"alpha_pattern": {"o_proj": 4}}, {"trainable_token_indices": [5]}],
)  # fmt: skip
def test_an_adapter_that_vllm_would_refuse_or_scale_wrongly_gets_no_line_for_it(adapter, odd):
    lines = merge.adapter_lines(adapter._replace(lora=peft.LoraConfig(r=32, **odd)))
    assert "vllm serve" not in lines and f"this adapter sets {next(iter(odd))}:" in lines


def test_a_rank_beyond_vllm_gets_no_line_for_it(adapter):
    lines = merge.adapter_lines(adapter._replace(lora=peft.LoraConfig(r=1000)))
    assert "vllm serve" not in lines and "has rank 1000" in lines


def test_the_sentencepiece_file_that_gguf_wants_comes_along(write, config, tmp_path, capsys):
    assert main(command(write(), "--into", "bf16")) == 0
    assert "It will refuse this folder" in capsys.readouterr().out
    base = shutil.copytree(config.model, tmp_path / "base")
    (base / "tokenizer.model").write_bytes(b"pieces")
    assert main(command(write(), "--model", base, "--into", "bf16", "--output-dir", tmp_path / "merged")) == 0
    assert "It will refuse this folder" not in capsys.readouterr().out
    assert (tmp_path / "merged" / "tokenizer.model").read_bytes() == b"pieces"


# -- ONNX ------------------------------------------------------------------------------------------------------------


def test_onnxruntime_computes_the_same_for_any_batch_and_length_or_the_export_is_refused(write, tmp_path, monkeypatch, capsys):
    assert main(command(write(), "--into", "bf16", "--onnx", "--output-dir", tmp_path / "merged")) == 0
    assert "logits within" in capsys.readouterr().out
    assert json.loads((tmp_path / "merged" / merge.SUMMARY).read_text())["onnx_relative_error"] < 1e-5
    assert verify(tmp_path / "merged") is None
    session = onnxruntime.InferenceSession(tmp_path / "merged" / "onnx" / export_onnx.MODEL)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for batch, length, padding in ((1, 5, 0), (3, 40, 7), (1, 2060, 0)):  # the last beyond the sliding window
        ids = torch.randint(5, 300, (batch, length), generator=torch.Generator().manual_seed(length))
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        with torch.no_grad():
            wanted = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        torch.testing.assert_close(torch.from_numpy(found)[mask.bool()], wanted, rtol=1e-4, atol=1e-4)

    again = SimpleNamespace(
        save=lambda path, **_: shutil.copytree(tmp_path / "merged" / "onnx", path.parent, dirs_exist_ok=True)
    )
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: again)  # the same, without the wait
    rows = [[5, 6, 7], [8, 9]]
    merge.save(model, adapter := open_adapter(tmp_path / "adapter", prompt_format="plain"), tmp_path / "same", {}, rows)
    run = onnxruntime.InferenceSession.run
    monkeypatch.setattr(onnxruntime.InferenceSession, "run", lambda *a: [numpy.float32(1.001) * run(*a)[0]])
    with pytest.raises(UserError, match=r"other logits than torch: relative error 1\.0e-03") as caught:
        merge.save(model, adapter, tmp_path / "other", {}, rows)
    assert caught.value.exit_code == ExitCode.ENVIRONMENT
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged", "same"]


def test_onnx_without_its_packages_is_refused_at_once(write, monkeypatch, capsys):
    monkeypatch.setattr(export_onnx, "PACKAGES", {"onnx": "onnx", "no_such_module": "no-such-package"})
    assert main(command(write(), "--into", "bf16", "--onnx")) == 7
    error = capsys.readouterr().err
    assert "--onnx needs no-such-package, which" in error and "pip install -e '.[onnx]'" in error
