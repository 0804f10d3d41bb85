"""The commands about encoders: `mmx encoders`, `mmx encoders check`, and `mmx new-encoder`."""

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
    """List the installed encoders, and what is broken and why.

    `mmx encoders check NAME` runs the conformance kit.
    """
    if context.invoked_subcommand is not None:
        return
    from mmx.encoders.discovery import discover_encoders

    for encoder in discover_encoders():
        entry = encoder.entry
        if as_json:
            description = {"modality": encoder.modality, "options": encoder.options, "problem": encoder.problem}
            print(json.dumps({**asdict(entry), **description}))
            continue
        status = "BROKEN" if encoder.problem else encoder.modality
        options = ", ".join(f"{key}={value}" for key, value in (encoder.options or {}).items())
        print(f"{entry.name}\t{status}\t{entry.package} {entry.version}\t{entry.address}")
        print(f"    {encoder.problem or options or 'no options'}")


@app.command()
def check(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="An encoder's name, or its address package.module:Class.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Its options, such as size=64.")
    ] = None,
    sample: Annotated[
        list[Path] | None, typer.Option("--sample", metavar="FILE", help="Inputs to check with, three or more.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option("--only", metavar="CHECK", help="Run only this check.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check that an encoder keeps the contract.

    For each failed check: what was observed, why it matters, and what to do.
    """
    from mmx.config.loader import config_from_overrides
    from mmx.encoders.registry import resolve
    from mmx.testing import encoder_checks

    options = config_from_overrides(resolve(name).Options, overrides or []).model_dump(mode="json")
    samples = [str(path) for path in sample] if sample else None
    succeeded = True
    for run_check in encoder_checks(name, samples, options, only=only or ()):
        result = run_check.result()
        succeeded = succeeded and result.status != "failed"
        print(json.dumps(asdict(result)) if as_json else str(result), flush=True)
    exit_with_status(succeeded)


def new_encoder(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its name in configurations, such as birdsong.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="FOLDER", help="Default: mmx-NAME.")] = None,
) -> None:
    """Write a package for a new encoder.

    It can be installed, is found by mmx, and passes its own test. Then change it.
    """
    from mmx.testing.scaffold import write_encoder_package

    print(write_encoder_package(name, out or Path(f"mmx-{name}")))
