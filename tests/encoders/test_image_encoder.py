"""timm backbones as tokens with their grid: width, order of the cells, weights from files, preprocessing."""

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
from mmx.encoders.image import RESERVED_ARGUMENTS, ImageEncoder
from mmx.errors import ConfigError, EncoderError, ImageError
from mmx.models.checkpoint import load_model, save_model
from mmx.models.source import collate_inputs, prepare_inputs
from mmx.testing import tiny_model

SMALL = {"embed_dim": 24, "depth": 1, "num_heads": 2}
SWIN = {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}
HIERA = {"embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1, 1)}

# backbone, stage, size, arguments: width, grid, prefix tokens, by how many cells an untrained one may be wrong
FAMILIES = {
    ("test_vit", None, 96, ()): (64, (6, 6), 1, 0),
    ("test_vit", 1, 96, ()): (64, (6, 6), 0, 0),
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


def build_case(case):
    backbone, stage, size, arguments = case
    return build(backbone, stage=stage, size=size, arguments=globals()[arguments] if arguments else {})


def build_model(layers=1, **options):
    source = SourceConfig(encoder="image", options={"backbone": "test_resnet", **options})
    return tiny_model({"image": source}, num_layers=layers)


def most_changed_cell(encoder, row, column, rows, columns):
    """The cell whose states change most if the pixels of the cell (row, column) of three images change."""
    size = encoder.options.size
    top, bottom = size * row // rows, size * (row + 1) // rows
    left, right = size * column // columns, size * (column + 1) // columns
    pixels = torch.randn(3, 3, size, size, generator=torch.manual_seed(1)) * 0.1
    changed = pixels.clone()
    changed[:, :, top:bottom, left:right] += 2 * torch.randn(3, 3, bottom - top, right - left)
    with torch.no_grad():
        difference = encoder({"pixels": changed}).states - encoder({"pixels": pixels}).states
    cells = difference[:, -rows * columns :].norm(dim=-1).sum(0)
    return divmod(int(cells.argmax()), columns)


def assert_cells_in_order(encoder, tolerance):
    size = encoder.options.size
    with torch.no_grad():
        rows, columns = encoder({"pixels": torch.zeros(1, 3, size, size)}).grid
    for row, column in [(0, columns - 1), (rows - 1, 0), (rows // 2, 0), (rows - 1, columns // 2)]:
        found = most_changed_cell(encoder, row, column, rows, columns)
        assert abs(found[0] - row) <= tolerance, (found, (row, column))
        assert abs(found[1] - column) <= tolerance, (found, (row, column))


SLOW = {"test_maxvit", "mobilenetv4_conv_small_035", "hiera_tiny_224"}
CASES = [pytest.param(case, marks=pytest.mark.families if case[0] in SLOW else ()) for case in FAMILIES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_backbone_families(case):
    width, grid, prefix, tolerance = FAMILIES[case]
    encoder = build_case(case)
    with torch.no_grad():
        features = check_features(encoder({"pixels": torch.randn(2, 3, case[2], case[2])}), encoder, "image")
    assert encoder.width == width
    assert features.grid == grid
    assert features.states.shape == (2, prefix + grid[0] * grid[1], width)
    assert features.mask.all()
    assert_cells_in_order(encoder, tolerance)


@pytest.mark.families
@pytest.mark.parametrize("stage", [None, 1])
@pytest.mark.parametrize("backbone", MORE)
def test_more_backbone_families(backbone, stage):
    encoder = build(backbone, stage=stage)
    size = encoder.options.size
    with torch.no_grad():
        features = check_features(encoder({"pixels": torch.randn(1, 3, size, size)}), encoder, "image")
    assert features.grid[0] * features.grid[1] in (features.states.shape[1], features.states.shape[1] - 1)
    assert_cells_in_order(encoder, 1)
    rebuilt = ImageEncoder(encoder.options)
    rebuilt.load_state_dict(encoder.state_dict())


def test_pretrained_weights_are_downloaded_into_the_cache_of_the_environment(monkeypatch, tmp_path):
    folders = []
    create_model = timm.create_model

    def record(name, **arguments):
        folders.append(arguments.pop("cache_dir"))
        return create_model(name, **arguments)

    monkeypatch.setattr(timm, "create_model", record)
    for value in (None, "", str(tmp_path)):
        if value is not None:
            monkeypatch.setenv("MMX_CACHE", value)
        ImageEncoder(ImageEncoder.Options(backbone="test_resnet", size=64, stage=1))
    assert list(dict.fromkeys(folders)) == [None, tmp_path]


def test_prefix_tokens_come_before_the_cells():
    encoder = build("test_vit", size=96)
    pixels = torch.ones(1, 3, 96, 96)
    with torch.no_grad():
        before = encoder({"pixels": pixels}).states
        assert before.shape == encoder.backbone.forward_features(pixels).shape == (1, 37, 64)
        token = encoder.backbone.cls_token
        token += 1.0
        change = (encoder({"pixels": pixels}).states - before)[0].norm(dim=-1)
    assert int(change.argmax()) == 0


def test_stage_removes_later_layers_and_keeps_timm_names():
    whole = build("resnet18", size=64)
    cut = build("resnet18", size=64, stage=3)
    names = cut.state_dict().keys()
    assert {"backbone.conv1.weight", "backbone.layer3.1.bn2.running_mean"} <= names
    assert not [name for name in names if "layer4" in name or ".fc." in name]
    assert (cut.width, whole.width) == (256, 512)
    with torch.no_grad():
        assert cut({"pixels": torch.zeros(1, 3, 64, 64)}).grid == (4, 4)
        assert whole({"pixels": torch.zeros(1, 3, 64, 64)}).grid == (2, 2)


def test_gradients_reach_pixels_and_weights():
    encoder = build(size=64)
    pixels = torch.randn(1, 3, 64, 64, requires_grad=True)
    encoder({"pixels": pixels}).states.square().sum().backward()
    assert pixels.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in encoder.parameters())


@pytest.mark.parametrize(
    ("options", "code", "named"),
    [
        ({"backbone": "resnet_18"}, "encoder.unknown_backbone", "did you mean 'resnet"),
        ({"backbone": "rsenet18"}, "encoder.unknown_backbone", "did you mean 'resnet18'?"),
        ({"backbone": "????????"}, "encoder.unknown_backbone", "timm.list_models()"),
        ({"backbone": "hf-hub:someone/something"}, "encoder.unknown_backbone", "'hf-hub:someone/something'"),
        ({"backbone": "resnet18.no_such_tag"}, "encoder.backbone_options", "(RuntimeError)"),
        ({"backbone": "resnet18", "stage": 9}, "encoder.unknown_stage", "stage 9"),
        ({"backbone": "test_vit", "stage": 60}, "encoder.unknown_stage", "stage 60"),
        ({"arguments": {"nonsense": 1}}, "encoder.backbone_options", "(TypeError)"),
        ({"backbone": "test_vit", "size": 7}, "encoder.image_size", "'test_vit'"),
        ({"backbone": "crossvit_tiny_240"}, "encoder.no_feature_map", "give a stage"),
    ],
)
def test_invalid_options_are_an_error(options, code, named):
    with pytest.raises(EncoderError) as caught:
        build(**options)
    assert caught.value.code == code
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("argument", sorted(RESERVED_ARGUMENTS))
def test_reserved_arguments_are_an_error(argument):
    with pytest.raises(ConfigError, match=f"arguments cannot hold {argument}"):
        build_model(arguments={argument: 1})


# ---- weights


def save_weights(path, backbone="test_resnet", seed=7, change=None, **arguments):
    """Save the tensors of a whole random backbone with three classes, after `change(tensors)`; return them."""
    torch.manual_seed(seed)
    tensors = dict(timm.create_model(backbone, **{"num_classes": 3, **arguments}).state_dict())
    if change:
        change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return tensors


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.safetensors"


def test_weights_from_a_file_become_part_of_the_checkpoint(tmp_path, path):
    tensors = save_weights(path)
    model = build_model(size=32, weights=str(path))
    own = model.encoder("image").backbone.state_dict()
    for name, tensor in own.items():
        assert torch.equal(tensor, tensors[name]), name
    assert tensors.keys() - own.keys() == {"fc.weight", "fc.bias"}
    stored = model.config.sources["image"].options
    assert (stored["weights"], stored["pretrained"]) == (None, False)
    folder = save_model(tmp_path / "m", model)
    path.unlink()
    loaded = load_model(folder)
    assert loaded.encoder("image").options == model.encoder("image").options
    assert torch.equal(loaded.encoder("image").backbone.conv1[0].weight, tensors["conv1.0.weight"])


def test_pretrained_weights_are_downloaded_once(monkeypatch):
    downloads = []
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *args, **kwargs: downloads.append(args))
    encoder = build(size=32, pretrained=True)
    assert len(downloads) == 1
    assert (encoder.options.pretrained, encoder.options.weights) == (False, None)
    ImageEncoder(encoder.options)
    assert len(downloads) == 1


def test_weights_of_later_stages_are_ignored(path):
    tensors = save_weights(path, "swin_tiny_patch4_window7_224", img_size=64, **SWIN)
    cut = build("swin_tiny_patch4_window7_224", stage=0, size=64, arguments=SWIN, weights=str(path))
    names = cut.backbone.state_dict().keys()
    assert "layers_0.blocks.0.attn.qkv.weight" in names
    for name, tensor in cut.backbone.state_dict().items():
        assert torch.equal(tensor, tensors[name.replace("layers_0", "layers.0")])
    assert len(names) < sum(not name.startswith("head") for name in tensors)


def test_position_embeddings_are_resized_as_in_timm(path):
    tensors = save_weights(path, "test_vit", img_size=160)
    encoder = build("test_vit", size=96, weights=str(path))
    resized = timm.layers.resample_abs_pos_embed(tensors["pos_embed"], [6, 6], num_prefix_tokens=1)
    assert torch.equal(encoder.backbone.pos_embed, resized)


def test_half_precision_weights_in_the_home_folder(tmp_path, path, monkeypatch):
    def halve(tensors):
        for name, tensor in tensors.items():
            tensors[name] = tensor.half() if tensor.is_floating_point() else tensor

    monkeypatch.setenv("HOME", str(tmp_path))
    tensors = save_weights(path, change=halve)
    weight = build(size=32, weights="~/weights.safetensors").backbone.conv1[0].weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, tensors["conv1.0.weight"].float())


def remove(*names):
    def change(tensors):
        for name in names:
            del tensors[name]

    return change


def replace(name, *shape):
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("change", "problems"),
    [
        (remove("conv1.0.weight"), ["lacks conv1.0.weight"]),
        (replace("layer9.weight", 3), ["has layer9.weight, which the backbone does not have"]),
        (replace("bn1.bias", 5), ["holds bn1.bias as [5], not [32]"]),
        (remove("bn1.weight", "bn1.bias"), ["lacks bn1.weight", "lacks bn1.bias"]),
        (replace("fc.weight", 7, 9), None),  # the classifier is ignored, whatever its shape
        (remove("fc.bias"), None),
    ],
)
def test_weights_that_do_not_fit_are_named(path, change, problems):
    save_weights(path, change=change)
    if problems is None:
        build(size=32, weights=str(path))
        return
    with pytest.raises(EncoderError) as caught:
        build(size=32, weights=str(path))
    error = caught.value
    assert (error.code, error.details["path"]) == ("encoder.weights_mismatch", str(path))
    assert error.details["backbone"] == "test_resnet"
    assert error.details["problems"] == problems
    assert problems[0] in str(error)
    assert "\n" not in str(error)


def test_weights_of_another_backbone_are_an_error(path):
    for own, other in [("test_vit", "test_resnet"), ("test_resnet", "test_vit"), ("test_convnext", "hiera_tiny_224")]:
        save_weights(path, own)
        with pytest.raises(EncoderError) as caught:
            build(other, weights=str(path))
        assert (caught.value.code, caught.value.details["backbone"]) == ("encoder.weights_mismatch", other)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".npz", ""])
def test_pickles_are_refused_with_the_command_to_convert_them(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    torch.save({"a": torch.zeros(2)}, path)
    with pytest.raises(EncoderError) as caught:
        build(size=32, weights=str(path))
    assert (caught.value.code, caught.value.details["path"]) == ("encoder.weights_pickle", str(path))
    load = f'torch.load("model{suffix}", weights_only=True)'
    assert f'safetensors.torch.save_file({load}, "model.safetensors")' in str(caught.value)


def test_missing_and_damaged_weights_are_an_error(tmp_path, path):
    for missing in (path, tmp_path.with_suffix(".safetensors")):
        with pytest.raises(EncoderError) as caught:
            build(size=32, weights=str(missing))
        assert caught.value.code == "encoder.weights_not_found"
    for content in (b"", b"PK\x03\x04", b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(EncoderError) as caught:
            build(size=32, weights=str(path))
        assert caught.value.code == "encoder.weights_damaged"


def test_exceptions_of_timm_about_a_file_are_converted(path):
    save_weights(path, "test_vit", change=replace("patch_embed.proj.weight"))
    with pytest.raises(EncoderError) as caught:
        build("test_vit", weights=str(path))
    assert (caught.value.code, caught.value.details["expected"]) == ("encoder.weights_backbone", "VisionTransformer")


def test_pretrained_excludes_weights():
    with pytest.raises(ConfigError, match="leave out one"):
        build_model(pretrained=True, weights="a.safetensors")


# ---- preprocessing


def test_preprocessing_is_resolved_and_saved(tmp_path):
    options = {"size": 40, "std": [0.5, 0.25, 0.125], "interpolation": "nearest", "fit": "crop"}
    model = build_model(**options)
    stored = model.config.sources["image"].options
    assert (stored["size"], stored["std"], stored["fit"]) == (40, [0.5, 0.25, 0.125], "crop")
    assert stored["mean"] == [0.5, 0.5, 0.5], "the default of the backbone"
    loaded = load_model(save_model(tmp_path / "m", model))
    assert loaded.config == model.config
    assert loaded.encoder("image").options == model.encoder("image").options
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8))
    pixels = model.encoder("image").prepare(image)["pixels"]
    assert pixels.shape == (3, 40, 40)
    assert torch.equal(loaded.encoder("image").prepare(image)["pixels"], pixels)


def test_size_defaults_to_that_of_the_backbone():
    encoder = build("test_vit")
    assert (encoder.options.size, encoder.options.interpolation) == (160, "bicubic")
    assert encoder.prepare(Image.new("RGB", (9, 5)))["pixels"].shape == (3, 160, 160)
    assert ImageEncoder(encoder.options).options == encoder.options


def test_mean_and_std_are_applied():
    encoder = build(size=32, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0))
    pixels = encoder.prepare(Image.new("RGB", (64, 64), (255, 0, 255)))["pixels"]
    assert [round(float(channel.mean()), 5) for channel in pixels] == [1.0, -1.0, 0.5]


def test_squash_keeps_the_image_and_crop_its_center():
    image = Image.new("RGB", (96, 32), "black")  # the left third is white
    image.paste("white", (0, 0, 32, 32))
    identity = {"size": 32, "mean": (0, 0, 0), "std": (1, 1, 1)}
    squashed = build(fit="squash", **identity).prepare(image)["pixels"]
    cropped = build(fit="crop", **identity).prepare(image)["pixels"]
    assert squashed.mean() == pytest.approx(1 / 3, abs=0.02)
    assert squashed[:, :, :8].min() > 0.95
    assert cropped.max() < 0.05


@pytest.mark.parametrize("size, window", [((96, 32), (0, -1, 1, 2)), ((30, 45), (-7 / 30, 0, 38 / 30, 1))])
def test_pad_keeps_the_image_and_its_shape(size, window):
    """The padding has the mean color: zero after the normalization. The window is the square around the image."""
    encoder = build(fit="pad", size=48, mean=(0.2, 0.4, 0.6), std=(0.5, 0.5, 0.5))
    image = Image.new("RGB", size, "white")
    prepared = encoder.prepare(image)
    inside = (prepared["pixels"][0] > 0.5).nonzero()
    sides = inside.amax(0) - inside.amin(0) + 1
    assert abs(sides[1] / sides[0] - size[0] / size[1]) < 0.1
    assert prepared["pixels"][:, 0, 0].abs().max() < 0.01
    assert encoder.window(image) == pytest.approx(window)
    assert prepared["window"].tolist() == pytest.approx(window)


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_boxes_are_regions_of_the_image_for_each_fit(fit):
    """A box on the right half of a wide image leaves the cells over this half, without those over the padding."""
    model = build_model(size=128, fit=fit)
    inputs = [prepare_inputs(model.encoders, {"image": Image.new("RGB", size)}) for size in ((128, 64), (64, 64))]
    with torch.no_grad():
        memory = model.encode(collate_inputs(model.encoders, inputs), 2)
    rows, columns = memory.layout[0].grid
    assert rows % 4 == 0
    cells = memory.focus((0.5, 0.0, 1.0, 1.0)).mask[:, -rows * columns :].view(2, rows, columns)
    right_half = [column >= columns // 2 for column in range(columns)]
    assert [image.any(0).tolist() for image in cells] == [right_half, right_half]
    assert cells[1].any(1).all()
    middle = [rows // 4 <= row < 3 * rows // 4 for row in range(rows)]
    assert cells[0].any(1).tolist() == (middle if fit == "pad" else [True] * rows)


@pytest.fixture(scope="module")
def small():
    return build(size=32)


MODES = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "I", "I;16", "F"]


@pytest.mark.parametrize("mode", MODES)
def test_image_of_any_mode(small, mode):
    pixels = small.prepare(Image.new(mode, (40, 30)))["pixels"]
    assert pixels.shape == (3, 32, 32)
    assert pixels.dtype == torch.float32
    assert torch.isfinite(pixels).all()


def test_path_bytes_and_open_image_give_the_same_pixels(small, tmp_path):
    """Also for an image whose orientation is given in EXIF."""
    path = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    array = np.random.default_rng(0).integers(0, 255, (48, 80, 3), np.uint8)
    Image.fromarray(array).save(path, exif=exif)
    expected = small.prepare(path)["pixels"]
    assert torch.equal(small.prepare(str(path))["pixels"], expected)
    assert torch.equal(small.prepare(path.read_bytes())["pixels"], expected)
    with Image.open(path) as opened:
        assert opened.mode == "RGB"
        assert torch.equal(small.prepare(opened)["pixels"], expected)
    without_exif = BytesIO()
    Image.fromarray(array).save(without_exif, "JPEG")
    assert not torch.equal(small.prepare(without_exif.getvalue())["pixels"], expected)


@pytest.mark.parametrize("raw", [b"", b"GIF89a", "missing.png", 3, None, Image.new("RGB", (0, 4))])
def test_invalid_image_is_an_error(small, raw):
    with pytest.raises(ImageError):
        small.prepare(raw)


def test_accepts(small):
    assert small.accepts("a/B.JPG")
    assert not small.accepts("a.wav")


def test_building_changes_no_global_state_except_by_drawing_weights():
    python_state = random.getstate()
    numpy_state = np.random.get_state()[1].copy()
    dtype = torch.get_default_dtype()
    encoder = build("test_resnet", size=32)
    after = torch.random.get_rng_state()
    torch.manual_seed(0)
    plain = timm.create_model("test_resnet", num_classes=0)
    assert torch.equal(torch.random.get_rng_state(), after), "measuring the width draws no random numbers"
    assert torch.equal(plain.state_dict()["conv1.0.weight"], encoder.state_dict()["backbone.conv1.0.weight"])
    assert random.getstate() == python_state
    assert (np.random.get_state()[1] == numpy_state).all()
    assert torch.get_default_dtype() == dtype
    assert torch.is_grad_enabled()


def test_new_encoder_is_in_training_mode_with_initial_running_means():
    encoder = ImageEncoder(ImageEncoder.Options(backbone="test_resnet", size=32))
    assert all(module.training for module in encoder.modules())
    means = [tensor for name, tensor in encoder.state_dict().items() if name.endswith("running_mean")]
    assert means
    assert all(mean.eq(0).all() for mean in means), "measuring the width changes no running mean"
