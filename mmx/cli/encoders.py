"""The commands about encoders: list them, check one, begin a new one."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mmx.cli.options import JsonOption, exit_with_status

app = typer.Typer(rich_markup_mode=None, invoke_without_command=True)


@app.callback()
def encoders(context: typer.Context, as_json: JsonOption = False) -> None:
    """List the encoders installed, and what is broken and why.

    `mmx encoders check NAME` runs the conformance kit.
    """
    if context.invoked_subcommand is not None:
        return
    from mmx.encoders.discovery import discover_encoders

    for found in discover_encoders():
        entry = found.entry
        if as_json:
            told = {"modality": found.modality, "options": found.options, "problem": found.problem}
            print(json.dumps({**asdict(entry), **told}))
            continue
        kind = "BROKEN" if found.problem else found.modality
        options = ", ".join(f"{key}={value}" for key, value in (found.options or {}).items())
        print(f"{entry.name}\t{kind}\t{entry.package} {entry.version}\t{entry.address}")
        print(f"    {found.problem or options or 'no options'}")


@app.command()
def check(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="An encoder's name, or its address package.module:Class.")
    ],
    changes: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Its options, such as size=64.")
    ] = None,
    sample: Annotated[
        list[Path] | None, typer.Option("--sample", metavar="FILE", help="Inputs to check with, three or more.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option("--only", metavar="CHECK", help="Run this check alone.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check that an encoder keeps the contract.

    Each promise that is broken is told with what was seen, why it matters and what to do.
    """
    from mmx.config.loader import config_from_overrides
    from mmx.encoders.registry import resolve
    from mmx.testing import encoder_checks

    options = config_from_overrides(resolve(name).Options, changes or []).model_dump(mode="json")
    samples = [str(path) for path in sample] if sample else None
    failed = False
    for call in encoder_checks(name, samples, options, only=only or ()):
        result = call.result()
        failed = failed or result.status == "failed"
        print(json.dumps(asdict(result)) if as_json else str(result), flush=True)
    exit_with_status(not failed)


def new_encoder(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its name in configurations, such as birdsong.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="FOLDER", help="Where; else mmx-NAME here.")] = None,
) -> None:
    """Write a complete package for an encoder of your own.

    It installs, is found by mmx, and passes its own test as written; then make it yours.
    """
    from mmx.testing.scaffold import write_encoder_package

    print(write_encoder_package(name, out or Path(f"mmx-{name}")))
