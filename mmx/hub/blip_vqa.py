"""BLIP for questions (Li et al. 2022, "BLIP", section 5.4): transformers' BlipForQuestionAnswering.

The question encoder reads the question with cross-attention to the image; the decoder attends to the encoded question.
transformers lets the decoder attend to the padding of shorter questions in a batch; here it does so only with
`question_encoder.attend_padding`.
"""

from __future__ import annotations

from typing import NamedTuple

from mmx.config.schema import ModelConfig, ProjectionConfig, QuestionEncoderConfig
from mmx.hub.blip import (
    BUFFERS,
    DECODER,
    PROJECTION,
    TIED,
    VISION,
    decoder_config,
    decoder_weights,
    key_value_weights,
    special_token_ids,
    transformer_fields,
    transformer_weights,
    vision_source,
)
from mmx.hub.conversion import ConversionSpec
from mmx.hub.hf_checkpoint import HFCheckpoint
from mmx.hub.hf_config import read_generation, read_tokenizer
from mmx.hub.weight_mapping import WeightMapping
from mmx.text.tokenizer import Tokenizer

QUESTION_ENCODER = "text_encoder."


class AddedTokens(NamedTuple):
    """Ids of the tokens that a tokenizer adds before and after a text."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]


def conversion(checkpoint: HFCheckpoint) -> ConversionSpec:
    """Return configuration and weight mappings of a checkpoint."""
    text_config = checkpoint.config["text_config"]
    decoder = decoder_config(checkpoint, text_config)
    special_tokens = special_token_ids(text_config) | {"answer": []}
    tokenizer = read_tokenizer(checkpoint, special_tokens)
    added = added_tokens(tokenizer)
    question_encoder = QuestionEncoderConfig(
        **transformer_fields(checkpoint, text_config),
        projection=ProjectionConfig(positions="none", norm="none"),
        prefix_token_ids=added.prefix,
        suffix_token_ids=added.suffix,
    )
    return ConversionSpec(
        config=ModelConfig(
            sources={"image": vision_source(checkpoint)},
            decoder=decoder,
            question_encoder=question_encoder,
            vocab_size=text_config["vocab_size"],
            question_input="question_encoder",
            special_tokens=special_tokens,
        ),
        tokenizer=tokenizer,
        generation=read_generation(checkpoint, prompt_length=1),
        weights=[
            *question_encoder_weights(question_encoder.num_layers),
            *decoder_weights(checkpoint, decoder.num_layers),
            *key_value_weights("question_encoder.projection", f"{DECODER}bert.", decoder.num_layers),
        ],
        dropped=(BUFFERS, TIED),
        encoders={"image": VISION},
    )


def question_encoder_weights(num_layers: int) -> list[WeightMapping]:
    """Map the question encoder, and its cross-attention keys and values to the projection of the image."""
    embedding = f"{QUESTION_ENCODER}embeddings.word_embeddings.weight"
    return [
        *transformer_weights("question_encoder", QUESTION_ENCODER, num_layers, embedding),
        *key_value_weights(PROJECTION, QUESTION_ENCODER, num_layers),
    ]


def added_tokens(tokenizer: Tokenizer) -> AddedTokens:
    """Return the tokens that a published tokenizer adds around a text."""
    encoding = tokenizer.backend.encode("a")
    is_special = list(encoding.special_tokens_mask)
    start = is_special.index(0)
    stop = len(is_special) - is_special[::-1].index(0)
    return AddedTokens(tuple(encoding.ids[:start]), tuple(encoding.ids[stop:]))
