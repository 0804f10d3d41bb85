"""pydantic's validation errors as sentences of our own: the key, what was given, what was expected, what to type.

pydantic locates an error by a path in which keys of the file are mixed with labels of the alternatives of a union. Here
the path is followed through the types of the schema, alternatives that were not meant are dropped, and each value gets
one sentence.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from mmx.errors import most_similar, one_line, suggest

__all__ = ["FieldProblem", "Keys", "describe_errors", "dotted_key", "fields_by_key", "format_value"]

Keys = tuple[str | int, ...]  # the path to a value: ("train", 0, "sampling_weight")

# Error types of pydantic with a wrong type of value -> what was expected.
EXPECTED_TYPE = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "an integer"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("list_type", "tuple_type", "set_type", "frozen_set_type", "iterable_type"), "a list"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type", "dataclass_type"), "a mapping"),
    "bool_type": "true or false",
    "string_type": "a string",
    "path_type": "a path",
}

# Error types of pydantic with a value out of range -> what was expected; braces are filled from the error's context.
EXPECTED_VALUE = {
    "int_parsing_size": "a smaller integer",
    "finite_number": "a finite number",
    "greater_than": "more than {gt}",
    "less_than": "less than {lt}",
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "literal_error": "{expected}",
    "enum": "{expected}",
    "union_tag_invalid": "one of {expected_tags}",
    "too_short": "a length of at least {min_length}",
    "too_long": "a length of at most {max_length}",
    "string_too_short": "at least {min_length} characters",
    "string_too_long": "at most {max_length} characters",
    "string_pattern_mismatch": "text that matches {pattern}",
}


@dataclass(frozen=True)
class FieldProblem:
    """A value that the schema refuses: its keys, an error code, a sentence, and the most similar known name."""

    keys: Keys
    code: str
    message: str
    suggestion: str | None = None


def describe_errors(
    error: ValidationError, schema: type[BaseModel], ignored: Collection[Keys] = ()
) -> list[FieldProblem]:
    """Return one problem for each wrong value, except those at or below the keys in `ignored`.

    If several alternatives of a union refuse a value, their expectations are joined in one sentence.
    """
    located = [_locate(details, schema) for details in error.errors(include_url=False) if not _is_miscounted(details)]
    grouped: dict[tuple[Keys, str], list[_Description]] = {}
    for one in _best_alternatives(located):
        if not _is_below(one.keys, ignored):
            description = _describe(one)
            grouped.setdefault((one.keys, description.start), []).append(description)
    return [_join(keys, descriptions) for (keys, _), descriptions in grouped.items()]


def _is_below(keys: Keys, ignored: Collection[Keys]) -> bool:
    return any(keys[:length] in ignored for length in range(len(keys) + 1))


def _is_miscounted(error: ErrorDetails) -> bool:
    """Whether a tuple is called too short only because its invalid items, which are reported anyway, do not count."""
    return error["type"] == "too_short" and len(error["input"]) >= error["ctx"]["min_length"]


# ---- where: pydantic's location to keys of the file ------------------------------------------------------------------


class _Branch(NamedTuple):
    """An alternative of a union: the keys of the union and pydantic's label of the alternative."""

    keys: Keys
    label: str


class _LocatedError(NamedTuple):
    """An error of pydantic, its keys in the file, the type that holds the last key, and the branches on the way."""

    error: ErrorDetails
    keys: Keys
    holder: Any
    branches: tuple[_Branch, ...]


def _locate(error: ErrorDetails, schema: type[BaseModel]) -> _LocatedError:
    """Follow pydantic's location through the types of the schema."""
    current: Any = schema
    holder: Any = None
    keys: Keys = ()
    branches: tuple[_Branch, ...] = ()
    for item in error["loc"]:
        members = _union_members(current)
        if len(members) > 1:
            branches += (_Branch(keys, str(item)),)
            current = _member_for_label(members, str(item))
        elif item != "[key]":  # pydantic's label of an error about a key itself
            holder = members[0]
            keys = (*keys, item)
            current = _item_type(holder, item)
    if error["type"].startswith("union_tag") and "'" in error["ctx"]["discriminator"]:
        keys = (*keys, error["ctx"]["discriminator"].strip("'"))
    return _LocatedError(error, keys, holder, branches)


def _union_members(annotation: Any) -> list[Any]:
    """The alternatives of a type, without None."""
    if get_origin(annotation) is Annotated:
        return _union_members(get_args(annotation)[0])
    if get_origin(annotation) not in (Union, UnionType):
        return [annotation]
    members = [member for member in get_args(annotation) if member is not type(None)]
    return _union_members(members[0]) if len(members) == 1 else members


def _member_for_label(members: list[Any], label: str) -> Any:
    """The alternative that pydantic's label names: by the value of a discriminator, or by the name of the type."""
    for member in members:
        if label in _literal_values(member):
            return member
    names = [getattr(member, "__name__", "Annotated") for member in members]
    tests = (label.__eq__, lambda name: label.startswith(name + "["), lambda name: name in label)
    for test in tests:
        for member, name in zip(members, names, strict=True):
            if test(name):
                return member
    return None


def _literal_values(annotation: Any) -> set[str]:
    """The values of all fields of a model that are literals, among them its discriminator."""
    values: set[str] = set()
    for field in fields_by_key(annotation).values():
        if get_origin(field.annotation) is Literal:
            values.update(str(value) for value in get_args(field.annotation))
    return values


def _item_type(annotation: Any, item: str | int) -> Any:
    """The type of the item of a model, mapping or list; None where it is not known."""
    fields = fields_by_key(annotation)
    if fields:
        return fields[item].annotation if item in fields else None
    args = get_args(annotation)
    if get_origin(annotation) is tuple and Ellipsis not in args:
        return args[item] if isinstance(item, int) and item < len(args) else None
    return next((arg for arg in reversed(args) if arg is not Ellipsis), None)


def fields_by_key(annotation: Any) -> dict[Any, Any]:
    """The fields of a model by the key that a file uses; empty for any other type."""
    if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        return {}
    fields = {}
    for name, field in annotation.model_fields.items():
        alias = field.validation_alias
        fields[alias if isinstance(alias, str) else name] = field
    return fields


def _best_alternatives(located: list[_LocatedError]) -> list[_LocatedError]:
    """Where all alternatives of a union failed, keep the one that failed below its top level with the fewest errors."""
    unions = {branch.keys for one in located for branch in one.branches}
    for union in sorted(unions, key=len):
        inner_errors: Counter[_Branch] = Counter()
        for one in located:
            if len(one.keys) > len(union):
                inner_errors.update(branch for branch in one.branches if branch.keys == union)
        if inner_errors:
            best = min(inner_errors, key=lambda branch: inner_errors[branch])
            located = [one for one in located if best in one.branches or not _passes(one, union)]
    return located


def _passes(one: _LocatedError, union: Keys) -> bool:
    return any(branch.keys == union for branch in one.branches)


# ---- what: an error to a sentence ------------------------------------------------------------------------------------


class _Description(NamedTuple):
    """The start of a sentence, what was expected, and a similar name."""

    start: str
    expected: str | None = None
    suggestion: str | None = None
    code: str = "config"


def _join(keys: Keys, descriptions: list[_Description]) -> FieldProblem:
    first = descriptions[0]
    expected = dict.fromkeys(one.expected for one in descriptions if one.expected is not None)
    suggestion = next((one.suggestion for one in descriptions if one.suggestion is not None), None)
    message = first.start
    if expected:
        message += f", expected {' or '.join(expected)}"
        if suggestion is not None:
            message += f"; did you mean {suggestion!r}?"
    return FieldProblem(keys, first.code, message, suggestion)


def _describe(located: _LocatedError) -> _Description:
    error = located.error
    kind = error["type"]
    name = dotted_key(located.keys)
    context = {key: _without_fraction(value) for key, value in error.get("ctx", {}).items()}
    given = context.get("tag", error["input"])
    if kind == "extra_forbidden":
        return _unknown_key(name, str(located.keys[-1]), list(fields_by_key(located.holder)))
    if kind in ("missing", "union_tag_not_found"):
        return _Description(f"{name} is missing; add it", code="config.missing_key")
    if error["loc"][-1:] == ("[key]",):
        name = f"the key of {name}"
    start = f"{name} is {format_value(given)}"
    if kind in EXPECTED_TYPE:
        needs_quotes = kind == "string_type" and isinstance(given, int | float)
        return _Description(
            start, EXPECTED_TYPE[kind] + (" (put it in quotes)" if needs_quotes else ""), code="config.type"
        )
    if kind in EXPECTED_VALUE:
        return _Description(
            start, EXPECTED_VALUE[kind].format(**context), _similar(given, context), code="config.value"
        )
    message = one_line(str(context.get("error", error["msg"])), limit=200)
    if message.startswith("Input should be "):
        return _Description(start, message.removeprefix("Input should be "), code="config.value")
    return _Description(f"{name}: {message}", code="config.contradiction")


def _unknown_key(name: str, key: str, known: list[str]) -> _Description:
    hint = suggest(key, known)
    return _Description(
        f"{name} is not a known key; {hint}", suggestion=most_similar(key, known), code="config.unknown_key"
    )


def _similar(given: object, context: Mapping[str, Any]) -> str | None:
    """The choice that is most similar to a string, if the error lists choices."""
    choices = re.findall(r"'([^']*)'", context.get("expected", context.get("expected_tags", "")))
    return most_similar(given, choices) if isinstance(given, str) else None


def _without_fraction(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def format_value(value: object) -> str:
    """A value about as it was typed, shortened to 60 characters."""
    if value is None:
        text = "empty"
    elif isinstance(value, bool):
        text = str(value).lower()
    else:
        text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def dotted_key(keys: Keys) -> str:
    """The keys joined by dots, as on the command line; "the configuration" if there are none."""
    return ".".join(one_line(str(key), limit=200) or "''" for key in keys) or "the configuration"
