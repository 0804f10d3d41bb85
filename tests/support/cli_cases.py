"""The command line for tests: the result of a command, a process of its own, and images to give to it."""

import json
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image


class Ran(NamedTuple):
    """The result of a command: exit code, stdout, stderr, and the error that ended it."""

    code: int
    out: str
    err: str
    error: Exception | None = None

    @property
    def outputs(self) -> tuple[int, str, str]:
        return self.code, self.out, self.err

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()

    @property
    def errors(self) -> list[str]:
        return self.err.splitlines()

    @property
    def rows(self) -> list[dict]:
        return [json.loads(line) for line in self.lines]

    def refused(self) -> Exception:
        """The error of a command that was not run: exit code 2, and one line on stderr."""
        assert (self.code, self.out, len(self.errors)) == (2, "", 1), self
        assert self.err.startswith("mmx: ")
        assert self.error is not None
        return self.error


Mmx = Callable[..., Ran]
OK = (0, "", "")


def run_in_process(
    words: Sequence[object], options: Sequence[str] = (), **more: object
) -> subprocess.CompletedProcess[str]:
    """Run the program in a process of its own, for what only shows there."""
    command = [sys.executable, *options, "-m", "mmx", *map(str, words)]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=600, check=False, **more)  # type: ignore[call-overload]


def child_seconds() -> float:
    """Processor time of child processes, which does not depend on the load of the machine."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def draw(path: Path, number: int) -> Path:
    """Write an image that differs from those of other numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_mandelbrot((24, 20), (-2 + number / 50, -1.2, 1, 1.2), 20 + number).convert("RGB").save(path)
    return path


def read_rows(path: Path) -> list[dict]:
    """The rows of a results file, which must end with a whole line."""
    text = path.read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n"), "a torn line"
    return [json.loads(line) for line in text.splitlines()]


def write_jsonl(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path
