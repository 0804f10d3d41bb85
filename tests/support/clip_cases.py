"""A tiny random CLIP as a folder, for scores of captions."""

import json
from pathlib import Path
from shutil import copytree

from hf_cases import CROPPED, folder
from safetensors.torch import load_file, save_file


def write_clip(path: Path, image_sign: int = 1) -> Path:
    """Write model, tokenizer and image processor. With image_sign -1, all vectors of images are negated."""
    from transformers import CLIPImageProcessor

    copytree(folder("clip-text"), path)
    CLIPImageProcessor(**CROPPED).save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    config["text_config"] |= {"eos_token_id": 2, "pad_token_id": 1}
    (path / "config.json").write_text(json.dumps(config))
    tensors = load_file(path / "model.safetensors")
    tensors["visual_projection.weight"] *= image_sign
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path
