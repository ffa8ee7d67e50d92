"""Forms of rows: each means what its twin in `messages` says, and no column of a prompt is left out in silence."""

import dataclasses
import io
import json

import pytest
from rich.console import Console

from qlora.cli import main
from qlora.config import BUNDLED_TRAIN, TrainConfig, parse
from qlora.data.dataset import check_files, encode_all, encode_files
from qlora.data.formats import (
    NO_OPTIONS,
    ColumnOptions,
    Example,
    as_prompt,
    check_source,
    make_plan,
    read_examples,
    read_prompts,
    read_row,
)
from qlora.data.template import IGNORED, encode, encode_prompt, load_template
from qlora.errors import ConfigError, DataError, ExitCode, UserError
from tests.data.chat_templates import with_template

PAIR = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
LONG = [{"role": "user", "content": "q\n\nmore"}, PAIR[1]]
WITH_SYSTEM = [{"role": "system", "content": "s"}, *PAIR]
FOUR = [*PAIR, {"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}]
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


def example_of(row: dict, options: ColumnOptions = NO_OPTIONS) -> Example:
    return read_row(row, make_plan(row, None, options, "file:1"), 1, "file:1", options)


def form_of(tmp_path, *rows: dict, options: ColumnOptions = NO_OPTIONS) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(check_source(path, "train", options))


FORMS = [
    ({"instruction": "q", "output": "a"}, "instruction/output", PAIR),
    ({"instruction": "q", "input": "", "output": "a"}, "instruction/input/output", PAIR),
    ({"instruction": "q", "input": None, "output": "a"}, "instruction/input/output", PAIR),
    ({"instruction": "q", "input": "more", "output": "a"}, "instruction/input/output", LONG),
    ({"instruction": "q", "input": "more", "output": "a", "text": "x"}, "instruction/input/output (ignored: text)", LONG),
    ({"instruction": "q", "context": "more", "response": "a", "category": "x"},
     "instruction/context/response (ignored: category)", LONG),
    ({"instruction": "q", "input": "more", "response": "a"}, "instruction/input/response", LONG),
    ({"instruction": "q", "response": "a"}, "instruction/response", PAIR),
    ({"prompt": "q", "completion": "a"}, "prompt/completion", PAIR),
    ({"prompt": PAIR[:1], "completion": PAIR[1:]}, "prompt/completion", PAIR),
    ({"prompt": WITH_SYSTEM[:2], "completion": "a"}, "prompt/completion", WITH_SYSTEM),
    ({"prompt": "q", "completion": PAIR[1:]}, "prompt/completion", PAIR),
    ({"question": "q", "answer": "a"}, "question/answer", PAIR),
    ({"messages": PAIR}, "messages", PAIR),
    ({"messages": PAIR, "prompt": "q", "prompt_id": 1}, "messages (ignored: prompt, prompt_id)", PAIR),
    ({"conversations": SHAREGPT}, "conversations", PAIR),
    ({"conversations": [{"from": "system", "value": "s"}, *SHAREGPT]}, "conversations", WITH_SYSTEM),
    ({"conversations": PAIR}, "conversations", PAIR),
    ({"messages": [{"role": "human", "content": "q"}, {"role": "model", "content": "a"}]}, "messages", PAIR),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, PAIR[1]]}, "messages", PAIR),
    ({"system": "s", "instruction": "q", "response": "a"}, "instruction/response/system", WITH_SYSTEM),
    ({"system": "s", "prompt": "q", "completion": "a"}, "prompt/completion/system", WITH_SYSTEM),
    ({"system": "s", "messages": PAIR}, "messages/system", WITH_SYSTEM),
    ({"system": "s", "conversations": SHAREGPT, "tools": "[]"}, "conversations/system/tools", WITH_SYSTEM),
    ({"system": "", "messages": PAIR, "tools": None, "history": []}, "messages/system/tools (ignored: history)", PAIR),
    ({"instruction": "q", "input": "", "output": "a", "prompt": "other", "completion": "other"},
     "instruction/input/output (ignored: completion, prompt)", PAIR),
]  # fmt: skip


@pytest.mark.parametrize("name", ["plain", "chat"])
@pytest.mark.parametrize(("row", "form", "messages"), FORMS)
def test_a_form_is_what_its_messages_say(tmp_path, tokenizer, name, row, form, messages):
    template = load_template(with_template(tokenizer, "chatml"), name)
    assert form_of(tmp_path, row) == form
    own, twin = (encode(example_of(each), template, "response") for each in (row, {"messages": messages}))
    assert own == twin and any(label != IGNORED for label in own.labels)
    prompts = (as_prompt(each, "x") for each in (row, {"messages": messages}))
    ids = [encode_prompt(prompt.messages, template, prompt.tools) for prompt in prompts]
    assert ids[0] == ids[1] == own.input_ids[: len(ids[0])]


def test_answers_in_a_prompt_are_context(template):
    row = example_of({"prompt": FOUR[:3], "completion": FOUR[3:]})
    assert encode(row, template, "response").input_ids == encode(example_of({"messages": FOUR}), template, "response").input_ids
    assert encode(row, template, "response") == encode(example_of({"messages": FOUR}), template, "last")


def test_calls_and_results_in_sharegpts_words():
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "r"},
        {"from": "gpt", "value": "a"},
    ]
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    twin = [PAIR[0], {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "r"}, PAIR[1]]
    assert example_of({"conversations": turns, "tools": '[{"name": "f"}]'}) == example_of(
        {"messages": twin, "tools": [{"name": "f"}]}
    )
    turns[1]["value"] = "f(1)"
    with pytest.raises(DataError, match=r"file:1: conversations\[1\] \(function_call\) must be the JSON text of .*'f\(1\)'"):
        example_of({"conversations": turns})


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"prompt": "q", "completion": "a", "input": "x"}, "input"),
        ({"question": "q", "answer": "a", "context": "x"}, "context"),
        ({"instruction": "q", "response": "a", "history": [["b", "c"]]}, "history"),
        ({"messages": PAIR, "images": ["x.png"]}, "images"),
        ({"question": "q", "answer": "a", "system_prompt": "s"}, "system_prompt"),
        ({"text": "t", "system": "s"}, "system"),
        ({"text": "t", "tools": [{"name": "f"}]}, "tools"),
        ({"instruction": "q", "response": "a", "answer": "b"}, "answer"),
        ({"prompt": "q", "completion": "a", "messages": PAIR, "question": "x"}, "question"),
    ],
)
def test_a_column_of_a_prompt_that_is_not_used_is_refused_by_name(tmp_path, row, column):
    with pytest.raises(DataError, match=f"rows.jsonl:2: column '{column}' looks like .*--ignore-columns {column}"):
        form_of(tmp_path, {key: value for key, value in row.items() if key != column}, row)
    kept = {key: value for key, value in row.items() if key != column}
    ignoring = ColumnOptions.parse([], [column])
    assert column in form_of(tmp_path, row, options=ignoring).partition("ignored")[2]
    assert example_of(row, ignoring) == example_of(kept)
    assert example_of(row | {column: []}) == example_of(row | {column: None}) == example_of(kept)


def test_columns_of_other_names(tmp_path):
    options = ColumnOptions.parse(["instruction=question", "input=passage", "response=answer"], [])
    row = {"question": "q", "passage": "more", "answer": "a", "id": 3}
    assert form_of(tmp_path, row, options=options) == (
        "instruction/input/response (instruction is question; input is passage; response is answer; ignored: id)"
    )
    assert example_of(row, options) == example_of({"messages": LONG})
    prompt = as_prompt({"question": "q", "passage": "more"}, "x", options)
    assert prompt.messages == example_of({"messages": LONG}).prompt
    shadowed = {**row, "instruction": "title"}
    assert example_of(shadowed, options) == example_of(row, options) and "ignored: id, instruction" in form_of(
        tmp_path, shadowed, options=options
    )


@pytest.mark.parametrize(
    ("columns", "ignored", "row", "error", "words"),
    [
        (["instruction"], [], {}, ConfigError, "--columns instruction cannot be used: it must be OUR_NAME=NAME_IN_THE_FILE"),
        (["instruktion=q"], [], {}, ConfigError, "no column 'instruktion'. Perhaps you meant instruction. Known: "),
        (["input=a", "input=b"], [], {}, ConfigError, "--columns input=b: one of the two names was given before"),
        (["input=a"], ["a"], {}, ConfigError, "both name a"),
        (
            ["input=x"],
            [],
            {"question": "q", "answer": "a", "x": "y"},
            ConfigError,
            "rows of the form question/answer have no 'input'",
        ),
        (
            ["response=x"],
            [],
            {"instruction": "q", "answer": "a"},
            DataError,
            "rows.jsonl:1: .*column 'output' or 'x'.* is missing",
        ),
        (
            ["input=x"],
            [],
            {"instruction": "q", "output": "a"},
            DataError,
            "no row has the column 'x' .--columns input=x.. Check its name",
        ),
    ],
)
def test_wrong_names_of_columns_are_refused(tmp_path, columns, ignored, row, error, words):
    with pytest.raises(error, match=words):
        form_of(tmp_path, row, options=ColumnOptions.parse(columns, ignored))


def test_keys_of_messages_can_be_ignored(template):
    messages = [{**PAIR[0], "id": 1}, {**PAIR[1], "id": 2, "weight": 0}]
    with pytest.raises(UserError, match=r"f:1: the plain prompt format does not render id.*--ignore-columns messages.id"):
        encode_all([example_of({"messages": messages})], "f", template, TrainConfig())
    assert example_of({"messages": messages}, ColumnOptions.parse([], ["messages.id", "messages.weight"])) == example_of(
        {"messages": PAIR}
    )


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [PAIR[0], {**PAIR[1], "weight": 0.5}]}, "messages.1.weight: Input should be 0 or 1 .*0.5"),
        ({"messages": [PAIR[0], {**PAIR[1], "train": "no"}]}, "messages.1.train: Input should be a valid boolean .*'no'"),
        ({"messages": [{**PAIR[0], "train": True}, PAIR[1]]}, r"messages\[0\] \(user\) is marked to be trained"),
        ({"messages": [PAIR[0], {"role": "assistant", "content": None}]}, r"messages\[1\] \(assistant\) is empty"),
        (
            {"messages": [PAIR[0], {"role": "assistant", "content": "", "tool_calls": []}]},
            r"messages\[1\] \(assistant\) is empty",
        ),
        ({"messages": [PAIR[0], {**PAIR[1], "tool_calls": [{"x": "\ufdd0"}]}]}, r"messages\[1\] \(assistant\) holds U\+FDD0"),
        (
            {"messages": [PAIR[0], {**PAIR[1], "tool_calls": "call"}]},
            "messages.1.tool_calls: must be a list, or the text of a JSON",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]}, PAIR[1]]},
            "messages.0.content: ",
        ),
        ({"messages": [{"role": "tool", "content": "r"}, PAIR[1]]}, "roles are tool, assistant"),
        ({"messages": WITH_SYSTEM, "system": "s"}, "a column system and a system message"),
        ({"messages": PAIR, "tools": "none"}, "tools: must be a list, or the text of a JSON array"),
        ({"messages": "hello"}, "messages: Input should be a valid list .*'hello'"),
        ({"prompt": 7, "completion": "a"}, "prompt: Input should be a valid string .*7"),
        ({"prompt": [7], "completion": "a"}, "prompt.0: Input should be a valid dictionary .*7"),
        ({"instruction": "q", "input": ["x"], "output": "a"}, "input: Input should be a valid string"),
        ({"text": " "}, "text: is empty"),
    ],
)
def test_a_wrong_row_is_refused_with_its_line_the_value_and_what_to_do(tmp_path, row, words):
    good = dict.fromkeys(row, "x") if "text" in row else {}
    with pytest.raises(DataError, match=f"rows.jsonl:{len(good) + 1}: .*{words}") as caught:
        form_of(tmp_path, *([good] if good else []), row)
    assert str(caught.value).endswith("Fix the row or remove it.") and str(caught.value).isprintable()
    assert caught.value.exit_code == ExitCode.DATA


# -- one text --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "chat"])
@pytest.mark.parametrize(
    ("text", "trained"),
    [
        ("once upon a time", "once upon a time STOP"),
        ("once upon a time\n", "once upon a time\n STOP"),
        ("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n", None),
        ("once<|endoftext|>", "once<|endoftext|>"),
        ("<|endoftext|>once", "<|endoftext|>once STOP"),
    ],
)
def test_a_text_is_trained_as_a_whole_with_one_bos_and_one_stop(tokenizer, name, text, trained):
    own = with_template(tokenizer, "chatml")
    own.bos_token = "<|endoftext|>"
    template = load_template(own, name)._replace(text_begin_ids=(own.bos_token_id,))
    row = example_of({"text": text})
    encoded = encode(row, template, "response")
    stop = "<|endoftext|>" if name == "plain" else "<|im_end|>"
    shown = own.decode(encoded.input_ids).removeprefix("<|endoftext|>")
    if trained is None:  # rendered before: its stop token is the chat template's
        rendered = own.convert_tokens_to_ids("<|im_end|>")
        assert encoded.input_ids.count(rendered) == 2 and shown.startswith("<|im_start|>user\nq<|im_end|>")
        assert encoded.input_ids[-1] == (rendered if name == "chat" else own.eos_token_id)
    else:
        assert shown == trained.replace(" STOP", stop).removeprefix("<|endoftext|>")
    assert encoded.labels == encoded.input_ids and encoded.input_ids[0] == own.bos_token_id
    assert encode(row, template, "last") == encode(row, template, "all") == encoded
    _, notes = encode_all([row], "f", template, TrainConfig())
    assert "special" not in notes
    prompt = encode_prompt(as_prompt({"text": text}, "x").messages, template)  # to be continued as it stands
    assert own.decode(prompt).removeprefix("<|endoftext|>") == text.removeprefix("<|endoftext|>")


# -- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path):
    """Questions and answers under other names, with a column to be ignored."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"q": f"{n}?", "a": f"{n}.", "history": ["x"]}) + "\n" for n in range(3)))
    return path


FLAGS = ["--columns", "instruction=q", "response=a", "--ignore-columns", "history"]


def test_the_flags_reach_training_and_a_run_that_had_none_is_the_same_run(rows, template):
    config = parse(["--train-file", str(rows), *FLAGS, "--loss-on", "last"])
    assert (
        config.columns == ("instruction=q", "response=a") and config.ignore_columns == ("history",) and config.loss_on == "last"
    )
    console = Console(file=io.StringIO(), width=1000)
    samples, _ = encode_files(config, check_files(config), template, console)
    assert len(samples) == 3 and console.file.getvalue().endswith(
        "form instruction/response (instruction is q; response is a; ignored: history)\n"
    )
    with pytest.raises(UserError, match="'history' looks like part of a prompt"):
        check_files(dataclasses.replace(config, ignore_columns=()))


def test_inspect_data_shows_what_became_of_each_column(rows, tiny, tmp_path, capsys):
    out = tmp_path / "found.json"
    assert main(["inspect-data", "--model", "tiny-random", "--train-file", str(rows), *FLAGS, "--json", str(out)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "the user's message" in shown and "the answer, trained" in shown and "history" in shown and "ignored" in shown
    assert json.loads(out.read_text())["columns"]["train"]["used"] == {"instruction": "q", "response": "a"}


def test_prompts_are_read_in_any_form(tmp_path):
    path = tmp_path / "prompts.jsonl"
    asked = [
        {"instruction": "q", "input": "more"},
        {"question": "q\n\nmore"},
        {"conversations": [{"from": "human", "value": "q\n\nmore"}]},
        {"prompt": [{"role": "user", "content": "q\n\nmore"}]},
        {"messages": LONG},
        {"text": "once"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in asked))
    assert [prompt.messages[-1].content for prompt in read_prompts(path)] == ["q\n\nmore"] * 5 + ["once"]
    with pytest.raises(DataError, match=r"x: column 'context' looks like part of a prompt"):
        as_prompt({"question": "q", "context": "c"}, "x")


def test_bundled_data_is_read_as_before(template):
    """The hash of all ids and labels, as version 0.1.0 made it."""
    samples, _ = encode_all(read_examples(BUNDLED_TRAIN, "train"), BUNDLED_TRAIN, template, TrainConfig())
    assert samples.sha256 == "15c44132d4100eaaa88e614d27b02aa91dc92a41e655549cc5e9afa835535553"
