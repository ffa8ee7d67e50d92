"""What a run does not show: each sentence from a fact of the run, for the report and the model card."""

import statistics
from pathlib import Path
from typing import Any, NamedTuple

from qlora.report.record import Record

FEW_EXAMPLES, FEW_EVAL_EXAMPLES = 1000, 100
OVERFIT_RATIO = 1.02  # the last eval loss over the lowest one, from which on the difference is worth a sentence
MEMORIZED_RATIO = 2.0  # the last eval loss over the training loss


class Caveat(NamedTuple):
    """What is not shown, and the fact of the run that says so."""

    gap: str
    fact: str


def caveats(record: Record) -> list[Caveat]:
    """What a reader of the numbers of this run should not conclude from them, the gravest first."""
    return [*_of_the_course(record), *_of_the_data(record), *_of_what_is_measured(record)]


def _of_the_course(record: Record) -> list[Caveat]:
    found = []
    last, total = record.last_step, record.total_steps
    so_far = f"step {last:,}" + (f" of {total:,}" if total else "")
    if record.config["model"] == "tiny-random":
        found.append(Caveat("Anything about language", "The base model has random weights; it is there to try the program."))
    if record.status == "going":
        found.append(Caveat("The end of the run", f"It is still running, at {so_far}. Numbers and curves end there."))
    elif record.status == "stopped":
        found.append(Caveat("The end of the run", f"It stopped after {so_far}. The same command resumes from its checkpoint."))
    elif total and last < total:
        found.append(Caveat("The whole schedule", f"The run ended early, after {so_far}: the learning rate was still falling."))
    if lost := sum(row.get("loss") is None or row.get("grad_norm") is None for row in record.steps):
        fact = f"{lost} of {last:,} steps had a loss or gradient that was not finite, and changed nothing."
        found.append(Caveat("What all of the data would have done", fact))
    for event in record.run_info.history if record.run_info else []:
        changes = [f"{name} from {_known(old)} to {_known(new)}" for name, (old, new) in event.overrides.items()]
        if changes:
            fact = f"After step {event.step:,} the run continued with changed settings: {', '.join(changes)}."
            found.append(Caveat("The effect of one set of settings", fact))
    return found


def _known(value: Any) -> Any:
    """A value as others may know it: of a path of this machine the last part; a hub id has one slash and stays."""
    is_path = isinstance(value, str) and (value.startswith(("/", ".", "~")) or value.count("/") > 1 or Path(value).exists())
    return Path(value).name if is_path else value


def _of_the_data(record: Record) -> list[Caveat]:
    found = []
    train, eval_counts = record.counts
    if not record.eval_data and not record.evaluations:
        fact = "There was no eval data. The training loss also falls when the model memorizes."
        found.append(Caveat("How it answers prompts it has not seen", fact))
    elif (examples := eval_counts.get("examples")) and examples < FEW_EVAL_EXAMPLES:
        fact = f"The eval data has only {examples} examples, {eval_counts['tokens']:,} tokens. Others could give another loss."
        found.append(Caveat("A precise eval loss", fact))
    if shared := eval_counts.get("shared"):
        fact = f"{shared} of {eval_counts['examples']:,} eval examples also occur in the training data, so the loss is too low."
        found.append(Caveat("A clean eval loss", fact))
    num_examples = train.get("examples") or len(record.times_seen)
    if 0 < num_examples < FEW_EXAMPLES:
        seen = max(record.times_seen.values(), default=0)
        times = f", each seen up to {seen} times" if seen > 1 else ""
        fact = f"It was trained on {num_examples:,} examples{times}: enough to learn a format, not knowledge."
        found.append(Caveat("What it does beyond prompts like these", fact))
    if dropped := train.get("dropped"):
        limit = record.config["max_length"]
        fact = f"{dropped:,} of {train['read']:,} examples were longer than {limit:,} tokens and left out."
        found.append(Caveat("Long examples", fact))
    if cut := train.get("cut"):
        fact = f"{cut:,} examples were cut to {record.config['max_length']:,} tokens, so that they teach no ending."
        found.append(Caveat("Whole long answers", fact))
    return found


def _of_what_is_measured(record: Record) -> list[Caveat]:
    found = []
    evaluations, steps = record.evaluations, record.steps
    if patience := record.config["early_stopping_patience"]:
        fact = f"Early stopping (patience {patience}) chose the adapter by the eval loss, so this loss is optimistic."
        found.append(Caveat("An eval loss on data that decided nothing", fact))
    if len(evaluations) > 1:
        best, last = min(evaluations, key=lambda row: row["eval_loss"]), evaluations[-1]
        own = record.of_the_adapter or last
        if own["eval_loss"] > OVERFIT_RATIO * best["eval_loss"]:
            fact = f"The eval loss was {best['eval_loss']:.4f} after step {best['step']:,}, and {own['eval_loss']:.4f} "
            found.append(
                Caveat("The best adapter of the run", f"{fact}after step {own['step']:,}, whose adapter is in adapter/.")
            )
        recent = [row["loss"] for row in steps if row["epoch"] == steps[-1]["epoch"] and row.get("loss") is not None]
        training = statistics.fmean(recent) if recent else last["eval_loss"]
        if last["eval_loss"] > MEMORIZED_RATIO * training:
            fact = f"In the last epoch the training loss was {training:.4f}, the eval loss {last['eval_loss']:.4f}: "
            found.append(Caveat("Generalization versus memorization", fact + "some of the fit is to the examples themselves."))
    if record.samples and not record.evaluation:
        of = "eval" if record.eval_data else "training"
        fact = f"Answers are to {len(record.samples)} {of} prompts, greedy. A loss has the right answer so far in view."
        found.append(Caveat("How often a whole answer is right", fact))
    fact = "Only data of this kind were evaluated, so nothing says what the model has lost elsewhere."
    found.append(Caveat("What it did before and may do no longer", fact))
    fact = f"There is one run, with seed {record.config['seed']}. How far another seed would end from it is not known."
    found.append(Caveat("How much of it is chance", fact))
    where = record.environment.device if record.environment else "one machine"
    form, _, quantized = record.base_form
    others = "Merged, or in bf16, the model" if quantized else "Merged or quantized, the model"
    fact = f"All of it was computed against the base in {form} on {where}. {others} computes other numbers."
    found.append(Caveat("Other precisions", fact))
    if not record.on_gpu():
        found.append(Caveat("Speed and memory on a GPU", "The run was on a CPU; its peak is of the whole process."))
    return found
