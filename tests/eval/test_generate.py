"""Eval loss, perplexity, and greedy samples."""

import functools
import math

import peft
import pytest
import torch

from qlora.data.batch import collate, iter_batches
from qlora.data.template import IGNORED
from qlora.eval import generate as generation
from qlora.eval.generate import Sampling, generate, generate_all, sample_responses
from qlora.eval.loss import EvalResult, evaluate_loss, has_stalled
from qlora.model.loss import token_loss_sum
from tests.helpers import wake_adapters


def test_loss_is_weighted_by_tokens_and_equals_transformers_own(model, head, samples):
    rows = [samples[0], samples[1]._replace(labels=[IGNORED] * 44 + samples[1].labels[44:]), samples[2]]
    loss_sum = functools.partial(token_loss_sum, head=head)
    results = [evaluate_loss(model, iter_batches(rows, range(3), size), loss_sum) for size in (1, 2, 3)]
    total = tokens = 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for row in rows:
            batch = collate([row])
            total += model(input_ids=batch.input_ids, labels=batch.labels).loss.item() * batch.num_tokens
            tokens += batch.num_tokens
    for result in results:
        assert result.num_tokens == tokens
        assert result.loss == pytest.approx(total / tokens, rel=1e-3)
        assert result.perplexity == math.exp(result.loss)


def test_evaluation_keeps_the_mode_and_turns_dropout_off(config, samples):
    import dataclasses

    from qlora.model.loss import read_head
    from tests.helpers import adapted_model

    model = adapted_model(dataclasses.replace(config, lora_dropout=0.5))
    wake_adapters(model)
    loss_sum = functools.partial(token_loss_sum, head=read_head(model))
    batches = list(iter_batches(samples, range(4), 2))
    state = torch.get_rng_state()
    losses = {evaluate_loss(model, batches, loss_sum).loss for _ in range(2)}
    assert len(losses) == 1 and model.training and torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    evaluate_loss(model, batches, loss_sum)
    assert not model.training


def test_an_overflowing_perplexity_is_large_not_an_error(model, samples):
    result = evaluate_loss(
        model, iter_batches(samples, range(2), 2), lambda hidden, batch: torch.tensor(1e6 * batch.num_tokens)
    )
    assert result.loss == 1e6 and 1e300 < result.perplexity < math.inf


@pytest.mark.parametrize(
    ("losses", "patience", "stalled"),
    [
        ([3, 2, 1], 1, False),
        ([3, 2, 2], 1, True),  # as low is not lower
        ([3, 2, 2.5], 2, False),
        ([3, 2, 2.5, 2.1], 2, True),
        ([3, 2, 2.5, 1.9], 2, False),
        ([3, math.nan], 1, True),
        ([math.nan, 3], 1, False),
        ([1, 2, 3, 4], None, False),
        ([], 1, False),
    ],
)
def test_patience_is_counted_in_evaluations_since_the_lowest(losses, patience, stalled):
    evaluations = {10 * step: EvalResult(loss, 0.0, 1) for step, loss in enumerate(losses)}
    assert has_stalled(evaluations, patience) is stalled


def test_a_batch_generates_what_each_prompt_generates_alone(model, tokenizer, template):
    wake_adapters(model)
    prompts = [tokenizer(text).input_ids for text in ("Create an AVRO schema", "a", '"name": "id"')]
    together = generate(model, prompts, template, max_new_tokens=8)
    alone = [generate(model, [prompt], template, max_new_tokens=8)[0] for prompt in prompts]
    assert together == alone and model.training


def test_generation_is_greedy_and_stops_at_the_stop_token(model, tokenizer, template):
    model.generation_config.repetition_penalty = 1.5  # as some models bring along
    prompt = tokenizer("Create an AVRO").input_ids
    ids = list(prompt)
    with torch.no_grad():
        model.eval()
        for _ in range(6):
            ids.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
        model.train()
    new = ids[len(prompt) :]
    assert generate(model, [prompt], template, max_new_tokens=6) == [tokenizer.decode(new, skip_special_tokens=True)]
    stopped = generate(model, [prompt], template._replace(stop_id=new[3]), max_new_tokens=6)
    first = new.index(new[3])
    assert stopped == [tokenizer.decode(new[: first + 1], skip_special_tokens=True)]


def test_many_prompts_keep_their_order_in_batches_by_length(model, tokenizer, template, monkeypatch):
    wake_adapters(model)
    prompts = [tokenizer(text).input_ids for text in ("Create an AVRO schema for it", "a", '"name": "id"', "Create", "an AVRO")]
    seen = []
    answer = generation._answer
    monkeypatch.setattr(generation, "_answer", lambda *a: seen.extend([*map(len, batch)] for batch in a[1]) or answer(*a))
    together = generate_all(model, prompts, template, 6, batch_size=2)
    lengths = sorted(map(len, prompts))
    monkeypatch.undo()
    assert seen == [lengths[:2], lengths[2:4], lengths[4:]]
    assert together == [generate(model, [prompt], template, 6)[0] for prompt in prompts]


def test_sampling_is_seeded_and_greedy_is_not_moved_by_the_seed(model, template):
    wake_adapters(model)
    answers = []
    hot = Sampling(temperature=5.0)
    for seed, sampling in ((3, hot), (3, hot), (4, hot), (3, None), (4, None)):
        torch.manual_seed(seed)
        answers.append(generate(model, [[5, 6, 7]], template, 12, sampling)[0])
    assert answers[0] == answers[1] != answers[2] and answers[3] == answers[4] != answers[0]


def test_sampling_is_cut_to_what_is_asked_for_whatever_the_model_says(model, template, monkeypatch):
    model.generation_config.top_k, model.generation_config.temperature = 1, 0.3
    seen = []
    base = model.get_base_model()
    prepare = base._prepare_generation_config
    monkeypatch.setattr(base, "_prepare_generation_config", lambda *a, **k: seen.append(prepare(*a, **k)) or seen[-1])
    for sampling in (Sampling(), Sampling(0.7, top_p=0.9, top_k=40)):
        generate(model, [[5, 6, 7]], template, 2, sampling)
    used = [(settings.do_sample, settings.temperature, settings.top_p, settings.top_k) for settings, _ in seen]
    assert used == [(True, 1.0, 1.0, 0), (True, 0.7, 0.9, 40)]


def test_samples_put_base_and_tuned_side_by_side(model, template, examples):
    wake_adapters(model, scale=1.0)
    samples = sample_responses(model, examples[:2], template)
    assert [sample.prompt for sample in samples] == [example.prompt[-1].content for example in examples[:2]]
    assert [sample.reference for sample in samples] == [example.response for example in examples[:2]]
    assert all(sample.base != sample.tuned for sample in samples)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    again = sample_responses(model, examples[:2], template)
    assert [s.tuned for s in again] == [s.base for s in again] == [s.base for s in samples]
    layers = [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    assert len(layers) == 8 and not any(layer.disable_adapters for layer in layers)
