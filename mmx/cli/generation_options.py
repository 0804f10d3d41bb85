"""Options of text generation that `mmx caption` and `mmx ask` share. Their names are those of Python."""

from __future__ import annotations

from typing import Annotated

import typer

_TEMPERATURE_HELP = "Sample, with the logits divided by this; below 1 is closer to the most probable text."
_TOP_P_HELP = "Sample from the most probable tokens whose probabilities reach this."
_TOP_K_HELP = "Sample from this many tokens; 0 for all."
_SEED_HELP = "Seed of sampling."
_TEXTS_HELP = "Texts for each input, by sampling or with as many beams. Rows carry all of them."
_LENGTH_HELP = "Beams are ranked by log p / length ** X: above 1 prefers longer texts."
_REPETITION_HELP = "Above 1 makes tokens that the text has already less probable."
_START_HELP = "With what each text begins, such as 'a photo of'. Fields as in --prepend."
_PREPEND_HELP = "Add this before each text; the model does not read it. {folder}, {stem}, {exif:TAG} or a field."
_APPEND_HELP = "Add this after each text; see --prepend."
_AVOID_HELP = "Words that no text has, separated by commas."
_INCLUDE_HELP = "Words that each text has, separated by commas; | separates alternatives: 'cat,orange|white'."

TemperatureOption = Annotated[float | None, typer.Option("--temperature", metavar="X", help=_TEMPERATURE_HELP)]
TopPOption = Annotated[float | None, typer.Option("--top-p", metavar="X", help=_TOP_P_HELP)]
TopKOption = Annotated[int | None, typer.Option("--top-k", metavar="N", min=0, help=_TOP_K_HELP)]
SeedOption = Annotated[int | None, typer.Option("--seed", metavar="N", min=0, help=_SEED_HELP)]
NumReturnSequencesOption = Annotated[
    int | None, typer.Option("--num-return-sequences", metavar="N", min=1, help=_TEXTS_HELP)
]
LengthPenaltyOption = Annotated[float | None, typer.Option("--length-penalty", metavar="X", help=_LENGTH_HELP)]
RepetitionPenaltyOption = Annotated[
    float | None, typer.Option("--repetition-penalty", metavar="X", help=_REPETITION_HELP)
]
StartOption = Annotated[str | None, typer.Option("--start", metavar="TEXT", help=_START_HELP)]
PrependOption = Annotated[str | None, typer.Option("--prepend", metavar="TEXT", help=_PREPEND_HELP)]
AppendOption = Annotated[str | None, typer.Option("--append", metavar="TEXT", help=_APPEND_HELP)]
AvoidOption = Annotated[str | None, typer.Option("--avoid", metavar="WORDS", help=_AVOID_HELP)]
IncludeOption = Annotated[str | None, typer.Option("--include", metavar="WORDS", help=_INCLUDE_HELP)]


def parse_words(text: str | None) -> list[str] | None:
    """Parse the value of --avoid or --include; empty words are refused with the other options of generation."""
    return None if text is None else [word.strip() for word in text.split(",")]
