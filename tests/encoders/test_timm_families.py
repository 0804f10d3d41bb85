"""Families of timm, tiny and random: every state of a grid belongs to its own patch of the image.

The influence of each patch on each state is measured by changing one patch at a time. The median change of all states
is subtracted, because untrained attention mixes all positions. Rows and columns are then normalized so that every patch
and every state has the same total. In the exact test, a state must depend most on its own patch, and a patch must
influence its own state most. Untrained convolutions may see further than a cell; there, the centers of influence must
correlate with the positions of the states, which detects any wrong order except an exchange of neighbors.
"""

import re
from contextlib import suppress

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm_families import EXACT, FAMILIES, HIERA, LARGE, MORE, SUMMED, VIT, WIDE
from torch import nn

from mmx.encoders.contract import check_features
from mmx.encoders.image import ImageEncoder
from mmx.errors import EncoderError
from mmx.nn.features import Features

MAX_PATCHES = 8  # per side that are changed one at a time; cells of larger grids are averaged
# The default run has one family of each kind: plain, hierarchical and windowed transformers, CNNs, hybrids.
_DEFAULT_RUN = """test_vit deit_tiny_distilled_patch16_224 eva02_tiny_patch14_224 swin_tiny_patch4_window7_224
    hiera_tiny_224 pvt_v2_b0 test_maxvit convnext_atto test_resnet twins_svt_small test_efficientnet
    mobilenetv3_small_050"""
DEFAULT_RUN = _DEFAULT_RUN.split()


def params(names, default_run=DEFAULT_RUN):
    """Parameters, of which those outside the default run are marked as families."""
    return [pytest.param(name, marks=[] if name in default_run else pytest.mark.families) for name in names]


@pytest.fixture(autouse=True)
def single_thread():
    """Models this small are slower with several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(backbone, seed=0, **options):
    torch.manual_seed(seed)
    return ImageEncoder(ImageEncoder.Options(backbone=backbone, **options)).eval()


def build_family(backbone, seed=0, **options):
    size, arguments, *_ = (FAMILIES | LARGE)[backbone]
    return build(backbone, seed, size=size, arguments=arguments, **options)


@torch.no_grad()
def calibrated(encoder):
    """Set the statistics of batch norms from noise: with the initial ones, activations vanish or grow with depth."""
    norms = [module for module in encoder.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    encoder({"pixels": torch.randn(8, 3, encoder.options.size, encoder.options.size)})
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum
    return encoder


@torch.no_grad()
def influence(encoder):
    """[patches, states]: share of each patch in the change of each state; rows and columns sum to about one."""
    size = encoder.options.size
    image = torch.randn(1, 3, size, size)
    change = 0.03 * (torch.randn(1, 3, size, size) + torch.randn(1, 3, 1, 1))
    before = encoder({"pixels": image})
    rows, columns = before.grid
    side = min(rows, MAX_PATCHES)
    edges = [size * i // side for i in range(side + 1)]
    changed = image.repeat(side * side, 1, 1, 1)
    for patch in range(side * side):
        row, column = divmod(patch, side)
        region = (..., slice(edges[row], edges[row + 1]), slice(edges[column], edges[column + 1]))
        changed[patch][region] += change[0][region]
    differences = torch.cat([encoder({"pixels": batch}).states - before.states for batch in changed.split(32)])
    differences = differences[:, -rows * columns :].double()
    differences = differences - differences.median(1, keepdim=True).values
    energy = differences.square().sum(-1).unflatten(1, (1, rows, columns))
    shares = nn.functional.adaptive_avg_pool2d(energy, (side, side)).flatten(1)
    shares = shares / shares.sum() + 1e-12
    for _ in range(20):  # Sinkhorn and Knopp 1967
        shares = shares / shares.sum(0)
        shares = shares / shares.sum(1, keepdim=True)
    return shares


def is_exact(shares):
    """Whether every state depends most on its own patch, and every patch influences its own state most."""
    own = torch.arange(len(shares))
    return bool((shares.argmax(0) == own).all() and (shares.argmax(1) == own).all())


def correlations(shares):
    """[2, 2]: of row and column of the center of influence with row and column of the state."""
    side = round(len(shares) ** 0.5)
    positions = torch.cartesian_prod(torch.arange(side), torch.arange(side)).double()
    centers = (shares / shares.sum(0)).T @ positions
    return torch.corrcoef(torch.cat([centers.T, positions.T]))[:2, 2:]


def is_correlated(shares, minimum):
    found = correlations(shares)
    return bool(found.diagonal().min() >= minimum and found.fliplr().diagonal().abs().max() <= 0.25)


class Reordered:
    """An encoder whose cells are rearranged by `order`, a function of the grid of their indices."""

    def __init__(self, encoder, order):
        self.encoder = encoder
        self.options = encoder.options
        self.order = order

    def __call__(self, batch):
        states, mask, grid, *_ = self.encoder(batch)
        num_cells = grid[0] * grid[1]
        order = self.order(torch.arange(num_cells).view(grid)).flatten() - num_cells
        return Features(torch.cat([states[:, :-num_cells], states[:, order]], 1), mask, grid)


def by_quadrants(indices):
    """Four quadrants, one after the other: the internal order of Hiera."""
    quadrants = []
    for half in indices.chunk(2):
        quadrants += [quadrant.flatten() for quadrant in half.chunk(2, 1)]
    return torch.cat(quadrants)


def neighbors_swapped(indices):
    indices = indices.clone()
    indices[2, 1], indices[2, 2] = indices[2, 2].item(), indices[2, 1].item()
    return indices


WRONG_ORDERS = {
    "transposed": torch.t,
    "upside down": torch.flipud,
    "mirrored": torch.fliplr,
    "rotated": torch.rot90,
    "shifted by a row": lambda indices: indices.roll(1, 0),
    "shifted by a column": lambda indices: indices.roll(1, 1),
    "by quadrants": by_quadrants,
    "shuffled": lambda indices: indices.flatten()[torch.randperm(indices.numel(), generator=torch.manual_seed(3))],
    "neighbors swapped": neighbors_swapped,
}


@torch.no_grad()
def assert_features(encoder, side, prefix):
    size = encoder.options.size
    features = check_features(encoder({"pixels": torch.randn(2, 3, size, size)}), encoder, "image")
    assert features.grid == (side, side)
    assert features.states.shape == (2, prefix + side * side, encoder.width)
    assert features.mask.all()


@pytest.mark.parametrize("backbone", params(EXACT))
def test_every_state_depends_most_on_its_own_patch(backbone):
    encoder = calibrated(build_family(backbone))
    assert_features(encoder, *EXACT[backbone][2:])
    assert is_exact(influence(encoder))


@pytest.mark.parametrize("backbone", params(SUMMED))
def test_states_of_several_networks_depend_most_on_their_own_patch(backbone):
    *_, side, prefix, num_networks = SUMMED[backbone]
    assert_features(build_family(backbone), side, prefix)
    assert is_exact(sum(influence(calibrated(build_family(backbone, seed))) for seed in range(num_networks)))


@pytest.mark.parametrize("backbone", params(WIDE | MORE | LARGE))
def test_centers_of_influence_correlate_with_positions(backbone):
    *_, side, prefix, minimum = (WIDE | MORE | LARGE)[backbone]
    encoder = calibrated(build_family(backbone))
    assert_features(encoder, side, prefix)
    assert is_correlated(influence(encoder), minimum)


@pytest.fixture(scope="module")
def reorderable():
    """A sequence with a prefix token, a map with channels last, and one with channels first."""
    return [calibrated(build_family(name)) for name in ("test_vit", "swin_tiny_patch4_window7_224", "test_resnet")]


@pytest.mark.parametrize("order", WRONG_ORDERS)
def test_exact_test_detects_a_wrong_order(reorderable, order):
    for encoder in reorderable:
        assert not is_exact(influence(Reordered(encoder, WRONG_ORDERS[order])))


@pytest.mark.parametrize(
    "backbone", params(["mobilenetv3_small_050", "efficientvit_b0", "tiny_vit_5m_224"], ["mobilenetv3_small_050"])
)
def test_correlation_detects_a_wrong_order(backbone):
    """Except an exchange of neighbors, which no convolution makes."""
    shares = influence(calibrated(build_family(backbone)))
    side = WIDE[backbone][2]
    minimum = WIDE[backbone][-1]
    indices = torch.arange(len(shares)).view(side, -1)
    undetected = set()
    for name, order in WRONG_ORDERS.items():
        if is_correlated(shares[:, order(indices).flatten()], minimum):
            undetected.add(name)
    assert undetected == {"neighbors swapped"}


@pytest.mark.families
@pytest.mark.parametrize("backbone", FAMILIES)
def test_every_stage_of_every_family(backbone):
    """The last stage of LeViT needs several networks."""
    stage = 0
    while encoder := build_stage(backbone, stage):
        if (backbone, stage) != ("levit_128s", 2):
            shares = influence(calibrated(encoder))
            assert is_exact(shares) or is_correlated(shares, 0.9), (stage, correlations(shares))
        stage += 1
    assert stage > 0


def build_stage(backbone, stage):
    """The encoder of a stage, or None after the last stage."""
    with suppress(EncoderError):
        return build_family(backbone, stage=stage)
    with pytest.raises(EncoderError) as caught:
        build_family(backbone, stage=stage)
    assert (caught.value.code, caught.value.details["stage"]) == ("encoder.unknown_stage", stage)
    return None


# Backbones whose output is no single map, no grid, or in another order: options, error code, a stage that works.
WITHOUT_GRID = {
    "crossvit_tiny_240": ({"size": 240}, "encoder.no_feature_map", 1),
    "coat_tiny": ({"size": 64}, "encoder.no_feature_map", 1),
    "efficientvim_m1": ({"size": 224}, "encoder.no_feature_map", 0),
    "pit_ti_224": ({"size": 96}, "encoder.no_grid", 1),
    # Hiera returns its tokens in its internal order unless it pools at the end of every stage.
    "hiera_tiny_224": ({"size": 224, "arguments": HIERA | {"q_pool": 2}}, "encoder.no_grid", 3),
    # ConViT without a class token.
    "convit_tiny": ({"size": 96, "arguments": VIT}, "encoder.no_grid", 0),
}


@pytest.mark.parametrize("backbone", params(WITHOUT_GRID, ["hiera_tiny_224", "convit_tiny"]))
def test_backbone_without_grid_is_an_error_and_a_stage_works(backbone):
    options, code, stage = WITHOUT_GRID[backbone]
    with pytest.raises(EncoderError) as caught:
        build(backbone, **options)
    assert caught.value.code == code
    shares = influence(calibrated(build(backbone, stage=stage, **options)))
    assert is_exact(shares) or is_correlated(shares, 0.9)


def save_whole(path, backbone):
    """Save a whole random model under timm's names, with three classes; return it and its tensors."""
    size, arguments, *_ = FAMILIES[backbone]
    torch.manual_seed(7)
    try:
        whole = timm.create_model(backbone, num_classes=3, img_size=size, **arguments)
    except TypeError:
        whole = timm.create_model(backbone, num_classes=3, **arguments)
    tensors = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    save_file(tensors, path)
    return whole, tensors


# Families for which timm renames or resizes tensors, and each way in which it cuts a model at a stage.
LOADED = [
    "test_vit",
    "beit_base_patch16_224",
    "swin_tiny_patch4_window7_224",
    "hiera_tiny_224",
    "convnext_atto",
    "test_resnet",
]


@pytest.mark.parametrize("stage", [None, 0])
@pytest.mark.parametrize("backbone", params(FAMILIES, LOADED))
def test_weights_are_loaded_and_the_encoder_is_rebuilt_without_the_file(tmp_path, backbone, stage):
    path = tmp_path / "model.safetensors"
    whole, tensors = save_whole(path, backbone)
    encoder = build_family(backbone, stage=stage, weights=str(path))
    path.unlink()
    flattened = {name.replace(".", "_", 1): tensor for name, tensor in tensors.items()}  # "layers_0.w" in a cut model
    for name, tensor in encoder.backbone.state_dict().items():
        plain = re.sub(r"^(model|body)\.", "", name)
        assert torch.equal(tensor, tensors[plain] if plain in tensors else flattened[plain]), name
    assert (encoder.options.weights, encoder.options.pretrained) == (None, False)
    rebuilt = ImageEncoder(encoder.options).eval()
    rebuilt.load_state_dict(encoder.state_dict())
    pixels = torch.randn(2, 3, encoder.options.size, encoder.options.size)
    with torch.no_grad():
        states = encoder({"pixels": pixels}).states
        assert torch.equal(rebuilt({"pixels": pixels}).states, states)
        if stage is None:  # compared without regard to the order of axes
            expected = whole.eval().forward_features(pixels).flatten().sort().values
            assert (states.flatten().sort().values - expected).norm() < 1e-5 * expected.norm()
