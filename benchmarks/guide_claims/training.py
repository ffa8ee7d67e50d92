"""Claims about training: short runs of train_loop.py on the demo, and the whole ones of demo.py."""

import json
import math
import pydoc_data.topics
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

import train_loop
from benchmarks.guide_claims.finding import Figures, Finding, Source, listed, right_if
from benchmarks.guide_claims.models import base_model, encoded, template_of
from benchmarks.harness import Cell
from benchmarks.tables import load
from qlora.commands.adapter import load_adapted, open_adapter, put_on
from qlora.commands.evaluate import score_tokens
from qlora.config import BUNDLED_EVAL, TrainConfig
from qlora.data.batch import batched
from qlora.data.template import PromptTemplate, TokenizedExample
from qlora.model import attention
from qlora.run.signals import Signals

Flags = dict[str, Any]  # of train_loop.py, where they differ from the defaults


def text_losses(model: Any, template: PromptTemplate, length: int = 512) -> list[float]:
    """Mean loss per token of the first 8 rows of the reference text that comes with Python (pydoc_data.topics, PSF license)."""
    text = "\n\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))
    ids = template.ids(text[: 64 * length])[: 8 * length]
    _, sums = score_tokens(model, [TokenizedExample(row, row, 1) for row in batched(ids, length)], batch_size=1)  # [8, 3]
    return (sums[:, 0] / sums[:, 2]).tolist()


def train(model: str, flags: Flags, epochs: int, folder: Path) -> dict[str, Any]:
    """The row of a run of train_loop.py into a folder, for a process of its own."""
    torch.set_num_threads(1)
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()}
    train_loop.main(TrainConfig(model=model, num_train_epochs=epochs, output_dir=folder, **values), Signals())
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in metrics if row["event"] == "step"]
    adapter = open_adapter(folder)
    adapted = load_adapted(adapter)
    with attention.for_training(adapted, adapter.config):
        without_dropout, _ = score_tokens(adapted, encoded(adapter.template), batch_size=2)
    return {
        "flags": flags,
        "epochs": epochs,
        "trained_parameters": sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name),
        "train_loss": [step["loss"] for step in steps],
        "grad_norm": [step["grad_norm"] for step in steps],
        "eval_loss": [row["eval_loss"] for row in metrics if row["event"] == "eval"],
        "train_loss_without_dropout": without_dropout.loss,
        "text_perplexity": math.exp(statistics.mean(text_losses(adapted, adapter.template))),
    }


def short_run(source: Source, flags: Flags) -> dict[str, Any]:
    """The run with these flags: that of the record, or a new one, which joins the record."""
    if not any(row["flags"] == flags for row in source.trainings):
        with tempfile.TemporaryDirectory() as folder:
            cell = Cell(train, source.model, flags, source.epochs, Path(folder) / "run")
            source.trainings.append(cell.result(timeout_s=3600))
    return next(row for row in source.trainings if row["flags"] == flags)


def compared(source: Source, runs: dict[str, Flags]) -> Figures:
    """Short runs by name, and how much the eval loss of the default one differs between two seeds."""
    f: Figures = {"runs": {}}
    for name, flags in runs.items():
        row = short_run(source, flags)
        f["runs"][name] = {"held_out": row["eval_loss"][-1], "before": row["eval_loss"][0]}
        f["runs"][name] |= {key: row[key] for key in ("train_loss_without_dropout", "epochs")}
    f["seeds_differ_by"] = abs(short_run(source, {})["eval_loss"][-1] - short_run(source, {"seed": 43})["eval_loss"][-1])
    return f


def eval_losses(f: Figures) -> str:
    """Eval losses of runs, and what they are to be compared with."""
    first, labels = next(iter(f["runs"].values())), {"mlp": "MLP", "all, r=12": "all at r=12"}
    labels["accidental"] = "o_proj and down_proj, which the guide's names match"
    losses = {labels.get(name, name): run["held_out"] for name, run in f["runs"].items()}
    noise = f"the one pair of seeds differs by {f['seeds_differ_by']:.4f}"
    return f"eval loss after {first['epochs']} epochs ({first['before']:.3f} before; {noise}): {listed(losses, '.4f')}"


def target_modules(source: Source, f: Figures) -> Finding:
    """Attention and MLP together show the best results."""
    f = f or compared(source, {
        "all": {},
        "attention": {"target_modules": ["qkv_proj", "o_proj"]},
        "mlp": {"target_modules": ["gate_up_proj", "down_proj"]},
        "accidental": {"target_modules": ["o_proj", "down_proj"]},
        "all, r=12": {"lora_r": 12, "lora_alpha": 24},  # about as many parameters as the accidental pair at r=32
    })  # fmt: skip
    best = min(run["held_out"] for run in f["runs"].values())
    return Finding(right_if(f["runs"]["all"]["held_out"] <= best + f["seeds_differ_by"]), eval_losses(f), f, short=True)


def dropout(source: Source, f: Figures) -> Finding:
    """Dropout of 0.1 is essential and prevents memorization."""
    f = f or compared(source, {"0.0": {"lora_dropout": 0.0}, "0.1": {}, "0.3": {"lora_dropout": 0.3}})
    gain = f["runs"]["0.0"]["held_out"] - f["runs"]["0.1"]["held_out"]
    losses = {name: run["train_loss_without_dropout"] for name, run in f["runs"].items()}
    epochs = f["runs"]["0.1"]["epochs"]  # fewer than the guide's 20 do not show what it says of those
    unsettled = f"not settled in {6 * epochs} steps: " if epochs < 20 else ""
    fact = f"{unsettled}{eval_losses(f)}; loss on the training data, dropout off: {listed(losses, '.4f')}"
    holds = gain > 2 * f["seeds_differ_by"] and losses["0.1"] > 2 * losses["0.0"]
    return Finding("depends" if unsettled else right_if(holds), fact, f, short=True)


def knowledge(source: Source, f: Figures) -> Finding:
    """The base model's knowledge is preserved."""
    if not f:
        before = text_losses(base_model(source.model, "nf4_dq"), template_of(source.model))
        f = {"before": math.exp(statistics.mean(before)), "after": short_run(source, {})["text_perplexity"]}
        f["too_high_rate"] = short_run(source, {"learning_rate": 2e-2})["text_perplexity"]
        f["change"] = f["after"] / f["before"] - 1
    fact = f"""perplexity on a text that has nothing to do with the task: {f["before"]:.2f} before, {f["after"]:.2f} after
        ({f["change"]:+.1%}); {f["too_high_rate"]:.3g} after a run with too high a rate"""
    return Finding(right_if(f["change"] < 0.02, "depends"), fact, f)


def learning_rate(source: Source, f: Figures) -> Finding:
    """LoRA needs a rate below pre-training's, such as 5e-5, and is sensitive to high ones."""
    if not f:
        f = compared(source, {f"{rate:g}": {"learning_rate": rate} for rate in (1e-5, 3e-3, 2e-2)})
        _, record = load("demo_cpu_*.json")
        f["whole"] = {f"{run['learning_rate']:g}": {"last": run["eval_loss"][-1], "right": run["tuned_right"]}
                      for run in sorted(record["runs"], key=lambda run: run["learning_rate"])}  # fmt: skip
    rates = "; ".join(f"{rate}: {run['last']:.4f}, {run['right']}" for rate, run in f["whole"].items())
    extremes = {rate: f["runs"][rate]["held_out"] for rate in ("1e-05", "0.003", "0.02")}
    fact = f"""eval loss and right answers after the guide's 20 epochs of the demo, by peak rate, one run each: {rates}.
        Extremes after 4 epochs: {listed(extremes, ".4f")} ({f["runs"]["0.02"]["before"]:.3f} before)"""
    is_enough = f["whole"]["5e-05"]["last"] <= 1.1 * min(run["last"] for run in f["whole"].values())
    is_sensitive = extremes["0.02"] > f["runs"]["0.02"]["before"]
    return Finding(right_if(is_enough and is_sensitive, "depends"), fact, f, "demo_cpu_*.json", short=True)


@torch.no_grad()
def eval_logits(model: Any, samples: list[TokenizedExample]) -> torch.Tensor:
    """[all T, V]: logits of the samples, one after the other."""
    with torch.autocast("cpu", torch.bfloat16):
        rows = [model(input_ids=torch.tensor([sample.input_ids]), use_cache=False).logits.float()[0] for sample in samples]
    return torch.cat(rows)


def merge(source: Source, f: Figures) -> Finding:
    """For deployment merge into the unquantized model."""
    if not f:
        with tempfile.TemporaryDirectory() as folder:
            trained = Cell(train, source.model, {}, source.epochs, Path(folder) / "run").result(timeout_s=3600)
            adapter = open_adapter(Path(folder) / "run")
            samples, model = encoded(adapter.template, BUNDLED_EVAL), load_adapted(adapter)
            exact, beside = eval_logits(model, samples), score_tokens(model, samples, batch_size=1)[0].perplexity
            f = {"without": {"perplexity": math.exp(trained["eval_loss"][0])}, "merged": {}, "beside": {"perplexity": beside}}
            for route, kind in (("bf16", "bf16"), ("dequantized", "nf4_dq"), ("requantized", "nf4_dq")):
                base = base_model(source.model, kind)
                merged = put_on(base.dequantize() if route == "dequantized" else base, adapter).merge_and_unload()
                f["merged"][route] = {"perplexity": score_tokens(merged, samples, batch_size=1)[0].perplexity}
                f["merged"][route]["relative"] = float((eval_logits(merged, samples) - exact).norm() / exact.norm())
    merged = f["merged"]
    routes = (f"{name} weights {m['perplexity']:.3f} (logits off by {m['relative']:.1%})" for name, m in merged.items())
    fact = f"""eval perplexity {f["without"]["perplexity"]:.3f} without the adapter, {f["beside"]["perplexity"]:.3f} with it
        beside NF4; merged into {", ".join(routes)}"""
    return Finding(right_if(merged["bf16"]["relative"] <= merged["dequantized"]["relative"], "depends"), fact, f, short=True)
