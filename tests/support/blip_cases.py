"""What the tests of both BLIPs share: their configs, tiny and as published, a WordPiece tokenizer, pictures.

Alphabet: B rows, T text positions.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import BertTokenizer, BlipConfig, BlipImageProcessor, BlipTextConfig, BlipVisionConfig

from mmx.memory import Memory
from mmx.models.model import Model
from mmx.models.source import SourceBatch

SIDE = 32
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"?.,0123456789", *LETTERS, *(f"##{a}" for a in LETTERS)]
PAD, CLS, SEP = (WORDS.index(word) for word in ("[PAD]", "[CLS]", "[SEP]"))
BOS, SIZE = len(WORDS), len(WORDS) + 2  # as published: the tables have two rows more than the tokenizer has words


def tiny_config(width: int = 24, **text: Any) -> BlipConfig:
    """Two layers each; the text is narrower than the pictures' 32, and its heads are not those of the pictures."""
    vision = BlipVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=SIDE, patch_size=8
    )
    facts = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
    facts |= {"vocab_size": SIZE, "max_position_embeddings": 40, "bos_token_id": BOS, "sep_token_id": SEP}
    return BlipConfig(vision_config=vision.to_dict(), text_config=BlipTextConfig(**facts | text).to_dict())


def full_config() -> BlipConfig:
    """The size of blip-image-captioning-base and blip-vqa-base: both classes' defaults, and twelve heads."""
    return BlipConfig(vision_config={}, text_config={"num_attention_heads": 12})


def tokenizer() -> BertTokenizer:
    """Spells every word by its letters."""
    return BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})


def processor(side: int = SIDE) -> BlipImageProcessor:
    return BlipImageProcessor(size={"height": side, "width": side})


def pictures(count: int, side: int = SIDE, seed: int = 7) -> Tensor:
    """Pixels [B, 3, side, side]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, side, side, generator=generator, dtype=torch.float64)


def encoded(model: Model, pixels: Tensor) -> Memory:
    return model.encode({"image": SourceBatch({"pixels": pixels}, torch.arange(len(pixels)))}, len(pixels))


def some_tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    """int [B, T], among the words."""
    return torch.randint(CLS, BOS, (batch, length), generator=torch.Generator().manual_seed(seed))


def worst(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a part of the largest logit."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())
