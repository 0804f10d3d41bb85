"""BLIP that answers questions (Li et al. 2022, "BLIP", section 5.4): one text stack reads the question while looking at
the picture, another looks at what the question has become. transformers' BlipForQuestionAnswering.

transformers lets the decoder look at the padding of a batch's shorter questions; here it does not, unless
`reader.shows_padding` is set.
"""

from __future__ import annotations

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
    special_tokens,
    transformer_config,
    transformer_weights,
    vision_source,
)
from mmx.hub.conversion import ConversionSpec
from mmx.hub.hf_checkpoint import HFCheckpoint
from mmx.hub.hf_config import read_generation, read_tokenizer
from mmx.text.tokenizer import Tokenizer

READER = "text_encoder."


def conversion(published: HFCheckpoint) -> ConversionSpec:
    """The config map and the weight map."""
    text = published.config["text_config"]
    decoder = decoder_config(published, text)
    marks = special_tokens(text) | {"answer": []}
    tokenizer = read_tokenizer(published, marks)
    opening, closing = around(tokenizer)
    reader = QuestionEncoderConfig(
        **transformer_config(published, text),
        projection=ProjectionConfig(positions="none", norm="none"),
        prefix_token_ids=opening,
        suffix_token_ids=closing,
    )
    return ConversionSpec(
        config=ModelConfig(
            sources={"image": vision_source(published)},
            decoder=decoder,
            question_encoder=reader,
            vocab_size=text["vocab_size"],
            question_input="question_encoder",
            special_tokens=marks,
        ),
        tokenizer=tokenizer,
        generation=read_generation(published, prompt=1),
        weights=[
            *transformer_weights(
                "question_encoder", READER, reader.num_layers, f"{READER}embeddings.word_embeddings.weight"
            ),
            *key_value_weights(PROJECTION, READER, reader.num_layers),
            *decoder_weights(published, decoder.num_layers),
            *key_value_weights("question_encoder.projection", f"{DECODER}bert.", decoder.num_layers),
        ],
        dropped=(BUFFERS, TIED),
        encoders={"image": VISION},
    )


def around(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens that a published tokenizer puts before a text, and after it."""
    found = tokenizer.engine.encode("a")
    added = list(found.special_tokens_mask)
    start, stop = added.index(0), len(added) - added[::-1].index(0)
    return tuple(found.ids[:start]), tuple(found.ids[stop:])
