"""Training beside transformers: one step of ViT-GPT2 with five captions a picture.

Alphabet: B pictures, K captions of each, T tokens of a caption.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from mmx.bench.hf_references import BenchSetting, ModelPair, build_pair
from mmx.bench.timing import BenchResult, alternate, compare
from mmx.config.schema import TrainingConfig
from mmx.models.batching import pad_texts
from mmx.models.source import SourceBatch
from mmx.training.losses import token_loss
from mmx.training.param_groups import build_optimizer

CAPTIONS, LENGTH = 5, 12
BATCH = {"base": 2}  # pictures; else 4
CLOSE = 1e-4  # of the loss
OPTIONS = TrainingConfig(learning_rate=1e-5)


def training(setting: BenchSetting) -> Iterator[BenchResult]:
    """Forward, loss, backward, AdamW. transformers takes a picture with each caption; ours encodes it once."""
    pair, batch = build_pair("vit-gpt2", setting), BATCH.get(setting.size, 4)
    generator = torch.Generator().manual_seed(3)
    captions = torch.randint(1, setting.shape.vocabulary["gpt2"], (batch, CAPTIONS, LENGTH), generator=generator)
    pixels = pair.pixels(batch)
    runs = alternate(
        {"theirs": _theirs(pair, pixels, captions), "ours": _ours(pair, pixels, captions)},
        setting.repeats,
        setting.device,
    )
    losses = runs["ours"].first, runs["theirs"].first
    same = abs(losses[0] - losses[1]) <= CLOSE * abs(losses[1])
    note = f"{batch} pictures, {CAPTIONS} captions of {LENGTH} tokens each, float32, no dropout, fused AdamW in both; "
    note += f"loss of the first step {losses[0]:.6f}, of transformers {losses[1]:.6f}"
    yield compare("training, a step", "ms", lambda s: 1000 * s, runs["ours"], runs["theirs"], same, note)


def _theirs(pair: ModelPair, pixels: Tensor, captions: Tensor) -> Callable[[], float]:
    """A row for every caption, the picture repeated."""
    reference, rows = pair.reference, captions.flatten(0, 1).to(pixels.device)
    repeated = pixels.repeat_interleave(CAPTIONS, 0)
    # The same kind of optimizer as ours; transformers' own Trainer takes the fused one as well.
    optimizer = AdamW(reference.parameters(), lr=OPTIONS.learning_rate, betas=OPTIONS.betas, fused=_fused(pixels))
    return lambda: _step(optimizer, lambda: reference(pixel_values=repeated, labels=rows, use_cache=False).loss)


def _ours(pair: ModelPair, pixels: Tensor, captions: Tensor) -> Callable[[], float]:
    """A row for every picture, the captions its streams."""
    model, device = pair.model, pixels.device
    texts = [[([pair.begin], caption) for caption in row] for row in captions.tolist()]
    tokens, mask, targets = (t.to(device) for t in pad_texts(texts, CAPTIONS, model.tokenizer.pad_token_id))
    labels, wanted = targets.flatten(), torch.arange(targets.numel(), device=device)
    sources = {"image": SourceBatch({"pixels": pixels}, torch.arange(len(pixels), device=device))}
    optimizer = build_optimizer(model, OPTIONS)
    return lambda: _step(
        optimizer, lambda: token_loss(model(sources, tokens, mask, wanted), labels, smoothing=0.0) / len(labels)
    )


def _step(optimizer: Any, loss_of: Callable[[], Tensor]) -> float:
    loss = loss_of()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def _fused(like: Tensor) -> bool:
    return like.device.type in ("cpu", "cuda")
