"""GPT-2 (Radford et al. 2019): a decoder by itself, or, with cross-attention, that of a captioner.

Published: transformers' GPT2LMHeadModel. Its maps are stored transposed ("Conv1D"), queries, keys and values in one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mmx.config.schema import DecoderConfig
from mmx.hub.hf_checkpoint import HFCheckpoint
from mmx.hub.hf_config import activation, require_config
from mmx.hub.weight_mapping import WeightMapping, all_layers, each_layer, linear, norm

BUFFERS = r"(attn|crossattention)\.(bias|masked_bias)"


def decoder_config(published: HFCheckpoint, config: Mapping[str, Any], tied: bool) -> DecoderConfig:
    """The config map."""
    require_config(published, config, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
    return DecoderConfig(
        hidden_size=config["n_embd"],
        num_layers=config["n_layer"],
        num_heads=config["n_head"],
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        max_position_embeddings=config["n_positions"],
        activation=activation(config.get("activation_function", "gelu_new"), published),
        intermediate_size=config.get("n_inner"),
        padded_vocab_size=config["vocab_size"],
        tie_word_embeddings=tied,
        dropout=config.get("resid_pdrop", 0.1),
    )


def decoder_weights(prefix: str, layers: int, head: str | None) -> list[WeightMapping]:
    """The weight map of the language model; `head`: the name of its own output matrix, where it is not tied."""
    ours, theirs = "decoder.layers.{i}.", f"{prefix}h.{{i}}."
    return [
        WeightMapping("decoder.embedding.weight", (f"{prefix}wte.weight",)),
        WeightMapping("decoder.embedding.positions.weight", (f"{prefix}wpe.weight",)),
        *each_layer(
            layers,
            [
                *norm(f"{ours}self_residual.norm", f"{theirs}ln_1"),
                *linear(f"{ours}self_attention.qkv", f"{theirs}attn.c_attn", change=transpose),
                *linear(f"{ours}self_attention.out", f"{theirs}attn.c_proj", change=transpose),
                *norm(f"{ours}feed_residual.norm", f"{theirs}ln_2"),
                *linear(f"{ours}feed_forward.up", f"{theirs}mlp.c_fc", change=transpose),
                *linear(f"{ours}feed_forward.out", f"{theirs}mlp.c_proj", change=transpose),
            ],
        ),
        *norm("decoder.norm", f"{prefix}ln_f"),
        *([WeightMapping("decoder.lm_head.weight", (head,))] if head else []),
    ]


def cross_attention_weights(prefix: str, layers: int, projection: str) -> list[WeightMapping]:
    """The weight map of its cross-attention: queries stay in the decoder, keys and values go to the projection."""
    ours, theirs = "decoder.layers.{i}.", f"{prefix}h.{{i}}."
    return [
        *each_layer(
            layers,
            [
                *norm(f"{ours}cross_residual.norm", f"{theirs}ln_cross_attn"),
                *linear(f"{ours}cross_attention.query", f"{theirs}crossattention.q_attn", change=transpose),
                *linear(f"{ours}cross_attention.out", f"{theirs}crossattention.c_proj", change=transpose),
            ],
        ),
        *all_layers(layers, linear(f"{projection}.key", f"{theirs}crossattention.c_attn", change=first_half)),
        *all_layers(layers, linear(f"{projection}.value", f"{theirs}crossattention.c_attn", change=second_half)),
    ]


def transpose(tensor: Tensor) -> Tensor:
    """[in, out] -> [out, in]; a bias as it is."""
    return tensor.t()


def first_half(tensor: Tensor) -> Tensor:
    """Of keys and values in one, the keys."""
    return tensor.t().chunk(2)[0]


def second_half(tensor: Tensor) -> Tensor:
    """Of keys and values in one, the values."""
    return tensor.t().chunk(2)[1]
