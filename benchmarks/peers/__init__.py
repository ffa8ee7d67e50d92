"""TRL, unsloth and this loop side by side: QLoRA steps on one model, the same samples, the same card.

    python -m benchmarks.peers                                                # a CUDA GPU: Phi-3-mini's shape
    python -m benchmarks.peers --unsloth-site FOLDER --minutes 8 --missing    # only what the file lacks
    python -m benchmarks.peers --shape-of-model demo                          # a CPU: TRL and the loop on the demo
    python -m benchmarks.report                                               # the tables and the plot

`pip install -e ".[benchmark,peers]"` brings TRL. unsloth pins other versions of everything, so install it into a folder of its
own (`pip install --target FOLDER unsloth==2026.10.9`), which comes first on the path of its cells.

Contenders: `trl` is SFTTrainer with its defaults (fp32 where nothing is quantized, sdpa, checkpointing); `trl_best` loads bf16
and flash_attention_2 where it is installed, `trl_selective` also keeps attention's outputs, `trl_no_checkpointing` keeps all,
`trl_liger...` adds liger's kernels. `unsloth_offload` is its default, which keeps checkpoints in the host's memory;
`unsloth_checkpointing` and `unsloth_none` are its other two. `ours_...` is this loop with that --gradient-checkpointing, and
`naive` is PEFT's and transformers' examples put together. Adapters r=32, alpha=64 on all linear layers.

Shapes: ROWSxLENGTHxACCUMULATION with full rows; `mixed`, 64 samples of lognormal lengths per step, padded in fours (unsloth, by
default, pads nothing); `mixed_packed`, the same packed by each contender itself, two rows of 2,048 at a time; `avro`, the
bundled examples as the demo trains them.

Each cell (contender and shape) runs in its own process; one that fails is a row with the reason. For each shape, `trl` runs
among the others, and a ratio is formed only with the `trl` of the same run. The order of contenders rotates from shape to
shape. Runs on one card merge into one file.
"""
