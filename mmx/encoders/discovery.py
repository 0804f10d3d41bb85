"""Description of all installed encoders, safe against any plugin: the modules are imported in a subprocess.

The module of a plugin may print, exit, kill the process or hang while it is imported. A subprocess therefore imports
the encoders one after the other and reports each. If it stops reporting, the encoder being imported is the cause, and
a new subprocess continues with the next one.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from threading import Thread
from typing import IO

from mmx.encoders.registry import EncoderDescription, EncoderEntry, describe, entries

PROGRAM = "import sys; sys.path[:] = {path!r}; from mmx.encoders.discovery import report; report({first})"
START_SECONDS = 120.0  # for the import of torch
IMPORT_SECONDS = 30.0  # for each encoder


def discover_encoders(timeout: float = IMPORT_SECONDS) -> list[EncoderDescription]:
    """Describe every installed encoder, and the problem of each broken one.

    Args:
        timeout: seconds that the import of one encoder may take.
    """
    all_entries = entries()
    found: list[EncoderDescription] = []
    while len(found) < len(all_entries):
        found.extend(_describe_in_subprocess(all_entries, len(found), timeout))
    return found


def report(first: int) -> None:
    """Runs in the subprocess: print an empty JSON line, then one line of JSON for each entry from `first` on."""
    output = os.fdopen(os.dup(1), "w")
    null_device = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null_device, 1)  # keeps the output of plugins out of the report
    print("ready", file=output, flush=True)
    all_entries = entries()
    for entry in all_entries[first:]:
        fields = asdict(describe(entry, all_entries))
        del fields["entry"]
        print(json.dumps(fields, default=str), file=output, flush=True)
    output.flush()
    os._exit(0)  # does not wait for threads that a plugin started


def _describe_in_subprocess(
    all_entries: list[EncoderEntry], first: int, timeout: float
) -> Iterator[EncoderDescription]:
    """Describe the entries from `first` on, up to and including the one at which the subprocess stopped reporting."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(path=sys.path, first=first)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None, "requested above"
        lines: queue.Queue[str | None] = queue.Queue()
        Thread(target=_read_lines, args=(process.stdout, lines), daemon=True).start()
        entry = all_entries[first]
        try:
            started = lines.get(timeout=START_SECONDS)
            for entry in all_entries[first:]:
                line = lines.get(timeout=timeout) if started else None
                if line is None:
                    yield _broken(entry, f"ended the process (exit code {_exit_code(process)})")
                    return
                yield EncoderDescription(entry, **json.loads(line))
        except queue.Empty:
            yield _broken(entry, f"did not return within {timeout:g} s")
        finally:
            process.kill()


def _read_lines(pipe: IO[str], lines: queue.Queue[str | None]) -> None:
    """Put the lines of a pipe into a queue, then None."""
    for line in pipe:
        lines.put(line)
    lines.put(None)


def _exit_code(process: subprocess.Popen[str]) -> int | str:
    try:
        return process.wait(5)
    except subprocess.TimeoutExpired:
        return "none"


def _broken(entry: EncoderEntry, problem: str) -> EncoderDescription:
    sentence = f"encoder {entry.name!r} ({entry.package} {entry.version}) {problem} while it was imported."
    return EncoderDescription(entry, problem=sentence)
