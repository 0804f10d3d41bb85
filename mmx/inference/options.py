"""Keyword arguments of the pipeline: decoding options by the names of transformers' GenerationConfig.

Defaults are those of the model (`generation.yaml` of its folder). `None` keeps the default.
See `mmx.config.schema.GenerationConfig` for the meaning and the range of each option.

A default gives way to the options of a call:

- `temperature`, `top_k` or `top_p` imply `do_sample=True`, because only sampling uses them.
- Sampling implies `num_beams=1`, and `num_beams` above 1 implies `do_sample=False`.

Options of one call that contradict each other are refused: sampling with `num_beams` above 1, and `do_sample=False`
with a `temperature`, `top_k` or `top_p` that would change samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

from mmx.config.schema import SpeechTask
from mmx.errors import ConfigError

# Options that only sampling uses, with the values that change no sample.
NEUTRAL_SAMPLING_OPTIONS: Mapping[str, object] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}


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
    answer_temperature: float | None
    stop_strings: Sequence[str] | None
    start: str | None
    avoid: Sequence[str] | None
    include: Sequence[str] | None
    language: str | None
    task: SpeechTask | None
    seed: int | None


class GenerationOptions(DecodingOptions, total=False):
    """Options of a call that returns several texts for each prompt."""

    num_return_sequences: int | None


def implied_options(replaced: Mapping[str, object]) -> dict[str, object]:
    """Return the options that those of a call imply, see the module.

    Raises:
        ConfigError: generation.sampling_options, if the call has do_sample=False and options that only sampling uses.
    """
    implied: dict[str, object] = {}
    sampling_options = [name for name in NEUTRAL_SAMPLING_OPTIONS if name in replaced]
    do_sample = replaced.get("do_sample")
    num_beams = replaced.get("num_beams")
    if do_sample is False:
        _check_neutral({name: replaced[name] for name in sampling_options})
    elif do_sample is True or sampling_options:
        implied["do_sample"] = True
        implied["num_beams"] = 1
    elif isinstance(num_beams, int) and num_beams > 1:  # a value of another type is refused later
        implied["do_sample"] = False
    return implied


def _check_neutral(sampling_options: Mapping[str, object]) -> None:
    """Raise ConfigError if one of the options would change samples."""
    for name, value in sampling_options.items():
        if value != NEUTRAL_SAMPLING_OPTIONS[name]:
            raise ConfigError(
                f"generation options: {name} {value!r} was given with do_sample=False; leave out {name}, or do_sample.",
                code="generation.sampling_options",
                key=name,
            )
