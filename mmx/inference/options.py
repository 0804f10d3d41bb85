"""Keyword arguments of the pipeline: decoding options by the names of transformers' GenerationConfig.

Defaults are those of the model (`generation.yaml` of its folder). `None` keeps the default.
See `mmx.config.schema.GenerationConfig` for the meaning and the range of each option.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict


class DecodingOptions(TypedDict, total=False):
    """Options of a call that returns one text for each prompt."""

    max_new_tokens: int | None
    min_new_tokens: int | None
    num_beams: int | None
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    length_penalty: float | None
    early_stopping: bool | None
    repetition_penalty: float | None
    no_repeat_ngram_size: int | None
    suppress_tokens: Sequence[int] | None
    begin_suppress_tokens: Sequence[int] | None
    forced_eos_token_id: int | None
    renormalize_logits: bool | None
    guidance_scale: float | None
    stop_strings: Sequence[str] | None
    seed: int | None


class GenerationOptions(DecodingOptions, total=False):
    """Options of a call that returns several texts for each prompt."""

    num_return_sequences: int | None
