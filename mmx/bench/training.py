"""Training compared with transformers: one step of ViT-GPT2 with five captions per image.

Axes: B images, K captions of each, T tokens of a caption.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from mmx.bench.hf_references import BenchSetting, ModelPair, build_pair
from mmx.bench.timing import BenchResult, Quantity, alternate, compare
from mmx.config.schema import TrainingConfig
from mmx.models.batching import pad_texts
from mmx.models.source import SourceBatch
from mmx.training.losses import token_loss
from mmx.training.param_groups import build_optimizer

NUM_CAPTIONS = 5
CAPTION_LENGTH = 12
BATCH_SIZES = {"base": 2}  # number of images; else 4
LOSS_TOLERANCE = 1e-4  # relative
OPTIONS = TrainingConfig(learning_rate=1e-5)


def training(setting: BenchSetting) -> Iterator[BenchResult]:
    """Forward, loss, backward, AdamW. The reference encodes the image once per caption, mmx once."""
    pair = build_pair("vit-gpt2", setting)
    batch = BATCH_SIZES.get(setting.size, 4)
    generator = torch.Generator().manual_seed(3)
    shape = (batch, NUM_CAPTIONS, CAPTION_LENGTH)
    captions = torch.randint(1, setting.shape.vocab_size["gpt2"], shape, generator=generator)
    pixels = pair.pixels(batch)
    functions = {"reference": _reference_step(pair, pixels, captions), "mmx": _mmx_step(pair, pixels, captions)}
    runs = alternate(functions, setting.repeats, setting.device)
    loss = runs["mmx"].output
    reference_loss = runs["reference"].output
    same = abs(loss - reference_loss) <= LOSS_TOLERANCE * abs(reference_loss)
    note = (
        f"{batch} images, {NUM_CAPTIONS} captions of {CAPTION_LENGTH} tokens each, float32, no dropout, fused AdamW in "
        f"both; loss of the first step {loss:.6f}, of the reference {reference_loss:.6f}"
    )
    quantity = Quantity("training, one step", "ms", lambda seconds: 1000 * seconds)
    yield compare(quantity, runs["mmx"], runs["reference"], same, note)


def _reference_step(pair: ModelPair, pixels: Tensor, captions: Tensor) -> Callable[[], float]:
    """One row per caption, with the image repeated."""
    reference = pair.reference
    rows = captions.flatten(0, 1).to(pixels.device)
    repeated = pixels.repeat_interleave(NUM_CAPTIONS, 0)
    # The same optimizer as in mmx; the Trainer of transformers uses the fused one too.
    is_fused = pixels.device.type in ("cpu", "cuda")
    optimizer = AdamW(reference.parameters(), lr=OPTIONS.learning_rate, betas=OPTIONS.betas, fused=is_fused)

    def step() -> float:
        return _update(optimizer, reference(pixel_values=repeated, labels=rows, use_cache=False).loss)

    return step


def _mmx_step(pair: ModelPair, pixels: Tensor, captions: Tensor) -> Callable[[], float]:
    """One row per image; its captions are streams."""
    model = pair.model
    device = pixels.device
    texts = [[([pair.bos], caption) for caption in row] for row in captions.tolist()]
    padded = pad_texts(texts, NUM_CAPTIONS, model.tokenizer.pad_token_id)
    tokens = padded.tokens.to(device)
    mask = padded.mask.to(device)
    labels = padded.targets.flatten().to(device)
    label_positions = torch.arange(len(labels), device=device)
    sources = {"image": SourceBatch({"pixels": pixels}, torch.arange(len(pixels), device=device))}
    optimizer = build_optimizer(model, OPTIONS)

    def step() -> float:
        logits = model(sources, tokens, mask, label_positions)
        return _update(optimizer, token_loss(logits, labels, smoothing=0.0) / len(labels))

    return step


def _update(optimizer: Optimizer, loss: Tensor) -> float:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())
