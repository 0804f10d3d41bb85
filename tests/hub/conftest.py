"""A stand-in of the Hub that mmx and huggingface_hub talk to, with a cache and a token of its own."""

from collections.abc import Iterator

import huggingface_hub.constants
import pytest
from hub_server import TOKEN, HubServer, running_hub


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[HubServer]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # the stand-in knows LFS only
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("MMX_CACHE", str(tmp_path / "cache"))
    with running_hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server
