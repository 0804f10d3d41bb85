"""BLIP that answers questions (Li et al. 2022, "BLIP", section 5.4): one text stack reads the question while looking at
the picture, another looks at what the question has become. transformers' BlipForQuestionAnswering.

transformers lets the decoder look at the padding of a batch's shorter questions; here it does not, unless
`reader.shows_padding` is set.
"""

from __future__ import annotations

from mmx.config.schema import ModelConfig, ProjectionConfig, ReaderConfig
from mmx.hub.blip import (
    BUFFERS,
    DECODER,
    PROJECTION,
    TIED,
    VISION,
    decoder_config,
    decoder_weights,
    memory_weights,
    special_tokens,
    stack_facts,
    stack_weights,
    vision_source,
)
from mmx.hub.conversion import Plan
from mmx.hub.hf_checkpoint import Published
from mmx.hub.hf_config import read_generation, read_tokenizer
from mmx.text.tokenizer import Tokenizer

READER = "text_encoder."


def plan(published: Published) -> Plan:
    """The config map and the weight map."""
    text = published.config["text_config"]
    decoder = decoder_config(published, text)
    marks = special_tokens(text) | {"answer": []}
    tokenizer = read_tokenizer(published, marks)
    opening, closing = around(tokenizer)
    reader = ReaderConfig(
        **stack_facts(published, text),
        projection=ProjectionConfig(position="none", norm="none"),
        opening=opening,
        closing=closing,
    )
    return Plan(
        config=ModelConfig(
            sources={"image": vision_source(published)},
            decoder=decoder,
            reader=reader,
            vocabulary=text["vocab_size"],
            question_to="reader",
            marks=marks,
        ),
        tokenizer=tokenizer,
        generation=read_generation(published, prompt=1),
        weights=[
            *stack_weights("reader", READER, reader.layers, f"{READER}embeddings.word_embeddings.weight"),
            *memory_weights(PROJECTION, READER, reader.layers),
            *decoder_weights(published, decoder.layers),
            *memory_weights("reader.projection", f"{DECODER}bert.", decoder.layers),
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
