"""Ranking given texts by their likelihood: all candidates of a prompt are streams over one memory, read in one pass.

Alphabet: B memories, K candidates, T text positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmx.memory import Memory
from mmx.models.decoder import TextDecoder


def score_texts(decoder: TextDecoder, memory: Memory, tokens: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
    """log p(candidate, its end | memory, prompt) in nats, [B, K].

    tokens, mask [B, K, T]: prompt and candidate; targets [B, K, T]: the token that follows, negative where it is not
    part of the candidate.
    """
    logits = decoder(tokens, memory, mask).float()
    wanted = targets >= 0
    logprobs = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return torch.where(wanted, logprobs, 0.0).sum(-1)
