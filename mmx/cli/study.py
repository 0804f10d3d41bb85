"""The command `mmx study`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmx.cli.options import JsonOption, QuietOption
from mmx.errors import MmxError, suggest
from mmx.io.console import progress_bar, write_json

if TYPE_CHECKING:
    from mmx.studies.positions import PositionReport
    from mmx.studies.tying import TyingReport

STUDIES = ("positions", "tying")


def study(
    name: Annotated[str, typer.Argument(metavar="NAME", help="positions, or tying.")],
    steps: Annotated[int | None, typer.Option("--steps", metavar="N", min=1, help="Steps of each model.")] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of weights and texts.")] = 0,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write a JSON file.")] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train small models that differ in one option.

    positions: kinds of position encoding, on a list whose order must be repeated.
    tying: one W_K and W_V across layers, or across all attention, on rare names
    that must be copied. About a minute each.
    """
    if name not in STUDIES:
        message = f"there is no study {name!r}; {suggest(name, list(STUDIES))}"
        raise MmxError(message, code="study.unknown", given=name)
    from mmx.studies import positions, tying

    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)  # first, because it may fail
    report: PositionReport | TyingReport
    with progress_bar(0, quiet) as bar:
        if name == "positions":
            report = positions.positions(steps or positions.STEPS, seed, bar.set_description)
        else:
            report = tying.tying(steps or tying.STEPS, seed, bar.set_description)
    print(json.dumps(asdict(report)) if as_json else report.table())
    if out is not None:
        write_json(out, {"study": name, **asdict(report)})
