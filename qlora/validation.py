"""Checks of values that come from files, by pydantic models. Imports no torch."""

import functools
from typing import Any, TypeVar, cast

import pydantic

T = TypeVar("T")

STRICT = pydantic.ConfigDict(strict=True, extra="ignore", frozen=True)  # "1" is no number; keys without a field are ignored
# What an unreadable file raises when it is read: not there, no text, no JSON, of wrong types, out of range, nested without end.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError)

adapter = functools.cache(pydantic.TypeAdapter)


def validated(kind: type[T], values: object) -> T:
    """Values, as JSON has them, as an object of a pydantic model or TypedDict.

    Raises:
        ValueError: naming the first value that is wrong, or the key that is missing.
    """
    try:
        result: T = adapter(cast(Any, kind)).validate_python(values)
        return result
    except pydantic.ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in wrong["loc"]) or "the whole"
        value = "" if wrong["type"] == "missing" else f" ({place}: {repr(wrong['input'])[:60]})"
        raise ValueError(f"{place}: {wrong['msg']}{value}") from None


def reason(error: BaseException) -> str:
    """An error in a few words, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
