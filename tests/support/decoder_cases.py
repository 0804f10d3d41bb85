"""Random memories and decoders whose logits depend clearly on every slot and token."""

import torch
from torch import nn

from mmx.config.schema import DecoderConfig
from mmx.memory import Memory, Segment
from mmx.models.decoder import TextDecoder

HIDDEN_SIZE = 16
HEADS = 2
HEAD_DIM = HIDDEN_SIZE // HEADS
VOCAB_SIZE = 23


def random_memory(batch=2, slots=5, layers=2, heads=HEADS, width=HEAD_DIM, masked=0, source="image", grid=None, **kind):
    """Random keys and values; the last `masked` slots are masked."""
    keys, values = torch.randn(2, layers, batch, heads, slots, width, **kind)
    mask = torch.ones(batch, slots, dtype=torch.bool)
    mask[:, slots - masked :] = False
    return Memory(keys, values, mask, (Segment(source, 0, slots, grid),))


def randomize_parameters(module):
    """Redraw the parameters: linear layers keep the scale of their input, norms and gates leave their initial value."""
    for name, parameter in module.named_parameters():
        if name.endswith("alpha"):
            nn.init.constant_(parameter, 0.7)
        elif parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        else:
            nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.2)  # these weights are norms
    return module


def random_decoder(**config):
    """A TextDecoder with random parameters in eval mode: two layers, two heads, hidden size 16, dropout 0.1."""
    config = {"hidden_size": HIDDEN_SIZE, "num_heads": HEADS, "num_layers": 2, "max_position_embeddings": 64, **config}
    return randomize_parameters(TextDecoder(DecoderConfig(**config), VOCAB_SIZE)).eval().requires_grad_(False)


def random_tokens(batch=2, streams=1, length=6):
    """int [B, K, T]."""
    return torch.randint(VOCAB_SIZE, (batch, streams, length))
