"""Results as rows of a table, with notes below it."""

from __future__ import annotations

from collections.abc import Iterable

from mmx.bench.timing import BenchResult, Measurement

NAME_WIDTH = 41
CELL_WIDTH = 27
UNIT_WIDTH = 13
HEADER = (
    f"{'median (range)':<{NAME_WIDTH}} {'mmx':>{CELL_WIDTH}}  {'reference':>{CELL_WIDTH}}  {'':<{UNIT_WIDTH}} "
    f"{'reference / mmx':>{CELL_WIDTH}}  same  peak MB"
)


def line(result: BenchResult) -> str:
    """Return the row of one result; a missing value is a dash."""
    same = {True: "yes", False: "NO", None: "-"}[result.same]
    peaks = f"{_format_megabytes(result.mmx_peak_mb)} / {_format_megabytes(result.reference_peak_mb)}"
    return (
        f"{result.name:<{NAME_WIDTH}} {_format(result.mmx):>{CELL_WIDTH}}  {_format(result.reference):>{CELL_WIDTH}}  "
        f"{result.unit:<{UNIT_WIDTH}} {_format(result.ratio):>{CELL_WIDTH}}  {same:<4}  {peaks}"
    )


def notes(results: Iterable[BenchResult]) -> str:
    """Return the notes of the results, each note once."""
    names_by_note: dict[str, list[str]] = {}
    for result in results:
        if result.note:
            names_by_note.setdefault(result.note, []).append(result.name)
    return "\n".join(f"{'; '.join(names)}: {note}." for note, names in names_by_note.items())


def _format(measurement: Measurement | None) -> str:
    if measurement is None:
        return "-"
    return f"{measurement.median:.2f} ({measurement.low:.2f} to {measurement.high:.2f})"


def _format_megabytes(peak: float | None) -> str:
    return "-" if peak is None else f"{peak:.1f}"
