"""A pretrained language model as the decoder, with new cross-attention layers.

After Alayrac et al. 2022, "Flamingo", section 2.2: the language model stays frozen, and tanh gates initialized to zero
make the model ignore the memory at the start of training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mmx.config.loader import parse_config
from mmx.config.schema import DecoderConfig, ModelConfig
from mmx.errors import CheckpointError, ConfigError
from mmx.hub import gpt2, llama
from mmx.hub.hf_checkpoint import HFCheckpoint, HFConfig, conversion_errors, open_hf_checkpoint
from mmx.hub.hf_config import check_tokenizer, first_token_id, read_tokenizer
from mmx.hub.vit_gpt2 import has_untied_head
from mmx.hub.weight_mapping import WeightMapping, convert
from mmx.models.decoder import TextDecoder
from mmx.models.model import Model
from mmx.text.tokenizer import Tokenizer


class _TensorNames(NamedTuple):
    """Published names of a family: the prefix of the stack (absent if saved without head) and the embedding."""

    prefix: str
    embedding: str


HEAD = "lm_head.weight"
CONVERTERS = {
    "gpt2": _TensorNames("transformer.", "wte.weight"),
    "llama": _TensorNames("model.", "embed_tokens.weight"),
    "qwen2": _TensorNames("model.", "embed_tokens.weight"),
}
OWN_FIELDS = ("cross_attention_every_n_layers", "gate", "dropout")  # not taken from the language model
QUESTION = " Question:"  # stand for the special tokens of mmx.text.prompts, which a language model does not have
ANSWER = " Answer:"


class ConvertedDecoder(NamedTuple):
    """A language model as our decoder: configuration, float32 tensors by our names, and tokenizer."""

    config: DecoderConfig
    tensors: dict[str, Tensor]
    tokenizer: Tokenizer


class _DecoderSpec(NamedTuple):
    config: DecoderConfig
    weights: list[WeightMapping]
    dropped: tuple[str, ...]


def build_from_language_model(config: ModelConfig) -> Model:
    """Build the model of a configuration whose decoder names a language model (`decoder.pretrained`).

    The configuration of the returned model does not name it any more: its checkpoint is complete.
    """
    name = str(config.decoder.pretrained)
    decoder, tensors, tokenizer = read_language_model(name, config.decoder)
    special_tokens = {token.name: tuple(ids) for token, ids in tokenizer.special_tokens.items()}
    changes = {"decoder": decoder, "vocab_size": decoder.padded_vocab_size, "special_tokens": special_tokens}
    model = Model(config.model_copy(update=changes), tokenizer)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    not_converted = [tensor for tensor in missing if tensor.startswith("decoder.") and not is_new(tensor)]
    if not_converted or unexpected:  # an error in the mappings, whatever the file
        tensor = (not_converted or unexpected)[0]
        raise CheckpointError(
            f"the conversion of {name!r} has no tensor for {tensor}; report this error to the maintainers.",
            code="hub.incomplete_mapping",
            name=name,
            tensor=tensor,
        )
    return model


def is_new(name: str) -> bool:
    """Return whether a tensor of the decoder belongs to cross-attention, which a language model does not have."""
    return ".cross_attention" in name or ".cross_residual" in name


def read_language_model(
    name: str, config: DecoderConfig | None = None, revision: str | None = None, allow_pickled_weights: bool = False
) -> ConvertedDecoder:
    """Convert a language model to our decoder. Tensor names begin with "decoder.".

    Captions follow the bos token directly; questions and answers are introduced by plain words.

    Args:
        name: a folder or public name.
        config: `cross_attention_every_n_layers`, `gate` and `dropout` are taken from it.

    Raises ConfigError if the gate is not tanh, CheckpointError for an unsupported family or damaged files.
    """
    config = config or DecoderConfig(gate="tanh", dropout=0.0)
    if config.gate != "tanh":
        raise ConfigError(
            f"model.decoder.gate is {config.gate!r} with model.decoder.pretrained, which needs 'tanh': the gate starts "
            "at zero, so that the language model is unchanged at first; set model.decoder.gate=tanh.",
            code="config.gate",
            key="model.decoder.gate",
            given=config.gate,
            expected="tanh",
        )
    checkpoint = open_hf_checkpoint(name, revision, allow_pickled_weights)
    model_type = checkpoint.config.get("model_type")
    if model_type not in CONVERTERS:
        raise CheckpointError(
            f"{name!r} has model_type {model_type!r}; expected a language model of {', '.join(CONVERTERS)}.",
            code="hub.model_type",
            name=name,
            given=model_type,
            expected=list(CONVERTERS),
        )
    with conversion_errors(checkpoint, model_type):
        spec = _decoder_spec(checkpoint, model_type)
        own_fields = {key: getattr(config, key) for key in OWN_FIELDS}
        decoder_config = parse_config({**spec.config.model_dump(), **own_fields}, DecoderConfig, where="model.decoder")
        tokenizer = _read_tokenizer(checkpoint)
    check_tokenizer(checkpoint, tokenizer, decoder_config.padded_vocab_size or len(tokenizer))
    shapes = _decoder_shapes(decoder_config, len(tokenizer))
    tensors = convert(spec.weights, spec.dropped, checkpoint.tensors, shapes, name)
    return ConvertedDecoder(decoder_config, tensors, tokenizer)


def _decoder_spec(checkpoint: HFCheckpoint, model_type: str) -> _DecoderSpec:
    names = CONVERTERS[model_type]
    config = checkpoint.config
    has_prefix = any(tensor.startswith(names.prefix) for tensor in checkpoint.tensors)
    prefix = names.prefix if has_prefix else ""
    is_untied = has_untied_head(checkpoint, HEAD, f"{prefix}{names.embedding}")
    if HEAD not in checkpoint.tensors and not config.get("tie_word_embeddings", model_type == "gpt2"):
        raise CheckpointError(
            f"{checkpoint.name!r} lacks {HEAD}, and is not tied; download it again.",
            code="hub.missing_tensors",
            name=checkpoint.name,
            tensors=[HEAD],
        )
    head = HEAD if is_untied else None
    dropped = () if is_untied else (HEAD,)
    if model_type == "gpt2":
        decoder = gpt2.decoder_config(checkpoint, config, tie_word_embeddings=not is_untied)
        weights = gpt2.decoder_weights(prefix, decoder.num_layers, head)
        return _DecoderSpec(decoder, weights, (*dropped, rf"{prefix}h\.\d+\.{gpt2.BUFFERS}"))
    decoder = llama.decoder_config(checkpoint, config, tie_word_embeddings=not is_untied)
    weights = llama.decoder_weights(config, prefix, decoder.num_layers, head)
    return _DecoderSpec(decoder, weights, (*dropped, rf"{prefix}layers\.\d+\.{llama.BUFFERS}"))


def _decoder_shapes(config: DecoderConfig, vocab_size: int) -> dict[str, torch.Size]:
    """Return the shapes of the decoder's tensors by name."""
    with torch.device("meta"):
        decoder = TextDecoder(config, vocab_size)
    return {f"decoder.{name}": tensor.shape for name, tensor in decoder.state_dict().items()}


def _read_tokenizer(checkpoint: HFCheckpoint) -> Tokenizer:
    """Read the model's tokenizer, with plain words in place of our special tokens."""
    special_tokens = _special_token_ids(checkpoint.config)
    tokenizer = read_tokenizer(checkpoint, special_tokens)
    prompts: Mapping[str, list[int]] = {
        "caption": [],
        "question": tokenizer.encode(QUESTION),
        "answer": tokenizer.encode(ANSWER),
    }
    return Tokenizer(tokenizer.backend, {**special_tokens, **prompts})


def _special_token_ids(config: HFConfig) -> dict[str, list[int]]:
    """Return the ids of pad, bos and eos. Without bos or pad token, the eos token is used."""
    eos = first_token_id(config["eos_token_id"])
    bos = config.get("bos_token_id")
    pad = config.get("pad_token_id")
    return {
        "pad": [pad if isinstance(pad, int) and pad >= 0 else eos],
        "bos": [eos if bos is None else first_token_id(bos)],
        "eos": [eos],
    }
