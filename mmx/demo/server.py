"""How the page is served: to this machine alone, from an empty folder, without a word to anybody else."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, current_thread, main_thread
from typing import TYPE_CHECKING

from mmx.data.scenes import generate_scene, render_scene
from mmx.demo.actions import image_source
from mmx.errors import MmxError

if TYPE_CHECKING:
    from mmx.inference.pipeline import Pipeline

LARGEST_UPLOAD = "20mb"
EXAMPLES = 6  # pictures to pick from, of the series that is kept for demonstrations
SERIES = 7
ENDS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_SHARE": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}


@contextmanager
def serve(pipeline: Pipeline, host: str = "127.0.0.1", port: int | None = None) -> Iterator[str]:
    """The demo's address while it is served. port: None takes the first free one from 7860 on.

    Uploads lie in a temporary folder that is removed at the end; the process stands in an empty one meanwhile, for
    gradio may hand out what lies where it was started. Raises MmxError for a port or a host that cannot be had, and for
    a model that reads no pictures.
    """
    if not pipeline.accepts("picture.png"):
        raise MmxError("the demo shows pictures, which no source of this model reads; give another --model.")
    image_source(pipeline)
    _check_host(host)
    with _told_to_end(), TemporaryDirectory(prefix="mmx-demo-") as folder, _standing_in(Path(folder)):
        from mmx.demo.page import build
        from mmx.demo.theme import CSS, theme

        page = build(pipeline, _examples(Path(folder) / "examples"))
        try:
            _, address, _ = page.launch(
                server_name=host, server_port=port, share=False, inbrowser=False, quiet=True, prevent_thread_lock=True,
                show_error=False, allowed_paths=[], blocked_paths=[], max_file_size=LARGEST_UPLOAD,
                state_session_capacity=200, run_history=False, enable_monitoring=False, ssr_mode=False, pwa=False,
                mcp_server=False, num_workers=0, footer_links=["api", "settings"], theme=theme(), css=CSS,
            )  # fmt: skip
        except OSError:
            raise MmxError(f"{host} port {port or '7860 to 7959'} cannot be had; give another --port.") from None
        try:
            yield address
        finally:
            page.close(verbose=False)


def wait() -> None:
    """Come back never: `served` leaves when the process is told to end."""
    while True:
        Event().wait(3600)


@contextmanager
def _told_to_end() -> Iterator[None]:
    """While this stands, a signal to end leaves through it, so that temporary files are removed."""

    def leave(*_: object) -> None:
        raise SystemExit(0)

    if current_thread() is not main_thread():  # no other may set how signals are answered
        yield
        return
    # One that is ignored stays so: what nohup starts is to outlive its terminal.
    before = {number: signal.getsignal(number) for number in ENDS}
    heard = [number for number, answer in before.items() if answer not in (None, signal.SIG_IGN)]
    for number in heard:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, before[number])


def _check_host(host: str) -> None:
    """Raise MmxError for an address that is not this machine's; gradio would wait for it for long."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as place:
            place.bind((host, 0))
    except (OSError, TypeError, UnicodeError):  # the last two: what no name of a machine can be
        raise MmxError(f"{host!r} is no address of this machine; give another --host, such as 127.0.0.1.") from None


def _examples(folder: Path) -> list[Path]:
    """Pictures of coloured shapes, drawn now."""
    folder.mkdir()
    paths = [folder / f"shapes-{number}.png" for number in range(1, EXAMPLES + 1)]
    for number, path in enumerate(paths):
        render_scene(generate_scene(SERIES, number), 256).save(path)
    return paths


@contextmanager
def _standing_in(folder: Path) -> Iterator[None]:
    """In an empty folder, with gradio's settings and its folder of uploads beside it; all as it was afterwards."""
    empty, uploads = folder / "empty", folder / "uploads"
    empty.mkdir()
    uploads.mkdir()
    here, before = os.getcwd(), dict(os.environ)
    os.environ.update(QUIET, GRADIO_TEMP_DIR=str(uploads))
    os.chdir(empty)
    try:
        yield
    finally:
        os.chdir(here)
        for name in (*QUIET, "GRADIO_TEMP_DIR"):
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]
