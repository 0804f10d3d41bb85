"""pydantic's errors in our sentences: where the value stands, what was given, what was expected, what to type.

    complaints(error, Settings) -> [(("training", "steps"), "training.max_steps is 'many', expected a whole number"), ...]

pydantic locates an error by a path that mixes keys of the file with labels of a union's alternatives; here the path is
followed through the types, alternatives that were never meant are dropped, and every value gets one sentence.
"""

import re
from collections import Counter
from collections.abc import Collection
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from mmx.errors import suggest

__all__ = ["Keys", "describe_errors", "dotted_key", "known_fields", "single_line", "format_value"]

Keys = tuple[str | int, ...]  # the way to a value: ("data", "train", 0, "weight")

# What each of pydantic's error types expected; the braces are filled from the error's own context.
EXPECTED = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("list_type", "tuple_type", "set_type", "frozen_set_type", "iterable_type"), "a list"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type", "dataclass_type"), "keys and values"),
    "int_parsing_size": "a smaller whole number", "finite_number": "a finite number", "bool_type": "true or false",
    "string_type": "text", "path_type": "a path", "greater_than": "more than {gt}", "less_than": "less than {lt}",
    "greater_than_equal": "at least {ge}", "less_than_equal": "at most {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "literal_error": "{expected}", "enum": "{expected}", "union_tag_invalid": "one of {expected_tags}",
    "too_short": "a length of at least {min_length}", "too_long": "a length of at most {max_length}",
    "string_too_short": "at least {min_length} characters", "string_too_long": "at most {max_length} characters",
    "string_pattern_mismatch": "text that matches {pattern}",
}  # fmt: skip


def describe_errors(
    error: ValidationError, schema: type[BaseModel], refused: Collection[Keys] = ()
) -> list[tuple[Keys, str]]:
    """Where each wrong value stands, and a sentence about it; nothing about what is in or below a key of `refused`.

    What several alternatives of a union expected of one value becomes one sentence.
    """
    said: dict[tuple[Keys, str], list[str]] = {}
    details = [detail for detail in error.errors(include_url=False) if not _is_miscounted(detail)]
    for one in _settled([_follow(detail, schema) for detail in details]):
        if not any(one.keys[:n] in refused for n in range(len(one.keys) + 1)):
            start, expected = _sentence(one)
            said.setdefault((one.keys, start), []).extend(expected)
    joined = {key: " or ".join(dict.fromkeys(expected)) for key, expected in said.items()}
    return [(keys, f"{start}, expected {end}" if end else start) for (keys, start), end in joined.items()]


def _is_miscounted(error: ErrorDetails) -> bool:
    """Whether a tuple is called too short only because its wrong items, complained about anyway, were not counted."""
    return error["type"] == "too_short" and len(error["input"]) >= error["ctx"]["min_length"]


class _Found(NamedTuple):
    """One of pydantic's errors, its keys in the file, the type that holds the last key, and the unions on the way."""

    error: ErrorDetails
    keys: Keys
    holder: Any
    unions: tuple[tuple[Keys, str], ...]  # (where the union stands, the label of the alternative)


def _follow(error: ErrorDetails, schema: type[BaseModel]) -> _Found:
    """Walk pydantic's location through the types: it mixes keys of the file with labels of a union's alternatives."""
    kind: Any = schema
    holder, keys, unions = None, (), ()  # type: Any, Keys, tuple[tuple[Keys, str], ...]
    for part in error["loc"]:
        members = _members(kind)
        if len(members) > 1:
            unions += ((keys, str(part)),)
            kind = _chosen(members, str(part))
        elif part != "[key]":  # the mark of an error about a key itself
            holder, keys = members[0], (*keys, part)
            kind = _child(holder, part)
    if error["type"].startswith("union_tag") and "'" in error["ctx"]["discriminator"]:
        keys = (*keys, error["ctx"]["discriminator"].strip("'"))
    return _Found(error, keys, holder, unions)


def _members(kind: Any) -> list[Any]:
    """The alternatives of a type, apart from None."""
    if get_origin(kind) is Annotated:
        return _members(get_args(kind)[0])
    if get_origin(kind) not in (Union, UnionType):
        return [kind]
    members = [member for member in get_args(kind) if member is not type(None)]
    return _members(members[0]) if len(members) == 1 else members


def _chosen(members: list[Any], label: str) -> Any:
    """The alternative that pydantic's label means: a discriminator's value, or more or less the type's name."""
    for member in members:
        literals = [f.annotation for f in known_fields(member).values() if get_origin(f.annotation) is Literal]
        if label in {str(value) for literal in literals for value in get_args(literal)}:
            return member
    names = [getattr(member, "__name__", "Annotated") for member in members]
    tests = (label.__eq__, lambda name: label.startswith(name + "["), lambda name: name in label)
    return next((member for test in tests for member, name in zip(members, names, strict=True) if test(name)), None)


def _child(kind: Any, part: str | int) -> Any:
    """The type of what stands in `kind` under the key or number `part`; None where that is not known."""
    if fields := known_fields(kind):
        return fields[part].annotation if part in fields else None
    args = get_args(kind)
    if get_origin(kind) is tuple and Ellipsis not in args:
        return args[part] if isinstance(part, int) and part < len(args) else None
    return next((arg for arg in reversed(args) if arg is not Ellipsis), None)


def known_fields(kind: Any) -> dict[Any, Any]:
    """A model's fields by the key a file uses."""
    if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return {}
    fields = kind.model_fields.items()
    return {f.validation_alias if isinstance(f.validation_alias, str) else name: f for name, f in fields}


def _settled(found: list[_Found]) -> list[_Found]:
    """Where all alternatives of a union failed, keep the one that got inside, and there with the fewest errors."""
    for spot in sorted({spot for one in found for spot, _ in one.unions}, key=len):
        inside = Counter(label for one in found for at, label in one.unions if at == spot and len(one.keys) > len(spot))
        if inside:
            best = (spot, min(inside, key=lambda label: inside[label]))
            found = [one for one in found if best in one.unions or all(at != spot for at, _ in one.unions)]
    return found


def _sentence(found: _Found) -> tuple[str, list[str]]:
    """The sentence about an error, and what was expected where that is said at its end."""
    error, name = found.error, dotted_key(found.keys)
    kind, context = error["type"], {key: _plain(value) for key, value in error.get("ctx", {}).items()}
    given = context.get("tag", error["input"])
    if kind == "extra_forbidden":
        return f"{name} is not a known key; {suggest(str(found.keys[-1]), list(known_fields(found.holder)))}", []
    if kind in ("missing", "union_tag_not_found"):
        return f"{name} is missing; add it", []
    if error["loc"][-1:] == ("[key]",):
        name = f"the key of {name}"
    if kind in EXPECTED:
        return f"{name} is {format_value(given)}", [EXPECTED[kind].format(**context) + _hint(kind, given, context)]
    message = single_line(str(context.get("error", error["msg"])))
    if message.startswith("Input should be "):
        return f"{name} is {format_value(given)}", [message.removeprefix("Input should be ")]
    return f"{name}: {message}", []


def _hint(kind: str, given: Any, context: dict[str, Any]) -> str:
    if kind == "string_type":
        return " (put it in quotes)" if isinstance(given, int | float) else ""
    choices = re.findall(r"'([^']*)'", context.get("expected", context.get("expected_tags", "")))
    near = suggest(given, choices) if isinstance(given, str) else ""
    return f"; {near}" if near.startswith("did you mean") else ""


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def format_value(value: Any) -> str:
    """A value as a person typed it, more or less, and not too long."""
    text = "empty" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def dotted_key(keys: Keys) -> str:
    return ".".join(single_line(str(key)) or "''" for key in keys) or "the configuration"


def single_line(text: str) -> str:
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= 200 else f"{text[:197]}..."
