"""The map: what train_loop.py is built on. Modules import only from folders above their own.

config.py, errors.py   options (flags, YAML, checks of values); exit codes and errors; neither imports torch
terminal.py            text for the terminal, without secrets and escape sequences
cache.py               where demo models, tokenized data and compiled kernels are kept
checksum.py            whether two tensors are the same, on their device
validation.py          checks of values from files, by pydantic models
distributed.py         several processes, each on a GPU: who computes what, sums, stopping together
data/                  from files to micro-batches: sources (read, kinds, tables), formats, messages, template, dataset, batch
model/                 NF4 loading, LoRA adapters, attention, loss, optimizer, the demo model
speed/                 checkpointing, compilation, CUDA graphs, the fused NF4 layer, memory
eval/                  loss, completions and scores on the eval data
run/                   run folder, checkpoints, metrics, signals
report/                report.html, plots, model card
commands/              one module per `python -m qlora COMMAND`
cli.py, __main__.py    the command line: parse first, import later, errors to exit codes
"""
