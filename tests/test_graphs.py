"""What surrounds CUDA graphs, on a CPU: a stand-in runs what would be replayed. The graphs themselves: tests/test_gpu.py."""

import dataclasses
import functools
from types import SimpleNamespace

import pytest
import torch

from qlora import attention, data, graphs
from qlora.config import ExitCode, UserError
from qlora.loss import read_head, token_loss_sum
from tests.conftest import adapted_model, prepared, wake_adapters
from train_loop import train_step


class Rerun:
    """In the place of a recording: the same memory for inputs, hidden states and gradients, filled by running it again."""

    def __init__(self, forward, inputs, parameters, pool, first):
        assert first == all(parameter.grad is None for parameter in parameters)
        self.inputs = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
        self.run = forward
        with torch.enable_grad():
            hidden = self.run(**self.inputs).last_hidden_state  # [B, T, D]
            hidden.backward(torch.zeros_like(hidden))
        self.hidden, self.d_hidden = hidden.detach(), torch.zeros_like(hidden)
        self.forward, self.backward = SimpleNamespace(replay=self.replay), SimpleNamespace(replay=self.replay_backward)
        self.gradients = [parameter.grad for parameter in parameters]
        self.parameters, self.replays = parameters, 0

    def replay(self):
        with torch.enable_grad():
            self.live = self.run(**self.inputs).last_hidden_state
        self.hidden.copy_(self.live.detach())
        self.replays += 1

    def replay_backward(self):
        assert all(p.grad is gradient for p, gradient in zip(self.parameters, self.gradients, strict=True))  # a graph would
        self.live.backward(self.d_hidden)  # add there, whatever p.grad is


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(graphs, "_Recording", Rerun)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)


def run(config, samples, compile):
    """Losses and adapters of windows with two shapes, a new one in the middle, a batch filled up, and gradients that were
    None, zero, or another tensor before the window."""
    config = dataclasses.replace(config, attn_implementation="sdpa", compile=compile)
    model = adapted_model(config)
    wake_adapters(model)
    prepared(model, config, "none", compile)
    loss_sum = functools.partial(token_loss_sum, head=read_head(model))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)
    found = []
    with attention.for_training(model.train(), config):
        for number, rows in enumerate(([0, 1, 2, 3, 5], [5, 0, 1], [16, 17, 2, 3], [1, 2, 16, 17])):
            window = list(data.micro_batches(samples, rows, 2, multiple=64, least=2))
            loss, norm = train_step(model.get_decoder(), optimizer, window, loss_sum, 1e-3, 1.0)
            found.append([loss, norm, *(p.detach().clone() for p in parameters)])
            if number == 1:
                optimizer.zero_grad(set_to_none=False)
            if number == 2:
                parameters[0].grad = parameters[0].grad.clone()
    return model, found


def test_what_surrounds_a_graph_changes_no_bit(config, samples, stand_in):
    _, plain = run(config, samples, "layers")
    model, ours = run(config, samples, "graphs")
    assert all(torch.equal(x, y) for one, other in zip(ours, plain, strict=True) for x, y in zip(one, other, strict=True))
    recordings = model.get_decoder().forward.__self__.recordings
    assert len(recordings) == 2 and sum(recording.replays for recording in recordings.values()) == 9


def test_a_replay_reads_all_that_its_batch_brings_and_autocast_has_a_recording_of_its_own(config, stand_in):
    """Packed rows of the same ids and shapes, whose samples end elsewhere: nothing but positions, ends and masks differs."""
    config = dataclasses.replace(config, attn_implementation="sdpa", packing=True)
    ids = torch.randint(3, 60, (128,), generator=torch.Generator().manual_seed(0)).tolist()
    ours, plain = adapted_model(config), adapted_model(config)
    for model in (ours, plain):
        wake_adapters(model)
        prepared(model, config, "none")  # not compiled, which would take its time
    recordings = graphs.Graphs(ours.get_decoder()).recordings
    found = []
    for end in (20, 34, 20):
        cuts = [[ids[:end], ids[end:64]], [ids[64:]]]
        batch = data.collate_packed([[data.Encoded(part, part, 1) for part in row] for row in cuts], 64)
        for autocast in (True, False):
            with attention.for_training(ours, config), attention.for_training(plain, config):
                inputs = attention.decoder_inputs(batch, ours.config)
                with torch.autocast("cpu", torch.bfloat16, autocast):
                    hidden, expected = (
                        model.get_decoder()(**inputs, use_cache=False).last_hidden_state for model in (ours, plain)
                    )  # [2, 64, D] each
            assert torch.equal(hidden, expected)
            found.append(hidden.detach().clone())  # [2, 64, D]
            read = list(recordings.values())[not autocast].inputs
            tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
            assert {"input_ids", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "attention_mask"} == set(tensors)
            assert all(torch.equal(read[name], value) for name, value in tensors.items())
    assert [recording.replays for recording in recordings.values()] == [3, 3]
    assert not torch.equal(found[0], found[2]) and torch.equal(found[0], found[4])


def test_only_training_is_recorded_and_only_so_many_shapes(config, samples, stand_in, monkeypatch):
    monkeypatch.setattr(graphs, "MOST", 1)
    config = dataclasses.replace(config, attn_implementation="sdpa")
    decoder = prepared(adapted_model(config), config, "none", "graphs").get_decoder()
    recordings = decoder.forward.__self__.recordings
    ids = torch.randint(3, 60, (2, 128))  # [B, T]
    decoder.eval()(input_ids=ids, use_cache=False)
    with torch.no_grad():
        decoder.train()(input_ids=ids, use_cache=False)
    assert not recordings
    decoder(input_ids=ids, use_cache=False)
    decoder(input_ids=ids[:, :64], use_cache=False)
    assert len(recordings) == 1
    decoder(input_ids=ids, use_cache=False)
    assert next(iter(recordings.values())).replays == 2


def test_what_cannot_be_recorded_says_how_to_do_without(config, samples, stand_in, monkeypatch):
    def refuse(*_, first):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    config = dataclasses.replace(config, attn_implementation="sdpa")
    decoder = prepared(adapted_model(config), config, "none", "graphs").get_decoder()
    monkeypatch.setattr(graphs, "_Recording", refuse)
    with pytest.raises(UserError, match=r"could not be recorded as CUDA graphs\. Pass --compile layers") as refused:
        decoder(input_ids=torch.zeros(2, 128, dtype=torch.int64), use_cache=False)
    assert refused.value.exit_code == ExitCode.ENVIRONMENT
