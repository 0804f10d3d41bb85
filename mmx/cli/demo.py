"""The command `mmx demo`."""

from __future__ import annotations

from typing import Annotated

import typer

from mmx.cli.options import DeviceOption, ModelOption, load_pipeline

_HOST_HELP = "Address to bind. Use 0.0.0.0 to accept connections from other machines."
_PORT_HELP = "Port to bind. Default: the first free port from 7860."


def demo(
    model: ModelOption = None,
    device: DeviceOption = "cpu",
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help=_HOST_HELP)] = "127.0.0.1",
    port: Annotated[int | None, typer.Option("--port", metavar="N", min=1, max=65535, help=_PORT_HELP)] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only the address.")] = False,
) -> None:
    """Start a web page: captions, questions, attention maps.

    Prints the address, and serves until it is interrupted. Nothing is sent to other machines.
    """
    pipeline = load_pipeline(model, device)
    from mmx.demo.server import serve, wait_for_signal

    with serve(pipeline, host, port) as address:
        print(address, flush=True)
        if not quiet:
            typer.echo("Press Ctrl+C to stop.", err=True)
        wait_for_signal()
