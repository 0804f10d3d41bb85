"""Speech recognition models of several languages (Radford et al. 2022, "Whisper"): language, task, missing speech.

One decoder step over the memory, with the first token of the prompt alone, gives the probability of each language and
that of no speech (section 2.3). Language and task then replace those of the prompt, for each row.

B: inputs; K: streams; V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmx.config.schema import GenerationConfig, ModelConfig, SpeechConfig
from mmx.errors import ConfigError, most_similar
from mmx.generation.outputs import GenerationOutput
from mmx.hub.whisper_languages import find_language, language_names
from mmx.memory import Memory
from mmx.models.model import Model
from mmx.text.prompts import BOS

# Both must hold for a text to be dropped (section 4.5; the defaults of openai/whisper).
NO_SPEECH_THRESHOLD = 0.6
LOGPROB_THRESHOLD = -1.0


@dataclass(frozen=True)
class SpeechProperties:
    """What a text of a speech recognition model was generated for.

    Attributes:
        language: code, given or detected; None for a model of one language.
        language_score: probability among the languages of the model; None if the language was given.
        task: transcribe or translate; None for a model of one language.
        no_speech_prob: probability that the audio has no speech; None for a model without a token for it.
    """

    language: str | None = None
    language_score: float | None = None
    task: str | None = None
    no_speech_prob: float | None = None

    @property
    def may_lack_speech(self) -> bool:
        """Whether a text of low probability is dropped."""
        return self.no_speech_prob is not None and self.no_speech_prob > NO_SPEECH_THRESHOLD


def resolve_speech_options(speech: SpeechConfig | None, options: GenerationConfig) -> GenerationConfig:
    """Return the options with the language as a code.

    Raises:
        ConfigError: generation.no_languages, if the model has one language only; generation.language or
            generation.task, if it does not have the one that is given.
    """
    given = {"language": options.language, "task": options.task}
    named = [name for name, value in given.items() if value is not None]
    if not named:
        return options
    if speech is None or not speech.language_token_ids:
        raise ConfigError(
            f"generation options: {named[0]} {given[named[0]]!r} was given, and this model has no choice of languages; "
            f"leave out {named[0]}, or give a speech recognition model of several languages.",
            code="generation.no_languages",
            key=named[0],
        )
    if options.task is not None and options.task not in speech.task_token_ids:
        known = list(speech.task_token_ids)
        raise _unknown("task", options.task, known, known, code="generation.task")
    if options.language is None:
        return options
    known = list(speech.language_token_ids)
    code = find_language(options.language, known)
    if code is None:
        names = language_names(known)
        raise _unknown("language", options.language, known, names, code="generation.language")
    return options.model_copy(update={"language": code})


@torch.inference_mode()
def speech_properties(
    model: Model, memory: Memory, streams: int, options: GenerationConfig
) -> list[SpeechProperties] | None:
    """Return the properties of each row of the memory that the decoder attends to; None for any other model.

    Args:
        streams: K, as the stream mask of the memory may have it.

    Raises:
        ConfigError: as `resolve_speech_options`.
    """
    speech = model.config.speech
    options = resolve_speech_options(speech, options)
    if speech is None:
        return None
    prompt = model.tokenizer.special_tokens[BOS]
    task = options.task or _name_of(prompt, speech.task_token_ids)
    given = SpeechProperties(options.language, None, task)
    needs_language = bool(speech.language_token_ids) and options.language is None
    if not needs_language and speech.no_speech_token_id is None:
        return [given] * memory.batch_size
    tokens = torch.full((memory.batch_size, streams, 1), prompt[0], device=model.device)
    logits = model.decoder(tokens, memory)[:, 0, 0].double()
    missing = _no_speech_probs(speech, logits)
    if not needs_language:
        return [SpeechProperties(given.language, None, task, prob) for prob in missing]
    codes = list(speech.language_token_ids)
    probs = logits[:, list(speech.language_token_ids.values())].softmax(-1)
    properties = []
    for row, prob in zip(probs, missing, strict=True):
        best = int(row.argmax())
        properties.append(SpeechProperties(codes[best], float(row[best]), task, prob))
    return properties


def speech_prompt(model: Model, prompt: Sequence[int], properties: SpeechProperties) -> list[int]:
    """Return the prompt with the language and the task of a row in the places of its own; the length is the same."""
    speech = model.config.speech or SpeechConfig()
    replaced: dict[int, int] = {}
    if properties.language is not None:
        language = speech.language_token_ids[properties.language]
        replaced |= dict.fromkeys(speech.language_token_ids.values(), language)
    if properties.task is not None:
        replaced |= dict.fromkeys(speech.task_token_ids.values(), speech.task_token_ids[properties.task])
    return [replaced.get(token, token) for token in prompt]


def prompt_language(config: ModelConfig) -> str | None:
    """Return the language of the prompt of a model; None for a model without a choice of languages."""
    if config.speech is None:
        return None
    return _name_of(config.special_tokens[BOS.name], config.speech.language_token_ids)


def is_without_speech(properties: SpeechProperties, output: GenerationOutput) -> bool:
    """Whether a text is dropped: probably there is no speech, and the text has a low mean log-probability."""
    mean_logprob = sum(output.logprobs) / max(1, len(output.logprobs))
    return properties.may_lack_speech and mean_logprob < LOGPROB_THRESHOLD


def _no_speech_probs(speech: SpeechConfig, logits: Tensor) -> list[float | None]:
    """The probability of no speech in each row of logits [B, V]."""
    if speech.no_speech_token_id is None:
        return [None] * len(logits)
    probs: list[float | None] = logits.softmax(-1)[:, speech.no_speech_token_id].tolist()
    return probs


def _name_of(prompt: Sequence[int], ids: dict[str, int]) -> str | None:
    """The name of the first of some tokens that a prompt has."""
    return next((name for name, token in ids.items() if token in prompt), None)


def _unknown(key: str, given: str, known: Sequence[str], names: Sequence[str], code: str) -> ConfigError:
    """The error of an unknown language or task. names: what may be given, for a suggestion."""
    similar = most_similar(given.lower(), names)
    hint = f"known: {', '.join(known)}." if similar is None else f"did you mean {similar!r}?"
    return ConfigError(
        f"generation options: {key} {given!r} is not one of this model; {hint}",
        code=code,
        key=key,
        given=given,
        known=known,
    )
