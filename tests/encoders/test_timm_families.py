"""Families of timm, tiny and random: each state of a grid belongs to its own part of the picture, checked by light.

A little light falls on one part of a picture after the other, and every state tells how much it changed. What the
states share says nothing of their places (an untrained attention mixes all with all), so it is taken away; what is
left is divided so that every part and every state count the same. Then a state must be changed most by its own part,
and its part must change no other state more. Where untrained convolutions see further than a cell, the centres of what
the states see must still lie as the states do: row with row, column with column.
"""

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from mmx.encoders.contract import check_features
from mmx.encoders.image import ImageEncoder
from mmx.errors import EncoderError
from mmx.features import Features

MOST_PARTS = 8  # of a side that light falls on one by one; the cells of larger grids are taken together

VIT = {"embed_dim": 24, "depth": 1, "num_heads": 2}
SWIN = {"embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4}
HIERA = {"embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1, 1)}
PYRAMID = {"embed_dims": (16, 16, 32, 32), "depths": (1, 1, 1, 1)}
HEADS = {"num_heads": (1, 1, 2, 2)}
CONVNEXT = {"dims": (16, 16, 32, 32), "depths": (1, 1, 1, 1)}
TNT = {"embed_dim": 24, "inner_dim": 8, "depth": 1, "num_heads_outer": 2, "num_heads_inner": 2}
SEQUENCER = {"layers": (1, 1, 1, 1), "embed_dims": (24,) * 4, "hidden_sizes": (12,) * 4}

# backbone: size, arguments, cells of a side, prefix tokens. Every state follows its own cell.
EXACT = {
    "test_vit": (96, {}, 6, 1),
    "vit_small_patch14_reg4_dinov2": (70, VIT, 5, 5),
    "vit_tiny_r_s16_p8_224": (224, VIT, 7, 1),
    "test_vit_relpos": (96, {}, 6, 0),
    "samvit_base_patch16_224": (96, VIT, 6, 0),
    "vitamin_small_224": (96, {}, 6, 0),
    "naflexvit_base_patch16_gap": (96, VIT, 6, 4),
    "deit_tiny_distilled_patch16_224": (96, VIT, 6, 2),
    "deit3_small_patch16_224": (96, VIT, 6, 1),
    "eva02_tiny_patch14_224": (70, VIT, 5, 1),
    "vit_tiny_patch16_dinov3_qkvb": (80, VIT, 5, 5),
    "beit_base_patch16_224": (96, VIT, 6, 1),
    "cait_xxs24_224": (96, VIT, 6, 1),
    "convit_tiny": (96, VIT | {"depth": 2, "local_up_to_layer": 1}, 6, 1),
    "tnt_s_patch16_224": (96, TNT, 6, 1),
    "volo_d1_224": (96, {}, 6, 1),
    "coat_lite_tiny": (160, {}, 5, 1),
    "swin_tiny_patch4_window7_224": (64, SWIN, 8, 0),
    "swinv2_tiny_window8_256": (64, SWIN, 8, 0),
    "swinv2_cr_tiny_224": (64, SWIN, 8, 0),
    "hiera_tiny_224": (224, HIERA, 7, 0),
    "sam2_hiera_tiny": (224, HIERA, 7, 0),
    "mvitv2_tiny": (128, {}, 4, 0),
    "mvitv2_small_cls": (96, {}, 3, 1),
    "pvt_v2_b0": (160, {"depths": (1, 1, 1, 1)}, 5, 0),
    "twins_svt_small": (224, PYRAMID | HEADS, 7, 0),
    "twins_pcpvt_small": (160, PYRAMID | HEADS, 5, 0),
    "nest_tiny": (64, {}, 4, 0),
    "focalnet_tiny_srf": (128, {}, 4, 0),
    "test_maxvit": (160, {}, 5, 0),
    "test_coatnet": (160, {}, 5, 0),
    "poolformer_s12": (160, {}, 5, 0),
    "caformer_s18": (128, {}, 4, 0),
    "efficientformer_l1": (224, PYRAMID, 7, 0),
    "edgenext_xx_small": (160, {}, 5, 0),
    "swiftformer_xs": (160, {}, 5, 0),
    "mixer_s32_224": (160, {}, 5, 0),
    "gmlp_ti16_224": (96, {}, 6, 0),
    "sequencer2d_s": (96, SEQUENCER, 6, 0),
    "convnext_atto": (160, CONVNEXT, 5, 0),
    "convnextv2_atto": (160, CONVNEXT, 5, 0),
    "inception_next_atto": (160, {"depths": (1, 1, 1, 1)}, 5, 0),
    "test_mambaout": (160, {}, 5, 0),
    "fasternet_t0": (160, {}, 5, 0),
    "starnet_s050": (160, {}, 5, 0),
    "test_resnet": (160, {}, 5, 0),
    "test_nfnet": (160, {}, 5, 0),
    "test_byobnet": (160, {}, 5, 0),
    "regnetx_002": (160, {}, 5, 0),
    "regnety_002": (160, {}, 5, 0),
    "cs3darknet_focus_s": (160, {}, 5, 0),
    "vgg11": (96, {"mlp_ratio": 0.01}, 3, 0),
    "legacy_seresnet18": (160, {}, 5, 0),
}
# backbone: size, arguments, cells of a side, prefix tokens, correlation of the centres with the cells
WIDE = {
    "test_efficientnet": (160, {}, 5, 0, 0.9),
    "mobilenetv3_small_050": (224, {}, 7, 0, 0.95),
    "mobilenetv4_conv_small_035": (224, {}, 7, 0, 0.95),
    "ghostnet_050": (160, {}, 5, 0, 0.95),
    "lcnet_035": (224, {}, 7, 0, 0.95),
    "rexnet_100": (160, {}, 5, 0, 0.95),
    "mobilevit_xxs": (160, {}, 5, 0, 0.95),
    "efficientvit_b0": (224, {}, 7, 0, 0.85),
    "xcit_nano_12_p8_224": (64, VIT, 8, 1, 0.95),
    "davit_tiny": (160, PYRAMID | HEADS, 5, 0, 0.95),
    "fastvit_t8": (224, {"embed_dims": (16, 16, 32, 32), "layers": (1, 1, 1, 1)}, 7, 0, 0.95),
    "repvit_m1": (160, {"embed_dim": (16, 16, 32, 32), "depth": (1, 1, 1, 1)}, 5, 0, 0.95),
    "tiny_vit_5m_224": (224, PYRAMID | HEADS, 7, 0, 0.95),
    "resnetv2_18": (160, {"layers": (1, 1, 1, 1)}, 5, 0, 0.95),
    "repvgg_a0": (160, {}, 5, 0, 0.95),
    "mobileone_s0": (160, {}, 5, 0, 0.9),
    "densenet121": (160, {"growth_rate": 8, "block_config": (1, 1, 1, 1)}, 5, 0, 0.95),
    "hrnet_w18_small": (160, {}, 5, 0, 0.95),
    "dla46x_c": (160, {}, 5, 0, 0.95),
    "hgnetv2_b0": (160, {}, 5, 0, 0.95),
    "ese_vovnet19b_slim_dw": (160, {}, 5, 0, 0.95),
    "iformer_t": (160, {}, 5, 0, 0.95),
}
FAMILIES = {name: row[:4] for name, row in (EXACT | WIDE).items()}
SLOW_ALONE = {
    "inception_v3": (299, {}, 8, 0),
    "convmixer_768_32": (224, {}, 32, 0),
    "nextvit_small": (160, {}, 5, 0),
    "gcvit_xxtiny": (224, {}, 7, 0),
    "poolformerv2_s12": (224, {}, 7, 0),
    "res2net50_14w_8s": (160, {}, 5, 0),
    "visformer_tiny": (160, {}, 5, 0),
    "efficientformerv2_s0": (160, {}, 5, 0),
    "resnet18": (160, {}, 5, 0),
    "xception41p": (160, {}, 5, 0),
}


def build(backbone, seed=0, **options):
    torch.manual_seed(seed)
    return ImageEncoder(ImageEncoder.Options(backbone=backbone, **options)).eval()


@torch.no_grad()
def settled(encoder):
    """With the batch norms' statistics of noise: as drawn, they let what runs through deep networks vanish or grow."""
    norms = [module for module in encoder.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    encoder({"pixels": torch.randn(8, 3, encoder.options.size, encoder.options.size)})
    for norm, momentum in zip(norms, momenta):
        norm.eval().momentum = momentum
    return encoder


@torch.no_grad()
def influence(encoder):
    """[parts, states]: the share of a part of the picture in a state's change; rows and columns sum to about one."""
    size = encoder.options.size
    dark = torch.randn(1, 3, size, size)
    light = 0.03 * (torch.randn(1, 3, size, size) + torch.randn(1, 3, 1, 1))
    before = encoder({"pixels": dark})
    rows, columns = before.grid
    parts = min(rows, MOST_PARTS)
    edges = [size * part // parts for part in range(parts + 1)]
    lit = dark.repeat(parts * parts, 1, 1, 1)
    for part, picture in enumerate(lit):
        place = (..., *(slice(edges[i], edges[i + 1]) for i in divmod(part, parts)))
        picture[place] += light[0][place]
    changes = torch.cat([encoder({"pixels": some}).states - before.states for some in lit.split(32)])
    changes = changes[:, -rows * columns :].double()
    changes = (changes - changes.mean(1, keepdim=True)).square().sum(-1).unflatten(1, (1, rows, columns))
    shares = nn.functional.adaptive_avg_pool2d(changes, (parts, parts)).flatten(1)
    shares = shares / shares.sum() + 1e-12
    for _ in range(20):  # Sinkhorn and Knopp: divide rows and columns by their sums in turn
        shares = shares / shares.sum(0)
        shares = shares / shares.sum(1, keepdim=True)
    return shares


def is_exact(shares):
    own = torch.arange(len(shares))
    return bool((shares.argmax(0) == own).all() and (shares.argmax(1) == own).all())


def correlations(shares):
    """[2, 2]: of the row and column of the centre of what a state sees, with the row and column where it is."""
    side = round(len(shares) ** 0.5)
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).double()
    centres = (shares / shares.sum(0)).T @ places
    return torch.corrcoef(torch.cat([centres.T, places.T]))[:2, 2:]


def is_near(shares, least):
    found = correlations(shares)
    return bool(found.diagonal().min() >= least and found.fliplr().diagonal().abs().max() <= 0.25)
