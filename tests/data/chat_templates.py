"""Chat templates of real models, and a tokenizer that takes any of them."""
# ruff: noqa: RUF001  DeepSeek writes its special tokens with a full-width bar

import copy
import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

SPECIAL = re.compile(r"<\|[\w/]+\|?>|<[\w/]+\|>|<｜[^｜']+｜>|</?s>|<(?:start|end)_of_\w+>|<eos>")


class RealTemplate(NamedTuple):
    """A chat template, and what is known of it.

    Attributes:
        text: of the template; a name alone is one that trl ships.
        lead: what it writes between the generation prompt and an answer without thoughts.
        rewrites: whether it changes earlier turns, so that only the last can be trained.
        system: whether it takes a system message.
    """

    text: str
    lead: str = ""
    rewrites: bool = False
    system: bool = True


CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
PHI3_OF_APRIL = (  # the first one, which left out the system message
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') %}"
    "{{'<|user|>' + '\n' + message['content'] + '<|end|>' + '\n' + '<|assistant|>' + '\n'}}"
    "{% elif (message['role'] == 'assistant') %}{{message['content'] + '<|end|>' + '\n'}}{% endif %}{% endfor %}"
)
R1_OF_JANUARY = (  # the first one, whose generation prompt opens no thought
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}{% else %}"
    "{% set content = message['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
NO_THOUGHTS = (  # as Gemma 4's large models do, the generation prompt ends in an empty block that the render of an answer lacks
    "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' + m['content'] }}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}"
)
TWO_BLOCKS = (  # as Kimi K2 does, an empty block is put before an answer, whether or not that has thoughts
    "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' }}{% if m['role'] == 'assistant' %}<think></think>{% endif %}"
    "{{ m['content'] }}<|im_end|>{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
EMPTY = "<think>\n\n</think>\n\n"
TEMPLATES = {
    "chatml": RealTemplate(CHATML),
    "zephyr": RealTemplate(ZEPHYR),
    "mistral": RealTemplate(MISTRAL, system=False),
    "llama2": RealTemplate(LLAMA2),
    "phi3 of April 2024": RealTemplate(PHI3_OF_APRIL, system=False),
    "r1 of January 2025": RealTemplate(R1_OF_JANUARY),
    **{
        name: RealTemplate(name)
        for name in (
            "cohere", "cohere2", "diffusion_gemma", "gemma3", "gemma4", "gemma4_v5", "lfm2", "lfm2_2_5", "llama3", "llama3_1",
            "llama3_2", "phi3", "phi3_5", "qwen2_5", "qwen2_5_vl", "qwen3_instruct_2507", "qwen3_vl",
        )
    },
    "gemma": RealTemplate("gemma", system=False),
    "gptoss": RealTemplate("gptoss", lead="<|channel|>final<|message|>", rewrites=True),
    "muse_glimmer": RealTemplate("muse_glimmer", lead=" to=user<|message|>"),
    "nemotron_3_nano": RealTemplate("nemotron_3_nano", lead="</think>", rewrites=True),
    "qwen3": RealTemplate("qwen3", lead=EMPTY, rewrites=True),
    "qwen3_training": RealTemplate("qwen3_training", lead=EMPTY),
    "qwen3_5_nothink": RealTemplate("qwen3_5_nothink", rewrites=True),
    "qwen3_5_think": RealTemplate("qwen3_5_think", lead=EMPTY.removeprefix("<think>\n"), rewrites=True),
    "qwen3_6": RealTemplate("qwen3_6", lead=EMPTY.removeprefix("<think>\n"), rewrites=True),
    "qwen3_8": RealTemplate("qwen3_8", lead=EMPTY.removeprefix("<think>\n")),
}  # fmt: skip


def template_text(name: str) -> str:
    """A template of TEMPLATES, or one that trl ships."""
    text = TEMPLATES[name].text if name in TEMPLATES else name
    if "{" in text:
        return text
    spec = importlib.util.find_spec("trl")  # found, not imported, which takes seconds
    assert spec is not None and spec.origin is not None
    return (Path(spec.origin).parent / "chat_templates" / f"{text}.jinja").read_text(encoding="utf-8")


def with_template(tokenizer, name: str):
    """A copy of the tiny tokenizer with a chat template, whose special tokens it gets."""
    text, own = template_text(name), copy.deepcopy(tokenizer)
    own.add_special_tokens({"extra_special_tokens": sorted({*SPECIAL.findall(text)} - {*own.get_vocab()})})
    own.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])  # which are not special in Qwen3 and DeepSeek-R1
    own.chat_template = text
    if "bos_token" in text:
        own.bos_token = "<|endoftext|>"
    return own
