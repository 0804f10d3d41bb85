"""A YAML document with the location of each value, and the problems found in it."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import yaml
from pydantic import BaseModel

from mmx.config.validation_errors import Keys, dotted_key, fields_by_key
from mmx.errors import ConfigError, one_line

Node: TypeAlias = yaml.Node
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


class Location(NamedTuple):
    """Where a value is. `order` sorts problems: the line, or beyond all lines for the command line."""

    order: int
    text: str
    file: str | None = None
    line: int | None = None


class InvalidDocument(Exception):  # noqa: N818 - becomes a ConfigError
    """A problem after which reading cannot go on."""

    def __init__(
        self, location: Location, message: str, keys: Keys | None = None, suggestion: str | None = None, *, code: str
    ) -> None:
        super().__init__(message)
        self.location = location
        self.code = code
        self.message = message
        self.keys = keys
        self.suggestion = suggestion


@dataclass
class Document:
    """A configuration that is being read: its values, their locations, and the problems so far."""

    name: str
    data: Any
    locations: dict[Keys, Location]
    problems: list[tuple[int, ConfigProblem]] = field(default_factory=list)
    refused: set[Keys] = field(default_factory=set)  # keys with a problem; problems below them are not reported

    def location(self, keys: Keys) -> Location:
        """The location of a value, or of the nearest value around it that has one."""
        for length in range(len(keys), 0, -1):
            if keys[:length] in self.locations:
                return self.locations[keys[:length]]
        return self.locations[()]

    def add(
        self, location: Location, message: str, keys: Keys | None = None, suggestion: str | None = None, *, code: str
    ) -> None:
        """Record a problem."""
        key = dotted_key(keys) if keys else None
        problem = ConfigProblem(code, message, key, location.text, location.file, location.line, suggestion)
        self.problems.append((location.order, problem))

    def add_stop(self, stop: InvalidDocument) -> None:
        """Record the problem that ended the reading."""
        self.add(stop.location, stop.message, stop.keys, stop.suggestion, code=stop.code)

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


# ---- YAML nodes to values ------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Composes nodes only; `parse_scalar` decides what an unquoted scalar means."""

    def resolve(self, kind: type[Node], value: object, implicit: tuple[bool, bool]) -> str:
        return PLAIN if kind is yaml.ScalarNode and implicit[0] else str(super().resolve(kind, value, implicit))


def read_document(document: Document, text: str, schema: type[BaseModel]) -> None:
    """Read the values of a YAML text, and their locations, into a document. Raises InvalidDocument."""
    name = document.name
    builder = DocumentBuilder(document, lambda line: Location(line, f"{name}:{line}", name, line))
    root = compose(text, builder.location_of_line)
    if not isinstance(root, yaml.MappingNode):
        problem = "the file is empty" if root is None else "this is not a mapping"
        known = ", ".join(fields_by_key(schema))
        raise InvalidDocument(
            builder.location_of_line(1),
            f"{problem}, expected 'key: value'; known: {known}.",
            code="config.not_a_mapping",
        )
    document.data = builder.build(root, ()) or {}


def compose(text: str, location_of_line: Callable[[int], Location]) -> Node | None:
    """Return the tree of YAML nodes, None for an empty text. Raises InvalidDocument."""
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
    raise InvalidDocument(location_of_line(line), message, code="config.syntax")


def _syntax_message(parser_text: str) -> _SyntaxMessage:
    return next((known for known in SYNTAX_MESSAGES if known.parser_text in parser_text), UNKNOWN_SYNTAX)


@dataclass
class DocumentBuilder:
    """Converts YAML nodes to values, records their locations, and reports duplicate keys and tags."""

    document: Document
    location_of_line: Callable[[int], Location]
    num_nodes: int = 0

    def build(self, node: Node, keys: Keys) -> object:
        """Return the value of a node; None where it is refused."""
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES or len(keys) > MAX_DEPTH:
            raise InvalidDocument(
                self._location(node), "too many values, or nested too deeply; simplify it", code="config.too_large"
            )
        if node.tag not in TAGS:
            tag = one_line(node.tag.replace("tag:yaml.org,2002:", "!!"), limit=200)
            self._refuse(node, keys, f"the tag {tag} is not allowed; write the plain value")
            return None
        if isinstance(node, yaml.MappingNode):
            return self._build_mapping(node, keys)
        if isinstance(node, yaml.SequenceNode):
            return [self._build_child(item, (*keys, index), item) for index, item in enumerate(node.value)]
        return parse_scalar(node.value) if node.tag == PLAIN else node.value

    def _build_mapping(self, node: Node, keys: Keys) -> dict[str, object]:
        """A mapping whose keys are the names as typed. Of two equal keys, the first is kept."""
        values: dict[str, object] = {}
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

    def _build_child(self, node: Node, keys: Keys, located_at: Node) -> object:
        self.document.locations[keys] = self._location(located_at)
        return self.build(node, keys)

    def _location(self, node: Node) -> Location:
        return self.location_of_line(node.start_mark.line + 1)

    def _report_duplicate(self, node: Node, keys: Keys) -> None:
        first = self.document.locations[keys].text
        message = f"{dotted_key(keys)} is given twice, first at {first}; keep one"
        self.document.add(self._location(node), message, keys, code="config.duplicate_key")

    def _refuse(self, node: Node, keys: Keys, message: str) -> None:
        self.document.add(self._location(node), f"{dotted_key(keys)}: {message}", keys, code="config.not_allowed")
        self.document.refused.add(keys)


def parse_scalar(text: str) -> str | float | bool | None:
    """Return the value of an unquoted scalar; the text itself where that is ambiguous."""
    if text.lower() in CONSTANTS:
        return CONSTANTS[text.lower()]
    if INTEGER.fullmatch(text):
        return int(text)
    if NUMBER.fullmatch(text) and math.isfinite(float(text)):  # 1e999 would become infinity
        return float(text)
    return text
