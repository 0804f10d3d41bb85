"""The command line for tests: how a command ended, a process of its own, and pictures to be given to it."""

import json
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image


class Ran(NamedTuple):
    """How a command ended: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()

    @property
    def errors(self) -> list[str]:
        return self.err.splitlines()

    @property
    def rows(self) -> list[dict]:
        return [json.loads(line) for line in self.lines]

    def refused(self) -> str:
        """The one sentence on stderr of a command that was not carried out."""
        assert (self.code, self.out, len(self.errors)) == (2, "", 1), self
        assert self.err.startswith("mmx: ")
        return self.errors[0].removeprefix("mmx: ")


Mmx = Callable[..., Ran]


def alone(words: Sequence[object], options: Sequence[str] = (), **more: object) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own, for what only shows there."""
    command = [sys.executable, *options, "-m", "mmx", *map(str, words)]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=600, check=False, **more)  # type: ignore[call-overload]


def seconds_of_children() -> float:
    """Processor time: what a person waits for on an idle machine, however busy this one is."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def draw(path: Path, number: int) -> Path:
    """A picture that differs from those of other numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_mandelbrot((24, 20), (-2 + number / 50, -1.2, 1, 1.2), 20 + number).convert("RGB").save(path)
    return path
