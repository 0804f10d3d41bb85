"""Noise on the decoder inputs: some tokens of the target texts are replaced by random ones.

The decoder then relies less on the preceding words and more on the memory. Labels are unchanged.

B examples, K streams, T text positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmx.data.batching import Batch
from mmx.models.batching import IGNORE_INDEX
from mmx.text.tokenizer import Tokenizer


def plain_tokens(tokenizer: Tokenizer) -> Tensor:
    """Return the ids of all tokens that are not special tokens, int [V']."""
    added = tokenizer.backend.get_added_tokens_decoder()
    special = {token for token, content in added.items() if content.special}
    return torch.tensor([token for token in range(len(tokenizer)) if token not in special])


def noisy_tokens(batch: Batch, probability: float, candidates: Tensor, generator: torch.Generator) -> Tensor:
    """Return the tokens [B, K, T] of a batch with target tokens replaced at random.

    Args:
        probability: probability of replacing each target token. Prompts and padding are unchanged.
        candidates: token ids to draw from, on the device of the batch.
        generator: of the same device.
    """
    device = batch.tokens.device
    shape = batch.tokens.shape
    noise = torch.rand(shape, generator=generator, device=device) < probability
    indices = torch.randint(len(candidates), shape, generator=generator, device=device)
    return torch.where(noise & _target_inputs(batch), candidates[indices], batch.tokens)


def _target_inputs(batch: Batch) -> Tensor:
    """Return bool [B, K, T], True at input tokens that are target tokens: the inputs after a label position."""
    is_label = torch.zeros_like(batch.mask)
    positions = batch.label_positions[batch.labels != IGNORE_INDEX]
    is_label.view(-1)[positions] = True
    is_target = torch.zeros_like(batch.mask)
    is_target[..., 1:] = is_label[..., :-1]
    return is_target & batch.mask
