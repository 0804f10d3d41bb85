"""Marian (Junczys-Dowmunt et al. 2018): a text encoder and a decoder that looks at it, which translate. Both are ours.

Published: transformers' MarianMTModel, with the SentencePiece model of its tokens and their numbers in vocab.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from mmx.config.schema import DecoderConfig, ModelConfig, ProjectionConfig, SourceConfig
from mmx.errors import CheckpointError
from mmx.hub.conversion import ConversionSpec
from mmx.hub.hf_checkpoint import HFCheckpoint, read_errors
from mmx.hub.hf_config import activation, computed_mapping, read_generation, require_config, special_token_id
from mmx.hub.trocr import cross_attention_weights, layer_weights
from mmx.hub.vit_gpt2 import has_own_head
from mmx.hub.weight_mapping import WeightMapping
from mmx.text.tokenizer import Tokenizer

SHARED, HEAD = "model.shared.weight", "lm_head.weight"
COPIES = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")  # of the shared table
WAVES = r"model\.(encoder|decoder)\.embed_positions\.weight"  # stored by some, and computed by all
SPM, UNKNOWN = "source.spm", "<unk>"
UNIGRAM, NORMAL, USER_DEFINED = 1, 1, 4  # numbers of sentencepiece_model.proto
NEEDED = "reading Marian's tokens needs sentencepiece and protobuf: pip install 'mmx[marian]'."


def conversion(published: HFCheckpoint) -> ConversionSpec:
    """The config map and the weight map."""
    config = published.config
    require_config(published, config, share_encoder_decoder_embeddings=True)
    table = _table(published)
    untied = HEAD not in published.tensors and config.get("tie_word_embeddings") is False  # then it must not be lacking
    own_head = untied or has_own_head(published, HEAD, table)
    decoder = decoder_config(published, config, tied=not own_head)
    pad, start, end = (special_token_id(published, f"{token}_token_id") for token in ("pad", "decoder_start", "eos"))
    marks = {"pad": [pad], "bos": [start], "eos": [end], "caption": []}
    tokenizer = read_pieces(published, marks)
    source = SourceConfig(
        encoder="text",
        options=encoder_options(published, config),
        projection=ProjectionConfig(positions="none", norm="none"),
    )
    return ConversionSpec(
        config=ModelConfig(
            sources={"text": source}, decoder=decoder, vocab_size=config["vocab_size"], special_tokens=marks
        ),
        tokenizer=tokenizer,
        generation=read_generation(published, prompt=1),
        weights=weights(config, decoder, table, own_head, len(tokenizer)),
        dropped=(SHARED, *COPIES, *(() if own_head else (HEAD,)), WAVES),
    )


def decoder_config(published: HFCheckpoint, config: Mapping[str, Any], tied: bool) -> DecoderConfig:
    """The config map of the decoder."""
    alike = encoder_options(published, config)
    alike |= {"num_layers": config["decoder_layers"], "num_heads": config["decoder_attention_heads"]}
    alike |= {"intermediate_size": config["decoder_ffn_dim"]}
    return DecoderConfig(**alike, padded_vocab_size=config["vocab_size"], tie_word_embeddings=tied, lm_head_bias=True)


def encoder_options(published: HFCheckpoint, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config map of the encoder."""
    return {
        "hidden_size": config["d_model"],
        "num_layers": config["encoder_layers"],
        "num_heads": config["encoder_attention_heads"],
        "norm_placement": "post",
        "max_position_embeddings": config["max_position_embeddings"],
        "activation": activation(config["activation_function"], published),
        "intermediate_size": config["encoder_ffn_dim"],
        "embedding_scale": sqrt(config["d_model"]) if config.get("scale_embedding") else 1.0,
        "dropout": config.get("dropout", 0.1),
    }


def weights(
    config: Mapping[str, Any], decoder: DecoderConfig, table: str, own_head: bool, tokens: int
) -> list[WeightMapping]:
    """The weight map. The encoder meets no token beyond those of the tokenizer, and has no rows for them."""
    encoder, positions = "sources.text.encoder.", sinusoidal_table(decoder.max_position_embeddings, decoder.hidden_size)
    return [
        WeightMapping(f"{encoder}embedding.weight", (table,), lambda rows: rows[:tokens]),
        computed_mapping(f"{encoder}embedding.positions.weight", table, positions),
        *layer_weights(f"{encoder}layers.{{i}}.", "model.encoder.layers.{i}.", config["encoder_layers"]),
        WeightMapping("decoder.embedding.weight", (table,)),
        computed_mapping("decoder.embedding.positions.weight", table, positions),
        *layer_weights("decoder.layers.{i}.", "model.decoder.layers.{i}.", decoder.num_layers),
        *cross_attention_weights("model.decoder.layers.{i}.", decoder.num_layers, "sources.text.projection"),
        *([WeightMapping("decoder.lm_head.weight", (HEAD,))] if own_head else []),
        WeightMapping("decoder.lm_head.bias", ("final_logits_bias",), lambda bias: bias.squeeze(0)),  # stored as [1, V]
    ]


def sinusoidal_table(count: int, width: int) -> Tensor:
    """Sines of falling frequency, then their cosines, for positions from 0 on: [count, E].

    Vaswani et al. 2017, section 3.5, with the exponents of the paper and the columns in two halves.
    """
    rates = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(count, dtype=torch.float64)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()[:, : width // 2]], -1).float()


def _table(published: HFCheckpoint) -> str:
    """The name of the one table of tokens. Files keep it once, or again for each part; then all must be the same."""
    tensors = published.tensors
    names = [name for name in (SHARED, *COPIES, HEAD) if name in tensors]
    for copy in names[1:]:
        if copy in COPIES and not torch.equal(tensors[copy], tensors[names[0]]):
            raise CheckpointError(
                f"{published.name!r} holds {copy} and {names[0]}, which its family shares, and they differ; download "
                "it again."
            )
    return names[0] if names else SHARED


# ---- tokens ----------------------------------------------------------------------------------------------------


def read_pieces(published: HFCheckpoint, marks: Mapping[str, list[int]]) -> Tokenizer:
    """The pieces of source.spm (Kudo 2018, "Subword Regularization", section 3.2) under the numbers of vocab.json.

    Pieces that only the target language has stand in for what would else be unknown. Language codes (>>fr<<) are whole
    tokens. Raises CheckpointError for files that are missing, damaged, or of another kind.
    """
    from tokenizers import AddedToken, decoders, models
    from tokenizers import Tokenizer as Engine

    names = _numbered(published)
    rules, scores = _read_spm(published)
    with read_errors(published, "vocab.json and source.spm"):
        unknown = names.index(UNKNOWN)
        # What a person types must not become a mark. No piece with a space in it does: spaces have turned into "▁".
        hidden = {i: f" {names[i]}" for i in (*marks["pad"], *marks["eos"], unknown)}
        rare = 10 * min(-1.0, *scores.values())  # a letter, so that known pieces win wherever there are any
        pieces = [(hidden.get(i, name), scores.get(name, rare * len(name) - 1)) for i, name in enumerate(names)]
        engine = Engine(models.Unigram(pieces, unk_id=unknown, byte_fallback=False))
        engine.normalizer, engine.pre_tokenizer = _cleaning(rules)
        engine.decoder = decoders.Metaspace(prepend_scheme="always")
        engine.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in hidden.values()])
        codes = [name for name in names if name.startswith(">>") and name.endswith("<<")]
        engine.add_tokens([AddedToken(code, normalized=False) for code in codes])
        return Tokenizer.from_json(engine.to_str(), published.name, marks)


def _numbered(published: HFCheckpoint) -> list[str]:
    """The tokens of vocab.json in the order of their numbers, which must be 0, 1, 2, ..."""
    found = published.read_json("vocab.json")
    if not found or {str(i) for i in found.values()} != {str(i) for i in range(len(found))} or UNKNOWN not in found:
        raise CheckpointError(
            f"vocab.json of {published.name!r} does not number its tokens, {UNKNOWN} among them, from 0 on without "
            "gaps; download it again."
        )
    return sorted(found, key=lambda token: int(found[token]))


def _read_spm(published: HFCheckpoint) -> tuple[Any, dict[str, float]]:
    """source.spm: how it cleans text, and the log-probability of each piece that text may become."""
    try:
        from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined,unused-ignore]  # generated
    except ImportError as error:
        raise CheckpointError(NEEDED) from error
    if not (published.folder / SPM).exists():
        raise CheckpointError(f"{published.name!r} has no {SPM}; expected the SentencePiece model of its tokens.")
    with read_errors(published, SPM):
        found = ModelProto.FromString((published.folder / SPM).read_bytes())
        scores = {piece.piece: piece.score for piece in found.pieces if piece.type in (NORMAL, USER_DEFINED)}
    if found.trainer_spec.model_type != UNIGRAM or not scores:
        raise CheckpointError(f"{SPM} of {published.name!r} is no unigram model, the one kind that mmx reads.")
    return found.normalizer_spec, scores


def _cleaning(rules: Any) -> tuple[Any, Any]:
    """The normalizer and the pre-tokenizer that do what SentencePiece's `normalizer_spec` says."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex(r"\A | \z"), "")]
    prepend = "always" if rules.add_dummy_prefix else "never"
    return normalizers.Sequence(steps), pre_tokenizers.Metaspace(prepend_scheme=prepend, split=True)
