"""What every parity test does: a tiny random reference of transformers, saved as published, read by mmx, compared.

Alphabet: B rows, K streams, T text positions, V vocabulary.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from mmx.config import GenerationConfig
from mmx.generation import DecoderStep, generate
from mmx.importers import load_published
from mmx.memory import Memory
from mmx.model import Model

logging.set_verbosity_error()
logging.disable_progress_bar()
TOLERANCE = 1e-6  # of the largest logit, in float64


def shaken(reference: Any, seed: int = 0, size: float = 0.5) -> Any:
    """The reference with weights so large that its texts differ from row to row, and end; ready to be asked.

    Vectors stay near those of a fresh model: a large bias before the head would choose every word by itself.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(drawn * size)
            else:
                parameter.copy_(drawn * size / 3 + (0.0 if name.endswith("bias") else 1.0))
    return reference.eval()


def letters(size: int, **special: str) -> PreTrainedTokenizerFast:
    """A fast tokenizer of `size` tokens: the special ones (bos_token=..., eos_token=...), then bytes as letters."""
    names = list(dict.fromkeys(special.values()))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*names, *alphabet][:size])}
    engine = Tokenizer(models.BPE(vocabulary, [], unk_token=names[0]))
    engine.pre_tokenizer, engine.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=engine, **special)


def saved(folder: Path, *parts: Any) -> str:
    """A model, its tokenizer and its processor, each as `save_pretrained` writes it."""
    for part in parts:
        part.save_pretrained(str(folder))
    return str(folder)


def read(folder: str) -> Model:
    """The model mmx makes of a folder, in float64."""
    return load_published(folder)[0].double()


def assert_logits(model: Model, memory: Memory, tokens: Tensor, expected: Tensor) -> None:
    """tokens [B, T] -> expected logits [B, T, V] at every position: at once, and step by step over a cache."""
    with torch.no_grad():
        at_once = model.decoder(tokens[:, None], memory)[:, 0]
        cache = model.decoder.new_cache(len(tokens), tokens.shape[1])
        steps = [
            model.decoder(part[:, None], memory, cache=cache)[:, 0]
            for part in (tokens[:, :2], *tokens[:, 2:].split(1, 1))
        ]
    assert_close(at_once, expected)
    assert_close(torch.cat(steps, 1), expected)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    worst = float((found - expected).abs().max() / expected.abs().max())
    assert worst < TOLERANCE, f"{worst:.1e} of the largest logit"


def spoken(model: Model, memory: Memory, prompts: list[list[list[int]]], **options: Any) -> list[list[list[int]]]:
    """prompts [B][K] of tokens (of any lengths) -> what mmx says after each, without the end."""
    longest = max(len(prompt) for row in prompts for prompt in row)
    pad, eos = model.tokenizer.pad, model.tokenizer.eos
    tokens = torch.tensor([[[*prompt, *[pad] * (longest - len(prompt))] for prompt in row] for row in prompts])
    mask = torch.tensor([[[place < len(prompt) for place in range(longest)] for prompt in row] for row in prompts])
    config = GenerationConfig(**options)
    with torch.inference_mode():
        step = DecoderStep(model.decoder, memory, config.max_new_tokens)
        found = generate(step, tokens, mask, config, eos)
    return [[list(texts[0].tokens) for texts in row] for row in found]


def until_end(rows: Tensor, prompt: int, eos: int) -> list[list[int]]:
    """What transformers' generate gave [B, prompt + T] -> the tokens after the prompt, up to the end."""
    texts = [row[prompt:] for row in rows.tolist()]
    return [text[: text.index(eos)] if eos in text else text for text in texts]


def assert_diverse(texts: list[list[int]]) -> None:
    """A comparison of texts that are all alike would show nothing."""
    assert len({tuple(text) for text in texts}) > 1
    assert any(len(set(text)) > 1 for text in texts)
