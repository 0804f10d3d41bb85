"""How the page is served: to this machine alone, from an empty folder, without a word to anybody else."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import TYPE_CHECKING

from mmx.data.scenes import draw_scene, picture
from mmx.errors import MmxError

if TYPE_CHECKING:
    from mmx.pipeline import Pipeline

LARGEST_UPLOAD = "20mb"
EXAMPLES = 6  # pictures to pick from, of the series that is kept for demonstrations
SERIES = 7
QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_SHARE": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}


@contextmanager
def served(pipeline: Pipeline, host: str = "127.0.0.1", port: int | None = None) -> Iterator[str]:
    """The demo's address while it is served. port: None takes the first free one from 7860 on.

    Uploads lie in a temporary folder that is removed at the end; the process stands in an empty one meanwhile, for
    gradio may hand out what lies where it was started. Raises MmxError for a port or a host that cannot be had, and for
    a model that reads no pictures.
    """
    if not pipeline.accepts("picture.png"):
        raise MmxError("the demo shows pictures, which no source of this model reads; give another --model.")
    with TemporaryDirectory(prefix="mmx-demo-") as folder, _standing_in(Path(folder)) as uploads:
        from mmx.demo.page import build
        from mmx.demo.style import CSS, theme

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
            assert uploads.is_dir()
            yield address
        finally:
            page.close(verbose=False)


def wait() -> None:
    """Come back when the process is told to end, as a container is; so its temporary files are removed."""
    ended = Event()
    before = signal.signal(signal.SIGTERM, lambda *_: ended.set())
    try:
        while not ended.wait(1.0):
            pass
    finally:
        signal.signal(signal.SIGTERM, before)


def _examples(folder: Path) -> list[Path]:
    """Pictures of coloured shapes, drawn now."""
    folder.mkdir()
    paths = [folder / f"shapes-{number}.png" for number in range(1, EXAMPLES + 1)]
    for number, path in enumerate(paths):
        picture(draw_scene(SERIES, number), 256).save(path)
    return paths


@contextmanager
def _standing_in(folder: Path) -> Iterator[Path]:
    """In an empty folder, with gradio's settings and its folder of uploads beside it; all as it was afterwards."""
    empty, uploads = folder / "empty", folder / "uploads"
    empty.mkdir()
    uploads.mkdir()
    here, before = os.getcwd(), dict(os.environ)
    os.environ.update(QUIET, GRADIO_TEMP_DIR=str(uploads))
    os.chdir(empty)
    try:
        yield uploads
    finally:
        os.chdir(here)
        for name in (*QUIET, "GRADIO_TEMP_DIR"):
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]
