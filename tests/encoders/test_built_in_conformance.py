"""The built-in encoders under the kit that strangers' encoders are held to; families of timm among them."""

import pytest
import torch
from test_timm_families import EXACT, FAMILIES

from mmx.testing import check_encoder
from mmx.testing.checks import CHECKS

# A family that comes with a pooled head keeps its norm, which no token passes; and some keep what they attend with as a
# cache in eval. Neither is trained by mmx, and neither is an error of the encoder.
HEADS = {"gradients"}
QUICK = ["options", "form", "finite", "mask", "alone", "order", "deterministic", "saved", "globals"]
# torch itself dies in the backward of this one's convolutions at the size of these tests; at 64 pixels it does not.
TORCH_DIES = {"fastvit_t8": "gradients"}
EVERYTHING = [check.name for check in CHECKS if check.name != "import"]
CHOSEN = [
    "test_vit",
    "vit_small_patch14_reg4_dinov2",
    "deit_tiny_distilled_patch16_224",
    "eva02_tiny_patch14_224",
    "beit_base_patch16_224",
    "cait_xxs24_224",
    "convit_tiny",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "hiera_tiny_224",
    "pvt_v2_b0",
    "twins_svt_small",
    "test_maxvit",
    "test_coatnet",
    "edgenext_xx_small",
    "convnext_atto",
    "convnextv2_atto",
    "test_resnet",
    "test_nfnet",
    "regnetx_002",
    "test_efficientnet",
    "mobilenetv3_small_050",
    "mobilenetv4_conv_small_035",
    "ghostnet_050",
    "xcit_nano_12_p8_224",
    "fastvit_t8",
    "tiny_vit_5m_224",
    "repvgg_a0",
]


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models wait for each other's threads longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def failures(name, only):
    size, arguments, *_ = FAMILIES[name]
    options = {"backbone": name, "size": size, "arguments": arguments}
    results = check_encoder("image", options=options, only=only, on_fail="return")
    return {result.name: result.message for result in results if result.status == "failed"}


@pytest.mark.parametrize("name", CHOSEN)
def test_a_family_keeps_the_contract(name):
    assert failures(name, QUICK) == {}


def test_there_are_many():
    assert len(CHOSEN) >= 25
    assert set(CHOSEN) <= set(FAMILIES)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_keeps_every_promise(name):
    # Where untrained convolutions see further than a cell, the grid has a test of its own, with more light.
    allowed = HEADS if name in EXACT else HEADS | {"grid"}
    only = [check for check in EVERYTHING if check != TORCH_DIES.get(name)]
    assert failures(name, only).keys() <= allowed


@pytest.mark.parametrize(
    ("encoder", "options"),
    [
        ("image", {"backbone": "test_resnet", "size": 64, "stage": 3}),
        ("image", {"backbone": "vit_tiny_patch16_224", "size": 64, "arguments": {"depth": 2}}),
        ("text", {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "dropout": 0.1}),
        ("text", {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "positions": "rope", "norm": "rms", "glu": True}),
    ],
)
def test_a_built_in_keeps_every_promise(encoder, options):
    results = check_encoder(encoder, options=options)
    assert {result.status for result in results} == {"passed", "skipped"}
    assert sum(result.status == "passed" for result in results) == 16
