"""Figures as lines of a table, and their notes below it."""

from __future__ import annotations

from collections.abc import Iterable

from mmx.bench.timing import BenchResult, Spread

NAME, CELL, UNIT = 41, 27, 13
HEADER = (
    f"{'median (range)':<{NAME}} {'mmx':>{CELL}}  {'transformers (or as named)':>{CELL}}  {'':<{UNIT}} "
    f"{'theirs / ours':>{CELL}}  same  peak MB"
)


def line(figure: BenchResult) -> str:
    """One figure; what is not there is a dash."""
    same = {True: "yes", False: "NO", None: "-"}[figure.same]
    peaks = f"{_megabytes(figure.ours_peak_mb)} / {_megabytes(figure.theirs_peak_mb)}"
    return (
        f"{figure.name:<{NAME}} {_spread(figure.ours):>{CELL}}  {_spread(figure.theirs):>{CELL}}  "
        f"{figure.unit:<{UNIT}} {_spread(figure.ratio):>{CELL}}  {same:<4}  {peaks}"
    )


def notes(figures: Iterable[BenchResult]) -> str:
    """What has to be known of the figures that need it, each note once."""
    found: dict[str, list[str]] = {}
    for figure in figures:
        if figure.note:
            found.setdefault(figure.note, []).append(figure.name)
    return "\n".join(f"{'; '.join(names)}: {note}." for note, names in found.items())


def _spread(spread: Spread | None) -> str:
    return "-" if spread is None else f"{spread.median:.2f} ({spread.low:.2f} to {spread.high:.2f})"


def _megabytes(peak: float | None) -> str:
    return "-" if peak is None else f"{peak:.1f}"
