"""Log-probabilities of given texts. All candidates of a prompt are streams over one memory, computed in one pass.

Axes: B memories, K candidates, T text positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmx.memory import Memory
from mmx.models.decoder import TextDecoder


def score_texts(decoder: TextDecoder, memory: Memory, tokens: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
    """Return log p(candidate and end-of-sequence | memory, prompt) in nats, [B, K].

    Args:
        decoder: the text decoder.
        memory: B memories.
        tokens: int [B, K, T], prompt and candidate.
        mask: bool [B, K, T], False for padding.
        targets: int [B, K, T], the next token at each position; negative where it is not part of the candidate.
    """
    logprobs = decoder(tokens, memory, mask).float().log_softmax(-1)
    target_logprobs = logprobs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return torch.where(targets >= 0, target_logprobs, 0.0).sum(-1)
