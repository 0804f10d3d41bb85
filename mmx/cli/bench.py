"""The command `mmx bench`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmx.cli.options import DeviceOption, DtypeOption, JsonOption, QuietOption, check_device, parse_dtype
from mmx.io.console import progress_bar, write_json

if TYPE_CHECKING:
    from mmx.bench import BenchResult

WORKLOADS_HELP = (
    "greedy, beams, questions, cache, attention-maps, training, images, constraints, formats, startup. Default: all."
)


def bench(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help=WORKLOADS_HELP)] = None,
    size: Annotated[
        str, typer.Option("--size", metavar="SIZE", help="tiny (like the bundled model) or base.")
    ] = "tiny",
    repeats: Annotated[int, typer.Option("--repeats", metavar="N", min=1, help="Number of timed runs.")] = 5,
    dtype: DtypeOption = "float32",
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write a JSON file, with notes.")] = None,
    as_json: JsonOption = False,
    device: DeviceOption = "cpu",
    quiet: QuietOption = False,
) -> None:
    """Compare speed and memory with transformers.

    Same machine, same random weights, same inputs, alternating runs in one
    process: medians, ranges, ratios, and whether the tokens are equal.
    """
    checked = parse_dtype(dtype)
    check_device(device)
    from mmx.bench import machine, run
    from mmx.bench.table import HEADER, line, notes

    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)  # first, because it may fail
    results: list[BenchResult] = []
    with progress_bar(0, quiet) as bar:
        for result in run(names or (), size, repeats, checked, device, bar.set_description):
            if not as_json and not results:
                bar.write(HEADER)
            results.append(result)
            bar.write(json.dumps(asdict(result)) if as_json else line(result))
    if not as_json:
        print(notes(results))
    if out is not None:
        setting = {"machine": machine(device), "size": size, "repeats": repeats, "dtype": dtype, "device": device}
        write_json(out, {**setting, "figures": [asdict(result) for result in results]})
