"""Fixtures of the demo: a tiny model, served once for all tests of a file."""

from collections.abc import Iterator

import pytest

from mmx.config.schema import GenerationConfig, SourceConfig
from mmx.inference.pipeline import Pipeline
from mmx.testing import tiny_model


@pytest.fixture(scope="session")
def tiny() -> Pipeline:
    """An untrained model that generates three to six bytes."""
    source = SourceConfig(encoder="image", options={"backbone": "resnet10t", "size": 32, "stage": 2})
    return Pipeline(tiny_model({"image": source}), GenerationConfig(max_new_tokens=6, min_new_tokens=3))


@pytest.fixture(scope="module")
def address(tiny) -> Iterator[str]:
    """The address of the demo of the tiny model."""
    from demo_cases import free_port

    from mmx.demo.server import serve

    with serve(tiny, port=free_port()) as address:
        yield address
