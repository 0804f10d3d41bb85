"""Typed YAML configuration: read it with every mistake named at once, write it back, know no particular schema.

    settings = read_settings("train.yaml", Settings, ["training.max_steps=100", "data.train.0.weight=0.5"])

A schema is a pydantic model; by convention it is frozen and forbids unknown keys, and its validators raise ValueError.
Nothing becomes another value than was typed: `1e-4` is a number, only `true` and `false` are booleans, and `no`, `012`,
`1_000`, `12:30:45` and dates stay text, which is never converted for a field that wants a number. Anchors and aliases
work; tags (except `!!str`) and `<<` merges are refused.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import to_json, to_jsonable_python

from mmx.config.validation_errors import Keys, describe_errors, dotted_key, format_value, known_fields, single_line
from mmx.errors import ConfigError, suggest

__all__ = ["dump_config", "override_config", "parse_config", "load_config", "config_from_overrides"]

M = TypeVar("M", bound=BaseModel)

MAX_BYTES, MAX_NODES, MAX_DEPTH = 2**20, 50_000, 60  # aliases of aliases grow exponentially, so there is an end
PLAIN = "plain"  # the tag we give to a scalar without quotes
TAGS = {PLAIN, "tag:yaml.org,2002:str", "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"}
WORDS = {"": None, "~": None, "null": None, "true": True, "false": False,
         ".inf": math.inf, "+.inf": math.inf, "-.inf": -math.inf, ".nan": math.nan}  # fmt: skip
WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]{0,3999})")
NUMBER = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")

# What the YAML parser stumbled over; what a person is told; whether the fault is where the construct begins.
SYNTAX = (
    ("'\\t'", "a tab cannot stand here; use spaces", False),
    ("mapping values are not allowed", "one ':' too many, or a wrong indentation; quote a text that holds ': '", False),
    ("could not find expected ':'", "a line without ':'; write 'key: value'", True),
    ("unexpected end of stream", "a quote is never closed; close it", True),
    ("expected ',' or", "a bracket is never closed, or a comma is missing", True),
    ("expected <block end>", "the indentation does not fit the lines above; align it with them", False),
    ("undefined alias", "an alias (*name) has no anchor; write &name before it", False),
    ("but found another document", "a second document begins; keep one", False),
)


class SourceLocation(NamedTuple):
    """Where something stands: `rank` sorts (the line, or beyond all lines for the command line), `text` is printed."""

    rank: int
    text: str


class _InvalidDocument(Exception):  # noqa: N818 - no error yet: whoever catches it makes one
    """Reading cannot go on; its two arguments are the place and the message."""


@dataclass
class _Document:
    """One configuration being read: its values, where each of them stands, and what is wrong so far."""

    name: str
    data: Any
    places: dict[Keys, SourceLocation]
    problems: list[tuple[SourceLocation, str]] = field(default_factory=list)
    refused: set[Keys] = field(default_factory=set)  # already complained about; nothing more is said of what is below

    def place(self, keys: Keys) -> SourceLocation:
        """The place of the value, or of the nearest thing around it that has one."""
        return next(self.places[keys[:n]] for n in range(len(keys), -1, -1) if keys[:n] in self.places)

    def error(self) -> ConfigError:
        """All problems in one error, in the order of the file, then of the command line."""
        lines = [f"{place.text}: {message}" for place, message in sorted(self.problems, key=lambda p: p[0].rank)]
        return ConfigError("\n".join([f"{self.name}: {len(lines)} problems"] * (len(lines) > 1) + lines))


def load_config(path: str | PathLike[str], schema: type[M], overrides: Sequence[str] = ()) -> M:
    """Read a YAML file, apply `key.key=value` overrides (values are YAML, keys hold no dots), check by `schema`.

    Raises ConfigError that names every problem by file and line, or by the text on the command line.
    """
    name = str(path)
    sheet = _Document(name, {}, {(): SourceLocation(1, f"{name}:1")})
    try:
        _fill(sheet, _file_text(Path(path)), schema)
    except _InvalidDocument as stop:
        sheet.problems.append((stop.args[0], stop.args[1]))
        raise sheet.error() from None
    _override_all(sheet, overrides)
    return _validate(sheet, schema)


def override_config(settings: M, overrides: Sequence[str]) -> M:
    """Settings already in hand with `key.key=value` from a command line applied; the messages name the text there."""
    return _overridden(_plain_values(settings), type(settings), overrides)


def config_from_overrides(schema: type[M], overrides: Sequence[str]) -> M:
    """Settings that consist of `key.key=value` from a command line alone, and of defaults."""
    return _overridden({}, schema, overrides)


def _overridden(values: dict[str, Any], schema: type[M], overrides: Sequence[str]) -> M:
    sheet = _Document("command line", values, {(): SourceLocation(0, "command line")})
    _override_all(sheet, overrides)
    return _validate(sheet, schema)


def parse_config(data: Mapping[str, Any], schema: type[M], *, where: str) -> M:
    """Check values already in hand; the messages begin with `where`, and there are no lines."""
    values = dict(data) if isinstance(data, Mapping) else data
    return _validate(_Document(where, values, {(): SourceLocation(0, where)}), schema)


def dump_config(settings: BaseModel) -> str:
    """YAML text, in the order of declaration, that `read_settings` reads back to equal settings."""
    return str(yaml.dump(_plain_values(settings), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120))


def _plain_values(settings: BaseModel) -> Any:
    """Mappings, lists and scalars, as a file would hold them."""
    return to_jsonable_python(settings.model_dump(by_alias=True, round_trip=True), inf_nan_mode="constants")


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Writes no aliases, and quotes every text that this reader, or a YAML 1.1 one, would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_data(self, data: Any) -> Any:
        node = super().represent_data(data)
        if isinstance(data, str) and not (data.isprintable() and _scalar(data) == data):
            node.style = "'" if data.isprintable() else '"'  # only double quotes keep every kind of line end
        return node


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Only composes nodes; what an unquoted scalar means is left to `_scalar`."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        return PLAIN if kind is yaml.ScalarNode and implicit[0] else super().resolve(kind, value, implicit)


def _file_text(path: Path) -> str:
    """The file's text, or a _Stop that says why there is none."""
    place = SourceLocation(0, str(path))
    if not path.is_file():
        raise _InvalidDocument(place, "this is a folder, expected a YAML file" if path.is_dir() else _no_file(path))
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError:
        raise _InvalidDocument(place, "the file cannot be read; check its permissions") from None
    if len(raw) > MAX_BYTES:
        raise _InvalidDocument(place, f"the file is larger than {MAX_BYTES} bytes; a configuration is smaller")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _InvalidDocument(
            SourceLocation(line, f"{path}:{line}"), "this is not UTF-8 text; save the file as UTF-8"
        ) from None


def _no_file(path: Path) -> str:
    names = [near.name for near in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = suggest(path.name, names)
    return f"there is no such file; {hint if hint.startswith('did you mean') else 'check the path'}"


def _fill(sheet: _Document, text: str, schema: type[BaseModel]) -> None:
    """Compose the file's text into the sheet's data and places."""
    builder = _Builder(sheet, lambda line: SourceLocation(line, f"{sheet.name}:{line}"))
    node = _compose(text, builder.at)
    if not isinstance(node, yaml.MappingNode):
        found = "the file is empty" if node is None else "this is not a mapping"
        known = ", ".join(known_fields(schema))
        raise _InvalidDocument(builder.at(1), f"{found}, expected keys and values; known: {known}.")
    sheet.data = builder.build(node, ()) or {}


def _compose(text: str, at: Callable[[int], SourceLocation]) -> Any:
    """The tree of YAML nodes, None for nothing at all; a syntax error becomes our sentence."""
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.reader.ReaderError as error:
        line, message = text.count("\n", 0, error.position) + 1, "a control character stands here; remove it"
    except yaml.MarkedYAMLError as error:
        said = f"{error.context} {error.problem}"
        known = (row[1:] for row in SYNTAX if row[0] in said)
        message, begins = next(known, ("this is not YAML; check the quotes, brackets and indentation", False))
        line = ((begins and error.context_mark) or error.problem_mark or error.context_mark).line + 1
    except (RecursionError, ValueError, OverflowError):  # an escape beyond Unicode is a ValueError
        line, message = 1, "this is nested too deeply, or holds an impossible escape; write it more simply"
    raise _InvalidDocument(at(line), message)


@dataclass
class _Builder:
    """Turns nodes into values, notes the place of each, and complains about duplicate keys and tags."""

    sheet: _Document
    at: Callable[[int], SourceLocation]
    count: int = 0

    def build(self, node: Any, keys: Keys) -> Any:
        """The value of a node; None where it is refused."""
        self.count += 1
        if self.count > MAX_NODES or len(keys) > MAX_DEPTH:
            raise _InvalidDocument(self.place(node), "too many values, or nested too deeply; write it more simply")
        if node.tag not in TAGS:
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            return self.refuse(node, keys, f"the tag {single_line(tag)} is not allowed; write the plain value")
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, keys)
        if isinstance(node, yaml.SequenceNode):
            return [self.child(item, (*keys, number), item) for number, item in enumerate(node.value)]
        return _scalar(node.value) if node.tag == PLAIN else node.value

    def child(self, node: Any, keys: Keys, stands_at: Any) -> Any:
        self.sheet.places[keys] = self.place(stands_at)
        return self.build(node, keys)

    def mapping(self, node: Any, keys: Keys) -> dict[str, Any]:
        """Keys are names, as typed; the first of two equal keys counts."""
        values: dict[str, Any] = {}
        for key, value in node.value:
            name = (*keys, key.value)
            if not isinstance(key, yaml.ScalarNode) or key.tag not in TAGS:
                self.refuse(key, keys, "a key must be a plain word; write 'key: value'")
            elif key.tag == PLAIN and key.value == "<<":
                self.refuse(key, keys, "'<<' merges are not supported; write the keys out, or alias single values")
            elif key.value in values:
                twice = f"{dotted_key(name)} is given twice, first at {self.sheet.places[name].text}; keep one"
                self.sheet.problems.append((self.place(key), twice))
            else:
                values[key.value] = self.child(value, name, key)
        return values

    def place(self, node: Any) -> SourceLocation:
        return self.at(node.start_mark.line + 1)

    def refuse(self, node: Any, keys: Keys, message: str) -> None:
        self.sheet.problems.append((self.place(node), f"{dotted_key(keys)}: {message}"))
        self.sheet.refused.add(keys)


def _scalar(text: str) -> str | float | bool | None:
    """What an unquoted scalar means; whatever is in doubt is the text itself."""
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    if WHOLE.fullmatch(text):
        return int(text)
    if NUMBER.fullmatch(text) and math.isfinite(float(text)):  # 1e999 is no number we could keep
        return float(text)
    return text


def _override_all(sheet: _Document, overrides: Sequence[str]) -> None:
    for number, text in enumerate(overrides):
        _override(sheet, text, SourceLocation(10**9 + number, f"command line: {single_line(text)}"))


def _override(sheet: _Document, text: str, place: SourceLocation) -> None:
    """Apply one `key.key=value`; what is wrong with it joins the sheet's problems."""
    name, equals, value = text.partition("=")
    parts = name.strip().split(".")
    try:
        if not equals or not all(parts):
            raise _InvalidDocument(place, "expected key=value, as in training.max_steps=100")
        node = _compose(value.strip() or "null", lambda line: place)
        if node is None:
            raise _InvalidDocument(place, "'#' begins a comment; put the value in quotes")
        _set(sheet, parts, node, place)
    except _InvalidDocument as stop:
        sheet.problems.append((stop.args[0], stop.args[1]))


def _set(sheet: _Document, parts: Sequence[str], node: Any, place: SourceLocation) -> None:
    """Walk to the place that `parts` name, making mappings where nothing is, and put the value there."""
    here, keys = sheet.data, ()  # type: Any, Keys
    for part in parts[:-1]:
        key = _key(here, part, keys, place)
        keys = (*keys, key)
        if (here.get(key) if isinstance(here, dict) else here[key]) is None:
            here[key], sheet.places[keys] = {}, place
        here = here[key]
    key = _key(here, parts[-1], keys, place)
    keys = (*keys, key)
    sheet.places = {old: at for old, at in sheet.places.items() if old[: len(keys)] != keys}
    sheet.places[keys] = place
    here[key] = _Builder(sheet, lambda line: place).build(node, keys)


def _key(here: Any, part: str, keys: Keys, place: SourceLocation) -> str | int:
    """`part` as a key of the mapping or a number of the list that stands at `keys`."""
    if isinstance(here, dict):
        return part
    if not isinstance(here, list):
        raise _InvalidDocument(place, f"{dotted_key(keys)} is {format_value(here)}, expected keys and values")
    if part.isdecimal() and len(part) < 9 and int(part) < len(here):
        return int(part)
    raise _InvalidDocument(
        place, f"{dotted_key(keys)} has length {len(here)}, counted from 0; there is no item {part!r}"
    )


def _validate(sheet: _Document, schema: type[M]) -> M:
    """The settings, unless there is any problem. Strict JSON: no text becomes a number, yet a list a tuple."""
    try:
        settings = schema.model_validate_json(to_json(sheet.data, inf_nan_mode="constants"), strict=True)
        if not sheet.problems:
            return settings
    except ValidationError as error:
        found = describe_errors(error, schema, sheet.refused)
        sheet.problems += [(sheet.place(keys), sentence) for keys, sentence in found]
    except (ValueError, RecursionError):
        sheet.problems.append((sheet.place(()), "a value is neither text, number, true, false, list nor mapping"))
    raise sheet.error() from None
