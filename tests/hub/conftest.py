"""A stand-in of the Hub."""

from collections.abc import Iterator

import pytest
from hub_server import HubServer, running_hub


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[HubServer]:
    with running_hub(monkeypatch, tmp_path) as server:
        yield server
