"""BLIP that captions (Li et al. 2022, "BLIP", section 3.1): a vision transformer, and a BERT (Devlin et al. 2019) that
looks at all its states. transformers' BlipForConditionalGeneration.

The facts and tables of a text stack are here for the captioner, and for both stacks of `blip_vqa`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmx.config.schema import DecoderConfig, ModelConfig, SourceConfig
from mmx.hub.conversion import ConversionSpec
from mmx.hub.hf_checkpoint import HFCheckpoint
from mmx.hub.hf_config import activation, first_token_id, image_source, read_generation, read_tokenizer, require_config
from mmx.hub.weight_mapping import WeightMapping, all_layers, each_layer, linear, norm

VISION, DECODER = "vision_model.", "text_decoder."
PROJECTION = "sources.image.projection"
BUFFERS = r"text_(encoder|decoder\.bert)\.embeddings\.position_ids"
TIED = r"text_decoder\.cls\.predictions\.decoder\.(weight|bias)"  # transformers has the embedding and `bias` twice


def conversion(published: HFCheckpoint) -> ConversionSpec:
    """The config map and the weight map."""
    text = published.config["text_config"]
    decoder = decoder_config(published, text)
    marks = special_tokens(text) | {"caption": []}
    return ConversionSpec(
        config=ModelConfig(
            sources={"image": vision_source(published)},
            decoder=decoder,
            vocab_size=text["vocab_size"],
            special_tokens=marks,
        ),
        tokenizer=read_tokenizer(published, marks),
        generation=read_generation(published, prompt=1),
        weights=[
            *decoder_weights(published, decoder.num_layers),
            *key_value_weights(PROJECTION, f"{DECODER}bert.", decoder.num_layers),
        ],
        dropped=(BUFFERS, TIED),
        encoders={"image": VISION},
    )


def special_tokens(text: Mapping[str, Any]) -> dict[str, list[int]]:
    """What fills up, opens and closes a text: the end is BERT's separator, not the `eos_token_id` of the config."""
    names = {"pad": "pad_token_id", "bos": "bos_token_id", "eos": "sep_token_id"}
    return {mark: [first_token_id(text[name])] for mark, name in names.items()}


def vision_source(published: HFCheckpoint) -> SourceConfig:
    """The vision encoder, its class token looked at as well."""
    return image_source(published, {"model_type": "blip_vision_model", **published.config["vision_config"]})


def decoder_config(published: HFCheckpoint, text: Mapping[str, Any]) -> DecoderConfig:
    """The config map of the stack that speaks: the same as any, and BERT's head."""
    return DecoderConfig(**transformer_config(published, text), lm_head_transform=True, lm_head_bias=True)


def transformer_config(published: HFCheckpoint, text: Mapping[str, Any]) -> dict[str, Any]:
    """The config map of a text stack: fields of our LookingConfig."""
    require_config(published, published.config, tie_word_embeddings=True)
    require_config(published, text, tie_word_embeddings=True, is_decoder=True, position_embedding_type="absolute")
    return {
        "hidden_size": text["hidden_size"],
        "num_layers": text["num_hidden_layers"],
        "num_heads": text["num_attention_heads"],
        "norm_placement": "post",
        "norm_eps": text.get("layer_norm_eps", 1e-12),
        "max_position_embeddings": text["max_position_embeddings"],
        "activation": activation(text.get("hidden_act", "gelu"), published),
        "intermediate_size": text["intermediate_size"],
        "embedding_norm": True,
        "dropout": text.get("hidden_dropout_prob", 0.0),
        "table": text["vocab_size"],
    }


def decoder_weights(published: HFCheckpoint, layers: int) -> list[WeightMapping]:
    """The weight map of the stack that speaks, and of its head."""
    head = f"{DECODER}cls.predictions"
    embedding = stored_as(published, f"{DECODER}bert.embeddings.word_embeddings.weight", f"{head}.decoder.weight")
    return [
        *transformer_weights("decoder", f"{DECODER}bert.", layers, embedding),
        *linear("decoder.lm_head.transform.dense", f"{head}.transform.dense"),
        *norm("decoder.lm_head.transform.norm", f"{head}.transform.LayerNorm"),
        WeightMapping("decoder.lm_head.bias", (stored_as(published, f"{head}.bias", f"{head}.decoder.bias"),)),
    ]


def transformer_weights(ours: str, prefix: str, layers: int, embedding: str) -> list[WeightMapping]:
    """The weight map of a text stack: everything but the keys and values of what it looks at."""
    block, layer = f"{ours}.layers.{{i}}.", f"{prefix}encoder.layer.{{i}}."
    attention = [f"{layer}attention.self.{part}" for part in ("query", "key", "value")]
    return [
        WeightMapping(f"{ours}.embedding.weight", (embedding,)),
        WeightMapping(f"{ours}.embedding.positions.weight", (f"{prefix}embeddings.position_embeddings.weight",)),
        *norm(f"{ours}.embedding.norm", f"{prefix}embeddings.LayerNorm"),
        *each_layer(
            layers,
            [
                *linear(f"{block}self_attention.qkv", *attention),
                *linear(f"{block}self_attention.out", f"{layer}attention.output.dense"),
                *norm(f"{block}self_residual.norm", f"{layer}attention.output.LayerNorm"),
                *linear(f"{block}cross_attention.query", f"{layer}crossattention.self.query"),
                *linear(f"{block}cross_attention.out", f"{layer}crossattention.output.dense"),
                *norm(f"{block}cross_residual.norm", f"{layer}crossattention.output.LayerNorm"),
                *linear(f"{block}feed_forward.up", f"{layer}intermediate.dense"),
                *linear(f"{block}feed_forward.out", f"{layer}output.dense"),
                *norm(f"{block}feed_residual.norm", f"{layer}output.LayerNorm"),
            ],
        ),
    ]


def key_value_weights(projection: str, prefix: str, layers: int) -> list[WeightMapping]:
    """The weight map of the keys and values that the stack at `prefix` looks at: they go to what it looks at."""
    looks = f"{prefix}encoder.layer.{{i}}.crossattention.self"
    return [
        *all_layers(layers, linear(f"{projection}.key", f"{looks}.key")),
        *all_layers(layers, linear(f"{projection}.value", f"{looks}.value")),
    ]


def stored_as(published: HFCheckpoint, name: str, twin: str) -> str:
    """Of two names of one tied tensor the one that is there: files keep one of them, not always the same."""
    return twin if name not in published.tensors and twin in published.tensors else name
