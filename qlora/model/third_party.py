"""bitsandbytes, PEFT and transformers, imported so that nothing is downloaded by it and no harmless line is printed.

Rooms that need bitsandbytes or PEFT take them from here: whoever imports one of them first decides for the process.
"""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator

import huggingface_hub


@contextlib.contextmanager
def _without_kernels_package() -> Iterator[None]:
    """Hide the package `kernels`: where it is installed, importing bitsandbytes on a CPU downloads native code through it."""
    hidden = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]  # makes `import kernels` fail
    try:
        yield
    finally:
        del sys.modules["kernels"]
        if hidden is not None:
            sys.modules["kernels"] = hidden


# Harmless lines of others, each filtered by its own text: bitsandbytes on the missing kernel above and on each product in
# int8, PEFT on an old name.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))
logging.getLogger("bitsandbytes.autograd._functions").addFilter(lambda record: "inputs will be cast" not in str(record.msg))
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
with _without_kernels_package():
    import bitsandbytes
import peft  # noqa: E402  after bitsandbytes, which it imports
import transformers  # noqa: E402
from peft.tuners.lora.bnb import Linear4bit  # noqa: E402

__all__ = ["Linear4bit", "bitsandbytes", "peft", "transformers"]

transformers.utils.logging.disable_progress_bar()  # of loading; it takes those of downloads along, which are wanted
huggingface_hub.utils.enable_progress_bars()
