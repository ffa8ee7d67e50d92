"""A base of which each rank keeps a part: the parts are those of the whole base, and every rank runs as many passes."""

import dataclasses
import json
import math
import os

import bitsandbytes
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import core_model_loading

from qlora import distributed
from qlora.config import TrainConfig
from qlora.data.batch import eval_batches, training_steps
from qlora.distributed import Ranks, shares
from qlora.errors import ExitCode, UserError
from qlora.model.load import load_base_model, load_meta_model, load_nf4_model
from qlora.model.lora import add_lora
from qlora.model.shards import shard_of
from qlora.model.targets import audit_targets
from qlora.run.explain import dtype_ledger
from qlora.speed.layers import Job, choose_layers
from tests.helpers import CPU


def nf4_linears(module):
    return [(name, each) for name, each in module.named_modules() if isinstance(each, bitsandbytes.nn.Linear4bit)]


@pytest.mark.parametrize("stored", ["bf16", "nf4", "nf4, as others save it"])
@pytest.mark.parametrize("size", [2, 3])
def test_the_parts_make_the_whole_base(config, tmp_path, monkeypatch, size, stored):
    """From a checkpoint in bf16, and from one that transformers saved in NF4, perhaps with other settings."""
    whole, source = load_nf4_model(config.model, config, "sdpa", CPU), config.model
    if stored != "bf16":
        whole.save_pretrained(tmp_path)
        source = str(tmp_path)
        if stored != "nf4":
            settings = json.loads((tmp_path / "config.json").read_text())
            settings["quantization_config"] |= {"bnb_4bit_compute_dtype": "float16", "llm_int8_skip_modules": ["lm_head"]}
            (tmp_path / "config.json").write_text(json.dumps(settings))
        whole = load_nf4_model(source, config, "sdpa", CPU)
    loaded = []
    for rank in range(size):
        monkeypatch.setattr(distributed, "ranks", lambda rank=rank: Ranks(rank, size))
        loaded.append(load_base_model(source, config, "sdpa", CPU, "nf4", sharded=True))
    for name, layer in nf4_linears(whole):
        for each in loaded:
            ours, theirs = each.get_submodule(name).weight.quant_state, layer.weight.quant_state
            for field in ("absmax", "offset", "code"):
                assert torch.equal(getattr(ours, field), getattr(theirs, field))
            assert torch.equal(ours.state2.absmax, theirs.state2.absmax) and ours.shape == theirs.shape
    for name, layer in whole.model.layers.named_children():
        shards = [shard_of(each.model.layers.get_submodule(name)) for each in loaded]
        (part_bytes,) = {len(shard.base.parts[shard.number]) for shard in shards}
        packed = torch.cat([each.weight.data.flatten() for _, each in nf4_linears(layer)])
        assert part_bytes == math.ceil(len(packed) / size)
        assert torch.equal(torch.cat([shard.base.parts[shard.number] for shard in shards])[: len(packed)], packed)
    for each in loaded:
        names = {name for name, _ in nf4_linears(whole)}
        rest = {name: tensor for name, tensor in whole.named_parameters() if name.removesuffix(".weight") not in names}
        assert all(torch.equal(each.get_parameter(name), tensor) for name, tensor in rest.items())
        assert {name for name, _ in each.named_parameters()} == {name for name, _ in whole.named_parameters()}
        buffers = dict(each.named_buffers())
        assert all(torch.equal(buffers[name], buffer) for name, buffer in whole.named_buffers())
        settings = [{**model.config.to_dict(), "_name_or_path": ""} for model in (each, whole)]
        assert settings[0] == settings[1]
        assert not any(parameter.requires_grad or parameter.is_meta for parameter in each.parameters())


def test_a_checkpoint_with_other_names_is_refused(config, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "ranks", lambda: Ranks(0, 2))
    for path in tiny.iterdir():
        (tmp_path / path.name).symlink_to(path)
    tensors = load_file(tiny / "model.safetensors")
    tensors["model.layers.1.mlp.up.weight"] = tensors.pop("model.layers.1.mlp.gate_up_proj.weight")
    (tmp_path / "model.safetensors").unlink()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 tensors, model\.layers\.1\.mlp\.gate_up_proj\.weight first") as refused:
        load_base_model(str(tmp_path), config, "sdpa", CPU, "nf4", sharded=True)
    assert refused.value.exit_code == ExitCode.ENVIRONMENT


def test_a_checkpoint_without_its_weights_is_refused(config, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "ranks", lambda: Ranks(0, 2))
    for path in tiny.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(UserError, match="the folder is not a complete model") as refused:
        load_base_model(str(tmp_path), config, "sdpa", CPU, "nf4", sharded=True)
    assert refused.value.exit_code == ExitCode.ENVIRONMENT


# -- as many passes everywhere ---------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 5000), max_size=40), st.integers(1, 9))
def test_even_shares_differ_by_one_micro_batch_at_most(sizes, ranks):
    owner = shares(sizes, ranks, even=True)
    counts = [owner.count(rank) for rank in range(ranks)]
    assert len(owner) == len(sizes) and max(counts) - min(counts) <= 1


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_rank_runs_as_many_training_passes(config, samples, packing, size):
    config = dataclasses.replace(config, gradient_accumulation_steps=3, shard_base=True, packing=packing)
    rows = [[0, 1], [2], [3, 4, 5], [6], [7, 8]] if packing else list(range(13))
    found = [list(training_steps(samples, rows, config, Ranks(rank, size), (1, 0))) for rank in range(size)]
    for steps in zip(*found, strict=True):
        here = [[batch for batch in step if batch.is_here] for step in steps]
        assert len({len(each) for each in here}) == 1
        fillers = [batch for each in here for batch in each if not batch.lines]
        assert len(fillers) == len(here[0]) * size - len([batch for batch in steps[0] if batch.lines])
        for batch in fillers:
            assert batch.num_tokens == batch.num_input_tokens == len(batch.positions) == 0
            assert (batch.cu_seqlens is not None) == packing
        # Each counts the tokens and rows of the whole step.
        assert len({sum(batch.num_tokens for batch in step) for step in steps}) == 1
        assert len({sum(len(batch.input_ids) for batch in step if batch.lines) for step in steps}) == 1


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("shard_base", [False, True])
def test_the_eval_data_is_shared_out(config, samples, size, shard_base):
    config = dataclasses.replace(config, shard_base=shard_base, packing=True)
    alone = list(eval_batches(samples, 1, config))
    found = [list(eval_batches(samples, 1, config, Ranks(rank, size))) for rank in range(size)]
    lines = sorted(line for batches in found for batch in batches for line in batch.lines)
    assert lines == sorted(line for batch in alone for line in batch.lines)
    counts = {len(batches) for batches in found}
    assert len(counts) == 1 if shard_base or len(alone) % size == 0 else len(counts) == 2
    assert sum(batch.num_tokens for batches in found for batch in batches) == sum(batch.num_tokens for batch in alone)


def test_the_ledger_counts_parts_and_buffers(config, monkeypatch):
    monkeypatch.setattr(distributed, "ranks", lambda: Ranks(1, 2))
    groups = {}
    for sharded in (False, True):
        base = load_base_model(config.model, config, "sdpa", CPU, "nf4", sharded)
        model = add_lora(base, config, audited(config), "base")
        optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
        groups[sharded] = {group.name: group.elements for group in dtype_ledger(model, optimizer)}
    whole, shared = groups[False], groups[True]
    assert 2 * shared["NF4 weights"] == whole["NF4 weights"] == shared.pop("NF4 weights, gathered")  # two layers, two buffers
    assert {**shared, "NF4 weights": 0} == {**whole, "NF4 weights": 0}


def audited(config):
    return audit_targets(load_meta_model(config.model, config), config)


def test_models_that_cannot_be_shared_are_refused():
    unmarked = transformers.CTRLConfig(vocab_size=384, n_embd=64, n_layer=2, n_head=4, dff=64)
    config = TrainConfig(shard_base=True, compile="none", gradient_checkpointing="auto", max_length=128)
    with torch.device("meta"):
        meta_model = transformers.AutoModelForCausalLM.from_config(unmarked)
    with pytest.raises(
        UserError, match="--shard-base cannot be used: transformers does not mark the layers of ctrl"
    ) as refused:
        choose_layers(config, meta_model, [], 128, CPU)
    assert refused.value.exit_code == ExitCode.CONFIGURATION


def test_one_gpu_says_that_there_is_nothing_to_share(config):
    shared = dataclasses.replace(config, shard_base=True, compile="auto", gradient_checkpointing="auto")
    meta_model = load_meta_model(config.model, config)
    lines = [choose_layers(shared, meta_model, [], 128, CPU, Job(8, 1000, ranks=size))[1] for size in (1, 2)]
    assert lines[0].endswith("--shard-base changes nothing on one GPU.") and "--shard-base" not in lines[1]


@pytest.mark.parametrize("stored", ["bf16", "nf4"])
def test_loading_reserves_and_reads_no_more_than_a_rank_keeps(config, tmp_path, monkeypatch, stored):
    """transformers reserves the memory of all weights at once, and reads ahead in threads, unless it is told otherwise."""
    source = config.model
    if stored == "nf4":
        load_nf4_model(config.model, config, "sdpa", CPU).save_pretrained(tmp_path)
        source = str(tmp_path)
    monkeypatch.setattr(distributed, "ranks", lambda: Ranks(0, 2))
    pools, original = [], core_model_loading.spawn_materialize

    def spied(pool, *arguments, **named):
        pools.append(pool)
        return original(pool, *arguments, **named)

    monkeypatch.setattr(core_model_loading, "spawn_materialize", spied)
    monkeypatch.delenv("HF_DEACTIVATE_ASYNC_LOAD", raising=False)
    model = load_base_model(source, config, "sdpa", CPU, "nf4", sharded=True)
    assert pools and set(pools) == {None} and "HF_DEACTIVATE_ASYNC_LOAD" not in os.environ
    quantizer = model.hf_quantizer
    sizes = {name: quantizer.param_element_size(model, name, each) for name, each in model.named_parameters()}
    whole = {name for name in sizes if "norm" in name or "embed" in name or "head" in name}
    assert {name for name, size in sizes.items() if size} == whole
