"""Real chat templates: what is rendered, what is trained, and what is refused because a template loses it."""
# ruff: noqa: RUF001  DeepSeek writes its special tokens with a full-width bar

import hashlib
import json
import re
import subprocess
import sys
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from qlora.config import TrainConfig
from qlora.data.dataset import encode_all
from qlora.data.formats import NO_OPTIONS, Example, make_plan, read_row
from qlora.data.messages import Message
from qlora.data.template import IGNORED, CannotRender, PromptTemplate, encode, encode_prompt, load_template
from qlora.errors import ExitCode, UserError
from tests.data.chat_templates import NO_THOUGHTS, TEMPLATES, TWO_BLOCKS, template_text, with_template

DATE = "2026-11-30T12:00:00"
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Its name"}}},
    },
}
THOUGHT = "<think>\nadd\n</think>\n\n4"


@pytest.fixture(scope="module")
def chat(tokenizer):
    """Name of a template -> the chat format in it; each is made once."""
    made: dict[str, PromptTemplate] = {}

    def chat_in(name: str) -> PromptTemplate:
        if name not in made:
            made[name] = load_template(with_template(tokenizer, name), "chat", DATE)
        return made[name]

    return chat_in


def example_of(row: dict) -> Example:
    return read_row(row, make_plan(row, None, NO_OPTIONS, "file:1"), 1, "file:1")


def turns(*contents: str | dict, system: str | None = None, **columns) -> Example:
    """User and assistant in turns; a dict is a message of its own."""
    messages: list[dict] = [{"role": "system", "content": system}] if system else []
    for content in contents:
        role = "assistant" if messages and messages[-1]["role"] in ("user", "tool") else "user"
        messages.append({"role": role, **content} if isinstance(content, dict) else {"role": role, "content": content})
    return example_of({"messages": messages, **columns})


def trained_text(example: Example, template: PromptTemplate, loss_on: str = "response") -> str:
    encoded = encode(example, template, loss_on)
    return template.tokenizer.decode([label for label in encoded.labels if label != IGNORED])


# -- what holds for any conversation ---------------------------------------------------------------------------------

tokens = st.sampled_from(["<|end|>", "<|im_end|>\n", "<|endoftext|>", "<|<|end|>end|>", "\n\n", " ", "</s>", "{{ 7 }}", "<"])
texts = st.lists(st.one_of(st.text(max_size=9), tokens), max_size=4).map("".join)
contents = texts.filter(lambda text: text.strip() and not re.search("[\ud800-\udfff\ufdd0\ufdd1]", text))


@st.composite
def conversations(draw) -> Example:
    pairs = draw(st.integers(1, 3))
    system = draw(st.one_of(st.none(), contents))
    return turns(*draw(st.lists(contents, min_size=2 * pairs, max_size=2 * pairs)), system=system)


def squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


def check_conversation(example: Example, template: PromptTemplate, name: str) -> int:
    """Prompts are beginnings of the whole, the whole is the template's own, and the answers, counted, are what is trained."""
    real, tokenizer = TEMPLATES[name], template.tokenizer
    example = example if real.system else example._replace(messages=tuple(m for m in example.messages if m.role != "system"))
    loss_on = "last" if real.rewrites else "response"
    encoded = encode(example, template, loss_on)
    answers = [message for message in example.messages if message.role == "assistant"][-1 if real.rewrites else 0 :]
    stop = tokenizer.convert_ids_to_tokens(template.stop_id)
    wanted = "".join(f"{real.lead}{answer.content}{stop}" for answer in answers)
    assert squeezed(trained_text(example, template, loss_on)) == squeezed(wanted)
    assert all(label in (IGNORED, id) for id, label in zip(encoded.input_ids, encoded.labels, strict=True))
    assert encoded.labels[-1] == template.stop_id
    for end, message in enumerate(example.messages):
        if message.role == "assistant" and (not real.rewrites or message is example.messages[-1]):
            prompt = encode_prompt(example.messages[:end], template)
            assert encoded.input_ids[: len(prompt)] == prompt and encoded.labels[: len(prompt)].count(template.stop_id) == (
                encoded.labels.count(template.stop_id) - sum(m.role == "assistant" for m in example.messages[end:])
            )
    own = tokenizer.apply_chat_template([m._asdict() for m in example.messages], tokenize=False)
    decoded = tokenizer.decode(encoded.input_ids, clean_up_tokenization_spaces=False)
    if real.lead != "</think>":  # Nemotron's prompt has a newline that its render has not
        assert own.startswith(decoded) and len(own) - len(decoded) < 40
    return len(answers)


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=3, deadline=None)
@given(example=conversations())
def test_any_conversation_in_a_real_template(chat, name, example):
    assert check_conversation(example, chat(name), name)


@pytest.mark.faults
@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=200, deadline=None)
@given(example=conversations())
def test_many_conversations_in_a_real_template(chat, name, example):
    assert check_conversation(example, chat(name), name)


def test_there_are_templates_enough():
    assert len(TEMPLATES) >= 30 and sum(real.rewrites for real in TEMPLATES.values()) >= 5


VOCABULARY = "vendor/llama.cpp/models/ggml-vocab-phi-3.gguf"


@pytest.fixture(scope="module")
def phi3_tokenizer(tmp_path_factory):
    """Phi-3's real vocabulary, out of the source archive of a package: 77 MB to download."""
    folder = tmp_path_factory.mktemp("phi3")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=:all:", "--dest", str(folder)]
    subprocess.run([*command, "llama-cpp-python==0.3.36"], check=True)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        member = next(name for name in archive.getnames() if name.endswith(VOCABULARY))
        archive.extract(member, folder, filter="data")
    path = folder / member
    assert hashlib.sha256(path.read_bytes()).hexdigest().startswith("967d7190")
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.chat_template = template_text("phi3")
    return tokenizer


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_conversations_with_the_real_vocabulary_of_phi3(phi3_tokenizer):
    template = load_template(phi3_tokenizer, "chat", DATE)
    assert template.stop_id == 32007

    @settings(max_examples=100, deadline=None)
    @given(example=conversations())
    def check(example: Example) -> None:
        encoded = encode(example, template, "response")
        answers = [message.content for message in example.messages if message.role == "assistant"]
        assert squeezed(trained_text(example, template)) == squeezed("".join(f"{answer}<|end|>" for answer in answers))
        assert encoded.input_ids.count(32007) == len(example.messages)  # one for each message, whatever is written in it
        for end, message in enumerate(example.messages):
            if message.role == "assistant":
                prompt = encode_prompt(example.messages[:end], template)
                assert encoded.input_ids[: len(prompt)] == prompt

    check()
    row = turns("Say {", '{"a": 1}', system="be brief")
    whole = phi3_tokenizer.apply_chat_template([m._asdict() for m in row.messages], return_dict=True)["input_ids"]
    encoded = encode(row, template, "response").input_ids
    assert encoded == whole[: len(encoded)] and phi3_tokenizer.convert_ids_to_tokens(encoded)[-6:-5] != ["\u2581{"]


# -- thoughts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "prompt_ends", "trained"),
    [
        ("qwen3", "assistant\n", THOUGHT + "<|im_end|>"),
        ("qwen3_5_think", "<think>\n", "add\n</think>\n\n4<|im_end|>"),
        ("qwen3_6", "<think>\n", "add\n</think>\n\n4<|im_end|>"),
        ("qwen3_8", "<think>\n", "add\n</think>\n\n4<|im_end|>"),
        ("deepseek_r1_distill", "<think>\n", "add\n</think>\n\n4<｜end▁of▁sentence｜>"),
        ("deepseekv3", "<think>\n", "add\n</think>\n\n4<｜end▁of▁sentence｜>"),
        ("r1 of January 2025", "<｜Assistant｜>", THOUGHT + "<｜end▁of▁sentence｜>"),
        ("nemotron_3_nano", "<think>\n", "add\n</think>\n\n4<|im_end|>"),
        ("chatml", "assistant\n", THOUGHT + "<|im_end|>"),
    ],
)
def test_thoughts_of_a_single_turn_are_trained_as_written(chat, name, prompt_ends, trained):
    template, row = chat(name), turns("2+2?", THOUGHT)
    assert trained_text(row, template) == trained
    prompt = encode_prompt(row.prompt, template)
    assert (
        template.tokenizer.decode(prompt).endswith(prompt_ends)
        and encode(row, template, "response").input_ids[: len(prompt)] == prompt
    )
    for more in (turns("1+1?", "<think>\none\n</think>\n\n2", "2+2?", THOUGHT), turns("1+1?", "2", "2+2?", THOUGHT)):
        assert trained_text(more, template, "last") == trained


def test_an_empty_block_of_thoughts_is_not_trained_twice_nor_missed(tokenizer):
    off, two = (load_template(with_template(tokenizer, text), "chat", DATE) for text in (NO_THOUGHTS, TWO_BLOCKS))
    assert trained_text(turns("2+2?", "4"), off) == "4<|im_end|>"
    whole = off.tokenizer.decode(encode(turns("2+2?", "4"), off, "response").input_ids)
    assert whole.endswith("<think>\n\n</think>\n\n4<|im_end|>")
    with pytest.raises(CannotRender, match="does not render the answer"):
        encode(turns("2+2?", THOUGHT), off, "response")
    assert trained_text(turns("2+2?", "4"), two) == "<think></think>4<|im_end|>"
    assert trained_text(turns("2+2?", THOUGHT), two) == f"{THOUGHT}<|im_end|>"


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "deepseek_r1_distill", "gptoss", "nemotron_3_nano"])
def test_a_template_that_rewrites_earlier_turns_trains_the_last(chat, name):
    row = turns("1+1?", "<think>\none\n</think>\n\n2", "2+2?", THOUGHT)
    with pytest.raises(UserError, match=r"f:1: the chat template rewrites earlier turns.*--loss-on last") as caught:
        encode_all([row], "f", chat(name), TrainConfig())
    assert caught.value.exit_code == ExitCode.DATA
    samples, _ = encode_all([row], "f", chat(name), TrainConfig(loss_on="last"))
    prompt = encode_prompt(row.prompt, chat(name))
    assert samples[0].input_ids[: len(prompt)] == prompt and set(samples[0].labels[: len(prompt)]) == {IGNORED}
    assert samples[0].labels[len(prompt) :] == samples[0].input_ids[len(prompt) :]
    assert "one" not in chat(name).tokenizer.decode(prompt) or name == "gptoss"


@pytest.mark.parametrize("name", ["plain", "chatml", "phi3", "llama3"])
def test_the_last_answer_has_the_same_ids_whether_or_not_others_are_trained(chat, template, name):
    row = turns("q1", " a1 ", "q2", "a2", system="be brief")
    own = template if name == "plain" else chat(name)
    whole, last = encode(row, own, "response"), encode(row, own, "last")
    assert whole.input_ids == last.input_ids
    stop = own.tokenizer.convert_ids_to_tokens(own.stop_id)
    assert trained_text(row, own, "last") == f"a2{stop}" and trained_text(row, own).endswith(f"{stop}a2{stop}")


def test_an_answer_without_thoughts_behind_an_opened_thought_is_refused_with_the_way_out(chat):
    with pytest.raises(
        UserError, match=r"f:1: .*prompt opens a thought, and the answer '4' has none.*Begin the answer with <think></think>"
    ):
        encode_all([turns("2+2?", "4")], "f", chat("deepseek_r1_distill"), TrainConfig())
    assert trained_text(turns("2+2?", "<think>\n\n</think>\n\n4"), chat("deepseek_r1_distill")).startswith("\n</think>\n\n4")


@pytest.mark.parametrize("answer", ["<think>a</think>b<think>c</think>d", "a</think>b</think>c"])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think"])
def test_thoughts_that_a_template_cannot_keep_are_refused(chat, name, answer):
    with pytest.raises(CannotRender, match=r"does not render the answer|has none"):
        encode(turns("q", answer), chat(name), "response")


# -- keys of messages ------------------------------------------------------------------------------------------------


def test_reasoning_content_is_trained_where_the_template_knows_it(chat):
    row = turns("2+2?", {"reasoning_content": "add", "content": "4"})
    assert trained_text(row, chat("qwen3")) == THOUGHT + "<|im_end|>"
    assert encode(row, chat("qwen3"), "response") == encode(turns("2+2?", THOUGHT), chat("qwen3"), "response")
    assert "<|channel|>analysis<|message|>add<|end|>" in trained_text(row, chat("gptoss"))
    earlier = turns("1+1?", {"reasoning_content": "one", "content": "2"}, "2+2?", "4")
    assert trained_text(earlier, chat("qwen3"), "last").endswith(
        "4<|im_end|>"
    )  # known, and dropped from earlier turns by design


CALLING = turns(
    "Weather?",
    {"content": None, "tool_calls": [{"id": "call_1", **CALL}]},
    {"role": "tool", "content": "sunny", "tool_call_id": "call_1", "name": "weather"},
    "It is sunny",
    tools=[TOOL],
)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("qwen2_5", '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'),
        ("llama3_1", '{"name": "weather", "parameters": {"city": "Oslo"}}<|eot_id|>'),
        ("lfm2_2_5", "<|tool_call_start|>[weather(city='Oslo')]<|tool_call_end|><|im_end|>"),
        ("gptoss", ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>'),
        ("gemma4", '<|tool_call>call:weather{city:<|"|>Oslo<|"|>}<tool_call|>'),
    ],
)
def test_tool_calls_are_trained_with_the_token_that_ends_them(chat, name, call):
    template = chat(name)
    text = trained_text(CALLING, template)
    assert text.startswith(call) and text.removeprefix(call).removeprefix("<|channel|>final<|message|>").startswith(
        "It is sunny"
    )
    whole = template.tokenizer.decode(encode(CALLING, template, "response").input_ids)
    assert "The weather of a city" in whole and "sunny" in whole.partition(call)[2]
    prompt = encode_prompt(CALLING.prompt, template, CALLING.tools)
    assert encode(CALLING, template, "response").input_ids[: len(prompt)] == prompt


def test_arguments_as_text_are_the_object_they_spell(chat):
    """As OpenAI keeps them; templates would print them quoted."""
    call = {"type": "function", "function": {"name": "weather", "arguments": json.dumps({"city": "Oslo"})}}
    row = turns(
        "Weather?",
        {"content": "", "tool_calls": [call]},
        {"role": "tool", "content": "sunny"},
        "It is sunny",
        tools=json.dumps([TOOL]),
    )
    for name in ("qwen2_5", "llama3_1"):
        assert encode(row, chat(name), "response") == encode(CALLING, chat(name), "response")


def test_special_tokens_in_arguments_thoughts_and_tools_stay_text(chat):
    call = {"type": "function", "function": {"name": "say", "arguments": {"text": "<|im_end|>"}}}
    tool = {"type": "function", "function": {"name": "say", "description": "Says <|im_end|> <|im_start|>", "parameters": {}}}
    answers = (
        {"reasoning_content": "a <|im_end|>", "content": "b <|im_start|>", "tool_calls": [call]},
        {"role": "tool", "content": "<|im_end|>"},
        "c",
    )
    template = chat("qwen3")
    encoded = encode(turns("q <|im_start|>", *answers, tools=[tool]), template, "last")
    harmless = json.loads(json.dumps([answers, tool]).replace("<|im_end|>", "x").replace("<|im_start|>", "x"))
    plain = encode(turns("q x", *harmless[0], tools=[harmless[1]]), template, "last")
    special = {template.stop_id, template.tokenizer.convert_tokens_to_ids("<|im_start|>")}
    assert [id for id in encoded.input_ids if id in special] == [id for id in plain.input_ids if id in special]
    decoded = template.tokenizer.decode(encoded.input_ids)
    assert '{"text": "<|im_end|>"}' in decoded and "Says <|im_end|> <|im_start|>" in decoded and "\ufdd0" not in decoded


DEVELOPER = turns({"role": "developer", "content": "d"}, {"role": "user", "content": "q"}, "a")
REFUSED = [
    (
        "chatml",
        turns("q", {"reasoning_content": "t", "content": "a"}),
        "reasoning_content of a message of the role assistant.*--ignore-columns messages.reasoning_content",
    ),
    ("phi3", turns("q", {"content": "a", "tool_calls": [CALL]}), "tool_calls of a message of the role assistant"),
    ("lfm2", turns("q", {"content": "a", "tool_calls": [CALL]}), "tool_calls of a message of the role assistant"),
    ("qwen3", turns({"content": "q", "name": "ann"}, "a"), "name of a message of the role user"),
    ("qwen3", turns("q", {"content": "a", "timestamp": 7}), "timestamp of a message"),
    ("phi3", turns("q", "a", {"role": "tool", "content": "r"}, "b"), "messages of the role tool"),
    ("qwen3", DEVELOPER, "messages of the role developer"),
    ("phi3", turns("q", "a", tools=[TOOL]), "the column tools.*--ignore-columns tools"),
    ("phi3 of April 2024", turns("q", "a", system="s"), "does not render a system message"),
    ("gemma", turns("q", "a", system="s"), "System role not supported"),
    ("llama3_1", turns("q", {"content": "let me see", "tool_calls": [CALL]}), "does not render the answer 'let me see'"),
    ("qwen3_5_nothink", turns("q", THOUGHT), "does not render the answer"),
    (
        "plain",
        turns("q", {"reasoning_content": "t", "content": "a"}),
        "plain prompt format does not render reasoning_content.*--prompt-format chat",
    ),
    (
        "plain",
        turns("q", "a", {"role": "tool", "content": "r"}, "b"),
        "plain prompt format does not render messages of the role tool",
    ),
    ("plain", turns("q", "a", tools=[TOOL]), "plain prompt format does not render tools"),
]


@pytest.mark.parametrize(("name", "row", "words"), REFUSED)
def test_what_a_template_leaves_out_is_refused_with_its_line(chat, template, name, row, words):
    with pytest.raises(UserError, match=f"f.jsonl:1: .*{words}") as caught:
        encode_all([row], "f.jsonl", template if name == "plain" else chat(name), TrainConfig())
    assert caught.value.exit_code == ExitCode.DATA and str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["plain", "chatml"])
@pytest.mark.parametrize("mask", [{"weight": 0}, {"train": False}, {"weight": 1, "train": False}])
def test_a_masked_answer_stays_in_context_and_carries_no_loss(chat, template, name, mask):
    own = template if name == "plain" else chat(name)
    row, plain = (
        turns("q1", {"content": "bad", **mask}, "q2", {"content": "good", "weight": 1, "train": True}),
        turns("q1", "bad", "q2", "good"),
    )
    stop = own.tokenizer.convert_ids_to_tokens(own.stop_id)
    assert encode(row, own, "response").input_ids == encode(plain, own, "response").input_ids
    assert trained_text(row, own) == trained_text(row, own, "last") == f"good{stop}"
    assert trained_text(plain, own) == f"bad{stop}good{stop}"
    labels = encode(row, own, "all").labels
    assert labels.count(IGNORED) == len(own.ids("bad")) + 1  # and its stop token
    _, notes = encode_all([row], "f", own, TrainConfig())
    assert "1 answers not trained" in notes


def test_a_row_that_trains_nothing_is_refused(chat):
    masked = turns("q1", "a", "q2", {"content": "bad", "weight": 0})
    assert trained_text(masked, chat("chatml")) == "a<|im_end|>"
    for row, loss_on in ((masked, "last"), (turns("q", {"content": "a", "train": False}), "response")):
        with pytest.raises(UserError, match=r"f:1: nothing is trained: weight or train.*Remove the row"):
            encode_all([row], "f", chat("chatml"), TrainConfig(loss_on=loss_on))


def test_null_keys_as_arrow_fills_them_in_are_harmless(chat, template):
    filled = {"tool_calls": None, "reasoning_content": None, "weight": None, "train": None, "name": None}
    row = turns({"content": "q", **filled}, {"content": "a", **filled}, tools=None)
    assert row == turns("q", "a")
    assert encode(row, template, "response") == encode(turns("q", "a"), template, "response")


def test_a_template_that_takes_a_list_of_parts_alone_is_refused(tokenizer):
    with pytest.raises(UserError, match="does not render messages that are plain text"):
        load_template(with_template(tokenizer, "smolvlm"), "chat")


def test_no_calls_and_no_keys_are_an_ordinary_message():
    assert turns("q", {"content": "a", "tool_calls": []}) == turns("q", "a")
    assert turns("q", {"content": "a"}).messages[-1] == Message("assistant", "a")
