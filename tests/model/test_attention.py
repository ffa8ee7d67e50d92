"""Which backend is chosen, when the sliding window can be left out, and our functions against transformers' own."""

import contextlib
import dataclasses
import functools
import itertools
import sys
import typing
from types import SimpleNamespace

import pytest
import torch
import transformers

from qlora.config import AttnImplementation, TrainConfig
from qlora.data.batch import Batch, collate, collate_packed, iter_batches, training_batches
from qlora.data.template import IGNORED, TokenizedExample
from qlora.errors import ExitCode, UserError
from qlora.model import attention
from qlora.model.lora import add_lora
from qlora.model.loss import read_head, token_loss_sum
from qlora.model.targets import audit_targets
from tests.helpers import CPU, SIZES, adapted_model, decoder_of, gradients, prepared, relative_error, to_fp32, wake_adapters
from train_loop import train_step

GPU = torch.device("cuda", 0)


# -- the choice ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def phi3():
    """Phi-3 in small, with the window of Phi-3-mini-4k, without memory."""
    return meta_model(transformers.Phi3Config(**SIZES, sliding_window=2047))


@pytest.fixture(scope="module")
def gemma2():
    """A model whose layers differ, and whose soft-capping sdpa has not."""
    return meta_model(transformers.Gemma2Config(**SIZES))


def meta_model(config):
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")


@pytest.fixture
def fake_gpu(monkeypatch):
    """A GPU of the given capability, with or without flash-attn and the varlen kernel of torch 2.11, for the choice to see."""

    def fake(capability: tuple[int, int], installed: bool, varlen: bool = True):
        from torch.nn.attention import varlen as module

        def kernel(query, key, value, *, scale=None, window_size=(-1, -1)): ...

        def older(query, key, value, *, scale=None, is_causal=False): ...

        monkeypatch.setattr(module, "varlen_attn", kernel if varlen else older)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: installed)
        monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace() if installed else None)

    return fake


def choose(name: str, device: torch.device, model, **options) -> attention.Attention:
    return attention.choose_attention(TrainConfig(attn_implementation=name, **options), device, model)


PACKING, BEYOND = {"packing": True}, {"max_length": 2049}  # 2048 is what a window of 2047 does not touch


@pytest.mark.parametrize("options", [{}, {"max_length": 2048}, PACKING, BEYOND, PACKING | BEYOND])
def test_auto_on_a_cpu_is_sdpa(phi3, options):
    chosen = choose("auto", CPU, phi3, **options)
    assert chosen.implementation == "sdpa" == chosen.loaded_as
    if "packing" in options or options == BEYOND:
        assert chosen.reason.count("it needs a CUDA GPU") == 2 and "varlen cannot run" in chosen.reason
    else:
        assert chosen.reason == "it needs no mask here"


def test_auto_takes_sdpa_where_it_needs_no_mask_else_a_kernel_that_needs_none(phi3, fake_gpu):
    def chosen(**options):
        return choose("auto", GPU, phi3, **options)

    fake_gpu((9, 0), installed=True)
    for options in ({}, {"max_length": 2048}):
        assert chosen(**options) == ("sdpa", "it needs no mask here")
    assert chosen(**PACKING) == ("varlen", "rows are packed")
    assert chosen(**BEYOND) == ("varlen", "a sliding window of 2047 is active")
    fake_gpu((9, 0), installed=True, varlen=False)
    assert chosen().implementation == "sdpa"
    for options in (PACKING, BEYOND, PACKING | BEYOND):
        assert chosen(**options).implementation == "flash_attention_2"
        assert "varlen cannot run: it needs torch 2.11" in chosen(**options).reason
    fake_gpu((9, 0), installed=False, varlen=False)
    for options in (PACKING, BEYOND):
        assert "flash-attn is not installed" in chosen(**options).reason
        assert (
            chosen(**options).implementation == "sdpa" and "varlen cannot run: it needs torch 2.11" in chosen(**options).reason
        )
    fake_gpu((7, 5), installed=True)
    for options in (PACKING, BEYOND):
        assert chosen(**options).implementation == "sdpa" and chosen(**options).reason.count("this GPU has 7.5") == 2


def test_a_flash_attn_built_for_another_torch_is_an_obstacle_not_a_crash(phi3, fake_gpu, monkeypatch):
    fake_gpu((9, 0), installed=True, varlen=False)
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # importing it raises ImportError
    chosen = choose("auto", GPU, phi3, packing=True)
    assert chosen.implementation == "sdpa" and "does not fit this torch" in chosen.reason


def test_auto_takes_what_the_model_supports(phi3, gemma2, fake_gpu, monkeypatch):
    for options in ({}, PACKING):
        chosen = choose("auto", CPU, gemma2, **options)
        assert chosen.implementation == "eager" and "Gemma2ForCausalLM does not support it" in chosen.reason
    with pytest.raises(UserError, match="sdpa cannot run here: Gemma2ForCausalLM does not support it"):
        choose("sdpa", CPU, gemma2)
    fake_gpu((9, 0), installed=True)
    for built_with, chosen in ((True, "flash_attention_2"), (False, "eager")):
        monkeypatch.setattr(attention, "_flash_has_softcap", lambda _, answer=built_with: answer)
        assert choose("auto", GPU, gemma2).implementation == chosen
    assert "this build of flash-attn cannot cap scores" in choose("auto", GPU, gemma2).reason
    fake_gpu((9, 0), installed=False)
    chosen = choose("auto", GPU, gemma2, packing=True)
    assert chosen.implementation == "eager" and "it cannot cap scores as Gemma2ForCausalLM does" in chosen.reason
    fake_gpu((9, 0), installed=True)
    monkeypatch.setattr(type(phi3), "_supports_flash_attn", False)
    assert choose("auto", GPU, phi3, packing=True).implementation == "varlen"


def test_a_build_of_flash_attn_is_asked_for_soft_capping(monkeypatch):
    def without(*_, softcap=0.0, **__):
        raise RuntimeError("This flash attention build does not support softcap.")

    def older(query, key, value, causal=False): ...

    for kernel, expected in ((without, False), (older, False), (lambda *_, **__: None, True)):
        monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=kernel))
        assert attention._flash_has_softcap(CPU) == expected


def test_packed_rows_go_to_masks_where_layers_do_not_pass_on_lengths(fake_gpu):
    model = meta_model(transformers.StableLmConfig(**SIZES))
    fake_gpu((9, 0), installed=True)
    assert choose("auto", GPU, model).implementation == "sdpa"
    chosen = choose("auto", GPU, model, packing=True)
    assert chosen.implementation == "sdpa" and chosen.reason.count("do not pass on the lengths of packed samples") == 2
    with pytest.raises(UserError, match="flash_attention_2 cannot run here: the layers of StableLmForCausalLM do not pass on"):
        choose("flash_attention_2", GPU, model, packing=True)


def test_a_backend_asked_for_by_name_runs_or_fails(phi3, fake_gpu):
    assert choose("eager", CPU, phi3) == ("eager", "as asked")
    assert choose("sdpa", CPU, phi3) == ("sdpa", "as asked")
    for name in ("flash_attention_2", "varlen"):
        for known in (None, phi3):  # before anything is read of the model, too
            with pytest.raises(UserError, match=f"--attn-implementation {name} cannot run here: it needs a CUDA GPU") as caught:
                choose(name, CPU, known)
            assert caught.value.exit_code == ExitCode.ENVIRONMENT
    fake_gpu((9, 0), installed=False)
    with pytest.raises(UserError, match="not installed"):
        choose("flash_attention_2", GPU, phi3)
    assert choose("varlen", GPU, phi3) == choose("varlen", GPU, None) == ("varlen", "as asked")
    fake_gpu((9, 0), installed=True)
    assert choose("flash_attention_2", GPU, phi3).reason == "as asked"


def test_varlen_runs_where_it_can_do_what_the_model_does(phi3, gemma2, fake_gpu, monkeypatch):
    with_dropout = meta_model(transformers.Phi3Config(**SIZES, attention_dropout=0.1))
    for capability, newer, model, words in (
        ((7, 5), True, phi3, "compute capability 8.0 or newer, this GPU has 7.5"),
        ((9, 0), False, phi3, rf"needs torch 2.11 or newer, this is {torch.__version__.partition('+')[0]}"),
        ((9, 0), True, gemma2, "it cannot cap scores as Gemma2ForCausalLM does"),
        ((9, 0), True, meta_model(transformers.BloomConfig(n_layer=1)), "and in BloomForCausalLM its decoder does not run"),
        ((9, 0), True, with_dropout, "no dropout of attention weights"),
    ):
        fake_gpu(capability, installed=False, varlen=newer)
        with pytest.raises(UserError, match=f"varlen cannot run here: .*{words}") as caught:
            choose("varlen", GPU, model)
        assert caught.value.exit_code == ExitCode.ENVIRONMENT
    fake_gpu((9, 0), installed=False)
    stablelm = meta_model(transformers.StableLmConfig(**SIZES))
    assert choose("varlen", GPU, stablelm).implementation == "varlen"
    with pytest.raises(UserError, match="the layers of StableLmForCausalLM do not pass on the lengths of packed samples"):
        choose("varlen", GPU, stablelm, packing=True)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)  # torch 2.9
    with pytest.raises(UserError, match=r"needs torch 2\.11 or newer"):
        choose("varlen", GPU, phi3)


def test_a_model_is_loaded_with_what_it_can_generate_with():
    names = [name for name in typing.get_args(AttnImplementation) if name != "auto"]
    loaded = {name: attention.Attention(name, "").loaded_as for name in names}
    assert loaded == {"flash_attention_2": "flash_attention_2", "varlen": "sdpa", "sdpa": "sdpa", "eager": "eager"}
    assert all(attention.PREFIX + name in transformers.AttentionInterface().valid_keys() for name in names)


def test_a_package_named_kernels_is_never_asked(phi3, fake_gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "kernels", SimpleNamespace(get_kernel=lambda *a, **k: pytest.fail("downloaded")))
    fake_gpu((9, 0), installed=False)
    assert choose("auto", GPU, phi3, packing=True).implementation == "varlen"


# -- the window ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "layer_types", "max_length", "expected"),
    [
        (2047, None, 2048, None),
        (2047, None, 2049, 2047),
        (2047, None, 512, None),
        (None, None, 512, None),
        (16, ["sliding_attention"], 8, 16),
    ],
)
def test_the_window_is_left_out_only_where_it_changes_nothing(window, layer_types, max_length, expected):
    config = SimpleNamespace(sliding_window=window, layer_types=layer_types)
    assert attention.training_window(config, max_length) == expected


@pytest.mark.parametrize(("max_length", "backend"), [(16, "sdpa"), (17, "varlen")])
@pytest.mark.parametrize("name", ["Gemma3Text", "Llama"])
def test_only_a_window_that_some_layer_reads_asks_for_a_kernel_with_windows(fake_gpu, name, max_length, backend):
    """Configurations of Llama may name a window, and no layer of it has one."""
    kinds = {"layer_types": ["full_attention", "sliding_attention"], "num_hidden_layers": 2} if name == "Gemma3Text" else {}
    model = meta_model(getattr(transformers, f"{name}Config")(**{**SIZES, **kinds}, sliding_window=16))
    fake_gpu((9, 0), installed=False)
    assert choose("auto", GPU, model, max_length=max_length).implementation == ("sdpa" if name == "Llama" else backend)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize(("length", "equal"), [(8, True), (9, True), (10, False)])
def test_rows_of_up_to_window_plus_one_tokens_lose_nothing(config, backend, length, equal):
    """T = w + 1: the last position loses a key, but nothing is predicted from it. T = w + 2: something is."""
    model = adapted_model(config, backend)
    wake_adapters(model)
    ids = torch.arange(20, 20 + length).tolist()
    batch = collate([TokenizedExample(ids, ids, 1)])
    _, loss, with_window = results(model, batch, attend(model, backend, 8))
    _, other, without = results(model, batch, attend(model, backend, None))
    if equal:
        assert loss == pytest.approx(other, rel=1e-6) and relative_error(without, with_window) < 1e-2
    else:
        assert loss != other and relative_error(without, with_window) > 1e-2


def settings(model) -> tuple[str, int | None]:
    config = model.get_base_model().config
    assert config is model.config is model.get_decoder().config
    return config._attn_implementation, getattr(config, "sliding_window", None)


@pytest.mark.parametrize(("max_length", "window"), [(2048, None), (2049, 2047)])
def test_what_for_training_changes_is_put_back(config, model, max_length, window):
    config = dataclasses.replace(config, attn_implementation="eager", max_length=max_length)
    assert settings(model) == ("sdpa", 2047)
    with attention.for_training(model, config):
        assert settings(model) == ("training_eager", window)
    assert settings(model) == ("sdpa", 2047)
    with pytest.raises(ZeroDivisionError), attention.for_training(model, config):
        raise ZeroDivisionError
    assert settings(model) == ("sdpa", 2047)
    model.config.sliding_window = None
    with attention.for_training(model, config):
        assert settings(model) == ("training_eager", None)
    assert settings(model) == ("sdpa", None)


def test_a_model_without_a_window_gets_none(config):
    model = small_model(config, transformers.LlamaConfig(**SIZES))
    before = dict(vars(model.config))
    with attention.for_training(model, dataclasses.replace(config, attn_implementation="sdpa")):
        assert settings(model) == ("training_sdpa", None)
    assert settings(model) == ("eager", None) and vars(model.config) | {"sliding_window": None} == before | {
        "sliding_window": None
    }


def test_the_model_runs_what_was_chosen(config):
    for backend in ("sdpa", "eager"):
        assert adapted_model(config, backend).config._attn_implementation == backend


# -- the functions ---------------------------------------------------------------------------------------------------


def small_model(config, shape, attn_implementation: str = "eager"):
    """A random model of another family in fp32, fewer key heads than heads, with adapters that are awake."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(shape, attn_implementation=attn_implementation)
    model = add_lora(model, config, audit_targets(model, config), "random").train()
    wake_adapters(model)
    return model


def awake(config, attn_implementation: str = "sdpa", fp32: bool = True):
    """The tiny NF4 Phi-3, two heads on one of keys, adapters awake; computed in fp32 if asked."""
    model = adapted_model(config, attn_implementation)
    wake_adapters(model)
    return to_fp32(model) if fp32 else model


@contextlib.contextmanager
def attend(model, backend: str, window: int | None):
    """Train with a function of ours and a window of so many positions."""
    if getattr(model.config, "layer_types", None) is None:
        model.config.sliding_window = window
    with attention.for_training(model, TrainConfig(attn_implementation=backend, max_length=2048)):
        yield


def results(model, batch: Batch, context, autocast: bool = True):
    """Hidden states, the mean loss of a token, and gradients of the adapters."""
    model.zero_grad()
    head = read_head(model)  # which calls the model as a whole
    with context, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        inputs = attention.decoder_inputs(batch, model.config)
        hidden = decoder_of(model)(**inputs, use_cache=False).last_hidden_state
        loss = token_loss_sum(hidden, batch, head) / batch.num_tokens
        loss.backward()
    return hidden.detach(), loss.item(), gradients(model)


def random_samples(*lengths: int) -> list[TokenizedExample]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 99, (length,), generator=generator).tolist() for length in lengths]
    return [TokenizedExample(ids, [IGNORED, *ids[1:]], line) for line, ids in enumerate(rows, start=1)]


LENGTHS = (17, 2, 31, 9, 14, 1, 23, 5)
ROWS = ([0, 1, 4], [2, 3], [6, 5, 7])  # of 33, 40 and 29 tokens: the second without padding, a sample of one token in the third


def packed(samples: list[TokenizedExample]) -> Batch:
    return collate_packed([[samples[index] for index in row] for row in ROWS])


ARRANGED = {
    "full": lambda: collate(random_samples(40, 40)),
    "padded": lambda: collate(random_samples(*LENGTHS)),
    "packed": lambda: packed(random_samples(*LENGTHS)),
}


MIXED = {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2, "sliding_window": 8}
READ_AT_EACH_FORWARD = ("Phi3", "Mistral", "Starcoder2")  # the window
FAMILIES = {
    **{
        name: {}
        for name in ("Phi3", "Mistral", "Llama", "Starcoder2", "Gemma", "Granite", "Olmo2", "Glm4", "StableLm", "GPTNeoX")
    },
    **{name: {"num_hidden_layers": 2} for name in ("Qwen2", "Qwen3", "SmolLM3")},
    **dict.fromkeys(("Gemma2", "Gemma3Text", "Olmo3", "Cohere2", "Ministral", "Exaone4"), MIXED),
}  # of transformers' configuration class: what its shape is beside SIZES


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ours_is_transformers_own_bit_for_bit(config, family, backend):
    """Hidden states, loss and gradients; theirs with the masks that transformers makes, from position_ids for packed rows."""
    if family == "Phi3":
        model = awake(config, backend, fp32=False)
    else:
        try:
            model = small_model(config, getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES[family]}), backend)
        except ValueError as error:
            pytest.skip(str(error))  # Gemma 2 has no sdpa
    windows = (None, 8) if family in READ_AT_EACH_FORWARD else (getattr(model.config, "sliding_window", None),)
    losses = {arrangement: set() for arrangement in ARRANGED}
    for arrangement, window in itertools.product(ARRANGED, windows):
        batch = ARRANGED[arrangement]()
        ours, loss, found = results(model, batch, attend(model, backend, window), autocast=family == "Phi3")
        assert settings(model) == (backend, window)
        theirs, other, expected = results(model, batch, contextlib.nullcontext(), autocast=family == "Phi3")
        real = [slice(None)] if batch.cu_seqlens is not None or arrangement == "full" else [batch.labels != IGNORED]
        assert all(torch.equal(ours[at], theirs[at]) for at in real) and loss == other, (arrangement, window)
        assert all(torch.equal(found[name], expected[name]) for name in expected), (arrangement, window)
        losses[arrangement].add(loss)
    assert all(len(each) == len(windows) for each in losses.values())  # the window has an effect


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [None, 8])
def test_packed_rows_give_the_loss_and_gradients_of_one_sample_a_row(config, backend, window):
    samples = random_samples(*LENGTHS)
    model = awake(config)
    _, loss, expected = results(model, collate(samples), attend(model, backend, window), autocast=False)
    _, ours, found = results(model, packed(samples), attend(model, backend, window), autocast=False)
    assert ours == pytest.approx(loss, rel=1e-6) and relative_error(found, expected) < 1e-5
    model = awake(config, fp32=False)
    _, loss, expected = results(model, collate(samples), attend(model, backend, window))
    _, ours, found = results(model, packed(samples), attend(model, backend, window))
    assert ours == pytest.approx(loss, rel=1e-3) and relative_error(found, expected) < 0.01  # what bf16 rounds
    leaky = packed(samples)._replace(cu_seqlens=None, position_ids=None)
    _, other, wrong = results(model, leaky, attend(model, backend, window))
    assert abs(other - loss) > 5e-4 * loss and relative_error(wrong, expected) > 0.3  # the test would see it


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_packed_sample_sees_neither_the_one_before_nor_the_one_behind(config, backend):
    model = awake(config, fp32=False)
    samples = random_samples(*LENGTHS)
    changed = [
        TokenizedExample([id + 100 for id in s.input_ids], s.labels, s.line) if at == 1 else s for at, s in enumerate(samples)
    ]
    (before, *_), (after, *_) = (results(model, packed(some), attend(model, backend, None)) for some in (samples, changed))
    own = slice(LENGTHS[0], LENGTHS[0] + LENGTHS[1])  # of the first row: sample 0, this one, sample 4, padding
    assert not any(torch.equal(*pair) for pair in zip(before[0, own], after[0, own], strict=True))
    for hidden in (before, after):
        hidden[0, own] = 0.0
    assert torch.equal(before, after)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_step_over_packed_rows_is_the_step_over_their_samples(config, monkeypatch, backend):
    """Through train_step with accumulation and clipping, in fp32: only the order of additions differs."""
    monkeypatch.setattr(torch, "autocast", lambda *_: contextlib.nullcontext())
    samples = random_samples(*LENGTHS)
    ends, losses = [], []
    for rows, size in ((range(len(samples)), 4), (ROWS, 2)):
        model = awake(config)
        loss_sum = functools.partial(token_loss_sum, head=read_head(model))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        micro_batches = list(iter_batches(samples, rows, size))
        assert len(micro_batches) == 2
        with attend(model, backend, None):
            losses.append([train_step(decoder_of(model), optimizer, micro_batches, loss_sum, 0.5, 0.7) for _ in range(2)])
        ends.append({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    start = {name: p.detach() for name, p in awake(config).named_parameters() if p.requires_grad}
    padded, ours = ({name: end[name] - start[name] for name in end} for end in ends)
    for one, other in zip(*losses, strict=True):
        assert [value.item() for value in one] == pytest.approx([value.item() for value in other], rel=1e-5)
    assert relative_error(ours, padded) < 1e-5 and losses[0][0][1] > 0.7  # clipped


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_rows_of_padding_that_fill_up_a_batch_train_nothing(config, monkeypatch, backend, packing):
    """In fp32: the same loss, norm and gradients as of the smaller batch."""
    monkeypatch.setattr(torch, "autocast", lambda *_: contextlib.nullcontext())
    samples, rows = random_samples(*LENGTHS), ROWS[:1] if packing else [2]
    found = []
    for compile in ("none", "layers"):
        model = awake(config)
        loss_sum = functools.partial(token_loss_sum, head=read_head(model))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        changed = dataclasses.replace(config, compile=compile, packing=packing, per_device_train_batch_size=3)
        micro_batches = list(training_batches(samples, rows, changed))
        assert [len(batch.input_ids) for batch in micro_batches] == [1 if compile == "none" else 3]
        with attend(model, backend, None):
            loss, norm = train_step(decoder_of(model), optimizer, micro_batches, loss_sum, 0.0, None)
        found.append((loss.item(), norm.item(), gradients(model)))
    one, other = found
    assert one[:2] == pytest.approx(other[:2], rel=1e-5) and relative_error(other[2], one[2]) < 1e-5


@pytest.mark.parametrize("policy", ["selective", "full"])
@pytest.mark.parametrize("backend", ["sdpa", "eager", "varlen", "flash_attention_2"])
def test_checkpointing_recomputes_packed_rows_as_they_were(config, slow_kernels, backend, policy):
    straight, again = prepared(awake(config), config, "none"), prepared(awake(config), config, policy)
    batch = packed(random_samples(*LENGTHS))
    hidden, loss, expected = results(straight, batch, attend(straight, backend, 8), autocast=False)
    same, other, found = results(again, batch, attend(again, backend, 8), autocast=False)
    assert torch.equal(hidden, same) and loss == other and all(torch.equal(found[name], expected[name]) for name in expected)


PER_LAYER = [
    transformers.Gemma2Config(**SIZES, sliding_window=8, layer_types=["sliding_attention"]),
    transformers.Qwen2Config(
        **{name: value for name, value in SIZES.items() if name not in ("head_dim", "num_hidden_layers")},
        num_hidden_layers=2,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=1,
    ),
]


@pytest.mark.parametrize("shape", PER_LAYER, ids=lambda shape: shape.model_type)
def test_packed_rows_are_right_where_layers_differ(config, shape):
    model = small_model(config, shape)
    samples = random_samples(*LENGTHS)
    training = functools.partial(
        attention.for_training, model, dataclasses.replace(config, attn_implementation="eager", max_length=9)
    )
    with training():
        assert settings(model) == ("training_eager", 8)
    _, loss, expected = results(model, collate(samples), training(), autocast=False)
    _, ours, found = results(model, packed(samples), training(), autocast=False)
    leaky = packed(samples)._replace(cu_seqlens=None, position_ids=None)
    _, other, _ = results(model, leaky, training(), autocast=False)
    assert settings(model) == ("eager", 8)
    assert ours == pytest.approx(loss, rel=1e-6) and relative_error(found, expected) < 1e-5
    assert abs(other - loss) > 1e-5 * loss


WITHOUT_GQA = {name: value for name, value in SIZES.items() if name not in ("num_key_value_heads", "head_dim")}
ONE_HEAD_SIZE = {name: value for name, value in SIZES.items() if name != "head_dim"}
OTHERS = {
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**WITHOUT_GQA),  # its attention knows no groups of heads
    "opt": lambda: transformers.OPTConfig(
        vocab_size=99,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        pad_token_id=0,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
    ),
    "gemma3": lambda: transformers.Gemma3Config(  # its layers differ in a configuration within the configuration
        text_config={
            **SIZES,
            "sliding_window": 8,
            "num_hidden_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
    ),
    "biogpt": lambda: transformers.BioGptConfig(  # counts positions in the mask
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    ),
    "doge": lambda: transformers.DogeConfig(**ONE_HEAD_SIZE),  # adds to the mask it is given
    "falcon": lambda: transformers.FalconConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2),
    "bloom": lambda: transformers.BloomConfig(vocab_size=99, hidden_size=32, n_layer=1, n_head=2),  # counts positions itself
    "bamba": lambda: transformers.BambaConfig(
        **ONE_HEAD_SIZE, attn_layer_indices=[], mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=8
    ),  # carries a state along the row
    "starcoder2": lambda: transformers.Starcoder2Config(**SIZES, sliding_window=15),
    "gpt_oss": lambda: transformers.GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=2, sliding_window=8),
}


@torch.no_grad()
def hidden_states(model, inputs) -> torch.Tensor:
    return decoder_of(model)(**inputs, use_cache=False).last_hidden_state


def other(name: str, backend: str):
    """A random model of another family; skips where it has no such backend."""
    torch.manual_seed(0)
    try:
        model = transformers.AutoModelForCausalLM.from_config(OTHERS[name](), attn_implementation=backend).eval()
    except ValueError as error:
        pytest.skip(str(error))
    model.get_base_model = lambda: model  # as PEFT's models have it
    return model


def test_a_window_that_changes_nothing_is_left_out_in_other_families_too(config):
    model = other("starcoder2", "sdpa")
    for max_length, window in ((16, None), (17, 15)):
        short = dataclasses.replace(config, attn_implementation="sdpa", max_length=max_length)
        with attention.for_training(model, short):
            assert (model.config.sliding_window, model.config._attn_implementation) == (window, "training_sdpa")
        assert (model.config.sliding_window, model.config._attn_implementation) == (15, "sdpa")


def test_the_probe_for_packing_has_rows_and_padding_as_training_has_them(config, monkeypatch):
    seen = []
    monkeypatch.setattr(attention, "decoder_inputs", lambda batch, _: seen.append(batch) or {"input_ids": batch.input_ids})
    model = adapted_model(config)
    with (
        pytest.raises(UserError, match="lets a sample see its neighbor"),
        attention.for_training(model, dataclasses.replace(config, attn_implementation="sdpa", packing=True)),
    ):
        pytest.fail("it was not refused")
    assert seen[0].input_ids.shape == (2, 9) and seen[0].cu_seqlens.tolist() == [0, 4, 9, 13, 16, 18]
    assert model.training and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_families_attend_as_transformers_has_them(config, name, backend):
    model, batch = other(name, backend), ARRANGED["full"]()
    expected = hidden_states(model, {"input_ids": batch.input_ids})
    with attention.for_training(model, dataclasses.replace(config, attn_implementation=backend)):
        found = hidden_states(model, attention.decoder_inputs(batch, model.get_decoder().config))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("name", OTHERS)
def test_packing_keeps_samples_apart_in_other_families_or_is_refused(config, name, backend):
    model, samples = other(name, backend), random_samples(*LENGTHS)
    config = dataclasses.replace(config, attn_implementation=backend, packing=True)
    expected = hidden_states(model, {"input_ids": collate(samples).input_ids})
    try:
        attention.choose_attention(config, CPU, model)
        with attention.for_training(model, config):
            batch = packed(samples)
            found = hidden_states(model, attention.decoder_inputs(batch, model.get_decoder().config)).flatten(0, 1)
    except UserError as error:
        assert error.exit_code in (ExitCode.CONFIGURATION, ExitCode.ENVIRONMENT) and "packing" in str(error)
        return
    begins = [0, 17, 19, 40, 71, 80, 103, 104]  # of each sample in the flattened rows; the rest of a row is padding
    for index, begin in zip(itertools.chain(*ROWS), begins, strict=True):
        length = LENGTHS[index]
        torch.testing.assert_close(found[begin : begin + length], expected[index, :length], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_transformers_never_looks_for_packed_rows_which_waits_for_a_gpu(config, monkeypatch, backend):
    def look(position_ids):
        raise ZeroDivisionError

    model = adapted_model(config, backend)
    decoder, batches = model.get_decoder(), [arrange() for arrange in ARRANGED.values()]
    monkeypatch.setattr(transformers.masking_utils, "find_packed_sequence_indices", look)
    with pytest.raises(ZeroDivisionError):
        decoder(input_ids=batches[0].input_ids, use_cache=False)
    for batch, window in itertools.product(batches, (None, 8)):
        with attend(model, backend, window):
            hidden = decoder(**attention.decoder_inputs(batch, decoder.config), use_cache=False).last_hidden_state
        assert hidden.isfinite().all()


@pytest.mark.parametrize(
    ("backend", "window", "arrangement", "masked"),
    [
        ("sdpa", None, "padded", False),
        ("sdpa", 31, "padded", False),  # as wide as the rows
        ("sdpa", 30, "padded", True),
        ("sdpa", None, "packed", True),
        ("eager", None, "padded", True),
        ("varlen", 8, "packed", False),
        ("flash_attention_2", 8, "packed", False),
    ],
)
def test_a_mask_is_made_only_where_it_is_needed(model, backend, window, arrangement, masked):
    batch = ARRANGED[arrangement]()
    with attend(model, backend, window):
        model.config.sliding_window = window
        inputs = attention.decoder_inputs(batch, model.config)
    assert ("attention_mask" in inputs) == masked
    assert ("position_ids" in inputs) == ("cu_seq_lens_q" in inputs) == (arrangement == "packed")


def test_the_mask_to_the_letter():
    batch = collate_packed([random_samples(3, 2)])
    picture = ["".join(".x"[int(seen)] for seen in row) for row in attention.causal_mask(batch, None)[0, 0]]
    assert picture == ["x....", "xx...", "xxx..", "...x.", "...xx"]
    picture = ["".join(".x"[int(seen)] for seen in row) for row in attention.causal_mask(batch, 2)[0, 0]]
    assert picture == ["x....", "xx...", ".xx..", "...x.", "...xx"]
    picture = ["".join(".x"[int(seen)] for seen in row) for row in attention.causal_mask(collate(random_samples(4)), 3)[0, 0]]
    assert picture == ["x...", "xx..", "xxx.", ".xxx"]


# -- the kernels, with slow twins in their place ---------------------------------------------------------------------


def naive(query, key, value, ends, longest: int, scale: float, left: int, right: int, softcap: float = 0.0) -> torch.Tensor:
    """Attention inside of each piece [T of it, H, d] between `ends`; so many positions to the left and right, -1 for all."""
    ends = ends.tolist()
    assert ends[0] == 0 and ends[-1] == len(query) == len(key) == len(value)
    assert longest == max(end - start for start, end in itertools.pairwise(ends))
    outputs = []
    for start, end in itertools.pairwise(ends):
        q, k, v = (tensor[start:end].transpose(0, 1) for tensor in (query, key, value))
        ahead = torch.arange(end - start)[None, :] - torch.arange(end - start)[:, None]
        unseen = (ahead > right if right >= 0 else False) | (ahead < -left if left >= 0 else torch.zeros_like(ahead).bool())
        scores = q @ k.transpose(1, 2) * scale
        scores = (torch.tanh(scores / softcap) * softcap if softcap else scores).masked_fill(unseen, -torch.inf)
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture
def slow_kernels(monkeypatch):
    """torch's varlen_attn and package flash-attn, as far as they are called here, by their documentation; and the calls."""
    from torch.nn.attention import varlen

    calls = []

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        assert cu_seq_q is cu_seq_k and cu_seq_q.dtype == torch.int32 and max_q == max_k
        assert query.shape == key.shape == value.shape  # fewer heads of keys need enable_gqa, from torch 2.12 on
        calls.append("varlen_attn")
        return naive(query, key, value, cu_seq_q, max_q, scale, *window_size)

    def varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
                    causal=False, window_size=(-1, -1), softcap=0.0, deterministic=False):  # fmt: skip
        assert cu_seqlens_q is cu_seqlens_k and cu_seqlens_q.dtype == torch.int32 and max_seqlen_q == max_seqlen_k
        assert q.shape[1] == 2 * k.shape[1] == 2 * v.shape[1] and dropout_p == 0.0 and causal
        calls.append(("flash_attn_varlen_func", deterministic))
        k, v = (tensor.repeat_interleave(2, dim=1) for tensor in (k, v))
        return naive(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, window_size[0], 0, softcap)

    def func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, deterministic=False):
        assert q.shape[2] == 2 * k.shape[2] == 2 * v.shape[2] and dropout_p == 0.0 and causal
        calls.append(("flash_attn_func", deterministic))
        rows, length = q.shape[:2]
        ends = torch.arange(0, (rows + 1) * length, length)
        q, k, v = q.flatten(0, 1), *(tensor.flatten(0, 1).repeat_interleave(2, dim=1) for tensor in (k, v))
        return naive(q, k, v, ends, length, softmax_scale, window_size[0], 0, softcap).unflatten(0, (rows, length))

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=func, flash_attn_varlen_func=varlen_func))
    return calls


@pytest.mark.parametrize("backend", ["varlen", "flash_attention_2"])
@pytest.mark.parametrize("window", [None, 1, 8])
def test_kernels_are_told_what_the_masks_say(config, slow_kernels, backend, window):
    model = awake(config)
    for arrange in ARRANGED.values():
        batch = arrange()
        _, loss, expected = results(model, batch, attend(model, "eager", window), autocast=False)
        _, ours, found = results(model, batch, attend(model, backend, window), autocast=False)
        assert ours == pytest.approx(loss, rel=1e-6) and relative_error(found, expected) < 1e-5
    if backend == "varlen":
        assert slow_kernels == ["varlen_attn"] * 6  # two layers, three batches
    else:
        names = ["flash_attn_func", "flash_attn_func", "flash_attn_varlen_func"]
        assert slow_kernels == [(name, False) for name in names for _ in range(2)]


@pytest.mark.parametrize(
    ("family", "backend"),
    [("Gemma3Text", "varlen"), ("Cohere2", "varlen"), ("Olmo3", "flash_attention_2"), ("Gemma2", "flash_attention_2")],
)
def test_kernels_get_window_and_cap_of_each_layer(config, slow_kernels, family, backend):
    shape = getattr(transformers, f"{family}Config")(**{**SIZES, **MIXED})
    shape.attn_logit_softcapping = 0.01  # which Gemma 2 reads; so low that it has an effect
    model = small_model(config, shape)
    for arrange in ARRANGED.values():
        batch = arrange()
        _, loss, expected = results(model, batch, attend(model, "eager", 8), autocast=False)
        _, ours, found = results(model, batch, attend(model, backend, 8), autocast=False)
        assert ours == pytest.approx(loss, rel=1e-6) and relative_error(found, expected) < 1e-5
    assert len(slow_kernels) == 6


@pytest.mark.parametrize("name", ["varlen", "flash_attention_2"])
@pytest.mark.parametrize("autocast", [True, False])
def test_kernels_attend_in_autocast_s_dtype(monkeypatch, name, autocast):
    """Autocast keeps what a LayerNorm gives in fp32, and a layer without an adapter passes it on; kernels know 16 bits only."""
    from torch.nn.attention import varlen

    seen = []

    def kernel(query, key, value, *_, **__):
        seen.append((query.dtype, key.dtype, value.dtype))
        return query

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=kernel))
    query, key = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)  # [B, H, T, d]
    attend = transformers.AttentionInterface()[attention.PREFIX + name]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output, _ = attend(torch.nn.Module(), query, key, key, None, scaling=0.5)  # [B, T, H, d]
    assert output.shape == (2, 6, 4, 8) and seen == [(torch.bfloat16 if autocast else torch.float32,) * 3]


def test_flash_attn_is_told_to_be_deterministic(config, slow_kernels):
    model = awake(config, fp32=False)
    torch.use_deterministic_algorithms(True)
    try:
        for arrangement in ("full", "packed"):
            results(model, ARRANGED[arrangement](), attend(model, "flash_attention_2", None))
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(slow_kernels) == 4 and all(deterministic for _, deterministic in slow_kernels)
