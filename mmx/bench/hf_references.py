"""References: transformers models with random weights, saved to a folder and converted by mmx.

Sizes: `base`, as published (ViT-GPT2 with 12 layers of 768, BLIP base); `tiny`, about the size of the bundled model;
`micro`, for tests. The time of decoding does not depend on the values of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any, Literal

import tokenizers
import torch
import transformers as typed_transformers
from torch import Tensor

from mmx.config.schema import GenerationConfig, Precision
from mmx.hub import load_hf_model
from mmx.memory import Memory
from mmx.models.model import Model
from mmx.models.source import SourceBatch
from mmx.text.prompts import BOS

transformers: Any = typed_transformers  # its type hints are narrower than what it accepts
Kind = Literal["vit-gpt2", "blip", "blip-vqa"]
# Standard deviations, times the root of the width. Weights: large, so that texts differ from row to row. Embeddings:
# small, because a token whose embedding is also its row of the output projection would predict itself.
WEIGHT_STD = 2.0
EMBEDDING_STD = 0.5
EMBEDDINGS = ("wte.weight", "wpe.weight", "word_embeddings.weight", "position_embeddings.weight")
GPT2_EOS = "<|endoftext|>"
QUESTIONS = [
    f"{start} {shape}?"
    for start in ("is there a", "what color is the", "how many", "where is the")
    for shape in ("circle", "square", "triangle", "star")
]


@dataclass(frozen=True)
class ModelShape:
    """Sizes of the reference models; the dictionaries have the keys `gpt2` and `blip`."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_encoder_layers: int
    vocab_size: dict[str, int]
    max_position_embeddings: dict[str, int]
    image_size: dict[str, int]
    patch_size: int = 16


SHAPES = {
    "micro": ModelShape(
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_encoder_layers=2,
        vocab_size={"gpt2": 120, "blip": 120},
        max_position_embeddings={"gpt2": 40, "blip": 40},
        image_size={"gpt2": 32, "blip": 32},
        patch_size=8,
    ),
    "tiny": ModelShape(
        hidden_size=256,
        num_layers=3,
        num_heads=4,
        num_encoder_layers=6,
        vocab_size={"gpt2": 4096, "blip": 4096},
        max_position_embeddings={"gpt2": 64, "blip": 64},
        image_size={"gpt2": 128, "blip": 128},
    ),
    "base": ModelShape(
        hidden_size=768,
        num_layers=12,
        num_heads=12,
        num_encoder_layers=12,
        vocab_size={"gpt2": 50257, "blip": 30524},
        max_position_embeddings={"gpt2": 1024, "blip": 512},
        image_size={"gpt2": 224, "blip": 384},
    ),
}


@dataclass(frozen=True)
class BenchSetting:
    """What is measured, how often, and how. `dtype` is that of the decoder's weights in mmx."""

    size: str = "tiny"
    repeats: int = 5
    dtype: Precision = "float32"
    device: str = "cpu"

    @property
    def shape(self) -> ModelShape:
        """Sizes of the models."""
        return SHAPES[self.size]

    @property
    def description(self) -> str:
        """A note on `dtype`; empty for float32."""
        if self.dtype == "float32":
            return ""
        reference = "all of the reference too" if self.dtype == "bfloat16" else "the reference in float32"
        return f"the decoder of mmx in {self.dtype}, {reference}: tokens may differ"


@dataclass(frozen=True)
class ModelPair:
    """A transformers model with its processor and tokenizer, and the same model converted by mmx."""

    reference: Any
    processor: Any
    tokenizer: Any
    model: Model
    generation: GenerationConfig
    setting: BenchSetting

    @property
    def bos(self) -> int:
        """The first token of every text."""
        return self.model.tokenizer.special_tokens[BOS][0]

    def for_inference(self) -> ModelPair:
        """Prepare both for inference in the dtype of the setting; return self."""
        self.model.prepare_for_inference(self.setting.dtype)
        if self.setting.dtype == "bfloat16":
            self.reference.to(torch.bfloat16)
        return self

    def pixels(self, count: int) -> Tensor:
        """Return random images [B, 3, image_size, image_size]."""
        size = self.processor.size["height"]
        generator = torch.Generator().manual_seed(7)
        return torch.randn(count, 3, size, size, generator=generator).to(self.setting.device)

    def encode(self, pixels: Tensor) -> Memory:
        """Encode images as `Pipeline` does: in the dtype of the decoder, unless a question encoder attends to them."""
        rows = torch.arange(len(pixels), device=pixels.device)
        with torch.inference_mode():
            memory = self.model.encode({"image": SourceBatch({"pixels": pixels}, rows)}, len(pixels))
            if self.model.question_encoder is not None:
                return memory
            return memory.to(dtype=self.model.decoder.embedding.weight.dtype)


def build_pair(kind: Kind, setting: BenchSetting) -> ModelPair:
    """Build a transformers model with random weights of a fixed seed, save it, and convert it with mmx."""
    is_gpt2 = kind == "vit-gpt2"
    family = "gpt2" if is_gpt2 else "blip"
    reference = _vit_gpt2(setting.shape) if is_gpt2 else _blip(kind, setting.shape)
    _randomize(reference)
    size = setting.shape.image_size[family]
    processor_class = transformers.ViTImageProcessor if is_gpt2 else transformers.BlipImageProcessor
    processor = processor_class(size={"height": size, "width": size})
    vocab_size = setting.shape.vocab_size[family]
    tokenizer = _gpt2_tokenizer(vocab_size) if is_gpt2 else _blip_tokenizer(vocab_size)
    with TemporaryDirectory(prefix="mmx-bench-") as folder:
        reference.save_pretrained(folder)
        processor.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        converted = load_hf_model(folder, device=setting.device)
    reference = reference.to(setting.device).eval()
    return ModelPair(reference, processor, tokenizer, converted.model, converted.generation, setting)


def _vit_gpt2(shape: ModelShape) -> Any:
    vision = transformers.ViTConfig(**_vision_options(shape, "gpt2"))
    text = transformers.GPT2Config(
        n_embd=shape.hidden_size,
        n_layer=shape.num_layers,
        n_head=shape.num_heads,
        vocab_size=shape.vocab_size["gpt2"],
        n_positions=shape.max_position_embeddings["gpt2"],
        add_cross_attention=True,
        is_decoder=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    config.eos_token_id = 0
    config.pad_token_id = 0
    config.decoder_start_token_id = 0
    return transformers.VisionEncoderDecoderModel(config)


def _blip(kind: Kind, shape: ModelShape) -> Any:
    vocab_size = shape.vocab_size["blip"]
    text = transformers.BlipTextConfig(
        hidden_size=shape.hidden_size,
        encoder_hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        intermediate_size=4 * shape.hidden_size,
        vocab_size=vocab_size,
        max_position_embeddings=shape.max_position_embeddings["blip"],
        bos_token_id=vocab_size - 2,  # as published: the embedding has two rows more than the tokenizer has tokens
        pad_token_id=0,
        sep_token_id=3,
    )
    vision = transformers.BlipVisionConfig(**_vision_options(shape, "blip"))
    config = transformers.BlipConfig(vision_config=vision.to_dict(), text_config=text.to_dict())
    is_vqa = kind == "blip-vqa"
    model_class = transformers.BlipForQuestionAnswering if is_vqa else transformers.BlipForConditionalGeneration
    return model_class(config)


def _vision_options(shape: ModelShape, family: str) -> dict[str, int]:
    return {
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_encoder_layers,
        "num_attention_heads": shape.num_heads,
        "intermediate_size": 4 * shape.hidden_size,
        "image_size": shape.image_size[family],
        "patch_size": shape.patch_size,
    }


def _randomize(reference: Any) -> None:
    """Draw weights of a fixed seed with which the texts of a batch differ; biases and norms stay close to the usual."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if parameter.ndim > 1:
                std = EMBEDDING_STD if name.endswith(EMBEDDINGS) else WEIGHT_STD
                parameter.normal_(std=std * parameter.shape[-1] ** -0.5, generator=generator)
            else:
                mean = 0.0 if name.endswith("bias") else 1.0
                parameter.normal_(std=0.1, generator=generator).add_(mean)


def _gpt2_tokenizer(vocab_size: int) -> Any:
    """A tokenizer of an end-of-text token and `vocab_size - 1` distinct words."""
    vocabulary = {GPT2_EOS: 0}
    for index in range(1, vocab_size):
        vocabulary[f"w{index}"] = index
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=GPT2_EOS))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=GPT2_EOS, eos_token=GPT2_EOS)


def _blip_tokenizer(vocab_size: int) -> Any:
    """A tokenizer of BERT's special tokens, the words of QUESTIONS, and other words: `vocab_size - 2` tokens in all."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "?"]
    for question in QUESTIONS:
        for word in question.removesuffix("?").split():
            if word not in tokens:
                tokens.append(word)
    tokens += [f"w{index}" for index in range(len(tokens), vocab_size - 2)]
    return transformers.BertTokenizer(vocab={token: index for index, token in enumerate(tokens)})
