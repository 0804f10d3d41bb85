"""Shared by the tests of both BLIP models: tiny configurations, a WordPiece tokenizer, and inputs.

Axes: B rows, T text positions.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import BertTokenizer, BlipConfig, BlipImageProcessor, BlipTextConfig, BlipVisionConfig

SIDE = 32
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"?.,0123456789", *ALPHABET, *(f"##{a}" for a in ALPHABET)]
PAD = VOCAB.index("[PAD]")
CLS = VOCAB.index("[CLS]")
SEP = VOCAB.index("[SEP]")
BOS = len(VOCAB)  # as published: the embeddings have two rows more than the tokenizer has tokens
VOCAB_SIZE = len(VOCAB) + 2


def tiny_config(hidden_size: int = 24, **text: Any) -> BlipConfig:
    """Two layers each. By default the text has another hidden size and number of heads than the vision encoder."""
    vision = BlipVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=SIDE, patch_size=8
    )
    fields = {
        "hidden_size": hidden_size,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 40,
        "bos_token_id": BOS,
        "sep_token_id": SEP,
        **text,
    }
    return BlipConfig(vision_config=vision.to_dict(), text_config=BlipTextConfig(**fields).to_dict())


def full_config() -> BlipConfig:
    """The size of blip-image-captioning-base and blip-vqa-base: the defaults, and twelve heads."""
    return BlipConfig(
        vision_config={}, text_config={"num_attention_heads": 12, "sep_token_id": SEP, "eos_token_id": SEP}
    )


def tokenizer(size: int = len(VOCAB)) -> BertTokenizer:
    """Splits every word into letters. Tokens up to `size` are unused."""
    tokens = [*VOCAB, *(f"[unused{i}]" for i in range(size - len(VOCAB)))]
    return BertTokenizer(vocab={token: i for i, token in enumerate(tokens)})


def processor(side: int = SIDE) -> BlipImageProcessor:
    return BlipImageProcessor(size={"height": side, "width": side})


def random_tokens(batch: int, length: int) -> Tensor:
    """Ordinary tokens [B, T]."""
    return torch.randint(CLS, BOS, (batch, length), generator=torch.Generator().manual_seed(1))
