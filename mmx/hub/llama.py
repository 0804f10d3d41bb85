"""Llama (Touvron et al. 2023, section 2.2; Dubey et al. 2024, section 3.2), SmolLM2 and Qwen2, which are built alike.

transformers' LlamaForCausalLM and Qwen2ForCausalLM. Qwen2 differs in one point: only its queries, keys and values have
biases (Yang et al. 2024, "Qwen2 Technical Report", section 2.2.1).
"""

from __future__ import annotations

from dataclasses import replace

from mmx.config.schema import DecoderConfig, RopeScaling
from mmx.errors import CheckpointError
from mmx.hub.hf_checkpoint import HFCheckpoint, HFConfig
from mmx.hub.hf_config import activation, require_config
from mmx.hub.weight_mapping import WeightMapping, each_layer, linear

BUFFERS = r"self_attn\.rotary_emb\.inv_freq"  # in older files; computed from the configuration
DEFAULT_ROPE_THETA = 10000.0


def decoder_config(checkpoint: HFCheckpoint, config: HFConfig, tie_word_embeddings: bool) -> DecoderConfig:
    """Return the configuration of the decoder."""
    require_config(checkpoint, config, use_sliding_window=False)
    _check_layer_types(checkpoint, config)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}  # of transformers 5, or before
    theta = rope.get("rope_theta") or config.get("rope_theta") or DEFAULT_ROPE_THETA
    num_heads = config["num_attention_heads"]
    return DecoderConfig(
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=num_heads,
        head_dim=config.get("head_dim"),
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        norm="rms",
        norm_eps=config.get("rms_norm_eps", 1e-6),
        positions="rope",
        rope_theta=float(theta),
        rope_scaling=_rope_scaling(checkpoint, rope),
        max_position_embeddings=config["max_position_embeddings"],
        activation=activation(config.get("hidden_act", "silu"), checkpoint),
        intermediate_size=config["intermediate_size"],
        glu=True,
        bias=any(_has_bias(config).values()),
        padded_vocab_size=config["vocab_size"],
        tie_word_embeddings=tie_word_embeddings,
        dropout=0.0,
    )


def decoder_weights(config: HFConfig, prefix: str, num_layers: int, head: str | None) -> list[WeightMapping]:
    """Map the language model. `head`: published name of an output matrix that is not tied to the embedding.

    Our decoder has biases in all linear layers or in none: those that a family does not have are zeros.
    """
    ours = "decoder.layers.{i}."
    theirs = f"{prefix}layers.{{i}}."
    layer = [
        WeightMapping(f"{ours}self_residual.norm.weight", (f"{theirs}input_layernorm.weight",)),
        WeightMapping(f"{ours}feed_residual.norm.weight", (f"{theirs}post_attention_layernorm.weight",)),
        *_linear_weights(config, ours, theirs),
    ]
    return [
        WeightMapping("decoder.embedding.weight", (f"{prefix}embed_tokens.weight",)),
        *each_layer(num_layers, layer),
        WeightMapping("decoder.norm.weight", (f"{prefix}norm.weight",)),
        *([WeightMapping("decoder.lm_head.weight", (head,))] if head else []),
    ]


def _linear_weights(config: HFConfig, ours: str, theirs: str) -> list[WeightMapping]:
    """Map the linear layers of one layer."""
    has_bias = _has_bias(config)
    qkv = [f"{theirs}self_attn.{name}_proj" for name in "qkv"]
    mappings = [
        *_linear(f"{ours}self_attention.qkv", qkv, has_bias["qkv"]),
        *_linear(f"{ours}self_attention.out", [f"{theirs}self_attn.o_proj"], has_bias["out"]),
        *_linear(f"{ours}feed_forward.gate", [f"{theirs}mlp.gate_proj"], has_bias["feed_forward"]),
        *_linear(f"{ours}feed_forward.up", [f"{theirs}mlp.up_proj"], has_bias["feed_forward"]),
        *_linear(f"{ours}feed_forward.out", [f"{theirs}mlp.down_proj"], has_bias["feed_forward"]),
    ]
    if any(has_bias.values()):
        return mappings
    return [mapping for mapping in mappings if not mapping.ours.endswith(".bias")]


def _linear(ours: str, theirs: list[str], has_bias: bool) -> list[WeightMapping]:
    """Map a linear layer. Without published biases, one missing tensor stands for the whole bias of zeros."""
    weight, bias = linear(ours, *theirs)
    if has_bias:
        return [weight, bias]
    return [weight, replace(bias, theirs=bias.theirs[:1], optional=True)]


def _has_bias(config: HFConfig) -> dict[str, bool]:
    """Return which linear layers have biases."""
    attention = bool(config.get("attention_bias", False))
    is_qwen2 = config.get("model_type") == "qwen2"
    return {
        "qkv": is_qwen2 or attention,
        "out": attention and not is_qwen2,
        "feed_forward": bool(config.get("mlp_bias", False)),
    }


def _check_layer_types(checkpoint: HFCheckpoint, config: HFConfig) -> None:
    unsupported = sorted(set(config.get("layer_types") or []) - {"full_attention"})
    if unsupported:
        raise CheckpointError(
            f"{checkpoint.name!r} has layers of type {unsupported[0]!r}; mmx supports only 'full_attention' in its "
            "family.",
            code="hub.unsupported_config",
            name=checkpoint.name,
            key="layer_types",
            given=unsupported[0],
            expected="full_attention",
        )


def _rope_scaling(checkpoint: HFCheckpoint, rope: HFConfig) -> RopeScaling | None:
    require_config(checkpoint, rope, partial_rotary_factor=1.0)
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type == "default":
        return None
    if rope_type != "llama3":
        raise CheckpointError(
            f"{checkpoint.name!r} has the rope type {rope_type!r}; expected default or llama3.",
            code="hub.rope_type",
            name=checkpoint.name,
            given=rope_type,
            expected=["default", "llama3"],
        )
    return RopeScaling(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_max_position_embeddings=rope["original_max_position_embeddings"],
    )
