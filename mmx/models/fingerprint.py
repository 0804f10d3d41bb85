"""The fingerprint of a model: a short hash of its weights, which its memories carry.

Memories of two models may have equal shapes, but the decoder of one cannot read the keys and values of the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mmx.models.model import Model

MAX_SAMPLES = 4096  # values of each tensor that are hashed, evenly spaced
LENGTH = 16  # hexadecimal digits


def model_fingerprint(model: Model) -> str:
    """Return the fingerprint of a model: part of the sha256 of names, shapes and samples of its tensors.

    Samples are rounded to bfloat16, and linear layers of the decoder are left out: `prepare_for_inference` casts and
    prepacks the decoder, and does not change the fingerprint. Neither do the device and the folder of the model.
    """
    digest = hashlib.sha256()
    samples: list[Tensor] = []
    for name, tensor in _hashed_tensors(model):
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        samples.append(_sample(tensor))
    if samples:
        values = torch.cat(samples).cpu().contiguous()
        digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:LENGTH]


def _hashed_tensors(model: Model) -> Iterator[tuple[str, Tensor]]:
    """The parameters of sources and question encoder, and those of the decoder that are not of linear layers."""
    readers: dict[str, nn.Module | None] = {"sources": model.sources, "question_encoder": model.question_encoder}
    for name, module in readers.items():
        if module is not None:
            for parameter, tensor in module.named_parameters():
                yield f"{name}.{parameter}", tensor
    for name, module in model.decoder.named_modules():
        if not isinstance(module, nn.Linear):
            for parameter, tensor in module.named_parameters(recurse=False):
                yield f"decoder.{name}.{parameter}", tensor


def _sample(tensor: Tensor) -> Tensor:
    """Up to MAX_SAMPLES values of a tensor in bfloat16."""
    flat = tensor.detach().flatten()
    step = max(1, -(-flat.numel() // MAX_SAMPLES))
    return flat[::step].to(torch.bfloat16)
