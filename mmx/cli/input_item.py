"""One input of a command, and what rows and messages call it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from mmx.errors import MmxError
from mmx.io.results_file import RESULT_FIELDS, SPEECH_FIELDS

if TYPE_CHECKING:
    from mmx.inference.pipeline import Pipeline

Inputs = Mapping[str, object]  # raw inputs by source name; the source of "" is found by the path


class InputItem(NamedTuple):
    """One input of a command.

    Attributes:
        fields: the fields with which its row starts.
        name: what messages call it.
        inputs: what is read, by source name, or why it cannot be.
        unreadable: whether an error is about this one input; else it is about the arguments (wrong usage).
    """

    fields: dict[str, object]
    name: str
    inputs: Inputs | MmxError
    unreadable: bool = False


def result_fields(pipeline: Pipeline) -> frozenset[str]:
    """Return the fields of a row that are results. A list may have them from an earlier run."""
    reads_audio = any(encoder.modality == "audio" for encoder in pipeline.model.encoders.values())
    return RESULT_FIELDS | SPEECH_FIELDS if reads_audio else RESULT_FIELDS


def display_name(inputs: Inputs) -> str:
    """Return what messages call inputs: their paths, or what else was typed."""
    return " + ".join(str(raw) for raw in inputs.values())
