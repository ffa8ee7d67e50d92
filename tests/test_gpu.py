"""What needs a CUDA GPU: pytest -m gpu."""

import copy
import dataclasses
import functools
import importlib.util
import json
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import bitsandbytes
import pytest
import torch
import transformers

from benchmarks import families
from benchmarks.harness import build
from benchmarks.kill_resume import metrics
from qlora.checksum import checksum
from qlora.cli import main as any_command
from qlora.cli import train as command_line
from qlora.commands import doctor, merge
from qlora.commands.adapter import open_adapter
from qlora.config import TrainConfig
from qlora.data.batch import collate, collate_packed, iter_batches, training_batches
from qlora.data.template import TokenizedExample
from qlora.errors import ExitCode
from qlora.eval import generate
from qlora.model import attention
from qlora.model.load import fingerprint, load_meta_model, load_nf4_model
from qlora.model.lora import add_lora
from qlora.model.loss import read_head, token_loss_sum
from qlora.model.optimizer import build_optimizer
from qlora.model.targets import audit_targets
from qlora.run import checkpoint
from qlora.run.files import verify, write_folder
from qlora.speed import decode, layers, nf4
from qlora.speed.accelerate import accelerate
from tests.helpers import (
    RUN_INFO,
    SHORT_DATA,
    adapted_model,
    adapter_gradients,
    decoder_of,
    fp32_twin,
    gradients,
    relative_error,
    save_checkpoint,
    tensors,
    to_fp32,
    wake_adapters,
)
from train_loop import train_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
    # What torch.compile does of itself when it meets flash-attn's autograd function.
    pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning"),
]
GPU = torch.device("cuda", 0)
ROOT = Path(__file__).parents[1]
FLASH = pytest.param(
    "flash_attention_2", marks=pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="no flash-attn")
)
VARLEN = pytest.param(
    "varlen",
    marks=pytest.mark.skipif(
        not torch.cuda.is_available() or attention._varlen_unavailable_reason(GPU, None) is not None, reason="no varlen kernel"
    ),
)
BACKENDS = ["sdpa", "eager", FLASH, VARLEN]


@pytest.fixture
def samples(bundled):
    """A GPU has time for long ones."""
    return bundled


def gpu_model(config, backend: str):
    torch.manual_seed(config.seed)
    model = load_nf4_model(config.model, config, attention.Attention(backend, "").loaded_as, GPU)
    model = add_lora(model, config, audit_targets(model, config), config.model).train()
    model.load_state_dict({n: p for n, p in adapted_model(config).named_parameters() if "lora_" in n}, strict=False)
    wake_adapters(model)
    return model


def run_layers(model, config, policy: str, compile: str) -> None:
    torch._dynamo.reset()
    settings: dict = {"gradient_checkpointing": policy, "compile": compile}
    model.accelerated = accelerate(model, dataclasses.replace(config, **settings))


ROWS = [[0, 2], [1], [3, 4, 5]]  # of the samples: two side by side, one alone, and three


@pytest.mark.parametrize(
    ("packing", "window", "policy", "compile", "backend"),
    [
        *((False, None, "none", "none", backend) for backend in ("sdpa", "eager")),
        *((True, None, "selective", "none", backend) for backend in ("sdpa", "eager")),
        *((True, 64, "none", "graphs", backend) for backend in ("sdpa", "eager")),
        (False, None, "full", "graphs", "sdpa"),
        (True, 64, "full", "layers", "sdpa"),
        *(pytest.param(*how, kernel.values[0], marks=kernel.marks)
          for kernel in (FLASH, VARLEN)
          for how in ((False, None, "none", "none"), (True, 64, "selective", "none"), (True, 64, "full", "layers"),
                      (True, 64, "none", "graphs"))),
    ],
)  # fmt: skip
def test_gradients_are_those_of_an_fp32_model_on_the_cpu(config, samples, backend, packing, window, policy, compile):
    """Of padded rows, with transformers' own masks: samples have 145 to 228 tokens, a window of 64 is active in each."""
    cpu = adapted_model(config)
    wake_adapters(cpu)
    twin = fp32_twin(cpu, config)
    twin.config.sliding_window = window
    loss, expected = adapter_gradients(twin, collate(samples[:6]), read_head(twin), autocast=False)
    model = gpu_model(config, backend)
    model.config.sliding_window = window
    head = read_head(model)
    config = dataclasses.replace(config, per_device_train_batch_size=len(ROWS) if packing else 6, compile=compile)
    run_layers(model, config, policy, compile)
    moved = next(iter_batches(samples, ROWS if packing else range(6), 6, multiple=config.length_multiple)).to(GPU)
    trained = dataclasses.replace(config, attn_implementation=backend)
    with attention.for_training(model, trained), torch.autocast("cuda", torch.bfloat16):
        assert (model.config._attn_implementation, model.config.sliding_window) == (f"training_{backend}", window)
        for _ in range(2 if compile == "graphs" else 1):  # the second is recorded
            model.zero_grad()
            inputs = attention.decoder_inputs(moved, model.config)
            hidden = decoder_of(model)(**inputs, use_cache=False).last_hidden_state
            ours = token_loss_sum(hidden, moved, head) / moved.num_tokens
            ours.backward()
    found = {name: gradient.cpu() for name, gradient in gradients(model).items()}
    assert ours.item() == pytest.approx(loss, rel=0.01)
    assert relative_error(found, expected) < 0.1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("packing", "compile"), [(False, "none"), (True, "graphs")])
def test_a_step_waits_for_the_device_nowhere(config, samples, backend, packing, compile):
    model = gpu_model(config, backend)
    run_layers(model, config, "full", compile)
    loss_sum = functools.partial(token_loss_sum, head=read_head(model))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, fused=True)
    changed = dataclasses.replace(config, compile=compile, per_device_train_batch_size=2)
    micro_batches = list(training_batches(samples, [*ROWS, [6]] if packing else range(4), changed, pin=True))
    assert micro_batches[0].input_ids.is_pinned() and (not packing or micro_batches[0].cu_seqlens.is_pinned())
    trained = dataclasses.replace(config, attn_implementation=backend)
    with attention.for_training(model, trained), warnings.catch_warnings(record=True) as waits:
        step = functools.partial(train_step, decoder_of(model), optimizer, micro_batches, loss_sum, 1e-3, 1.0)
        step()
        step()  # the second records
        warnings.simplefilter("always")
        waits.clear()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            loss, norm = step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [f"{wait.filename}:{wait.lineno}" for wait in waits if "called a synchronizing" in str(wait.message)]
    assert waits == []
    assert torch.isfinite(loss) and torch.isfinite(norm) and loss.device == GPU


@pytest.mark.parametrize(
    ("backend", "packing", "dropout"),
    [("sdpa", False, 0.0), ("sdpa", True, 0.0), ("sdpa", False, 0.3),
     pytest.param("flash_attention_2", True, 0.0, marks=FLASH.marks), pytest.param("varlen", True, 0.0, marks=VARLEN.marks)],
)  # fmt: skip
def test_graphs_give_the_bits_of_the_layers_they_record(config, samples, backend, packing, dropout):
    """Steps of several shapes, one of them new in the middle of a step, a last batch filled up, and gradients that were set
    to None, zeroed or replaced in between. Flash's backward adds in no fixed order, so that only losses are near."""
    config = dataclasses.replace(config, attn_implementation=backend, packing=packing, lora_dropout=dropout)
    rows = [[[0, 2], [1]], [[3, 4, 5], [6]], [[7], [8]], [[9, 10]]] if packing else [[0, 1], [16, 17], [2, 3], [5]]
    recorded = dataclasses.replace(config, compile="graphs", per_device_train_batch_size=2)
    found: list[list] = [[], []]
    shapes = set()
    for run, compile in zip(found, ("layers", "graphs"), strict=True):
        model = gpu_model(config, backend)
        run_layers(model, config, "selective", compile)
        loss_sum = functools.partial(token_loss_sum, head=read_head(model))
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)
        with attention.for_training(model.train(), config):
            for number in range(4):
                order = [*rows[number:-1], *rows[:number], rows[-1]]
                batches = [
                    next(training_batches(samples, two, recorded, epoch=number, first=at)) for at, two in enumerate(order)
                ]
                shapes |= {batch.input_ids.shape for batch in batches}
                loss, norm = train_step(decoder_of(model), optimizer, batches, loss_sum, 1e-3, 1.0)
                run.append([loss.clone(), norm.clone(), *(p.detach().clone() for p in parameters)])
                if number == 1:
                    optimizer.zero_grad(set_to_none=False)
                if number == 2:
                    parameters[0].grad = parameters[0].grad.clone()
    assert len(decoder_of(model).graphs.recordings) == len(shapes) > packing  # padded to 128, all are alike
    losses = [[float(step[0]) for step in run] for run in found]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2) and len(set(losses[0])) == 4
    if backend == "sdpa":
        assert all(torch.equal(x, y) for one, other in zip(*found, strict=True) for x, y in zip(one, other, strict=True))


def test_each_replay_of_a_graph_draws_dropout_of_its_own(config, samples):
    """The same batch at rate 0: run once, recorded and replayed, and replayed again; one seed gives one mask."""
    config = dataclasses.replace(config, attn_implementation="sdpa", lora_dropout=0.3)
    model = gpu_model(config, "sdpa")
    run_layers(model, config, "selective", "graphs")
    loss_sum = functools.partial(token_loss_sum, head=read_head(model))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    (batch,) = iter_batches(samples, [0, 1], 2, multiple=128)
    with attention.for_training(model.train(), config):
        losses = [
            train_step(decoder_of(model), optimizer, [batch._replace(seed=seed)], loss_sum, 0.0, None)[0].item()
            for seed in (1, 2, 3, 2)
        ]
    assert len(decoder_of(model).graphs.recordings) == 1 and len(set(losses)) == 3 and losses[1] == losses[3]


def short_samples(count: int, length: int) -> list[TokenizedExample]:
    """Samples of random ids, all of which are trained."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 300, (count, length), generator=generator).tolist()
    return [TokenizedExample(row, row, line) for line, row in enumerate(ids)]


@pytest.mark.parametrize("backend", ["sdpa", FLASH, VARLEN])
def test_graphs_of_rows_with_any_number_of_samples_compile_nothing_while_capturing(config, backend):
    """The ends of 128, 256 and 384 samples in rows of several lengths: each is a recording, none is a compilation."""
    config = dataclasses.replace(config, attn_implementation=backend, packing=True, lora_dropout=0.0)
    recorded = dataclasses.replace(config, compile="graphs", per_device_train_batch_size=2)
    short, long = short_samples(400, 3), short_samples(8, 200)
    packed = [  # rows of a micro-batch
        [short[:40], long[:2]],  # 128 ends, 512 positions
        [short[:150], short[150:200]],  # 256 ends, 512 positions
        [short[:160], short[160:320]],  # 384 ends, 512 positions
        [short[:40] + long[:1], long[:3]],  # 128 ends, 640 positions
        [short[:200], short[200:390]],  # 512 ends, 640 positions
    ]
    batches = [collate_packed(rows, recorded.length_multiple, least=2) for rows in packed]
    assert {len(batch.cu_seqlens) for batch in batches} >= {128, 256, 384}
    found: list[list] = [[], []]
    for run, compile in zip(found, ("layers", "graphs"), strict=True):
        model = gpu_model(config, backend)
        run_layers(model, config, "none", compile)
        loss_sum = functools.partial(token_loss_sum, head=read_head(model))
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)
        with attention.for_training(model.train(), config):
            for micro_batches in (batches[:1], batches[1:3], batches[3:], batches[::-1], batches):
                loss, norm = train_step(decoder_of(model), optimizer, micro_batches, loss_sum, 1e-3, 1.0)
                run.append([loss.clone(), norm.clone(), *(p.detach().clone() for p in parameters)])
    assert len(decoder_of(model).graphs.recordings) == len(batches)
    losses = [[float(step[0]) for step in run] for run in found]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2) and len(set(losses[0])) >= 4
    if backend == "sdpa":
        assert all(torch.equal(x, y) for one, other in zip(*found, strict=True) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("size", [1, 8, 1001, 2**22 * 8 + 5])
def test_a_checksum_is_the_same_on_any_device(size):
    data = torch.randint(0, 256, (size,), dtype=torch.uint8)  # [size]
    assert checksum(data.to(GPU)).item() == checksum(data).item()
    data[size // 2] ^= 1
    assert checksum(data.to(GPU)).item() == checksum(data).item()


def test_the_fingerprint_on_a_gpu_knows_each_weight(config):
    model = gpu_model(config, "sdpa")
    before = fingerprint(model)
    assert fingerprint(gpu_model(config, "sdpa")) == before
    for tensor in (model.get_decoder().layers[1].mlp.down_proj.base_layer.weight.data, model.get_decoder().norm.weight.data):
        kept = tensor.clone()
        tensor.view(-1)[-1] += 1
        assert fingerprint(model) != before
        tensor.copy_(kept)
    wake_adapters(model, scale=2.0)
    assert fingerprint(model) == before


def test_a_later_shape_needs_no_memory_beside_the_pool(config):
    """Longest first, as the probe has it: shorter shapes, recorded or not, reuse what the first graph holds."""
    config = dataclasses.replace(config, attn_implementation="sdpa", lora_dropout=0.1)
    model = gpu_model(config, "sdpa")
    run_layers(model, config, "none", "graphs")
    loss_sum = functools.partial(token_loss_sum, head=read_head(model))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    reserved = []
    with attention.for_training(model.train(), config):
        for length in (2048, 1920, 1792, 1664):
            micro_batches = [collate(short_samples(16, length))]
            for _ in range(2):  # the first launches its kernels one by one, the second records
                train_step(decoder_of(model), optimizer, micro_batches, loss_sum, 0.0, None)
                torch.cuda.empty_cache()
                reserved.append(torch.cuda.memory_reserved() / 1e6)
    assert len(decoder_of(model).graphs.recordings) == 4
    reserved = reserved[1:]
    growth = [later - reserved[0] for later in reserved[1:]]
    assert max(growth) < 0.1 * reserved[0], reserved


def test_two_forwards_before_a_backward_and_a_second_backward_are_errors(config, samples):
    config = dataclasses.replace(config, attn_implementation="sdpa")
    model = gpu_model(config, "sdpa")
    run_layers(model, config, "none", "graphs")
    head, batch = read_head(model), collate(samples[:2], multiple=128).to(GPU)
    with attention.for_training(model.train(), config), torch.autocast("cuda", torch.bfloat16):
        one, other = (
            token_loss_sum(decoder_of(model)(input_ids=batch.input_ids, use_cache=False).last_hidden_state, batch, head)
            for _ in range(2)
        )
        with pytest.raises(RuntimeError, match="A later forward pass"):
            one.backward()
        other.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="has had its backward pass"):
            other.backward()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model).values())


@pytest.mark.parametrize("family", ["phi3", "seed_oss"])
def test_dropout_of_attention_and_of_adapters_is_drawn_again_as_it_was(config, samples, tmp_path, monkeypatch, family):
    """sdpa's own kernel with dropout: what selective keeps of it must not leave the generator behind."""
    if family == "seed_oss":  # dropout of attention and of the residual stream by default
        sizes = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32}
        seed_oss = transformers.SeedOssConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, pad_token_id=0)
        assert seed_oss.attention_dropout == seed_oss.residual_dropout == 0.1
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(seed_oss, dtype=torch.bfloat16).save_pretrained(tmp_path)
        config = dataclasses.replace(config, model=str(tmp_path))
    config = dataclasses.replace(config, attn_implementation="sdpa", lora_dropout=0.1)
    batch, found = collate(samples[:4]).to(GPU), {}
    for policy in ("none", "selective", "full", "kept"):
        if policy == "kept":  # as it was: the kernel's output is kept although it draws
            monkeypatch.setattr(layers, "_draws", lambda *_: False)
        torch.manual_seed(config.seed)
        model = load_nf4_model(config.model, config, "sdpa", GPU)
        model = add_lora(model, config, audit_targets(model, config), config.model).train()
        wake_adapters(model)
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.1
        run_layers(model, config, "selective" if policy == "kept" else policy, "none")
        head = read_head(model)
        torch.manual_seed(5)
        with attention.for_training(model.train(), config), torch.autocast("cuda", torch.bfloat16):
            hidden = decoder_of(model)(**attention.decoder_inputs(batch, model.config), use_cache=False).last_hidden_state
            loss = token_loss_sum(hidden, batch, head)
            loss.backward()
        found[policy] = (loss.item(), gradients(model))
    for policy in ("selective", "full"):
        assert found[policy][0] == found["none"][0]
        assert relative_error(found[policy][1], found["none"][1]) < 0.01  # sums vary in their order
    assert found["kept"][0] == found["none"][0] and relative_error(found["kept"][1], found["none"][1]) > 0.1


def test_a_model_with_dropout_of_its_own_trains_and_goes_on_without_compilation(tiny, tmp_path, capsys):
    shutil.copytree(tiny, tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**settings, "attention_dropout": 0.1}))
    flags = ["--model", str(tmp_path / "model"), "--deterministic", "--save-steps", "1", "--output-dir"]
    assert command_line([*flags, str(tmp_path / "one"), "--max-steps", "4"]) == 0
    assert "its layers have dropout of their own (0.1)" in capsys.readouterr().out
    assert command_line([*flags, str(tmp_path / "two"), "--max-steps", "2"]) == 0
    assert command_line([*flags, str(tmp_path / "two"), "--max-steps", "4", "--override", "max_steps"]) == 0
    one, two = ((tmp_path / name / "adapter" / checkpoint.ADAPTER).read_bytes() for name in ("one", "two"))
    assert one == two


def test_running_out_of_memory_in_the_answers_leaves_a_complete_run(tiny, tmp_path, capsys, monkeypatch):
    """Graphs and optimizer state are gone by then; generation itself is given no room."""
    held = []

    def cramped(model, *arguments):
        pools = {part["segment_pool_id"] for part in torch.cuda.memory_snapshot()}
        held.append((torch.cuda.memory_reserved(), pools == {(0, 0)}))
        torch.cuda.set_per_process_memory_fraction(held[0][0] / torch.cuda.get_device_properties(GPU).total_memory)
        return torch.empty(2**33, dtype=torch.uint8, device=GPU)  # a KV cache that does not fit

    monkeypatch.setattr(generate, "_answer", cramped)
    flags = ["--model", "tiny-random", "--compile", "graphs", "--max-steps", "2", "--output-dir", str(tmp_path / "run")]
    try:
        assert command_line(flags) == 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    out = capsys.readouterr().out
    assert "Warning: no sample answers were generated: memory ran out (CUDA out of memory." in out
    assert "replayed as CUDA graphs" in out and held[0][1] and (tmp_path / "run" / "finished.json").exists()
    assert command_line(flags) == 0 and "it is complete" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kernel_of_dequantization_gives_bitsandbytes_own_bits(config, dtype):
    model = load_nf4_model(config.model, config, "sdpa", GPU)
    quantized = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    for layer in quantized:
        state = copy.copy(layer.weight.quant_state)
        state.dtype = dtype
        theirs = bitsandbytes.functional.dequantize_4bit(layer.weight.data, state)  # [N, K]
        ours = nf4.dequantized(nf4.frozen_weight(layer), layer.out_features, dtype)  # [N, K]
        assert torch.equal(ours, theirs)
    assert len(quantized) == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kernel_of_the_loss_is_torch_s_own_cross_entropy(dtype):
    from qlora.model.cross_entropy import cross_entropy_

    logits = (8 * torch.randn(37, 32064, device=GPU)).to(dtype).requires_grad_()  # [C, V]
    targets = torch.randint(32064, (37,), device=GPU)  # [C]
    expected = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")  # [C]
    expected.sum().backward()
    ours = logits.detach().clone()  # [C, V]
    losses = cross_entropy_(ours, targets)  # [C]
    assert torch.allclose(losses, expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(ours, logits.grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-7)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_the_command_line_trains_on_the_gpu(tiny, tmp_path, capsys, backend):
    flags = ["--model", "tiny-random", "--lora-r", "4", "--learning-rate", "1e-2", "--num-train-epochs", "3"]
    flags += ["--packing", "--max-length", "300"] if backend == "auto" else ["--compile", "graphs"]
    assert command_line([*flags, "--attn-implementation", backend, "--output-dir", str(tmp_path / "run")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"] - 0.2
    assert 0 < rows[-2]["peak_memory_gb"] < 1
    out = capsys.readouterr().out
    how = "compiled, replayed as CUDA graphs (as asked)"
    how = "as written (compiling takes about 15 s and would save 0 s)" if backend == "auto" else how
    assert f"Layers: {how}; gradient checkpointing: none (the fastest that fits: 0." in out
    assert "Memory: the longest batch peaks at 0." in out
    chosen = attention.choose_attention(TrainConfig(packing=True), GPU).implementation if backend == "auto" else backend
    assert f"Attention: {chosen} (" in out


FLASH_PACKED = pytest.param("flash_attention_2", True, marks=FLASH.marks)
VARLEN_PACKED = pytest.param("varlen", True, marks=VARLEN.marks)


@pytest.mark.parametrize(("backend", "packing"), [("sdpa", False), ("eager", False), FLASH_PACKED, VARLEN_PACKED])
def test_a_killed_run_goes_on_bit_for_bit_with_the_deterministic_flag(tiny, tmp_path, backend, packing):
    """Each in a process of its own, as CUBLAS_WORKSPACE_CONFIG is read when CUDA starts."""
    flags = f"--model tiny-random --lora-r 4 --max-steps 9 --save-steps 1 --deterministic --attn-implementation {backend}"
    flags += " --compile graphs --lora-dropout 0.1"
    flags += " --packing --max-length 500" if packing else ""  # 3 steps an epoch
    command = [sys.executable, str(ROOT / "train_loop.py"), *flags.split(), "--learning-rate", "1e-2", "--output-dir"]
    straight = subprocess.Popen([*command, str(tmp_path / "straight")])  # both at once: compiling takes most of their time
    process = subprocess.Popen([*command, str(tmp_path / "killed")])
    while not (tmp_path / "killed" / "checkpoints" / "step-000004").exists() and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL and straight.wait() == 0
    done = subprocess.run([*command, str(tmp_path / "killed")], check=True, capture_output=True, text=True)
    assert "It resumes bit for bit as if it had not stopped." in done.stdout
    last = "checkpoints/step-000009"
    assert tensors(tmp_path / "killed" / last) == tensors(tmp_path / "straight" / last)
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "straight")


@pytest.mark.parametrize("backend", ["sdpa", VARLEN])
def test_a_killed_run_of_many_short_packed_samples_goes_on_bit_for_bit(tiny, tmp_path, backend):
    """Micro-batches with the ends of 128 and of 256 samples, of several lengths; dropout 0.1 as by default."""
    rows = [{"prompt": f"q{number}", "completion": "a" * (1 + number % 5)} for number in range(700)]
    rows += [{"prompt": f"long {number}", "completion": "b" * 1500} for number in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = f"--model tiny-random --lora-r 4 --max-steps 9 --save-steps 1 --deterministic --attn-implementation {backend}"
    flags += f" --compile graphs --packing --max-length 4096 --train-file {tmp_path / 'rows.jsonl'} --learning-rate 1e-2"
    command = [sys.executable, str(ROOT / "train_loop.py"), *flags.split(), "--output-dir"]
    straight = subprocess.Popen([*command, str(tmp_path / "straight")])
    process = subprocess.Popen([*command, str(tmp_path / "killed")])
    while not (tmp_path / "killed" / "checkpoints" / "step-000004").exists() and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL and straight.wait() == 0
    done = subprocess.run([*command, str(tmp_path / "killed")], check=True, capture_output=True, text=True)
    assert "It resumes bit for bit as if it had not stopped." in done.stdout
    last = "checkpoints/step-000009"
    assert tensors(tmp_path / "killed" / last) == tensors(tmp_path / "straight" / last)
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "straight")


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_8_bit_moments_come_back_where_they_lay_and_go_on_bit_for_bit(config, tmp_path, name):
    """In managed memory where they are paged: tensors of 100,000 elements and more are. Gradients are made up."""
    config = dataclasses.replace(config, lora_r=256, optimizer=name)
    model = gpu_model(config, "sdpa")
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step(optimizer, seed):
        generator = torch.Generator(GPU).manual_seed(seed)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator, device=GPU)
        optimizer.param_groups[0]["lr"] = 1e-3
        optimizer.step()

    def state(optimizer):
        values = {(i, kind): value for i, p in enumerate(parameters) for kind, value in optimizer.state[p].items()}
        paged = {key for key, value in values.items() if getattr(value, "is_paged", False)}
        return {key: torch.as_tensor(value).cpu().clone() for key, value in values.items()}, paged

    optimizer = build_optimizer(dict(enumerate(parameters)), config)
    step(optimizer, 1)
    folder = save_checkpoint(tmp_path, model, optimizer, checkpoint.TrainState(step=1), RUN_INFO)
    saved, paged = state(optimizer)
    assert bool(paged) == (name == "paged_adamw_8bit") and {kind for _, kind in paged} <= {"state1", "state2"}
    step(optimizer, 2)
    weights, (moments, _) = [p.detach().clone() for p in parameters], state(optimizer)
    again = build_optimizer(dict(enumerate(parameters)), config)
    checkpoint.restore(folder, model, again)
    restored, where = state(again)
    assert where == paged and all(torch.equal(value, restored[key]) for key, value in saved.items())
    step(again, 2)
    assert all(torch.equal(p, weight) for p, weight in zip(parameters, weights, strict=True))
    assert all(torch.equal(value, moments[key]) for key, value in state(again)[0].items())


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_a_run_with_8_bit_moments_learns_on_the_gpu(tiny, tmp_path, name):
    """Through the probe, which steps with another optimizer of its kind."""
    flags = ["--model", "tiny-random", "--lora-r", "256", "--learning-rate", "2e-3", "--max-steps", "18"]
    assert command_line([*flags, "--optimizer", name, "--output-dir", str(tmp_path / "run")]) == 0
    evaluations = [row["eval_loss"] for row in metrics(tmp_path / "run") if row["event"] == "eval"]
    assert evaluations[-1] < evaluations[0] - 0.2


def test_without_that_flag_the_state_comes_back_and_the_log_says_what_to_expect(tiny, tmp_path, capsys):
    flags = ["--model", "tiny-random", "--lora-r", "4", "--max-steps", "4", "--attn-implementation", "sdpa", "--output-dir"]
    assert command_line([*flags, str(tmp_path / "run")]) == 0
    more = ["--max-steps", "6", "--override", "max_steps"]
    assert command_line([*flags, str(tmp_path / "run"), *more]) == 0
    assert "later losses are only close: without --deterministic a GPU's sums vary." in capsys.readouterr().out


def test_out_of_gpu_memory_is_exit_6(tiny, tmp_path, capsys):
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(60e6 / torch.cuda.get_device_properties(GPU).total_memory)
    try:
        flags = [
            "--model",
            "tiny-random",
            "--per-device-train-batch-size",
            "22",
            "--attn-implementation",
            "eager",
            "--output-dir",
        ]
        assert command_line([*flags, str(tmp_path / "run")]) == ExitCode.MEMORY
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    err = capsys.readouterr().err
    assert "The GPU ran out of memory: the peak so far was" in err and "--attn-implementation sdpa" in err
    assert not (tmp_path / "run" / "checkpoints").exists()  # it was found out by the probe


# -- before and after training ---------------------------------------------------------------------------------------


def test_the_doctor_finds_the_gpu_and_tries_it():
    rows = {row.check: row for row in doctor.examine()}
    assert doctor.verdict(list(rows.values())) is None and rows["GPU 0 (used by runs)"].ok and rows["bf16"].ok
    assert "on the GPU" in rows["NF4 forward and backward"].detail and "Triton" in rows["NF4 dequantized"].detail
    assert all(rows[name].ok for name in ("compiled layers", "CUDA graphs", "attention sdpa"))


def test_merging_on_the_gpu_is_closest_into_the_dequantized_base(config, tokenizer, samples, tmp_path):
    model = gpu_model(config, "sdpa")
    write_folder(tmp_path / "adapter", dict(checkpoint.adapter_files(model, tokenizer)))
    adapter = open_adapter(tmp_path / "adapter", prompt_format="plain", device="cuda")
    found = merge.measured(adapter, ["bf16", "dequantized"], samples)
    assert found["unmerged"].kl == 0 and found["dequantized"].kl < found["bf16"].kl < found["base"].kl
    merge.save(merge.merged_model(adapter, "dequantized"), adapter, tmp_path / "merged", {}, None)
    assert verify(tmp_path / "merged") is None


def test_a_run_is_evaluated_and_answers_on_the_gpu(tiny, tmp_path, capsys):
    """The eval loss that evaluate finds is the one that training told, in NF4; int8 is near."""
    flags = ["--model", "tiny-random", "--lora-r", "4", "--learning-rate", "1e-2", "--max-steps", "12"]
    assert command_line([*flags, "--attn-implementation", "sdpa", "--output-dir", str(tmp_path / "run")]) == 0
    trained = [row["eval_loss"] for row in metrics(tmp_path / "run") if row["event"] == "eval"]
    for more, within in (([], 1e-3), (["--int8"], 0.05)):
        out = tmp_path / "evaluation.json"
        command = ["evaluate", str(tmp_path / "run"), "--max-new-tokens", "8", "--json", str(out), *more]
        assert any_command([*command]) == 0
        loss = json.loads(out.read_text())["metrics"]["loss"]
        assert loss["base"]["value"] == pytest.approx(trained[0], rel=within)
        assert loss["adapter"]["value"] == pytest.approx(trained[-1], rel=within)
    capsys.readouterr()
    assert any_command(["generate", str(tmp_path / "run"), "--prompt", "Create", "--max-new-tokens", "8", "--compare"]) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("sampling", [None, generate.Sampling(0.9, top_p=0.8, top_k=20)])
def test_answers_by_a_recorded_forward_are_transformers_own(config, tokenizer, template, monkeypatch, sampling):
    """In fp32, so that no tie turns: in one batch, and in batches that share a recording."""
    model = to_fp32(gpu_model(config, "sdpa"))
    wake_adapters(model, scale=0.5)
    assert decode.decode_unavailable_reason(model) is None
    prompts = [tokenizer(text).input_ids for text in ("Create an AVRO schema for it", "a", '"name": "id"', "Create", "an AVRO")]
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(graph) or replay(graph))
    answers = []
    for reason in ("not now", None):
        monkeypatch.setattr(generate, "decode_unavailable_reason", lambda _, reason=reason: reason)
        torch.manual_seed(7)
        answers.append(generate.generate(model, prompts, template, 12, sampling))
        answers[-1] += generate.generate_all(model, prompts, template, 12, 2)
        assert len(set(replays)) == (0 if reason else 2)
    assert answers[0] == answers[1] and len(set(answers[0])) >= 5


def test_base_and_adapter_answer_in_one_recorded_batch(config, template, examples, monkeypatch):
    model = gpu_model(config, "sdpa")
    monkeypatch.setattr(generate, "MAX_SAMPLE_TOKENS", 2)  # later a tie may turn, in bf16
    answers = []
    for reason in ("not now", None):
        monkeypatch.setattr(generate, "decode_unavailable_reason", lambda _, reason=reason: reason)
        answers.append(generate.sample_responses(model, examples[:3], template))
    assert answers[0] == answers[1] and any(sample.base != sample.tuned for sample in answers[0])


def test_plan_knows_the_memory_of_this_gpu(capsys):
    assert any_command(["plan"]) == 0
    told = capsys.readouterr().out
    assert torch.cuda.get_device_name() in told and "It fits with --gradient-checkpointing" in told


# -- other families, bases and precisions ------------------------------------------------------------------------------

AT_FULL_SPEED = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3Text", "SmolLM3", "Granite", "Olmo2", "Olmo3",
                 "Glm4", "Ministral", "Cohere2", "StableLm", "Starcoder2")  # fmt: skip


@pytest.mark.parametrize(("policy", "packing"), [("none", False), ("none", True), ("full", False)])
@pytest.mark.parametrize("family", AT_FULL_SPEED)
def test_other_families_are_compiled_and_recorded(tiny, tmp_path, family, policy, packing):
    """Against plain transformers and PEFT. Rows are longer than the windows of 16, so that layers with one differ."""
    families.write_model(family, tmp_path)
    draw = random.Random(0)
    rows = [[draw.randrange(3, 384) for _ in range(length)] for length in families.LENGTHS]
    examples = [TokenizedExample(ids, ids, line) for line, ids in enumerate(rows, 1)]
    settings: dict = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "max_length": 128, "packing": packing}
    torch._dynamo.reset()
    config = TrainConfig(model=str(tmp_path), **settings, compile="graphs", gradient_checkpointing=policy)
    config, trainee = build(config)
    families.wake(trainee.model)
    names = sorted({name.split(".")[-4] for name, _ in trainee.model.named_parameters() if "lora_A" in name})
    loss, expected = families.reference(tmp_path, names, rows)
    batch = collate_packed([examples[:2], examples[2:]], 128) if packing else collate(examples, 128)
    with attention.for_training(trainee.model.train(), config):
        for step in range(4):  # the first compiles, the second is recorded, the last two are replayed
            ours, _ = train_step(trainee.decoder, trainee.optimizer, [batch], trainee.loss_sum, 0.0, None)
            assert ours.item() == pytest.approx(loss, rel=2e-3)
            found = {name: gradient.cpu() for name, gradient in gradients(trainee.model).items()}
            assert relative_error(found, expected) < 0.1, step
    assert len(trainee.decoder.graphs.recordings) == 1


@pytest.mark.parametrize("compile", ["none", "graphs"])
@pytest.mark.parametrize("quantization", ["fp4", "none", "int8"])
def test_gradients_on_other_bases_are_those_of_the_cpu(config, samples, quantization, compile):
    if (quantization, compile) == ("int8", "graphs"):
        pytest.skip("layers in 8 bits are never compiled")
    config = dataclasses.replace(config, quantization=quantization, lora_dropout=0.0, attn_implementation="sdpa")
    found = []
    for device in (torch.device("cpu"), GPU):
        torch.manual_seed(config.seed)
        model = load_nf4_model(config.model, config, "sdpa", device)
        model = add_lora(model, config, audit_targets(load_meta_model(config.model, config), config), config.model).train()
        families.wake(model)
        if device == GPU:
            run_layers(model, config, "none", compile)
        head = read_head(model)
        batch = next(iter_batches(samples, range(4), 4, multiple=128)).to(device)
        with attention.for_training(model, config):
            for _ in range(3 if device == GPU else 1):
                model.zero_grad()
                with torch.autocast(device.type, torch.bfloat16):
                    inputs = attention.decoder_inputs(batch, model.config)
                    hidden = decoder_of(model)(**inputs, use_cache=False).last_hidden_state
                    loss = token_loss_sum(hidden, batch, head) / batch.num_tokens
                loss.backward()
        found.append((loss.item(), {name: each.cpu() for name, each in gradients(model).items()}))
    assert found[0][0] == pytest.approx(found[1][0], rel=5e-3)
    assert relative_error(found[1][1], found[0][1]) < (0.3 if quantization == "int8" else 0.1)  # int8 rounds activations


@pytest.mark.parametrize("compile", ["none", "graphs"])
def test_a_run_in_fp16_learns_as_one_in_bf16(tiny, tmp_path, compile):
    losses = {}
    for precision in ("bf16", "fp16"):
        folder = tmp_path / precision
        flags = ["--model", "tiny-random", "--precision", precision, "--compile", compile, "--max-steps", "12"]
        assert command_line([*flags, "--learning-rate", "1e-2", "--lora-dropout", "0", "--output-dir", str(folder)]) == 0
        rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        losses[precision] = [row["loss"] for row in rows if row["event"] == "step"]
    assert losses["fp16"][-1] < losses["fp16"][0] and losses["fp16"] == pytest.approx(losses["bf16"], rel=0.05)


PEFT_FILES = {
    "DoRA": {"use_dora": True, "r": 4, "lora_alpha": 8},
    "IA3": {"peft_type": "IA3", "target_modules": ["qkv_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "prompt tuning": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 5},
    "P-tuning": {"peft_type": "P_TUNING", "num_virtual_tokens": 5, "encoder_hidden_size": 16},
    "prefix tuning": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 5},
    "whole": {"r": 4, "lora_alpha": 8, "modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    "rows": {"r": 4, "lora_alpha": 8, "trainable_token_indices": {"embed_tokens": [5, 6], "lm_head": [6]}},
}


@pytest.mark.parametrize("name", PEFT_FILES)
def test_methods_of_peft_learn_on_the_gpu_as_on_the_cpu(tiny, tmp_path, monkeypatch, name):
    (tmp_path / "peft.json").write_text(json.dumps(PEFT_FILES[name]))
    flags = ["--model", "tiny-random", "--peft-config", str(tmp_path / "peft.json"), *SHORT_DATA]
    flags += ["--max-steps", "4", "--learning-rate", "1e-2", "--max-length", "300"]
    losses = []
    for device in ("cuda", "cpu"):
        run = tmp_path / device
        with monkeypatch.context() as patch:
            if device == "cpu":
                patch.setattr(torch.cuda, "is_available", lambda: False)
            assert command_line([*flags, "--output-dir", str(run)]) == 0
        rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        losses.append([row["eval_loss"] for row in rows if row["event"] == "eval"])
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    run = str(tmp_path / "cuda")
    assert any_command(["evaluate", run, *SHORT_DATA[2:], "--max-new-tokens", "2"]) == 0
    assert any_command(["generate", run, "--prompt", "say one", "--max-new-tokens", "2"]) == 0
