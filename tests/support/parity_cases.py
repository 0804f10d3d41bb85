"""What every parity test does: a tiny random reference of transformers, saved as published, read by mmx, compared.

Alphabet: B rows, K streams, T text positions, V vocabulary.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    GPT2Config,
    PreTrainedTokenizerFast,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
)
from transformers.utils import logging

from mmx.config.schema import GenerationConfig
from mmx.errors import MmxError
from mmx.generation import CachedDecodeStep, PromptBatch, generate
from mmx.hub import load_hf_model
from mmx.memory import Memory
from mmx.models.model import Model

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
    return load_hf_model(folder)[0].double()


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
    pad, eos = model.tokenizer.pad_token_id, model.tokenizer.eos_token_id
    tokens = torch.tensor([[[*prompt, *[pad] * (longest - len(prompt))] for prompt in row] for row in prompts])
    mask = torch.tensor([[[place < len(prompt) for place in range(longest)] for prompt in row] for row in prompts])
    config = GenerationConfig(**options)
    with torch.inference_mode():
        step = CachedDecodeStep(model.decoder, memory, config.max_new_tokens)
        found = generate(step, PromptBatch(tokens, mask), config, eos)
    return [[list(texts[0].tokens) for texts in row] for row in found]


def until_end(rows: Tensor, prompt: int, eos: int) -> list[list[int]]:
    """What transformers' generate gave [B, prompt + T] -> the tokens after the prompt, up to the end."""
    texts = [row[prompt:] for row in rows.tolist()]
    return [text[: text.index(eos)] if eos in text else text for text in texts]


def assert_diverse(texts: list[list[int]]) -> None:
    """A comparison of texts that are all alike would show nothing."""
    assert len({tuple(text) for text in texts}) > 1
    assert any(len(set(text)) > 1 for text in texts)


def change(folder: str | Path, made: Any) -> dict[str, Tensor]:
    """Rewrite the tensors of a folder; returns those that it had."""
    path = f"{folder}/model.safetensors"
    tensors = load_file(path)
    save_file(made(dict(tensors)), path, metadata={"format": "pt"})
    return tensors


def refused(folder: str | Path, **how: Any) -> str:
    """The one sentence that says why a folder is not read."""
    with pytest.raises(MmxError) as caught:
        load_hf_model(str(folder), **how)
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 500
    return sentence


def publish_vit_gpt2(folder: Path) -> Path:
    """A tiny ViT-GPT2 with pictures of 32 pixels, as `save_pretrained` writes it."""
    vision = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8
    )
    facts = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 90, "n_positions": 40}
    text = GPT2Config(**facts, add_cross_attention=True, is_decoder=True, bos_token_id=0, eos_token_id=0)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 0, 0, 0
    tokenizer = letters(90, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    return Path(saved(folder, shaken(VisionEncoderDecoderModel(config)), tokenizer, processor))
