"""The command line. It parses before it imports torch (1 s) and transformers (3.5 s), so --help and a typo answer at once."""

import sys

from qlora.config import ExitCode, UserError, parse


def train(argv: list[str] | None = None) -> int:
    """Parse, train, and turn what went wrong into one paragraph on stderr and an exit code.

    Args:
        argv: arguments without the program's name; None takes the process's own.

    Returns:
        0, or an ExitCode, or 130 after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    try:
        config = parse(argv)
        debug = config.debug
        import train_loop

        train_loop.main(config)
    except UserError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("Interrupted. Checkpoints of finished epochs, if any, are in the run folder.", file=sys.stderr)
        return 130
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError" or debug:
            raise
        advice = "Try --per-device-train-batch-size 1, a smaller --max-length, or --gradient-checkpointing full."
        print(f"error: The GPU ran out of memory. {advice} ({error})", file=sys.stderr)
        return ExitCode.MEMORY
    return 0


if __name__ == "__main__":
    raise SystemExit(train())
