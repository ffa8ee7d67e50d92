"""flash, sdpa and eager compared: kernels alone, the loop's own step, and whether the numbers are the same.

    python -m benchmarks.attention                        # this machine: a GPU at Phi-3-mini's shape, a CPU at the demo's
    python -m benchmarks.attention --levels kernel --lengths 2048 8192

On a CPU the peak of a cell is that of its process, loading included. A cell that cannot run is a row with the reason. Which
kernel ran is read from the profiler, never from the configuration; a cell that runs another kernel than its name says is
refused. Several runs on one card merge into one file: a cell measured again replaces the old one.

`__main__` has the options and the grid, `kernels` measures attention alone, `model` what needs a model, and `tables` shows it.
"""
