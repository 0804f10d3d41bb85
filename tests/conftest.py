"""For every test: no network, a fixed seed, and two threads (one in each worker process of pytest-xdist)."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # it inherits the environment of its controller: the value must be overwritten
    os.environ["OMP_NUM_THREADS"] = "1"
else:
    os.environ.setdefault("OMP_NUM_THREADS", "2")

import signal
import socket

import pytest
import torch

LOCAL_HOSTS = ("127.0.0.1", "::1", "localhost", "local")
SLOWEST_FILES = ("test_encoder_guide.py", "test_train_60s.py", "test_two_processes.py")


def pytest_collection_modifyitems(items):
    """Run the slowest files first, so that with several workers no worker is left with one of them at the end."""
    items.sort(key=lambda item: item.path.name not in SLOWEST_FILES)


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c_is_not_ignored():
    """A shell starts background jobs with SIGINT ignored, and processes inherit that. Tests of Ctrl+C need it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _float32_training(monkeypatch):
    """Let `mixed_precision: auto` be float32 on every processor: a process can train with one precision only."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """Fail on any connection to another machine: the package must work without a network."""
    connect = socket.socket.connect

    def local_connect(self, address):
        host = address[0] if isinstance(address, tuple) else "local"
        if host not in LOCAL_HOSTS:
            raise AssertionError(f"a test tried to connect to {host}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_connect)
