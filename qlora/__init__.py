"""The rooms behind train_loop.py, each read once.

config.py        options: flags, YAML, checks of values
data.py          JSONL line -> Example -> Batch: formatting, masking, collation, seeded order
model.py         tokenizer, NF4 loading, adapters, the audit of LoRA targets
attention.py     which attention runs, why, and the sliding window
loss.py          token_loss_sum: chunked head and cross-entropy over trained positions
evaluate.py      held-out loss and perplexity, greedy samples
checkpoint.py    checkpoints of the loop, the final adapter
tracking.py      metrics.jsonl, TensorBoard, progress
memory.py        measured peak
demo.py          the embedded default: demo model and the tiny random model
__main__.py      the command line: parse first, import later, errors to exit codes
"""
