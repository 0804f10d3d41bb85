"""The built-in encoders pass the conformance kit, with backbones of many timm families."""

import warnings

import pytest
import torch
from timm_families import EXACT, FAMILIES

from mmx.testing import check_encoder
from mmx.testing.checks import CHECKS

# Some families have a pooled head whose norm no token passes, or cache attention weights in eval mode. Neither is
# trained by mmx, and neither is an error of the encoder.
ALLOWED_FAILURES = {"gradients"}
FAST_CHECKS = [
    "options",
    "output_shapes",
    "finite",
    "mask",
    "batch_independence",
    "order",
    "deterministic",
    "save_load",
    "global_state",
]
ALL_CHECKS = [check.name for check in CHECKS if check.name != "import"]
DEFAULT_RUN = ["test_vit", "swin_tiny_patch4_window7_224", "hiera_tiny_224", "convnext_atto", "test_resnet"]


@pytest.fixture(autouse=True)
def single_thread():
    """Models this small are slower with several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def without_onednn():
    """The backward pass of oneDNN's convolutions aborts the process for some families at the size of these tests."""
    with warnings.catch_warnings(action="ignore"), torch.backends.mkldnn.flags(enabled=False):
        yield


def failures(name, checks):
    size, arguments, *_ = FAMILIES[name]
    options = {"backbone": name, "size": size, "arguments": arguments}
    results = check_encoder("image", options=options, only=checks, on_fail="return")
    return {result.name: result.message for result in results if result.status == "failed"}


@pytest.mark.parametrize("name", DEFAULT_RUN)
def test_backbone_passes_the_fast_checks(name):
    assert failures(name, FAST_CHECKS) == {}


@pytest.mark.families
@pytest.mark.usefixtures("without_onednn")
@pytest.mark.parametrize("name", FAMILIES)
def test_backbone_passes_all_checks(name):
    # Untrained convolutions may see further than a cell; the grid of those has its own test, with more images.
    allowed = ALLOWED_FAILURES if name in EXACT else ALLOWED_FAILURES | {"grid"}
    assert failures(name, ALL_CHECKS).keys() <= allowed


IMAGE = {"backbone": "test_resnet", "size": 64, "stage": 3}
PLAIN_VIT = {"backbone": "vit_tiny_patch16_224", "size": 64, "arguments": {"depth": 1, "embed_dim": 48}}
TEXT = {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "dropout": 0.1}


@pytest.mark.parametrize(
    ("encoder", "options"),
    [
        ("image", IMAGE),
        ("text", TEXT),
        pytest.param("image", PLAIN_VIT, marks=pytest.mark.slow),
        pytest.param("text", TEXT | {"positions": "rope", "norm": "rms", "glu": True}, marks=pytest.mark.slow),
    ],
)
def test_built_in_passes_all_checks(encoder, options):
    results = check_encoder(encoder, options=options)
    assert {result.status for result in results} == {"passed", "skipped"}
    expected = 17 if encoder == "image" else 16  # the types of an image's input
    assert sum(result.status == "passed" for result in results) == expected
