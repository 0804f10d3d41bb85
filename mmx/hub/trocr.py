"""A vision encoder with the decoder of TrOCR, which reads lines of text: transformers' VisionEncoderDecoderModel.

Li et al. 2023, "TrOCR", section 3. The layers have the names of BART, as those of Marian.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

from mmx.config.schema import DecoderConfig, ModelConfig
from mmx.hub.conversion import ConversionSpec
from mmx.hub.hf_checkpoint import HFCheckpoint, HFConfig
from mmx.hub.hf_config import activation, image_source, read_generation, read_tokenizer, special_token_id
from mmx.hub.vit_gpt2 import has_untied_head
from mmx.hub.weight_mapping import WeightMapping, all_layers, computed_mapping, each_layer, linear, norm
from mmx.nn.position_embedding import SinusoidalPositionEmbedding

PREFIX = "decoder.model.decoder."
HEAD = "decoder.output_projection.weight"
BRIDGE = "enc_to_dec_proj"
EMBEDDING = f"{PREFIX}embed_tokens.weight"
PROJECTION = "sources.image.projection"
POSITION_OFFSET = 2  # rows of learned positions before that of the first position
UNUSED_BUFFER = rf"{PREFIX}embed_positions\._float_tensor"  # in older files with sinusoidal positions


def conversion(checkpoint: HFCheckpoint) -> ConversionSpec:
    """Return configuration and weight mappings of a checkpoint."""
    config = checkpoint.config["decoder"]
    has_bridge = f"{BRIDGE}.weight" in checkpoint.tensors
    is_missing = HEAD not in checkpoint.tensors and config.get("tie_word_embeddings") is False  # an error below
    is_untied = is_missing or has_untied_head(checkpoint, HEAD, EMBEDDING)
    decoder = decoder_config(checkpoint, config, tie_word_embeddings=not is_untied)
    special_tokens = special_token_ids(checkpoint, config)
    source = image_source(checkpoint, checkpoint.config["encoder"], decoder.hidden_size if has_bridge else None)
    dropped_head = () if is_untied else (HEAD,)
    dropped_buffer = () if _has_learned_positions(config) else (UNUSED_BUFFER,)
    return ConversionSpec(
        config=ModelConfig(
            sources={"image": source}, decoder=decoder, vocab_size=config["vocab_size"], special_tokens=special_tokens
        ),
        tokenizer=read_tokenizer(checkpoint, special_tokens),
        generation=read_generation(checkpoint, prompt_length=1),
        weights=[
            *decoder_weights(config, decoder),
            *([WeightMapping("decoder.lm_head.weight", (HEAD,))] if is_untied else []),
            *(linear(f"{PROJECTION}.bridge", BRIDGE) if has_bridge else []),
        ],
        dropped=dropped_head + dropped_buffer,
        encoders={"image": "encoder."},
    )


def special_token_ids(checkpoint: HFCheckpoint, config: HFConfig) -> dict[str, list[int]]:
    """Return the ids of pad, bos and eos."""
    return {
        "pad": [special_token_id(checkpoint, "pad_token_id", config)],
        "bos": [special_token_id(checkpoint, "decoder_start_token_id", config)],
        "eos": [special_token_id(checkpoint, "eos_token_id", config)],
        "caption": [],
    }


def decoder_config(checkpoint: HFCheckpoint, config: HFConfig, tie_word_embeddings: bool) -> DecoderConfig:
    """Return the configuration of the decoder. Sinusoidal positions are limited to the number in the config."""
    return DecoderConfig(
        hidden_size=config["d_model"],
        num_layers=config["decoder_layers"],
        num_heads=config["decoder_attention_heads"],
        norm_placement="post",
        max_position_embeddings=config["max_position_embeddings"],
        activation=activation(config["activation_function"], checkpoint),
        intermediate_size=config["decoder_ffn_dim"],
        embedding_norm=config.get("layernorm_embedding", True),
        embedding_scale=sqrt(config["d_model"]) if config.get("scale_embedding") else 1.0,
        padded_vocab_size=config["vocab_size"],
        tie_word_embeddings=tie_word_embeddings,
        dropout=config.get("dropout", 0.1),
    )


def decoder_weights(config: HFConfig, decoder: DecoderConfig) -> list[WeightMapping]:
    """Map the decoder without its head, and the projection."""
    theirs = f"{PREFIX}layers.{{i}}."
    embedding_norm = norm("decoder.embedding.norm", f"{PREFIX}layernorm_embedding") if decoder.embedding_norm else []
    return [
        WeightMapping("decoder.embedding.weight", (EMBEDDING,)),
        _position_weights(config, decoder),
        *embedding_norm,
        *layer_weights("decoder.layers.{i}.", theirs, decoder.num_layers),
        *cross_attention_weights(theirs, decoder.num_layers, PROJECTION),
    ]


def layer_weights(ours: str, theirs: str, num_layers: int) -> list[WeightMapping]:
    """Map self-attention, feed-forward and their norms of BART's encoder or decoder layers.

    Args:
        ours, theirs: prefixes of the names of one layer, with {i}.
    """
    qkv = [f"{theirs}self_attn.{name}_proj" for name in "qkv"]
    layer = [
        *linear(f"{ours}self_attention.qkv", *qkv),
        *linear(f"{ours}self_attention.out", f"{theirs}self_attn.out_proj"),
        *norm(f"{ours}self_residual.norm", f"{theirs}self_attn_layer_norm"),
        *linear(f"{ours}feed_forward.up", f"{theirs}fc1"),
        *linear(f"{ours}feed_forward.out", f"{theirs}fc2"),
        *norm(f"{ours}feed_residual.norm", f"{theirs}final_layer_norm"),
    ]
    return each_layer(num_layers, layer)


def cross_attention_weights(theirs: str, num_layers: int, projection: str) -> list[WeightMapping]:
    """Map BART's cross-attention: queries to the decoder, keys and values to the projection."""
    ours = "decoder.layers.{i}."
    layer = [
        *linear(f"{ours}cross_attention.query", f"{theirs}encoder_attn.q_proj"),
        *linear(f"{ours}cross_attention.out", f"{theirs}encoder_attn.out_proj"),
        *norm(f"{ours}cross_residual.norm", f"{theirs}encoder_attn_layer_norm"),
    ]
    return [
        *each_layer(num_layers, layer),
        *all_layers(num_layers, linear(f"{projection}.key", f"{theirs}encoder_attn.k_proj")),
        *all_layers(num_layers, linear(f"{projection}.value", f"{theirs}encoder_attn.v_proj")),
    ]


def sinusoidal_table(num_positions: int, hidden_size: int, first: int) -> Tensor:
    """Return sinusoidal embeddings of `num_positions` positions from `first` on: [num_positions, E]."""
    table: Tensor = SinusoidalPositionEmbedding(hidden_size)(torch.arange(first, first + num_positions))
    return table


def _has_learned_positions(config: HFConfig) -> bool:
    return bool(config.get("use_learned_position_embeddings", True))


def _position_weights(config: HFConfig, decoder: DecoderConfig) -> WeightMapping:
    """Map learned positions without their unused rows, or compute sinusoidal ones (Vaswani et al. 2017)."""
    ours = "decoder.embedding.positions.weight"
    if _has_learned_positions(config):
        theirs = f"{PREFIX}embed_positions.weight"
        return WeightMapping(ours, (theirs,), lambda table: table[POSITION_OFFSET:])
    # Position ids start after the padding id. Both sides compute in float32 and in the same order.
    pad = config.get("pad_token_id")
    first = 2 if pad is None else pad + 1
    table = sinusoidal_table(decoder.max_position_embeddings, decoder.hidden_size, first)
    return computed_mapping(ours, EMBEDDING, table)
