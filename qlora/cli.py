"""The command line. It parses before it imports torch (1 s) and transformers (3.5 s), so --help and a typo answer at once."""

import atexit
import difflib
import errno
import gc
import importlib
import os
import sys
import traceback
from types import TracebackType
from typing import Any

from qlora.commands.options import (
    DoctorOptions,
    EvaluateOptions,
    GenerateOptions,
    InspectDataOptions,
    MergeOptions,
    PlanOptions,
    ReportOptions,
)
from qlora.config import parse
from qlora.errors import CheckpointError, ConfigError, EnvironmentProblem, NonFiniteError, UserError
from qlora.run.signals import Signals
from qlora.terminal import echo, redacted_stderr


def train(argv: list[str] | None = None) -> int:
    """Parse, train, and turn what went wrong into one paragraph on stderr and an exit code.

    Args:
        argv: arguments without the program's name; None takes the process's own.

    Returns:
        0, or an ExitCode, or 130 after SIGINT (Ctrl-C), or 143 after SIGTERM.
    """
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    sys.excepthook = _print_and_leave
    atexit.register(gc.freeze)  # else the interpreter's exit looks for cycles among torch's objects for 2 s
    with Signals() as stop:
        try:
            config = parse(argv)
            debug = config.debug
            import train_loop

            train_loop.main(config, stop)
        except UserError as error:
            return _left(_told(error, debug))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            text = f"{error.filename or 'A file'} cannot be written: {error.strerror}."
            return _left(_told(CheckpointError(text, hint=stop.advice()), debug))
        except SystemExit as error:
            if not isinstance(error.code, int) or not _of_several():
                raise
            return _left(error.code)  # the first process has ended with it
        return 0
    assert stop.received is not None  # only then does the context swallow an exception
    if os.environ.get("RANK", "0") == "0":
        echo(f"Stopped by {stop.received.name}. {stop.advice()}", file=sys.stderr)
    return _left(128 + stop.received)


def _of_several() -> bool:
    """Whether torchrun has started this process beside others."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _left(code: int) -> int:
    """`code`; but one of several processes exits at once, as the interpreter's own exit waits for ranks that may be gone."""
    if _of_several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _told(error: UserError, debug: bool) -> int:
    if isinstance(error, NonFiniteError) and os.environ.get("RANK", "0") != "0":
        return error.exit_code  # the first process says the same
    if debug:
        _print_traceback(type(error), error, error.__traceback__)
    else:
        echo(f"error: {error}", file=sys.stderr)
    return error.exit_code


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Python's own traceback, with secrets masked: exception texts may quote what was sent."""
    echo("".join(traceback.format_exception(kind, error, trace)), file=sys.stderr, end="")


def _print_and_leave(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    _print_traceback(kind, error, trace)
    _left(1)


def main(argv: list[str] | None = None) -> int:
    """`python -m qlora COMMAND`: what comes before and after training.

    Args:
        argv: arguments without the program's name; None takes the process's own.

    Returns:
        0, or an ExitCode, or 130 after SIGINT (Ctrl-C), or 143 after SIGTERM.
    """
    argv = sys.argv[1:] if argv is None else argv
    sys.excepthook = _print_traceback
    with Signals() as stop:
        stop.armed = True
        try:
            return run_command(argv)
        except UserError as error:
            return _told(error, debug=False)
    assert stop.received is not None  # only then does the context swallow an exception
    echo(f"Stopped by {stop.received.name}.", file=sys.stderr)
    return 128 + stop.received


COMMANDS: dict[str, tuple[type, str]] = {  # name -> its options, and the room that does it
    "plan": (PlanOptions, "plan"),
    "doctor": (DoctorOptions, "doctor"),
    "inspect-data": (InspectDataOptions, "inspect_data"),
    "evaluate": (EvaluateOptions, "evaluate"),
    "generate": (GenerateOptions, "generate"),
    "merge": (MergeOptions, "merge"),
    "report": (ReportOptions, "report"),
}


def summary(options: type) -> str:
    """The first sentence of a command's help."""
    return str(options.__doc__).partition("\n")[0]


def overview() -> str:
    """The error for a command line without a command."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {summary(options)}" for name, (options, _) in COMMANDS.items()]
    head = (
        "usage: python -m qlora COMMAND [--help | OPTIONS]\n\nTo train, run python train_loop.py, or qlora-train. Beside it:\n"
    )
    return "\n".join([head, *lines])


def parse_command(name: str, argv: list[str]) -> Any:
    """The options of a command.

    Args:
        name: of the command.
        argv: what comes after it.

    Raises:
        SystemExit: by tyro, with 0 after --help and 2 after a wrong flag (it suggests the nearest).
        UserError: exit 2 if there is no such command, 7 if tyro cannot be imported.
    """
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        advice = f"Perhaps you meant {near[0]}." if near else f"There are {', '.join(COMMANDS)}."
        raise ConfigError(f"python -m qlora knows no command {name!r}. {advice}")
    try:
        import tyro
    except ImportError as error:  # even doctor needs it
        raise EnvironmentProblem(
            f"tyro, which reads the command line, cannot be imported ({error}).",
            hint="Install the project again: pip install -e .",
        ) from None
    required = (tyro.conf.PositionalRequiredArgs,)  # what has no default has no flag either
    with redacted_stderr():
        return tyro.cli(COMMANDS[name][0], prog=f"python -m qlora {name}", args=argv, config=required)


def run_command(argv: list[str]) -> int:
    """Carry out a command.

    Args:
        argv: its name, and what comes after it.

    Returns:
        What the process ends with.

    Raises:
        UserError: a mistake the user can mend.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(overview())
        return 0
    options = parse_command(argv[0], argv[1:])
    return int(importlib.import_module(f"qlora.commands.{COMMANDS[argv[0]][1]}").run(options))
