"""BLIP for captions (Li et al. 2022, "BLIP", section 3.1): transformers' BlipForConditionalGeneration.

A vision transformer and a BERT (Devlin et al. 2019) with cross-attention to all its states. The mappings of a text
stack are used for the captioner and for both text stacks of `blip_vqa`.
"""

from __future__ import annotations

from mmx.config.schema import DecoderConfig, ModelConfig, SourceConfig
from mmx.hub.conversion import ConversionSpec
from mmx.hub.hf_checkpoint import HFCheckpoint, HFConfig
from mmx.hub.hf_config import activation, first_token_id, image_source, read_generation, read_tokenizer, require_config
from mmx.hub.weight_mapping import WeightMapping, all_layers, each_layer, linear, norm

VISION = "vision_model."
DECODER = "text_decoder."
PROJECTION = "sources.image.projection"
BUFFERS = r"text_(encoder|decoder\.bert)\.embeddings\.position_ids"
# transformers has the token embedding and `bias` a second time in the head.
TIED = r"text_decoder\.cls\.predictions\.decoder\.(weight|bias)"


def conversion(checkpoint: HFCheckpoint) -> ConversionSpec:
    """Return configuration and weight mappings of a checkpoint."""
    text_config = checkpoint.config["text_config"]
    decoder = decoder_config(checkpoint, text_config)
    special_tokens = special_token_ids(text_config) | {"caption": []}
    return ConversionSpec(
        config=ModelConfig(
            sources={"image": vision_source(checkpoint)},
            decoder=decoder,
            vocab_size=text_config["vocab_size"],
            special_tokens=special_tokens,
        ),
        tokenizer=read_tokenizer(checkpoint, special_tokens),
        generation=read_generation(checkpoint, prompt_length=1),
        weights=[
            *decoder_weights(checkpoint, decoder.num_layers),
            *key_value_weights(PROJECTION, f"{DECODER}bert.", decoder.num_layers),
        ],
        dropped=(BUFFERS, TIED),
        encoders={"image": VISION},
    )


def special_token_ids(text_config: HFConfig) -> dict[str, list[int]]:
    """Return the ids of pad, bos and eos. The eos token is BERT's separator, not the `eos_token_id` of the config."""
    keys = {"pad": "pad_token_id", "bos": "bos_token_id", "eos": "sep_token_id"}
    return {name: [first_token_id(text_config[key])] for name, key in keys.items()}


def vision_source(checkpoint: HFCheckpoint) -> SourceConfig:
    """Return the source of the vision encoder. The decoder attends to its class token as well."""
    return image_source(checkpoint, {"model_type": "blip_vision_model", **checkpoint.config["vision_config"]})


def decoder_config(checkpoint: HFCheckpoint, text_config: HFConfig) -> DecoderConfig:
    """Return the configuration of the decoder: a text stack with BERT's head."""
    return DecoderConfig(**transformer_fields(checkpoint, text_config), lm_head_transform=True, lm_head_bias=True)


def transformer_fields(checkpoint: HFCheckpoint, text_config: HFConfig) -> HFConfig:
    """Return the fields of TransformerConfig of a text stack."""
    require_config(checkpoint, checkpoint.config, tie_word_embeddings=True)
    require_config(
        checkpoint, text_config, tie_word_embeddings=True, is_decoder=True, position_embedding_type="absolute"
    )
    return {
        "hidden_size": text_config["hidden_size"],
        "num_layers": text_config["num_hidden_layers"],
        "num_heads": text_config["num_attention_heads"],
        "norm_placement": "post",
        "norm_eps": text_config.get("layer_norm_eps", 1e-12),
        "max_position_embeddings": text_config["max_position_embeddings"],
        "activation": activation(text_config.get("hidden_act", "gelu"), checkpoint),
        "intermediate_size": text_config["intermediate_size"],
        "embedding_norm": True,
        "dropout": text_config.get("hidden_dropout_prob", 0.0),
        "padded_vocab_size": text_config["vocab_size"],
    }


def decoder_weights(checkpoint: HFCheckpoint, num_layers: int) -> list[WeightMapping]:
    """Map the decoder and its head."""
    head = f"{DECODER}cls.predictions"
    embedding = stored_name(checkpoint, f"{DECODER}bert.embeddings.word_embeddings.weight", f"{head}.decoder.weight")
    bias = stored_name(checkpoint, f"{head}.bias", f"{head}.decoder.bias")
    return [
        *transformer_weights("decoder", f"{DECODER}bert.", num_layers, embedding),
        *linear("decoder.lm_head.transform.dense", f"{head}.transform.dense"),
        *norm("decoder.lm_head.transform.norm", f"{head}.transform.LayerNorm"),
        WeightMapping("decoder.lm_head.bias", (bias,)),
    ]


def transformer_weights(module: str, prefix: str, num_layers: int, embedding: str) -> list[WeightMapping]:
    """Map a text stack, without the keys and values of its cross-attention.

    Args:
        module: our module.
        prefix: of the published names.
        embedding: published name of the token embedding.
    """
    ours = f"{module}.layers.{{i}}."
    theirs = f"{prefix}encoder.layer.{{i}}."
    qkv = [f"{theirs}attention.self.{name}" for name in ("query", "key", "value")]
    layer = [
        *linear(f"{ours}self_attention.qkv", *qkv),
        *linear(f"{ours}self_attention.out", f"{theirs}attention.output.dense"),
        *norm(f"{ours}self_residual.norm", f"{theirs}attention.output.LayerNorm"),
        *linear(f"{ours}cross_attention.query", f"{theirs}crossattention.self.query"),
        *linear(f"{ours}cross_attention.out", f"{theirs}crossattention.output.dense"),
        *norm(f"{ours}cross_residual.norm", f"{theirs}crossattention.output.LayerNorm"),
        *linear(f"{ours}feed_forward.up", f"{theirs}intermediate.dense"),
        *linear(f"{ours}feed_forward.out", f"{theirs}output.dense"),
        *norm(f"{ours}feed_residual.norm", f"{theirs}output.LayerNorm"),
    ]
    positions = f"{prefix}embeddings.position_embeddings.weight"
    return [
        WeightMapping(f"{module}.embedding.weight", (embedding,)),
        WeightMapping(f"{module}.embedding.positions.weight", (positions,)),
        *norm(f"{module}.embedding.norm", f"{prefix}embeddings.LayerNorm"),
        *each_layer(num_layers, layer),
    ]


def key_value_weights(projection: str, prefix: str, num_layers: int) -> list[WeightMapping]:
    """Map the cross-attention keys and values of the text stack at `prefix` to the projection that it attends to."""
    attention = f"{prefix}encoder.layer.{{i}}.crossattention.self"
    return [
        *all_layers(num_layers, linear(f"{projection}.key", f"{attention}.key")),
        *all_layers(num_layers, linear(f"{projection}.value", f"{attention}.value")),
    ]


def stored_name(checkpoint: HFCheckpoint, name: str, alternative: str) -> str:
    """Return which of two names of one tied tensor is in the file: files contain one of them or both."""
    only_alternative = name not in checkpoint.tensors and alternative in checkpoint.tensors
    return alternative if only_alternative else name
