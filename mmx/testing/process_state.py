"""What belongs to the process and not to an encoder: seeds, switches, output. Looked at before and after."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import torch

SECONDS = 60  # for one import, torch's own included
PROBE = """
import sys
sys.path[:] = {path!r}
from mmx.testing.process_state import process_state
before = process_state()
class Mouth:
    said = ""
    def write(self, text): Mouth.said += text
    def flush(self): pass
voices = sys.stdout, sys.stderr
sys.stdout = sys.stderr = Mouth()
try:
    import {module}
finally:
    sys.stdout, sys.stderr = voices
after = process_state()
effects = ["prints " + repr(Mouth.said.strip()[:60])] if Mouth.said.strip() else []
effects += ["changes " + name for name in before if before[name] != after[name]]
print("@" + " and ".join(effects))
"""


def process_state() -> dict[str, Any]:
    """Everything that code outside of an encoder relies on."""
    return {
        "torch's random state": torch.random.get_rng_state().tolist(),
        "Python's random state": random.getstate(),
        "numpy's random state": str(numpy.random.get_state()),  # noqa: NPY002 (the global one is what is watched)
        "the default dtype": torch.get_default_dtype(),
        "the number of threads": torch.get_num_threads(),
        "whether gradients are on": torch.is_grad_enabled(),
        "whether algorithms are deterministic": torch.are_deterministic_algorithms_enabled(),
        "the logging set-up": (repr(logging.root.handlers), logging.root.level),
        "the working directory": str(Path.cwd()),
    }


@contextmanager
def unchanged_process_state() -> Iterator[None]:
    """Whatever is done to the process inside is undone: dice, switches, the working directory."""
    python, numbers, place = random.getstate(), numpy.random.get_state(), Path.cwd()  # noqa: NPY002
    dtype, threads, gradients = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    strict = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(numbers)  # noqa: NPY002
            os.chdir(place)
            torch.set_default_dtype(dtype)
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(strict[0], warn_only=strict[1])
            torch.set_grad_enabled(gradients)


def reseed_all() -> None:
    """Draw from every global source, so that a seed set afterwards is seen even where it had been set before."""
    random.random()
    numpy.random.random()  # noqa: NPY002
    torch.rand(1)


def effects_of_import(module: str) -> str:
    """What importing a module does besides, in a new process; empty for nothing."""
    return _effects(module, tuple(sys.path))


@cache
def _effects(module: str, path: tuple[str, ...]) -> str:
    command = [sys.executable, "-c", PROBE.format(path=list(path), module=module)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"takes longer than {SECONDS} s"
    if run.returncode or "@" not in run.stdout:
        last = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
        return f"fails in a new process: {last[:200]}"
    return run.stdout.rpartition("@")[2].strip()
