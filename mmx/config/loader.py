"""Typed YAML configuration, checked by a pydantic schema: every problem is reported at once, with file and line.

    config = load_config("train.yaml", RunConfig, ["training.max_steps=100", "train.0.sampling_weight=0.5"])

The loader knows no particular schema. By convention a schema is frozen, forbids unknown keys, and its validators raise
ValueError.

No value is converted: `1e-4` is a number, only `true` and `false` are booleans, and `no`, `012`, `1_000`, `12:30:45`
and dates stay strings, which a field for a number refuses. Anchors and aliases work; tags (except `!!str`) and `<<`
merges are refused.
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

from mmx.config.validation_errors import Keys, describe_errors, dotted_key, fields_by_key, format_value, single_line
from mmx.errors import ConfigError, most_similar

__all__ = ["ConfigProblem", "config_from_overrides", "dump_config", "load_config", "override_config", "parse_config"]

ConfigT = TypeVar("ConfigT", bound=BaseModel)

MAX_BYTES = 2**20
MAX_NODES = 50_000  # aliases of aliases grow exponentially
MAX_DEPTH = 60
PLAIN = "plain"  # tag given to scalars without quotes
TAGS = {PLAIN, "tag:yaml.org,2002:str", "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"}
CONSTANTS = {
    "": None,
    "~": None,
    "null": None,
    "true": True,
    "false": False,
    ".inf": math.inf,
    "+.inf": math.inf,
    "-.inf": -math.inf,
    ".nan": math.nan,
}
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,3999})")
NUMBER = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")


class _SyntaxMessage(NamedTuple):
    """A part of a message of the YAML parser, our message, and whether the error is where the construct begins."""

    parser_text: str
    message: str
    at_start: bool = False


SYNTAX_MESSAGES = (
    _SyntaxMessage("'\\t'", "a tab is not allowed here; use spaces"),
    _SyntaxMessage(
        "mapping values are not allowed", "one ':' too many, or a wrong indentation; quote a string that holds ': '"
    ),
    _SyntaxMessage("could not find expected ':'", "a line without ':'; write 'key: value'", at_start=True),
    _SyntaxMessage("unexpected end of stream", "a quote is never closed; close it", at_start=True),
    _SyntaxMessage("expected ',' or", "a bracket is never closed, or a comma is missing", at_start=True),
    _SyntaxMessage("expected <block end>", "the indentation does not match the lines above; align it with them"),
    _SyntaxMessage("undefined alias", "an alias (*name) has no anchor; write &name before it"),
    _SyntaxMessage("but found another document", "a second document begins; keep one"),
)
UNKNOWN_SYNTAX = _SyntaxMessage("", "this is not YAML; check the quotes, brackets and indentation")


@dataclass(frozen=True)
class ConfigProblem:
    """One problem of a configuration; `details["problems"]` of a ConfigError lists all of them.

    Attributes:
        code: such as config.unknown_key, config.missing_key, config.duplicate_key, config.type, config.value,
            config.contradiction, config.syntax.
        message: one sentence.
        key: dotted key, or None for the whole file.
        location: where it is, as printed: `run.yaml:3`, or `command line: training.max_steps=x`.
        file: path of the file, or None.
        line: line in the file, or None.
        suggestion: the known name that is most similar to an unknown one, or None.
    """

    code: str
    message: str
    key: str | None
    location: str
    file: str | None = None
    line: int | None = None
    suggestion: str | None = None


class _Location(NamedTuple):
    """Where a value is. `order` sorts problems: the line, or beyond all lines for the command line."""

    order: int
    text: str
    file: str | None = None
    line: int | None = None


class _InvalidDocument(Exception):  # noqa: N818 - becomes a ConfigError
    """A problem after which reading cannot go on."""

    def __init__(
        self, location: _Location, code: str, message: str, keys: Keys | None = None, suggestion: str | None = None
    ) -> None:
        super().__init__(message)
        self.location = location
        self.code = code
        self.message = message
        self.keys = keys
        self.suggestion = suggestion


@dataclass
class _Document:
    """A configuration that is being read: its values, their locations, and the problems so far."""

    name: str
    data: Any
    locations: dict[Keys, _Location]
    problems: list[tuple[int, ConfigProblem]] = field(default_factory=list)
    refused: set[Keys] = field(default_factory=set)  # keys with a problem; problems below them are not reported

    def location(self, keys: Keys) -> _Location:
        """The location of a value, or of the nearest value around it that has one."""
        for length in range(len(keys), 0, -1):
            if keys[:length] in self.locations:
                return self.locations[keys[:length]]
        return self.locations[()]

    def add(
        self, location: _Location, code: str, message: str, keys: Keys | None = None, suggestion: str | None = None
    ) -> None:
        """Record a problem."""
        key = dotted_key(keys) if keys else None
        problem = ConfigProblem(code, message, key, location.text, location.file, location.line, suggestion)
        self.problems.append((location.order, problem))

    def add_stop(self, stop: _InvalidDocument) -> None:
        """Record the problem that ended the reading."""
        self.add(stop.location, stop.code, stop.message, stop.keys, stop.suggestion)

    def error(self) -> ConfigError:
        """Return one ConfigError for all problems, in the order of the file, then of the command line."""
        problems = tuple(problem for _, problem in sorted(self.problems, key=lambda item: item[0]))
        lines = [f"{problem.location}: {problem.message}" for problem in problems]
        if len(problems) > 1:
            message = "\n".join([f"{self.name}: {len(lines)} problems", *lines])
            return ConfigError(message, code="config.several_problems", file=problems[0].file, problems=problems)
        (only,) = problems
        return ConfigError(
            lines[0],
            code=only.code,
            file=only.file,
            line=only.line,
            key=only.key,
            suggestion=only.suggestion,
            problems=problems,
        )


# ---- public functions ------------------------------------------------------------------------------------------------


def load_config(path: str | PathLike[str], schema: type[ConfigT], overrides: Sequence[str] = ()) -> ConfigT:
    """Read a YAML file, apply `key.key=value` overrides (values are YAML, keys hold no dots), and check it.

    Raises ConfigError that names every problem by file and line, or by the argument on the command line.
    """
    name = str(path)
    document = _Document(name, {}, {(): _Location(1, f"{name}:1", name, 1)})
    try:
        _read_document(document, _read_text(Path(path)), schema)
    except _InvalidDocument as stop:
        document.add_stop(stop)
        raise document.error() from None
    _apply_overrides(document, overrides)
    return _validate(document, schema)


def override_config(config: ConfigT, overrides: Sequence[str]) -> ConfigT:
    """Apply `key.key=value` overrides from a command line to a configuration. Raises ConfigError."""
    return _overridden(_to_plain_values(config), type(config), overrides)


def config_from_overrides(schema: type[ConfigT], overrides: Sequence[str]) -> ConfigT:
    """Build a configuration from `key.key=value` overrides and defaults alone. Raises ConfigError."""
    return _overridden({}, schema, overrides)


def parse_config(data: Mapping[str, object], schema: type[ConfigT], *, where: str) -> ConfigT:
    """Check values that are not from a file. Raises ConfigError, whose messages begin with `where`."""
    values = dict(data) if isinstance(data, Mapping) else data
    return _validate(_Document(where, values, {(): _Location(0, where)}), schema)


def dump_config(config: BaseModel) -> str:
    """Return YAML text, in the order of declaration, that `load_config` reads back to an equal configuration."""
    return str(yaml.dump(_to_plain_values(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120))


def _overridden(values: dict[str, Any], schema: type[ConfigT], overrides: Sequence[str]) -> ConfigT:
    document = _Document("command line", values, {(): _Location(0, "command line")})
    _apply_overrides(document, overrides)
    return _validate(document, schema)


def _validate(document: _Document, schema: type[ConfigT]) -> ConfigT:
    """Check the values in pydantic's strict JSON mode: no string becomes a number, but a list becomes a tuple."""
    try:
        config = schema.model_validate_json(to_json(document.data, inf_nan_mode="constants"), strict=True)
        if not document.problems:
            return config
    except ValidationError as error:
        for found in describe_errors(error, schema, document.refused):
            document.add(document.location(found.keys), found.code, found.message, found.keys, found.suggestion)
    except (ValueError, RecursionError):
        document.add(
            document.location(()),
            "config.type",
            "a value is of another type, expected strings, numbers, true, false, lists and mappings",
        )
    raise document.error() from None


# ---- writing ---------------------------------------------------------------------------------------------------------


def _to_plain_values(config: BaseModel) -> Any:
    """Mappings, lists and scalars, as a file holds them."""
    return to_jsonable_python(config.model_dump(by_alias=True, round_trip=True), inf_nan_mode="constants")


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Writes no aliases, and quotes every string that this loader, or a YAML 1.1 one, would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_data(self, data: Any) -> Any:
        node = super().represent_data(data)
        if isinstance(data, str) and not (data.isprintable() and _parse_scalar(data) == data):
            node.style = "'" if data.isprintable() else '"'  # only double quotes keep every kind of line end
        return node


# ---- reading ---------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Composes nodes only; `_parse_scalar` decides what an unquoted scalar means."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        return PLAIN if kind is yaml.ScalarNode and implicit[0] else super().resolve(kind, value, implicit)


def _read_text(path: Path) -> str:
    """The text of a file. Raises _InvalidDocument."""
    name = str(path)
    location = _Location(0, name, name)
    if path.is_dir():
        raise _InvalidDocument(location, "config.file", "this is a folder, expected a YAML file")
    if not path.is_file():
        similar = most_similar(path.name, _names_in(path.parent))
        hint = "check the path" if similar is None else f"did you mean {similar!r}?"
        raise _InvalidDocument(location, "config.file", f"there is no such file; {hint}", suggestion=similar)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError:
        raise _InvalidDocument(location, "config.file", "the file cannot be read; check its permissions") from None
    if len(content) > MAX_BYTES:
        raise _InvalidDocument(location, "config.too_large", f"the file is larger than {MAX_BYTES} bytes; shorten it")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _InvalidDocument(
            _Location(line, f"{name}:{line}", name, line),
            "config.encoding",
            "this is not UTF-8 text; save the file as UTF-8",
        ) from None


def _names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def _read_document(document: _Document, text: str, schema: type[BaseModel]) -> None:
    """Read the values of a YAML text, and their locations, into a document."""
    name = document.name
    builder = _Builder(document, lambda line: _Location(line, f"{name}:{line}", name, line))
    root = _compose(text, builder.location_of_line)
    if not isinstance(root, yaml.MappingNode):
        problem = "the file is empty" if root is None else "this is not a mapping"
        known = ", ".join(fields_by_key(schema))
        raise _InvalidDocument(
            builder.location_of_line(1), "config.not_a_mapping", f"{problem}, expected 'key: value'; known: {known}."
        )
    document.data = builder.build(root, ()) or {}


def _compose(text: str, location_of_line: Callable[[int], _Location]) -> Any:
    """The tree of YAML nodes, None for an empty text. Raises _InvalidDocument."""
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        message = "a control character is not allowed; remove it"
    except yaml.MarkedYAMLError as error:
        known = _syntax_message(f"{error.context} {error.problem}")
        start = error.context_mark if known.at_start else None
        line = (start or error.problem_mark or error.context_mark).line + 1
        message = known.message
    except (RecursionError, ValueError, OverflowError):  # an escape beyond Unicode is a ValueError
        line = 1
        message = "this is nested too deeply, or holds an invalid escape; simplify it"
    raise _InvalidDocument(location_of_line(line), "config.syntax", message)


def _syntax_message(parser_text: str) -> _SyntaxMessage:
    return next((known for known in SYNTAX_MESSAGES if known.parser_text in parser_text), UNKNOWN_SYNTAX)


@dataclass
class _Builder:
    """Converts YAML nodes to values, records their locations, and reports duplicate keys and tags."""

    document: _Document
    location_of_line: Callable[[int], _Location]
    num_nodes: int = 0

    def build(self, node: Any, keys: Keys) -> Any:
        """The value of a node; None where it is refused."""
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES or len(keys) > MAX_DEPTH:
            raise _InvalidDocument(
                self._location(node), "config.too_large", "too many values, or nested too deeply; simplify it"
            )
        if node.tag not in TAGS:
            tag = single_line(node.tag.replace("tag:yaml.org,2002:", "!!"))
            self._refuse(node, keys, f"the tag {tag} is not allowed; write the plain value")
            return None
        if isinstance(node, yaml.MappingNode):
            return self._build_mapping(node, keys)
        if isinstance(node, yaml.SequenceNode):
            return [self._build_child(item, (*keys, index), item) for index, item in enumerate(node.value)]
        return _parse_scalar(node.value) if node.tag == PLAIN else node.value

    def _build_mapping(self, node: Any, keys: Keys) -> dict[str, Any]:
        """A mapping whose keys are the names as typed. Of two equal keys, the first is kept."""
        values: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag not in TAGS:
                self._refuse(key, keys, "a key must be a plain word; write 'key: value'")
            elif key.tag == PLAIN and key.value == "<<":
                self._refuse(key, keys, "'<<' merges are not supported; write the keys out, or alias single values")
            elif key.value in values:
                self._report_duplicate(key, (*keys, key.value))
            else:
                values[key.value] = self._build_child(value, (*keys, key.value), key)
        return values

    def _build_child(self, node: Any, keys: Keys, located_at: Any) -> Any:
        self.document.locations[keys] = self._location(located_at)
        return self.build(node, keys)

    def _location(self, node: Any) -> _Location:
        return self.location_of_line(node.start_mark.line + 1)

    def _report_duplicate(self, node: Any, keys: Keys) -> None:
        first = self.document.locations[keys].text
        message = f"{dotted_key(keys)} is given twice, first at {first}; keep one"
        self.document.add(self._location(node), "config.duplicate_key", message, keys)

    def _refuse(self, node: Any, keys: Keys, message: str) -> None:
        self.document.add(self._location(node), "config.not_allowed", f"{dotted_key(keys)}: {message}", keys)
        self.document.refused.add(keys)


def _parse_scalar(text: str) -> str | float | bool | None:
    """The value of an unquoted scalar; the text itself where that is ambiguous."""
    if text.lower() in CONSTANTS:
        return CONSTANTS[text.lower()]
    if INTEGER.fullmatch(text):
        return int(text)
    if NUMBER.fullmatch(text) and math.isfinite(float(text)):  # 1e999 would become infinity
        return float(text)
    return text


# ---- overrides -------------------------------------------------------------------------------------------------------


def _apply_overrides(document: _Document, overrides: Sequence[str]) -> None:
    for index, text in enumerate(overrides):
        location = _Location(10**9 + index, f"command line: {single_line(text)}")
        try:
            _apply_override(document, text, location)
        except _InvalidDocument as stop:
            document.add_stop(stop)


def _apply_override(document: _Document, text: str, location: _Location) -> None:
    """Apply one `key.key=value`. Raises _InvalidDocument."""
    name, equals, value = text.partition("=")
    names = name.strip().split(".")
    if not equals or not all(names):
        raise _InvalidDocument(location, "config.override", "expected key=value, as in training.max_steps=100")
    node = _compose(value.strip() or "null", lambda line: location)
    if node is None:
        raise _InvalidDocument(location, "config.override", "'#' begins a comment; put the value in quotes")
    _set_value(document, names, node, location)


def _set_value(document: _Document, names: Sequence[str], node: Any, location: _Location) -> None:
    """Put the value of a node at the keys that `names` spell, making mappings where there are none."""
    container = document.data
    keys: Keys = ()
    for name in names[:-1]:
        key = _find_key(container, name, keys, location)
        keys = (*keys, key)
        child = container.get(key) if isinstance(container, dict) else container[key]
        if child is None:
            child = {}
            container[key] = child
            document.locations[keys] = location
        container = child
    key = _find_key(container, names[-1], keys, location)
    keys = (*keys, key)
    document.locations = {other: where for other, where in document.locations.items() if other[: len(keys)] != keys}
    document.locations[keys] = location
    container[key] = _Builder(document, lambda line: location).build(node, keys)


def _find_key(container: Any, name: str, keys: Keys, location: _Location) -> str | int:
    """`name` as a key of a mapping, or as an index of a list, that is found at `keys`."""
    if isinstance(container, dict):
        return name
    if not isinstance(container, list):
        message = f"{dotted_key(keys)} is {format_value(container)}, expected a mapping"
        raise _InvalidDocument(location, "config.type", message, keys)
    if name.isdecimal() and len(name) < 9 and int(name) < len(container):
        return int(name)
    message = f"{dotted_key(keys)} has length {len(container)}, counted from 0; there is no item {name!r}"
    raise _InvalidDocument(location, "config.index", message, keys)
