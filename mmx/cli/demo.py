"""The command that shows a model in a browser."""

from __future__ import annotations

from typing import Annotated

import typer

from mmx.cli.options import DeviceOption, ModelOption, load_pipeline


def demo(
    model: ModelOption = None,
    device: DeviceOption = "cpu",
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Who may come: this machine alone, or 0.0.0.0 for all.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option("--port", metavar="N", min=1, max=65535, help="Else the first free one from 7860 on.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the address alone.")] = False,
) -> None:
    """Show the model in a browser: caption, ask, look inside.

    Prints the address, and serves until it is interrupted. Nothing leaves this machine.
    """
    pipeline = load_pipeline(model, device)
    from mmx.demo.server import serve, wait

    with serve(pipeline, host, port) as address:
        print(address, flush=True)
        if not quiet:
            typer.echo("Ctrl+C ends it.", err=True)
        wait()
