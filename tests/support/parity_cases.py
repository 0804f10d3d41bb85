"""Shared steps of parity tests: a tiny random model of transformers is saved, loaded by mmx, and compared.

Axes: B rows, K streams, T text positions, V vocabulary.
"""

from collections.abc import Callable
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
from mmx.models.source import SourceBatch

logging.set_verbosity_error()
logging.disable_progress_bar()
TOLERANCE = 1e-6  # relative to the largest logit, in float64
PUBLISHED_SIZE_TOLERANCE = 1e-4  # the same in float32


def randomized(reference: Any, seed: int = 0, size: float = 0.5) -> Any:
    """Return the reference in eval mode, with random weights so large that texts differ between rows, and end.

    Vectors stay near their initial values: a large bias before the head would determine every token alone.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * size)
                continue
            mean = 0.0 if name.endswith("bias") else 1.0
            parameter.copy_(noise * size / 3 + mean)
    return reference.eval()


def byte_tokenizer(size: int, additional: tuple[str, ...] = (), **special: str) -> PreTrainedTokenizerFast:
    """A fast tokenizer of `size` tokens: the special ones (bos_token=..., eos_token=...), then single bytes.

    Args:
        additional: further special tokens, which follow the named ones.
    """
    names = list(dict.fromkeys([*special.values(), *additional]))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    unused = [f"unused{i}" for i in range(size - len(names) - len(alphabet))]
    vocab = {token: i for i, token in enumerate([*names, *alphabet, *unused][:size])}
    backend = Tokenizer(models.BPE(vocab, [], unk_token=names[0]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(names)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def save_all(folder: Path, *parts: Any) -> str:
    """Save a model, its tokenizer and its processor with `save_pretrained`; return the folder."""
    for part in parts:
        part.save_pretrained(str(folder))
    return str(folder)


def load_double(folder: str | Path) -> Model:
    """The model that mmx loads from a folder, in float64."""
    return load_hf_model(str(folder)).model.double()


def random_pixels(count: int, side: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Pixels [B, 3, side, side]."""
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(7), dtype=dtype)


def encode_inputs(model: Model, source: str, inputs: dict[str, Tensor]) -> Memory:
    """The memory of a batch of prepared inputs, one per row."""
    count = len(next(iter(inputs.values())))
    return model.encode({source: SourceBatch(inputs, torch.arange(count))}, count)


def assert_logits(model: Model, memory: Memory, tokens: Tensor, expected: Tensor) -> None:
    """Compare logits [B, T, V] of tokens [B, T] at every position: in one pass, and token by token with a cache."""
    with torch.no_grad():
        one_pass = model.decoder(tokens[:, None], memory)[:, 0]
        cache = model.decoder.new_cache(len(tokens), tokens.shape[1])
        chunks = (tokens[:, :2], *tokens[:, 2:].split(1, 1))
        steps = [model.decoder(chunk[:, None], memory, cache=cache)[:, 0] for chunk in chunks]
    assert relative_difference(one_pass, expected) < TOLERANCE
    assert relative_difference(torch.cat(steps, 1), expected) < TOLERANCE


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def generate_tokens(model: Model, memory: Memory, prompts: list[list[list[int]]], **options: Any) -> list:
    """Tokens that mmx generates after prompts [B][K] of any lengths, without the eos token: [B][K] lists."""
    longest = max(len(prompt) for row in prompts for prompt in row)
    pad = model.tokenizer.pad_token_id
    tokens = torch.tensor([[prompt + [pad] * (longest - len(prompt)) for prompt in row] for row in prompts])
    lengths = torch.tensor([[len(prompt) for prompt in row] for row in prompts])
    mask = torch.arange(longest) < lengths[..., None]
    config = GenerationConfig(**options)
    with torch.inference_mode():
        step = CachedDecodeStep(model.decoder, memory, config.max_new_tokens)
        outputs = generate(step, PromptBatch(tokens, mask), config, model.tokenizer.eos_token_id)
    return [[list(sequences[0].tokens) for sequences in row] for row in outputs]


def strip_generated(rows: Tensor, prompt_length: int, eos: int) -> list[list[int]]:
    """Output [B, prompt + T] of transformers' generate to the tokens after the prompt, up to the eos token."""
    texts = [row[prompt_length:] for row in rows.tolist()]
    return [text[: text.index(eos)] if eos in text else text for text in texts]


def assert_diverse(texts: list[list[int]]) -> None:
    """Comparing equal texts would show nothing."""
    assert len({tuple(text) for text in texts}) > 1
    assert any(len(set(text)) > 1 for text in texts)


def rewrite_tensors(folder: str | Path, change: Callable[[dict], dict]) -> dict[str, Tensor]:
    """Replace the tensors of a folder by `change(tensors)`; return the previous ones."""
    path = f"{folder}/model.safetensors"
    tensors = load_file(path)
    changed = {name: tensor.contiguous() for name, tensor in change(dict(tensors)).items()}
    save_file(changed, path, metadata={"format": "pt"})
    return tensors


def without(name: str) -> Callable[[dict], dict]:
    """A change for `rewrite_tensors`: one tensor removed."""
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def load_error(folder: str | Path, **arguments: Any) -> MmxError:
    """The error of loading a folder, whose message is one short sentence."""
    with pytest.raises(MmxError) as caught:
        load_hf_model(str(folder), **arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return caught.value


def build_vit_gpt2(n_embd: int = 32, vision_layers: int = 2, seed: int = 0) -> VisionEncoderDecoderModel:
    """A tiny ViT-GPT2 with images of 32 pixels; its encoder has size 32, so that another `n_embd` needs a bridge."""
    vision = ViTConfig(
        hidden_size=32,
        num_hidden_layers=vision_layers,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
    )
    text = GPT2Config(
        n_embd=n_embd,
        n_layer=2,
        n_head=4,
        vocab_size=90,
        n_positions=40,
        add_cross_attention=True,
        is_decoder=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    config.decoder_start_token_id = 0
    config.pad_token_id = 0
    config.eos_token_id = 0
    return randomized(VisionEncoderDecoderModel(config), seed)


def save_vit_gpt2(folder: Path, reference: VisionEncoderDecoderModel | None = None) -> Path:
    """Save a tiny ViT-GPT2 with tokenizer and image processor."""
    tokenizer = byte_tokenizer(90, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    return Path(save_all(folder, reference or build_vit_gpt2(vision_layers=1), tokenizer, processor))
