"""Clients of the demo for tests: a user with a session, and calls without gradio's client."""

from __future__ import annotations

import json
import socket
from functools import cache
from pathlib import Path
from typing import Any

import httpx
from gradio_client import Client, handle_file

WHOLE_IMAGE = (0, 0, 1, 1)


def free_port() -> int:
    """A port of this machine that is not in use."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class User:
    """One session over the API, with `gradio_client`."""

    def __init__(self, address: str) -> None:
        self.client = Client(address, verbose=False, analytics_enabled=False, httpx_kwargs={"timeout": 120})

    def caption(self, image: Any, beams=1, captions=1, temperature=1.0, guidance=1.0, length=6) -> tuple[str, str]:
        arguments = (as_file(image), beams, captions, temperature, guidance, length)
        return self.client.predict(*arguments, api_name="/caption")

    def ask(self, image: Any, question: Any, box: tuple[Any, ...] = WHOLE_IMAGE) -> tuple[str, float]:
        return self.client.predict(as_file(image), question, *box, api_name="/ask")

    def rank(self, image: Any, question: Any, candidates: Any, box: tuple[Any, ...] = WHOLE_IMAGE) -> Any:
        return self.client.predict(as_file(image), question, candidates, *box, api_name="/rank")

    def look(self, image: Any, method: Any = "weighted", layer: Any = -1, head: Any = -1) -> Any:
        return self.client.predict(as_file(image), method, layer, head, api_name="/look")

    def word(self, image: Any, word: Any, method: Any = "weighted", layer: Any = -1, head: Any = -1) -> Any:
        return self.client.predict(as_file(image), word, method, layer, head, api_name="/word")


def join_queue(address: str, name: str, data: list[Any], session: str) -> None:
    """Put a call into the queue as the page does, without the client's handling of files. Raises for a full queue."""
    body = {"data": data, "fn_index": endpoint_ids(address)[name], "session_hash": session}
    httpx.post(f"{address}gradio_api/queue/join", json=body, timeout=120).raise_for_status()


@cache
def endpoint_ids(address: str) -> dict[str, int]:
    """The number of each endpoint."""
    return {call["api_name"]: call["id"] for call in httpx.get(f"{address}config", timeout=120).json()["dependencies"]}


def wait_for_message(address: str, session: str, kind: str) -> dict[str, Any]:
    """Read the messages of a session up to the first of a kind, then close the connection."""
    with httpx.stream("GET", f"{address}gradio_api/queue/data?session_hash={session}", timeout=120) as lines:
        for line in lines.iter_lines():
            message = json.loads(line.removeprefix("data: ")) if line else {}
            if message.get("msg") == kind:
                return message
    raise AssertionError(f"there was no message {kind}")


def upload(address: str, image: Path) -> dict[str, Any]:
    """Upload an image as the page does."""
    files = {"files": ("a.png", image.read_bytes())}
    [path] = httpx.post(f"{address}gradio_api/upload", files=files, timeout=120).json()
    return as_uploaded(path)


def as_uploaded(path: str) -> dict[str, Any]:
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def as_file(image: Any) -> Any:
    """A path is uploaded; anything else is sent as it is."""
    return handle_file(image) if isinstance(image, Path) else image
