"""Console output: a progress bar on stderr, a table of metrics, and JSON files that commands write."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from mmx.errors import MmxError
from mmx.io.atomic import atomic_text_writer

if TYPE_CHECKING:
    from tqdm import tqdm


def progress_bar(total: int | None, quiet: bool) -> tqdm[object]:
    """Return a progress bar, disabled if `quiet` or if stderr is not a terminal."""
    from tqdm import tqdm

    return tqdm(total=total, unit="", smoothing=0, disable=quiet or not sys.stderr.isatty())


def set_total_in_background(bar: tqdm[object], count: Callable[[], int | None]) -> None:
    """Set the total of a progress bar once `count` has returned it, in a thread."""

    def run() -> None:
        with suppress(OSError, MmxError):  # the main thread meets and reports the same error
            bar.total = count()

    if not bar.disable:
        Thread(target=run, daemon=True).start()


def skip_one(bar: tqdm[object]) -> None:
    """Advance by an item that an earlier run has done: it is not part of the items per second."""
    if not bar.disable:
        bar.initial += 1
        bar.update()


def format_metrics(metrics: Mapping[str, float]) -> str:
    """Return one line a metric: integers as counts, other numbers with four decimals."""
    width = max(map(len, metrics))
    lines = []
    for name, value in metrics.items():
        number = f"{value:,d}" if isinstance(value, int) else f"{value:.4f}"
        lines.append(f"{name:<{width}}  {number}")
    return "\n".join(lines)


def write_json(out: Path, value: object) -> None:
    """Write a JSON document to a file or a stream. A file is replaced atomically. Raises MmxError."""
    with write_errors(out), atomic_text_writer(out) as file:
        print(json.dumps(value, ensure_ascii=False, indent=2), file=file)


@contextmanager
def write_errors(out: Path) -> Iterator[None]:
    """Turn an OSError into an MmxError that names the file of --out."""
    try:
        yield
    except BrokenPipeError:  # the reader closed the pipe; handled as for stdout
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        message = f"{out} cannot be written: {reason}; choose another --out."
        raise MmxError(message, code="output.not_writable", path=str(out)) from error
