"""Clients of the demo for tests: a visitor with a session of its own, and a port that is free."""

from __future__ import annotations

import json
import socket
from functools import cache
from pathlib import Path
from typing import Any

import httpx
from gradio_client import Client, handle_file


def free_port() -> int:
    """A port of this machine that nobody listens at just now."""
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return int(door.getsockname()[1])


class Visitor:
    """One session over the API, as `gradio_client` has it."""

    def __init__(self, address: str) -> None:
        self.client = Client(address, verbose=False, analytics_enabled=False, httpx_kwargs={"timeout": 120})

    def caption(self, photo: Any, beams=1, samples=1, temperature=1.0, guidance=1.0, tokens=6) -> tuple[str, str]:
        return self.client.predict(as_file(photo), beams, samples, temperature, guidance, tokens, api_name="/caption")

    def ask(self, photo: Any, question: Any, box: tuple[Any, ...] = (0, 0, 1, 1)) -> tuple[str, float]:
        return self.client.predict(as_file(photo), question, *box, api_name="/ask")

    def rank(self, photo: Any, question: Any, offered: Any, box: tuple[Any, ...] = (0, 0, 1, 1)) -> Any:
        return self.client.predict(as_file(photo), question, offered, *box, api_name="/rank")

    def look(self, photo: Any, kind: Any = "weighted", layer: Any = -1, head: Any = -1) -> Any:
        return self.client.predict(as_file(photo), kind, layer, head, api_name="/look")

    def word(self, photo: Any, word: Any, kind: Any = "weighted", layer: Any = -1, head: Any = -1) -> Any:
        return self.client.predict(as_file(photo), word, kind, layer, head, api_name="/word")


def put(address: str, name: str, data: list[Any], session: str) -> None:
    """Put a call into the queue as the page does, without the client's own way with files. Raises for a full queue."""
    body = {"data": data, "fn_index": numbers(address)[name], "session_hash": session}
    httpx.post(f"{address}gradio_api/queue/join", json=body, timeout=120).raise_for_status()


@cache
def numbers(address: str) -> dict[str, int]:
    """What the page calls each endpoint by."""
    return {call["api_name"]: call["id"] for call in httpx.get(f"{address}config", timeout=120).json()["dependencies"]}


def heard(address: str, session: str, until: str) -> dict[str, Any]:
    """What the queue tells a session, up to the first message of a kind; then the line is cut, as by one who leaves."""
    with httpx.stream("GET", f"{address}gradio_api/queue/data?session_hash={session}", timeout=120) as lines:
        for line in lines.iter_lines():
            message = json.loads(line.removeprefix("data: ")) if line else {}
            if message.get("msg") == until:
                return message
    raise AssertionError(f"the queue never said {until}")


def upload(address: str, photo: Path) -> dict[str, Any]:
    """A picture as the page sends it."""
    [path] = httpx.post(
        f"{address}gradio_api/upload", files={"files": ("a.png", photo.read_bytes())}, timeout=120
    ).json()
    return as_uploaded(path)


def as_uploaded(path: str) -> dict[str, Any]:
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def as_file(photo: Any) -> Any:
    """A path is uploaded; anything else is sent as it is."""
    return handle_file(photo) if isinstance(photo, Path) else photo
