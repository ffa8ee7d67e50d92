"""What surrounds CUDA graphs, on a CPU: a stand-in runs what would be replayed. The graphs themselves: tests/test_gpu.py."""

import contextlib
import dataclasses
import functools
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from qlora.data.batch import collate, collate_packed, iter_batches
from qlora.data.template import TokenizedExample
from qlora.errors import ExitCode, UserError
from qlora.model import attention
from qlora.model.loss import read_head, token_loss_sum
from qlora.speed import graphs, lora_linear
from tests.helpers import adapted_model, decoder_of, gradients, prepared, wake_adapters
from train_loop import train_step


class Rerun(graphs._Recording):
    """In the place of a recording: the same memory for inputs, hidden states and gradients, filled by running it again."""

    def __init__(self, forward, inputs, pool):
        self.inputs = graphs.static_copies(inputs)
        self.run, self.replays, self.hidden, self.gradients = forward, 0, None, None

    def run_forward(self):
        with graphs._autocast(self.inputs), torch.enable_grad():
            self.live = self.run(**self.inputs).last_hidden_state
        self.hidden = self.live.detach().clone() if self.hidden is None else self.hidden.copy_(self.live.detach())
        self.replays += 1
        return self.hidden.detach()

    def run_backward(self, d_hidden):
        found = [parameter.grad for parameter in parameters_of(self.run)]
        self.gradients = self.gradients or found
        assert all(one is other for one, other in zip(found, self.gradients, strict=True))  # a graph would add there
        self.live.backward(d_hidden)


def parameters_of(run):
    return [parameter for parameter in run.__self__.decoder.parameters() if parameter.requires_grad]


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(graphs, "_Recording", Rerun)
    monkeypatch.setattr(graphs.Graphs, "_place", lambda _: contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "MemPool", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)


def run(model, config, samples):
    """Losses and adapters of steps with two shapes, a new one in the middle, a batch filled up, and gradients that were
    None, zero, or another tensor before the step."""
    loss_sum = functools.partial(token_loss_sum, head=read_head(model))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)
    found = []
    with attention.for_training(model.train(), config):
        for number, rows in enumerate(([0, 1, 2, 3, 5], [5, 0, 1], [16, 17, 2, 3], [1, 2, 16, 17])):
            micro_batches = list(iter_batches(samples, rows, 2, multiple=16, least=2))
            loss, norm = train_step(decoder_of(model), optimizer, micro_batches, loss_sum, 1e-3, 1.0)
            found.append([loss, norm, *(p.detach().clone() for p in parameters)])
            if number == 1:
                optimizer.zero_grad(set_to_none=False)
            if number == 2:
                parameters[0].grad = parameters[0].grad.clone()
    return found


def with_graphs(model, config):
    """A prepared model whose forward is replayed. Its layers are not compiled, which takes seconds and is seldom the point."""
    prepared(model, config, "none")
    model.accelerated.graphs = graphs.Graphs(model.accelerated._run, model.get_decoder())
    return model


def test_what_surrounds_a_graph_changes_no_bit(config, samples, stand_in):
    config = dataclasses.replace(config, attn_implementation="sdpa")
    model = adapted_model(config)
    wake_adapters(model)
    decoder = decoder_of(prepared(model, config, "none", "graphs"))
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    decoder.graphs, replayed = None, decoder.graphs  # first in the compiled layers alone, which compile once for both
    plain = run(model, config, samples)
    model.load_state_dict(start, strict=False)
    model.zero_grad()
    decoder.graphs = replayed
    ours = run(model, config, samples)
    assert all(torch.equal(x, y) for one, other in zip(ours, plain, strict=True) for x, y in zip(one, other, strict=True))
    recordings = replayed.recordings
    # Nine micro-batches of two shapes, each of which runs once before it is recorded.
    assert len(recordings) == 2 and sum(recording.replays for recording in recordings.values()) == 7


def test_a_replay_reads_all_that_its_batch_brings_and_autocast_has_a_recording_of_its_own(config, stand_in):
    """Packed rows of the same ids and shapes, whose samples end elsewhere: nothing but positions, ends and masks differs."""
    config = dataclasses.replace(config, attn_implementation="sdpa", packing=True)
    ids = torch.randint(3, 60, (128,), generator=torch.Generator().manual_seed(0)).tolist()
    ours, plain = adapted_model(config), adapted_model(config)
    for model in (ours, plain):
        wake_adapters(model)
    with_graphs(ours, config)
    prepared(plain, config, "none")
    recordings = ours.accelerated.graphs.recordings
    found = []
    for end in (40, 20, 34, 20):  # the first is not recorded
        cuts = [[ids[:end], ids[end:64]], [ids[64:]]]
        batch = collate_packed([[TokenizedExample(part, part, 1) for part in row] for row in cuts], 64)
        for autocast in (True, False):
            with attention.for_training(ours, config), attention.for_training(plain, config):
                inputs = attention.decoder_inputs(batch, ours.config)
                with torch.autocast("cpu", torch.bfloat16, autocast):
                    hidden, expected = (
                        decoder_of(model)(**inputs, use_cache=False).last_hidden_state for model in (ours, plain)
                    )  # [2, 64, D] each
            assert torch.equal(hidden, expected)
            found.append(hidden.detach().clone())  # [2, 64, D]
            hidden.sum().backward()
            if end == 40:
                assert len(recordings) == 0
                continue
            read = list(recordings.values())[not autocast].inputs
            tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
            assert {"input_ids", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "attention_mask"} == set(tensors)
            assert all(torch.equal(read[name], value) for name, value in tensors.items())
    assert [recording.replays for recording in recordings.values()] == [3, 3]
    assert not torch.equal(found[2], found[4]) and torch.equal(found[2], found[6])


def test_only_training_is_recorded_and_only_so_many_shapes(config, samples, stand_in, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 1)
    config = dataclasses.replace(config, attn_implementation="sdpa")
    decoder = decoder_of(with_graphs(adapted_model(config), config))
    recordings = decoder.graphs.recordings
    ids = torch.randint(3, 60, (2, 128))  # [B, T]
    decoder.decoder.eval()
    decoder(input_ids=ids, use_cache=False)
    decoder.decoder.train()
    with torch.no_grad():
        decoder(input_ids=ids, use_cache=False)
    assert not decoder.graphs.seen
    for shape in (ids, ids[:, :64]):  # each comes once
        decoder(input_ids=shape, use_cache=False).last_hidden_state.sum().backward()
    assert not recordings
    for shape in (ids, ids[:, :64], ids):
        decoder(input_ids=shape, use_cache=False)
        assert len(recordings) == 1
    assert next(iter(recordings.values())).replays == 2


def test_what_cannot_be_recorded_says_how_to_do_without(config, samples, stand_in, monkeypatch):
    def refuse(*_):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    config = dataclasses.replace(config, attn_implementation="sdpa")
    decoder = decoder_of(with_graphs(adapted_model(config), config))
    monkeypatch.setattr(graphs._Recording, "__init__", refuse)
    decoder(input_ids=torch.zeros(2, 128, dtype=torch.int64), use_cache=False).last_hidden_state.sum().backward()
    with pytest.raises(UserError, match=r"could not be recorded as CUDA graphs\. Pass --compile layers") as refused:
        decoder(input_ids=torch.zeros(2, 128, dtype=torch.int64), use_cache=False)
    assert refused.value.exit_code == ExitCode.ENVIRONMENT


def decoder_with_graphs(config, **changes):
    """A decoder with awake adapters in stand-ins for graphs, and its configuration."""
    config = dataclasses.replace(config, attn_implementation="sdpa", **changes)
    model = adapted_model(config)
    wake_adapters(model)
    return with_graphs(model, config), config


def test_a_gradient_from_outside_the_graphs_is_carried_into_them(config, samples, stand_in, monkeypatch):
    """One recording is allowed: in a step whose first micro-batch has another shape, the graph must add to its gradient."""
    rows = ([0, 1], [16, 17], [0, 1], [16, 17])  # shapes A, B, A, B
    config = dataclasses.replace(config, attn_implementation="sdpa")
    batches = [next(iter_batches(samples, pair, 2, multiple=16)) for pair in rows]
    assert batches[0].input_ids.shape == batches[2].input_ids.shape != batches[1].input_ids.shape
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 1)
    found = []
    for replayed in (False, True):
        model = adapted_model(config)
        wake_adapters(model)
        (with_graphs if replayed else functools.partial(prepared, policy="none"))(model, config)
        loss_sum = functools.partial(token_loss_sum, head=read_head(model))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        with attention.for_training(model.train(), config):
            for order in ([0, 0], [1, 0], [1, 2, 3, 0], [0, 1]):  # the first records A
                train_step(decoder_of(model), optimizer, [batches[index] for index in order], loss_sum, 0.0, None)
                found.append(gradients(model))
    assert len(decoder_of(model).graphs.recordings) == 1
    for plain, ours in zip(found[:4], found[4:], strict=True):
        assert all(torch.equal(gradient, plain[name]) for name, gradient in ours.items())


def test_gradients_that_zero_grad_removed_after_the_forward_pass_are_there_again(config, stand_in):
    """forward, zero_grad, backward: the graph adds to tensors that zero_grad has taken from the parameters."""
    model, _ = decoder_with_graphs(config)
    decoder, ids = decoder_of(model), torch.randint(3, 60, (2, 128))  # [B, T]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    found = []
    for late in (False, False, True):  # the second records
        optimizer.zero_grad()
        hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state  # [B, T, D]
        if late:
            optimizer.zero_grad()
        hidden.square().mean().backward()
        found.append(gradients(model))
    assert all(torch.equal(gradient, found[1][name]) and gradient.any() for name, gradient in found[2].items())
    optimizer.zero_grad()
    for _ in range(2):
        decoder(input_ids=ids[:, :64], use_cache=False).last_hidden_state.mean().backward()  # recorded without any
    assert all(p.grad is g for p, g in zip(decoder.graphs.parameters, decoder.graphs.gradients, strict=True))


def test_a_shape_is_captured_when_it_comes_again_and_runs_in_the_pool_before(monkeypatch, config):
    """With stand-ins for CUDA's graphs and streams: what is new about a shape is compiled while nothing is captured."""
    inside, passes = [], []

    @contextlib.contextmanager
    def mark(name, *_):
        inside.append(name)
        yield
        inside.pop()

    stream = SimpleNamespace(wait_stream=lambda _: None)
    graph = SimpleNamespace(replay=lambda: passes.append(("replay",)))
    for name, value in {"graph": functools.partial(mark, "capture"), "CUDAGraph": lambda: graph, "empty_cache": lambda: None,
                        "stream": functools.partial(mark, "stream"), "use_mem_pool": functools.partial(mark, "pool"),
                        "current_stream": lambda: stream, "reset_peak_memory_stats": lambda: None, "Stream": lambda: stream,
                        "MemPool": lambda: SimpleNamespace(id=(0, 1))}.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    weight = torch.nn.Parameter(torch.ones(4))

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            passes.append(tuple(inside))
            return x * weight

        @staticmethod
        def backward(ctx, d_output):
            passes.append(tuple(inside))
            return None, d_output.sum(0)

    def forward(x):
        return SimpleNamespace(last_hidden_state=Product.apply(x, weight))

    replayed = graphs.Graphs(forward, SimpleNamespace(parameters=lambda: [weight]))
    expected = [
        2 * [("stream",)],  # the first pass makes what stays
        2 * [("stream", "pool")],  # another shape
        2 * [("capture",)] + 2 * [("replay",)],  # the first shape again
        2 * [("replay",)],
        2 * [("capture",)] + 2 * [("replay",)],
        2 * [("replay",)],
    ]
    for rows, ran in zip((2, 3, 2, 2, 3, 3), expected, strict=True):
        for recording in replayed.recordings.values():
            recording.inputs["x"].zero_(), recording.d_hidden.zero_()
        replayed(x=torch.ones(rows, 4)).last_hidden_state.sum().backward()
        assert passes == ran
        passes.clear()
    last = replayed.recordings[next(reversed(replayed.recordings))]
    assert torch.equal(last.d_hidden, torch.ones(3, 4)) and torch.equal(last.inputs["x"], torch.ones(3, 4))


def test_recordings_for_another_number_of_packed_samples_compile_nothing(config, stand_in):
    """The ends of 128 and of 384 samples: tensors of two lengths, each under two names, copied for each recording."""
    config = dataclasses.replace(config, attn_implementation="sdpa", packing=True)
    model = adapted_model(config)
    wake_adapters(model)
    recordings = decoder_of(prepared(model, config, "none", "graphs")).graphs.recordings
    seen = []
    with attention.for_training(model.train(), config), torch.autocast("cpu", torch.bfloat16):
        for count, length in 2 * ((3, 64), (150, 1), (300, 1), (5, 30)):
            sample = TokenizedExample([5 + count % 7] * length, [5] * length, 1)
            batch = collate_packed([[sample] * count], 128)
            inputs = attention.decoder_inputs(batch, model.config)
            del inputs["attention_mask"]  # its size says nothing of how many samples there are
            decoder_of(model)(**inputs, use_cache=False).last_hidden_state.sum().backward()
            seen.append((len(batch.cu_seqlens), torch._dynamo.utils.counters["stats"]["unique_graphs"]))
    assert {ends for ends, _ in seen} == {128, 256, 384} and len(recordings) >= 3
    assert len({compiled for _, compiled in seen}) == 1
    for recording in recordings.values():
        assert recording.inputs["cu_seq_lens_q"] is recording.inputs["cu_seq_lens_k"]


def test_one_tensor_under_two_names_has_one_copy(stand_in, config):
    ends, other = torch.arange(3), torch.arange(3)
    copies = graphs.static_copies({"q": ends, "k": ends, "other": other, "longest": 7, "nothing": None})
    assert copies["q"] is copies["k"] is not copies["other"] and copies["longest"] == 7 and copies["nothing"] is None
    assert copies["q"] is not ends and torch.equal(copies["q"], ends)
    masks = {"full_attention": None, "sliding_attention": other}
    copied = graphs.static_copies({"mask": masks, "other": other})
    assert copied["mask"]["full_attention"] is None and copied["mask"]["sliding_attention"] is copied["other"] is not other
    key = decoder_of(decoder_with_graphs(config)[0]).graphs._key
    assert key({"mask": masks}) == key({"mask": {**masks, "sliding_attention": ends}}) != key({"mask": other})
    assert key({"mask": masks}) != key({"mask": {**masks, "full_attention": ends}})
    assert key({"q": ends, "k": ends}) == key({"q": other, "k": other}) != key({"q": ends, "k": other})


def test_a_second_forward_before_the_backward_is_an_error(config, stand_in):
    model, config = decoder_with_graphs(config)
    ids = torch.randint(3, 60, (2, 128), generator=torch.Generator().manual_seed(0))  # [B, T]
    decoder = decoder_of(model)
    decoder(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()
    for later in (ids, ids[:, :64]):  # a replay, and a pass of another shape that is not recorded
        one = decoder(input_ids=ids, use_cache=False).last_hidden_state.sum()
        other = decoder(input_ids=later, use_cache=False).last_hidden_state.sum()
        with pytest.raises(RuntimeError, match=r"A later forward pass .* Call backward\(\) before the next forward pass"):
            one.backward()
        other.backward()
    with torch.no_grad():
        decoder(input_ids=ids, use_cache=False)  # overwrites nothing
    decoder(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()


def test_a_second_backward_is_an_error(config, samples, stand_in):
    model, config = decoder_with_graphs(config)
    loss = decoder_of(model)(input_ids=torch.full((2, 128), 5), use_cache=False).last_hidden_state.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="has had its backward pass: a CUDA graph keeps nothing for a second one"):
        loss.backward()
    batch = collate(samples[:2])
    hidden = torch.randn(*batch.input_ids.shape, model.config.hidden_size, requires_grad=True)  # [2, T, D]
    loss = token_loss_sum(hidden, batch, read_head(model.eval())._replace(weight=torch.randn(384, hidden.shape[-1])))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="This loss has had its backward pass"):
        loss.backward()


def test_released_graphs_are_gone_and_the_decoder_still_runs(config, stand_in):
    model, config = decoder_with_graphs(config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    decoder, ids = decoder_of(model), torch.full((2, 128), 5)
    for _ in range(2):
        decoder(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()
    optimizer.step()
    kept = [weakref.ref(recording) for recording in decoder.graphs.recordings.values()]
    decoder.release(optimizer)
    gc.collect()
    assert kept and all(reference() is None for reference in kept)
    assert not optimizer.state and all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        assert decoder(input_ids=ids, use_cache=False).last_hidden_state.isfinite().all()


# -- hooks of autograd -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_gradient_hooks_are_refused_since_they_would_never_fire(config, stand_in, replayed, register):
    config = dataclasses.replace(config, attn_implementation="sdpa")
    model = adapted_model(config)
    decoder = decoder_of(with_graphs(model, config) if replayed else prepared(model, config, "none"))
    parameter = next(p for p in decoder.decoder.parameters() if p.requires_grad)
    hook = getattr(parameter, register)(lambda _: None)
    with pytest.raises(RuntimeError, match="1 adapter tensors have gradient hooks, which would never be called"):
        decoder(input_ids=torch.full((2, 128), 5), use_cache=False)
    hook.remove()
    assert decoder(input_ids=torch.full((2, 128), 5), use_cache=False).last_hidden_state.requires_grad


class Accelerated(torch.nn.Module):
    """The accelerated decoder as a module, which DistributedDataParallel needs."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return decoder_of(self.model)(input_ids=ids, use_cache=False).last_hidden_state


def test_distributed_data_parallel_is_refused_since_it_would_never_reduce(config, samples, tmp_path, monkeypatch):
    """Why this loop must sum gradients over ranks itself: DDP's reducer is built on hooks that do not fire here."""
    config = dataclasses.replace(config, attn_implementation="sdpa")
    model = prepared(adapted_model(config), config, "none")
    wake_adapters(model)
    batch, reduced = collate(samples[:2]), []

    def count(_, bucket):
        reduced.append(bucket.index())
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(Accelerated(model))
        wrapped.register_comm_hook(None, count)
        with pytest.raises(RuntimeError, match="DistributedDataParallel would never reduce these gradients"):
            wrapped(batch.input_ids)
        monkeypatch.setattr(lora_linear, "require_plain_gradients", lambda _: None)
        with torch.autocast("cpu", torch.bfloat16):
            wrapped(batch.input_ids).float().square().mean().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert reduced == [] and all(p.grad.any() for p in model.parameters() if p.requires_grad)
