"""Texts of --start, --prepend and --append, which may have fields of the row: "{folder}: ", "{exif:DateTimeOriginal}".

A field is one of the row as written in its list, else folder, name or stem of the path of its input, or an EXIF field
of its image. `{{` and `}}` stand for braces.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from string import Formatter
from typing import TYPE_CHECKING, NamedTuple

from mmx.errors import MmxError

if TYPE_CHECKING:
    from mmx.inference.outputs import GeneratedText

_EXIF = "exif"


class _Part(NamedTuple):
    """A literal text, and the field after it with what follows its colon; no field at the end."""

    literal: str
    field: str | None
    argument: str


@dataclass(frozen=True)
class Template:
    """A text with fields."""

    text: str
    parts: tuple[_Part, ...]

    @classmethod
    def parse(cls, text: str | None, option: str) -> Template:
        """Parse the value of an option; None is an empty text. Raises MmxError (option.template)."""
        try:
            parsed = list(Formatter().parse(text or ""))
        except ValueError:
            parsed = [("", "", "", None)]
        parts: list[_Part] = []
        for literal, field, argument, conversion in parsed:
            needs_argument = field == _EXIF
            if field == "" or conversion or bool(argument) != needs_argument:
                message = (
                    f"{option} was given {text!r}; expected fields such as {{folder}} or {{exif:DateTimeOriginal}}, "
                    "and {{ or }} for a brace."
                )
                raise MmxError(message, code="option.template", option=option, given=text)
            parts.append(_Part(literal, field, argument or ""))
        return cls(text or "", tuple(parts))

    def render(self, fields: Mapping[str, object], inputs: Mapping[str, object]) -> str:
        """Return the text for a row with these fields and raw inputs. Raises MmxError (template.field)."""
        text = ""
        for part in self.parts:
            text += part.literal
            if part.field == _EXIF:
                text += _exif_value(part.argument, inputs)
            elif part.field is not None:
                text += _value(part.field, fields, inputs)
        return text


@dataclass(frozen=True)
class TextTemplates:
    """The texts around those of the model: `start` is read by it, the others are added to what it returned."""

    start: Template
    prepend: Template
    append: Template

    @classmethod
    def parse(cls, start: str | None, prepend: str | None, append: str | None) -> TextTemplates:
        """Parse the values of the options. Raises MmxError."""
        return cls(
            Template.parse(start, "--start"), Template.parse(prepend, "--prepend"), Template.parse(append, "--append")
        )

    def config(self) -> dict[str, object]:
        """Return what runs that write the same file have in common."""
        return {"prepend": self.prepend.text, "append": self.append.text}

    def render(self, fields: Mapping[str, object], inputs: Mapping[str, object]) -> RowTexts:
        """Return the texts of a row. Raises MmxError."""
        return RowTexts(
            self.start.render(fields, inputs), self.prepend.render(fields, inputs), self.append.render(fields, inputs)
        )


@dataclass(frozen=True)
class RowTexts:
    """The texts around that of one row."""

    start: str = ""
    prepend: str = ""
    append: str = ""

    def add_to(self, result: GeneratedText | MmxError) -> GeneratedText | MmxError:
        """Return a result with `prepend` and `append` added to all of its texts."""
        if isinstance(result, MmxError) or not (self.prepend or self.append):
            return result
        alternatives = tuple(replace(other, text=self._add(other.text)) for other in result.alternatives)
        return replace(result, text=self._add(result.text), alternatives=alternatives)

    def _add(self, text: str) -> str:
        return f"{self.prepend}{text}{self.append}"


def _value(name: str, fields: Mapping[str, object], inputs: Mapping[str, object]) -> str:
    """The value of a field, which is a text or a number, or a part of the path of the input."""
    value = fields.get(name)
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    path = _path(fields, inputs)
    if value is None and path is not None and name in ("folder", "name", "stem"):
        folder = path.parent.name
        if folder in ("", ".."):
            folder = Path(os.path.abspath(path)).parent.name
        return {"folder": folder, "name": path.name, "stem": path.stem}[name]
    raise _missing(name, f"a row with the fields {', '.join(fields)}")


def _path(fields: Mapping[str, object], inputs: Mapping[str, object]) -> PurePath | None:
    """The path of the first input, within its archive if it is a member of one."""
    for source in inputs:
        written = fields.get(source)
        if isinstance(written, str):
            return PurePath(written)
    return None


def _exif_value(name: str, inputs: Mapping[str, object]) -> str:
    from mmx.io.exif import read_exif_field

    for raw in inputs.values():
        if isinstance(raw, str | bytes):
            value = read_exif_field(raw, name)
            if value is not None:
                return value
    raise _missing(f"{_EXIF}:{name}", "this image")


def _missing(name: str, where: str) -> MmxError:
    message = f"{{{name}}} is not in {where}; name another field, or add it to the list."
    return MmxError(message, code="template.field", field=name)
