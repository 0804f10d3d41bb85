"""Training losses. All are sums over tokens, because the mean over micro-batches is not the mean over tokens.

n label positions, V vocabulary.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mmx.models.batching import IGNORE_INDEX


def token_loss(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Return the summed cross-entropy in nats, with label smoothing (Szegedy et al. 2016, section 7).

    Args:
        logits: [n, V].
        labels: int [n]; positions with IGNORE_INDEX do not count.
    """
    return F.cross_entropy(
        logits.float(), labels, label_smoothing=smoothing, ignore_index=IGNORE_INDEX, reduction="sum"
    )


def scst_loss(logits: Tensor, labels: Tensor, smoothing: float, advantages: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the loss of self-critical sequence training (Rennie et al. 2017), summed with `token_loss`.

    Sampled tokens contribute their negative log-probability times their advantage (REINFORCE, Williams 1992), without
    label smoothing, at the temperature they were sampled with. Reference tokens contribute their `token_loss`.

    Args:
        advantages: [n], NaN for reference tokens.
    """
    sampled = ~advantages.isnan()
    sampled_logits = logits[sampled].float() / temperature
    losses = F.cross_entropy(sampled_logits, labels[sampled], ignore_index=IGNORE_INDEX, reduction="none")
    return token_loss(logits[~sampled], labels[~sampled], smoothing) + (losses * advantages[sampled]).sum()


def distillation_loss(logits: Tensor, teacher_probs: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the summed cross-entropy with the probabilities of a teacher (Hinton et al. 2015).

    It is multiplied by temperature ** 2, which keeps the size of its gradient independent of the temperature.

    Args:
        logits: logits [n, V] of the student.
        teacher_probs: [n, V], softmax of the teacher's logits divided by `temperature`.
        labels: int [n]; positions with IGNORE_INDEX do not count.
    """
    logprobs = (logits.float() / temperature).log_softmax(-1)
    losses = -(teacher_probs * logprobs).sum(-1)
    return temperature**2 * losses[labels != IGNORE_INDEX].sum()
