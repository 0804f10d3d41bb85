"""Marian (Junczys-Dowmunt et al. 2018): a translation model with a text encoder and a decoder; both become ours.

transformers' MarianMTModel, with a SentencePiece model of its tokens and their ids in vocab.json.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

from mmx.config.schema import DecoderConfig, ModelConfig, ProjectionConfig, SourceConfig
from mmx.errors import CheckpointError
from mmx.hub.conversion import ConversionSpec
from mmx.hub.hf_checkpoint import HFCheckpoint, HFConfig
from mmx.hub.hf_config import activation, read_generation, require_config, special_token_id
from mmx.hub.marian_tokenizer import read_sentencepiece
from mmx.hub.trocr import cross_attention_weights, layer_weights
from mmx.hub.vit_gpt2 import has_untied_head
from mmx.hub.weight_mapping import WeightMapping, computed_mapping

SHARED = "model.shared.weight"
HEAD = "lm_head.weight"
COPIES = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")  # of the shared embedding
POSITIONS = r"model\.(encoder|decoder)\.embed_positions\.weight"  # sinusoidal: in some files, but always computed
ENCODER = "sources.text.encoder."


def conversion(checkpoint: HFCheckpoint) -> ConversionSpec:
    """Return configuration and weight mappings of a checkpoint."""
    config = checkpoint.config
    require_config(checkpoint, config, share_encoder_decoder_embeddings=True)
    embedding = _embedding_name(checkpoint)
    is_missing = HEAD not in checkpoint.tensors and config.get("tie_word_embeddings") is False  # an error below
    is_untied = is_missing or has_untied_head(checkpoint, HEAD, embedding)
    decoder = decoder_config(checkpoint, tie_word_embeddings=not is_untied)
    special_tokens = {
        "pad": [special_token_id(checkpoint, "pad_token_id")],
        "bos": [special_token_id(checkpoint, "decoder_start_token_id")],
        "eos": [special_token_id(checkpoint, "eos_token_id")],
        "caption": [],
    }
    tokenizer = read_sentencepiece(checkpoint, special_tokens)
    source = SourceConfig(
        encoder="text",
        options=encoder_options(checkpoint),
        projection=ProjectionConfig(positions="none", norm="none"),
    )
    dropped_head = () if is_untied else (HEAD,)
    return ConversionSpec(
        config=ModelConfig(
            sources={"text": source}, decoder=decoder, vocab_size=config["vocab_size"], special_tokens=special_tokens
        ),
        tokenizer=tokenizer,
        generation=read_generation(checkpoint, prompt_length=1),
        weights=[
            *encoder_weights(config, embedding, len(tokenizer)),
            *decoder_weights(decoder, embedding),
            *([WeightMapping("decoder.lm_head.weight", (HEAD,))] if is_untied else []),
        ],
        dropped=(SHARED, *COPIES, *dropped_head, POSITIONS),
    )


def encoder_options(checkpoint: HFCheckpoint) -> HFConfig:
    """Return the options of the text encoder."""
    config = checkpoint.config
    return {
        "hidden_size": config["d_model"],
        "num_layers": config["encoder_layers"],
        "num_heads": config["encoder_attention_heads"],
        "norm_placement": "post",
        "max_position_embeddings": config["max_position_embeddings"],
        "activation": activation(config["activation_function"], checkpoint),
        "intermediate_size": config["encoder_ffn_dim"],
        "embedding_scale": sqrt(config["d_model"]) if config.get("scale_embedding") else 1.0,
        "dropout": config.get("dropout", 0.1),
    }


def decoder_config(checkpoint: HFCheckpoint, tie_word_embeddings: bool) -> DecoderConfig:
    """Return the configuration of the decoder, which shares most fields with the encoder."""
    config = checkpoint.config
    fields = encoder_options(checkpoint)
    fields["num_layers"] = config["decoder_layers"]
    fields["num_heads"] = config["decoder_attention_heads"]
    fields["intermediate_size"] = config["decoder_ffn_dim"]
    return DecoderConfig(
        **fields,
        padded_vocab_size=config["vocab_size"],
        tie_word_embeddings=tie_word_embeddings,
        lm_head_bias=True,
    )


def encoder_weights(config: HFConfig, embedding: str, num_tokens: int) -> list[WeightMapping]:
    """Map the text encoder. Its embedding has no rows for ids beyond those of the tokenizer."""
    positions = sinusoidal_table(config["max_position_embeddings"], config["d_model"])
    return [
        WeightMapping(f"{ENCODER}embedding.weight", (embedding,), lambda rows: rows[:num_tokens]),
        computed_mapping(f"{ENCODER}embedding.positions.weight", embedding, positions),
        *layer_weights(f"{ENCODER}layers.{{i}}.", "model.encoder.layers.{i}.", config["encoder_layers"]),
    ]


def decoder_weights(decoder: DecoderConfig, embedding: str) -> list[WeightMapping]:
    """Map the decoder without its head, and the projection."""
    positions = sinusoidal_table(decoder.max_position_embeddings, decoder.hidden_size)
    theirs = "model.decoder.layers.{i}."
    return [
        WeightMapping("decoder.embedding.weight", (embedding,)),
        computed_mapping("decoder.embedding.positions.weight", embedding, positions),
        *layer_weights("decoder.layers.{i}.", theirs, decoder.num_layers),
        *cross_attention_weights(theirs, decoder.num_layers, "sources.text.projection"),
        WeightMapping("decoder.lm_head.bias", ("final_logits_bias",), lambda bias: bias.squeeze(0)),  # stored as [1, V]
    ]


def sinusoidal_table(num_positions: int, hidden_size: int) -> Tensor:
    """Return sinusoidal position embeddings [num_positions, E], first the sines, then the cosines.

    Vaswani et al. 2017, section 3.5, computed in float64.
    """
    rates = 10000.0 ** (-torch.arange(0, hidden_size, 2, dtype=torch.float64) / hidden_size)
    angles = torch.arange(num_positions, dtype=torch.float64)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()[:, : hidden_size // 2]], -1).float()


def _embedding_name(checkpoint: HFCheckpoint) -> str:
    """Return the published name of the shared embedding. Files contain it once or several times, with equal values."""
    tensors = checkpoint.tensors
    names = [name for name in (SHARED, *COPIES, HEAD) if name in tensors]
    for copy in names[1:]:
        if copy in COPIES and not torch.equal(tensors[copy], tensors[names[0]]):
            raise CheckpointError(
                f"{checkpoint.name!r} holds {copy} and {names[0]}, which its family shares, but they differ; download "
                "it again.",
                code="hub.shared_embedding",
                name=checkpoint.name,
                tensors=[copy, names[0]],
            )
    return names[0] if names else SHARED
