"""A survey of all encoders on offer, which no plugin can spoil: each is imported in a process of its own kind.

A stranger's module may do anything while it is imported: print, exit, kill the process, or never come back. So another
process imports one after the other and tells of each; where it falls silent, the culprit is the one it was at, and a
new process goes on with the next.
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

START = "import sys; sys.path[:] = {path!r}; from mmx.encoders.discovery import tell; tell({first})"
START_SECONDS, IMPORT_SECONDS = 120.0, 30.0  # for torch, then for each encoder


def discover_encoders(patience: float = IMPORT_SECONDS) -> list[EncoderDescription]:
    """Everything on offer, with what is broken and why. `patience`: seconds that one import may take."""
    on_offer, found = entries(), list[EncoderDescription]()
    while len(found) < len(on_offer):
        found += _told_by_one_process(on_offer, len(found), patience)
    return found


def _told_by_one_process(on_offer: list[EncoderEntry], first: int, patience: float) -> Iterator[EncoderDescription]:
    """What a new process tells from entry `first` on, the one at which it fell silent included."""
    with subprocess.Popen(
        [sys.executable, "-c", START.format(path=sys.path, first=first)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None, "a pipe was asked for"
        lines: queue.Queue[str | None] = queue.Queue()
        Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
        entry = on_offer[first]
        try:
            ready = lines.get(timeout=START_SECONDS)
            for entry in on_offer[first:]:
                line = lines.get(timeout=patience) if ready else None
                if line is None:
                    yield EncoderDescription(
                        entry, problem=_problem(entry, f"ended the process (exit code {_code(process)})")
                    )
                    return
                yield EncoderDescription(entry, **json.loads(line))
        except queue.Empty:
            yield EncoderDescription(entry, problem=_problem(entry, f"did not come back within {patience:g} s"))
        finally:
            process.kill()


def tell(first: int) -> None:
    """In the other process: describe the entries from `first` on, a line of JSON each, the first line being empty."""
    voice = os.fdopen(os.dup(1), "w")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)  # a plugin that prints would be taken for us
    print("ready", file=voice, flush=True)
    on_offer = entries()
    for entry in on_offer[first:]:
        facts = asdict(describe(entry, on_offer))
        del facts["entry"]
        print(json.dumps(facts, default=str), file=voice, flush=True)
    voice.flush()
    os._exit(0)  # threads that a plugin started must not keep it


def _read(pipe: IO[str], lines: queue.Queue[str | None]) -> None:
    for line in pipe:
        lines.put(line)
    lines.put(None)


def _code(process: subprocess.Popen[str]) -> int | str:
    try:
        return process.wait(5)
    except subprocess.TimeoutExpired:
        return "none"


def _problem(entry: EncoderEntry, what: str) -> str:
    return f"encoder {entry.name!r} ({entry.package} {entry.version}) {what} while it was imported."
