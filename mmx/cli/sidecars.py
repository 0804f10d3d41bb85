"""Captions next to images: the options --sidecar, --xmp and --existing, for folders and for tar archives."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmx.cli.input_item import result_fields
from mmx.cli.inputs import normalize_path
from mmx.cli.output_target import OutputTarget
from mmx.cli.rows import Row, RowFiles, error_row
from mmx.errors import DataError, MmxError, one_line
from mmx.io.pending_row import PendingRow
from mmx.io.sidecars import EXISTING, SUFFIXES, Existing, Sidecars
from mmx.io.tables import read_rows
from mmx.io.tar import is_tar
from mmx.io.tar_captions import CaptionedTar, TarCaption
from mmx.io.xmp import has_only_xml_characters

if TYPE_CHECKING:
    from mmx.inference.pipeline import Pipeline

_SIDECAR_HELP = "Write the caption next to each image, as a.txt for a.jpg: .txt, .caption or .json. Repeatable."
_XMP_HELP = "Write the caption as dc:description of a.xmp next to a.jpg. Other fields of the file stay."
_EXISTING_HELP = (
    "For sidecars that have a text: skip the image (default), overwrite the text, append a line, or prepend one."
)

SidecarOption = Annotated[list[str] | None, typer.Option("--sidecar", metavar="SUFFIX", help=_SIDECAR_HELP)]
XmpOption = Annotated[bool, typer.Option("--xmp", help=_XMP_HELP)]
ExistingOption = Annotated[str, typer.Option("--existing", metavar="NAME", help=_EXISTING_HELP)]

_JSON_FIELDS = ("score",)  # what a JSON sidecar has besides the caption


def parse_sidecars(suffixes: Sequence[str] | None, xmp: bool) -> list[str]:
    """Return the kinds of --sidecar and --xmp, each once. Raises MmxError."""
    given = [suffix if suffix.startswith(".") else f".{suffix}" for suffix in suffixes or ()]
    for suffix in given:
        if suffix not in SUFFIXES:
            message = f"--sidecar was given {suffix!r}; expected one of {', '.join(SUFFIXES)}."
            raise MmxError(message, code="option.sidecar", given=suffix)
    return list(dict.fromkeys([*given, ".xmp"] if xmp else given))


def parse_existing(name: str) -> Existing:
    """Check the value of --existing. Raises MmxError."""
    for known in EXISTING:
        if known == name:
            return known
    message = f"--existing was given {name!r}; expected one of {', '.join(EXISTING)}."
    raise MmxError(message, code="option.existing", given=name)


def check_existing(target: OutputTarget, suffixes: Sequence[str], existing: Existing) -> None:
    """Raise MmxError if --existing does not fit the other options."""
    if target.format == "tar" or existing == "skip":
        return
    if not suffixes:
        message = f"--existing {existing} was given without sidecars; type --sidecar .txt --existing {existing}."
        raise MmxError(message, code="option.needs_sidecar", option="--existing")
    if existing != "overwrite" and target.results in (None, Path("-")):
        message = (
            f"--existing {existing} needs a list of the images that are done, else a second run would add to them "
            "again; type --out FILE."
        )
        raise MmxError(message, code="option.needs_out", option="--existing")


def captioned_files(
    target: OutputTarget, suffixes: Sequence[str], existing: Existing, names: Sequence[str], pipeline: Pipeline
) -> RowFiles | None:
    """Return what writes captions next to images; None if that is not asked for.

    Raises MmxError if a tar archive is to be written and the input is not one, or is damaged.
    """
    if target.format == "tar":
        if len(names) != 1 or not is_tar(names[0]):
            message = f"--out {target.export} is a copy of one tar archive; type: mmx caption FILE.tar --out NEW.tar"
            raise MmxError(message, code="option.tar_input", path=str(target.export))
        tar = CaptionedTar(normalize_path(names[0]), suffixes or [".txt"], existing, pipeline.accepts)
        return _TarFiles(tar, pipeline)
    if not suffixes:
        return None
    reserved = [path for path in (target.results, target.export) if path is not None]
    return _SidecarFiles(Sidecars(suffixes, existing, pipeline.accepts, reserved), pipeline)


class _SidecarFiles:
    """Sidecars next to the images of rows."""

    def __init__(self, sidecars: Sidecars, pipeline: Pipeline) -> None:
        self._sidecars = sidecars
        self._sources = _file_sources(pipeline)
        self._results = result_fields(pipeline)

    def are_done(self, fields: Mapping[str, object]) -> bool:
        return self._sidecars.are_done(Path(_file_name(fields, self._sources)))

    def write(self, rows: Iterable[Row], pending: PendingRow | None) -> Iterator[Row]:
        for row in rows:
            if "error" in row.fields:
                yield row
                continue
            try:
                self._write_row(row, pending)
                yield row
            except MmxError as error:
                yield error_row(row, error, self._results)

    def _write_row(self, row: Row, pending: PendingRow | None) -> None:
        text = str(row.fields["caption"])
        image = Path(_file_name(row.fields, self._sources))
        _check_text(row.name, text, self._sidecars.suffixes)
        with self._sidecars.changes(image, text, _json_fields(row.fields)) as changes:
            if pending is not None:
                pending.note(image, row.fields, changes)
            for change in changes:
                change.apply()

    def finish(self, results: Path, export: Path) -> bool:
        return True  # every sidecar was written with its row


class _TarFiles:
    """Captions in a copy of a tar archive."""

    def __init__(self, tar: CaptionedTar, pipeline: Pipeline) -> None:
        self._tar = tar
        self._sources = _file_sources(pipeline)
        self._results = result_fields(pipeline)

    def are_done(self, fields: Mapping[str, object]) -> bool:
        return self._tar.is_done(self._member(fields))

    def write(self, rows: Iterable[Row], pending: PendingRow | None) -> Iterator[Row]:
        for row in rows:
            try:
                self._tar.check(self._member(row.fields))
                yield row
            except DataError as error:
                yield error_row(row, error, self._results)

    def finish(self, results: Path, export: Path) -> bool:
        captions: dict[str, TarCaption] = {}
        for row in read_rows(results):
            if "error" not in row:
                captions[self._member(row)] = TarCaption(str(row["caption"]), _json_fields(row))
        errors = self._tar.write(export, captions)
        for error in errors:
            print(one_line(str(error)), file=sys.stderr)
        return not errors

    def _member(self, fields: Mapping[str, object]) -> str:
        return _file_name(fields, self._sources).removeprefix(f"{self._tar.path}/")


def _file_sources(pipeline: Pipeline) -> list[str]:
    return [name for name, encoder in pipeline.model.encoders.items() if encoder.modality != "text"]


def _file_name(fields: Mapping[str, object], sources: Collection[str]) -> str:
    """Return the path of the first input that is a file; "" if there is none."""
    paths = (fields.get(source) for source in sources)
    return next((path for path in paths if isinstance(path, str)), "")


def _json_fields(fields: Mapping[str, object]) -> dict[str, object]:
    return {name: fields[name] for name in _JSON_FIELDS if name in fields}


def _check_text(name: str, text: str, suffixes: Collection[str]) -> None:
    """Raise DataError for a text that XML cannot hold."""
    if ".xmp" in suffixes and not has_only_xml_characters(text):
        message = f"{name!r}: the caption has a control character, which XMP cannot hold; leave out --xmp."
        raise DataError(message, code="sidecar.control_character", name=name)
