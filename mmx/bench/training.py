"""Training compared with transformers: one step of ViT-GPT2 with five captions per image.

Axes: B images, K captions of each, T tokens of a caption.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from mmx.bench.hf_references import BenchSetting, ModelPair, build_pair
from mmx.bench.timing import BenchResult, Quantity, alternate, compare
from mmx.config.schema import TrainingConfig
from mmx.models.batching import IGNORE_INDEX, pad_texts, select_label_positions
from mmx.models.source import SourceBatch
from mmx.training.losses import token_loss
from mmx.training.param_groups import build_optimizer

NUM_CAPTIONS = 5
CAPTION_LENGTH = 12
LENGTHS = (6, 14, 7, 24, 9)  # of the captions of an image in the second workload, as uneven as those of people
BATCH_SIZES = {"base": 2}  # number of images; else 4
LOSS_TOLERANCE = 1e-4  # relative
OPTIONS = TrainingConfig(learning_rate=1e-5)


def training(setting: BenchSetting) -> Iterator[BenchResult]:
    """Forward, loss, backward, AdamW. The reference encodes the image once per caption, mmx once.

    With captions of unequal lengths, the reference also computes the padding.
    """
    equal = (CAPTION_LENGTH,) * NUM_CAPTIONS
    yield _compare_steps(setting, equal, "", f"of {CAPTION_LENGTH} tokens each")
    yield _compare_steps(setting, LENGTHS, ", unequal captions", f"of {', '.join(map(str, LENGTHS))} tokens")


def _compare_steps(setting: BenchSetting, lengths: Sequence[int], variant: str, what: str) -> BenchResult:
    pair = build_pair("vit-gpt2", setting)
    batch = BATCH_SIZES.get(setting.size, 4)
    captions = _random_captions(batch, lengths, setting.shape.vocab_size["gpt2"])
    pixels = pair.pixels(batch)
    functions = {"reference": _reference_step(pair, pixels, captions), "mmx": _mmx_step(pair, pixels, captions)}
    runs = alternate(functions, setting.repeats, setting.device)
    loss = runs["mmx"].output
    reference_loss = runs["reference"].output
    same = abs(loss - reference_loss) <= LOSS_TOLERANCE * abs(reference_loss)
    note = (
        f"{batch} images, {NUM_CAPTIONS} captions {what}, float32, no dropout, fused AdamW in both; loss of the first "
        f"step {loss:.6f}, of the reference {reference_loss:.6f}"
    )
    quantity = Quantity(f"training, one step{variant}", "ms", lambda seconds: 1000 * seconds)
    return compare(quantity, runs["mmx"], runs["reference"], same, note)


def _random_captions(batch: int, lengths: Sequence[int], vocab_size: int) -> Tensor:
    """Return the labels of random captions, int [B, K, T], with IGNORE_INDEX after the end of each."""
    generator = torch.Generator().manual_seed(3)
    longest = max(lengths)
    captions = torch.randint(1, vocab_size, (batch, len(lengths), longest), generator=generator)
    is_padding = torch.arange(longest) >= torch.tensor(lengths)[:, None]
    return captions.masked_fill(is_padding, IGNORE_INDEX)


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
    texts = []
    for row in captions:
        texts.append([([pair.bos], caption[caption != IGNORE_INDEX].tolist()) for caption in row])
    padded = pad_texts(texts, NUM_CAPTIONS, model.tokenizer.pad_token_id)
    tokens = padded.tokens.to(device)
    mask = padded.mask.to(device)
    selected = select_label_positions(padded.targets, multiple=1)
    labels = selected.labels.to(device)
    label_positions = selected.positions.to(device)
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
