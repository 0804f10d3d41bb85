"""Serving the page: by default to this machine only, from an empty folder, without connections to other hosts."""

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
    import gradio as gr

    from mmx.inference.pipeline import Pipeline

MAX_UPLOAD = "20mb"
NUM_EXAMPLES = 6
EXAMPLE_SEED = 7  # of scenes that are not used for training or evaluation
_STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
_NO_TELEMETRY = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_SHARE": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}


@contextmanager
def serve(pipeline: Pipeline, host: str = "127.0.0.1", port: int | None = None) -> Iterator[str]:
    """Serve the demo within a `with` block, which receives its address.

    Uploads are stored in a temporary folder that is removed at the end. Meanwhile the working directory is an empty
    folder, because gradio may serve files of the directory in which it was started.

    Args:
        pipeline: a model with one source that reads images.
        host: address to bind; 0.0.0.0 accepts connections from other machines.
        port: None for the first free port from 7860.

    Raises:
        MmxError: the host or the port cannot be bound, or the model reads no images.
    """
    if not pipeline.accepts("image.png"):
        message = "the demo needs a source that reads images, and this model has none; give another --model."
        raise MmxError(message, code="demo.no_image_source")
    image_source(pipeline)
    _check_host(host)
    with _exit_on_signals(), TemporaryDirectory(prefix="mmx-demo-") as folder, _isolated_in(Path(folder)):
        from mmx.demo.page import build_page

        page = build_page(pipeline, _write_examples(Path(folder) / "examples"))
        address = _launch(page, host, port)
        try:
            yield address
        finally:
            page.close(verbose=False)


def wait_for_signal() -> None:
    """Block until the process receives a signal to stop; `serve` then raises SystemExit and cleans up."""
    while True:
        Event().wait(3600)


def _launch(page: gr.Blocks, host: str, port: int | None) -> str:
    """Start the server in a thread. Raises MmxError if the port cannot be bound."""
    from mmx.demo.theme import CSS, theme

    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            inbrowser=False,
            quiet=True,
            prevent_thread_lock=True,
            show_error=False,
            allowed_paths=[],
            blocked_paths=[],
            max_file_size=MAX_UPLOAD,
            state_session_capacity=200,
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            num_workers=0,
            footer_links=["api", "settings"],
            theme=theme(),
            css=CSS,
        )
    except OSError:
        message = f"{host} port {port or '7860 to 7959'} cannot be bound; give another --port."
        raise MmxError(message, code="demo.port", port=port) from None
    return address


@contextmanager
def _exit_on_signals() -> Iterator[None]:
    """Raise SystemExit on SIGTERM and SIGHUP, so that temporary files are removed."""

    def stop(*_: object) -> None:
        raise SystemExit(0)

    if current_thread() is not main_thread():  # only the main thread may set signal handlers
        yield
        return
    # A signal that is ignored stays ignored: a process started with nohup must outlive its terminal.
    previous = {number: signal.getsignal(number) for number in _STOP_SIGNALS}
    handled = [number for number, handler in previous.items() if handler not in (None, signal.SIG_IGN)]
    for number in handled:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, previous[number])


def _check_host(host: str) -> None:
    """Raise MmxError for an address that is not of this machine; gradio would wait for it for a long time."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.bind((host, 0))
    except (OSError, TypeError, UnicodeError):  # the last two: not a valid host name
        message = f"{host!r} is not an address of this machine; give another --host, such as 127.0.0.1."
        raise MmxError(message, code="demo.host", host=host) from None


def _write_examples(folder: Path) -> list[Path]:
    """Render example images of colored shapes."""
    folder.mkdir()
    paths = []
    for number in range(1, NUM_EXAMPLES + 1):
        path = folder / f"shapes-{number}.png"
        render_scene(generate_scene(EXAMPLE_SEED, number), 256).save(path)
        paths.append(path)
    return paths


@contextmanager
def _isolated_in(folder: Path) -> Iterator[None]:
    """Work in an empty folder, with gradio's environment and its upload folder next to it; restored at the end."""
    empty = folder / "empty"
    uploads = folder / "uploads"
    empty.mkdir()
    uploads.mkdir()
    working_directory = os.getcwd()
    environment = dict(os.environ)
    changed = {**_NO_TELEMETRY, "GRADIO_TEMP_DIR": str(uploads)}
    os.environ.update(changed)
    os.chdir(empty)
    try:
        yield
    finally:
        os.chdir(working_directory)
        for name in changed:
            os.environ.pop(name, None)
            if name in environment:
                os.environ[name] = environment[name]
