"""What a teaching guide says about QLoRA, measured: `python -m benchmarks.guide_claims`.

Each claim is a function, and its docstring is what the guide says. Given no figures the function measures them. Verdict and
fact follow from figures, so a result file can be judged again without a measurement.
"""
