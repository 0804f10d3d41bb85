"""Global state of the process, such as seeds and settings: read, restored, and compared around an import."""

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

import numpy
import torch

IMPORT_TIMEOUT = 60  # seconds for one import, including torch
PROGRAM = """
import sys
sys.path[:] = {path!r}
from mmx.testing.process_state import process_state
before = process_state()
class Output:
    text = ""
    def write(self, text): Output.text += text
    def flush(self): pass
streams = sys.stdout, sys.stderr
sys.stdout = sys.stderr = Output()
try:
    import {module}
finally:
    sys.stdout, sys.stderr = streams
after = process_state()
effects = ["prints " + repr(Output.text.strip()[:60])] if Output.text.strip() else []
effects += ["changes " + name for name in before if before[name] != after[name]]
print("@" + " and ".join(effects))
"""


def process_state() -> dict[str, object]:
    """Return the global state that other code relies on."""
    return {
        "torch's random state": torch.random.get_rng_state().tolist(),
        "Python's random state": random.getstate(),
        "numpy's random state": str(numpy.random.get_state()),  # noqa: NPY002 (the global state is checked)
        "the default dtype": torch.get_default_dtype(),
        "the number of threads": torch.get_num_threads(),
        "the gradient mode": torch.is_grad_enabled(),
        "the use of deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "the logging configuration": (repr(logging.root.handlers), logging.root.level),
        "the working directory": str(Path.cwd()),
    }


@contextmanager
def unchanged_process_state() -> Iterator[None]:
    """Restore random states, settings and the working directory on exit."""
    python_state = random.getstate()
    numpy_state = numpy.random.get_state()  # noqa: NPY002
    folder = Path.cwd()
    dtype = torch.get_default_dtype()
    num_threads = torch.get_num_threads()
    grad_enabled = torch.is_grad_enabled()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python_state)
            numpy.random.set_state(numpy_state)  # noqa: NPY002
            os.chdir(folder)
            torch.set_default_dtype(dtype)
            if torch.get_num_threads() != num_threads:
                torch.set_num_threads(num_threads)
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
            torch.set_grad_enabled(grad_enabled)


def advance_random_states() -> None:
    """Draw from every global random source, so that setting the same seed again is detected."""
    random.random()
    numpy.random.random()  # noqa: NPY002
    torch.rand(1)


def effects_of_import(module: str) -> str:
    """Return a description of the side effects of importing a module in a new process; "" if there are none."""
    return _effects(module, tuple(sys.path))


@cache
def _effects(module: str, path: tuple[str, ...]) -> str:
    command = [sys.executable, "-c", PROGRAM.format(path=list(path), module=module)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return f"takes longer than {IMPORT_TIMEOUT} s"
    if run.returncode or "@" not in run.stdout:
        lines = run.stderr.strip().splitlines() or [f"exit code {run.returncode}"]
        return f"fails in a new process: {lines[-1][:200]}"
    return run.stdout.rpartition("@")[2].strip()
