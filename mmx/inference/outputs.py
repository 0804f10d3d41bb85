"""Inputs and results of inference as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import nan
from typing import TYPE_CHECKING, TypeAlias

from mmx.boxes import Box

if TYPE_CHECKING:
    from mmx.io.audio import AudioInput
    from mmx.io.images import ImageInput

# What a source reads. A mapping names the sources: {"image": "a.jpg", "audio": "a.wav"}; any of them may be left out.
ModelInput: TypeAlias = "ImageInput | AudioInput | Mapping[str, object]"


@dataclass(frozen=True)
class TextWindow:
    """The text of one window of audio, with the properties of a `GeneratedText`. start, end: in seconds."""

    start: float
    end: float
    text: str
    language: str | None = None
    no_speech_prob: float | None = None

    def fields(self) -> dict[str, object]:
        """Return the window as a field of a row."""
        fields: dict[str, object] = {"start": round(self.start, 3), "end": round(self.end, 3), "text": self.text}
        optional = {"language": self.language, "no_speech_prob": _rounded(self.no_speech_prob)}
        return fields | {name: value for name, value in optional.items() if value is not None}


@dataclass(frozen=True)
class GeneratedText:
    """One generated text.

    Attributes:
        text: the decoded text. Empty if a speech recognition model finds no speech.
        score: mean log-probability per token in nats (with length_penalty 1), also of a text that was dropped because
            there is no speech.
        tokens: the text of each token with its log-probability in nats.
        logprob: log p(text | memory, question) in nats, including the end of the text.
        probability: exp(logprob / answer_temperature), which says how often such an answer is right if the option
            `answer_temperature` was fitted (`mmx eval` does that).
        windows: the windows of audio that is longer than its encoder reads; their texts are joined by spaces.
        language: code of the language of a speech recognition model of several languages, given or detected. Of
            windows, the language of most seconds.
        language_score: its probability among the languages of the model, if it was detected.
        task: transcribe, or translate (to English).
        no_speech_prob: probability that the audio has no speech. Of windows, the smallest.
        unmet: words of the options `avoid` that the text has all the same, and of `include` that it does not have.
        alternatives: further texts of the same prompt, best first, if several were asked for.
    """

    text: str
    score: float
    tokens: tuple[tuple[str, float], ...] = field(repr=False)
    logprob: float = nan
    probability: float = nan
    windows: tuple[TextWindow, ...] = ()
    language: str | None = None
    language_score: float | None = None
    task: str | None = None
    no_speech_prob: float | None = None
    unmet: tuple[str, ...] = ()
    alternatives: tuple[GeneratedText, ...] = field(default=(), repr=False)

    def __repr__(self) -> str:
        language = "" if self.language is None else f", language={self.language!r}"
        windows = "" if not self.windows else f", {len(self.windows)} windows"
        return f"GeneratedText(text={self.text!r}, score={self.score!r}{language}{windows})"

    def speech_fields(self) -> dict[str, object]:
        """Return windows, language, task and their probabilities as fields of a row; only those that the text has."""
        fields: dict[str, object] = {}
        if self.windows:
            fields["windows"] = [window.fields() for window in self.windows]
        optional = {
            "language": self.language,
            "language_score": _rounded(self.language_score),
            "task": self.task,
            "no_speech_prob": _rounded(self.no_speech_prob),
        }
        return fields | {name: value for name, value in optional.items() if value is not None}


def best_text(texts: Sequence[GeneratedText]) -> GeneratedText:
    """Return the first of some texts of one prompt, with the others as its alternatives."""
    return replace(texts[0], alternatives=tuple(texts[1:])) if len(texts) > 1 else texts[0]


@dataclass(frozen=True)
class RankedAnswer:
    """A candidate answer.

    Attributes:
        answer: the text.
        probability: its share among the candidates, in 0..1.
        logprob: log p(answer | memory, question) in nats, including the end of the text.
    """

    answer: str
    probability: float
    logprob: float


@dataclass(frozen=True)
class Question:
    """A question about an input.

    Attributes:
        image: the input.
        question: the text of the question.
        box: (x0, y0, x1, y1), each 0..1 from the top left: only this region is attended to.
        start: with what the answer begins; None for the option `start`.
    """

    image: ModelInput
    question: str
    box: Box | None = None
    start: str | None = None


def _rounded(probability: float | None) -> float | None:
    return None if probability is None else round(probability, 4)
