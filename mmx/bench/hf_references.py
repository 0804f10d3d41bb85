"""References: models of transformers with random weights, and what mmx reads from their folders.

Sizes: `base`, as published (ViT-GPT2 with 12 layers of 768, BLIP base); `tiny`, about the bundled model's; `micro`, for
tests. Random words cost what real ones cost.
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

transformers: Any = typed_transformers  # whose hints are narrower than what it takes
Kind = Literal["vit-gpt2", "blip", "blip-vqa"]
# Of the weights, over the root of their width: texts then differ from row to row. Of the embeddings: small, or each
# word, which is also its own row of the head, would call for itself again.
SPREAD, EMBEDDED = 2.0, 0.5
TABLES = ("wte.weight", "wpe.weight", "word_embeddings.weight", "position_embeddings.weight")
END = "<|endoftext|>"
QUESTIONS = [
    f"{start} {shape}?"
    for start in ("is there a", "what color is the", "how many", "where is the")
    for shape in ("circle", "square", "triangle", "star")
]


@dataclass(frozen=True)
class ModelShape:
    """Widths and depths; `side`: of the picture in pixels, of ViT-GPT2 and of BLIP."""

    hidden_size: int
    num_layers: int
    num_heads: int
    encoder_layers: int
    vocabulary: dict[str, int]
    positions: dict[str, int]
    side: dict[str, int]
    patch: int = 16


SHAPES = {
    "micro": ModelShape(32, 2, 4, 2, {"gpt2": 120, "blip": 120}, {"gpt2": 40, "blip": 40}, {"gpt2": 32, "blip": 32}, 8),
    "tiny": ModelShape(
        256, 3, 4, 6, {"gpt2": 4096, "blip": 4096}, {"gpt2": 64, "blip": 64}, {"gpt2": 128, "blip": 128}
    ),
    "base": ModelShape(
        768, 12, 12, 12, {"gpt2": 50257, "blip": 30524}, {"gpt2": 1024, "blip": 512}, {"gpt2": 224, "blip": 384}
    ),
}


@dataclass(frozen=True)
class BenchSetting:
    """What is measured, how often, and how: `dtype` is that of our decoder's weights."""

    size: str = "tiny"
    repeats: int = 5
    dtype: Precision = "float32"
    device: str = "cpu"

    @property
    def shape(self) -> ModelShape:
        """The widths of its size."""
        return SHAPES[self.size]

    @property
    def description(self) -> str:
        """What has to be known of `dtype` beside a ratio."""
        if self.dtype == "float32":
            return ""
        peer = "all of transformers' model in it" if self.dtype == "bfloat16" else "transformers in float32"
        return f"our decoder in {self.dtype}, {peer}: tokens may differ"


@dataclass(frozen=True)
class ModelPair:
    """A reference and what mmx read from its folder, in float32, not yet laid out for speaking."""

    reference: Any
    processor: Any
    tokenizer: Any
    model: Model
    generation: GenerationConfig
    setting: BenchSetting

    @property
    def begin(self) -> int:
        """The token that every text begins with."""
        return self.model.tokenizer.special_tokens[BOS][0]

    def for_inference(self) -> ModelPair:
        """Both ready to be asked, in the setting's type."""
        self.model.prepare_for_inference(self.setting.dtype)
        if self.setting.dtype == "bfloat16":
            self.reference.to(torch.bfloat16)
        return self

    def pixels(self, count: int) -> Tensor:
        """Some random pictures [B, 3, side, side]."""
        side, generator = self.processor.size["height"], torch.Generator().manual_seed(7)
        return torch.randn(count, 3, side, side, generator=generator).to(self.setting.device)

    def encode(self, pixels: Tensor) -> Memory:
        """What our decoder looks at, in its type, as `Pipeline` gives it."""
        rows = torch.arange(len(pixels), device=pixels.device)
        with torch.inference_mode():
            memory = self.model.encode({"image": SourceBatch({"pixels": pixels}, rows)}, len(pixels))
            return (
                memory.to(dtype=self.model.decoder.embedding.weight.dtype)
                if self.model.question_encoder is None
                else memory
            )


def build_pair(kind: Kind, setting: BenchSetting) -> ModelPair:
    """A reference with the weights of one seed, saved as published, and read by mmx from there."""
    reference = _blip(kind, setting.shape) if kind != "vit-gpt2" else _vit_gpt2(setting.shape)
    _randomise(reference)
    family = "blip" if kind != "vit-gpt2" else "gpt2"
    side = setting.shape.side[family]
    processors = {"gpt2": transformers.ViTImageProcessor, "blip": transformers.BlipImageProcessor}
    processor = processors[family](size={"height": side, "width": side})
    tokenizer = (_bert_words if family == "blip" else _gpt2_words)(setting.shape.vocabulary[family])
    with TemporaryDirectory(prefix="mmx-bench-") as folder:
        for part in (reference, processor, tokenizer):
            part.save_pretrained(folder)
        model, generation, _ = load_hf_model(folder, device=setting.device)
    return ModelPair(reference.to(setting.device).eval(), processor, tokenizer, model, generation, setting)


def _vit_gpt2(shape: ModelShape) -> Any:
    vision = transformers.ViTConfig(**_seeing(shape, "gpt2"))
    text = transformers.GPT2Config(
        n_embd=shape.hidden_size,
        n_layer=shape.num_layers,
        n_head=shape.num_heads,
        vocab_size=shape.vocabulary["gpt2"],
        n_positions=shape.positions["gpt2"],
        add_cross_attention=True,
        is_decoder=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    config.decoder_start_token_id = config.pad_token_id = config.eos_token_id = 0
    return transformers.VisionEncoderDecoderModel(config)


def _blip(kind: Kind, shape: ModelShape) -> Any:
    vocabulary = shape.vocabulary["blip"]
    text = transformers.BlipTextConfig(
        hidden_size=shape.hidden_size,
        encoder_hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        intermediate_size=4 * shape.hidden_size,
        vocab_size=vocabulary,
        max_position_embeddings=shape.positions["blip"],
        bos_token_id=vocabulary - 2,  # as published: the tables have two rows more than the tokenizer has words
        pad_token_id=0,
        sep_token_id=3,
    )
    vision = transformers.BlipVisionConfig(**_seeing(shape, "blip"))
    config = transformers.BlipConfig(vision_config=vision.to_dict(), text_config=text.to_dict())
    whole = {"blip": transformers.BlipForConditionalGeneration, "blip-vqa": transformers.BlipForQuestionAnswering}
    return whole[kind](config)


def _seeing(shape: ModelShape, family: str) -> dict[str, int]:
    return {
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.encoder_layers,
        "num_attention_heads": shape.num_heads,
        "intermediate_size": 4 * shape.hidden_size,
        "image_size": shape.side[family],
        "patch_size": shape.patch,
    }


def _randomise(reference: Any) -> None:
    """Weights of one seed, from which the texts of a batch differ; vectors stay near those of a new model."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if parameter.ndim > 1:
                spread = EMBEDDED if name.endswith(TABLES) else SPREAD
                parameter.normal_(std=spread * parameter.shape[-1] ** -0.5, generator=generator)
            else:
                parameter.normal_(std=0.1, generator=generator).add_(0.0 if name.endswith("bias") else 1.0)


def _gpt2_words(size: int) -> Any:
    """A tokenizer of the end and `size - 1` words, no two alike."""
    vocabulary = {END: 0, **{f"w{i}": i for i in range(1, size)}}
    engine = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=END))
    engine.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=engine, bos_token=END, eos_token=END)


def _bert_words(size: int) -> Any:
    """A tokenizer of BERT's marks, the words of our questions, and others up to `size - 2`."""
    asked = dict.fromkeys(word for question in QUESTIONS for word in question.removesuffix("?").split())
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "?", *asked]
    words += [f"w{i}" for i in range(len(words), size - 2)]
    return transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)})
