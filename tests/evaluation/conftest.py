"""The bundled model, synthetic scenes, and the pointing game on them."""

import pytest

import mmx
from mmx.data.scenes import generate_scene
from mmx.evaluation.pointing_game import pointing_game


@pytest.fixture(scope="session")
def bundled():
    return mmx.load()


@pytest.fixture(scope="session")
def scenes():
    return [generate_scene(31, index) for index in range(12)]


@pytest.fixture(scope="session")
def report(bundled, scenes):
    return pointing_game(bundled, scenes, [generate_scene(32, index) for index in range(6)])
