"""Llama (Touvron et al. 2023, section 2.2; Dubey et al. 2024, section 3.2) and what is built like it: SmolLM2, Qwen2.

Published: transformers' LlamaForCausalLM and Qwen2ForCausalLM. Qwen2 differs in one thing: its queries, keys and values
have biases (Yang et al. 2024, "Qwen2 Technical Report", section 2.2.1), and nothing else has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mmx.config.schema import DecoderConfig, RopeScaling
from mmx.errors import CheckpointError
from mmx.hub.hf_checkpoint import HFCheckpoint
from mmx.hub.hf_config import activation, require_config
from mmx.hub.weight_mapping import WeightMapping, each_layer, linear

BUFFERS = r"self_attn\.rotary_emb\.inv_freq"  # of older files: it follows from the configuration


def decoder_config(published: HFCheckpoint, config: Mapping[str, Any], tied: bool) -> DecoderConfig:
    """The config map."""
    require_config(published, config, use_sliding_window=False)
    others = sorted(set(config.get("layer_types") or []) - {"full_attention"})
    if others:
        raise CheckpointError(
            f"{published.name!r} has layers of {others[0]!r}; mmx reads its family with 'full_attention' alone."
        )
    theta, scaling = _rope(published, config)
    heads = config["num_attention_heads"]
    return DecoderConfig(
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        head_dim=config.get("head_dim"),
        num_kv_heads=config.get("num_key_value_heads") or heads,
        norm="rms",
        norm_eps=config.get("rms_norm_eps", 1e-6),
        positions="rope",
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=config["max_position_embeddings"],
        activation=activation(config.get("hidden_act", "silu"), published),
        intermediate_size=config["intermediate_size"],
        glu=True,
        bias=any(_biases(config).values()),
        padded_vocab_size=config["vocab_size"],
        tie_word_embeddings=tied,
        dropout=0.0,
    )


def decoder_weights(config: Mapping[str, Any], prefix: str, layers: int, head: str | None) -> list[WeightMapping]:
    """The weight map; `head`: the name of its own output matrix, where it is not tied.

    Our decoder has biases everywhere or nowhere: those that a family has not are zeros.
    """
    ours, theirs = "decoder.layers.{i}.", f"{prefix}layers.{{i}}."
    itself, feed, biases = f"{theirs}self_attn.", f"{theirs}mlp.", _biases(config)
    maps = [
        ("qkv", f"{ours}self_attention.qkv", (f"{itself}q_proj", f"{itself}k_proj", f"{itself}v_proj")),
        ("out", f"{ours}self_attention.out", (f"{itself}o_proj",)),
        ("feed", f"{ours}feed_forward.gate", (f"{feed}gate_proj",)),
        ("feed", f"{ours}feed_forward.up", (f"{feed}up_proj",)),
        ("feed", f"{ours}feed_forward.out", (f"{feed}down_proj",)),
    ]
    rules = [rule for kind, to, of in maps for rule in _linear(to, of, biases[kind])]
    norms = [
        WeightMapping(f"{ours}self_residual.norm.weight", (f"{theirs}input_layernorm.weight",)),
        WeightMapping(f"{ours}feed_residual.norm.weight", (f"{theirs}post_attention_layernorm.weight",)),
    ]
    kept = [rule for rule in rules if any(biases.values()) or not rule.ours.endswith(".bias")]
    return [
        WeightMapping("decoder.embedding.weight", (f"{prefix}embed_tokens.weight",)),
        *each_layer(layers, [*norms, *kept]),
        WeightMapping("decoder.norm.weight", (f"{prefix}norm.weight",)),
        *([WeightMapping("decoder.lm_head.weight", (head,))] if head else []),
    ]


def _linear(ours: str, theirs: tuple[str, ...], biased: bool) -> list[WeightMapping]:
    """A linear map, fused of several or not; without biases there, one of them stands for all, and all are zeros."""
    weight, bias = linear(ours, *theirs)
    return [weight, bias if biased else replace(bias, theirs=bias.theirs[:1], optional=True)]


def _biases(config: Mapping[str, Any]) -> dict[str, bool]:
    """Which maps have them: queries, keys and values; out of the attention; in the feed-forward."""
    attention = bool(config.get("attention_bias", False))
    qwen = config.get("model_type") == "qwen2"
    return {"qkv": qwen or attention, "out": attention and not qwen, "feed": bool(config.get("mlp_bias", False))}


def _rope(published: HFCheckpoint, config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, as transformers 5 writes them (rope_parameters) or as it did before (rope_scaling)."""
    told = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(told.get("rope_theta") or config.get("rope_theta") or 10000.0)
    require_config(published, told, partial_rotary_factor=1.0)
    kind = told.get("rope_type") or told.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise CheckpointError(f"{published.name!r} has the rope type {kind!r}; expected default or llama3.")
    scaling = RopeScaling(
        factor=told["factor"],
        low_freq_factor=told["low_freq_factor"],
        high_freq_factor=told["high_freq_factor"],
        original_max_position_embeddings=told["original_max_position_embeddings"],
    )
    return theta, scaling
