"""Batches of texts and boxes as padded tensors.

B rows (examples), K streams (texts of one row), T text positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmx.boxes import NO_BOX, Box

IGNORE_INDEX = -100


class PaddedTexts(NamedTuple):
    """Texts of B rows. All tensors are [B, K, T].

    Args:
        tokens: decoder inputs, padded at the end.
        mask: True where there is an input token.
        targets: the token that follows each input token, or IGNORE_INDEX inside the prompt and the padding.
    """

    tokens: Tensor
    mask: Tensor
    targets: Tensor


class LabelPositions(NamedTuple):
    """Where the loss is computed: flat positions among B*K*T (int [n]) and the token expected there (int [n])."""

    positions: Tensor
    labels: Tensor


def pad_texts(
    texts: Sequence[Sequence[tuple[list[int], list[int]]]], streams: int, pad_token: int, multiple: int = 1
) -> PaddedTexts:
    """Pad (prompt, target) tokens of each row to [B, K, T], with T a multiple of `multiple`.

    Rows with fewer than `streams` texts are filled with streams that hold only padding.
    """
    lengths = [len(prompt) + len(target) - 1 for row in texts for prompt, target in row]
    longest = -(-max(lengths) // multiple) * multiple
    tokens = torch.full((len(texts), streams, longest), pad_token)
    targets = torch.full_like(tokens, IGNORE_INDEX)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for b, row in enumerate(texts):
        for k, (prompt, target) in enumerate(row):
            length = len(prompt) + len(target) - 1
            tokens[b, k, :length] = torch.tensor([*prompt, *target[:-1]])
            targets[b, k, len(prompt) - 1 : length] = torch.tensor(target)
            mask[b, k, :length] = True
    return PaddedTexts(tokens, mask, targets)


def select_label_positions(targets: Tensor, multiple: int) -> LabelPositions:
    """Return the flat positions of `targets` [B, K, T] that are not IGNORE_INDEX, and their labels.

    The number of positions is padded to a multiple of `multiple` by position 0 with the label IGNORE_INDEX.
    """
    flat = targets.flatten()
    positions = (flat != IGNORE_INDEX).nonzero()[:, 0]
    missing = -len(positions) % multiple
    return LabelPositions(pad(positions, (0, missing)), pad(flat[positions], (0, missing), value=IGNORE_INDEX))


def stack_boxes(boxes: Sequence[Sequence[Box | None]], streams: int) -> Tensor | None:
    """Return the boxes of up to K streams of each row as [B, K, 4], NaN for a stream without a box.

    Returns None if no stream has a box.
    """
    if not any(box for row in boxes for box in row):
        return None
    rows = []
    for row in boxes:
        missing = [None] * (streams - len(row))
        rows.append([box or NO_BOX for box in [*row, *missing]])
    return torch.tensor(rows)
