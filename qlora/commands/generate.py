"""`python -m qlora generate`: answers to a prompt, to a file of prompts, or in a chat; the base's beside the adapter's."""

import contextlib
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import transformers

from qlora.commands.adapter import Adapter, columns_of, load_adapted, oom_as_user_error_with, open_adapter, prompt_ids
from qlora.commands.options import GenerateOptions, refuse_below, refuse_seed
from qlora.data.formats import Prompt, as_prompt, read_prompts
from qlora.data.messages import Message
from qlora.data.sources import names_of
from qlora.errors import ConfigError, UserError
from qlora.eval.generate import Sampling, generate, generate_all
from qlora.model.load import prepare_inference
from qlora.run.files import require_writable, write_file
from qlora.terminal import echo

CHAT = "Ctrl-D ends the chat, /reset begins another."
MIN_TEMPERATURE = 1e-3  # temperature above 0


def run(options: GenerateOptions) -> int:
    """Answer; see GenerateOptions. Answers go to stdout, the rest to stderr.

    Returns:
        0.

    Raises:
        UserError: exit 2, 3, 4 or 7 before the weights are loaded; 6 where memory does not suffice.
    """
    sampling = _check(options)
    prompts = [] if options.prompt is None else [as_prompt(options.prompt, "--prompt")]
    adapter = open_adapter(options.adapter, options.model, options.prompt_format, options.trust_remote_code, options.device)
    if options.prompts_file:
        prompts = read_prompts(options.prompts_file, columns_of(options, adapter))
    encoded = [prompt_ids(prompt, adapter, options.max_new_tokens) for prompt in prompts]
    for note in adapter.notes:
        _say(note)
    batch = f"--batch-size {options.batch_size} or " if len(prompts) > 1 else ""
    with oom_as_user_error_with(f"Lower {batch}--max-new-tokens {options.max_new_tokens}."):
        model = load_adapted(adapter, "int8" if options.int8 else None)
        prepare_inference(model)
        _say(f"{adapter.folder} on {adapter.source}, {adapter.config.prompt_format} prompts, {_named(sampling)}")
        if not prompts:
            chat(model, adapter, options, sampling)
            return 0
        if options.prompt is not None:
            answers = {side: [text] for side, text in streamed(model, adapter, encoded[0], options, sampling, turn=0).items()}
        else:
            answers = answers_of(model, adapter, encoded, options, sampling)
            _print_all(prompts, answers)
    if options.json is not None:
        lines = []
        for index, prompt in enumerate(prompts):
            row = {"prompt": prompt.messages[-1].content} | {side: texts[index] for side, texts in answers.items()}
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        write_file(options.json, "".join(lines).encode())
    return 0


def _check(options: GenerateOptions) -> Sampling | None:
    """How to draw tokens; None is greedy."""
    refuse_below(1, options, "max_new_tokens", "batch_size", "top_k")
    refuse_seed(options.seed)
    if options.temperature and not MIN_TEMPERATURE <= options.temperature < float("inf"):
        text = f"--temperature {options.temperature} cannot be used: it must be finite and at least {MIN_TEMPERATURE}, as"
        raise ConfigError(f"{text} logits over less overflow; or 0, which is greedy: the likeliest token, always.")
    if options.prompt is not None and options.prompts_file is not None:
        raise ConfigError("--prompt and --prompts-file were both given.", hint="Keep one of them.")
    if options.top_p is not None and not 0 < options.top_p <= 1:
        raise ConfigError(f"--top-p {options.top_p} cannot be used: it must be above 0, and 1 at most.")
    if options.json is not None:
        if options.prompt is None and options.prompts_file is None:
            raise ConfigError("--json needs --prompt or --prompts-file: a chat is not saved.")
        require_writable(options.json, *names_of(options.prompts_file))
    if options.temperature:
        return Sampling(options.temperature, options.top_p or 1.0, options.top_k)
    given = [name for name in ("top_p", "top_k") if getattr(options, name) is not None]
    if given:
        raise ConfigError(
            f"--{given[0].replace('_', '-')} has no effect without --temperature above 0: at 0 the likeliest token is taken.",
        )
    return None


def _named(sampling: Sampling | None) -> str:
    if sampling is None:
        return "greedy"
    cut = "" if sampling.top_k is None else f", top-k {sampling.top_k}"
    return f"temperature {sampling.temperature:g}, top-p {sampling.top_p:g}{cut}"


def _sides(model: Any, compare: bool) -> dict[str, Callable[[], contextlib.AbstractContextManager[Any]]]:
    """Name -> context in which the model is that side."""
    return ({"base": model.disable_adapter} if compare else {}) | {"adapter": contextlib.nullcontext}


def answers_of(
    model: Any, adapter: Adapter, encoded: list[list[int]], options: GenerateOptions, sampling: Sampling | None
) -> dict[str, list[str]]:
    """Answers of each side to all prompts, in batches; each side draws from the same seed."""
    answers = {}
    for side, switched in _sides(model, options.compare).items():
        torch.manual_seed(options.seed)
        with switched():
            found = generate_all(model, encoded, adapter.template, options.max_new_tokens, options.batch_size, sampling)
        answers[side] = found
    return answers


def streamed(
    model: Any,
    adapter: Adapter,
    ids: list[int],
    options: GenerateOptions,
    sampling: Sampling | None,
    turn: int,
) -> dict[str, str]:
    """Answers of each side to one prompt, printed as they are generated; each turn of a chat has its own seed."""
    answers = {}
    for side, switched in _sides(model, options.compare).items():
        if options.compare:
            echo(f"[{side}]")
        streamer = _Streamer(adapter.template.tokenizer, skip_prompt=True, skip_special_tokens=True)
        torch.manual_seed(options.seed + turn)
        with switched():
            found = generate(model, [ids], adapter.template, options.max_new_tokens, sampling, streamer)
        answers[side] = found[0]
    return answers


def chat(model: Any, adapter: Adapter, options: GenerateOptions, sampling: Sampling | None) -> None:
    """Lines from the terminal, or from a pipe, answered one after the other; what was said before goes along.

    With `--compare` both sides see the adapter's earlier answers.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history for input()
    _say(CHAT)
    messages: tuple[Message, ...] = ()
    turn = 0
    while (line := _read_line()) is not None:
        if line.strip() == "/reset":
            messages = ()
        if not line.strip() or line.strip() == "/reset":
            continue
        try:
            asked = (*messages, *as_prompt(line, "your line").messages)
            ids = prompt_ids(Prompt(asked, "the chat so far"), adapter, options.max_new_tokens)
        except UserError as error:
            _say(f"{error} /reset begins another chat.")
            continue
        answer = streamed(model, adapter, ids, options, sampling, turn)["adapter"]
        turn += 1
        if answer.strip():
            messages = (*asked, Message("assistant", answer))
        else:  # a turn without an answer would leave two lines of the user in a row
            _say("(The answer is empty. The chat continues without your last line.)")


def _read_line() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def _print_all(prompts: list[Prompt], answers: dict[str, list[str]]) -> None:
    for index, prompt in enumerate(prompts):
        echo(f"> {prompt.messages[-1].content}")
        for side, texts in answers.items():
            echo(f"[{side}]\n{texts[index]}" if len(answers) > 1 else texts[index])
        echo("")


class _Streamer(transformers.TextStreamer):
    """Prints an answer as it is generated."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print what is complete."""
        echo(text, end="\n" if stream_end else "")


def _say(line: str) -> None:
    echo(line, file=sys.stderr)
