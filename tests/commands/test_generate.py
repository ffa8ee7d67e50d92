"""python -m qlora generate, on the tiny model: a prompt, a file, a chat, and what is refused."""

import io
import json

import pytest

from qlora.cli import main
from qlora.commands import generate
from qlora.data.formats import read_prompts
from qlora.errors import UserError

SHORT = ["--max-new-tokens", "6"]


def answers(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_prompt_a_file_and_a_chat_give_the_same_answer(run, tmp_path, capsys, monkeypatch):
    out, file = tmp_path / "out.jsonl", tmp_path / "prompts.txt"
    assert main(["generate", str(run), *SHORT, "--prompt", "Say a", "--compare", "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    (one,) = answers(out)
    assert one["prompt"] == "Say a" and one["base"] != one["adapter"]
    assert shown == f"[base]\n{one['base']}\n[adapter]\n{one['adapter']}\n"
    file.write_text("\nSomething longer than the other\nSay a\n")
    assert main(["generate", str(run), *SHORT, "--prompts-file", str(file), "--compare", "--json", str(out)]) == 0
    assert capsys.readouterr().out.count("[adapter]\n") == 2
    assert [row["prompt"] for row in answers(out)] == ["Something longer than the other", "Say a"]
    assert answers(out)[1] == one
    monkeypatch.setattr("sys.stdin", io.StringIO("Say a\n\nSay a\n/reset\nSay a\n"))
    assert main(["generate", str(run), *SHORT]) == 0
    first, second, again = capsys.readouterr().out.split("\n")[:3]
    assert first == again == one["adapter"] and second != first  # the second turn saw the first


def test_seeds_and_sampling_flags_count(run, tmp_path):
    found = []
    for flags in (["--seed", "1"], ["--seed", "1"], ["--seed", "2"], ["--seed", "1", "--top-k", "2"]):
        out = tmp_path / "out.jsonl"
        drawn = ["--temperature", "5", *flags]
        assert main(["generate", str(run), *SHORT, "--prompt", "Say a", "--json", str(out), *drawn]) == 0
        found.append(answers(out)[0]["adapter"])
    assert found[0] == found[1] and len({found[0], found[2], found[3]}) == 3


def test_the_coldest_temperature_and_the_largest_seed_draw(run, capsys):
    drawn = ["--temperature", "0.001", "--seed", str(2**63 - 1)]
    assert main(["generate", str(run), *SHORT, "--prompt", "Say a", *drawn]) == 0
    cold = capsys.readouterr().out
    assert main(["generate", str(run), *SHORT, "--prompt", "Say a"]) == 0
    assert cold == capsys.readouterr().out


def test_int8_is_another_base(run, capsys, monkeypatch):
    seen = []
    load = generate.load_adapted
    monkeypatch.setattr(generate, "load_adapted", lambda adapter, precision: seen.append(precision) or load(adapter, precision))
    assert main(["generate", str(run), *SHORT, "--prompt", "Say a", "--int8"]) == 0
    assert seen == ["int8"] and capsys.readouterr().out.strip()


def test_a_chat_goes_on_after_a_line_that_is_too_long(run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("much too long " * 2000 + "\nSay a\n"))
    assert main(["generate", str(run), *SHORT]) == 0
    shown = capsys.readouterr()
    assert "more than the model's positions" in shown.err and "/reset begins another chat" in shown.err and shown.out.strip()


def test_a_chat_goes_on_after_an_empty_answer_without_that_line(run, capsys, monkeypatch):
    asked, answers = [], iter(["one", " \n", "three", "four"])
    encode = generate.prompt_ids

    def seen(prompt, *rest):
        asked.append([(message.role, message.content) for message in prompt.messages])
        return encode(prompt, *rest)

    monkeypatch.setattr(generate, "prompt_ids", seen)
    monkeypatch.setattr(generate, "streamed", lambda *_: {"adapter": next(answers)})
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\nc\n/reset\nd\n"))
    assert main(["generate", str(run), *SHORT]) == 0
    first = [("user", "a"), ("assistant", "one")]
    assert asked == [first[:1], [*first, ("user", "b")], [*first, ("user", "c")], [("user", "d")]]
    assert capsys.readouterr().err.count("answer is empty") == 1


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--prompt", " "], 3, "--prompt: prompt: is empty"),
        (["--prompt", "a", "--prompts-file", "b"], 2, "both given"),
        (["--prompts-file", "none.txt"], 3, "none.txt does not exist"),
        (["--prompts-file", "EMPTY"], 3, "holds no prompt"),
        (["--prompt", "a", "--temperature", "-1"], 2, "--temperature -1"),
        (["--prompt", "a", "--temperature", "nan"], 2, "--temperature nan"),
        (["--prompt", "a", "--temperature", "inf"], 2, "--temperature inf"),
        (["--prompt", "a", "--temperature", "1e-6"], 2, "at least 0.001, as logits over less overflow; or 0, which is greedy"),
        (["--prompt", "a", "--temperature", "1", "--top-p", "1.5"], 2, "--top-p 1.5"),
        (["--prompt", "a", "--temperature", "1", "--top-k", "0"], 2, "--top-k 0"),
        (["--prompt", "a", "--top-k", "5"], 2, "no effect without --temperature"),
        (["--json", "x.jsonl"], 2, "a chat is not saved"),
        (["--prompt", "a", "--max-new-tokens", "100000"], 3, "--prompt: "),
    ],
)
def test_mistakes_are_told_before_weights_are_loaded(run, tmp_path, monkeypatch, capsys, flags, code, words):
    monkeypatch.setattr(generate, "load_adapted", None)  # it must not come to that
    (tmp_path / "EMPTY").touch()
    flags = [str(tmp_path / "EMPTY") if flag == "EMPTY" else flag for flag in flags]
    assert main(["generate", str(run), *flags]) == code
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_prompts_are_read_from_rows_with_and_without_answers(tmp_path):
    path = tmp_path / "prompts.jsonl"
    turns = [{"role": "user", "content": "d"}, {"role": "assistant", "content": "e"}, {"role": "user", "content": "f"}]
    rows = [{"instruction": "a"}, {"prompt": "b", "completion": "x"}, {"messages": turns}, {"messages": turns[:2]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_prompts(path)
    assert [prompt.messages[-1].content for prompt in found] == ["a", "b", "f", "d"]
    assert [len(prompt.messages) for prompt in found] == [1, 1, 3, 1]
    assert [prompt.where for prompt in found] == [f"{path}:{line}" for line in range(1, 5)]
    for row, words in (({"txt": "a"}, "no known column"), ({"instruction": 3}, "valid string"), ([1], "JSON object")):
        path.write_text(json.dumps(row))
        with pytest.raises(UserError, match=words):
            read_prompts(path)


def test_prompts_of_other_columns(run, tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"q": "Say a", "history": ["x"]}) + "\n")
    flags = ["generate", str(run), *SHORT, "--prompts-file", str(path)]
    assert main([*flags, "--columns", "instruction=q"]) == 3
    assert "column 'history' looks like part of a prompt" in capsys.readouterr().err
    assert main([*flags, "--columns", "instruction=q", "--ignore-columns", "history"]) == 0
    assert "> Say a" in capsys.readouterr().out
