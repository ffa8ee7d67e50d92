"""Text for the terminal: secrets are masked, and nothing in it drives the terminal. Imports no torch."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO

SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
# Escape sequences of ECMA-48: operating-system commands and other strings up to their end, then colors, cursor movements
# and short ones. What is left of control characters goes too, line feed and tab excepted.
ESCAPES = re.compile(
    r"(?:\x1b[\]P^_X]|[\x9d\x90\x9e\x9f\x98])[^\x07\x1b\x9c\n]*(?:\x07|\x1b\\|\x9c)?"
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"
    r"|\x1b[ -/]*[0-~]?"
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)


def redact(text: str) -> str:
    """The text with access tokens masked: what looks like one of the hub's, and the values of the variables that hold one."""
    for secret in (os.environ.get(name, "") for name in SECRET_VARIABLES):
        if len(secret) >= 8:
            text = text.replace(secret, "***")
    return re.sub(r"\b(hf_|api_org_)[A-Za-z0-9]{30,}", r"\1***", text)  # not a folder named hf_models


def printable(text: str) -> str:
    """The text without secrets, escape sequences and control characters; line feed and tab stay.

    Data, file names and answers of a model may hold sequences that clear the screen or write to the clipboard (OSC 52).
    """
    return ESCAPES.sub("", redact(text))


def echo(text: str, file: TextIO | None = None, end: str = "\n") -> None:
    """Print text of any origin.

    Args:
        text: made printable.
        file: standard output if None.
        end: as in `print`.
    """
    print(printable(text), file=sys.stdout if file is None else file, end=end, flush=True)


@contextlib.contextmanager
def redacted_stderr() -> Iterator[None]:
    """A block whose output to stderr comes when it ends, secrets masked: tyro quotes what it does not understand."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            yield
    finally:
        print(redact(errors.getvalue()), file=sys.stderr, end="")


def say(console: Any, line: str) -> None:
    """Print one line on a rich console, above a progress bar if there is one; never wrapped, so that paths can be copied."""
    console.print(printable(line), markup=False, highlight=False, soft_wrap=True)
