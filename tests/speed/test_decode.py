"""One-token forwards behind a KV cache of fixed size: the same answers as transformers' own generate, its slow twin."""

import copy
from types import SimpleNamespace

import pytest
import torch

from qlora.eval import generate as generation
from qlora.eval.generate import Sampling, generate, generate_all, sample_responses
from qlora.speed import decode, lora_linear
from tests.helpers import to_fp32, wake_adapters

PROMPTS = ("Create an AVRO schema for it", "a", '"name": "id"', "Create", "an AVRO")


@pytest.fixture
def both_ways(model, template, monkeypatch):
    """Calls a function twice, with transformers' loop and with ours, which elsewhere than on a GPU runs unrecorded."""
    wake_adapters(to_fp32(model), scale=0.5)  # in bf16 a tie would turn now and then

    def call(function):
        answers = []
        for reason in ("not now", None):
            monkeypatch.setattr(generation, "decode_unavailable_reason", lambda _, reason=reason: reason)
            torch.manual_seed(7)
            answers.append(function())
        return answers

    return call


def test_a_cpu_and_layers_in_8_bits_say_why_they_are_not_recorded(model):
    assert decode.decode_unavailable_reason(model) == "no CUDA GPU"


@pytest.mark.parametrize("sampling", [None, Sampling(2.0), Sampling(0.9, top_p=0.8, top_k=20)])
def test_answers_are_those_of_transformers(model, tokenizer, template, both_ways, sampling):
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    theirs, ours = both_ways(lambda: generate(model, prompts, template, 10, sampling))
    assert theirs == ours and len(set(ours)) == 5 and model.training
    theirs, ours = both_ways(lambda: generate_all(model, prompts, template, 10, 2, None))
    assert theirs == ours


class Streamer:
    """Keeps what it is given."""

    def __init__(self):
        self.seen = []

    def put(self, value):
        self.seen += value.flatten().tolist()

    def end(self):
        self.seen.append("end")


def test_an_answer_ends_at_its_stop_and_the_others_continue(model, tokenizer, template, both_ways):
    prompts = [tokenizer(text).input_ids for text in PROMPTS[:2]]
    streamer = Streamer()
    both_ways(lambda: generate(model, prompts[:1], template, 8, None, streamer))
    new = streamer.seen[len(prompts[0]) : len(prompts[0]) + 8]
    stopping = template._replace(stop_id=new[2])
    theirs, ours = both_ways(lambda: generate(model, prompts, stopping, 8))
    end = new.index(new[2]) + 1
    padding = [new[2]] * (8 - end)  # with the stop token, which is not special here, so that it is not left out
    assert theirs == ours and ours[0] == tokenizer.decode(new[:end] + padding)
    assert ours[1] == both_ways(lambda: generate(model, prompts, template, 8))[1][1]


def test_where_greedy_tokens_differ_in_bf16_both_candidates_are_as_good(model, tokenizer, template, monkeypatch):
    """The first difference of each answer, judged by the same weights in fp32."""
    wake_adapters(model, scale=0.5)
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    ids_only = template._replace(tokenizer=SimpleNamespace(batch_decode=lambda ids, **_: ids.tolist()), stop_id=383)
    found = []
    for reason in ("not now", None):
        monkeypatch.setattr(generation, "decode_unavailable_reason", lambda _, reason=reason: reason)
        found.append(generate(model, prompts, ids_only, 24))
    judge, differences = to_fp32(copy.deepcopy(model)).eval(), 0
    for prompt, theirs, ours in zip(prompts, *found, strict=True):
        if theirs == ours:
            continue
        differences += 1
        at = next(index for index, pair in enumerate(zip(theirs, ours, strict=True)) if pair[0] != pair[1])
        with torch.no_grad():
            logits = judge(input_ids=torch.tensor([prompt + theirs[:at]])).logits[0, -1]  # [V]
        rounding = 2**-8 * logits.abs().max()  # of a logit in bf16
        assert abs(logits[theirs[at]] - logits[ours[at]]) < 4 * rounding
        assert torch.stack([logits[theirs[at]], logits[ours[at]]]).min() > logits.max() - 4 * rounding
    print(f"{differences} of {len(prompts)} answers differ")


def test_a_sliding_window_hides_what_is_too_far_away(model, tokenizer, template, both_ways):
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    _, wide = both_ways(lambda: generate(model, prompts, template, 10))
    model.config.sliding_window = 4
    theirs, ours = both_ways(lambda: generate(model, prompts, template, 10))
    assert theirs == ours != wide


def test_tokens_are_streamed(model, template, both_ways):
    def streamed():
        streamer = Streamer()
        return generate(model, [[5, 6, 7]], template, 4, None, streamer), streamer.seen

    theirs, ours = both_ways(streamed)
    assert theirs == ours and ours[1][:3] == [5, 6, 7] and ours[1][-1] == "end" and len(ours[1]) == 8


def test_base_and_adapter_answer_in_one_batch(model, template, examples, both_ways, monkeypatch):
    monkeypatch.setattr(generation, "MAX_SAMPLE_TOKENS", 2)  # later a tie may turn: one is rounded another way
    monkeypatch.setattr(generation, "MAX_SAMPLE_S", 600.0)
    theirs, ours = both_ways(lambda: sample_responses(model, examples[:2], template))
    assert theirs == ours and all(sample.base != sample.tuned for sample in ours)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_rows_without_the_adapter_have_the_logits_of_the_base(model):
    wake_adapters(model)
    ids = torch.tensor([[5, 6, 7], [8, 9, 10], [5, 6, 7]])  # [3, T]
    model.eval()
    with torch.no_grad():
        with decode.adapters_by_row(model, torch.tensor([True, True, False])):
            mixed = model(input_ids=ids).logits  # [3, T, V]
        tuned = model(input_ids=ids).logits
        with model.disable_adapter():
            base = model(input_ids=ids).logits
    assert torch.equal(mixed[:2], tuned[:2]) and torch.equal(mixed[2], base[2]) and not torch.equal(mixed[0], mixed[2])


@pytest.mark.parametrize("autocast", [False, True])
def test_layers_that_answer_compute_what_peft_s_do(model, autocast, monkeypatch):
    """In fp32 up to rounding, under autocast as near as bf16 comes; with the adapter off, and after the block, PEFT's bits."""
    wake_adapters(to_fp32(model), scale=0.5)
    ids = torch.tensor([[5, 6, 7], [8, 9, 10], [5, 6, 7]])  # [3, T]
    model.eval()
    on = torch.tensor([True, True, False])

    answered = []
    answer = lora_linear.LoRALinear._answer
    monkeypatch.setattr(lora_linear.LoRALinear, "_answer", lambda *of: answered.append(of) or answer(*of))

    def logits():
        return model(input_ids=ids).logits.float()  # [3, T, V]

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, autocast):
        with decode.adapters_by_row(model, on):
            theirs = logits()
        tuned = logits()
        with lora_linear.answering(model), decode.adapters_by_row(model, on):
            ours = logits()
            with model.disable_adapter():
                base = logits()
        assert torch.equal(logits(), tuned)
        with model.disable_adapter():
            assert torch.equal(logits(), base)
    within = {"rtol": 0.05, "atol": 0.05} if autocast else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(ours, theirs, **within)
    torch.testing.assert_close(ours[2], base[2], **within)
    assert (ours[0] - ours[2]).abs().max() > 0.5 and len(answered) == 4 * len(model.get_decoder().layers)
