"""Any timm backbone as tokens with their grid: the right width, every cell in its place, its own preprocessing."""

import random
from io import BytesIO

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from mmx.config.schema import SourceConfig
from mmx.encoders.contract import check_features
from mmx.encoders.image import ImageEncoder
from mmx.errors import ConfigError, EncoderError, ImageError
from mmx.models.checkpoint import load_model, save_model
from mmx.testing import tiny_model

SMALL = {"embed_dim": 24, "depth": 1, "num_heads": 2}
SWIN = {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}
HIERA = {"embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1, 1)}

# backbone, stage, size, arguments: width, grid, prefix tokens, by how many cells an untrained one may point beside
FAMILIES = {
    ("test_vit", None, 96, ()): (64, (6, 6), 1, 0),
    ("test_vit", 1, 96, ()): (64, (6, 6), 0, 0),
    ("deit_tiny_patch16_224", None, 96, "SMALL"): (24, (6, 6), 1, 0),
    ("deit_tiny_distilled_patch16_224", None, 96, "SMALL"): (24, (6, 6), 2, 0),
    ("swin_tiny_patch4_window7_224", None, 64, "SWIN"): (32, (8, 8), 0, 0),
    ("swin_tiny_patch4_window7_224", 0, 64, "SWIN"): (16, (16, 16), 0, 0),
    ("test_convnext", None, 160, ()): (64, (5, 5), 0, 0),
    ("test_convnext", 1, 96, ()): (32, (12, 12), 0, 1),
    ("test_resnet", None, 160, ()): (96, (5, 5), 0, 1),
    ("test_resnet", 3, 96, ()): (192, (6, 6), 0, 1),
    ("test_efficientnet", None, 160, ()): (256, (5, 5), 0, 1),
    ("test_efficientnet", 2, 96, ()): (32, (12, 12), 0, 1),
    ("mobilenetv4_conv_small_035", 3, 128, ()): (32, (8, 8), 0, 2),
    ("test_maxvit", None, 160, ()): (128, (5, 5), 0, 1),
    ("hiera_tiny_224", None, 224, "HIERA"): (128, (7, 7), 0, 0),
    ("hiera_tiny_224", 1, 224, "HIERA"): (32, (28, 28), 0, 0),
}
MORE = [
    "beit_base_patch16_224",
    "cait_xxs24_224",
    "caformer_s18",
    "davit_tiny",
    "edgenext_small",
    "eva02_tiny_patch14_224",
    "fasternet_t0",
    "focalnet_tiny_lrf",
    "inception_next_atto",
    "legacy_seresnet18",
    "nest_tiny",
    "nextvit_small",
    "rdnet_tiny",
    "regnetx_002",
    "resnest14d",
    "resnet18",
    "twins_svt_small",
]


def build(backbone="test_resnet", seed=0, **options):
    torch.manual_seed(seed)
    return ImageEncoder(ImageEncoder.Options(backbone=backbone, **options)).eval()


def of(case):
    backbone, stage, size, arguments = case
    return build(backbone, stage=stage, size=size, arguments=globals()[arguments] if arguments else {})


def loudest(encoder, row, column, rows, columns):
    """The cell whose state changes most when light falls on the cell (row, column) of three pictures."""
    size = encoder.options.size
    top, bottom = size * row // rows, size * (row + 1) // rows
    left, right = size * column // columns, size * (column + 1) // columns
    dark = torch.randn(3, 3, size, size, generator=torch.manual_seed(1)) * 0.1
    lit = dark.clone()
    lit[:, :, top:bottom, left:right] += 2 * torch.randn(3, 3, bottom - top, right - left)
    with torch.no_grad():
        change = encoder({"pixels": lit}).states - encoder({"pixels": dark}).states
    cells = change[:, -rows * columns :].norm(dim=-1).sum(0)
    return divmod(int(cells.argmax()), columns)


def assert_placed(encoder, beside):
    with torch.no_grad():
        rows, columns = encoder({"pixels": torch.zeros(1, 3, encoder.options.size, encoder.options.size)}).grid
    for row, column in [(0, columns - 1), (rows - 1, 0), (rows // 2, 0), (rows - 1, columns // 2)]:
        found = loudest(encoder, row, column, rows, columns)
        assert abs(found[0] - row) <= beside, (found, (row, column))
        assert abs(found[1] - column) <= beside, (found, (row, column))


@pytest.mark.parametrize("case", FAMILIES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_a_family_of_backbones(case):
    width, grid, prefix, beside = FAMILIES[case]
    encoder = of(case)
    with torch.no_grad():
        features = check_features(encoder({"pixels": torch.randn(2, 3, case[2], case[2])}), encoder, "image")
    assert encoder.width == width
    assert features.grid == grid
    assert features.states.shape == (2, prefix + grid[0] * grid[1], width)
    assert features.mask.all()
    assert_placed(encoder, beside)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [None, 1])
@pytest.mark.parametrize("backbone", MORE)
def test_many_more_families(backbone, stage):
    encoder = build(backbone, stage=stage)
    size = encoder.options.size
    with torch.no_grad():
        features = check_features(encoder({"pixels": torch.randn(1, 3, size, size)}), encoder, "image")
    assert features.grid[0] * features.grid[1] in (features.states.shape[1], features.states.shape[1] - 1)
    assert_placed(encoder, 1)
    again = ImageEncoder(encoder.options)
    again.load_state_dict(encoder.state_dict())


def test_prefix_tokens_come_before_the_cells():
    encoder = build("test_vit", size=96)
    with torch.no_grad():
        states = encoder({"pixels": torch.randn(1, 3, 96, 96)}).states
        straight = encoder.backbone.forward_features(torch.randn(1, 3, 96, 96))
    assert states.shape == straight.shape == (1, 37, 64)
    token = encoder.backbone.cls_token
    with torch.no_grad():
        before = encoder({"pixels": torch.ones(1, 3, 96, 96)}).states
        token += 1.0
        change = (encoder({"pixels": torch.ones(1, 3, 96, 96)}).states - before)[0].norm(dim=-1)
    assert int(change.argmax()) == 0


def test_a_stage_cuts_the_rest_off_and_keeps_timms_names():
    whole, cut = build("resnet18", size=64), build("resnet18", size=64, stage=3)
    names = cut.state_dict().keys()
    assert {"backbone.conv1.weight", "backbone.layer3.1.bn2.running_mean"} <= names
    assert not [name for name in names if "layer4" in name or ".fc." in name]
    assert (cut.width, whole.width) == (256, 512)
    with torch.no_grad():
        assert cut({"pixels": torch.zeros(1, 3, 64, 64)}).grid == (4, 4)
        assert whole({"pixels": torch.zeros(1, 3, 64, 64)}).grid == (2, 2)


def test_gradients_reach_the_picture_and_the_weights():
    encoder = build(size=64)
    pixels = torch.randn(1, 3, 64, 64, requires_grad=True)
    encoder({"pixels": pixels}).states.square().sum().backward()
    assert pixels.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in encoder.parameters())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"backbone": "resnet_18"}, "timm has no backbone 'resnet_18'; did you mean 'resnet"),
        ({"backbone": "rsenet18"}, "timm has no backbone 'rsenet18'; did you mean 'resnet18'?"),
        ({"backbone": "????????"}, "timm has no backbone '????????'; known: what timm.list_models() lists."),
        ({"backbone": "hf-hub:someone/something"}, "timm has no backbone 'hf-hub:someone/something'"),
        ({"backbone": "resnet18.no_such_tag"}, "timm cannot build backbone 'resnet18.no_such_tag' (RuntimeError)"),
        ({"backbone": "resnet18", "stage": 9}, "backbone 'resnet18' has no stage 9; use another stage, or none."),
        ({"backbone": "test_vit", "stage": 60}, "backbone 'test_vit' has no stage 60; use another stage"),
        ({"arguments": {"nonsense": 1}}, "timm cannot build backbone 'test_resnet' (TypeError)"),
        ({"backbone": "test_vit", "size": 7}, "'test_vit'"),
        ({"backbone": "crossvit_tiny_240"}, "'crossvit_tiny_240' does not end in one map; give a stage."),
    ],
)
def test_what_cannot_be_built_is_one_sentence(options, said):
    with pytest.raises(EncoderError) as caught:
        build(**options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


DECIDED = ["checkpoint_path", "features_only", "img_size", "pretrained", "num_classes", "pretrained_cfg_overlay"]


@pytest.mark.parametrize("argument", DECIDED)
def test_arguments_that_other_options_decide(argument):
    source = SourceConfig(encoder="image", options={"backbone": "test_resnet", "arguments": {argument: 1}})
    said = f"arguments cannot hold {argument}; use the options size, stage, pretrained, weights"
    with pytest.raises(ConfigError, match=said):
        tiny_model({"image": source})


def file_of(path, backbone="test_resnet", seed=7, change=None, **arguments):
    """A .safetensors file of a whole random backbone with three classes, its tensors first changed by `change`."""
    torch.manual_seed(seed)
    tensors = dict(timm.create_model(backbone, **{"num_classes": 3, **arguments}).state_dict())
    if change:
        change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return tensors


def test_weights_come_from_a_file_and_then_travel_in_the_checkpoint(tmp_path):
    path = tmp_path / "weights.safetensors"
    tensors = file_of(path)
    options = {"backbone": "test_resnet", "size": 32, "weights": str(path)}
    model = tiny_model({"image": SourceConfig(encoder="image", options=options)}, layers=1)
    for name, tensor in model.encoder("image").backbone.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name
    assert {name for name in tensors if name not in model.encoder("image").backbone.state_dict()} == {
        "fc.weight",
        "fc.bias",
    }
    stored = model.config.sources["image"].options
    assert (stored["weights"], stored["pretrained"]) == (None, False)
    folder = save_model(tmp_path / "m", model)
    path.unlink()
    again = load_model(folder)
    assert again.encoder("image").options == model.encoder("image").options
    assert torch.equal(again.encoder("image").backbone.conv1[0].weight, tensors["conv1.0.weight"])


def test_fetched_weights_are_not_fetched_again(monkeypatch):
    fetched = []
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *args, **kwargs: fetched.append(args))
    encoder = build(size=32, pretrained=True)
    assert len(fetched) == 1
    assert (encoder.options.pretrained, encoder.options.weights) == (False, None)
    ImageEncoder(encoder.options)
    assert len(fetched) == 1


def test_weights_of_a_stage_leave_the_later_ones_in_the_file(tmp_path):
    path = tmp_path / "weights.safetensors"
    tensors = file_of(path, "swin_tiny_patch4_window7_224", img_size=64, **SWIN)
    cut = build("swin_tiny_patch4_window7_224", stage=0, size=64, arguments=SWIN, weights=str(path))
    names = cut.backbone.state_dict().keys()
    assert "layers_0.blocks.0.attn.qkv.weight" in names
    for name, tensor in cut.backbone.state_dict().items():
        assert torch.equal(tensor, tensors[name.replace("layers_0", "layers.0")])
    assert len(names) < sum(not name.startswith("head") for name in tensors)


def test_weights_of_one_size_are_stretched_to_another_as_timm_does(tmp_path):
    path = tmp_path / "weights.safetensors"
    tensors = file_of(path, "test_vit", img_size=160)
    encoder = build("test_vit", size=96, weights=str(path))
    stretched = timm.layers.resample_abs_pos_embed(tensors["pos_embed"], [6, 6], num_prefix_tokens=1)
    assert torch.equal(encoder.backbone.pos_embed, stretched)


def test_weights_in_half_precision_and_from_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tensors = file_of(
        tmp_path / "weights.safetensors", change=lambda own: own.update({n: halved(t) for n, t in own.items()})
    )
    encoder = build(size=32, weights="~/weights.safetensors")
    assert encoder.backbone.conv1[0].weight.dtype == torch.float32
    assert torch.equal(encoder.backbone.conv1[0].weight, tensors["conv1.0.weight"].float())


def halved(tensor):
    return tensor.half() if tensor.is_floating_point() else tensor


def without(name):
    return lambda tensors: tensors.pop(name)


def with_one_of(name, *shape):
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("conv1.0.weight"), "the file lacks conv1.0.weight; expected timm's names"),
        (with_one_of("layer9.weight", 3), "the file has layer9.weight, which it knows not; expected"),
        (with_one_of("bn1.bias", 5), "the file holds bn1.bias as [5], not [32]; expected"),
        (lambda tensors: [tensors.pop(f"bn1.{name}") for name in ("weight", "bias")], "lacks bn1.weight (1 more such)"),
        (with_one_of("fc.weight", 7, 9), None),  # it is dropped, whatever its shape
        (without("fc.bias"), None),
    ],
)
def test_weights_that_do_not_fit_are_told_by_name(tmp_path, change, said):
    path = tmp_path / "weights.safetensors"
    file_of(path, change=change)
    if said is None:
        build(size=32, weights=str(path))
        return
    with pytest.raises(EncoderError) as caught:
        build(size=32, weights=str(path))
    assert str(caught.value).startswith(f"weights {path} do not fit backbone 'test_resnet': ")
    assert said in str(caught.value)
    assert str(caught.value).endswith("give the backbone, size and arguments they were saved with.")
    assert "\n" not in str(caught.value)


def test_weights_of_another_backbone_do_not_fit(tmp_path):
    path = tmp_path / "weights.safetensors"
    for own, other in [("test_vit", "test_resnet"), ("test_resnet", "test_vit"), ("test_convnext", "hiera_tiny_224")]:
        file_of(path, own)
        with pytest.raises(
            EncoderError, match=rf"^weights .* do not fit backbone '{other}': the file lacks .*more such"
        ):
            build(other, weights=str(path))


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".npz", ""])
def test_pickles_are_refused_with_what_to_type(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    torch.save({"a": torch.zeros(2)}, path)
    with pytest.raises(EncoderError) as caught:
        build(size=32, weights=str(path))
    load = f'torch.load("model{suffix}", weights_only=True)'
    convert = f'safetensors.torch.save_file({load}, "model.safetensors")'
    said = f"weights {path} may be a pickle, which can run code; type {convert}."
    assert str(caught.value) == said


def test_weights_that_cannot_be_read(tmp_path):
    path = tmp_path / "weights.safetensors"
    with pytest.raises(EncoderError, match=r"are not there; expected a .safetensors file; check the path\.$"):
        build(size=32, weights=str(path))
    with pytest.raises(EncoderError, match="are not there"):
        build(size=32, weights=str(tmp_path.with_suffix(".safetensors")))
    for content in (b"", b"PK\x03\x04", b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(EncoderError, match=r"are damaged or no safetensors file; copy the file again\.$"):
            build(size=32, weights=str(path))


def test_what_timm_cannot_make_sense_of_is_one_sentence(tmp_path):
    path = tmp_path / "weights.safetensors"
    file_of(path, "test_vit", change=with_one_of("patch_embed.proj.weight"))
    with pytest.raises(
        EncoderError, match=r"are not those of a VisionTransformer; name the backbone they belong to\.$"
    ):
        build("test_vit", weights=str(path))


def test_weights_are_fetched_or_read_but_not_both():
    options = {"backbone": "test_resnet", "pretrained": True, "weights": "a.safetensors"}
    with pytest.raises(
        ConfigError, match="pretrained fetches weights, and weights names a file of them; leave out one"
    ):
        tiny_model({"image": SourceConfig(encoder="image", options=options)})


def test_the_preprocessing_is_resolved_and_travels(tmp_path):
    options = {
        "backbone": "test_resnet",
        "size": 40,
        "std": [0.5, 0.25, 0.125],
        "interpolation": "nearest",
        "fit": "crop",
    }
    model = tiny_model({"image": SourceConfig(encoder="image", options=options)}, layers=1)
    stored = model.config.sources["image"].options
    assert (stored["size"], stored["std"], stored["fit"]) == (40, [0.5, 0.25, 0.125], "crop")
    assert stored["mean"] == [0.5, 0.5, 0.5], "the backbone's own"
    again = load_model(save_model(tmp_path / "m", model))
    assert again.config == model.config
    assert again.encoder("image").options == model.encoder("image").options
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8))
    one, other = (m.encoder("image").prepare(picture)["pixels"] for m in (model, again))
    assert one.shape == (3, 40, 40)
    assert torch.equal(one, other)


def test_the_backbones_own_size_is_the_default():
    encoder = build("test_vit")
    assert (encoder.options.size, encoder.options.interpolation) == (160, "bicubic")
    assert encoder.prepare(Image.new("RGB", (9, 5)))["pixels"].shape == (3, 160, 160)
    assert ImageEncoder(encoder.options).options == encoder.options


def test_mean_and_std_are_applied():
    encoder = build(size=32, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0))
    pixels = encoder.prepare(Image.new("RGB", (64, 64), (255, 0, 255)))["pixels"]
    assert [round(float(channel.mean()), 5) for channel in pixels] == [1.0, -1.0, 0.5]


def test_squash_keeps_all_and_crop_keeps_the_middle():
    picture = Image.new("RGB", (96, 32), "black")  # its left third is white, the middle one is not
    picture.paste("white", (0, 0, 32, 32))
    plain = {"size": 32, "mean": (0, 0, 0), "std": (1, 1, 1)}
    squashed = build(fit="squash", **plain).prepare(picture)["pixels"]
    cropped = build(fit="crop", **plain).prepare(picture)["pixels"]
    assert squashed.mean() == pytest.approx(1 / 3, abs=0.02)
    assert squashed[:, :, :8].min() > 0.95
    assert cropped.max() < 0.05


MODES = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "I", "I;16", "F"]


@pytest.mark.parametrize("mode", MODES)
def test_a_picture_of_any_mode(mode):
    pixels = build(size=32).prepare(Image.new(mode, (40, 30)))["pixels"]
    assert pixels.shape == (3, 32, 32)
    assert pixels.dtype == torch.float32
    assert torch.isfinite(pixels).all()


def test_path_bytes_and_open_picture_are_one(tmp_path):
    """Also where the picture lies on its side and says so only in its EXIF."""
    encoder, path = build(size=32), tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 255, (48, 80, 3), np.uint8)
    Image.fromarray(pixels).save(path, exif=exif)
    expected = encoder.prepare(path)["pixels"]
    assert torch.equal(encoder.prepare(str(path))["pixels"], expected)
    assert torch.equal(encoder.prepare(path.read_bytes())["pixels"], expected)
    with Image.open(path) as opened:
        assert opened.mode == "RGB"
        assert torch.equal(encoder.prepare(opened)["pixels"], expected)
    lying = BytesIO()
    Image.fromarray(pixels).save(lying, "JPEG")
    assert not torch.equal(encoder.prepare(lying.getvalue())["pixels"], expected)


@pytest.mark.parametrize("raw", [b"", b"GIF89a", "missing.png", 3, None, Image.new("RGB", (0, 4))])
def test_what_is_no_picture(raw):
    with pytest.raises(ImageError):
        build(size=32).prepare(raw)


def test_accepts():
    encoder = build(size=32)
    assert encoder.accepts("a/B.JPG")
    assert not encoder.accepts("a.wav")


def test_building_leaves_the_dice_and_the_defaults_alone():
    """Weights are drawn from torch's dice, as always; looking for the width throws none."""
    python, numpy, dtype = random.getstate(), np.random.get_state()[1].copy(), torch.get_default_dtype()
    encoder = build("test_resnet", size=32)
    after = torch.random.get_rng_state()
    torch.manual_seed(0)
    plain = timm.create_model("test_resnet", num_classes=0)
    assert torch.equal(torch.random.get_rng_state(), after)
    assert torch.equal(plain.state_dict()["conv1.0.weight"], encoder.state_dict()["backbone.conv1.0.weight"])
    assert random.getstate() == python
    assert (np.random.get_state()[1] == numpy).all()
    assert torch.get_default_dtype() == dtype
    assert torch.is_grad_enabled()
    torch.manual_seed(0)
    fresh = ImageEncoder(ImageEncoder.Options(backbone="test_resnet", size=32))
    assert all(module.training for module in fresh.modules())
    means = [tensor for name, tensor in fresh.state_dict().items() if name.endswith("running_mean")]
    assert means
    assert all(mean.eq(0).all() for mean in means), "the look for the width moves no running mean"
