"""The command line. It parses before it imports torch (1 s) and transformers (3.5 s), so --help and a typo answer at once."""

import errno
import sys
import traceback
from types import TracebackType

from qlora import commands
from qlora.config import ExitCode, UserError, parse, redact
from qlora.signals import Signals


def train(argv: list[str] | None = None) -> int:
    """Parse, train, and turn what went wrong into one paragraph on stderr and an exit code.

    Args:
        argv: arguments without the program's name; None takes the process's own.

    Returns:
        0, or an ExitCode, or 130 after SIGINT (Ctrl-C), or 143 after SIGTERM.
    """
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    sys.excepthook = _print_traceback
    with Signals() as stop:
        try:
            config = parse(argv)
            debug = config.debug
            import train_loop

            train_loop.main(config, stop)
        except UserError as error:
            return _told(error, debug)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            text = f"{error.filename or 'A file'} cannot be written: {error.strerror}. {stop.advice()}"
            return _told(UserError(ExitCode.CHECKPOINT, text), debug)
        return 0
    assert stop.received is not None  # only then does the context swallow an exception
    print(f"Stopped by {stop.received.name}. {redact(stop.advice())}", file=sys.stderr)
    return 128 + stop.received


def _told(error: UserError, debug: bool) -> int:
    if debug:
        _print_traceback(type(error), error, error.__traceback__)
    else:
        print(f"error: {redact(str(error))}", file=sys.stderr)
    return error.exit_code


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Python's own traceback, with secrets masked: exception texts may quote what was sent."""
    print(redact("".join(traceback.format_exception(kind, error, trace))), file=sys.stderr, end="")


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
            return commands.run(argv)
        except UserError as error:
            return _told(error, debug=False)
    assert stop.received is not None  # only then does the context swallow an exception
    print(f"Stopped by {stop.received.name}.", file=sys.stderr)
    return 128 + stop.received


if __name__ == "__main__":
    raise SystemExit(main())
