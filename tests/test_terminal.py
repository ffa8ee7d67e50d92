"""Text for the terminal: what data, answers and file names hold cannot drive it."""

import io
import subprocess
import sys

import pytest
from rich.console import Console

from qlora.cli import train as command_line
from qlora.commands.generate import _print_all, _Streamer
from qlora.data.formats import Prompt
from qlora.data.messages import Message
from qlora.errors import ExitCode
from qlora.eval.generate import Completion
from qlora.run import explain, log
from qlora.terminal import echo, printable, say

CLIPBOARD, CLEAR = "\x1b]52;c;ZXZpbA==\x07", "\x1b[2J\x1b[H"
HOSTILE = f"a{CLIPBOARD}b{CLEAR}c"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (HOSTILE, "abc"),
        ("\x1b]0;title\x1b\\x", "x"),
        ("\x9b2Jx\x9d52;c;eA==\x9cy", "xy"),  # the same with 8-bit control characters
        ("\x1b]52;c;never ends\nnext line", "\nnext line"),
        ("\x1bPq#0\x1b\\\x1b_a\x07\x1b(B\x1bcx", "x"),
        ("red \x1b[31mred\x1b[0m\x1b", "red red"),
        ("over\rwritten\x08\x07\x00\x7f", "overwritten"),
        (
            "tab\tand\nline, \u00fcml\u00e4ut, \u65e5\u672c, \U0001f600",
            "tab\tand\nline, \u00fcml\u00e4ut, \u65e5\u672c, \U0001f600",
        ),
        ("", ""),
    ],
)
def test_escape_sequences_and_control_characters_go_and_text_stays(text, shown):
    assert printable(text) == shown


def test_secrets_are_masked(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "a-secret-of-mine")
    echo("token a-secret-of-mine and hf_" + "x" * 34)
    assert capsys.readouterr().out == "token *** and hf_***\n"


def on_a_terminal(show) -> str:
    """What a terminal gets, in color."""
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=100)
    show(console)
    return console.file.getvalue()


def test_data_and_answers_are_shown_without_their_escape_sequences(tokenizer, template, capsys):
    sample = Completion(HOSTILE, HOSTILE, HOSTILE, HOSTILE)
    row = explain.Token(1, 7, HOSTILE, True)
    shown = [
        on_a_terminal(lambda console: say(console, HOSTILE)),
        on_a_terminal(lambda console: console.print(log.sample_table(sample))),
        on_a_terminal(lambda console: console.print(explain.token_text([row]))),
        on_a_terminal(lambda console: console.print(explain.token_table([row], 1))),
    ]
    _print_all([Prompt((Message("user", HOSTILE),), "x")], {"adapter": [HOSTILE], "base": [HOSTILE]})
    _Streamer(tokenizer).on_finalized_text(HOSTILE, stream_end=True)
    shown.append(capsys.readouterr().out)
    for text in shown:
        assert "\x1b]52" not in text and "\x1b[2J" not in text and "\x07" not in text
    assert all("abc" in text for text in (*shown[:3], shown[4]))


def test_a_file_name_in_an_error_is_shown_without_its_escape_sequences(tmp_path, capsys):
    name = tmp_path / f"{HOSTILE}.jsonl"
    assert command_line(["--model", "tiny-random", "--train-file", str(name)]) == ExitCode.DATA
    errors = capsys.readouterr().err
    assert f"{tmp_path}/abc.jsonl does not exist." in errors and "\x1b" not in errors


def test_the_terminal_does_not_import_torch():
    code = "import sys, qlora.terminal; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
