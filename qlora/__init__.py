"""The rooms behind train_loop.py, each read once.

config.py        options: flags, YAML, checks of values
data.py          JSONL line -> Example -> Batch: formatting, masking, collation, seeded order
libraries.py     bitsandbytes, PEFT and transformers without what they download and print
model.py         tokenizer, NF4 loading, adapters, the audit of LoRA targets
nf4_linear.py    an NF4 layer with its adapter, as one operator
dequantize.py    NF4 to bf16 in one launch
layers.py        what layers keep for backward and compute again, and whether they are compiled
graphs.py        the decoder's forward and backward, recorded once and replayed as CUDA graphs
attention.py     which attention runs, why, and the sliding window
loss.py          token_loss_sum: chunked head and cross-entropy over trained positions
cross_entropy.py cross-entropy and its gradient in one launch
adapter.py       a trained adapter and its base, from whatever folder: found, checked, loaded
evaluate.py      held-out loss and perplexity, answers to prompts
scores.py        how good answers are, and how sure that is
compare.py       python -m qlora evaluate: base and adapter side by side
generate.py      python -m qlora generate: a prompt, a file, a chat
merge.py         python -m qlora merge: adapter and base as one model, and what that changes
export_onnx.py   a merged model as ONNX, compared with torch
optimizer.py     AdamW, with moments in fp32 or in 8 bits
guards.py        what ends a run: no first gradient, a loss that is not finite
checkpoint.py    files and folders that are whole or not there; the state of a run in them
run_folder.py    one process at a time, what it goes on from, and whether it may
signals.py       SIGINT and SIGTERM
tracking.py      metrics.jsonl, TensorBoard, progress
teaching.py      what --explain shows: dtypes and bytes, trained and masked tokens, gradients by module
memory.py        measured peak, an estimate, the probe, what to try when it does not suffice
demo.py          the embedded default: demo model and the tiny random model
record.py        what a run folder tells, read without changing anything
report.py        report.html of a run
plots.py         its curves, as SVG and PNG
caveats.py       what a run does not show
model_card.py    adapter/README.md, filled in from the run
rendering.py     templates filled in
commands.py      the options of python -m qlora COMMAND
inspect_data.py  lengths, duplicates, leaks and padding of the data, and its tokens
plan.py          what a run needs of memory, and how to make it fit
doctor.py        what of this machine works
__main__.py      the command line: parse first, import later, errors to exit codes
"""
