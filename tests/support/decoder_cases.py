"""Memories and decoders for tests: small, and lively enough that a wrong slot or token moves the logits."""

import torch
from torch import nn

from mmx.config.schema import DecoderConfig
from mmx.memory import Memory, Segment
from mmx.models.decoder import TextDecoder

WIDTH, HEADS, VOCABULARY = 16, 2, 23
HEAD_WIDTH = WIDTH // HEADS


def some_memory(batch=2, slots=5, layers=2, heads=HEADS, width=HEAD_WIDTH, hidden=0, source="image", grid=None, **kind):
    """Random keys and values; the last `hidden` slots are masked."""
    keys, values = torch.randn(2, layers, batch, heads, slots, width, **kind)
    mask = torch.ones(batch, slots, dtype=torch.bool)
    mask[:, slots - hidden :] = False
    return Memory(keys, values, mask, (Segment(source, 0, slots, grid),))


def enliven(module):
    """Redraw the parameters: maps keep the size of their input, norms and gates are away from where they start."""
    for name, parameter in module.named_parameters():
        if name.endswith("prefix_token_ids"):
            nn.init.constant_(parameter, 0.7)
        elif parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        else:
            nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.2)  # weights of one axis are norms
    return module


def some_decoder(**facts):
    """A lively TextDecoder in eval mode: two layers, two heads, width 16, dropout 0.1."""
    facts = {"hidden_size": WIDTH, "num_heads": HEADS, "num_layers": 2, "max_position_embeddings": 64, **facts}
    return enliven(TextDecoder(DecoderConfig(**facts), VOCABULARY)).eval().requires_grad_(False)


def some_tokens(batch=2, streams=1, length=6):
    """int [B, K, T]."""
    return torch.randint(VOCABULARY, (batch, streams, length))
