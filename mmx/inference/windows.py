"""Texts of windows: audio that is longer than its encoder reads is captioned window by window, and the texts joined."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from mmx.config.schema import GenerationConfig
from mmx.inference.generator import TextGenerator
from mmx.inference.inputs import InputWindow
from mmx.inference.outputs import GeneratedText, TextWindow, best_text

WINDOWS_IN_BATCH = 4  # of one input, outside of batch inference


def caption_windows(
    generator: TextGenerator, windows: Sequence[InputWindow], options: GenerationConfig
) -> GeneratedText:
    """Return the text of one input."""
    texts: list[GeneratedText] = []
    for start in range(0, len(windows), WINDOWS_IN_BATCH):
        texts += caption_rows(generator, windows[start : start + WINDOWS_IN_BATCH], options)
    return join_texts(windows, texts)


def stream_windows(
    generator: TextGenerator, windows: Sequence[InputWindow], options: GenerationConfig
) -> Iterator[str]:
    """Yield the text of one input so far, after each token."""
    complete: list[str] = []
    for window in windows:
        text = ""
        if _is_skipped(generator, window):
            yield " ".join(complete)
        else:
            memory = generator.encode_prepared([window.inputs])
            continued = options.model_copy(update={"start": _start(window, options)})
            for text in generator.stream_texts(memory, None, continued):
                yield _join([*complete, text])
        complete = [part for part in (*complete, text) if part]


def caption_rows(
    generator: TextGenerator, windows: Sequence[InputWindow], options: GenerationConfig
) -> list[GeneratedText]:
    """Return the text of each row. A speech recognition model is not asked about audio without any sound."""
    heard = [window for window in windows if not _is_skipped(generator, window)]
    texts: Iterator[GeneratedText] = iter(())
    if heard:
        memory = generator.encode_prepared([window.inputs for window in heard])
        starts = [[_start(window, options)] for window in heard]
        generated = generator.generate_batch(memory, [[None]] * len(heard), options, (), starts)
        texts = iter([best_text(streams[0]) for streams in generated])
    return [_silence() if _is_skipped(generator, window) else next(texts) for window in windows]


def join_texts(windows: Sequence[InputWindow], texts: Sequence[GeneratedText]) -> GeneratedText:
    """Return the text of an input from those of its windows; of a single window, its own.

    The k-th alternative is made of the k-th of every window; a window without sound has none.
    """
    if len(texts) == 1:
        return texts[0]
    alternatives = [join_texts(windows, ranked) for ranked in zip(*(text.alternatives for text in texts), strict=False)]
    parts: list[TextWindow] = []
    tokens: list[tuple[str, float]] = []
    for window, text in zip(windows, texts, strict=True):
        parts.append(TextWindow(window.start, window.end, text.text, text.language, text.no_speech_prob))
        tokens += text.tokens
    language = _main_language(windows, texts)
    no_speech_probs = [text.no_speech_prob for text in texts if text.no_speech_prob is not None]
    return GeneratedText(
        text=_join([text.text for text in texts]),
        score=_mean_score(texts),
        tokens=tuple(tokens),
        windows=tuple(parts),
        language=language,
        language_score=_language_score(language, texts),
        task=next((text.task for text in texts if text.task is not None), None),
        no_speech_prob=min(no_speech_probs, default=None),
        unmet=tuple(dict.fromkeys(word for text in texts for word in text.unmet)),
        alternatives=tuple(alternatives),
    )


def _start(window: InputWindow, options: GenerationConfig) -> str:
    """With what the text of a window begins. Later windows continue the text of the first."""
    if window.start > 0:
        return ""
    return options.start if window.text_start is None else window.text_start


def _is_skipped(generator: TextGenerator, window: InputWindow) -> bool:
    return window.is_silent and generator.model.config.speech is not None


def _silence() -> GeneratedText:
    return GeneratedText("", 0.0, (), no_speech_prob=1.0)


def _join(texts: Sequence[str]) -> str:
    return " ".join(text for text in texts if text)


def _mean_score(texts: Sequence[GeneratedText]) -> float:
    """The mean score of the tokens; of texts without tokens, that of the texts."""
    weights = [len(text.tokens) for text in texts]
    if not any(weights):
        weights = [1] * len(texts)
    total = sum(text.score * weight for text, weight in zip(texts, weights, strict=True))
    return total / sum(weights)


def _main_language(windows: Sequence[InputWindow], texts: Sequence[GeneratedText]) -> str | None:
    """The language of most seconds of text; None if no window has a language."""
    seconds: dict[str, float] = defaultdict(float)
    for window, text in zip(windows, texts, strict=True):
        if text.language is not None:
            seconds[text.language] += window.end - window.start if text.text else 0.0
    return max(seconds, key=seconds.__getitem__, default=None)


def _language_score(language: str | None, texts: Sequence[GeneratedText]) -> float | None:
    """The mean of the scores with which a language was detected; None if it was given."""
    scores = [text.language_score for text in texts if text.language == language and text.language_score is not None]
    return sum(scores) / len(scores) if scores else None
