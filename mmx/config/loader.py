"""Typed YAML configuration, checked by a pydantic schema: every problem is reported at once, with file and line.

    config = load_config("train.yaml", RunConfig, ["training.max_steps=100", "train.0.sampling_weight=0.5"])

The loader knows no particular schema. By convention a schema is frozen, forbids unknown keys, and its validators raise
ValueError.

No value is converted: `1e-4` is a number, only `true` and `false` are booleans, and `no`, `012`, `1_000`, `12:30:45`
and dates stay strings, which a field for a number refuses. Anchors and aliases work; tags (except `!!str`) and `<<`
merges are refused.
"""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import to_json, to_jsonable_python

from mmx.config.document import (
    ConfigProblem,
    Document,
    DocumentBuilder,
    InvalidDocument,
    Location,
    Node,
    compose,
    parse_scalar,
    read_document,
)
from mmx.config.validation_errors import Keys, describe_errors, dotted_key, format_value
from mmx.errors import most_similar, one_line

__all__ = ["ConfigProblem", "config_from_overrides", "dump_config", "load_config", "override_config", "parse_config"]

ConfigT = TypeVar("ConfigT", bound=BaseModel)

MAX_BYTES = 2**20


# ---- public functions ------------------------------------------------------------------------------------------------


def load_config(path: str | PathLike[str], schema: type[ConfigT], overrides: Sequence[str] = ()) -> ConfigT:
    """Read a YAML file, apply `key.key=value` overrides (values are YAML, keys hold no dots), and check it.

    Raises ConfigError that names every problem by file and line, or by the argument on the command line.
    """
    name = str(path)
    document = Document(name, {}, {(): Location(1, f"{name}:1", name, 1)})
    try:
        read_document(document, _read_text(Path(path)), schema)
    except InvalidDocument as stop:
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
    return _validate(Document(where, values, {(): Location(0, where)}), schema)


def dump_config(config: BaseModel) -> str:
    """Return YAML text, in the order of declaration, that `load_config` reads back to an equal configuration."""
    return str(yaml.dump(_to_plain_values(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120))


def _overridden(values: dict[str, Any], schema: type[ConfigT], overrides: Sequence[str]) -> ConfigT:
    document = Document("command line", values, {(): Location(0, "command line")})
    _apply_overrides(document, overrides)
    return _validate(document, schema)


def _validate(document: Document, schema: type[ConfigT]) -> ConfigT:
    """Check the values in pydantic's strict JSON mode: no string becomes a number, but a list becomes a tuple."""
    try:
        config = schema.model_validate_json(to_json(document.data, inf_nan_mode="constants"), strict=True)
        if not document.problems:
            return config
    except ValidationError as error:
        for found in describe_errors(error, schema, document.refused):
            document.add(document.location(found.keys), found.message, found.keys, found.suggestion, code=found.code)
    except (ValueError, RecursionError):
        document.add(
            document.location(()),
            "a value is of another type, expected strings, numbers, true, false, lists and mappings",
            code="config.type",
        )
    raise document.error() from None


# ---- files ------------------------------------------------------------------------------------------


def _read_text(path: Path) -> str:
    """The text of a file. Raises InvalidDocument."""
    name = str(path)
    location = Location(0, name, name)
    if path.is_dir():
        raise InvalidDocument(location, "this is a folder, expected a YAML file", code="config.file")
    if not path.is_file():
        similar = most_similar(path.name, _names_in(path.parent))
        hint = "check the path" if similar is None else f"did you mean {similar!r}?"
        raise InvalidDocument(location, f"there is no such file; {hint}", suggestion=similar, code="config.file")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError:
        raise InvalidDocument(location, "the file cannot be read; check its permissions", code="config.file") from None
    if len(content) > MAX_BYTES:
        raise InvalidDocument(
            location, f"the file is larger than {MAX_BYTES} bytes; shorten it", code="config.too_large"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InvalidDocument(
            Location(line, f"{name}:{line}", name, line),
            "this is not UTF-8 text; save the file as UTF-8",
            code="config.encoding",
        ) from None


def _names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


# ---- writing ---------------------------------------------------------------------------------------------------------


def _to_plain_values(config: BaseModel) -> Any:
    """Mappings, lists and scalars, as a file holds them."""
    return to_jsonable_python(config.model_dump(by_alias=True, round_trip=True), inf_nan_mode="constants")


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Writes no aliases, and quotes every string that this loader, or a YAML 1.1 one, would read as something else."""

    def ignore_aliases(self, data: object) -> bool:
        return True

    def represent_data(self, data: object) -> Node:
        node = super().represent_data(data)
        if isinstance(data, str) and not (data.isprintable() and parse_scalar(data) == data):
            node.style = "'" if data.isprintable() else '"'  # only double quotes keep every kind of line end
        return node


# ---- overrides -------------------------------------------------------------------------------------------------------


def _apply_overrides(document: Document, overrides: Sequence[str]) -> None:
    for index, text in enumerate(overrides):
        location = Location(10**9 + index, f"command line: {one_line(text, limit=200)}")
        try:
            _apply_override(document, text, location)
        except InvalidDocument as stop:
            document.add_stop(stop)


def _apply_override(document: Document, text: str, location: Location) -> None:
    """Apply one `key.key=value`. Raises InvalidDocument."""
    name, equals, value = text.partition("=")
    names = name.strip().split(".")
    if not equals or not all(names):
        raise InvalidDocument(location, "expected key=value, as in training.max_steps=100", code="config.override")
    node = compose(value.strip() or "null", lambda line: location)
    if node is None:
        raise InvalidDocument(location, "'#' begins a comment; put the value in quotes", code="config.override")
    _set_value(document, names, node, location)


def _set_value(document: Document, names: Sequence[str], node: Node, location: Location) -> None:
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
    container[key] = DocumentBuilder(document, lambda line: location).build(node, keys)


def _find_key(container: Any, name: str, keys: Keys, location: Location) -> str | int:
    """`name` as a key of a mapping, or as an index of a list, that is found at `keys`."""
    if isinstance(container, dict):
        return name
    if not isinstance(container, list):
        message = f"{dotted_key(keys)} is {format_value(container)}, expected a mapping"
        raise InvalidDocument(location, message, keys, code="config.type")
    if name.isdecimal() and len(name) < 9 and int(name) < len(container):
        return int(name)
    message = f"{dotted_key(keys)} has length {len(container)}, counted from 0; there is no item {name!r}"
    raise InvalidDocument(location, message, keys, code="config.index")
