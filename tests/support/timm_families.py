"""Families of timm backbones that the tests use, tiny and random: how each is built, and its grid."""

VIT = {"embed_dim": 24, "depth": 1, "num_heads": 2}
SWIN = {"embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4}
HIERA = {"embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1, 1)}
PYRAMID = {"embed_dims": (16, 16, 32, 32), "depths": (1, 1, 1, 1)}
HEADS = {"num_heads": (1, 1, 2, 2)}
CONVNEXT = {"dims": (16, 16, 32, 32), "depths": (1, 1, 1, 1)}
TNT = {"embed_dim": 24, "inner_dim": 8, "depth": 1, "num_heads_outer": 2, "num_heads_inner": 2}
SEQUENCER = {"layers": (1, 1, 1, 1), "embed_dims": (24,) * 4, "hidden_sizes": (12,) * 4}

# backbone: size, arguments, cells per side, prefix tokens. Every state depends most on its own patch of the image.
EXACT = {
    "test_vit": (96, {}, 6, 1),
    "vit_small_patch14_reg4_dinov2": (70, VIT, 5, 5),
    "vit_tiny_r_s16_p8_224": (160, VIT, 5, 1),
    "test_vit_relpos": (96, {}, 6, 0),
    "samvit_base_patch16_224": (96, VIT, 6, 0),
    "naflexvit_base_patch16_gap": (96, VIT, 6, 4),
    "deit_tiny_distilled_patch16_224": (96, VIT, 6, 2),
    "deit3_small_patch16_224": (96, VIT, 6, 1),
    "eva02_tiny_patch14_224": (70, VIT, 5, 1),
    "vit_tiny_patch16_dinov3_qkvb": (80, VIT, 5, 5),
    "beit_base_patch16_224": (96, VIT, 6, 1),
    "cait_xxs24_224": (96, VIT, 6, 1),
    "convit_tiny": (96, VIT | {"depth": 2, "local_up_to_layer": 1}, 6, 1),
    "tnt_s_patch16_224": (96, TNT, 6, 1),
    "volo_d1_224": (64, {}, 4, 1),
    "coat_lite_tiny": (128, {}, 4, 1),
    "swin_tiny_patch4_window7_224": (64, SWIN, 8, 0),
    "swinv2_tiny_window8_256": (64, SWIN, 8, 0),
    "swinv2_cr_tiny_224": (64, SWIN, 8, 0),
    "hiera_tiny_224": (224, HIERA, 7, 0),
    "sam2_hiera_tiny": (224, HIERA, 7, 0),
    "pvt_v2_b0": (160, {"depths": (1, 1, 1, 1)}, 5, 0),
    "nest_tiny": (64, {}, 4, 0),
    "focalnet_tiny_srf": (96, {}, 3, 0),
    "test_maxvit": (160, {}, 5, 0),
    "test_coatnet": (160, {}, 5, 0),
    "poolformer_s12": (128, {}, 4, 0),
    "caformer_s18": (96, {}, 3, 0),
    "efficientformer_l1": (224, PYRAMID, 7, 0),
    "edgenext_xx_small": (160, {}, 5, 0),
    "gmlp_ti16_224": (96, {}, 6, 0),
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
}
# The same, and the number of random networks whose influences are added: untrained attention mixes positions.
SUMMED = {
    "levit_128s": (224, {}, 4, 0, 6),
    "twins_svt_small": (160, PYRAMID | HEADS, 5, 0, 3),
    "twins_pcpvt_small": (160, PYRAMID | HEADS, 5, 0, 3),
    "davit_tiny": (160, PYRAMID | HEADS, 5, 0, 4),
    "xcit_nano_12_p8_224": (64, VIT, 8, 1, 6),
    "sequencer2d_s": (80, SEQUENCER, 5, 0, 3),
    "test_efficientnet": (160, {}, 5, 0, 3),
    "densenet121": (160, {"growth_rate": 8, "block_config": (1, 1, 1, 1)}, 5, 0, 8),
}
# As EXACT, and the minimum correlation of the center of influence with the position of a state.
WIDE = {
    "mobilenetv3_small_050": (224, {}, 7, 0, 0.95),
    "mobilenetv4_conv_small_035": (224, {}, 7, 0, 0.95),
    "ghostnet_050": (160, {}, 5, 0, 0.95),
    "mvitv2_tiny": (96, {}, 3, 0, 0.95),
    "lcnet_035": (224, {}, 7, 0, 0.9),
    "mobilevit_xxs": (160, {}, 5, 0, 0.95),
    "efficientvit_b0": (224, {}, 7, 0, 0.8),
    "fastvit_t8": (160, {"embed_dims": (16, 16, 32, 32), "layers": (1, 1, 1, 1)}, 5, 0, 0.95),
    "repvit_m1": (160, {"embed_dim": (16, 16, 32, 32), "depth": (1, 1, 1, 1)}, 5, 0, 0.95),
    "tiny_vit_5m_224": (224, PYRAMID | HEADS, 7, 0, 0.95),
    "resnetv2_18": (160, {"layers": (1, 1, 1, 1)}, 5, 0, 0.95),
    "repvgg_a0": (128, {}, 4, 0, 0.9),
    "mobileone_s0": (128, {}, 4, 0, 0.9),
    "hrnet_w18_small": (128, {}, 4, 0, 0.95),
    "hgnetv2_b0": (160, {}, 5, 0, 0.95),
}
# As WIDE, but slow.
MORE = {
    "dla46x_c": (160, {}, 5, 0, 0.95),
    "ese_vovnet19b_slim_dw": (160, {}, 5, 0, 0.95),
    "iformer_t": (160, {}, 5, 0, 0.95),
    "legacy_seresnet18": (128, {}, 4, 0, 0.95),
    "mixer_s32_224": (128, {}, 4, 0, 0.95),
    "rexnet_100": (160, {}, 5, 0, 0.95),
    "swiftformer_xs": (160, {}, 5, 0, 0.95),
    "vitamin_small_224": (64, {}, 4, 0, 0.95),
}
LARGE = {
    "convmixer_768_32": (224, {}, 32, 0, 0.9),
    "efficientformerv2_s0": (160, {}, 5, 0, 0.9),
    "gcvit_xxtiny": (224, {}, 7, 0, 0.95),
    "inception_v3": (299, {}, 8, 0, 0.95),
    "mvitv2_small_cls": (96, {}, 3, 1, 0.9),
    "nextvit_small": (160, {}, 5, 0, 0.95),
    "poolformerv2_s12": (224, {}, 7, 0, 0.95),
    "res2net50_14w_8s": (160, {}, 5, 0, 0.95),
    "resnest14d": (128, {}, 4, 0, 0.95),
    "resnet18": (160, {}, 5, 0, 0.95),
    "visformer_tiny": (160, {}, 5, 0, 0.95),
    "xception41p": (160, {}, 5, 0, 0.95),
}
FAMILIES = EXACT | SUMMED | WIDE | MORE
