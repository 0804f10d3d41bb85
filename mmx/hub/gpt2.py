"""GPT-2 (Radford et al. 2019), as a language model or, with cross-attention, as the decoder of a captioner.

transformers' GPT2LMHeadModel stores its linear layers transposed ("Conv1D"), with queries, keys and values fused.
"""

from __future__ import annotations

from torch import Tensor

from mmx.config.schema import DecoderConfig
from mmx.hub.hf_checkpoint import HFCheckpoint, HFConfig
from mmx.hub.hf_config import activation, require_config
from mmx.hub.weight_mapping import WeightMapping, all_layers, each_layer, linear, norm

BUFFERS = r"(attn|crossattention)\.(bias|masked_bias)"


def decoder_config(checkpoint: HFCheckpoint, config: HFConfig, tie_word_embeddings: bool) -> DecoderConfig:
    """Return the configuration of the decoder. `config`: its part of config.json."""
    require_config(checkpoint, config, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
    return DecoderConfig(
        hidden_size=config["n_embd"],
        num_layers=config["n_layer"],
        num_heads=config["n_head"],
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        max_position_embeddings=config["n_positions"],
        activation=activation(config.get("activation_function", "gelu_new"), checkpoint),
        intermediate_size=config.get("n_inner"),
        padded_vocab_size=config["vocab_size"],
        tie_word_embeddings=tie_word_embeddings,
        dropout=config.get("resid_pdrop", 0.1),
    )


def decoder_weights(prefix: str, num_layers: int, head: str | None) -> list[WeightMapping]:
    """Map the language model. `head`: published name of an output matrix that is not tied to the embedding."""
    ours = "decoder.layers.{i}."
    theirs = f"{prefix}h.{{i}}."
    layer = [
        *norm(f"{ours}self_residual.norm", f"{theirs}ln_1"),
        *linear(f"{ours}self_attention.qkv", f"{theirs}attn.c_attn", transform=transpose),
        *linear(f"{ours}self_attention.out", f"{theirs}attn.c_proj", transform=transpose),
        *norm(f"{ours}feed_residual.norm", f"{theirs}ln_2"),
        *linear(f"{ours}feed_forward.up", f"{theirs}mlp.c_fc", transform=transpose),
        *linear(f"{ours}feed_forward.out", f"{theirs}mlp.c_proj", transform=transpose),
    ]
    return [
        WeightMapping("decoder.embedding.weight", (f"{prefix}wte.weight",)),
        WeightMapping("decoder.embedding.positions.weight", (f"{prefix}wpe.weight",)),
        *each_layer(num_layers, layer),
        *norm("decoder.norm", f"{prefix}ln_f"),
        *([WeightMapping("decoder.lm_head.weight", (head,))] if head else []),
    ]


def cross_attention_weights(prefix: str, num_layers: int, projection: str) -> list[WeightMapping]:
    """Map the cross-attention: queries to the decoder, keys and values to the projection."""
    ours = "decoder.layers.{i}."
    theirs = f"{prefix}h.{{i}}."
    layer = [
        *norm(f"{ours}cross_residual.norm", f"{theirs}ln_cross_attn"),
        *linear(f"{ours}cross_attention.query", f"{theirs}crossattention.q_attn", transform=transpose),
        *linear(f"{ours}cross_attention.out", f"{theirs}crossattention.c_proj", transform=transpose),
    ]
    key_value = f"{theirs}crossattention.c_attn"
    return [
        *each_layer(num_layers, layer),
        *all_layers(num_layers, linear(f"{projection}.key", key_value, transform=first_half)),
        *all_layers(num_layers, linear(f"{projection}.value", key_value, transform=second_half)),
    ]


def transpose(tensor: Tensor) -> Tensor:
    """[in, out] to [out, in]; a bias is unchanged."""
    return tensor.t()


def first_half(tensor: Tensor) -> Tensor:
    """Return the keys of fused keys and values."""
    return tensor.t().chunk(2)[0]


def second_half(tensor: Tensor) -> Tensor:
    """Return the values of fused keys and values."""
    return tensor.t().chunk(2)[1]
