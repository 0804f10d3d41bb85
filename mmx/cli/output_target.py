"""The file of --out and its format: JSON lines, or a file that is made of them at the end of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

import typer

from mmx.errors import MmxError
from mmx.io.results_file import is_stream
from mmx.io.tables import check_parquet
from mmx.io.tar import is_tar

RowFormat = Literal["jsonl", "csv", "parquet", "txt", "tar"]

_FORMAT_HELP = (
    "Format of --out: jsonl, csv, parquet, txt, or tar (only mmx caption). By default that of the suffix .csv, "
    ".parquet or .tar, else jsonl. All but jsonl are made at the end of FILE.jsonl, from which a stopped run is "
    "continued."
)
FormatOption = Annotated[str | None, typer.Option("--format", metavar="NAME", help=_FORMAT_HELP)]

_FORMATS_BY_SUFFIX: dict[str, RowFormat] = {".csv": "csv", ".parquet": "parquet", ".tar": "tar"}


@dataclass(frozen=True)
class OutputTarget:
    """Where rows go. results: the file of JSON lines; export: a file of another format, made of it at the end."""

    results: Path | None
    export: Path | None
    format: RowFormat

    @classmethod
    def parse(cls, out: Path | None, format_name: str | None, with_tar: bool = False) -> OutputTarget:
        """Check --out and --format. with_tar: whether the command writes tar archives. Raises MmxError."""
        kind = _parse_format(out, format_name, with_tar)
        if kind == "jsonl":
            return cls(out, None, kind)
        if out is None or out == Path("-") or is_stream(out):
            message = f"--format {kind} was given without a file; type --format {kind} --out FILE."
            raise MmxError(message, code="option.needs_out", option="--format")
        if kind == "tar" and is_tar(str(out)) and out.suffix.lower() != ".tar":
            message = f"--out {out} names a compressed archive; mmx writes uncompressed ones, choose a name with .tar."
            raise MmxError(message, code="output.compressed_tar", path=str(out))
        if kind == "parquet":
            check_parquet()
        return cls(out.with_name(f"{out.name}.jsonl"), out, kind)

    def check_not_replaced(self) -> None:
        """Raise MmxError if the file exists and was not made of the results file, which does not exist."""
        if self.export is None or self.results is None:
            return
        if self.export.exists() and not self.results.exists():
            message = (
                f"{self.export} exists, and there is no {self.results.name} of which it was made; type --overwrite to "
                "replace it, or choose another --out."
            )
            raise MmxError(message, code="output.exists", path=str(self.export))


def _parse_format(out: Path | None, name: str | None, with_tar: bool) -> RowFormat:
    known: tuple[RowFormat, ...] = get_args(RowFormat)
    allowed = [kind for kind in known if with_tar or kind != "tar"]
    if name is None:
        found = _FORMATS_BY_SUFFIX.get("" if out is None else out.suffix.lower(), "jsonl")
        if found not in allowed:
            message = f"--out {out} names a tar file, which only mmx caption writes; choose a name with .jsonl or .csv."
            raise MmxError(message, code="option.format", given=found)
        return found
    for kind in allowed:
        if kind == name:
            return kind
    message = f"--format was given {name!r}; expected one of {', '.join(allowed)}."
    raise MmxError(message, code="option.format", given=name)
