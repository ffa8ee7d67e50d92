"""What layers keep and compute again: every policy, compiled or not, against the model as transformers and PEFT run it."""

import collections
import dataclasses
import functools
import gc
import math
import re
import shutil
import weakref
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch._dynamo.utils
import torch._inductor.config
import transformers
from torch._dynamo.exc import TorchDynamoException
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora.config import TrainConfig
from qlora.data.batch import collate_packed, iter_batches, training_batches
from qlora.data.template import TokenizedExample
from qlora.errors import ExitCode, UserError
from qlora.eval.loss import evaluate_loss
from qlora.model import attention
from qlora.model.load import load_meta_model
from qlora.model.loss import read_head, token_loss_sum
from qlora.model.targets import audit_targets
from qlora.model.third_party import Linear4bit
from qlora.speed import layers, lora_linear
from qlora.speed.accelerate import AcceleratedDecoder, accelerate
from tests.helpers import CPU, adapted_model, decoder_of, gradients, prepared, relative_error, wake_adapters
from train_loop import train_step

POLICIES = ("none", "selective", "full")
GPU = torch.device("cuda", 0)
OLD_GPU = torch.device("cuda", 1)


def step(model, config, micro_batches, dropout_seed: int = 0) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss, norm and gradients of one train_step at rate 0, as the loop takes it; the first micro-batch has `dropout_seed`."""
    loss_sum = functools.partial(token_loss_sum, head=read_head(model))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    micro_batches = [batch._replace(seed=seed) for seed, batch in enumerate(micro_batches, dropout_seed)]
    with attention.for_training(model.train(), config):
        loss, norm = train_step(decoder_of(model), optimizer, micro_batches, loss_sum, 0.0, None)
    return loss.item(), norm.item(), gradients(model)


def same(one, other) -> bool:
    return one[:2] == other[:2] and all(torch.equal(gradient, other[2][name]) for name, gradient in one[2].items())


@pytest.fixture(scope="module")
def awake(config):
    def build(**changes):
        changed = dataclasses.replace(config, attn_implementation="sdpa", **changes)
        model = adapted_model(changed)
        wake_adapters(model)
        return model, changed

    return build


@pytest.fixture(scope="module")
def micro_batches(samples):
    """Three micro-batches of different lengths. The last has a row of padding: alone, its sample would compile layers again."""
    return list(iter_batches(samples, range(5), 2, least=2))


class Observed(NamedTuple):
    """What a prepared model does in training."""

    taken: tuple[float, float, dict[str, torch.Tensor]]  # by `step`, of all micro-batches
    dequantized: dict[str, int]  # how often the weight of each kind of layer was, in a step of one micro-batch
    executed: collections.Counter  # how often such a step ran each operator
    kept: int  # bytes that its forward pass saved for backward, weights aside
    shapes: int  # of micro-batches that it has seen
    graphs: int  # that were compiled for them
    depth: int
    freed: bool  # once nothing refers to it


@pytest.fixture(scope="module")
def observed(awake, samples, micro_batches):
    """(policy, compile) -> what such a model does; each is compiled and observed once for all tests."""

    @functools.cache
    def observe(policy: str, compile: str) -> Observed:
        model, config = awake()
        prepared(model, config, policy, compile)
        torch._dynamo.utils.counters.clear()
        taken = step(model, config, micro_batches)
        names = {(m.out_features, m.in_features): m.name for m in model.modules() if isinstance(m, lora_linear.LoRALinear)}
        with pytest.MonkeyPatch.context() as patch:
            shapes = spy_on_dequantized(patch)
            step(model, config, micro_batches[:1])
        counts = {name: shapes.count(shape) for shape, name in names.items()}
        ran = executed(model, config, micro_batches[:1], compile)
        kept = kept_for_backward(model, config, micro_batches[0])
        # The last micro-batch of an epoch has rows of padding.
        steps = [list(training_batches(samples, rows, config)) for rows in ([0, 1], [2, 3], [4, 5], [6], [7, 8])]
        for one in steps:
            step(model, config, one)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        depth, layer = len(model.get_decoder().layers), weakref.ref(model.get_decoder().layers[0])
        del model
        torch._dynamo.reset()  # it holds what it has compiled
        gc.collect()
        shapes = {batch.input_ids.shape for (batch,) in steps}
        return Observed(taken, counts, ran, kept, len(shapes), graphs, depth, layer() is None)

    return observe


@pytest.mark.parametrize("compile", ["none", "layers"])
@pytest.mark.parametrize("policy", POLICIES)
def test_no_policy_changes_a_bit_and_peft_s_model_is_near(awake, micro_batches, counted, observed, policy, compile):
    model, config = awake()
    theirs = step(model, config, micro_batches)
    assert not counted  # PEFT's layers; ours dequantize by a function of their own
    plain, ours = observed("none", "none"), observed(policy, compile)
    assert same(ours.taken, plain.taken) and all(ours.dequantized.values())
    assert ours.taken[0] == pytest.approx(theirs[0], rel=1e-3) and relative_error(ours.taken[2], theirs[2]) < 0.02


@pytest.mark.parametrize("policy", ["selective", "full"])
def test_dropout_is_drawn_again_as_it_was(awake, micro_batches, policy):
    model, config = awake(lora_dropout=0.3)
    plain = step(prepared(model, config, "none"), config, micro_batches, dropout_seed=7)
    ours = step(prepared(awake(lora_dropout=0.3)[0], config, policy), config, micro_batches, dropout_seed=7)
    other = step(prepared(awake(lora_dropout=0.3)[0], config, policy), config, micro_batches, dropout_seed=8)
    assert same(ours, plain) and not same(other, plain)


@pytest.mark.parametrize("compile", ["none", "layers"])
def test_dropout_is_another_in_each_pass_and_in_each_layer(awake, micro_batches, compile):
    """Passes of one model over the same micro-batch, at rate 0; compiled, other policies draw what this one does."""
    micro_batches = 2 * micro_batches[:1]  # of one shape, which each model compiles once
    model, config = awake(lora_dropout=0.3)
    prepared(model, config, "none", compile)
    found = [step(model, config, micro_batches, dropout_seed=7)]
    drawn = torch.get_rng_state()  # [bytes]
    one, other, again = (step(model, config, micro_batches[:1], dropout_seed=seed) for seed in (7, 8, 7))
    assert one[0] != other[0] and same(one, again)
    passes = []
    for _ in range(2):
        with attention.for_training(model.train(), config), torch.autocast("cpu", torch.bfloat16):
            decoder_of(model)(input_ids=micro_batches[0].input_ids, use_cache=False)
        passes.append([module.seed for module in model.modules() if isinstance(module, lora_linear.LoRALinear)])
    if compile == "none":
        assert passes[0] == passes[1] == [None] * len(passes[0])  # torch's generator, which no layer begins again
    else:
        assert len({seed.item() for seeds in passes for seed in seeds}) == 2 * len(passes[0]) > 2
        torch.manual_seed(8)  # of the last micro-batch
        torch.randint(2**31 - 1, (len(passes[0]),), dtype=torch.int32)  # seeds of all layers, and nothing else
        assert torch.equal(drawn, torch.get_rng_state())
        for policy in ("selective", "full"):
            model = prepared(awake(lora_dropout=0.3)[0], config, policy, "layers")
            found.append(step(model, config, micro_batches, dropout_seed=7))
            assert torch.equal(drawn, torch.get_rng_state())
        assert same(found[0], found[1]) and same(found[0], found[2])
    assert found[0][0] != step(prepared(awake()[0], config, "none"), config, micro_batches)[0]


def spy_on_dequantized(patch) -> list[tuple[int, int]]:
    """Shapes of the weights that are dequantized from now on, in order."""
    shapes = []
    original = lora_linear.dequantized

    def spy(weight, outputs, dtype):
        shapes.append((outputs, 2 * weight[0].numel() // outputs))
        return original(weight, outputs, dtype)

    patch.setattr(lora_linear, "dequantized", spy)
    return shapes


@pytest.fixture
def counted(monkeypatch):
    return spy_on_dequantized(monkeypatch)


@pytest.mark.parametrize(
    ("policy", "compile", "again"),
    [("none", "none", ()), ("selective", "none", ("o_proj", "gate_up_proj")),
     ("full", "none", ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
     ("none", "layers", ()), ("selective", "layers", ("o_proj", "gate_up_proj")),
     ("full", "layers", ("qkv_proj", "o_proj", "gate_up_proj"))],
)  # fmt: skip
def test_what_is_multiplied_again_is_what_the_policy_says(observed, policy, compile, again):
    """Forward and backward of each layer, and what is computed again; compiled, the last product of a layer never is."""
    found = observed(policy, compile)
    expected = {name: found.depth * (2 + (name in again)) for name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")}
    if compile == "none" and policy == "selective":  # without a compiler a layer is followed to its last kept tensor
        expected["down_proj"] += found.depth
    assert found.dequantized == expected


class Counter(TorchDispatchMode):
    """How often each operator ran, by its name without the overload; what selective checkpoints give again did not."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.counts[operator.name().partition(".")[0]] += 1
        return operator(*args, **(kwargs or {}))


def executed(model, config, micro_batches, compile: str) -> collections.Counter:
    """How often a step ran each operator, once all is compiled."""
    if compile == "none":
        with Counter() as counter:
            step(model, config, micro_batches)
        return counter.counts
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(model, config, micro_batches)
    counts = collections.Counter({event.key: event.count for event in profile.key_averages()})
    counts["aten::mm"] -= counts["qlora::nf4_linear"] + 3 * counts["qlora::nf4_linear_backward"]  # within them
    return counts


@pytest.mark.parametrize(
    ("policy", "compile", "attends", "adapted", "reduced"),
    [("none", "none", 0, 0, 0), ("selective", "none", 0, 3, 0), ("full", "none", 1, 4, 4),
     ("none", "layers", 0, 0, 0), ("selective", "layers", 0, 2, 0), ("full", "layers", 1, 3, 4)],
)  # fmt: skip
def test_what_else_is_computed_again_is_what_the_policy_says(awake, micro_batches, observed, policy, compile, attends, adapted,
                                                             reduced):  # fmt: skip
    """In a decoder layer: attention, the operator of adapted layers, and the products by A, which are small and always kept
    but by full."""
    found = observed(policy, compile)
    model, config = awake()
    plain = executed(prepared(model, config, "none"), config, micro_batches[:1], compile)
    again = found.executed.copy()
    again.subtract(plain)
    depth = found.depth
    attention_of_a_cpu = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert plain[attention_of_a_cpu] >= depth and plain["aten::mm"] >= 8 * depth  # by A, forward and backward
    found = [again[name] for name in (attention_of_a_cpu, "qlora::nf4_linear", "aten::mm", "qlora::nf4_linear_backward")]
    assert found == [depth * attends, depth * adapted, depth * reduced, 0]


def kept_for_backward(model, config, micro_batch) -> int:
    """Bytes that a forward pass saves for its backward pass, but for weights."""
    frozen = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    frozen |= {t.untyped_storage().data_ptr() for m in model.modules() if hasattr(m, "frozen") for t in m.frozen}
    sizes: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        attention.for_training(model.train(), config),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        decoder_of(model)(input_ids=micro_batch.input_ids, use_cache=False)
    return sum(sizes.values())


@pytest.mark.parametrize("compile", ["none", "layers"])
def test_what_is_kept_falls_from_policy_to_policy(observed, compile):
    kept = [observed(policy, compile).kept for policy in POLICIES]
    if compile == "layers":  # without, what selective keeps is not in autograd's hands
        assert kept[1] < 0.75 * kept[0] and kept[2] < 0.5 * kept[1]
    assert kept[2] < kept[0] / 3


@pytest.mark.parametrize("policy", POLICIES)
def test_all_lengths_and_layers_share_one_compilation(observed, policy):
    assert observed(policy, "layers").shapes >= 4
    assert observed(policy, "layers").graphs == 1 and observed(policy, "none").graphs == 0


def test_packed_rows_share_one_compilation_whatever_their_longest_sample(awake, samples, monkeypatch):
    """Kernels are told a bound of it that stays the same; here by attention that reads it, as sdpa does not."""
    model, config = awake()

    def reads_the_bound(module, *args, max_length_q=None, max_length_k=None, **kwargs):
        output, weights = sdpa_attention_forward(module, *args, **kwargs)
        enough = not module.training or max_length_q == max_length_k >= config.max_length
        return output * (1.0 if enough else math.nan), weights

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "training_sdpa", reads_the_bound)
    prepared(model, config, "full", "layers")
    packed = dataclasses.replace(config, packing=True)
    torch._dynamo.utils.counters.clear()
    steps = [list(iter_batches(samples, rows, 2)) for rows in ([[0, 1], [2]], [[3], [4]], [[5, 6], [8, 9, 0]])]
    assert len({batch.max_seqlen for (batch,) in steps}) == 3
    for one in steps:
        assert math.isfinite(step(model, packed, one)[0])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_packed_rows_of_any_number_of_samples_share_one_compilation(awake):
    """The ends of 128 and of 256 samples, also where q and k have a tensor each."""
    model, config = awake(packing=True)
    prepared(model, config, "none", "layers")
    torch._dynamo.utils.counters.clear()
    with attention.for_training(model.train(), config):
        for count, length in ((3, 64), (150, 1), (300, 1)):
            batch = collate_packed([[TokenizedExample([5] * length, [5] * length, 1)] * count], 128)
            inputs = attention.decoder_inputs(batch, model.config)
            del inputs["attention_mask"]  # its size says nothing of how many samples there are
            inputs["cu_seq_lens_k"] = inputs["cu_seq_lens_k"].clone()
            decoder_of(model)(**inputs, use_cache=False)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_compiled_for_real_it_stays_near(awake, micro_batches):
    model, config = awake()
    real, compiled = awake(gradient_checkpointing="selective", compile="layers")
    for one in (model, real):
        del one.get_decoder().layers[1:]  # the second would be compiled apart from the first, whose input has no gradient
    plain = step(prepared(model, config, "none"), config, micro_batches)
    real.accelerated = accelerate(real, compiled)
    with torch._inductor.config.patch(cpp_cache_precompile_headers=False):  # which takes longer than the kernels
        ours = step(real, compiled, micro_batches)
    assert ours[0] == pytest.approx(plain[0], rel=1e-3) and relative_error(ours[2], plain[2]) < 0.02


def test_fifty_steps_follow_the_slow_path_s_curve(awake, samples):
    """PEFT's layers as transformers runs them, and ours compiled and recomputed: the same losses within what bf16 rounds."""
    curves = []
    for ours in (False, True):
        model, config = awake()
        if ours:
            prepared(model, config, "selective", "layers")
        loss_sum = functools.partial(token_loss_sum, head=read_head(model))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, fused=True)
        curve = []
        with attention.for_training(model.train(), config):
            for at in range(50):
                rows = [(4 * at + k) % 20 for k in range(4)]
                micro_batches = list(iter_batches(samples, rows, 2))
                curve.append(train_step(decoder_of(model), optimizer, micro_batches, loss_sum, 2e-3, 1.0)[0].item())
        curves.append(curve)
    assert curves[0][-1] < curves[0][0] - 1.0  # it learns
    assert max(abs(one - other) for one, other in zip(*curves, strict=True)) < 0.02


def test_gradients_are_added_to_what_is_there_and_made_where_there_is_none(awake, micro_batches):
    """Copies of the adapters are what autograd sees; the parameters' own gradients are theirs, for B times the scale."""
    model, config = awake(lora_alpha=3)  # r is 4: a scale that bf16 cannot divide out
    theirs = step(model, config, micro_batches)
    model = prepared(awake(lora_alpha=3)[0], config, "none")
    once = step(model, config, micro_batches)
    assert relative_error(once[2], theirs[2]) < 0.02
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    kept = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    head = read_head(model)
    with attention.for_training(model.train(), config), torch.autocast("cpu", torch.bfloat16):
        for batch in micro_batches:
            hidden = decoder_of(model)(input_ids=batch.input_ids, use_cache=False).last_hidden_state
            (token_loss_sum(hidden, batch, head) / sum(one.num_tokens for one in micro_batches)).backward()
    assert all(parameter.grad is kept[name] for name, parameter in model.named_parameters() if parameter.requires_grad)
    assert relative_error({name: gradient - 1 for name, gradient in kept.items()}, once[2]) < 1e-4


@pytest.mark.parametrize("policy", POLICIES)
def test_a_prepared_model_is_freed(observed, policy):
    assert observed(policy, "layers").freed


def test_a_cache_of_dequantized_weights_changes_no_bit(awake, micro_batches, counted):
    model, config = awake()
    plain = step(prepared(model, config, "full"), config, micro_batches)
    assert counted
    model, cached = awake(cache_dequantized=True)
    prepared(model, cached, "full")
    counted.clear()
    assert same(step(model, cached, micro_batches), plain) and not counted
    loss_sum = functools.partial(token_loss_sum, head=read_head(model))
    assert evaluate_loss(model, micro_batches, loss_sum) == evaluate_loss(
        prepared(awake()[0], config, "full"), micro_batches, loss_sum
    )


def test_evaluation_runs_the_layer_as_it_is_written(awake, micro_batches, monkeypatch):
    model, config = awake()
    loss_sum = functools.partial(token_loss_sum, head=read_head(model))
    before = evaluate_loss(model, micro_batches, loss_sum)
    names = {name: type(module) for name, module in model.get_decoder().named_modules()}
    step(prepared(model, config, "full"), config, micro_batches[:1])
    after = {name: type(module) for name, module in model.get_decoder().named_modules()}
    changed = {(names[name], kind) for name, kind in after.items() if names[name] != kind}
    assert after.keys() == names.keys() and changed == {(Linear4bit, lora_linear.LoRALinear4bit)}
    monkeypatch.setattr(layers, "checkpoint", None)  # calling it would fail
    assert evaluate_loss(model, micro_batches, loss_sum) == before


def test_layers_that_compile_to_something_else_run_as_written(awake, micro_batches, monkeypatch):
    """As a compiler with a fault in it would have it. The first loss is already that of the layers as written."""
    plain, config = awake(gradient_checkpointing="full")
    expected = step(prepared(plain, config, "full"), config, micro_batches)
    model, config = awake(gradient_checkpointing="full", compile="layers")
    said: list[str] = []

    def wrong(graph, inputs):
        return lambda *args: [1.5 * output if output is not None else None for output in graph(*args)]

    torch._dynamo.reset()
    model.accelerated = accelerate(model, config, said.append, backend=wrong)
    found = step(model, config, micro_batches)
    assert same(found, expected) and len(said) == 1
    assert said[0].startswith("Warning: compiled layers differ from layers as written by ") and "run as written" in said[0]


def test_what_cannot_be_compiled_says_how_to_do_without(awake, micro_batches):
    def broken(graph, inputs):
        raise RuntimeError("no such instruction")

    model, config = awake(gradient_checkpointing="full", compile="layers")
    torch._dynamo.reset()
    model.accelerated = accelerate(model, config, backend=broken)
    with pytest.raises(UserError, match=r"could not be compiled\. Pass --compile none") as refused:
        step(model, config, micro_batches)
    assert refused.value.exit_code == ExitCode.ENVIRONMENT and isinstance(refused.value.__cause__, TorchDynamoException)


def test_on_a_cpu_auto_is_as_written_and_keeps_all(model, config):
    chosen, line = layers.choose_layers(config, model, audit_targets(model, config), 100, CPU)
    assert (chosen.compile, chosen.gradient_checkpointing) == ("none", "none")
    assert line == "Layers: as written (there is no CUDA GPU); gradient checkpointing: none"
    asked = dataclasses.replace(config, compile="layers", gradient_checkpointing="selective")
    chosen, line = layers.choose_layers(asked, model, audit_targets(model, config), 100, CPU)
    assert chosen == asked and line == "Layers: compiled (as asked); gradient checkpointing: selective"


@pytest.fixture
def card(monkeypatch):
    """A GPU of a given compute capability with so much free memory."""

    def put(free_gb: float, capability: tuple[int, int] = (9, 0)) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(free_gb * 1e9), int(80e9)))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)

    return put


@pytest.mark.parametrize(
    ("micro_batches", "tokens", "how"),
    [(30, 200, "none"), (300, 200, "graphs"), (50, 4096, "none"), (200, 4096, "graphs"), (2.5, 16384, "none")],
)
def test_a_run_too_short_for_compilation_to_pay_runs_as_written(card, phi3, micro_batches, tokens, how):
    card(80)
    config = TrainConfig(attn_implementation="sdpa")
    job, targets = layers.Job(micro_batches, micro_batches * tokens), audit_targets(phi3, config)
    chosen, line = layers.choose_layers(config, phi3, targets, 2048, GPU, job)
    assert chosen.compile == how
    if how == "none":
        assert re.match(r"Layers: as written \(compiling takes about 15 s and would save \d+ s\); gradient", line)
    for asked in ("layers", "graphs"):
        asked_for = dataclasses.replace(config, compile=asked)
        assert layers.choose_layers(asked_for, phi3, targets, 2048, GPU, job)[0].compile == asked
    offloaded = dataclasses.replace(config, offload_checkpoints=True, gradient_checkpointing="full")
    assert layers.choose_layers(offloaded, phi3, targets, 2048, GPU, job)[0].compile == "layers"


@pytest.mark.parametrize(
    ("free", "how", "policy", "why"),
    [
        (80, "graphs", "none", "the fastest that fits"),
        (16, "graphs", "none", "the fastest that fits"),
        (14.5, "layers", "none", "the fastest that fits"),
        (10, "graphs", "selective", "the fastest that fits"),
        (7, "graphs", "full", "the fastest that fits"),
        (5.5, "layers", "full", "the fastest that fits"),
        (2, "layers", "full", "the smallest, which may not fit"),
    ],
)
def test_on_a_gpu_auto_is_the_fastest_that_is_predicted_to_fit(card, phi3, free, how, policy, why):
    card(free)
    config = TrainConfig(attn_implementation="sdpa")
    chosen, line = layers.choose_layers(config, phi3, audit_targets(phi3, config), 2048, GPU)
    assert (chosen.compile, chosen.gradient_checkpointing) == (how, policy)
    words = {"graphs": "compiled, replayed as CUDA graphs", "layers": "compiled (graphs would need more memory)"}[how]
    assert line.startswith(f"Layers: {words}; gradient checkpointing: {policy} ({why}: ")
    line, terms = line.split("\n")
    assert line.endswith(f" GB predicted, {free:.1f} free)")
    assert terms.startswith("Memory predicted, in GB: base in NF4 1.87, embeddings, head, norms 0.39, adapters in fp32 0.20, ")
    sizes = map(float, re.findall(r"\d+\.\d+", terms))
    assert sum(sizes) == pytest.approx(float(re.search(r"([\d.]+) GB predicted", line)[1]), abs=0.05)
    asked = dataclasses.replace(config, gradient_checkpointing="selective", compile="none")
    chosen, line = layers.choose_layers(asked, phi3, audit_targets(phi3, config), 2048, GPU)
    assert chosen == asked and "as written (as asked); gradient checkpointing: selective (as asked: " in line


def test_checkpoints_that_a_model_cannot_have_are_refused(card):
    card(80)
    model = torch.nn.Linear(2, 2)
    model.config = SimpleNamespace(model_type="odd", get_text_config=SimpleNamespace)
    with pytest.raises(UserError, match=r"--gradient-checkpointing full cannot be used: .* the layers of odd") as refused:
        layers.choose_layers(TrainConfig(gradient_checkpointing="full"), model, [], 9, torch.device("cpu"))
    assert refused.value.exit_code == ExitCode.CONFIGURATION
    chosen, _ = layers.choose_layers(TrainConfig(), model, [], 9, torch.device("cpu"))
    assert chosen.gradient_checkpointing == "none"


@pytest.mark.parametrize("nested", [False, True])
def test_what_reads_lengths_from_the_device_is_compiled_but_not_recorded(card, phi3, monkeypatch, nested):
    card(80)
    rotation = {"rope_type": "longrope", "rope_theta": 10000.0}
    monkeypatch.setattr(phi3.config, "rope_parameters", {"full_attention": rotation} if nested else rotation)
    config = TrainConfig(attn_implementation="sdpa")
    chosen, line = layers.choose_layers(config, phi3, audit_targets(phi3, config), 9, GPU)
    assert chosen.compile == "layers"
    assert line.startswith("Layers: compiled (no CUDA graphs, as its longrope rotation reads the length from the device); ")


def test_what_cannot_be_compiled_runs_as_written(card, phi3, monkeypatch):
    card(80, capability=(7, 5))
    assert "compute capability 8.0" in str(layers.compile_unavailable_reason(phi3, GPU))
    card(80)
    assert layers.compile_unavailable_reason(phi3, GPU) is None
    for name, words in (("Bloom", "in BloomForCausalLM its decoder does not run with masks"), ("Mixtral", "the experts of Mix"),
                        ("Mpt", "does not declare that MptForCausalLM compiles")):  # fmt: skip
        with torch.device("meta"):
            other = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")())
        assert words in str(layers.compile_unavailable_reason(other, GPU))
    monkeypatch.setattr(layers, "shutil", SimpleNamespace(which=lambda _: None))
    assert "C compiler" in str(layers.compile_unavailable_reason(phi3, GPU))


@pytest.mark.parametrize("policy", ["selective", "full"])
def test_offloaded_checkpoints_are_the_inputs_of_layers_and_come_back(awake, micro_batches, observed, policy, monkeypatch):
    """On a CPU the host's memory is the device's, but what is packed and unpacked is the same."""
    plain = observed(policy, "layers").taken
    packed = []
    original = layers.offloaded

    def spy(hidden):
        packed.append(hidden.shape)
        return original(hidden)

    monkeypatch.setattr(layers, "offloaded", spy)
    model, config = awake(offload_checkpoints=True)
    copies = []
    copy = torch.Tensor.copy_

    def counted_copy(self, other, non_blocking=False):
        if non_blocking:
            copies.append(self.shape)
        return copy(self, other, non_blocking)

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "copy_", counted_copy)
        ours = step(prepared(model, config, policy, "layers"), config, micro_batches)
    depth = len(model.get_decoder().layers)
    assert same(ours, plain) and len(packed) == len(copies) == len(micro_batches) * depth and packed == copies


def test_offloading_needs_a_gpu_and_layers_that_are_compiled_but_not_recorded(card, phi3):
    config = TrainConfig(attn_implementation="sdpa", offload_checkpoints=True)
    with pytest.raises(UserError, match="--offload-checkpoints True cannot be used: it must be given on a CUDA GPU"):
        config.resolved(on_gpu=False)
    for compile in ("none", "graphs"):
        with pytest.raises(UserError, match="with --compile layers"):
            dataclasses.replace(config, compile=compile).resolved(on_gpu=True)
    config.resolved(on_gpu=True)
    card(80)
    chosen, line = layers.choose_layers(config, phi3, audit_targets(phi3, config), 2048, GPU)
    assert chosen.compile == "layers" and line.startswith("Layers: compiled (checkpoints go to the host); ")


def test_what_was_asked_for_and_cannot_be_had_is_refused_before_the_model_loads(model, config, card, phi3, monkeypatch):
    targets = audit_targets(model, config)
    for flags, device, words in (
        ({"compile": "graphs"}, CPU, "--compile graphs cannot be used: there is no CUDA GPU"),
        ({"offload_checkpoints": True}, CPU, "--compile layers, and it is none, as there is no CUDA GPU"),
        ({"offload_checkpoints": True, "compile": "graphs"}, GPU, "graphs cannot be used: checkpoints go to the host"),
        ({"offload_checkpoints": True}, OLD_GPU, "it is none, as it needs a GPU with bf16"),
    ):
        card(80, (7, 5) if device is OLD_GPU else (9, 0))
        asked = dataclasses.replace(config, attn_implementation="sdpa", **flags)
        with pytest.raises(UserError, match=words) as refused:
            layers.choose_layers(asked, model, targets, 100, device)
        assert refused.value.exit_code == ExitCode.ENVIRONMENT
    card(80)
    monkeypatch.setattr(phi3.model.layers[0].self_attn, "is_causal", False)
    chosen, line = layers.choose_layers(TrainConfig(attn_implementation="sdpa"), phi3, audit_targets(phi3, config), 9, GPU)
    assert chosen.compile == "none" and "as written (in Phi3ForCausalLM its attention is not causal)" in line


@pytest.mark.parametrize("policy", ["selective", "full"])
def test_dropout_of_the_model_itself_is_drawn_again_as_it_was(awake, micro_batches, policy):
    """Without any in the adapters."""
    found = []
    for name in ("none", policy):
        model, config = awake()
        for module in model.get_decoder().modules():
            if hasattr(module, "resid_attn_dropout"):
                module.resid_attn_dropout = module.resid_mlp_dropout = torch.nn.Dropout(0.5)
        found.append(step(prepared(model, config, name), config, micro_batches, dropout_seed=3))
    assert same(*found) and found[0][0] != step(prepared(awake()[0], config, "none"), config, micro_batches)[0]


# What CPUs lack: attention in one operator that draws its own dropout. sdpa with dropout takes small operators there.
@torch.library.custom_op("qlora_test::attention", mutates_args=())
def dropping_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout_p: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, H, T, d] each -> [B, H, T, d], and the mask of what it kept [B, H, T, T]."""
    kept = torch.dropout(torch.ones(query.shape[:3] + key.shape[2:3]), dropout_p, True).to(query.dtype)  # [B, H, T, T]
    return (_weights(query, key) * kept) @ value, kept


def _weights(query, key):
    scores = (query @ key.transpose(2, 3)).masked_fill(torch.ones(query.shape[2], key.shape[2]).triu(1) > 0, -math.inf)
    return scores.softmax(-1)


def _differentiate(ctx, d_output, _):
    *leaves, kept = ctx.saved_tensors
    with torch.enable_grad():
        query, key, value = (tensor.detach().requires_grad_() for tensor in leaves)
        ((_weights(query, key) * kept.detach()) @ value).backward(d_output)
    return query.grad, key.grad, value.grad, None


dropping_attention.register_autograd(
    _differentiate, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:3], output[1])
)


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize(
    ("attention_dropout", "lora_dropout", "again"), [(0.0, 0.3, 0), (0.3, 0.0, 1), (0.3, 0.3, 1)]
)  # what draws is computed again; what does not is kept
def test_attention_that_draws_is_computed_again(
    awake, micro_batches, monkeypatch, attention_dropout, lora_dropout, by_name, again
):
    monkeypatch.setattr(layers, "ATTENTION", {*layers.ATTENTION, "qlora_test::attention"})

    def attend(module, query, key, value, *_, **__):
        key, value = (tensor.repeat_interleave(module.num_key_value_groups, 1) for tensor in (key, value))
        tensors = (query, key, value.to(query.dtype))
        rate = {"dropout_p": attention_dropout} if by_name else {}
        operator = torch.ops.qlora_test.attention
        output = operator(*tensors, **rate) if by_name else operator(*tensors, attention_dropout)
        return output[0].transpose(1, 2).to(torch.bfloat16), None

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "training_sdpa", attend)
    found = []
    for policy in ("none", "selective"):
        model, config = awake(lora_dropout=lora_dropout)
        with Counter() as counter:
            found.append((step(prepared(model, config, policy), config, micro_batches, dropout_seed=3), counter.counts))
    (plain, once), (ours, twice) = found
    assert same(ours, plain)
    depth, name = len(model.get_decoder().layers), "qlora_test::attention"
    assert twice[name] - once[name] == again * depth * len(micro_batches)


@pytest.mark.parametrize("changes", [{"attention_dropout": 0.1}, {"resid_pdrop": 0.1}])
def test_layers_with_dropout_of_their_own_are_not_compiled(config, tiny, changes):
    """Computed again in compiled layers, it would draw from a generator that no seed of the loop reaches."""
    plain = load_meta_model(str(tiny), config)
    settings = transformers.AutoConfig.from_pretrained(tiny, **changes)
    with torch.device("meta"):
        drawing = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="eager")
    assert layers.dropout_unavailable_reason(plain) is None
    assert "dropout of their own (0.1)" in layers.dropout_unavailable_reason(drawing)
    targets, config = audit_targets(drawing, config), dataclasses.replace(config, gradient_checkpointing="full")
    chosen, _ = layers.choose_layers(dataclasses.replace(config, compile="auto"), drawing, targets, 64, CPU)
    assert chosen.compile == "none"
    for compile in ("layers", "graphs"):
        with pytest.raises(UserError, match=f"--compile {compile} cannot be used: its layers have dropout") as refused:
            layers.choose_layers(dataclasses.replace(config, compile=compile), drawing, targets, 64, CPU)
        assert refused.value.exit_code == ExitCode.ENVIRONMENT


@pytest.mark.parametrize("with_gradients", [True, False])
def test_the_plain_decoder_sees_the_adapters_as_they_are(awake, micro_batches, with_gradients):
    """Copies of A and B belong to one pass: after an update, a forward that makes none must not find them."""
    model, config = awake()
    decoder, plain, ids = decoder_of(prepared(model, config, "none")), model.get_decoder(), micro_batches[0].input_ids
    with attention.for_training(model.train(), config), torch.autocast("cpu", torch.bfloat16):
        with torch.set_grad_enabled(with_gradients):
            hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state  # [B, T, D]
        if with_gradients:
            hidden.sum().backward()
        wake_adapters(model, scale=1.0)
        trained = plain(input_ids=ids, use_cache=False).last_hidden_state  # [B, T, D]
        model.eval()
        evaluated = plain(input_ids=ids, use_cache=False).last_hidden_state  # [B, T, D]
    assert (trained - evaluated).norm() < 0.05 * evaluated.norm()  # copies of the pass before are off by 0.6 and more


class Inner(GradientCheckpointingLayer):
    """A layer that keeps something for backward."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, hidden):
        return torch.tanh(self.linear(hidden))


class Outer(GradientCheckpointingLayer):
    """A layer that holds another one, as Zamba 2's hybrid layers do."""

    def __init__(self):
        super().__init__()
        self.inner = Inner()

    def forward(self, hidden):
        return torch.tanh(self.inner(hidden)) * hidden


class Nested(torch.nn.Module):
    """A decoder of such layers."""

    def __init__(self):
        super().__init__()
        self.config = None
        self.layers = torch.nn.ModuleList([Outer(), Inner()])

    def get_decoder(self):
        return self

    def forward(self, hidden):
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def test_a_layer_inside_another_is_recomputed_with_it(config):
    torch.manual_seed(0)
    decoder, hidden = Nested().train(), torch.randn(3, 4, requires_grad=True)  # [3, 4]
    found = []
    for policy in POLICIES:
        accelerated = AcceleratedDecoder(
            decoder, [], dataclasses.replace(config, gradient_checkpointing=policy, compile="none")
        )
        decoder.zero_grad()
        accelerated(hidden=hidden).square().sum().backward()
        found.append([parameter.grad.clone() for parameter in decoder.parameters()])
    assert all(torch.equal(gradient, found[0][at]) for ours in found for at, gradient in enumerate(ours))
    assert [type(layer) for layer in decoder.modules()].count(Inner) == 2
