"""A vision encoder with the decoder of TrOCR, which reads lines of text (Li et al. 2023, "TrOCR", section 3).

Published: transformers' VisionEncoderDecoderModel. Its layers bear the names of BART, as those of Marian do.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from mmx.config.schema import DecoderConfig, ModelConfig
from mmx.hub.conversion import ConversionSpec
from mmx.hub.hf_checkpoint import HFCheckpoint
from mmx.hub.hf_config import (
    activation,
    computed_mapping,
    image_source,
    read_generation,
    read_tokenizer,
    special_token_id,
)
from mmx.hub.vit_gpt2 import has_own_head
from mmx.hub.weight_mapping import WeightMapping, all_layers, each_layer, linear, norm
from mmx.nn.position_embedding import SinusoidalPositionEmbedding

PREFIX, HEAD, BRIDGE = "decoder.model.decoder.", "decoder.output_projection.weight", "enc_to_dec_proj"
TABLE, PROJECTION = f"{PREFIX}embed_tokens.weight", "sources.image.projection"
OFFSET = 2  # rows of a learned table before that of the first position
MARKER = rf"{PREFIX}embed_positions\._float_tensor"  # older files have it where positions are computed; it holds a 1


def conversion(published: HFCheckpoint) -> ConversionSpec:
    """The config map and the weight map."""
    config, tensors = published.config["decoder"], published.tensors
    bridged = f"{BRIDGE}.weight" in tensors
    untied = HEAD not in tensors and config.get("tie_word_embeddings") is False  # then it must not be lacking
    own_head = untied or has_own_head(published, HEAD, TABLE)
    decoder = decoder_config(published, config, tied=not own_head)
    pad, start, end = (
        special_token_id(published, f"{token}_token_id", config) for token in ("pad", "decoder_start", "eos")
    )
    marks = {"pad": [pad], "bos": [start], "eos": [end], "caption": []}
    source = image_source(published, published.config["encoder"], decoder.hidden_size if bridged else None)
    return ConversionSpec(
        config=ModelConfig(
            sources={"image": source}, decoder=decoder, vocab_size=config["vocab_size"], special_tokens=marks
        ),
        tokenizer=read_tokenizer(published, marks),
        generation=read_generation(published, prompt=1),
        weights=[
            WeightMapping("decoder.embedding.weight", (TABLE,)),
            _positions(config, decoder),
            *(norm("decoder.embedding.norm", f"{PREFIX}layernorm_embedding") if decoder.embedding_norm else []),
            *layer_weights("decoder.layers.{i}.", f"{PREFIX}layers.{{i}}.", decoder.num_layers),
            *cross_attention_weights(f"{PREFIX}layers.{{i}}.", decoder.num_layers, PROJECTION),
            *([WeightMapping("decoder.lm_head.weight", (HEAD,))] if own_head else []),
            *(linear(f"{PROJECTION}.bridge", BRIDGE) if bridged else []),
        ],
        dropped=(*(() if own_head else (HEAD,)), *(() if _learned(config) else (MARKER,))),
        encoders={"image": "encoder."},
    )


def decoder_config(published: HFCheckpoint, config: Mapping[str, Any], tied: bool) -> DecoderConfig:
    """The config map of the decoder. Computed positions have no end; ours have as many as the config names."""
    return DecoderConfig(
        hidden_size=config["d_model"],
        num_layers=config["decoder_layers"],
        num_heads=config["decoder_attention_heads"],
        norm_placement="post",
        max_position_embeddings=config["max_position_embeddings"],
        activation=activation(config["activation_function"], published),
        intermediate_size=config["decoder_ffn_dim"],
        embedding_norm=config.get("layernorm_embedding", True),
        embedding_scale=sqrt(config["d_model"]) if config.get("scale_embedding") else 1.0,
        padded_vocab_size=config["vocab_size"],
        tie_word_embeddings=tied,
        dropout=config.get("dropout", 0.1),
    )


def layer_weights(ours: str, theirs: str, layers: int) -> list[WeightMapping]:
    """The weight map of what BART's encoder and decoder layers have alike: self-attention, feed-forward, their norms.

    ours, theirs: what stands before the names of one layer, with {i}.
    """
    return each_layer(
        layers,
        [
            *linear(f"{ours}self_attention.qkv", *(f"{theirs}self_attn.{part}_proj" for part in "qkv")),
            *linear(f"{ours}self_attention.out", f"{theirs}self_attn.out_proj"),
            *norm(f"{ours}self_residual.norm", f"{theirs}self_attn_layer_norm"),
            *linear(f"{ours}feed_forward.up", f"{theirs}fc1"),
            *linear(f"{ours}feed_forward.out", f"{theirs}fc2"),
            *norm(f"{ours}feed_residual.norm", f"{theirs}final_layer_norm"),
        ],
    )


def cross_attention_weights(theirs: str, layers: int, projection: str) -> list[WeightMapping]:
    """The weight map of BART's cross-attention; keys and values go to the projection, as wide as the encoder or not."""
    ours = "decoder.layers.{i}."
    own = [
        *linear(f"{ours}cross_attention.query", f"{theirs}encoder_attn.q_proj"),
        *linear(f"{ours}cross_attention.out", f"{theirs}encoder_attn.out_proj"),
        *norm(f"{ours}cross_residual.norm", f"{theirs}encoder_attn_layer_norm"),
    ]
    return [
        *each_layer(layers, own),
        *all_layers(layers, linear(f"{projection}.key", f"{theirs}encoder_attn.k_proj")),
        *all_layers(layers, linear(f"{projection}.value", f"{theirs}encoder_attn.v_proj")),
    ]


def _learned(config: Mapping[str, Any]) -> bool:
    return bool(config.get("use_learned_position_embeddings", True))


def _positions(config: Mapping[str, Any], decoder: DecoderConfig) -> WeightMapping:
    """Learned ones without the rows that no position has, or waves (Vaswani et al. 2017, section 3.5)."""
    ours = "decoder.embedding.positions.weight"
    if _learned(config):
        return WeightMapping(ours, (f"{PREFIX}embed_positions.weight",), lambda table: table[OFFSET:])
    # The wave of the first position is that of pad + 1. They count in float32, and we in the same steps.
    pad = config.get("pad_token_id")
    first = (1 if pad is None else pad) + 1
    return computed_mapping(ours, TABLE, sinusoidal_table(decoder.max_position_embeddings, decoder.hidden_size, first))


def sinusoidal_table(count: int, width: int, first: int) -> Tensor:
    """Sines, then cosines, of `count` positions from `first` on: [count, E]."""
    found: Tensor = SinusoidalPositionEmbedding(width)(torch.arange(first, first + count))
    return found
