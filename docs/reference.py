"""Write the generated pages: configuration.md from the schema, error-codes.md from the source.

    python docs/reference.py

`tests/project/test_docs.py` fails while a page differs from what this script writes.
"""

import ast
import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from mmx import errors
from mmx.config import schema

DOCS = Path(__file__).parent
PACKAGE = Path(schema.__file__).parents[1]
SHARED = schema.TransformerConfig
TYPES = {int: "integer", float: "number", str: "text", bool: "true or false", NoneType: "null"}
CONFIGURATION = """# Configuration

A configuration is a YAML file; its top level is [RunConfig](#runconfig). `mmx train FILE KEY=VALUE ...` overrides
values, with dots for nested keys and YAML for values: `training.max_steps=100`, `"tasks=[ask]"`. Unknown keys and wrong
types are refused with file, line and a suggestion. `mmx encoders` lists the options of each encoder.

Generated from `mmx/config` by `python docs/reference.py`.
"""
ERROR_CODES = """# Error codes

Every exception that mmx raises on purpose is an `mmx.MmxError` with a stable `code` and the facts of its message in
`details`. `*` stands for one of several reasons, such as `image.missing` or `image.damaged`.

Generated from the source by `python docs/reference.py`.

| exception | default code | raised for |
|---|---|---|
"""


def configuration() -> str:
    """Every configuration class with its keys, types, defaults and bounds."""
    parts = [CONFIGURATION]
    for name in _classes():
        parts.append(f"## {name}\n\n{_text(name)}\n\n{_keys(name)}")
    return "\n".join(parts)


def _classes() -> list[str]:
    """Names of the configuration classes: the top level, then the others in the order of the schema."""
    without = {"FrozenModel", "BaseTransformerConfig", "RunConfig"}
    names = ["RunConfig"]
    for name, value in vars(schema).items():
        if inspect.isclass(value) and value.__module__.startswith("mmx.config.") and name not in without:
            names.append(name)
    return names


def error_codes() -> str:
    """Every exception class, and every code in the package with its class and modules."""
    lines = [ERROR_CODES.rstrip("\n")]
    for name, kind in vars(errors).items():
        if inspect.isclass(kind) and issubclass(kind, errors.MmxError):
            summary = inspect.getdoc(kind).split("\n\n")[0].replace("\n", " ")
            lines.append(f"| `{name}` | `{kind.default_code}` | {summary} |")
    lines += ["", "| code | exception | raised in |", "|---|---|---|"]
    for code, (classes, modules) in sorted(codes_in_source().items()):
        lines.append(f"| `{code}` | {_listed(classes or _default_class(code))} | {_listed(modules)} |")
    return "\n".join(lines) + "\n"


def codes_in_source() -> dict[str, tuple[set[str], set[str]]]:
    """Each code that is passed as `code=...` in the package -> names of exception classes, paths of modules."""
    found: dict[str, tuple[set[str], set[str]]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE.parent).as_posix()
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            for code in _codes(call):
                classes, modules = found.setdefault(code, (set(), set()))
                modules.add(module)
                named = [ast.unparse(node) for node in (call.func, *call.args[:1])]
                classes.update(name for name in named if name.isidentifier() and name.endswith("Error"))
    return found


def _default_class(code: str) -> set[str]:
    """The exception class whose default code is the first part of a code."""
    part = code.partition(".")[0]
    return {name for name, kind in vars(errors).items() if getattr(kind, "default_code", None) == part}


def _codes(call: ast.Call) -> list[str]:
    """The codes of a call: literals, and f-strings with `*` for what is not constant."""
    values = [keyword.value for keyword in call.keywords if keyword.arg == "code"]
    found = []
    for value in values:
        for node in [value.body, value.orelse] if isinstance(value, ast.IfExp) else [value]:
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                pieces = [piece.value if isinstance(piece, ast.Constant) else "*" for piece in node.values]
                found.append("".join(str(piece) for piece in pieces))
    return found


def _text(name: str) -> str:
    """The docstring of a class; that of the transformer follows that of its base."""
    kind = getattr(schema, name)
    kinds = [kind.__base__, kind] if kind is SHARED else [kind]
    return "\n\n".join(inspect.getdoc(each) or "" for each in kinds)


def _keys(name: str) -> str:
    """A table of the keys of a class; those of a transformer are in a table of their own."""
    kind = getattr(schema, name)
    shared = SHARED.model_fields if issubclass(kind, SHARED) and kind is not SHARED else {}
    lines = ["All keys of [TransformerConfig](#transformerconfig), and:", ""] if shared else []
    lines += ["| key | type | default |", "|---|---|---|"]
    for key, field in kind.model_fields.items():
        if key not in shared:
            lines.append(f"| `{key}` | {_type(field.annotation)}{_bounds(field.metadata)} | {_default(field)} |")
    return "\n".join(lines) + "\n"


def _type(annotation: object) -> str:
    """The type in terms of YAML; configuration classes are links."""
    origin = get_origin(annotation)
    arguments = get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0]) + _bounds(arguments[1:])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(_type(argument) for argument in arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"list of {_type(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(_type(argument) for argument in arguments)}]"
    if origin is not None and issubclass(origin, Mapping):
        return f"mapping of names to {_type(arguments[1])}"
    if inspect.isclass(annotation) and issubclass(annotation, schema.FrozenModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    return TYPES.get(annotation, "any value")


def _bounds(metadata: Iterable[object]) -> str:
    """` > 0 and <= 1` from the constraints of a field."""
    found = []
    for item in metadata:
        for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="), ("min_length", "of length >=")):
            if getattr(item, name, None) is not None:
                found.append(f"{sign} {getattr(item, name)}")
    return f" {' and '.join(found)}" if found else ""


def _default(field: FieldInfo) -> str:
    value = field.default
    if value is PydanticUndefined:
        return "required"
    if field.validate_default:
        return "derived"
    if isinstance(value, schema.FrozenModel):
        changed = value.model_dump(exclude_defaults=True)
        return "its defaults" if value == type(value)() else f"`{_yaml(changed)}`"
    return f"`{_yaml(value)}`"


def _yaml(value: object) -> str:
    """A value as flow-style YAML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_yaml(item) for item in value) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) or '""'


def _listed(names: set[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


PAGES = {"configuration.md": configuration, "error-codes.md": error_codes}


if __name__ == "__main__":
    for page, write in PAGES.items():
        (DOCS / page).write_text(write(), encoding="utf-8")
