"""Exit codes, and the error whose text is shown to the user. Imports no torch."""

import contextlib
import enum
from collections.abc import Callable, Iterator


class ExitCode(enum.IntEnum):
    """What the process ends with; 130 (SIGINT) and 143 (SIGTERM) are the shell's."""

    CONFIGURATION = 2
    DATA = 3
    CHECKPOINT = 4
    NUMERICS = 5
    MEMORY = 6
    ENVIRONMENT = 7


class UserError(Exception):
    """A mistake that the user can correct, shown as one paragraph: what, where, the value seen, what to do.

    Attributes:
        exit_code: of the process.
    """

    exit_code: ExitCode

    def __init__(self, text: str, hint: str = ""):
        """Join the two parts of the paragraph.

        Args:
            text: what is wrong, where, and the value seen.
            hint: what to do.
        """
        super().__init__(f"{text} {hint}".rstrip())


class ConfigError(UserError):
    """Options that are wrong or exclude each other."""

    exit_code = ExitCode.CONFIGURATION


class DataError(UserError):
    """Data that cannot be read or trained on."""

    exit_code = ExitCode.DATA


class CheckpointError(UserError):
    """A run folder, checkpoint or other file that is damaged, in use, or cannot be written."""

    exit_code = ExitCode.CHECKPOINT


class NonFiniteError(UserError):
    """A loss or gradient that is not finite, or an adapter that gets no gradient."""

    exit_code = ExitCode.NUMERICS


class OutOfMemory(UserError):
    """Memory of the GPU or the host ran out."""

    exit_code = ExitCode.MEMORY


class EnvironmentProblem(UserError):
    """A package, model, GPU or network that is missing or broken."""

    exit_code = ExitCode.ENVIRONMENT


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, of whatever class, says that memory ran out: on the GPU, in cuBLAS, or on the CPU."""
    texts = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)


@contextlib.contextmanager
def user_error_on_oom(words: Callable[[str], str]) -> Iterator[None]:
    """A block in which running out of memory is an error in these words.

    Args:
        words: from the reason that the library gave to one paragraph.

    Raises:
        OutOfMemory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(words(" ".join(str(error).split())[:200])) from error
